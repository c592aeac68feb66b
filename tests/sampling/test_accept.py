"""Drafts that a teacher accepts or replaces: against the oracle, against the law, and whatever else is in the batch."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from kd_kernels import Accepted, EnsembleLogits, LinearLogits, accept_or_resample, sample, testing, token_stats
from kd_kernels.sampling import philox, reference
from kd_kernels.testing import assert_as_good
from sampling_judge import far_apart
from test_distribution import g_test

DRAWS = (Path(philox.__file__).parent / "DRAWS.md").read_text()
TEACHER_ROW = (torch.arange(300) * 37 % 101).float() / 8
STUDENT_ROW = (torch.arange(300) * 53 % 97).float() / 8
EXAMPLES = 12 if os.environ.get("TRITON_INTERPRET") == "1" else 40
"""Of a property; the interpreter takes two seconds for one."""


def signed(digits: str) -> int:
    return int(digits, 16) - (1 << 64 if int(digits, 16) >> 63 else 0)


def student_names(law: dict) -> dict:
    return {"student_" + name: value for name, value in law.items()}


def assert_equal(one: Accepted, other: Accepted) -> None:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a is None and b is None) or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), field.name


def of_rows(found: Accepted, rows: Tensor) -> Accepted:
    return Accepted(*(None if x is None else x[rows] for x in dataclasses.astuple(found)))


# ------------------------------------------------------------------------------------------------------ the contract


def test_the_pages_vectors(backend: str) -> None:
    vectors = re.findall(r"^\| (\w+) \| (\w+) \| (\d+) \| (\d+) \| (yes|no) \| (\d+) \| (\S+) \|$", DRAWS, re.M)
    assert {accepted for *_, accepted, _, _ in vectors} == {"yes", "no"} and len(vectors) == 6
    law, student_law = {"temperature": 2.0, "top_k": 150}, {"temperature": 1.5, "top_p": 0.9}
    for seed, key, position, draft, accepted, token, logprob in vectors:
        place = oracles.Place(signed(seed), signed(key), int(position))
        verdict = oracles.accept_speculative(
            int(draft), TEACHER_ROW.tolist(), STUDENT_ROW.tolist(), place, law, student_law
        )
        found = accept_or_resample(
            torch.tensor([int(draft)]), TEACHER_ROW[None], "speculative", student=STUDENT_ROW[None], **law,
            **student_names(student_law), seed=place.seed, keys=torch.tensor([place.key]),
            positions=torch.tensor([place.position]), backend=backend,
        )
        assert verdict.id == int(token) == int(found.ids)
        assert verdict.accepted == (accepted == "yes") == bool(found.accepted)
        assert verdict.logprob == pytest.approx(float(logprob), abs=1e-6)
        assert float(found.logprobs) == pytest.approx(float(logprob), abs=4e-6)


LAWS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.5, 1.0, 3.0, math.inf])},
    optional={
        "top_k": st.integers(1, 50), "top_p": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.01, 0.3]),
    },
)


def rows_of_few_values(data: st.DataObject, vocab: int) -> Tensor:
    """Ties, and ids that are masked; one id of each row is not."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    values = torch.tensor([-math.inf, -6.0, -3.0, -0.0, 0.0, 0.5, 2.0, 4.0])
    logits = values[torch.randint(0, 8, (5, vocab), generator=generator)]
    logits[:, vocab // 2] = 1.0
    return logits


@pytest.mark.parametrize("backend", ["reference", "cpp"])  # by search: the interpreter would take minutes
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_speculative_verdicts_are_the_oracles(backend: str, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([1, 3, 60, 130]))
    teacher, student = rows_of_few_values(data, vocab), rows_of_few_values(data, vocab)
    law, student_law, seed = data.draw(LAWS), data.draw(LAWS), data.draw(st.integers(-(1 << 63), (1 << 63) - 1))
    drafts = sample(student, **student_law, seed=seed).ids
    if data.draw(st.booleans()):
        drafts = torch.randint(0, vocab, (5,), generator=torch.Generator().manual_seed(0))  # some that q has not
    found = accept_or_resample(
        drafts, teacher, "speculative", student=student, **law, **student_names(student_law), seed=seed, backend=backend
    )
    for i in range(5):
        verdict = oracles.accept_speculative(
            int(drafts[i]), teacher[i].tolist(), student[i].tolist(), oracles.Place(seed, i), law, student_law
        )
        if verdict.lead > 1e-5:
            assert (int(found.ids[i]), bool(found.accepted[i])) == (verdict.id, verdict.accepted)
            assert float(found.logprobs[i]) == pytest.approx(verdict.logprob, abs=1e-5)
            own = teacher[i].double().log_softmax(0)
            assert float(found.model_logprobs[i]) == pytest.approx(float(own[verdict.id]), abs=1e-5)
    assert found.rank is None


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_rank_verdicts_are_a_sort_and_the_oracles_draw(backend: str, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([1, 3, 60, 130, 300]))
    teacher, law = rows_of_few_values(data, vocab), data.draw(LAWS)
    drafts = torch.randint(0, vocab, (5,), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    k, seed = data.draw(st.sampled_from([0, 1, vocab // 2, vocab])), data.draw(st.integers(-(1 << 63), (1 << 63) - 1))
    found = accept_or_resample(drafts, teacher, k=k, **law, seed=seed, backend=backend)
    for i, row in enumerate(teacher.tolist()):
        rank = oracles.falling(row).index(int(drafts[i]))
        assert (int(found.rank[i]), bool(found.accepted[i])) == (rank, rank < k)
        if rank < k:
            assert int(found.ids[i]) == int(drafts[i]) and found.logprobs[i].isnan()
        else:
            drawn = oracles.sample(row, oracles.Place(seed, i), **law, race=4)
            if drawn.lead > 1e-5:
                assert int(found.ids[i]) == drawn.id and float(found.logprobs[i]) == pytest.approx(
                    drawn.logprob, abs=1e-5
                )
        own = teacher[i].double().log_softmax(0)[found.ids[i]]
        assert float(found.model_logprobs[i]) == pytest.approx(float(own), abs=1e-5) or own == -math.inf


def test_a_replacement_is_the_draw_of_sample_and_ranks_are_token_stats(backend: str) -> None:
    _, teacher = testing.logits_pair("near_0.3", 40, 500)
    drafts = torch.arange(40) * 11
    law = {"temperature": 0.7, "top_p": 0.9}
    found = accept_or_resample(drafts, teacher, k=200, **law, seed=3, backend=backend)
    other = sample(teacher, **law, seed=3, purpose="resample", backend=backend)
    stats = token_stats(teacher, drafts, k=200, backend=backend)
    assert torch.equal(found.accepted, stats.in_top_k) and torch.equal(found.rank, stats.rank)
    assert 5 < int(found.accepted.sum()) < 35
    assert torch.equal(found.ids, torch.where(stats.in_top_k, drafts, other.ids))
    assert torch.equal(found.logprobs[~stats.in_top_k], other.logprobs[~stats.in_top_k])
    assert torch.equal(found.model_logprobs, torch.where(stats.in_top_k, stats.logprob, other.model_logprobs))
    draws = sample(teacher[:10], **law, seed=3, backend=backend).ids
    assert not torch.equal(other.ids[:10], draws)  # words of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logprobs_are_as_good_as_plain_torch(backend: str, dtype: torch.dtype) -> None:
    student, teacher = testing.logits_pair("near_0.3", 64, 700, dtype)
    drafts = sample(student, seed=1, temperature=1.4).ids
    found = accept_or_resample(
        drafts, teacher, "speculative", student=student, temperature=0.8, student_temperature=1.4, seed=1,
        backend=backend
    )
    assert 5 < int(found.accepted.sum()) < 59
    exact, at = teacher.double(), found.ids[:, None]
    plain = (teacher if dtype == torch.float64 else teacher.float())
    for actual, factor in ((found.logprobs, 1 / 0.8), (found.model_logprobs, 1.0)):
        rows = [(z * factor).log_softmax(1).gather(1, at) for z in (plain, exact)]
        assert_as_good(actual[:, None], *rows, unit=1.0)


# ----------------------------------------------------------------------------------------------------------- the law

COUNT = 40_000


def speculative_counts(
    teacher: Tensor, student: Tensor, law: dict, student_law: dict, backend: str | None = None
) -> Tensor:
    rows, positions = student.expand(COUNT, -1), torch.arange(COUNT)
    where = dict(seed=8, keys=torch.zeros(COUNT, dtype=torch.int64), positions=positions, backend=backend)
    drafts = sample(rows, **student_law, **where).ids
    found = accept_or_resample(
        drafts, teacher.expand(COUNT, -1), "speculative", student=rows, **law, **student_names(student_law), **where
    )
    p, q = (torch.tensor(oracles.log_law(z.tolist(), **x)).exp() for z, x in ((teacher, law), (student, student_law)))
    rate = float(torch.minimum(p, q).sum())
    assert abs(float(found.accepted.double().mean()) - rate) < 4 * math.sqrt(rate * (1 - rate) / COUNT) + 1e-12
    return found.ids.bincount(minlength=len(teacher))


@pytest.mark.parametrize(("law", "student_law"), [
    ({}, {}), ({"temperature": 0.6}, {"temperature": 1.5}),
    ({"temperature": 0.8, "top_k": 12}, {"temperature": 1.2, "top_p": 0.9}),
])
def test_speculative_ids_have_the_teachers_law_and_the_power_of_the_test(law: dict, student_law: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (1.5 * torch.randn(50, generator=generator) for _ in range(2))
    p = torch.tensor(oracles.log_law(teacher.tolist(), **law)).exp()
    counts = speculative_counts(teacher, student, law, student_law)
    assert g_test(counts, p) > 1e-3 and not bool(counts[p == 0].any())
    half = p > p.sort().values[(p.sort().values.cumsum(0) < 0.5).sum() - 1]
    two = lambda x: torch.stack([x[half].sum(), x[~half].sum()])  # noqa: E731
    biased = two(p * torch.where(half, 1.05, 1.0))
    assert g_test(two(counts), biased / biased.sum()) < 1e-3 < g_test(two(counts), two(p))


@pytest.mark.parametrize("mutation", ["draws the teacher", "shares the draft's words", "accepts five percent more"])
def test_mutations_have_another_law(monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    """What implementations got wrong before: the residual forgotten, noise shared with the draft, a test that is
    lenient."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (1.5 * torch.randn(50, generator=generator) for _ in range(2))
    words, uniform = philox.words, philox.fine_uniform
    if mutation == "draws the teacher":
        forgets = functools.partial(reference.judge_by, reference.sample_rows, lambda teacher, *rest: teacher.logits())
        monkeypatch.setattr(reference, "judge_rows", forgets)
    elif mutation == "shares the draft's words":
        shared = lambda purpose: philox.PICK if purpose == philox.ACCEPT else purpose  # noqa: E731
        monkeypatch.setattr(philox, "words", lambda *a: words(*a[:3], shared(a[3]), *a[4:]))
    else:
        monkeypatch.setattr(philox, "fine_uniform", lambda pair: uniform(pair) / 1.25)
    p = teacher.double().softmax(0)
    with pytest.raises(AssertionError):  # the backend in Python, which can be changed; the others are held to it
        assert g_test(speculative_counts(teacher, student, {}, {}, "reference"), p) > 1e-3


# -------------------------------------------------------------------------------------------------------- invariance

N, VOCAB = 24, 9_001
RULES = [
    {"k": 700}, {"k": 700, "temperature": 0.7, "top_p": 0.9}, {"rule": "speculative"},
    {"rule": "speculative", "temperature": 0.9, "top_k": 500, "student_temperature": 1.3, "student_top_p": 0.95},
]


def eighths(seed: int = 0) -> Tensor:
    return torch.randint(-60, 60, (N, VOCAB), generator=torch.Generator().manual_seed(seed)) / 8


def arguments(rule: dict, student: object) -> dict:
    """Every row with a seed, key and position of its own."""
    place = {"seed": torch.arange(N) * 7, "keys": torch.arange(N) * -(10**12), "positions": torch.arange(N) + 5}
    return rule | place | ({"student": student} if "rule" in rule else {})


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_batches_orders_chunks_and_threads(rule: dict, backend: str) -> None:
    teacher = eighths()
    student = teacher + eighths(1) / 8
    drafts = sample(student, seed=2, temperature=1.3).ids
    given = arguments(rule, student)
    whole = accept_or_resample(drafts, teacher, **given, backend=backend)
    assert 0 < int(whole.accepted.sum()) < N
    for rows in (torch.randperm(N, generator=torch.Generator().manual_seed(1)), torch.tensor([7])):
        part = {name: x[rows] if isinstance(x, Tensor) else x for name, x in given.items()}
        assert_equal(accept_or_resample(drafts[rows], teacher[rows], **part, backend=backend), of_rows(whole, rows))
    assert_equal(whole, accept_or_resample(drafts, teacher, **given, backend=backend, max_scratch_bytes=8_000_000))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 3)
        assert_equal(whole, accept_or_resample(drafts, teacher, **given, backend=backend))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_backends_agree(rule: dict) -> None:
    given = arguments(rule, eighths(4))
    ours, theirs = (
        accept_or_resample(torch.arange(N) * 300, eighths(3), **given, backend=name) for name in ("cpp", "reference")
    )
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.accepted, theirs.accepted)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(ours.model_logprobs, theirs.model_logprobs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rule", RULES[::2], ids=str)
def test_every_noun_and_shape(rule: dict, backend: str) -> None:
    teacher, student, drafts = eighths(5)[:, :300], eighths(6)[:, :300], torch.arange(N) * 11
    expected = accept_or_resample(
        drafts, teacher, **arguments(rule | {"k": 150} if "k" in rule else rule, student), backend=backend
    )
    nouns = lambda z: (  # noqa: E731
        LinearLogits(torch.eye(N), torch.cat([z.T, torch.ones(5, N)]), valid_vocab=300), EnsembleLogits((z, z)),
        z.bfloat16(), LinearLogits(torch.eye(N), z.T / 2, scale=2.0),
    )
    for p, q in zip(nouns(teacher), nouns(student)[::-1]):
        given = arguments(rule | {"k": 150} if "k" in rule else rule, q)
        found = accept_or_resample(drafts, p, **given, backend=backend)
        assert torch.equal(found.ids, expected.ids) and torch.equal(found.accepted, expected.accepted)
    given = arguments(rule | {"k": 150} if "k" in rule else rule, student.view(4, 6, 300))
    given = {name: x.view(4, 6) if isinstance(x, Tensor) and x.dim() == 1 else x for name, x in given.items()}
    shaped = accept_or_resample(drafts.view(4, 6).int(), teacher.view(4, 6, 300), **given, backend=backend)
    assert torch.equal(shaped.ids, expected.ids.view(4, 6))


def test_only_refused_rows_are_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    from kd_kernels.sampling import cpp_impl

    seen, sample_picked = [], cpp_impl.sample_picked
    monkeypatch.setattr(
        cpp_impl, "sample_picked", lambda *given: seen.append(given[1].tolist()) or sample_picked(*given)
    )
    teacher = eighths(2)[:, :300]
    found = accept_or_resample(torch.arange(N), teacher, k=150, seed=0)
    assert seen == [(~found.accepted).nonzero()[:, 0].tolist()]


# ------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("rule", [{"k": 2}, {"rule": "speculative"}], ids=str)
def test_edges(rule: dict, backend: str) -> None:
    run = lambda drafts, z, **more: accept_or_resample(  # noqa: E731
        torch.tensor(drafts, dtype=torch.int64), z, **rule, **({"student": z} if "rule" in rule else {}), seed=0,
        backend=backend, **more
    )
    assert run([], torch.zeros(0, 5)).ids.shape == (0,)
    one = run([0, 0], torch.zeros(2, 1))
    assert one.ids.tolist() == [0, 0] and one.accepted.all()
    same = run([1, 2, 4], eighths(3)[:3, :5])
    if "rule" in rule:
        assert same.accepted.all()  # p = q
    teacher = torch.tensor([[0.0, -math.inf, 1.0, 3.0]])
    masked = run([1], teacher)
    assert not masked.accepted.any() if "k" in rule else masked.ids.tolist() != [1]


def test_a_residual_without_ids_falls_back_to_the_teacher(backend: str) -> None:
    """Apart by an id alone that no sum feels: p = q elsewhere, and p < q there."""
    teacher = eighths(3)[:6, :300].clone()
    student = teacher.clone()
    teacher[:, 7], student[:, 7] = -200.0, -150.0
    place = {"seed": torch.arange(6), "keys": torch.arange(6), "positions": torch.arange(6), "backend": backend}
    found = accept_or_resample(torch.full((6,), 7), teacher, "speculative", student=student, **place)
    expected = sample(teacher, **place, purpose="resample")
    assert not found.accepted.any() and torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=2e-6, atol=2e-6)


def test_what_is_left_of_a_student_that_is_very_near(backend: str) -> None:
    """p - q of some 1e-6 p: fp32 sums would be off by as much. The draft is refused in every row."""
    rows = 100 if backend == "triton" else 2000
    student = eighths(4)[:1, :300].expand(rows, -1).clone()
    noise = torch.randn(rows, 300, generator=torch.Generator().manual_seed(0))
    teacher = student * (1 + 3e-7 * noise)
    teacher[:, 7], student[:, 7] = -60.0, -40.0
    given = {"student": student, "seed": 5, "keys": torch.arange(rows)}
    ours, theirs = (
        accept_or_resample(torch.full((rows,), 7), teacher, "speculative", **given, backend=name)
        for name in (backend, "reference")
    )
    assert not ours.accepted.any() and not theirs.accepted.any()
    assert int((ours.ids != theirs.ids).sum()) <= rows // 100


@pytest.mark.parametrize(("temperature", "student_temperature"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_speculation_with_an_argmax(temperature: float, student_temperature: float, backend: str) -> None:
    teacher, student = eighths(5)[:, :300], eighths(6)[:, :300]
    place = {"seed": 1, "keys": torch.arange(N), "backend": backend}
    drafts = sample(student, temperature=student_temperature, **place).ids
    found = accept_or_resample(
        drafts, teacher, "speculative", student=student, temperature=temperature,
        student_temperature=student_temperature, **place
    )
    if temperature == 0:
        assert torch.equal(found.ids, teacher.argmax(1)) and torch.equal(found.accepted, drafts == found.ids)
    else:  # the student's only id is refused with 1 - p, and not drawn again
        assert torch.equal(found.accepted, found.ids == drafts) and not found.accepted.all()


def test_rows_apart_by_more_than_an_int32_of_elements(backend: str) -> None:
    far = far_apart(TEACHER_ROW, STUDENT_ROW)
    near = torch.stack([TEACHER_ROW, STUDENT_ROW])
    for rule in ({"k": 3}, {"rule": "speculative"}):
        one, other = (
            accept_or_resample(
                torch.tensor([5, 7]), z, **rule, **({"student": z.flip(1)} if "rule" in rule else {}), seed=3,
                backend=backend,
            )
            for z in (far, near)
        )
        assert_equal(one, other)


@pytest.mark.parametrize(
    ("fault", "name"), [(torch.nan, "NaN"), (torch.inf, r"\+inf"), (-torch.inf, "-inf at every id")]
)
@pytest.mark.parametrize(
    ("rule", "broken"), [("top_k", "teacher"), ("speculative", "teacher"), ("speculative", "student")]
)
def test_rows_that_are_no_distribution(backend: str, rule: str, broken: str, fault: float, name: str) -> None:
    nouns = {"teacher": eighths(1)[:4, :300].clone(), "student": eighths(2)[:4, :300]}
    bad = nouns[broken] = nouns[broken].clone()
    bad[2] = fault if fault == -torch.inf else bad[2]
    bad[2, 17] = fault
    teacher = nouns.pop("teacher")
    given = {"rule": rule, "seed": 0, "backend": backend} | (nouns if rule == "speculative" else {"k": 300})
    with pytest.raises(ValueError, match=f"accept_or_resample: {broken} must be free of NaN .*, got {name} in row 2"):
        accept_or_resample(torch.arange(4), teacher, **given)
    flagged = accept_or_resample(torch.arange(4), teacher, check="flag", **given)
    assert flagged.ids.tolist()[2] == -1 and not flagged.accepted[2] and flagged.logprobs[2].isnan()
    assert flagged.model_logprobs[2].isnan() and bool((flagged.ids[[0, 1, 3]] >= 0).all())


Z = torch.zeros(2, 5)


@pytest.mark.parametrize(("given", "error", "message"), [
    ({}, TypeError, 'k must be an int for rule="top_k", got NoneType'),
    ({"k": -1}, ValueError, "k must be at least 0, got -1"),
    ({"k": 1, "student": Z}, ValueError, "student and its sampling must be left out"),
    ({"k": 1, "student_top_p": 0.5}, ValueError, "student and its sampling must be left out"),
    ({"rule": "ratio"}, ValueError, "rule must be one of top_k, speculative, got 'ratio'"),
    ({"rule": "speculative"}, ValueError, 'student must be given for rule="speculative", got None; it says'),
    ({"rule": "speculative", "student": Z, "k": 3}, ValueError, 'k must be None for rule="speculative", got 3'),
    (
        {"rule": "speculative", "student": torch.zeros(2, 6)}, ValueError,
        r"student must be of shape \[2, 5\] like the teacher, got \[2, 6\]",
    ),
    (
        {"rule": "speculative", "student": Z, "student_temperature": -1.0}, ValueError,
        "student_temperature must be at least 0, got -1.0",
    ),
    (
        {"rule": "speculative", "student": Z, "student_top_p": torch.tensor([0.5, 2.0])}, ValueError,
        "student_top_p must be in 0..1, got 2.0 in row 1",
    ),
    ({"k": 1, "top_k": 0}, ValueError, "top_k must be at least 1, got 0; pass None to keep all"),
    ({"k": 1, "drafts": torch.tensor([0, 5])}, ValueError, "drafts must be in 0..V-1=4, got 5 in row 1"),
    ({"k": 1, "drafts": torch.tensor([-1, 0])}, ValueError, "drafts must be in 0..V-1=4, got -1 in row 0"),
    (
        {"k": 1, "drafts": torch.tensor([0])}, ValueError,
        r"drafts must be of shape \[2\] like the rows of logits, got \[1\]",
    ),
    ({"k": 1, "drafts": torch.zeros(2)}, TypeError, "drafts must be of dtype int64 or int32"),
    (
        {"k": 1, "positions": torch.tensor([0, 1 << 32])}, ValueError,
        "positions must be in 0..4294967295, got 4294967296 in row 1",
    ),
    ({"k": 1, "check": "maybe"}, ValueError, "check must be one of raise, flag"),
    (
        {"k": 1, "max_scratch_bytes": 10}, ValueError,
        "max_scratch_bytes must be at least .* which one row takes, got 10",
    ),
])
def test_what_is_refused(given: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"accept_or_resample: {message}"):
        accept_or_resample(**{"drafts": torch.tensor([0, 1]), "teacher": Z, "seed": 0} | given)


def test_under_compile_the_graph_breaks_and_the_result_is_the_same(unpoisoned: None) -> None:
    z = eighths(2)[:4, :300]
    run = lambda x: accept_or_resample(torch.arange(4), x, k=150, temperature=0.5, seed=1).ids  # noqa: E731
    assert torch.equal(torch.compile(run, backend="eager")(z), run(z))
    assert not accept_or_resample(torch.arange(4), z.requires_grad_(), k=150, seed=1).model_logprobs.requires_grad
