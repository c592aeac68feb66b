"""The tests are tested: a wrong gradient, a dropped tail, a forgotten temperature must each fail the comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from judge import CASES, Dense, Linear, Sparse, compare, every_product, run_library, run_oracle
from kd_kernels.loss.driver import row_implementation
from kd_kernels.testing import assert_as_good, linear_pair, logits_pair

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def heads(dtype: torch.dtype = torch.float32, total_variation: float = 0.1) -> tuple[Linear, Linear]:
    pair = linear_pair(7, 517, 24, 40, dtype, total_variation=total_variation)
    return Linear(pair.student_hidden, pair.student_weight), Linear(pair.teacher_hidden, pair.teacher_weight)


# -------------------------------------------------------------------------------------------- the comparison on its own


def zero_off_target(gradient: Tensor) -> Tensor:
    """Only the largest entry of every row survives: what an absolute tolerance of 1e-4 cannot see."""
    return gradient * (gradient.abs() == gradient.abs().amax(-1, keepdim=True))


def zero_one_entry(gradient: Tensor) -> Tensor:
    """The largest entry of one row."""
    changed = gradient.clone()
    changed[2, changed[2].abs().argmax()] = 0.0
    return changed


MUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled by 1.01": lambda g: g * 1.01,
    "scaled by 0.99": lambda g: g * 0.99,
    "negated": lambda g: -g,
    "zero": torch.zeros_like,
    "off-target entries zero": zero_off_target,
    "one entry zero": zero_one_entry,
    "one row of the neighbour": lambda g: g[[0, 1, 1, 3, 4, 5, 6]],
    "one column late": lambda g: g.roll(1, -1),
    "NaN": lambda g: torch.full_like(g, torch.nan),
    "one inf": lambda g: g.index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(torch.inf, dtype=g.dtype)),
}


@pytest.mark.parametrize("mutation", list(MUTATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["uniform", "near_0.3", "near_0.03", "peaked"])
def test_comparison_rejects(mutation: str, dtype: torch.dtype, kind: str) -> None:
    student, teacher = (Dense(x) for x in logits_pair(kind, 7, 517, dtype))
    truth = run_oracle(student, teacher, "forward_kl", torch.float64, reduction="sum").gradients["logits"]
    plain = run_oracle(
        student, teacher, "forward_kl", torch.float64 if dtype == torch.float64 else torch.float32, reduction="sum"
    )
    honest = plain.gradients["logits"].to(dtype)
    assert_as_good(honest, honest, truth, unit=2.0)
    with pytest.raises(AssertionError, match=r"\|error\| in row"):
        assert_as_good(MUTATIONS[mutation](truth).to(dtype), honest, truth, unit=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_comparison_sees_the_small_half_of_a_flat_row(dtype: torch.dtype) -> None:
    """Entries of 1e-4 and less, each below any absolute tolerance."""
    student, teacher = (Dense(x) for x in logits_pair("uniform", 7, 2053, dtype))
    truth = run_oracle(student, teacher, "forward_kl", torch.float64, reduction="sum").gradients["logits"]
    half = truth.masked_fill(truth.abs() < truth.abs().median(-1, keepdim=True).values, 0.0)
    assert (truth - half).abs().max() < 1e-4
    with pytest.raises(AssertionError, match=r"sum of \|error\| in row"):
        assert_as_good(half.to(dtype), truth.to(dtype), truth, unit=2.0)


def test_comparison_takes_infinities_at_their_word() -> None:
    infinite = torch.tensor([[torch.inf, 1.0]])
    assert_as_good(infinite, infinite, infinite)
    for wrong in (-torch.inf, torch.nan, 3e38):
        with pytest.raises(AssertionError):
            assert_as_good(torch.tensor([[wrong, 1.0]]), infinite, infinite)


def test_comparison_names_the_worst() -> None:
    truth = torch.ones(4, 6, dtype=torch.float64)
    wrong = truth.clone()
    wrong[2, 5] = 3.0
    with pytest.raises(
        AssertionError, match=r"^dW: sum of \|error\| in row 2 of 4 is 2, .*worst at column 5: got 3, plain 1, true 1$"
    ):
        assert_as_good(wrong, truth, truth, what="dW")


# --------------------------------------------------------------------------------- the library, changed under the tests


def mutate_rows(monkeypatch: pytest.MonkeyPatch, backend: str, change: Callable[[Tensor], Tensor]) -> None:
    """Every gradient that the backend's row pass writes is changed before the products with it."""
    for name in ("dense_rows", "sparse_rows"):
        real = getattr(row_implementation(backend), name)

        def mutated(student, teacher, job, labels, weight, gradient, want_stats, real=real):
            result = real(student, teacher, job, labels, weight, gradient, want_stats)
            if gradient is not None:
                gradient.copy_(change(gradient.clone()))
            return result

        monkeypatch.setattr(row_implementation(backend), name, mutated)


