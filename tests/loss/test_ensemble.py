"""Several teachers as one: averaged densely, as logits or as probabilities, before anything else happens to them."""

from __future__ import annotations

import math

import pytest
import torch

from judge import CASES, SOME, Dense, Ensemble, Linear, compare, run_library, smallest_budget
from kd_kernels import EnsembleLogits, kd_loss
from kd_kernels.testing import linear_pair, logits_pair

some_divergences = pytest.mark.parametrize("divergence", SOME)
every_space = pytest.mark.parametrize("space", ["logit", "prob"])


def student_and_teachers(dtype: torch.dtype = torch.float32) -> tuple[Linear, list[Dense | Linear]]:
    first, second = (linear_pair(7, 130, 24, 40, dtype, seed=seed) for seed in (0, 1))
    dense, _ = logits_pair("near_0.3", 7, 130, dtype)
    return Linear(first.student_hidden, first.student_weight), [
        Linear(first.teacher_hidden, first.teacher_weight, scale=0.5),
        Dense(dense),
        Linear(second.teacher_hidden, second.teacher_weight, softcap=5.0),
    ]


@every_space
@pytest.mark.parametrize("divergence", list(CASES))
def test_every_divergence(backend: str, space: str, divergence: str) -> None:
    student, teachers = student_and_teachers()
    compare(student, Ensemble(teachers, (1.0, 2.0, 0.5), space), divergence, backend=backend)


@every_space
@some_divergences
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(backend: str, space: str, divergence: str, dtype: torch.dtype) -> None:
    student, teachers = student_and_teachers(dtype)
    compare(student, Ensemble(teachers, (1.0, 2.0, 0.5), space), divergence, backend=backend, reduction="none")


@every_space
@pytest.mark.parametrize("times", [1, 3.5, 100])
def test_every_chunking_is_right(backend: str, space: str, times: float) -> None:
    student, teachers = student_and_teachers()
    teacher = Ensemble(teachers, (1.0, 2.0, 0.5), space)
    labels = torch.tensor([3, -100, 5, 6, -100, 129, 0])
    one = smallest_budget(student.noun(student.leaves), teacher.noun(teacher.leaves), labels=labels, backend=backend)
    compare(
        student,
        teacher,
        "jsd(beta=0.5)",
        backend=backend,
        labels=labels,
        ce_weight=0.5,
        library_only=dict(max_scratch_bytes=int(one * times)),
    )


@every_space
def test_temperature_applies_to_the_ensemble(backend: str, space: str) -> None:
    student, teachers = student_and_teachers()
    compare(student, Ensemble(teachers, (1.0, 2.0, 0.5), space), "forward_kl", backend=backend, temperature=2.0)


@every_space
def test_one_member_is_that_member(backend: str, space: str) -> None:
    student, teachers = student_and_teachers()
    alone = run_library(student, teachers[0], "forward_kl", backend=backend)
    wrapped = run_library(student, Ensemble(teachers[:1], (3.0,), space), "forward_kl", backend=backend)
    torch.testing.assert_close(wrapped.loss, alone.loss, rtol=1e-6, atol=1e-7)
    for name, gradient in wrapped.gradients.items():
        torch.testing.assert_close(gradient, alone.gradients[name], rtol=1e-4, atol=1e-7)


def test_members_with_unequal_padding(backend: str) -> None:
    student, (first, _, third) = student_and_teachers()

    def cut(head: Linear, padding: int) -> Linear:
        weight = torch.cat([head.weight[:120], torch.full((padding, 40), 1e3)])
        return Linear(head.hidden, weight, valid_vocab=120)

    student = Linear(student.hidden, student.weight, valid_vocab=120)
    compare(student, Ensemble([cut(first, 4), cut(third, 30)], (1.0, 1.0), "prob"), "reverse_kl", backend=backend)


@every_space
def test_masked_columns_of_one_member(backend: str, space: str) -> None:
    """Excluded by one: gone from the mean of logits, still there in the mean of probabilities."""
    student, a = logits_pair("near_0.3", 5, 40)
    b = a.roll(1, 0).clone()
    b[:, 7] = -math.inf
    teacher = Ensemble([Dense(a), Dense(b)], (1.0, 1.0), space)
    outcome = compare(Dense(student), teacher, "jsd(beta=0.5)", backend=backend, reduction="none")
    assert outcome.gradients["logits"].isfinite().all()


