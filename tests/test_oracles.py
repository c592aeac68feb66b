"""The judge is judged: closed forms, published gradients and limits that the oracles did not come from."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import oracles
from kd_kernels.testing import logits_pair

STUDENT, TEACHER = logits_pair("near_0.3", 5, 23, torch.float64, seed=3)
P, Q = TEACHER.softmax(-1), STUDENT.softmax(-1)
HEAD = torch.tensor([4, 0, 17])


def value(name: str, **params) -> torch.Tensor:
    return oracles.dense_divergence(STUDENT, TEACHER, name, params)


def test_kl_is_that_of_torch_distributions() -> None:
    p, q = Categorical(logits=TEACHER), Categorical(logits=STUDENT)
    torch.testing.assert_close(value("forward_kl"), kl_divergence(p, q))
    torch.testing.assert_close(value("reverse_kl"), kl_divergence(q, p))


def test_closed_forms() -> None:
    a, b = 0.3, 0.6
    torch.testing.assert_close(value("alpha", alpha=a), ((P**a * Q ** (1 - a)).sum(-1) - 1) / (a * (a - 1)))
    torch.testing.assert_close(value("squared_hellinger"), 1 - (P * Q).sqrt().sum(-1))
    torch.testing.assert_close(value("total_variation"), (P - Q).clamp_min(0).sum(-1))
    m = 0.5 * (P + Q)
    entropy = lambda x: -(x * x.log()).sum(-1)  # noqa: E731
    torch.testing.assert_close(value("jsd", beta=0.5), entropy(m) - 0.5 * (entropy(P) + entropy(Q)))
    ab = -(P**a * Q**b - a / (a + b) * P ** (a + b) - b / (a + b) * Q ** (a + b)).sum(-1) / (a * b)
    torch.testing.assert_close(value("alpha_beta", alpha=a, beta=b), ab)
    torch.testing.assert_close(value("alpha_beta", alpha=a, beta=1 - a), value("alpha", alpha=a))


def test_alpha_beta_at_one_one_is_half_the_squared_distance() -> None:
    torch.testing.assert_close(value("alpha_beta", alpha=1.0, beta=1.0), 0.5 * ((P - Q) ** 2).sum(-1))


def test_masked_columns_are_as_if_they_were_not_there() -> None:
    mask = torch.zeros(5, 23, dtype=torch.bool)
    mask[:, [2, 9]] = True
    rest = [v for v in range(23) if v not in (2, 9)]
    for name, params in (
        ("forward_kl", {}),
        ("jsd", {"beta": 0.5}),
        ("squared_logprob", {}),
        ("alpha", {"alpha": 0.5}),
    ):
        masked = oracles.dense_divergence(
            STUDENT.masked_fill(mask, -math.inf), TEACHER.masked_fill(mask, -math.inf), name, params
        )
        torch.testing.assert_close(masked, oracles.dense_divergence(STUDENT[:, rest], TEACHER[:, rest], name, params))


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
def test_gradients_of_truncated_forward_kl_are_those_of_the_literature(tail: str) -> None:
    student = STUDENT.clone().requires_grad_()
    rows = oracles.truncate(TEACHER, [HEAD] * 5)
    (got,) = torch.autograd.grad(oracles.sparse_divergence(student, rows, "forward_kl", {}, tail).sum(), student)
    kept = P[:, HEAD].sum(-1, keepdim=True)
    rest = oracles.left_out(HEAD, 23)
    if tail == "bucket":
        want = Q * (1 - (1 - kept) / Q[:, rest].sum(-1, keepdim=True))
        want[:, HEAD] = Q[:, HEAD] - P[:, HEAD]
    elif tail == "renormalize":
        want = torch.zeros_like(Q)
        want[:, HEAD] = Q[:, HEAD] / Q[:, HEAD].sum(-1, keepdim=True) - P[:, HEAD] / kept
    else:
        want = kept * Q
        want[:, HEAD] -= P[:, HEAD]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("detach", [False, True])
def test_gradient_of_skew_reverse_kl_is_that_of_the_papers(detach: bool) -> None:
    a, student = 0.3, STUDENT.clone().requires_grad_()
    loss = oracles.dense_divergence(student, TEACHER, "skew_reverse_kl", {"alpha": a, "detach_mixture": detach})
    (got,) = torch.autograd.grad(loss.sum(), student)
    m = a * Q + (1 - a) * P
    g = (Q / m).log() + 1 - (0 if detach else a * Q / m)
    torch.testing.assert_close(got, Q * (g - (Q * g).sum(-1, keepdim=True)))


def test_skew_reverse_kl_of_a_missing_tail_is_a_penalty_on_its_mass() -> None:
    """Where the teacher has nothing, KL(q || m) adds q_tail log(1 / alpha)."""
    teacher = TEACHER.clone()
    teacher[:, oracles.left_out(HEAD, 23)] = -math.inf
    whole = oracles.dense_divergence(STUDENT, teacher, "skew_reverse_kl", {"alpha": 0.1})
    terms = oracles.skew_reverse_kl(oracles.log_probs(teacher)[:, HEAD], oracles.log_probs(STUDENT)[:, HEAD], 0.1)
    torch.testing.assert_close(whole - terms.sum(-1), Q[:, oracles.left_out(HEAD, 23)].sum(-1) * math.log(10))


def test_topk_ties_go_to_the_lower_id() -> None:
    rows = oracles.topk(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 2.0]], dtype=torch.float64), 4)
    assert rows[0].ids.tolist() == [1, 2, 4, 3]
    total = rows[0].logprobs.exp().sum() + rows[0].tail_logprob.exp()
    assert total.item() == pytest.approx(1.0, abs=1e-15)


def test_topk_mass_keeps_the_shortest_prefix() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    assert [len(oracles.topk(logits, 4, mass)[0].ids) for mass in (0.4, 0.6, 0.94, 0.96)] == [1, 2, 3, 4]


def test_log_z_gives_back_the_tempered_distribution() -> None:
    logz = oracles.log_z(TEACHER, (1.0, 2.0))
    torch.testing.assert_close(logz[:, 0], torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(P.log() / 2 - logz[:, 1:], oracles.log_probs(TEACHER, 2.0))