@pytest.mark.parametrize("mutation", ["scaled by 1.01", "off-target entries zero", "one entry zero", "one column late"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_product
@pytest.mark.parametrize("teacher", ["linear", "sparse"])
def test_changed_gradients_of_the_library_fail(
    backend: str, mutation: str, reduction: str, dtype: torch.dtype, bf16_products: bool, teacher: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, target = heads(dtype)
    if teacher == "sparse":
        logits = target.oracle(target.leaves).double()
        target = Sparse.of(logits, list(logits.topk(20, -1).indices))
    arguments = (student, target, "forward_kl")
    compare(*arguments, backend=backend, reduction=reduction)
    mutate_rows(monkeypatch, backend, MUTATIONS[mutation])
    with pytest.raises(AssertionError, match=r"d forward_kl / d \w+: "):
        compare(*arguments, backend=backend, reduction=reduction)


def drop_the_tail(job):
    return dataclasses.replace(job, tail="drop")


def forget_the_temperature(job):
    return dataclasses.replace(job, temperature=1.0)


def halve_the_label(job):
    return dataclasses.replace(job, ce_weight=job.ce_weight * 0.99)


@pytest.mark.parametrize("change", [drop_the_tail, forget_the_temperature, halve_the_label])
def test_changed_jobs_of_the_library_fail(backend: str, change: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = heads()
    temperature = 2.0 if change is forget_the_temperature else 1.0
    if change is drop_the_tail:
        logits = teacher.oracle(teacher.leaves).double()
        teacher = Sparse.of(logits, list(logits.topk(20, -1).indices))
    options = dict(labels=torch.arange(7), ce_weight=0.5, temperature=temperature, backend=backend)
    compare(student, teacher, "forward_kl", **options)
    for name in ("dense_rows", "sparse_rows"):
        real = getattr(row_implementation(backend), name)
        monkeypatch.setattr(
            row_implementation(backend), name, lambda s, t, job, *rest, real=real: real(s, t, change(job), *rest)
        )
    with pytest.raises(AssertionError):
        compare(student, teacher, "forward_kl", **options)


@pytest.mark.parametrize("divergence", list(CASES))
def test_no_divergence_passes_for_another(divergence: str) -> None:
    """Whatever the library computes for one name, the oracle of every other name rejects."""
    student, teacher = (Dense(x) for x in logits_pair("near_0.3", 7, 517))
    ours = run_library(student, teacher, divergence, backend="cpp")
    for other in CASES:
        truth = run_oracle(student, teacher, other, torch.float64).gradients["logits"]
        plain = run_oracle(student, teacher, other, torch.float32).gradients["logits"]
        if other == divergence:
            assert_as_good(ours.gradients["logits"], plain, truth, unit=1.0)
        else:
            with pytest.raises(AssertionError):
                assert_as_good(ours.gradients["logits"], plain, truth, unit=1.0)
