"""What objectives are judged with: a batch of documents over a toy vocabulary, student and teacher as plain fp64
heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kernels import LinearLogits
from kd_trainer.data import Batch, Document, collate
from kd_trainer.methods.base import Objective

VOCAB, WIDTH = 13, 6


@dataclass
class Toy:
    """Hidden states ``[N, H]`` and heads ``[V, H]`` for the rows of some documents."""

    batch: Batch
    hidden: Tensor
    weight: Tensor
    teacher: LinearLogits

    @property
    def student(self) -> LinearLogits:
        return LinearLogits(self.hidden, self.weight)

    def logprobs(self) -> Tensor:
        """``[N, V]``, differentiable: what an oracle starts from."""
        return torch.log_softmax(self.hidden @ self.weight.T, -1)

    def teacher_logprobs(self, temperature: float = 1.0) -> Tensor:
        return torch.log_softmax(self.teacher.hidden @ self.teacher.weight.T / temperature, -1)


def toy(documents: Sequence[Document] | None = None, seed: int = 0, sharpness: float = 2.0) -> Toy:
    generator = torch.Generator().manual_seed(seed)
    if documents is None:
        lengths, prompts = (7, 5, 9), (1, 3, 4)
        documents = [
            Document(torch.randint(VOCAB, (length,), generator=generator), first)
            for length, first in zip(lengths, prompts)
        ]
    batch = collate(documents, 16)
    rows = len(batch.labels)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight = sharpness * draw(rows, WIDTH), draw(VOCAB, WIDTH)
    teacher = LinearLogits(hidden + 0.5 * draw(rows, WIDTH), weight + 0.3 * draw(VOCAB, WIDTH))
    return Toy(batch, hidden.requires_grad_(), weight.requires_grad_(), teacher)


def check(
    objective: Objective, case: Toy, oracle: Callable[[Toy], Tensor], targets: object = None, normalizer: float = 5.0,
    surrogate: Callable[[Toy], Tensor] | None = None,
) -> None:
    """Value and gradients of ``objective`` against an oracle that sums over the rows that count.

    ``surrogate``: has the gradient that is meant where the value's own is not (stopped gradients).
    """
    result = objective.loss(case.student, targets, case.batch, normalizer)
    inputs = [case.hidden, case.weight]
    gradients = torch.autograd.grad(result.loss, inputs)
    torch.testing.assert_close(result.loss.detach(), oracle(case).detach() / normalizer, rtol=1e-9, atol=1e-12)
    expected = torch.autograd.grad((surrogate or oracle)(case) / normalizer, inputs)
    for got, wanted in zip(gradients, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11)
        assert wanted.abs().max() > 1e-3  # a comparison of zeros would show nothing
    for name in objective.stats:
        assert result.stats[name].shape == case.batch.labels.shape
        assert bool(result.stats[name][case.batch.counted].isfinite().all())
