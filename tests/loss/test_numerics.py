"""The promise of the library: gradients as exact as fp32 logits give, whatever the inputs' dtype and the chunking."""

from __future__ import annotations

import dataclasses
import math
import threading

import pytest
import torch
from torch import Tensor

import oracles
from judge import (
    SOME, Dense, Linear, Sparse, Student, Teacher, compare, every_product, run_library, run_oracle, smallest_budget,
)
from kd_kernels import LinearLogits, kd_loss
from kd_kernels.testing import linear_pair, logits_pair

some_divergences = pytest.mark.parametrize("divergence", SOME)


def relative_l2(got: Tensor, true: Tensor) -> float:
    return ((got.double() - true).norm() / true.norm()).item()


def heads(dtype: torch.dtype, total_variation: float, logit_std: float) -> tuple[Linear, Linear]:
    pair = linear_pair(32, 2048, 64, 96, dtype, total_variation=total_variation, logit_std=logit_std)
    return Linear(pair.student_hidden, pair.student_weight), Linear(pair.teacher_hidden, pair.teacher_weight)


def gradient_error(student: Student, teacher: Teacher, divergence: str, **options) -> float:
    """The worst relative L2 error of any gradient, against float64 on the same (rounded) inputs."""
    ours = run_library(student, teacher, divergence, **options)
    truth = run_oracle(student, teacher, divergence, torch.float64, reduction=options.get("reduction", "mean"))
    return max(relative_l2(g, truth.gradients[name]) for name, g in ours.gradients.items())


@some_divergences
@pytest.mark.parametrize("total_variation", [0.3, 0.1, 0.03])
@pytest.mark.parametrize("logit_std", [3.0, 8.0])
def test_bf16_gradients_are_as_good_as_fp32_logits_give(
    backend: str, divergence: str, total_variation: float, logit_std: float, bf16_products: bool
) -> None:
    """0.5 percent: a bf16 gradient tile costs 0.16 percent, bf16 logits would cost 3 to 35 (METHODS of the peers)."""
    assert gradient_error(*heads(torch.bfloat16, total_variation, logit_std), divergence, backend=backend) < 5e-3


@some_divergences
@pytest.mark.parametrize("total_variation", [0.3, 0.03])
def test_fp16_gradients(backend: str, divergence: str, total_variation: float) -> None:
    """Summed, not averaged: a mean is below the least normal number of fp16, which loss scaling is there for."""
    assert (
        gradient_error(*heads(torch.float16, total_variation, 3.0), divergence, backend=backend, reduction="sum") < 1e-3
    )


@some_divergences
@pytest.mark.parametrize("total_variation", [0.3, 0.03])
def test_fp32_gradients(backend: str, divergence: str, total_variation: float) -> None:
    assert gradient_error(*heads(torch.float32, total_variation, 8.0), divergence, backend=backend) < 1e-4


@pytest.mark.parametrize("total_variation, at_least", [(0.3, 0.01), (0.1, 0.03), (0.03, 0.1)])
def test_rounded_logits_are_worse_and_only_on_request(backend: str, total_variation: float, at_least: float) -> None:
    """logits_dtype="input" is what most code does: percents in the gradient, and more the better the student."""
    student, teacher = heads(torch.bfloat16, total_variation, 3.0)
    named = gradient_error(student, teacher, "forward_kl", backend=backend, logits_dtype="input")
    assert named > at_least
    assert named > 5 * gradient_error(student, teacher, "forward_kl", backend=backend)


def test_rounded_logits_of_fp32_heads_are_not_rounded(backend: str) -> None:
    student, teacher = heads(torch.float32, 0.03, 3.0)
    assert gradient_error(student, teacher, "forward_kl", backend=backend, logits_dtype="input") < 1e-4


@some_divergences
def test_dw_is_summed_in_fp32(backend: str, divergence: str, bf16_products: bool) -> None:
    """A bf16 head over many chunks: summed in bf16, half of a hundred equal parts would be lost to rounding."""
    pair = linear_pair(256, 256, 16, 24, torch.bfloat16, total_variation=0.1)
    student, teacher = (
        Linear(pair.student_hidden, pair.student_weight),
        Linear(pair.teacher_hidden, pair.teacher_weight),
    )
    one = smallest_budget(student.noun(student.leaves), teacher.noun(teacher.leaves), backend=backend)
    assert gradient_error(student, teacher, divergence, backend=backend, max_scratch_bytes=one) < 5e-3


