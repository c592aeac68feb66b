"""Inputs of the benchmarks: two heads that agree as much as a student agrees with its teacher."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kd_kernels import SparseTargets
from kd_kernels.testing import mean_total_variation

LOGIT_STD = 3.0
CALIBRATION_ROWS = 64
"""How far a student is from its teacher is adjusted on so many rows: rows are drawn alike, so these say it of all."""
JUDGED_ROWS, JUDGED_IDS = 256, 2048
"""Rows of dH and of dW that are compared with float64, drawn at random, where there are more."""
CHUNK_ENTRIES = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Float64 logits that exist at a time."""


@dataclass(frozen=True)
class Shape:
    """N rows, V columns, the hidden widths of student and teacher, K kept entries of a sparse teacher."""

    rows: int
    vocab: int
    student_hidden: int
    teacher_hidden: int
    kept: int = 64

    def elements(self, name: str) -> int:
        """Of a tensor of :class:`Inputs`: ``N H`` of hidden states, ``V H`` of a weight."""
        side, kind = name.split("_")
        return (self.rows if kind == "hidden" else self.vocab) * getattr(self, f"{side}_hidden")


@dataclass(frozen=True, eq=False)
class Inputs:
    """Hidden states ``[N, H]`` and weights ``[V, H]`` of one dtype; the student's are leaves that require grad.

    Attributes:
        truths: what :mod:`bench.truth` has worked out for these inputs, so that it lives as long as they do.
    """

    shape: Shape
    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    truths: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight

    @property
    def dtype(self) -> torch.dtype:
        return self.student_hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.student_hidden.device

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers, rounded to another dtype."""
        return self._remade(self.shape, *(x.detach().to(dtype) for x in self.tensors))

    def first(self, rows: int) -> Inputs:
        """The first rows alone (all, where there are fewer), with the same heads."""
        rows = min(rows, self.shape.rows)
        student_hidden, student_weight, teacher_hidden, teacher_weight = (x.detach() for x in self.tensors)
        shape = dataclasses.replace(self.shape, rows=rows)
        return self._remade(shape, student_hidden[:rows], student_weight, teacher_hidden[:rows], teacher_weight)

    @staticmethod
    def _remade(shape: Shape, *tensors: Tensor) -> Inputs:
        student = [x.clone().requires_grad_() for x in tensors[:2]]
        return Inputs(shape, *student, *tensors[2:])

    def chunks(self) -> list[slice]:
        """Ranges of rows whose float64 logits fit into memory several times over."""
        step = max(1, CHUNK_ENTRIES[self.device.type] // self.shape.vocab)
        return [slice(begin, min(begin + step, self.shape.rows)) for begin in range(0, self.shape.rows, step)]

    @functools.cached_property
    def targets(self) -> SparseTargets:
        """The teacher's k most likely ids, from float64 logits."""
        weight, parts = self.teacher_weight.double().t(), []
        for rows in self.chunks():
            logprobs = (self.teacher_hidden[rows].double() @ weight).log_softmax(1)
            kept, ids = logprobs.topk(self.shape.kept, dim=1)
            parts.append((ids, kept.float(), torch.log1p(-kept.exp().sum(1)).float()))
        return SparseTargets.from_topk(*(torch.cat(part) for part in zip(*parts)))

    @functools.cached_property
    def labels(self) -> Tensor:
        """int64 ``[N]``: a token drawn from the teacher in every row."""
        generator, parts = torch.Generator(self.device).manual_seed(1), []
        for rows in self.chunks():
            probabilities = (self.teacher_hidden[rows] @ self.teacher_weight.t()).float().softmax(1)
            exponential = torch.empty_like(probabilities).exponential_(generator=generator)
            parts.append((probabilities / exponential).argmax(1))
        return torch.cat(parts)

    @functools.cached_property
    def judged(self) -> tuple[Tensor, Tensor]:
        """Sorted indices of the rows of dH, and of the rows of dW, that are compared with float64."""
        generator = torch.Generator().manual_seed(2)
        chosen = ((self.shape.rows, JUDGED_ROWS), (self.shape.vocab, JUDGED_IDS))
        rows, ids = (torch.randperm(n, generator=generator)[:most].sort().values for n, most in chosen)
        return rows.to(self.device), ids.to(self.device)

    def clear_gradients(self) -> None:
        self.student_hidden.grad = self.student_weight.grad = None

    def result(self, loss: Tensor) -> dict[str, Tensor]:
        """A loss and the gradients that its backward left."""
        gradients = {"student_hidden": self.student_hidden.grad, "student_weight": self.student_weight.grad}
        return {"loss": loss.detach(), **gradients}


def build(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", total_variation: float = 0.1, logit_std: float = LOGIT_STD
) -> Inputs:
    """Logits of standard deviation ``logit_std``, the student ``total_variation`` away from the teacher on average.

    Hidden states are N(0, 1) and weights N(0, 1/H), times ``logit_std``. Both models see the same latent state in their
    first ``min(Hs, Ht)`` dimensions; the student's head is the teacher's plus noise, whose size is found by bisection.
    Further dimensions, which the other model lacks, carry a percent of the logits' spread. The same numbers whenever it
    is called on one device.
    """
    generator = torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    shared = min(shape.student_hidden, shape.teacher_hidden)
    latent = normal(shape.rows, shared)
    head = normal(shape.vocab, shared).mul_(logit_std / math.sqrt(shared))
    noise = normal(shape.vocab, shared).div_(math.sqrt(shared))

    def widen(width: int) -> tuple[Tensor, Tensor]:
        extra = width - shared
        return normal(shape.rows, extra), normal(shape.vocab, extra).mul_(0.01 * logit_std / math.sqrt(extra or 1))

    own, theirs = widen(shape.student_hidden), widen(shape.teacher_hidden)
    few = slice(0, CALIBRATION_ROWS)
    common, difference = latent[few] @ head.t(), latent[few] @ noise.t()
    student, teacher = (common + hidden[few] @ weight.t() for hidden, weight in (own, theirs))
    low, high = 1e-3, 16.0
    for _ in range(12):  # in log(scale), to 0.3 percent
        scale = math.sqrt(low * high)
        near = mean_total_variation(student + scale * difference, teacher) < total_variation
        low, high = (scale, high) if near else (low, scale)

    rounded = lambda *parts: torch.cat([part.to(dtype) for part in parts], 1)  # noqa: E731
    teacher_hidden, teacher_weight = rounded(latent, theirs[0]), rounded(head, theirs[1])
    head.add_(noise, alpha=high)
    student_hidden, student_weight = rounded(latent, own[0]), rounded(head, own[1])
    return Inputs(
        shape, student_hidden.requires_grad_(), student_weight.requires_grad_(), teacher_hidden, teacher_weight
    )
