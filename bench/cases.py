"""One record per op: how it is called, which products it cannot avoid, what it moves, how its result is judged.

Adding an op is one more entry in :data:`CASES`; the pytest-benchmark rows, the side-by-side run and the tests use it.

FLOPs and bytes are lower bounds, as formulas of the shape: a product of ``[N, H]`` and ``[H, V]`` is ``2 N H V``
operations, and every operand is read once and every result written once. The *floor* of an op is the time of exactly
these products in the inputs' dtype, as `torch.mm` gives them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable

import torch
from torch import Tensor

from bench import truth
from bench.inputs import Inputs, Shape
from kd_kernels import LinearLogits, SparseTargets, kd_loss, topk_targets

DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("cpp", "reference")

Result = dict[str, Tensor]
"""What a call gives back, by name: ``loss``, and the gradients ``student_hidden`` and ``student_weight``."""

REFUSED_ABOVE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
"""Relative L2 error against float64 above which nothing is timed, by the inputs' dtype. Rounding to bf16 is 1.7e-3."""


class WrongResult(AssertionError):
    """An op was about to be timed whose result is not the right one."""


# ------------------------------------------------------------------------------------------------------------ products


@dataclass(frozen=True)
class Product:
    """One matrix product: which hidden width it has, and what it reads and writes, by the names in :class:`Inputs`."""

    width: str
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()


PRODUCTS = {
    "student_logits": Product("student_hidden", ("student_hidden", "student_weight")),
    "teacher_logits": Product("teacher_hidden", ("teacher_hidden", "teacher_weight")),
    "hidden_gradient": Product("student_hidden", ("student_weight",), ("student_hidden",)),
    "weight_gradient": Product("student_hidden", ("student_hidden",), ("student_weight",)),
}
"""``[N, V]`` operands are not counted as bytes: an op need not write logits to memory, and ours does not."""


class BareProducts:
    """The floor: the named products one after the other, one call each, as ``torch.mm`` gives them (a new result each).

    ``reuse``: into memory that already exists instead, which spares the products their page faults.
    """

    def __init__(self, inputs: Inputs, names: tuple[str, ...], reuse: bool = False) -> None:
        self.reuse = reuse
        student_hidden, student_weight, teacher_hidden, teacher_weight = (x.detach() for x in inputs.tensors)
        logits = student_hidden.new_empty(inputs.shape.rows, inputs.shape.vocab)
        teacher_logits = torch.empty_like(logits) if "teacher_logits" in names else logits
        operands = {
            "student_logits": (student_hidden, student_weight.t(), logits),
            "teacher_logits": (teacher_hidden, teacher_weight.t(), teacher_logits),
            # The logits stand in for their gradient: same shape, same dtype.
            "hidden_gradient": (logits, student_weight, torch.empty_like(student_hidden)),
            "weight_gradient": (logits.t(), student_hidden, torch.empty_like(student_weight)),
        }
        self.products = [operands[name] for name in names]

    def __call__(self) -> None:
        for left, right, out in self.products:
            if self.reuse:
                torch.mm(left, right, out=out)
            else:
                torch.mm(left, right)


# ----------------------------------------------------------------------------------------------------------------- ops


def _kd_loss(
    inputs: Inputs, teacher: LinearLogits | SparseTargets, mode: str, divergence: str, options: dict[str, object]
) -> Result:
    student = LinearLogits(inputs.student_hidden, inputs.student_weight)
    inputs.clear_gradients()
    if mode == "loss":
        with torch.no_grad():
            return {"loss": kd_loss(student, teacher, divergence, **options).loss}
    if mode == "gradient":
        loss = kd_loss(student, teacher, divergence, **options).loss
    else:
        loss = kd_loss(student, teacher, divergence, reduction="none", **options).loss.mean()
    loss.backward()
    return inputs.result(loss)


def dense(inputs: Inputs, mode: str = "gradient", divergence: str = "jsd(beta=0.5)", **options: object) -> Result:
    """``kd_loss`` against the teacher's head."""
    return _kd_loss(inputs, LinearLogits(inputs.teacher_hidden, inputs.teacher_weight), mode, divergence, options)


def sparse(inputs: Inputs, mode: str = "gradient", divergence: str = "forward_kl", **options: object) -> Result:
    """``kd_loss`` against the teacher's k most likely ids and one event for the rest."""
    return _kd_loss(inputs, inputs.targets, mode, divergence, options)


