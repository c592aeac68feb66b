"""Rows in which every logit is the least number of fp32, with which models mask: distributions like any other."""

from __future__ import annotations

import math

import pytest
import torch

from kd_kernels import kd_loss, token_stats, topk_targets

LEAST = torch.finfo(torch.float32).min
ROWS = torch.full((3, 40), LEAST)
ROWS[1, ::3] = -torch.inf
ROWS[2, 7] = -3.0e38
"""Uniform; uniform over two thirds; one id above all others."""


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd(beta=0.5)"])
@pytest.mark.parametrize("of", ["student", "both"])
def test_dense_rows(backend: str, divergence: str, of: str) -> None:
    shifted = ROWS.double() - LEAST  # the same distributions
    teacher = torch.linspace(-1, 1, 40).expand(3, -1) if of == "student" else ROWS.flip(0)
    truth_teacher = teacher if of == "student" else shifted.flip(0)
    student, truth_student = ROWS.clone().requires_grad_(), shifted.clone().requires_grad_()
    kd_loss(student, teacher, divergence, backend=backend).loss.backward()
    kd_loss(truth_student, truth_teacher.double(), divergence, backend="reference").loss.backward()
    torch.testing.assert_close(student.grad, truth_student.grad.float(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
def test_sparse_rows(backend: str, tail: str) -> None:
    """Kept ids among them, and a tail of nothing but such logits. (Other rows have no mass where the teacher has.)"""
    targets = topk_targets(torch.linspace(-1, 1, 40).expand(3, -1).contiguous(), 5, backend="reference")
    targets, rows = targets.select(torch.tensor([0])), ROWS[:1]
    student, truth = rows.clone().requires_grad_(), (rows.double() - LEAST).requires_grad_()
    loss = kd_loss(student, targets, tail=tail, reduction="none", backend=backend).loss
    expected = kd_loss(truth, targets, tail=tail, reduction="none", backend="reference").loss
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(loss, expected.float(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(student.grad, truth.grad.float(), rtol=2e-5, atol=1e-6)


def test_token_stats(backend: str) -> None:
    stats = token_stats(ROWS, torch.tensor([3, 4, 7]), backend=backend)
    expected = [-math.log(40), -math.log(26), 0.0]
    torch.testing.assert_close(stats.logprob, torch.tensor(expected))
    torch.testing.assert_close(stats.entropy, -torch.tensor(expected))
    assert stats.argmax.tolist() == [0, 1, 7] and stats.rank.tolist() == [3, 2, 0]


def test_masks_before_and_after_the_largest_logit(backend: str) -> None:
    """Falls of 3e38 and more, several at once in one lane: nothing of them is left, and nothing is NaN."""
    rows = torch.full((2, 9000), LEAST)
    rows[0, 8000], rows[1, 17] = 3.0e38, 5.0
    stats = token_stats(rows, torch.tensor([8000, 17]), backend=backend)
    assert stats.logprob.tolist() == [0.0, 0.0] and stats.entropy.tolist() == [0.0, 0.0]
    assert stats.argmax.tolist() == [8000, 17]
