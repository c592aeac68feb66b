"""Inputs and float64 truth for the losses of other libraries: plain formulas, nothing of ours and nothing of theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kernels.testing import assert_as_good, linear_pair

ROWS, VOCAB = 24, 67
IGNORED = -100


@dataclass(frozen=True)
class Case:
    """Two heads, labels with ignored rows, biases; fp32 leaves that require grad are made by :meth:`leaves`."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor
    labels: Tensor

    def leaves(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (self.student_hidden, self.student_weight, self.student_bias)
        return tuple(tensor.to(dtype).clone().requires_grad_() for tensor in tensors)

    def teacher_logits(self, dtype: torch.dtype, bias: bool = False) -> Tensor:
        logits = self.teacher_hidden.to(dtype) @ self.teacher_weight.to(dtype).T
        return logits + self.teacher_bias.to(dtype) if bias else logits


def case(ignore: bool = True, seed: int = 0) -> Case:
    pair = linear_pair(ROWS, VOCAB, 12, 20, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    if ignore:
        labels[torch.rand(ROWS, generator=generator) < 0.3] = IGNORED
    bias = lambda: 0.5 * torch.randn(VOCAB, generator=generator)  # noqa: E731
    return Case(
        pair.student_hidden, pair.student_weight, bias(), pair.teacher_hidden, pair.teacher_weight, bias(), labels
    )


def divergence_rows(z: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Rows of the generalised JSD with the KLs at its end points; ``beta`` 0 is KL(p || q)."""
    logq, logp = z.log_softmax(-1), teacher.log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    if beta == 0.0:
        return (p * (logp - logq)).sum(-1)
    if beta == 1.0:
        return (q * (logq - logp)).sum(-1)
    logm = (beta * p + (1.0 - beta) * q).log()
    return beta * (p * (logp - logm)).sum(-1) + (1.0 - beta) * (q * (logq - logm)).sum(-1)


def check(ours: Callable[..., Tensor], truth: Callable[..., Tensor], of: Case, what: str) -> None:
    """Loss and gradients of ``ours(hidden, weight, bias)`` in fp32 against ``truth`` in float64.

    The yardstick of :func:`~kd_kernels.testing.assert_as_good` is the truth's own formula in fp32.
    """
    results = []
    for function, dtype in ((ours, torch.float32), (truth, torch.float32), (truth, torch.float64)):
        leaves = of.leaves(dtype)
        loss = function(*leaves)
        loss.backward()
        results.append([loss.detach()] + [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
    for name, (got, plain, exact) in zip(("loss", "d hidden", "d weight", "d bias"), zip(*results)):
        assert_as_good(got.reshape(-1), plain.reshape(-1), exact.reshape(-1), what=f"{what}: {name}")
