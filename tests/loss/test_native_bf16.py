"""The products of a CPU that multiplies bf16 in hardware: logits stay fp32-grade, only the gradient products are bf16.

The machine that runs this may lack the instructions; torch then emulates the products, to the same rounding, so the path
can be held to its error anywhere by pretending.
"""

from __future__ import annotations

import pytest
import torch

import oracles
from judge import SOME, Dense, Linear, compare_on_matrix_units
from kd_kernels import LinearLogits, heads, kd_loss
from kd_kernels.testing import linear_pair


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
