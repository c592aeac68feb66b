"""PESF-KD: the loss with its gradients into student and adapter, and a teacher whose body stays as it is."""

from __future__ import annotations

import pytest
import torch

from kd_trainer import methods
from kd_trainer.data import collate
from kd_trainer.methods.pesf_kd import Adapter, StudentFriendly
from kd_trainer.trainer import load_parts
from objective_judge import WIDTH, toy


def trained_adapter(width: int = WIDTH) -> Adapter:
    """One that has left its start, where it does nothing and half of its gradients are 0."""
    torch.manual_seed(1)
    adapter = Adapter(width, 4, dropout=0.0).double()
    torch.nn.init.normal_(adapter.up.weight, std=0.5)
    return adapter


@pytest.mark.parametrize(("alpha", "temperature"), [(0.7, 5.0), (0.4, 1.5), (1.0, 2.0)])
def test_the_loss_and_both_of_its_gradients(alpha, temperature):
    case, adapter = toy(), trained_adapter()
    objective = StudentFriendly(adapter, alpha, temperature)
    inputs = [case.hidden, case.weight, *adapter.parameters()]
    result = objective.loss(case.student, case.teacher, case.batch, 5.0)

    counted, labels = case.batch.counted, case.batch.labels[case.batch.counted]
    h = case.teacher.hidden
    moved = h + torch.relu(h @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T
    zp, zq = (moved @ case.teacher.weight.T)[counted], (case.hidden @ case.weight.T)[counted]
    logp, logq = ((z / temperature).log_softmax(-1) for z in (zp, zq))
    ce = sum(-z.log_softmax(-1).gather(1, labels[:, None]).sum() for z in (zp, zq))
    kl = (logp.exp() * (logp - logq)).sum()
    expected = (alpha * temperature**2 * kl + (1 - alpha) * ce) / 5.0

    # the divergence is in both calls of the loss; once it is taken off by the statistics, which are fp32
    torch.testing.assert_close(result.loss.detach(), expected.detach(), rtol=1e-7, atol=1e-12)
    gradients = torch.autograd.grad(result.loss, inputs)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
        assert wanted.abs().max() > 1e-3
    assert set(result.stats) == {"divergence", "label_logprob"}


def test_an_adapter_begins_as_nothing():
    adapter, hidden = Adapter(WIDTH, 4, dropout=0.0), torch.randn(3, WIDTH)
    assert torch.equal(adapter(hidden), hidden)


def test_the_teachers_body_is_frozen_and_the_adapter_is_not(make_config, tiny):
    config = make_config(
        method="pesf_kd", teacher={"model": str(tiny)}, student={"model": None, "layers": [0, 3]},
        options={"dropout": 0.0},
    )
    parts, _ = load_parts(config)
    method = methods.build(config, parts)
    objective = method.objectives["main"]
    torch.nn.init.normal_(objective.adapter.up.weight, std=0.02)
    batch = collate(parts.documents[:3], 64)
    objective(parts.student, method.teacher.targets(batch), batch, 10.0).loss.backward()
    body = list(parts.teachers[0].parameters())
    assert body and all(not parameter.requires_grad and parameter.grad is None for parameter in body)
    for trained in (*objective.adapter.parameters(), *parts.student.parameters()):
        assert trained.grad is not None and float(trained.grad.abs().max()) > 0.0
