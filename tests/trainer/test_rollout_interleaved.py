"""A student that drafts and a teacher that corrects: the same text as one token at a time gives, and the right law."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kd_kernels import sample
from kd_trainer.models import CausalLM
from kd_trainer.rollout import Options, Sampling, generate, interleave, score, sequence_keys
from rollout_oracles import VOCAB, Written, logits_after, prompts, tiny_model, write_alone

STOP = (2, 5, 9, 14, 22, 30, 41, 50)
STUDENT_SAMPLING, TEACHER_SAMPLING = Sampling(0.5, top_p=0.5), Sampling(0.2, top_p=0.5)  # the paper's
OPTIONS = Options(max_length=19, min_new_tokens=2, stop_ids=STOP, sampling=STUDENT_SAMPLING)


def pair(kind: str = "llama", dtype: torch.dtype = torch.float64, **changes) -> tuple[CausalLM, CausalLM]:
    return tiny_model(kind, dtype, **changes), tiny_model(kind, dtype, noise_seed=1, **changes)


@dataclasses.dataclass
class Corrected(Written):
    by_student: list[bool] = dataclasses.field(default_factory=list)


def write_corrected(student, teacher, prompt, key, options: Options, teacher_sampling, k, seed) -> Corrected:
    """The algorithm as the paper has it, a token at a time, its rank test by a sort, without caches."""
    text, written = prompt, Corrected()
    where = lambda: dict(seed=seed, keys=torch.tensor([key]), positions=torch.tensor([len(text)]))  # noqa: E731
    for step in range(options.budgets("test", [prompt])[0]):
        q, p = logits_after(student, text), logits_after(teacher, text)
        own = {True: q.log_softmax(-1)[0], False: p.log_softmax(-1)[0]}
        if step < options.min_new_tokens:
            q, p = (x.index_fill(1, torch.tensor(options.stop_ids), -torch.inf) for x in (q, p))
        drawn = sample(q, **options.sampling.arguments(), **where())
        by_student = int(drawn.ids) in p[0].argsort(descending=True, stable=True)[:k].tolist()
        if not by_student:
            drawn = sample(p, **teacher_sampling.arguments(), **where(), purpose="resample")
        token = int(drawn.ids)
        text = torch.cat([text, drawn.ids])
        written.tokens.append(token)
        written.by_student.append(by_student)
        written.logprobs.append(float(drawn.logprobs))
        written.model_logprobs.append(float(own[by_student][token]))
        if token in options.stop_ids:
            written.reason = "stop"
            break
    return written


# ------------------------------------------------------------------------------------------------------ rule "top_k"


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])  # the second has windows: no hole may be left
@pytest.mark.parametrize("gamma", [1, 2, 5, 30])
def test_every_token_is_the_one_of_the_algorithm_a_token_at_a_time(kind, gamma):
    student, teacher = pair(kind)
    found = interleave(
        student, teacher, prompts(), OPTIONS, teacher_sampling=TEACHER_SAMPLING, k=20, gamma=gamma, seed=6
    )
    for i, (text, key) in enumerate(zip(prompts(), sequence_keys(prompts()).tolist())):
        alone = write_corrected(student, teacher, text, key, OPTIONS, TEACHER_SAMPLING, 20, 6)
        assert found.completions[i].tolist() == alone.tokens
        assert found.by_student[i].tolist() == alone.by_student
        assert found.finish_reasons[i] == alone.reason
        torch.testing.assert_close(found.logprobs[i].tolist(), alone.logprobs, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.model_logprobs[i].tolist(), alone.model_logprobs, rtol=0, atol=1e-9)
    assert 0.2 < found.acceptance < 0.8  # both branches are taken
    assert set(found.finish_reasons) == {"stop", "length"}


def test_what_is_written_does_not_depend_on_the_batch():
    student, teacher = pair(dtype=torch.float32)
    run = lambda texts, size, gamma=3: interleave(  # noqa: E731
        student, teacher, texts, dataclasses.replace(OPTIONS, batch_size=size), k=20, gamma=gamma, seed=6
    )
    together = run(prompts(), None)
    for size, gamma in ((1, 3), (2, 3), (3, 1)):
        parted = run(prompts(), size, gamma)
        assert all(map(torch.equal, together.completions, parted.completions))
        assert all(map(torch.equal, together.by_student, parted.by_student))
    backwards = run(prompts()[::-1], None)
    assert all(map(torch.equal, together.completions, backwards.completions[::-1]))


@pytest.mark.parametrize("gamma", [1, 4])
def test_a_k_of_the_vocabulary_is_the_student_alone_and_of_0_the_teacher_alone(gamma):
    student, teacher = pair()
    run = lambda k: interleave(  # noqa: E731
        student, teacher, prompts(), OPTIONS, teacher_sampling=TEACHER_SAMPLING, k=k, gamma=gamma, seed=6
    )
    everything, alone = run(VOCAB), generate(student, prompts(), OPTIONS, seed=6)
    assert everything.acceptance == 1.0 and everything.finish_reasons == alone.finish_reasons
    for name in ("completions", "logprobs", "model_logprobs"):
        for ours, theirs in zip(getattr(everything, name), getattr(alone, name), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    nothing = run(0)
    assert nothing.acceptance == 0.0 and nothing.tokens_per_round == 1.0
    for i, (text, key) in enumerate(zip(prompts(), sequence_keys(prompts()).tolist())):
        steps = OPTIONS.max_length - len(text)
        alone = write_alone(teacher, text, key, steps, TEACHER_SAMPLING, 6, stop=STOP, least=2, purpose="resample")
        assert nothing.completions[i].tolist() == alone.tokens
        torch.testing.assert_close(nothing.logprobs[i].tolist(), alone.logprobs, rtol=0, atol=1e-9)


def test_rounds_and_entropies():
    student, teacher = pair()
    options = Options(max_new_tokens=12, entropy=True)
    found = interleave(student, teacher, prompts(), options, k=20, gamma=4, seed=6)
    for by_student, rounds in zip(found.by_student, found.rounds):
        expected, place = 0, 0  # of four drafts a round, up to the first that was refused
        while place < len(by_student):
            block = by_student[place : place + 4].tolist()
            place += block.index(False) + 1 if False in block else len(block)
            expected += 1
        assert rounds == expected
    assert found.tokens_per_round == 60 / sum(found.rounds)
    documents = found.documents()
    for i, (q, p) in enumerate(zip(score(student, documents), score(teacher, documents))):
        for ours, theirs in (("entropies", "entropy"), ("model_logprobs", "logprob")):
            expected = torch.where(found.by_student[i], getattr(q, theirs), getattr(p, theirs))
            torch.testing.assert_close(getattr(found, ours)[i], expected, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------ rule "speculative"

SMALL = 7
TEACHERS, STUDENTS = Sampling(0.8, top_k=6), Sampling(1.3, top_p=0.95)


def law_of(lm: CausalLM, prompt, sampling: Sampling) -> torch.Tensor:
    """fp64 ``[V, V]``: the exact probabilities of the first two tokens."""

    def row(text):
        p = (logits_after(lm, text)[0] / sampling.temperature).softmax(-1)
        kept, mass = p.argsort(descending=True)[: sampling.top_k], 0.0
        cut = torch.zeros_like(p)
        for token in kept.tolist():
            if sampling.top_p is None or mass < sampling.top_p:
                cut[token] = p[token]
            mass += float(p[token])
        return cut / cut.sum()

    first = row(prompt)
    return torch.stack([first[i] * row(torch.cat([prompt, torch.tensor([i])])) for i in range(SMALL)])


def chi_square(completions, law: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic of the first two tokens, with cells of an expectation below 5 in one; degrees of freedom."""
    pairs = torch.stack([tokens[0] * SMALL + tokens[1] for tokens in completions])
    counts = torch.bincount(pairs, minlength=SMALL**2).double()
    expected = law.flatten() * len(completions)
    assert float(counts[expected == 0].sum()) == 0.0
    large = expected >= 5
    counts, expected = (torch.cat([x[large], x[~large].sum()[None]]) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    return float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1


def test_speculative_text_is_distributed_as_the_teachers():
    student, teacher = pair(vocab_size=SMALL)
    prompt = torch.tensor([1, 4, 2])
    law = law_of(teacher, prompt, TEACHERS)
    options = Options(max_new_tokens=2, sampling=STUDENTS)
    found = interleave(
        student, teacher, [prompt] * 6000, options, teacher_sampling=TEACHERS, rule="speculative", gamma=2, seed=1
    )
    statistic, degrees = chi_square(found.completions, law)
    assert statistic < degrees + 3.1 * (2 * degrees) ** 0.5  # p = 0.001 or so
    assert 0.3 < found.acceptance < 0.9
    # the test would see a law that is not the teacher's
    others = generate(student, [prompt] * 6000, dataclasses.replace(options, sampling=TEACHERS), seed=1)
    statistic, degrees = chi_square(others.completions, law_of(student, prompt, TEACHERS))
    assert statistic < degrees + 3.1 * (2 * degrees) ** 0.5
    plain = dataclasses.replace(TEACHERS, top_k=None)
    statistic, degrees = chi_square(
        generate(student, [prompt] * 6000, dataclasses.replace(options, sampling=plain), seed=1).completions,
        law_of(teacher, prompt, plain),
    )
    assert statistic > 5 * degrees


def test_speculative_text_does_not_depend_on_gamma_or_the_batch():
    student, teacher = pair()
    run = lambda gamma, size: interleave(  # noqa: E731
        student, teacher, prompts(), dataclasses.replace(OPTIONS, batch_size=size), rule="speculative", gamma=gamma,
        seed=6,
    )
    one = run(1, 1)
    assert 0.0 < one.acceptance < 1.0
    for gamma, size in ((3, None), (5, 2)):
        many = run(gamma, size)
        assert all(map(torch.equal, one.completions, many.completions))
        assert all(map(torch.equal, one.by_student, many.by_student))


def test_a_student_that_is_the_teacher_is_always_accepted():
    student, _ = pair()
    options = Options(max_new_tokens=9)
    found = interleave(student, tiny_model(), prompts(), options, rule="speculative", seed=6)
    assert found.acceptance == 1.0
    assert all(map(torch.equal, found.completions, generate(student, prompts(), options, seed=6).completions))


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gamma": 0}, "gamma must be at least 1, got 0"),
        ({"k": -1}, "k must be in 0..V=61, got -1"),
        ({"k": 62}, "k must be in 0..V=61, got 62"),
        ({"rule": "nucleus"}, "rule must be one of top_k, speculative, got 'nucleus'"),
        ({"prompts": [torch.tensor([], dtype=torch.int64)]}, r"prompts\[0\] must be of at least one token"),
        ({"options": Options(max_length=12)}, "max_length must be at least 13 for prompt 4 of 12 tokens, got 12"),
        (
            {"teacher": tiny_model(vocab_size=50)},
            "the student's vocabulary must be the teacher's 50, got 61; .* tokenizer",
        ),
        ({"teacher": tiny_model("mamba", torch.float32)}, "MambaForCausalLM must be a model with a cache of keys and"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    student, teacher = pair()
    given = {"student": student, "teacher": teacher, "prompts": prompts(), "options": OPTIONS} | arguments
    with pytest.raises(ValueError, match=f"interleave: {message}"):
        interleave(**given, seed=0)


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_logits_that_cannot_be_drawn_from(broken):
    models = dict(zip(("student", "teacher"), pair()))
    options = Options(max_new_tokens=6)
    interleave(**models, prompts=prompts(), options=options, k=5, seed=0)
    with torch.no_grad():
        models[broken].head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="interleave: logits must be free of NaN .*for sequence 4 at position 12"):
        interleave(**models, prompts=prompts(), options=options, k=5, seed=0)


def test_modes_are_put_back():
    student, teacher = pair()
    student.train()
    interleave(student, teacher.eval(), prompts(), Options(max_new_tokens=2), seed=0)
    assert student.training and not teacher.training