@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_product
@pytest.mark.parametrize("teacher", ["linear", "dense", "sparse"])
def test_scratch_budget_changes_nothing_but_rounding(
    backend: str, teacher: str, dtype: torch.dtype, bf16_products: bool, reduction: str
) -> None:
    pair = linear_pair(33, 300, 32, 48, dtype)
    student = Linear(pair.student_hidden, pair.student_weight)
    target: Teacher = Linear(pair.teacher_hidden, pair.teacher_weight)
    if teacher != "linear":
        logits = target.oracle(target.leaves)
        target = Dense(logits) if teacher == "dense" else Sparse.of(logits, list(logits.float().topk(8, -1).indices))
    one = smallest_budget(student.noun(student.leaves), target.noun(target.leaves), backend=backend)
    outcomes = [
        run_library(student, target, "jsd(beta=0.5)", reduction=reduction, backend=backend, max_scratch_bytes=budget)
        for budget in (None, 5 * one, one)
    ]
    for other in outcomes[1:]:
        torch.testing.assert_close(other.loss, outcomes[0].loss, rtol=2e-6, atol=1e-7)
        for name, gradient in other.gradients.items():
            # A product over other shapes is summed in another order, and that flips the last bit of a bf16 result.
            assert relative_l2(gradient, outcomes[0].gradients[name].double()) < (
                2e-3 if dtype == torch.bfloat16 else 1e-5
            )


def test_scratch_budget_does_not_touch_rows_of_given_logits(backend: str) -> None:
    """Nothing is multiplied, so every chunking gives the same bits, row for row."""
    student, teacher = (Dense(x) for x in logits_pair("near_0.3", 33, 300))
    outcomes = [
        run_library(student, teacher, "jsd(beta=0.5)", reduction=r, backend=backend, max_scratch_bytes=b)
        for r in ("none", "sum")
        for b in (None, 200_000, 60_000)
    ]
    for one in outcomes:
        assert torch.equal(one.gradients["logits"], outcomes[0].gradients["logits"])
    assert all(torch.equal(one.loss, outcomes[0].loss) for one in outcomes[:3])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_number_of_threads_changes_no_bit_of_a_row(threads: int) -> None:
    student, teacher = (Dense(x) for x in logits_pair("near_0.3", 33, 2053))
    want = run_library(student, teacher, "jsd(beta=0.5)", reduction="none", backend="cpp")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = run_library(student, teacher, "jsd(beta=0.5)", reduction="none", backend="cpp")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.gradients["logits"], want.gradients["logits"])


def test_calls_from_several_threads(backend: str) -> None:
    """Two trainers in one process, or a data loader beside one: no shared state."""
    if backend == "triton":
        pytest.skip("threads: Triton's interpreter has one state for all of them")
    cases = [tuple(Dense(x) for x in logits_pair("near_0.3", 9, 500, seed=seed)) for seed in range(4)]
    want = [run_library(*case, "jsd(beta=0.5)", backend=backend) for case in cases]
    got: list = [None] * 4

    def work(i: int) -> None:
        for _ in range(5):
            got[i] = run_library(*cases[i], "jsd(beta=0.5)", backend=backend)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for one, other in zip(got, want):
        assert torch.equal(one.loss, other.loss) and torch.equal(one.gradients["logits"], other.gradients["logits"])


# ------------------------------------------------------------------------------------------------------------- extremes


@some_divergences
@pytest.mark.parametrize("offset", [-3e38, -1e30, 1e30, 3e38])
def test_offsets_at_the_end_of_the_range(backend: str, divergence: str, offset: float) -> None:
    """Equal logits are the uniform distribution wherever they lie."""
    student = torch.full((2, 33), offset)
    outcome = run_library(Dense(student), Dense(torch.zeros(2, 33)), divergence, backend=backend)
    assert abs(outcome.loss.item()) < 1e-6 and outcome.gradients["logits"].abs().max() < 1e-6


@some_divergences
def test_one_logit_far_above_the_rest(backend: str, divergence: str) -> None:
    """Probabilities of exactly 1 and 0, on both sides at different ids: finite unless the formula is not."""
    student, teacher = torch.zeros(2, 33), torch.zeros(2, 33)
    student[:, 3], teacher[0, 3], teacher[1, 8] = 1000.0, 1000.0, 1000.0
    compare(Dense(student), Dense(teacher), divergence, backend=backend, reduction="none")


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd(beta=0.5)", "total_variation", "squared_hellinger"])
def test_minus_inf_logits_get_no_gradient(backend: str, divergence: str) -> None:
    student, teacher = logits_pair("masked", 7, 130)
    outcome = compare(Dense(student), Dense(teacher), divergence, backend=backend)
    assert not outcome.gradients["logits"][student == -math.inf].any()


