"""kd_loss on a GPU: against float64, without a synchronisation, inside a CUDA graph. Everything else about it is tested
without one, by the interpreter and by tests/loss/test_gpu_head.py."""

from __future__ import annotations

import pytest
import torch

from judge import CASES, Dense, Linear, Sparse, compare, compare_on_matrix_units
from kd_kernels import LinearLogits, kd_loss, topk_targets
from kd_kernels.testing import linear_pair, logits_pair

pytestmark = pytest.mark.gpu

ON_GPU = {"device": "cuda"}
HEADS = [(torch.float32, 777), (torch.float16, 5003), (torch.bfloat16, 40_000)]
"""One vocabulary for each launch of row_launch, two of them odd. (All pairs would be compiled for minutes.)"""


def heads(dtype: torch.dtype, rows: int = 33, vocab: int = 5003) -> tuple[Linear, Linear]:
    made = linear_pair(rows, vocab, 64, 96, dtype)
    return Linear(made.student_hidden, made.student_weight), Linear(made.teacher_hidden, made.teacher_weight)


@pytest.mark.parametrize("divergence", CASES)
@pytest.mark.parametrize("kind", ["near_0.3", "near_0.03", "peaked", "masked", "shifted"])
def test_logits(divergence: str, kind: str) -> None:
    student, teacher = (Dense(x) for x in logits_pair(kind, 7, 5003))
    compare(student, teacher, divergence, backend="triton", library_only=ON_GPU)


@pytest.mark.parametrize("dtype, vocab", HEADS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd(beta=0.5)"])
def test_heads(divergence: str, reduction: str, dtype: torch.dtype, vocab: int) -> None:
    options = dict(reduction=reduction, labels=torch.arange(33), ce_weight=0.5, backend="triton", device="cuda")
    compare_on_matrix_units(*heads(dtype, vocab=vocab), divergence, **options)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize("k", [1, 40, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse(dtype: torch.dtype, k: int, tail: str) -> None:
    student, teacher = heads(dtype)
    logits = teacher.oracle(teacher.leaves).double()
    targets = Sparse.of(logits, list(logits.topk(k, -1).indices))
    options = dict(reduction="mean", labels=torch.arange(33), ce_weight=0.5, backend="triton", device="cuda")
    compare_on_matrix_units(student, targets, "forward_kl", tail=tail, **options)


def test_options_together() -> None:
    student, teacher = heads(torch.float32)
    student = Linear(student.hidden, student.weight, torch.linspace(-1, 1, 5003), 0.7, 12.0, 5000)
    teacher = Linear(teacher.hidden, teacher.weight, valid_vocab=5000)
    labels = torch.arange(33)
    labels[::5] = -100
    for temperature in (1.0, 2.0):
        compare(
            student, teacher, "jsd(beta=0.1)", labels=labels, ce_weight=0.3, temperature=temperature,
            squared_temperature=True, token_weight=torch.linspace(0.1, 2, 33), normalizer=20.0, backend="triton",
            library_only={"max_scratch_bytes": 10 * 5003 * 8, **ON_GPU},
        )


def test_rows_that_are_dropped() -> None:
    compare(*heads(torch.float32), "forward_kl", rows=torch.tensor([3, 1, 30]), backend="triton", library_only=ON_GPU)


def leaves(dtype: torch.dtype = torch.bfloat16) -> tuple[LinearLogits, LinearLogits]:
    student, teacher = heads(dtype)
    move = lambda x: x.cuda().requires_grad_()  # noqa: E731
    return LinearLogits(move(student.hidden), move(student.weight)), LinearLogits(
        teacher.hidden.cuda(), teacher.weight.cuda()
    )


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_synchronises(reduction: str, sparse: bool) -> None:
    student, teacher = leaves()
    target = topk_targets(teacher, 8) if sparse else teacher
    labels, rows = torch.arange(33, device="cuda"), torch.arange(20, device="cuda")
    call = lambda: kd_loss(  # noqa: E731
        student, target, labels=labels, ce_weight=0.5, normalizer=30.0, reduction=reduction, rows=rows,
        stats=("agreement",)
    ).loss.sum()
    call().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph() -> None:
    student, teacher = leaves()
    step = lambda: kd_loss(student, teacher, "jsd(beta=0.5)").loss.backward()  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
        student.hidden.grad = student.weight.grad = None
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        student.hidden.mul_(0.5)
    graph.replay()
    captured = student.weight.grad.clone()
    student.weight.grad = None
    step()
    assert torch.equal(captured, student.weight.grad)


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_upstream_gradients_and_kept_graphs(scale: float) -> None:
    student, teacher = leaves(torch.float32)
    (kd_loss(student, teacher).loss * scale).backward()
    once = student.weight.grad.clone()
    student.weight.grad = None
    loss = kd_loss(student, teacher).loss * scale
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.weight.grad, 2 * once)
    student.weight.grad = None
    kd_loss(student, teacher).loss.backward()
    torch.testing.assert_close(student.weight.grad * scale, once)


def test_compiles_without_a_graph_break() -> None:
    student, teacher = leaves()

    def step(hidden, weight):
        return kd_loss(LinearLogits(hidden, weight), teacher, "jsd(beta=0.5)").loss

    eager = step(student.hidden, student.weight)
    compiled = torch.compile(step, fullgraph=True)(student.hidden, student.weight)
    compiled.backward()
    assert torch.equal(eager, compiled) and student.weight.grad.isfinite().all()


def test_rows_with_something_wrong_in_them_are_nan() -> None:
    student, teacher = (x.cuda() for x in logits_pair("near_0.3", 4, 777))
    student[1, 5] = torch.nan
    student.requires_grad_()
    loss = kd_loss(student, teacher, reduction="none").loss
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False, False]
    assert student.grad.isnan().any(1).tolist() == [False, True, False, False]