def topk(inputs: Inputs, mode: str = "targets", **options: object) -> Result:
    """``topk_targets`` of the teacher's head."""
    head = LinearLogits(inputs.teacher_hidden, inputs.teacher_weight)
    targets = topk_targets(head, inputs.shape.kept, **options)
    return {"ids": targets.ids, "logprobs": targets.logprobs, "tail_logprob": targets.tail_logprob}


def _dense_errors(inputs: Inputs, result: Result, divergence: str = "jsd(beta=0.5)") -> dict[str, float]:
    return truth.relative_errors(result, truth.dense(inputs, divergence))


def _sparse_errors(inputs: Inputs, result: Result, divergence: str = "forward_kl") -> dict[str, float]:
    return truth.relative_errors(result, truth.sparse(inputs, divergence))


# --------------------------------------------------------------------------------------------------------------- cases

GRADIENTS = ("hidden_gradient", "weight_gradient")


@dataclass(frozen=True)
class Case:
    """One op.

    Attributes:
        run: ``(inputs, mode, **options) -> Result``.
        products: by mode, the products that it cannot avoid. "loss": no gradient. "gradient": mean reduction, forward
            and backward. "per_token": reduction "none", whose backward computes the logits once more; its floor is that
            of "gradient", so the ratio shows what the second pass costs.
        errors: ``(inputs, result) -> {name: relative error against float64}``.
        entry_bytes: bytes of sparse targets that are read or written, as a function of the shape.
    """

    name: str
    run: Callable[..., Result]
    products: dict[str, tuple[str, ...]]
    errors: Callable[..., dict[str, float]]
    entry_bytes: Callable[[Shape], int] = field(default=lambda shape: 0)

    def flops(self, mode: str, shape: Shape) -> int:
        """``2 N H V`` a product."""
        return sum(2 * shape.rows * getattr(shape, PRODUCTS[p].width) * shape.vocab for p in self.products[mode])

    def bytes(self, mode: str, shape: Shape, dtype: torch.dtype) -> int:
        """``N H`` and ``V H`` elements read once; their gradients, written once; the entries of sparse targets."""
        chosen = [PRODUCTS[p] for p in self.products[mode]]
        reads, writes = {x for p in chosen for x in p.reads}, {x for p in chosen for x in p.writes}
        return sum(shape.elements(x) for x in (*reads, *writes)) * dtype.itemsize + self.entry_bytes(shape)

    def floor(self, mode: str, inputs: Inputs, reuse: bool = False) -> BareProducts:
        return BareProducts(inputs, self.products[mode], reuse)

    def verify(self, inputs: Inputs, result: Result, **options: str) -> dict[str, float]:
        """The errors of a result.

        Raises:
            WrongResult: one is above :data:`REFUSED_ABOVE`.
        """
        errors = self.errors(inputs, result, **options)
        limit = REFUSED_ABOVE[inputs.dtype]
        wrong = {name: error for name, error in errors.items() if not error <= limit}
        if wrong:
            raise WrongResult(f"{self.name} {options} in {inputs.dtype}: errors {wrong}, allowed {limit}; not timed")
        return errors


CASES = {
    case.name: case
    for case in (
        Case(
            "kd_loss_dense", dense,
            {
                "loss": ("student_logits", "teacher_logits"),
                "gradient": ("student_logits", "teacher_logits", *GRADIENTS),
                "per_token": ("student_logits", "teacher_logits", *GRADIENTS),
            },
            _dense_errors,
        ),
        Case(
            "kd_loss_sparse", sparse,
            {
                "loss": ("student_logits",),
                "gradient": ("student_logits", *GRADIENTS),
                "per_token": ("student_logits", *GRADIENTS),
            },
            _sparse_errors,
            # An id of 8 and a logprob of 4 bytes an entry; an offset of 8 and a tail of 4 bytes a row.
            lambda shape: 12 * shape.rows * shape.kept + 12 * shape.rows,
        ),
        Case(
            "topk_targets", topk, {"targets": ("teacher_logits",)}, truth.topk_errors,
            lambda shape: 12 * shape.rows * shape.kept + 12 * shape.rows,
        ),
    )
}
