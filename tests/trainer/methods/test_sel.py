"""Squared-error-logit loss: its value, the labels that it draws, and what the theory says of it and of its rival."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from kd_trainer.data import collate
from kd_trainer.methods.sel import SquaredErrorLogit
from objective_judge import VOCAB, Toy, check, toy


def rows(case: Toy) -> tuple[Tensor, Tensor, Tensor]:
    """log q, log p and labels of the rows that count."""
    counted = case.batch.counted
    return case.logprobs()[counted], case.teacher_logprobs()[counted], case.batch.labels[counted]


def squared_errors(case: Toy, labels: Tensor) -> Tensor:
    logq, logp, _ = rows(case)
    return 0.5 * (logq - logp).gather(1, labels[:, None])[:, 0].square()


@pytest.mark.parametrize("cached", [False, True])
def test_labels_of_the_text(cached):
    case = toy()
    targets = case.teacher
    if cached:  # the log-probability of every next token, which is all that this loss asks of a cache
        text = torch.cat([document.tokens[1:] for document in case.batch.documents])
        targets = case.teacher_logprobs().gather(1, text[:, None])[:, 0].detach()
    check(SquaredErrorLogit("text"), case, lambda case: squared_errors(case, rows(case)[2]).sum(), targets)


def drawn(case: Toy, step: int, seed: int = 3) -> tuple[Tensor, Tensor, SquaredErrorLogit]:
    """The labels of a step, read off the student's log-probability of them, and the loss."""
    objective = SquaredErrorLogit("teacher", seed)
    objective.begin_step(step)
    result = objective.loss(case.student, case.teacher, case.batch, 5.0)
    logq, _, _ = rows(case)
    distance = (logq - result.stats["label_logprob"][case.batch.counted][:, None]).abs()
    assert bool((distance.min(1).values < 1e-12).all())
    return distance.argmin(1), result.loss, objective


def test_labels_that_the_teacher_draws():
    case = toy()
    for step in range(3):
        labels, _, objective = drawn(case, step)
        check(objective, case, lambda case, labels=labels: squared_errors(case, labels).sum(), case.teacher)
    text = rows(case)[2]
    assert not torch.equal(labels, text) and not torch.equal(labels, drawn(case, 0)[0])


def test_drawn_labels_are_a_function_of_run_step_and_document():
    case = toy()
    labels, _, _ = drawn(case, 4)
    assert torch.equal(labels, drawn(case, 4)[0]) and not torch.equal(labels, drawn(case, 4, seed=4)[0])
    parts, begin = [], 0
    for document in reversed(case.batch.documents):  # another order, another batch
        batch = collate([document], 16)
        begin = sum(len(d) - 1 for d in case.batch.documents[: case.batch.documents.index(document)])
        span = slice(begin, begin + len(batch.labels))
        teacher = dataclasses.replace(case.teacher, hidden=case.teacher.hidden[span])
        parts.insert(0, drawn(Toy(batch, case.hidden[span], case.weight, teacher), 4)[0])
    assert torch.equal(labels, torch.cat(parts))


def test_labels_are_drawn_as_often_as_the_teacher_says():
    """Chi-square over every row and 400 steps; and the mean of the loss is the sum over all labels, p-weighted."""
    case, steps = toy(sharpness=0.6), 400
    logq, logp, _ = (value.detach() for value in rows(case))
    counts, losses = torch.zeros_like(logp), []
    for step in range(steps):
        labels, loss, _ = drawn(case, step)
        counts.scatter_add_(1, labels[:, None], torch.ones_like(labels, dtype=counts.dtype)[:, None])
        losses.append(float(loss.detach()))
    expected = steps * logp.exp()
    enough = expected >= 5
    statistic = ((counts - expected).square() / expected)[enough].sum()
    freedom = int(enough.sum()) - len(logp)
    assert abs(float(statistic) - freedom) < 4 * math.sqrt(2 * freedom)
    mean = float((logp.exp() * 0.5 * (logq - logp).square()).sum()) / 5.0
    losses = torch.tensor(losses, dtype=torch.float64)
    assert abs(float(losses.mean()) - mean) < 4 * float(losses.std()) / math.sqrt(steps)


def test_on_labels_of_the_student_the_expected_gradient_is_that_of_the_reverse_kl():
    case = toy()
    logq, logp, _ = rows(case)
    reverse_kl = torch.autograd.grad((logq.exp() * (logq - logp)).sum(), case.hidden, retain_graph=True)[0]
    by_label = (logq.detach().exp() * 0.5 * (logq - logp).square()).sum()  # the labels' distribution is held still
    torch.testing.assert_close(torch.autograd.grad(by_label, case.hidden)[0], reverse_kl)


@pytest.mark.parametrize(("loss", "optimum"), [("sel", lambda p: p), ("weighted", lambda p: p**2 / (p**2).sum())])
def test_where_the_losses_lead(loss, optimum):
    """Minimised over free logits, with every label as often as the teacher draws it: SEL finds p, and the cross-entropy
    that is weighted by p, which some call distillation too, p^2 / sum p^2."""
    p = torch.softmax(1.3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 0)
    logits = torch.zeros(VOCAB, dtype=torch.float64, requires_grad=True)
    exactly = dict(tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe")
    optimizer = torch.optim.LBFGS([logits], max_iter=500, **exactly)

    def closure():
        optimizer.zero_grad()
        logq = logits.log_softmax(0)
        per_label = 0.5 * (logq - p.log()).square() if loss == "sel" else -p * logq
        value = (p * per_label).sum()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(logits.detach().softmax(0), optimum(p), rtol=1e-4, atol=1e-6)
    assert float((optimum(p) - p).abs().sum()) > 0.2 or loss == "sel"
