"""ExAccErr against its definition: enumerated over every sequence of a toy vocabulary, and recomputed in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kd_trainer.data import Document
from kd_trainer.diagnostics.contexts import prompts_in
from kd_trainer.diagnostics.exposure import divergences_along, excess_error, oracle_texts
from kd_trainer.models import CausalLM
from kd_trainer.rollout import Options, Sampling

VOCAB, LENGTH, END = 5, 3, 0


def toy(seed: int, like: CausalLM | None = None) -> CausalLM:
    """A float64 Llama over five tokens; ``like``: the same, moved a little."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=END, initializer_range=0.6,
    )
    model = LlamaForCausalLM(config).double().eval()
    if like is not None:
        model.load_state_dict(like.model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.25 * torch.randn_like(parameter))
    return CausalLM(model)


@pytest.fixture(scope="module")
def pair() -> tuple[CausalLM, CausalLM]:
    teacher = toy(3)
    return teacher, toy(4, teacher)


PROMPTS = [Document(torch.tensor(prompt + [1]), len(prompt)) for prompt in ([1, 2], [2, 4], [3, 3, 1])]


@torch.no_grad()
def rows(model: CausalLM, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of the token after ``tokens``, from transformers alone."""
    return model.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)


def enumerated(teacher: CausalLM, student: CausalLM, writer: CausalLM, stop: bool) -> list[float]:
    """R by length: the expectation over everything that ``writer`` can write, mean over the prompts."""
    totals = [0.0] * LENGTH
    for document in PROMPTS:
        prompt = document.tokens[: document.first_target].tolist()
        for t in range(LENGTH):
            for words in itertools.product(range(VOCAB), repeat=t):
                if stop and END in words:
                    continue  # it has ended: nothing is added
                chance = 1.0
                for i, word in enumerate(words):
                    chance *= float(rows(writer, prompt + list(words[:i]))[word].exp())
                p, q = (rows(model, prompt + list(words)) for model in (teacher, student))
                totals[t] += chance * float((p.exp() * (p - q)).sum()) / len(PROMPTS)
    return torch.tensor(totals).cumsum(0).tolist()


@pytest.mark.parametrize("stop", [True, False])
def test_it_is_the_expectation_over_all_sequences(pair, stop):
    options = Options(max_new_tokens=LENGTH, stop_ids=(END,) if stop else ())
    found = excess_error(*pair, PROMPTS, options, seed=1, samples=1500)
    regret, expected = (enumerated(*pair, writer, stop) for writer in (pair[1], pair[0]))
    assert abs(regret[-1] / expected[-1] - 1.0) > 0.1  # there is something to find
    for (length, *values), *truth in zip(found.by_length, regret, expected):
        assert values == pytest.approx(truth, rel=0.03), length
    assert found.regret == found.by_length[-1][1] and found.expected == found.by_length[-1][2]
    assert found.excess == pytest.approx(100 * (regret[-1] / expected[-1] - 1), abs=4)
    assert (found.student_tokens == found.teacher_tokens == LENGTH) == (not stop)
    if not stop:
        assert found.per_token == pytest.approx(found.excess)


def test_swapping_the_contexts_would_be_seen(pair):
    """The mutation check of the test above: the two expectations differ by more than its tolerance."""
    assert enumerated(*pair, pair[1], False)[-1] != pytest.approx(enumerated(*pair, pair[0], False)[-1], rel=0.06)


def test_errors_along_texts_in_float64(pair):
    generator = torch.Generator().manual_seed(0)
    documents = [
        Document(torch.randint(VOCAB, (n,), generator=generator), first) for n, first in ((6, 2), (9, 1), (3, 2))
    ]
    for document, found in zip(documents, divergences_along(*pair, documents, batch_tokens=10)):
        for place, value in zip(range(document.first_target, len(document)), found.tolist(), strict=True):
            p, q = (rows(model, document.tokens[:place].tolist()) for model in pair)
            assert value == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)


def test_the_standard_error_is_the_spread_of_repeated_measurements(pair):
    documents, options = PROMPTS * 20, Options(max_new_tokens=LENGTH)
    measured = [excess_error(*pair, documents, options, seed=seed) for seed in range(40)]
    spread = float(torch.tensor([found.excess for found in measured]).std())
    stated = sum(found.standard_error for found in measured) / len(measured)
    # prompts are the same in all repetitions, so the spread over them is in the statement alone
    assert spread < 1.15 * stated and stated < 3 * spread
    assert excess_error(*pair, PROMPTS[:1], options, seed=0).standard_error is None


def test_the_same_call_gives_the_same_numbers_and_the_oracle_is_sampled_as_it_is(pair):
    options = Options(max_new_tokens=LENGTH)
    one, again = (excess_error(*pair, PROMPTS, options, seed=5, samples=4) for _ in range(2))
    assert one == again
    greedy = dataclasses.replace(options, sampling=Sampling(temperature=0.0))
    kept = oracle_texts(pair[0], PROMPTS, greedy, seed=5, samples=4)
    assert excess_error(*pair, PROMPTS, greedy, seed=5, samples=4).expected == one.expected
    assert excess_error(*pair, PROMPTS, options, seed=5, samples=4, by_teacher=kept) == one
    with pytest.raises(ValueError, match="by_teacher must be 2 texts of each of the 3 prompts, got 12 of others"):
        excess_error(*pair, PROMPTS, options, seed=5, samples=2, by_teacher=kept)
    assert "ExAccErr" in one.table() and f"{one.excess:.1f}%" in one.table()


@pytest.mark.parametrize(("change", "message"), [
    ({"samples": 0}, "excess_error: samples must be at least 1, got 0"),
    ({"options": Options(max_length=8)}, "options.max_new_tokens must be given"),
    ({"documents": [Document(torch.tensor([1, 2, 3]))]}, "prompt_tokens must be given for texts without a prompt"),
    ({"documents": []}, "documents must be at least one, got none"),
])
def test_bad_input(pair, change, message):
    given = {"documents": PROMPTS, "options": Options(max_new_tokens=2)} | change
    with pytest.raises(ValueError, match=message):
        excess_error(*pair, given.pop("documents"), given.pop("options"), seed=0, **given)


def test_models_that_cannot_be_compared(pair):
    options = Options(max_new_tokens=2)
    with pytest.raises(ValueError, match="the student's vocabulary must be the teacher's 5, got 4"):
        excess_error(pair[0], CausalLM(pair[1].model, vocab=4), PROMPTS, options, seed=0)
    with pytest.raises(ValueError, match="the error on the teacher's contexts must be above 0, .* the same model"):
        excess_error(pair[0], pair[0], PROMPTS, options, seed=0)


def test_prompts_of_texts_with_and_without_one():
    plain = Document(torch.arange(6))
    assert [p.tolist() for p in prompts_in("f", [plain, PROMPTS[1]], 4)] == [[0, 1, 2, 3], [2, 4]]
    assert len(prompts_in("f", [plain], 9)[0]) == 5  # something is left to be written
