"""Inputs of the benchmarks: two heads that agree as much as a student agrees with its teacher."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kernels import SparseTargets
from kd_kernels.testing import linear_pair

LOGIT_STD = 3.0
CALIBRATION_ROWS = 64
"""How far a student is from its teacher is adjusted on so many rows where the rows are repeated anyway."""


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
    """Hidden states ``[N, H]`` and weights ``[V, H]`` of one dtype; the student's are leaves that require grad."""

    shape: Shape
    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight

    @property
    def dtype(self) -> torch.dtype:
        return self.student_hidden.dtype

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers, rounded to another dtype."""
        return self._remade(self.shape, *(x.detach().to(dtype) for x in self.tensors))

    def first(self, rows: int) -> Inputs:
        """The first rows alone, with the same heads."""
        student_hidden, student_weight, teacher_hidden, teacher_weight = (x.detach() for x in self.tensors)
        shape = dataclasses.replace(self.shape, rows=rows)
        return self._remade(shape, student_hidden[:rows], student_weight, teacher_hidden[:rows], teacher_weight)

    @staticmethod
    def _remade(shape: Shape, *tensors: Tensor) -> Inputs:
        student = [x.clone().requires_grad_() for x in tensors[:2]]
        return Inputs(shape, *student, *tensors[2:])

    @functools.cached_property
    def targets(self) -> SparseTargets:
        """The teacher's k most likely ids, from float64 logits."""
        logprobs = (self.teacher_hidden.double() @ self.teacher_weight.double().t()).log_softmax(1)
        kept, ids = logprobs.topk(self.shape.kept, dim=1)
        tail = torch.log1p(-kept.exp().sum(1))
        return SparseTargets.from_topk(ids, kept.float(), tail.float())

    def clear_gradients(self) -> None:
        self.student_hidden.grad = self.student_weight.grad = None

    def result(self, loss: Tensor) -> dict[str, Tensor]:
        """A loss and the gradients that its backward left."""
        gradients = {"student_hidden": self.student_hidden.grad, "student_weight": self.student_weight.grad}
        return {"loss": loss.detach(), **gradients}


def build(shape: Shape, dtype: torch.dtype, total_variation: float = 0.1, repeat_rows: bool = False) -> Inputs:
    """Logits of standard deviation 3, the student ``total_variation`` away from the teacher on average.

    Args:
        repeat_rows: hidden states repeat after 64 rows. For shapes whose ``[N, V]`` logits in float64 nobody can hold.
    """
    rows = min(shape.rows, CALIBRATION_ROWS) if repeat_rows else shape.rows
    pair = linear_pair(
        rows, shape.vocab, shape.student_hidden, shape.teacher_hidden, dtype,
        logit_std=LOGIT_STD, total_variation=total_variation,
    )
    again = lambda hidden: hidden.repeat(-(-shape.rows // rows), 1)[: shape.rows]  # noqa: E731
    return Inputs(
        shape, again(pair.student_hidden).requires_grad_(), pair.student_weight.requires_grad_(),
        again(pair.teacher_hidden), pair.teacher_weight,
    )