# ---------------------------------------------------------------------------------------------------- weights by row


def row_weights(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of any sum, and 0 for one member here and there."""
    weights = torch.rand(*shape, generator=torch.Generator().manual_seed(3)) + 0.1
    weights[..., 2, 1] = 0.0
    weights[..., 4, 0] = 0.0
    return weights.to(dtype)


@every_space
@pytest.mark.parametrize("divergence", list(CASES))
def test_rows_have_weights_of_their_own(backend: str, space: str, divergence: str) -> None:
    student, teachers = student_and_teachers()
    compare(student, Ensemble(teachers, row_weights(7, 3), space), divergence, backend=backend)


@every_space
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_rows_in_other_dtypes(backend: str, space: str, dtype: torch.dtype) -> None:
    student, teachers = student_and_teachers(dtype)
    weights = row_weights(7, 3, dtype=dtype)
    compare(student, Ensemble(teachers, weights, space), "jsd(beta=0.5)", backend=backend, reduction="none")


@every_space
@pytest.mark.parametrize("times", [1, 3.5, 100])
def test_weights_follow_their_rows_through_chunks_and_ignored_rows(backend: str, space: str, times: float) -> None:
    student, teachers = student_and_teachers()
    teacher = Ensemble(teachers, row_weights(7, 3), space)
    labels = torch.tensor([3, -100, 5, 6, -100, 129, 0])
    one = smallest_budget(student.noun(student.leaves), teacher.noun(teacher.leaves), labels=labels, backend=backend)
    budget = dict(max_scratch_bytes=int(one * times))
    compare(student, teacher, "reverse_kl", backend=backend, labels=labels, ce_weight=0.5, library_only=budget)


@every_space
def test_equal_weights_of_rows_are_the_weights_of_members(backend: str, space: str) -> None:
    student, teachers = student_and_teachers()
    one = run_library(student, Ensemble(teachers, (1.0, 2.0, 0.5), space), "forward_kl", backend=backend)
    rows = torch.tensor([2.0, 4.0, 1.0]).expand(7, 3)
    other = run_library(student, Ensemble(teachers, rows, space), "forward_kl", backend=backend)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-6, atol=1e-7)


@every_space
def test_a_member_of_weight_0_takes_no_part(backend: str, space: str) -> None:
    """Not even by the columns that it masks."""
    student, a = logits_pair("near_0.3", 5, 40)
    b = a.roll(1, 0).clone()
    b[:, 7] = -math.inf
    alone = run_library(Dense(student), Dense(a), "jsd(beta=0.5)", backend=backend)
    weights = torch.tensor([2.0, 0.0]).expand(5, 2)
    wrapped = run_library(
        Dense(student), Ensemble([Dense(a), Dense(b)], weights, space), "jsd(beta=0.5)", backend=backend
    )
    torch.testing.assert_close(wrapped.loss, alone.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(wrapped.gradients["logits"], alone.gradients["logits"], rtol=1e-4, atol=1e-7)


def test_weights_of_rows_with_several_leading_dimensions(backend: str) -> None:
    members = [torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    weights = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(9)) + 0.1
    shaped = kd_loss(members[2], EnsembleLogits(tuple(members[:2]), weights, "prob"), reduction="none", backend=backend)
    flat = [member.reshape(6, 40) for member in members]
    alike = kd_loss(
        flat[2], EnsembleLogits(tuple(flat[:2]), weights.reshape(6, 2), "prob"), reduction="none", backend=backend
    )
    assert shaped.loss.shape == (2, 3) and torch.equal(shaped.loss.flatten(), alike.loss)
    order = torch.arange(6).flip(0)
    turned = kd_loss(
        flat[2][order], EnsembleLogits(tuple(m[order] for m in flat[:2]), weights.reshape(6, 2)[order], "prob"),
        reduction="none", backend=backend,
    )
    torch.testing.assert_close(turned.loss.flip(0), alike.loss)
