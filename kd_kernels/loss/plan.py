"""What one call of ``kd_loss`` does, apart from its tensors, and the contract of a row implementation.

A registered op takes tensors and plain values. The plain values of a call travel as one string, so that the op's schema
stays short and ``torch.compile`` sees a constant; :meth:`Plan.text` writes it and :func:`read` takes it apart again.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kernels import divergences
from kd_kernels.divergences import Divergence
from kd_kernels.logits import EnsembleLogits, LinearLogits, SparseTargets, Targets

STATS = (
    "divergence", "student_entropy", "teacher_entropy", "agreement", "captured_mass", "label_logprob",
    "teacher_label_logprob", "student_top1", "teacher_top1", "student_confidence", "teacher_confidence",
)
"""Per-token statistics, in the order of their columns (``enum Stat`` in csrc/cpu/row_loss.h)."""

ID_STATS = ("student_top1", "teacher_top1")
"""Those that are token ids: int64, -1 at ignored rows."""

REDUCTIONS = ("mean", "sum", "none")
TAILS = ("bucket", "renormalize", "drop")


Rows = tuple[Tensor, "Tensor | None", Tensor]
"""What a row implementation returns for a chunk: loss, statistics or None, status; see ``reference.py``."""


@dataclass(frozen=True)
class RowJob:
    """What a row implementation is told. ``kd_weight`` includes T^2 where that was asked for."""

    divergence: Divergence
    temperature: float
    kd_weight: float
    ce_weight: float
    tail: str


@dataclass(frozen=True)
class Plan:
    """One call without its tensors. Every field is a number, a string, a bool, None or a tuple of those.

    ``where`` is the public function, for messages.
    """

    where: str
    student: tuple
    teacher: tuple
    columns: int
    needs_grad: tuple
    row_inputs: tuple
    divergence: str
    temperature: float
    kd_weight: float
    ce_weight: float
    tail: str
    reduction: str
    ignore_index: int
    stats: tuple
    compact: bool
    precision: str
    autocast: str
    max_scratch_bytes: int | None
    backend: str

    def text(self) -> str:
        """A Python literal of the fields."""
        return (
            f"({self.where!r}, {self.student!r}, {self.teacher!r}, {self.columns!r}, {self.needs_grad!r}, "
            f"{self.row_inputs!r}, {self.divergence!r}, {self.temperature!r}, {self.kd_weight!r}, {self.ce_weight!r}, "
            f"{self.tail!r}, {self.reduction!r}, {self.ignore_index!r}, {self.stats!r}, {self.compact!r}, "
            f"{self.precision!r}, {self.autocast!r}, {self.max_scratch_bytes!r}, {self.backend!r})"
        )

    def job(self) -> RowJob:
        return RowJob(divergences.parse(self.divergence), self.temperature, self.kd_weight, self.ce_weight, self.tail)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return getattr(torch, self.autocast) if self.autocast else None


@functools.lru_cache(maxsize=256)
def read(text: str) -> Plan:
    """The plan that :meth:`Plan.text` wrote."""
    return Plan(*ast.literal_eval(text))


def pack(noun: Targets | None) -> tuple[list[Tensor], tuple]:
    """A noun as its tensors and a description from which :func:`unpack` makes it again."""
    if noun is None:
        return [], ("none",)
    if isinstance(noun, Tensor):
        return [noun], ("tensor",)
    if isinstance(noun, LinearLogits):
        tensors = [noun.hidden, noun.weight] + ([] if noun.bias is None else [noun.bias])
        return tensors, ("linear", noun.scale, noun.softcap, noun.valid_vocab)
    if isinstance(noun, SparseTargets):
        optional = (noun.tail_logprob, noun.importance)
        tensors = [noun.offsets, noun.ids, noun.logprobs] + [t for t in optional if t is not None]
        return tensors, ("sparse", noun.tail_logprob is not None, noun.importance is not None)
    tensors, members = [], ()
    for member in noun.members:
        member_tensors, description = pack(member)
        members += ((len(member_tensors), description),)
        tensors += member_tensors
    if isinstance(noun.weights, Tensor):
        return [*tensors, noun.weights], ("ensemble", noun.space, None, members)
    return tensors, ("ensemble", noun.space, noun.weights, members)


def unpack(tensors: list[Tensor], description: tuple) -> Targets | None:
    """The noun that :func:`pack` took apart."""
    match description:
        case ("none",):
            return None
        case ("tensor",):
            return tensors[0]
        case ("linear", scale, softcap, valid_vocab):
            bias = tensors[2] if len(tensors) == 3 else None
            return LinearLogits(tensors[0], tensors[1], bias, scale, softcap, valid_vocab)
        case ("sparse", has_tail, has_importance):
            tail = tensors[3] if has_tail else None
            return SparseTargets(*tensors[:3], tail, tensors[-1] if has_importance else None)
        case ("ensemble", space, weights, descriptions):
            members, begin = [], 0
            for count, member in descriptions:
                members.append(unpack(tensors[begin : begin + count], member))
                begin += count
            weights = tensors[-1] if weights is None else weights
            return EnsembleLogits(tuple(members), weights, space)  # type: ignore[arg-type]
    raise AssertionError(f"no such noun: {description}")
