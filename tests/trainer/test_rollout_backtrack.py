"""Texts with a backspace: what is left of them, what each token sees, and what a model writes, prefix by prefix."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kd_kernels import sample
from kd_trainer.data import Document
from kd_trainer.rollout import Options, Sampling, backtrack, generate, mistaken, text_left, trail
from rollout_oracles import LENGTHS, VOCAB, logits_after, prompts, tiny_model

BACK = 60


def left_of(actions: list[int], first: int, back: int = BACK) -> list[int]:
    """The text, by the definition."""
    text = actions[:first]
    for action in actions[first:]:
        if action != back:
            text.append(action)
        elif len(text) > first:
            text.pop()
    return text


@pytest.mark.parametrize(("actions", "first", "text"), [
    ([5, 1, 2, BACK, 3], 1, [5, 1, 3]),
    ([5, 1, 2, BACK, BACK, BACK, 3], 2, [5, 1, 3]),
    ([5, BACK, 7], 2, [5, BACK, 7]),  # one in the prompt is a token
    ([5, BACK, BACK], 1, [5]),
])
def test_the_text_that_is_left(actions, first, text):
    assert left_of(actions, first) == text
    assert text_left(torch.tensor(actions), BACK, first).tolist() == text


def test_what_every_action_sees_and_where_it_stands():
    actions = torch.tensor([5, 6, 1, 2, BACK, 3, BACK, BACK, BACK, 4])
    found = trail(actions, BACK, 2)
    for i in range(len(actions)):
        text = left_of(actions[: i + 1].tolist(), 2)
        assert actions[found.sees[found.state[i]]].tolist() == text
        assert int(found.position[found.state[i]]) == len(text) - 1
        if int(actions[i]) == BACK:
            assert found.sees[i].nonzero()[:, 0].tolist() == [i] and int(found.sees[:, i].sum()) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_states_are_those_of_the_text_that_is_left(kind):
    lm = tiny_model(kind)
    actions = torch.tensor([5, 6, 1, 2, BACK, 3, BACK, BACK, BACK, 4, 9])
    found = trail(actions, BACK, 2)
    with torch.no_grad():
        hidden = lm.states(found.sees[None], found.position[None], input_ids=actions[None])[0]
        logits = lm.model.get_output_embeddings()(hidden[found.state])
    for i in range(1, len(actions)):
        expected = logits_after(lm, torch.tensor(left_of(actions[: i + 1].tolist(), 2)))
        torch.testing.assert_close(logits[i : i + 1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_written_is_drawn_from_the_text_that_is_left(kind, batch_size):
    lm, texts, back = tiny_model(kind, vocab_size=6), [prompt % 6 for prompt in prompts()], 5
    options = Options(max_new_tokens=14, stop_ids=(3,), sampling=Sampling(1.3), batch_size=batch_size)
    keys = torch.arange(len(texts)) + 100
    found = backtrack(lm, texts, options, backspace=back, seed=9, keys=keys)
    counts = []
    for i, prompt in enumerate(texts):
        actions: list[int] = []
        for step in range(14):
            text = torch.tensor(left_of([*prompt.tolist(), *actions], len(prompt), back))
            drawn = sample(
                logits_after(lm, text), temperature=1.3, seed=9, keys=keys[i : i + 1],
                positions=torch.tensor([len(prompt) + step]),
            )
            actions.append(int(drawn.ids))
            assert float(found.logprobs[i][step]) == pytest.approx(float(drawn.logprobs), abs=1e-5)
            if actions[-1] == 3:
                break
        assert found.completions[i].tolist() == actions
        assert found.finish_reasons[i] == ("stop" if actions[-1] == 3 else "length")
        counts.append(actions.count(back))
    assert sum(counts) > 2 and max(found.lengths) > min(found.lengths)


def test_without_a_backspace_it_is_generate():
    lm, texts = tiny_model(), prompts()
    options = Options(max_new_tokens=6, stop_ids=(3,), min_new_tokens=2, entropy=True)
    theirs = generate(lm, texts, options, seed=2)
    never = min(set(range(4, VOCAB)) - set(torch.cat(theirs.completions).tolist()))
    ours = backtrack(lm, texts, options, backspace=never, seed=2)
    for name in ("completions", "logprobs", "model_logprobs", "entropies"):
        for one, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(one, other)
    assert ours.finish_reasons == theirs.finish_reasons and len(ours) == len(LENGTHS)


def test_sequences_are_as_likely_as_their_actions():
    """Over all 16 sequences of two actions from a model of four tokens: chi-square of 4000 roll-outs."""
    lm = tiny_model(vocab_size=4)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(3)
    prompt, back, count = torch.tensor([1, 2]), 3, 4000
    found = backtrack(lm, [prompt] * count, Options(max_new_tokens=2), backspace=back, seed=1)
    seen = torch.zeros(4, 4, dtype=torch.float64)
    for completion in found.completions:
        seen[tuple(completion.tolist())] += 1
    expected = torch.zeros_like(seen)
    for a, b in itertools.product(range(4), repeat=2):
        text = prompt if a == back else torch.cat([prompt, torch.tensor([a])])
        expected[a, b] = (logits_after(lm, prompt).softmax(-1)[0, a] * logits_after(lm, text).softmax(-1)[0, b]) * count
    enough = expected >= 5
    statistic, freedom = float(((seen - expected).square() / expected)[enough].sum()), int(enough.sum()) - 1
    assert freedom > 4 and abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_mistakes_are_taken_back():
    generator = torch.Generator().manual_seed(0)
    document = Document(torch.randint(50, (400,), generator=generator), 40)
    found = mistaken(document, 0.3, BACK, VOCAB, never=(2,), seed=1, key=5)
    assert torch.equal(text_left(found.tokens, BACK, 40), document.tokens)
    assert found.first_target == 40 and torch.equal(found.tokens[:40], document.tokens[:40])
    backs = (found.tokens == BACK).nonzero()[:, 0]
    assert abs(len(backs) / 360 - 0.3) < 0.1
    wrong, right = found.tokens[backs - 1], found.tokens[backs + 1]
    assert not bool((wrong == right).any() | (wrong == BACK).any() | (wrong == 2).any()) and int(wrong.max()) > 50
    labels = torch.cat([torch.tensor([-100]), found.labels])
    assert bool((labels[backs - 1] == -100).all()) and bool((labels[backs] == BACK).all())
    counted = labels[labels != -100]
    assert int((counted == BACK).sum()) == len(backs) and torch.equal(counted[counted != BACK], document.tokens[40:])
    again = mistaken(document, 0.3, BACK, VOCAB, never=(2,), seed=1, key=5)
    assert torch.equal(found.tokens, again.tokens)
    assert len(mistaken(document, 0.0, BACK, VOCAB, seed=1, key=5)) == 400


def test_a_backspace_that_is_not_the_models():
    with pytest.raises(ValueError, match="backtrack: backspace must be below the model's vocabulary of 61, got 61"):
        backtrack(tiny_model(), prompts(), Options(max_new_tokens=2), backspace=61, seed=0)
