"""Labels, weights, temperatures, reductions, rows and statistics: all that kd_loss takes besides two models."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import oracles
from judge import CASES, SOME, Dense, Linear, Sparse, Student, Teacher, compare, run_library
from kd_kernels import kd_loss
from kd_kernels.loss.plan import STATS
from kd_kernels.testing import linear_pair, logits_pair

N, V = 9, 61
LABELS = torch.tensor([5, -100, 0, 60, 33, -100, 7, 7, 12])
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.25, 1.0, 3.0, 0.0, 1.0])

some_divergences = pytest.mark.parametrize("divergence", SOME)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def students(dtype: torch.dtype = torch.float32) -> dict[str, Student]:
    heads = linear_pair(N, V, 16, 24, dtype)
    head = Linear(heads.student_hidden, heads.student_weight, bias=torch.linspace(-1, 1, V).to(dtype))
    return {"linear": head, "dense": Dense(logits_pair("near_0.3", N, V, dtype)[0])}


def teachers(dtype: torch.dtype = torch.float32) -> dict[str, Teacher]:
    heads = linear_pair(N, V, 16, 24, dtype)
    dense = logits_pair("near_0.3", N, V, dtype)[1]
    return {
        "linear": Linear(heads.teacher_hidden, heads.teacher_weight),
        "dense": Dense(dense),
        "sparse": Sparse.of(dense, list(dense.double().topk(6, -1).indices)),
    }


every_student = pytest.mark.parametrize("student", ["linear", "dense"])
every_teacher = pytest.mark.parametrize("teacher", ["linear", "dense", "sparse"])

OPTIONS: dict[str, dict] = {
    "nothing": {},
    "ignored rows": dict(labels=LABELS),
    "cross-entropy": dict(labels=LABELS, ce_weight=0.5),
    "both weighted": dict(labels=LABELS, ce_weight=0.7, kd_weight=0.3),
    "cross-entropy alone": dict(labels=LABELS, ce_weight=1.0, kd_weight=0.0),
    "other ignore_index": dict(labels=LABELS.masked_fill(LABELS == -100, 3), ignore_index=3, ce_weight=0.5),
    "ignored id 7": dict(labels=LABELS.clamp_min(0), ignore_index=7, ce_weight=0.5),
    "int32 labels": dict(labels=LABELS.int(), ce_weight=0.5),
    "token weights": dict(token_weight=WEIGHTS),
    "bf16 token weights": dict(token_weight=WEIGHTS.bfloat16()),
    "labels and token weights": dict(labels=LABELS, ce_weight=0.5, token_weight=WEIGHTS),
    "some rows": dict(rows=torch.tensor([8, 0, 3])),
    "some rows, labels, weights": dict(
        rows=torch.tensor([8, 0, 3, 1, 2]), labels=LABELS, ce_weight=0.5, token_weight=WEIGHTS
    ),
}


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize(
    "reduction", ["mean", "none"]
)  # a sum is a mean without the division: tests/loss/test_dense.py
@every_student
@every_teacher
@pytest.mark.parametrize("compact", [None, False])
def test_rows_and_weights(
    backend: str, student: str, teacher: str, reduction: str, options: str, compact: bool | None
) -> None:
    outcome = compare(
        students()[student],
        teachers()[teacher],
        "jsd(beta=0.5)",
        backend=backend,
        reduction=reduction,
        **OPTIONS[options],
        library_only=dict(compact=compact),
    )
    labels, ignored = OPTIONS[options].get("labels"), OPTIONS[options].get("ignore_index", -100)
    if labels is not None:  # not merely small: nothing at all
        gradient = outcome.gradients["logits" if student == "dense" else "hidden"]
        assert not gradient[labels == ignored].any()
        if reduction == "none":
            assert not outcome.loss[labels == ignored].any()


@pytest.mark.parametrize(
    "normalizer", [4, 17.5, torch.tensor(17.5), torch.tensor([4]), torch.tensor(4.0, dtype=torch.float64)]
)
@every_student
def test_normalizer(backend: str, student: str, normalizer: float | Tensor) -> None:
    compare(
        students()[student],
        teachers()["dense"],
        "forward_kl",
        backend=backend,
        labels=LABELS,
        ce_weight=0.5,
        normalizer=normalizer,
    )


@every_teacher
def test_splitting_a_batch_changes_nothing(backend: str, teacher: str) -> None:
    """With the global normaliser, micro-batches add up to the whole, in loss and gradients."""
    head, target = students(torch.float64)["linear"], teachers(torch.float64)[teacher]
    if isinstance(target, Sparse):
        target = dataclasses.replace(target, dtype=torch.float64)

    def run(rows: Tensor, normalizer: float | None):
        part = dataclasses.replace(head, hidden=head.hidden[rows])
        if isinstance(target, Sparse):
            own = dataclasses.replace(target, rows=[target.rows[i] for i in rows])
        else:
            name = "hidden" if isinstance(target, Linear) else "logits"
            own = dataclasses.replace(target, **{name: getattr(target, name)[rows]})
        return run_library(
            part,
            own,
            "forward_kl",
            backend=backend,
            labels=LABELS[rows],
            ce_weight=0.5,
            token_weight=WEIGHTS[rows],
            normalizer=normalizer,
        )

    everything = torch.arange(N)
    whole = run(everything, None)
    total = WEIGHTS[LABELS != -100].sum().item()
    parts = [run(rows, total) for rows in everything.split([2, 3, 4])]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    torch.testing.assert_close(torch.cat([p.gradients["hidden"] for p in parts]), whole.gradients["hidden"])
    for name in ("weight", "bias"):
        torch.testing.assert_close(sum(p.gradients[name] for p in parts), whole.gradients[name])


@pytest.mark.parametrize("divergence", list(CASES))
@pytest.mark.parametrize("temperature", [0.5, 1, 3.0])
@pytest.mark.parametrize("squared", [False, True])
def test_temperature(backend: str, divergence: str, temperature: float, squared: bool) -> None:
    """The divergence is tempered, the cross-entropy is not."""
    for student in students().values():
        compare(
            student,
            teachers()["dense"],
            divergence,
            backend=backend,
            temperature=temperature,
            squared_temperature=squared,
            labels=LABELS,
            ce_weight=0.5,
        )


def test_temperature_with_softcapped_and_scaled_heads(backend: str) -> None:
    heads = linear_pair(N, V, 16, 24, logit_std=5.0)
    student = Linear(heads.student_hidden, heads.student_weight, scale=1.5, softcap=8.0)
    teacher = Linear(heads.teacher_hidden, heads.teacher_weight, scale=0.5, softcap=20.0)
    for reduction in ("mean", "none"):
        compare(
            student,
            teacher,
            "reverse_kl",
            backend=backend,
            temperature=2.0,
            labels=LABELS,
            ce_weight=0.5,
            reduction=reduction,
        )


@every_student
@every_reduction
def test_without_a_teacher(backend: str, student: str, reduction: str) -> None:
    """kd_weight=0: the loss is F.cross_entropy."""
    noun = students()[student]
    leaves = {k: v.clone().requires_grad_() for k, v in noun.leaves.items()}
    ours = kd_loss(
        noun.noun(leaves), None, kd_weight=0.0, ce_weight=1.0, labels=LABELS, reduction=reduction, backend=backend
    ).loss
    ours.sum().backward()
    truth = {k: v.double().requires_grad_() for k, v in noun.leaves.items()}
    want = torch.nn.functional.cross_entropy(noun.oracle(truth), LABELS, reduction=reduction)
    want.sum().backward()
    torch.testing.assert_close(ours.double(), want, rtol=2e-6, atol=2e-6)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad.double(), truth[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_kd_weight_zero_switches_an_infinite_divergence_off(backend: str, divergence: str) -> None:
    student, teacher = logits_pair("near_0.3", 4, 20)
    (student if divergence == "forward_kl" else teacher)[:, 3] = -math.inf
    labels = torch.tensor([0, 1, 2, 5])
    alone = run_library(
        Dense(student), Dense(teacher), "total_variation", kd_weight=0.0, ce_weight=1.0, labels=labels, backend=backend
    )
    outcome = run_library(
        Dense(student), Dense(teacher), divergence, kd_weight=0.0, ce_weight=1.0, labels=labels, backend=backend
    )
    assert torch.equal(outcome.loss, alone.loss) and torch.equal(outcome.gradients["logits"], alone.gradients["logits"])


@pytest.mark.parametrize("compact", [None, False])
@every_teacher
@every_student
def test_no_row_counts(backend: str, student: str, teacher: str, compact: bool | None) -> None:
    nothing = torch.full((N,), -100)
    for options in (dict(labels=nothing), dict(labels=nothing, ce_weight=1.0), dict(token_weight=torch.zeros(N))):
        for reduction in ("mean", "sum", "none"):
            outcome = run_library(
                students()[student],
                teachers()[teacher],
                "forward_kl",
                backend=backend,
                reduction=reduction,
                compact=compact,
                **options,
            )
            assert not outcome.loss.any() and outcome.loss.isfinite().all()
            for name, gradient in outcome.gradients.items():
                assert not gradient.any() and gradient.isfinite().all(), name


def test_no_rows_listed(backend: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    outcome = run_library(students()["linear"], teachers()["linear"], "forward_kl", rows=none, backend=backend)
    assert outcome.loss == 0 and not any(g.any() for g in outcome.gradients.values())


@pytest.mark.parametrize("compact", [None, True, False])
@pytest.mark.parametrize("rubbish", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("by", ["label", "weight", "rows"])
def test_rows_that_do_not_count_may_hold_anything(backend: str, rubbish: float, by: str, compact: bool | None) -> None:
    """Padding positions are often NaN or never written. They reach neither the loss nor another row's gradient.

    Nor the head's gradient, where they are dropped; masked, it holds 0 times their hidden state, as plain torch has it.
    """
    student, teacher = students()["linear"], teachers()["linear"]
    bad = torch.tensor([1, 5])
    options = {
        "label": dict(labels=LABELS),
        "weight": dict(token_weight=torch.ones(N).index_fill(0, bad, 0.0)),
        "rows": dict(rows=torch.tensor([0, 2, 3, 4, 6, 7, 8])),
    }[by]
    clean = run_library(student, teacher, "forward_kl", backend=backend, **options)
    spoil = lambda head: dataclasses.replace(head, hidden=head.hidden.index_fill(0, bad, rubbish))  # noqa: E731
    wanted = ["hidden", "bias"] if compact is False else ["hidden", "weight", "bias"]
    spoiled = dict(backend=backend, compact=compact, requires=wanted, **options)
    outcome = run_library(spoil(student), spoil(teacher), "forward_kl", **spoiled)
    torch.testing.assert_close(outcome.loss, clean.loss)
    for name, gradient in outcome.gradients.items():
        torch.testing.assert_close(gradient, clean.gradients[name])
    per_row = run_library(spoil(student), spoil(teacher), "forward_kl", reduction="none", **spoiled)
    assert per_row.loss.isfinite().all() and not per_row.loss[bad].any()


@pytest.mark.parametrize("compact", [None, False])
def test_infinite_divergence_of_rows_that_do_not_count(backend: str, compact: bool | None) -> None:
    student, teacher = logits_pair("near_0.3", N, V)
    student[LABELS == -100, 4] = -math.inf
    outcome = run_library(Dense(student), Dense(teacher), "forward_kl", labels=LABELS, compact=compact, backend=backend)
    assert outcome.loss.isfinite() and outcome.gradients["logits"].isfinite().all()


def test_order_of_rows_is_free(backend: str) -> None:
    listed = torch.tensor([8, 0, 3, 1])
    outcomes = [
        run_library(
            students()["linear"], teachers()["linear"], "forward_kl", rows=rows, reduction="none", backend=backend
        )
        for rows in (listed, listed.flip(0))
    ]
    torch.testing.assert_close(outcomes[0].loss, outcomes[1].loss, rtol=1e-6, atol=0)
    assert set(outcomes[0].loss.nonzero()[:, 0].tolist()) == {0, 1, 3, 8}


# ----------------------------------------------------------------------------------------------------------- statistics


def expected_stats(
    student: Student, teacher: Teacher, divergence: str, temperature: float, labels: Tensor
) -> dict[str, Tensor]:
    as_double = lambda noun: noun.oracle({k: v.double() for k, v in noun.leaves.items()})  # noqa: E731
    s, t = as_double(student), as_double(teacher)
    name, params = CASES[divergence]
    stats = {
        "student_entropy": oracles.entropy(s, temperature),
        "label_logprob": oracles.label_logprob(s, labels.clamp_min(0)),
        "student_top1": oracles.top1(s),
        "student_confidence": oracles.confidence(s, temperature),
    }
    if isinstance(t, Tensor):
        stats |= {
            "divergence": oracles.dense_divergence(s, t, name, params, temperature),
            "teacher_entropy": oracles.entropy(t, temperature),
            "captured_mass": torch.ones(len(t), dtype=torch.float64),
            "teacher_label_logprob": oracles.label_logprob(t / temperature, labels.clamp_min(0)),
            "teacher_top1": oracles.top1(t),
            "teacher_confidence": oracles.confidence(t, temperature),
        }
    else:
        kept = [{int(i): float(p) for i, p in zip(r.ids, r.logprobs)} for r in t]
        events = [torch.cat([r.logprobs, r.tail_logprob[None]]) for r in t]
        stats |= {
            "divergence": oracles.sparse_divergence(s, t, name, params, "bucket", temperature),
            "teacher_entropy": torch.stack([-(e.exp() * e).sum() for e in events]),
            "captured_mass": torch.stack([r.logprobs.exp().sum() for r in t]),
            "teacher_label_logprob": torch.tensor([k.get(int(y), math.nan) for k, y in zip(kept, labels)]),
            "teacher_top1": torch.tensor([int(r.ids[r.logprobs.argmax()]) for r in t]),
            "teacher_confidence": torch.stack([r.logprobs.max().exp() for r in t]),
        }
    stats["agreement"] = (stats["student_top1"] == stats["teacher_top1"]).double()
    ignored = labels == -100
    return {
        k: v.masked_fill(ignored, -1) if k.endswith("top1") else v.masked_fill(ignored, math.nan)
        for k, v in stats.items()
    }


@pytest.mark.parametrize("compact", [None, False])
@pytest.mark.parametrize(
    "teacher, temperature", [("linear", 1.0), ("linear", 2.0), ("dense", 1.0), ("dense", 2.0), ("sparse", 1.0)]
)
@every_student
def test_statistics(backend: str, student: str, teacher: str, temperature: float, compact: bool | None) -> None:
    noun, target = students()[student], teachers()[teacher]
    for options in (
        dict(),
        dict(ce_weight=0.5),
        dict(reduction="none"),
        dict(kd_weight=0.3, token_weight=torch.full((N,), 2.0)),
    ):
        outcome = run_library(
            noun,
            target,
            "jsd(beta=0.5)",
            backend=backend,
            stats=STATS,
            labels=LABELS,
            temperature=temperature,
            compact=compact,
            squared_temperature=True,
            **options,
        )
        want = expected_stats(noun, target, "jsd(beta=0.5)", temperature, LABELS)
        assert set(outcome.stats) == set(want) == set(STATS)
        for name, value in outcome.stats.items():
            assert value.shape == (N,) and not value.requires_grad
            assert value.dtype == (torch.int64 if name.endswith("top1") else torch.float32), name
            close = torch.isclose(value.double(), want[name].double(), rtol=5e-6, atol=2e-6, equal_nan=True)
            assert close.all(), f"{name}: got {value}, want {want[name]}"


def test_statistics_are_given_in_the_order_asked_and_shaped_like_the_rows(backend: str) -> None:
    student, teacher = logits_pair("near_0.3", 6, V)
    result = kd_loss(
        student.view(2, 3, V), teacher.view(2, 3, V), stats=("teacher_top1", "divergence"), backend=backend
    )
    assert list(result.stats) == ["teacher_top1", "divergence"]
    assert all(value.shape == (2, 3) for value in result.stats.values())
    torch.testing.assert_close(result.stats["divergence"].mean(), result.loss)
    assert kd_loss(student, teacher, backend=backend).stats == {}


def test_statistics_without_labels_have_no_label_logprob(backend: str) -> None:
    student, teacher = logits_pair("near_0.3", 3, V)
    stats = kd_loss(student, teacher, stats=STATS, backend=backend).stats
    assert stats["label_logprob"].isnan().all() and stats["teacher_label_logprob"].isnan().all()
    assert stats["student_entropy"].isfinite().all()


def test_statistics_of_ties_take_the_lower_id(backend: str) -> None:
    student = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0] * 7, [1.0] * 35])
    stats = kd_loss(student, student.flip(1), stats=STATS, backend=backend).stats
    assert stats["student_top1"].tolist() == [1, 0]
    assert stats["teacher_top1"].tolist() == [0, 0]
    assert stats["agreement"].tolist() == [0.0, 1.0]


def test_statistics_with_masked_columns(backend: str) -> None:
    student, teacher = logits_pair("masked", 5, V)
    outcome = run_library(
        Dense(student), Dense(teacher), "jsd(beta=0.5)", stats=STATS, labels=torch.zeros(5).long(), backend=backend
    )
    for name, value in outcome.stats.items():
        assert value.isfinite().all(), name
    want = expected_stats(Dense(student), Dense(teacher), "jsd(beta=0.5)", 1.0, torch.zeros(5).long())
    torch.testing.assert_close(outcome.stats["student_entropy"].double(), want["student_entropy"], rtol=5e-6, atol=0)


def test_statistics_of_rows_without_entries(backend: str) -> None:
    student, teacher = logits_pair("near_0.3", 3, V)
    targets = Sparse.of(
        teacher, [torch.tensor([], dtype=torch.int64), torch.tensor([4]), torch.tensor([], dtype=torch.int64)]
    )
    stats = run_library(Dense(student), targets, "forward_kl", stats=STATS, backend=backend).stats
    assert stats["captured_mass"][[0, 2]].tolist() == [0.0, 0.0]
    assert stats["teacher_top1"].tolist() == [-1, 4, -1]
    assert stats["teacher_confidence"].isnan().tolist() == [True, False, True]


def test_statistics_cost_no_other_result(backend: str) -> None:
    """Loss and gradients are the same bits with and without them."""
    plain, with_stats = (
        run_library(
            students()["linear"],
            teachers()["linear"],
            "jsd(beta=0.5)",
            labels=LABELS,
            ce_weight=0.5,
            stats=s,
            backend=backend,
        )
        for s in ((), STATS)
    )
    assert torch.equal(plain.loss, with_stats.loss)
    assert all(torch.equal(g, with_stats.gradients[name]) for name, g in plain.gradients.items())


def test_same_call_twice_gives_the_same_bits(backend: str) -> None:
    for reduction in ("mean", "none"):
        a, b = (
            run_library(
                students()["linear"], teachers()["linear"], "jsd(beta=0.5)", reduction=reduction, backend=backend
            )
            for _ in range(2)
        )
        assert torch.equal(a.loss, b.loss) and all(torch.equal(g, b.gradients[k]) for k, g in a.gradients.items())


@some_divergences
def test_teacher_may_be_the_student(divergence: str, backend: str) -> None:
    logits = logits_pair("near_0.3", 4, V)[0].requires_grad_()
    loss = kd_loss(logits, logits, divergence, backend=backend).loss
    loss.backward()
    assert abs(loss.item()) < 1e-6 and logits.grad.abs().max() < 1e-6
