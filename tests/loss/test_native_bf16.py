"""The products of a CPU that multiplies bf16 in hardware: logits stay fp32-grade, only the gradient products are bf16.

The machine that runs this may lack the instructions; torch then emulates the products, to the same rounding, so the
path can be held to its error anywhere by pretending.
"""

from __future__ import annotations

import pytest
import torch

import oracles
from judge import SOME, Dense, Linear, compare_on_matrix_units
from kd_kernels import LinearLogits, heads, kd_loss
from kd_kernels.divergences import parse
from kd_kernels.loss import cpp_impl
from kd_kernels.loss.plan import RowJob
from kd_kernels.products import RawRows, SparseRows
from kd_kernels.testing import linear_pair, logits_pair

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("hidden, weight, work, autocast, tile", [
    (BF16, BF16, FP32, None, BF16), (FP32, FP32, FP32, BF16, BF16), (BF16, BF16, FP32, BF16, BF16),
    (FP32, BF16, FP32, None, FP32), (BF16, FP32, FP32, None, FP32), (FP16, FP16, FP32, None, FP32),
    (BF16, BF16, FP64, None, FP64), (BF16, BF16, FP32, FP16, FP32), (FP32, FP32, FP32, None, FP32),
], ids=str)
def test_where_the_gradient_is_a_bf16_tile(hidden, weight, work, autocast, tile, bf16_products):
    """Where both operands are bf16 and the processor multiplies that; the yardstick (judge.plain_logits) rounds nowhere
    else."""
    noun = LinearLogits(torch.zeros(2, 3, dtype=hidden), torch.zeros(5, 3, dtype=weight))
    assert heads.head(noun, work, 5, autocast=autocast).tile_dtype == (tile if bf16_products or tile != BF16 else FP32)


@pytest.mark.parametrize("vocab", [1, 15, 517, 4099])
@pytest.mark.parametrize("form", ["plain", "mapped"])
@pytest.mark.parametrize("teacher", ["dense", "sparse"])
def test_a_bf16_tile_is_the_gradient_rounded_once(teacher, form, vocab):
    """In the memory of the logits, to the bit; the label's entry as well, from which the cross-entropy takes 1."""
    logits, other = logits_pair("near_0.3", 6, vocab)
    options = dict(bias=torch.linspace(-1, 1, vocab), scale=0.7, softcap=9.0) if form == "mapped" else {}
    job = RowJob(parse("jsd(beta=0.3)"), 2.0 if form == "mapped" else 1.0, 0.8, 0.4, "bucket")
    labels, weight = torch.arange(6) * 7 % vocab, torch.tensor([-3.0, 0.0, 0.1, 1.0, 2.7, 0.0], dtype=FP64)
    starts = torch.arange(6)
    sparse = SparseRows(
        starts, starts + 1, labels.flip(0).contiguous(), torch.full((6,), -0.5), torch.full((6,), -1.0), None
    )
    target, run = (RawRows(other), cpp_impl.dense_rows) if teacher == "dense" else (sparse, cpp_impl.sparse_rows)
    outcomes = []
    for dtype in (FP32, BF16):
        raw = logits.clone()
        gradient = raw if dtype == FP32 else raw.view(BF16)[:, :vocab]
        loss, _, status = run(RawRows(raw, **options), target, job, labels, weight, gradient, False)
        assert not status.any()
        outcomes.append((loss, gradient.bfloat16().clone()))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1].view(torch.int16), outcomes[1][1].view(torch.int16))


@pytest.mark.parametrize("divergence", SOME)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"valid_vocab": 120}, {"scale": 0.7, "softcap": 6.0}], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_of_every_map(monkeypatch, divergence, reduction, options, backend):
    monkeypatch.setattr(heads, "has_native_bf16_products", lambda: True)
    pair = linear_pair(48, 130, 64, 96, torch.bfloat16)
    options = dict(options)
    bias = torch.linspace(-1, 1, 130).bfloat16() if options.pop("bias", False) else None
    student = Linear(pair.student_hidden, pair.student_weight, bias, **options)
    teacher = Linear(pair.teacher_hidden, pair.teacher_weight, **options)
    for target in (teacher, Dense(teacher.oracle(teacher.leaves)[:, : options.get("valid_vocab", 130)])):
        compare_on_matrix_units(student, target, divergence, reduction=reduction, backend=backend)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("total_variation", [0.3, 0.03])
def test_gradients_are_within_half_a_percent(monkeypatch, total_variation, chunks):
    pair = linear_pair(48, 3000, 64, 96, torch.bfloat16, total_variation=total_variation)
    hidden, weight = pair.student_hidden.detach().requires_grad_(), pair.student_weight.detach().requires_grad_()
    teacher = LinearLogits(pair.teacher_hidden, pair.teacher_weight)
    monkeypatch.setattr(heads, "has_native_bf16_products", lambda: True)
    budget = None if chunks == 1 else 20 * 3000 * 4 * 2 + (1 << 21)
    kd_loss(LinearLogits(hidden, weight), teacher, "jsd(beta=0.5)", max_scratch_bytes=budget).loss.backward()

    exact = [pair.student_hidden.double().requires_grad_(), pair.student_weight.double().requires_grad_()]
    p = pair.teacher_hidden.double() @ pair.teacher_weight.double().t()
    loss = oracles.kd_loss(exact[0] @ exact[1].t(), p, "jsd", {"beta": 0.5})
    for ours, truth in zip((hidden.grad, weight.grad), oracles.gradients(loss, exact)):
        error = (ours.double() - truth).norm() / truth.norm()
        assert 1e-5 < error < 5e-3  # above: the path that was meant to run did round
