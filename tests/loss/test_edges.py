"""Teachers that say little: none at all, weighted rows without an entry, rounded rows at another temperature."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kd_kernels import LinearLogits, SparseTargets, kd_loss, topk_targets
from kd_kernels.testing import logits_pair


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_without_a_teacher(backend, reduction):
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(37, 8, requires_grad=True)
    labels = torch.tensor([3, -100, 36, 0, 5])
    loss = kd_loss(
        LinearLogits(hidden, weight), None, kd_weight=0.0, ce_weight=1.0, labels=labels, reduction=reduction,
        backend=backend
    ).loss
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss.sum(), (hidden, weight))
    for got, want in zip(ours, torch.autograd.grad(expected.sum(), (hidden, weight))):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
def test_weighted_rows_without_entries_cost_nothing(backend, tail):
    empty = torch.empty(0)
    targets = SparseTargets(torch.zeros(4, dtype=torch.int64), empty.long(), empty, importance=empty)
    student = torch.randn(3, 11, requires_grad=True)
    loss = kd_loss(student, targets, tail=tail, backend=backend).loss
    loss.backward()
    assert loss.item() == 0.0 and not student.grad.any()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_rounded_rows_keep_a_finite_tail_at_other_temperatures(backend, temperature):
    _, logits = logits_pair("near_0.3", 50, 400)
    exact = topk_targets(logits, 350, temperatures=(1.0, temperature))
    up = SparseTargets(  # as a cache may round: every entry up by half a step of 1/16
        exact.offsets, exact.ids, (exact.logprobs + 1 / 32).clamp(max=0), exact.tail_logprob, None, exact.temperatures,
        exact.log_z
    )
    for targets in (exact, up):
        tempered = targets.at_temperature(temperature)
        truth = torch.log_softmax(logits.double() / temperature, 1)
        kept = torch.zeros_like(truth, dtype=torch.bool).scatter_(1, exact.ids.reshape(50, 350), True)
        tail = truth.masked_fill(kept, -torch.inf).logsumexp(1)
        assert tempered.tail_logprob.isfinite().all()
        if targets is exact:
            torch.testing.assert_close(tempered.tail_logprob.double().exp(), tail.exp(), rtol=1e-3, atol=1e-6)
        loss = kd_loss(logits, targets, "reverse_kl", temperature=temperature, backend=backend).loss
        assert loss.isfinite()