def test_lowest_finite_logits_as_a_mask(backend: str) -> None:
    """torch.finfo.min instead of -inf, as much code has it."""
    student, teacher = logits_pair("masked", 7, 130)
    lowest = torch.finfo(torch.float32).min
    low = [x.nan_to_num(neginf=lowest) for x in (student, teacher)]
    masked, filled = (
        run_library(Dense(s), Dense(t), "jsd(beta=0.5)", backend=backend) for s, t in ((student, teacher), low)
    )
    torch.testing.assert_close(filled.loss, masked.loss)
    torch.testing.assert_close(filled.gradients["logits"], masked.gradients["logits"])


def test_tiny_divergences_keep_their_digits(backend: str) -> None:
    """A student that is all but the teacher: 1e-7 nats, in float64, to 6 digits."""
    _, teacher = logits_pair("near_0.3", 7, 2053, torch.float64)
    student = teacher + 1e-3 * torch.randn(7, 2053, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for divergence in SOME:
        truth = run_oracle(Dense(student), Dense(teacher), divergence, torch.float64, reduction="none").loss
        ours = run_library(Dense(student), Dense(teacher), divergence, reduction="none", backend=backend).loss
        assert (truth < 1e-5).all()
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=0)


def test_a_tail_of_one_in_a_hundred_million(backend: str) -> None:
    """q_tail is added up over the tail: one minus the rest would be 0 in fp32, or noise."""
    student = torch.zeros(1, 1000)
    student[0, :3] = torch.tensor([25.0, 24.0, 23.0])
    teacher = torch.zeros(1, 1000)
    teacher[0, :3] = torch.tensor([24.0, 25.0, 22.0])
    targets = Sparse.of(teacher, [torch.arange(3)])
    assert targets.rows[0].tail_logprob < math.log(1e-7)
    outcome = compare(Dense(student), targets, "reverse_kl", backend=backend, reduction="none")
    truth = run_oracle(Dense(student), targets, "reverse_kl", torch.float64, reduction="none").gradients["logits"]
    torch.testing.assert_close(outcome.gradients["logits"][0, 3:].double(), truth[0, 3:], rtol=1e-4, atol=0)


# --------------------------------------------------------------------------------------------------------------- memory


def peak_of_allocations(run) -> int:
    """Bytes that torch holds at most at once, above what it held before, while ``run`` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert events
    return peak


@pytest.mark.parametrize("kind", ["linear", "sparse"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_within_the_budget(
    backend: str, kind: str, reduction: str, dtype: torch.dtype, unpoisoned
) -> None:
    """Scratch, the gradients asked for, and the fp32 sum of a bf16 head's; a matrix of logits would not fit."""
    if backend == "triton":
        pytest.skip("memory: the interpreter's own arrays are larger than the scratch")
    rows, vocab, budget = 256, 8192, 2 << 20
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    hidden, weight = normal(rows, 32).requires_grad_(), normal(vocab, 32).requires_grad_()
    teacher: Teacher = Linear(normal(rows, 48), normal(vocab, 48))
    if kind == "sparse":
        ids = torch.stack([torch.randperm(vocab, generator=generator)[:8] for _ in range(rows)])
        row = oracles.Row(ids[0], torch.full((8,), -3.0), torch.tensor(math.log1p(-8 * math.exp(-3.0))))
        teacher = Sparse([dataclasses.replace(row, ids=i) for i in ids])
    target = teacher.noun(teacher.leaves)
    if backend == "reference" or dtype == torch.bfloat16:
        budget = 4 << 20  # a widened tile of the weights, ten temporaries a row

    def step() -> None:
        loss = kd_loss(
            LinearLogits(hidden, weight), target, reduction=reduction, max_scratch_bytes=budget, backend=backend
        ).loss
        loss.sum().backward()

    step()
    hidden.grad = weight.grad = None
    gradients = sum(x.numel() * x.element_size() for x in (hidden, weight))
    sums = 4 * weight.numel() if dtype == torch.bfloat16 else 0
    small = 64 * rows * 8  # a few numbers a row
    assert peak_of_allocations(step) <= budget + gradients + sums + small < 8 << 20 <= rows * vocab * 4
