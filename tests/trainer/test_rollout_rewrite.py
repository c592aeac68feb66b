"""Texts that a model has partly rewritten: exactly the chosen places, by what it sees when it predicts them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_kernels import sample
from kd_trainer.data import Document
from kd_trainer.models import CausalLM
from kd_trainer.rollout import Options, Sampling, choose_places, generate, mix, rewrite, score, sequence_keys
from rollout_oracles import VOCAB, logits_after, tiny_model

MASK = 60
LM = tiny_model()


def documents(lengths=(9, 14, 3, 20, 11), first_targets=(1, 6, 2, 1, 10)) -> list[Document]:
    generator = torch.Generator().manual_seed(4)
    return [Document(torch.randint(0, MASK, (n,), generator=generator), k) for n, k in zip(lengths, first_targets)]


def keys_of(texts: list[Document]) -> list[int]:
    return sequence_keys([text.tokens for text in texts]).tolist()


def drawn_after(tokens, key, sampling, seed):
    row = logits_after(LM, tokens)
    found = sample(
        row, **sampling.arguments(), seed=seed, keys=torch.tensor([key]), positions=torch.tensor([len(tokens)])
    )
    return int(found.ids), float(found.logprobs), float(row.log_softmax(-1)[0, found.ids])


# --------------------------------------------------------------------------------------------------------- places


@given(data=st.data())
def test_places_are_distinct_targets_and_as_many_as_asked(data):
    length = data.draw(st.integers(2, 60))
    text = documents([length], [data.draw(st.integers(1, length - 1))])[0]
    targets = length - text.first_target
    fraction = data.draw(st.floats(0.01, 1.0))
    strategy = data.draw(st.sampled_from(["random", "uniform", "hard", "easy"]))
    places = choose_places(
        [text], fraction, strategy, seed=data.draw(st.integers(0, 50)), entropies=[torch.rand(targets)]
    )[0]
    assert len(places) == round(fraction * targets)
    assert bool((places.diff() > 0).all())
    assert not len(places) or text.first_target <= int(places[0]) and int(places[-1]) < length
    if strategy == "uniform" and len(places) > 1:
        assert int(places.diff().max() - places.diff().min()) <= 1


def test_hard_places_are_those_of_the_largest_entropy_and_easy_ones_of_the_smallest():
    text = Document(torch.arange(7), 2)
    entropies = [torch.tensor([0.5, 2.0, 0.1, 2.0, 0.5])]

    def choose(strategy: str, fraction: float) -> list[int]:
        return choose_places([text], fraction, strategy, seed=0, entropies=entropies)[0].tolist()

    assert choose("hard", 0.2) == [3] and choose("hard", 0.4) == [3, 5] and choose("hard", 0.6) == [2, 3, 5]
    assert choose("easy", 0.2) == [4] and choose("easy", 0.4) == [2, 4] and choose("easy", 0.6) == [2, 4, 6]


def test_random_places_depend_on_the_document_and_the_seed_alone_and_reach_everything():
    texts = documents()
    run = lambda texts, seed: [places.tolist() for places in choose_places(texts, 0.4, seed=seed)]  # noqa: E731
    assert run(texts[::-1], 1)[::-1] == run(texts, 1) != run(texts, 2)
    for strategy in ("random", "uniform"):
        counts = torch.zeros(21)
        for seed in range(300):
            counts[choose_places([Document(torch.arange(21))], 0.2, strategy, seed=seed)[0]] += 1
        assert counts[0] == 0 and int(counts.sum()) == 1200
        assert float(((counts[1:] - 60.0) ** 2 / 60.0).sum()) < 43.8  # chi-square of 19 degrees, p = 0.001


# -------------------------------------------------------------------------------------------------------- rewriting


@pytest.mark.parametrize("strategy", ["random", "uniform", "hard", "easy"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(0.5, top_p=0.8)])
def test_exactly_the_places_change_to_what_the_masked_text_predicts(strategy, sampling):
    texts = documents()
    entropies = [stats.entropy for stats in score(LM, texts)]
    expected_places = choose_places(texts, 0.3, strategy, seed=8, entropies=entropies)
    found = rewrite(
        LM, texts, mask_id=MASK, fraction=0.3, strategy=strategy, sampling=sampling, seed=8, batch_tokens=30
    )
    for i, (old, new, key) in enumerate(zip(texts, found.documents, keys_of(texts))):
        places = expected_places[i]
        assert torch.equal(found.places[i], places) and new.first_target == old.first_target
        kept = torch.ones(len(old), dtype=torch.bool).index_fill(0, places, False)
        assert torch.equal(new.tokens[kept], old.tokens[kept])
        masked = old.tokens.index_fill(0, places, MASK)
        for j, place in enumerate(places.tolist()):
            token, logprob, own = drawn_after(masked[:place], key, sampling, 8)
            assert int(new.tokens[place]) == token
            assert abs(float(found.logprobs[i][j]) - logprob) < 1e-9 and abs(
                float(found.model_logprobs[i][j]) - own
            ) < 1e-9
    assert sum(map(len, found.places)) == sum(map(len, found.logprobs)) == 10


def test_the_head_is_applied_to_masked_rows_alone(monkeypatch):
    seen, original = [], CausalLM.logits_of
    monkeypatch.setattr(CausalLM, "logits_of", lambda self, hidden: seen.append(len(hidden)) or original(self, hidden))
    found = rewrite(LM, documents(), mask_id=MASK, seed=0)
    assert seen == [sum(map(len, found.places))]


def test_a_fraction_that_rounds_to_nothing_changes_nothing():
    texts = documents([3, 4], [2, 3])
    found = rewrite(LM, texts, mask_id=MASK, fraction=0.2, seed=0)
    assert [len(places) for places in found.places] == [0, 0] == [len(x) for x in found.logprobs]
    assert all(torch.equal(new.tokens, old.tokens) for new, old in zip(found.documents, texts))


# ----------------------------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])  # the second with windows of attention
def test_a_mixture_is_what_is_drawn_token_by_token(kind, monkeypatch):
    lm = tiny_model(kind)
    monkeypatch.setitem(globals(), "LM", lm)
    texts = documents()
    found = mix(lm, texts, fraction=0.4, sampling=Sampling(0.9), seed=3)
    for i, (old, key) in enumerate(zip(texts, keys_of(texts))):
        tokens, logprobs = old.tokens.clone(), []
        for place in found.places[i].tolist():
            tokens[place], logprob, _ = drawn_after(tokens[:place], key, Sampling(0.9), 3)
            logprobs.append(logprob)
        assert torch.equal(found.documents[i].tokens, tokens)
        torch.testing.assert_close(found.logprobs[i].tolist(), logprobs, rtol=0, atol=1e-9)
    one_by_one = mix(lm, texts, fraction=0.4, sampling=Sampling(0.9), seed=3, batch_size=1)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found.documents, one_by_one.documents))
    share = sum(map(len, mix(lm, texts * 8, fraction=0.4, seed=3).places)) / (
        8 * sum(len(t) - t.first_target for t in texts)
    )
    assert abs(share - 0.4) < 0.08


def test_a_mixture_of_everything_is_a_roll_out():
    texts = documents()
    keys = sequence_keys([text.tokens for text in texts])
    found = mix(LM, texts, fraction=1.0, seed=3, keys=keys)
    for text, key, mixed in zip(texts, keys, found.documents):
        options = Options(max_new_tokens=len(text) - text.first_target)
        alone = generate(LM, [text.tokens[: text.first_target]], options, seed=3, keys=key[None])
        assert torch.equal(alone.documents()[0].tokens, mixed.tokens)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: rewrite(LM, documents(), mask_id=61, seed=0),
            "rewrite: mask_id must be below the model's vocabulary of 61, got 61",
        ),
        (
            lambda: rewrite(LM, documents(), mask_id=0, strategy="soft", seed=0),
            "strategy must be one of random, uniform, hard, easy, got 'soft'",
        ),
        (
            lambda: rewrite(LM, documents(), mask_id=0, fraction=0.0, seed=0),
            "fraction must be above 0, up to 1, got 0.0",
        ),
        (lambda: rewrite(LM, [], mask_id=0, seed=0), "rewrite: documents must be at least one, got none"),
        (lambda: mix(LM, documents(), fraction=1.5, seed=0), "mix: fraction must be above 0, up to 1, got 1.5"),
        (
            lambda: mix(LM, [Document(torch.arange(3), 3)], fraction=0.5, seed=0),
            r"mix: documents\[0\] must be of at least one target",
        ),
        (
            lambda: choose_places(documents(), 0.5, "hard", seed=0),
            'entropies must be given with strategy="hard", got None; score gives',
        ),
        (
            lambda: rewrite(LM, [Document(torch.tensor([VOCAB, 1]))], mask_id=0, seed=0),
            "below the model's vocabulary of 61, got 61",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
