"""One record per op: how it is called, which products it cannot avoid, what it moves, how its result is judged.

Adding an op is one more entry in :data:`CASES`; the pytest-benchmark rows, the side-by-side run and the tests use it.

FLOPs and bytes are lower bounds, as formulas of the shape: a product of ``[N, H]`` and ``[H, V]`` is ``2 N H V``
operations, and every operand is read once and every result written once. The *floor* of an op is the time of exactly
these products in the inputs' dtype, as `torch.mm` gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench import truth
from bench.inputs import Inputs, Shape
from bench.truth import Verdict
from kd_kernels import (
    EnsembleLogits, LinearLogits, SparseTargets, accept_or_resample, kd_loss, sample, sampled_targets, token_stats,
    topk_targets,
)

DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}
"""By device; the first is the one that the library picks there."""
UNBUILT_ON_CUDA = BACKENDS | {"cuda": ("reference",)}
"""Of verbs that run in torch operations there."""

Result = dict[str, Tensor]
"""What a call gives back, by name: ``loss``, and the gradients ``student_hidden`` and ``student_weight``."""

Call = Callable[[], Result]

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

GRADIENTS = ("hidden_gradient", "weight_gradient")


class BareProducts:
    """The floor: the named products one after the other, one call each, as ``torch.mm`` gives them (a new result each).

    ``reuse``: into memory that already exists instead, which spares the products their page faults.
    """

    def __init__(self, inputs: Inputs, names: tuple[str, ...], reuse: bool = False) -> None:
        student_hidden, student_weight, teacher_hidden, teacher_weight = (x.detach() for x in inputs.tensors)
        operands = {
            "student_logits": lambda: (student_hidden, student_weight.t()),
            "teacher_logits": lambda: (teacher_hidden, teacher_weight.t()),
            "hidden_gradient": lambda: (stand_in, student_weight),
            "weight_gradient": lambda: (stand_in.t(), student_hidden),
        }
        # The logits stand in for their gradient. Real ones: hardware multiplies zeros faster, and denormals slower.
        stand_in = student_hidden @ student_weight.t() if set(names) & set(GRADIENTS) else None
        self.products = [operands[name]() for name in names]
        self.results = [torch.mm(left, right) for left, right in self.products] if reuse else None

    def __call__(self) -> None:
        for i, (left, right) in enumerate(self.products):
            if self.results is None:
                torch.mm(left, right)
            else:
                torch.mm(left, right, out=self.results[i])


# ----------------------------------------------------------------------------------------------------------------- ops


def _loss_call(
    inputs: Inputs, teacher: LinearLogits | EnsembleLogits | SparseTargets | None, mode: str, *divergence: str,
    **options: object,
) -> Call:
    """``kd_loss`` in one of :data:`LOSS_MODES`; what is not timed has run when this returns."""
    student = LinearLogits(inputs.student_hidden, inputs.student_weight)
    reduction = "none" if mode in ("per_token", "backward") else "mean"

    def loss() -> Tensor:
        inputs.clear_gradients()
        return kd_loss(student, teacher, *divergence, reduction=reduction, **options).loss.mean()

    def backward(of: Tensor) -> Result:
        of.backward()
        return inputs.result(of)

    if mode == "loss":
        return lambda: {"loss": torch.no_grad()(loss)()}
    if mode == "backward":
        made = loss()
        return lambda: backward(made)
    return lambda: backward(loss())


def dense(inputs: Inputs, mode: str = "gradient", divergence: str = "jsd(beta=0.5)", **options: object) -> Call:
    """``kd_loss`` against the teacher's head."""
    teacher = LinearLogits(inputs.teacher_hidden, inputs.teacher_weight)
    return _loss_call(inputs, teacher, mode, divergence, **options)


def sparse(inputs: Inputs, mode: str = "gradient", divergence: str = "forward_kl", **options: object) -> Call:
    """``kd_loss`` against the teacher's k most likely ids and one event for the rest."""
    return _loss_call(inputs, inputs.targets, mode, divergence, **options)


def ensemble(inputs: Inputs, mode: str = "gradient", divergence: str = "forward_kl", **options: object) -> Call:
    """``kd_loss`` against the mean probability of two teachers: the teacher's head, and the student's as it is."""
    members = (
        LinearLogits(inputs.teacher_hidden, inputs.teacher_weight),
        LinearLogits(inputs.student_hidden.detach(), inputs.student_weight.detach()),
    )
    return _loss_call(inputs, EnsembleLogits(members, (0.5, 0.5), "prob"), mode, divergence, **options)


def cross_entropy(inputs: Inputs, mode: str = "gradient", **options: object) -> Call:
    """``kd_loss`` of labels, without a teacher."""
    return _loss_call(inputs, None, mode, labels=inputs.labels, ce_weight=1.0, kd_weight=0.0, **options)


def topk(inputs: Inputs, mode: str = "targets", **options: object) -> Call:
    """``topk_targets`` of the teacher's head."""
    head = LinearLogits(inputs.teacher_hidden, inputs.teacher_weight)

    def call() -> Result:
        targets = topk_targets(head, inputs.shape.kept, **options)
        return {"ids": targets.ids, "logprobs": targets.logprobs, "tail_logprob": targets.tail_logprob}

    return call


def stats(inputs: Inputs, mode: str = "stats", **options: object) -> Call:
    """``token_stats`` of the student's head and the labels; mode "gradient": that of the mean log-probability."""
    head = LinearLogits(inputs.student_hidden, inputs.student_weight)

    def differentiated() -> Result:
        inputs.clear_gradients()
        loss = -token_stats(head, inputs.labels, **options).logprob.mean()
        loss.backward()
        return inputs.result(loss)

    def alone() -> Result:
        with torch.no_grad():
            found = token_stats(head, inputs.labels, **options)
        return {name: getattr(found, name) for name in truth.STATS}

    return differentiated if mode == "gradient" else alone


def draw(inputs: Inputs, mode: str = "draws", **options: object) -> Call:
    """``sample`` from the teacher's head."""
    head = LinearLogits(inputs.teacher_hidden, inputs.teacher_weight)

    def call() -> Result:
        drawn = sample(head, seed=1, **options)
        return {"ids": drawn.ids, "logprobs": drawn.logprobs}

    return call


def draw_targets(inputs: Inputs, mode: str = "targets", **options: object) -> Call:
    """``sampled_targets`` of the teacher's head, k draws a row."""
    head = LinearLogits(inputs.teacher_hidden, inputs.teacher_weight)

    def call() -> Result:
        targets = sampled_targets(head, inputs.shape.kept, seed=1, **options)
        return {name: getattr(targets, name) for name in ("offsets", "ids", "logprobs", "importance")}

    return call


ACCEPTED_RANKS = 25
"""Of ``accept_or_resample``: the paper's."""


def accept(inputs: Inputs, mode: str = "draws", **options: object) -> Call:
    """``accept_or_resample`` of the labels by the teacher's head. Refused rows take part in a second product."""
    head = LinearLogits(inputs.teacher_hidden, inputs.teacher_weight)

    def call() -> Result:
        found = accept_or_resample(inputs.labels, head, k=ACCEPTED_RANKS, seed=1, **options)
        return {"ids": found.ids, "logprobs": found.model_logprobs, "accepted": found.accepted, "rank": found.rank}

    return call


def _judge_stats(inputs: Inputs, result: Result) -> Verdict:
    return truth.judge_stats(inputs, result) if "rank" in result else _judge_cross_entropy(inputs, result)


def _judge_dense(inputs: Inputs, result: Result, divergence: str = "jsd(beta=0.5)") -> Verdict:
    return truth.judge_loss(inputs, result, truth.dense, divergence=divergence)


def _judge_sparse(inputs: Inputs, result: Result, divergence: str = "forward_kl") -> Verdict:
    return truth.judge_loss(inputs, result, truth.sparse, divergence=divergence)


def _judge_ensemble(inputs: Inputs, result: Result, divergence: str = "forward_kl") -> Verdict:
    return truth.judge_loss(inputs, result, truth.ensemble, divergence=divergence)


def _judge_accepted(inputs: Inputs, result: Result) -> Verdict:
    return truth.judge_draws(inputs, result, ACCEPTED_RANKS)


def _judge_cross_entropy(inputs: Inputs, result: Result) -> Verdict:
    return truth.judge_loss(inputs, result, truth.cross_entropy)


# --------------------------------------------------------------------------------------------------------------- cases


def _loss_modes(*forward: str) -> dict[str, tuple[str, ...]]:
    """Products by mode. "loss": no gradient. "gradient": mean reduction, forward and backward. "per_token": reduction
    "none", whose backward computes the logits once more; its floor is that of "gradient", so the ratio shows what the
    second pass costs. "backward": that backward alone.
    """
    both = (*forward, *GRADIENTS)
    return {"loss": forward, "gradient": both, "per_token": both, "backward": GRADIENTS}


ENTRY_BYTES, TARGET_ROW_BYTES = 12, 12
"""Of sparse targets: an id of 8 and a logprob of 4 bytes an entry; an offset of 8 and a tail of 4 bytes a row."""


@dataclass(frozen=True)
class Case:
    """One op.

    Attributes:
        prepare: ``(inputs, mode, **options) -> call``; what is timed is ``call() -> Result``, and a call is made once
            for mode "backward", any number of times for the others.
        products: by mode, the products that it cannot avoid.
        judge: ``(inputs, result, **options) -> Verdict``.
        shapes: by device, the shape of its pytest-benchmark rows.
        has_entries: sparse targets are read or written.
        row_bytes: what is read or written a row beside hidden states, weights, gradients and entries.
        backends: by device.
    """

    name: str
    prepare: Callable[..., Call]
    products: dict[str, tuple[str, ...]]
    judge: Callable[..., Verdict]
    shapes: dict[str, Shape]
    has_entries: bool = False
    row_bytes: int = 0
    backends: dict[str, tuple[str, ...]] = field(default_factory=lambda: BACKENDS)

    def flops(self, mode: str, shape: Shape) -> int:
        """``2 N H V`` a product."""
        return sum(2 * shape.rows * getattr(shape, PRODUCTS[p].width) * shape.vocab for p in self.products[mode])

    def bytes(self, mode: str, shape: Shape, dtype: torch.dtype) -> int:
        """``N H`` and ``V H`` elements read once; their gradients, written once; entries and rows of what is sparse."""
        chosen = [PRODUCTS[p] for p in self.products[mode]]
        reads, writes = {x for p in chosen for x in p.reads}, {x for p in chosen for x in p.writes}
        row_bytes = self.row_bytes + (ENTRY_BYTES * shape.kept + TARGET_ROW_BYTES if self.has_entries else 0)
        return sum(shape.elements(x) for x in (*reads, *writes)) * dtype.itemsize + shape.rows * row_bytes

    def floor(self, mode: str, inputs: Inputs, reuse: bool = False) -> BareProducts:
        return BareProducts(inputs, self.products[mode], reuse)

    def verify(self, inputs: Inputs, result: Result, **options: str) -> Verdict:
        """The verdict on a result.

        Raises:
            WrongResult: an error is above :data:`REFUSED_ABOVE`.
        """
        verdict = self.judge(inputs, result, **options)
        limit = REFUSED_ABOVE[inputs.dtype]
        wrong = {name: error for name, error in verdict.errors.items() if not error <= limit}
        if wrong:
            raise WrongResult(f"{self.name} {options} in {inputs.dtype}: errors {wrong}, allowed {limit}; not timed")
        return verdict


HEADS = {"cpu": Shape(256, 32768, 256, 512), "cuda": Shape(2048, 131072, 1024, 2048)}
TEACHER_HEAD = {"cpu": Shape(256, 49152, 8, 576), "cuda": Shape(2048, 131072, 8, 2048)}

CASES = {
    case.name: case
    for case in (
        Case("kd_loss_dense", dense, _loss_modes("student_logits", "teacher_logits"), _judge_dense, HEADS),
        Case("kd_loss_sparse", sparse, _loss_modes("student_logits"), _judge_sparse, HEADS, True),
        Case(
            "cross_entropy", cross_entropy, _loss_modes("student_logits"), _judge_cross_entropy, HEADS,
            row_bytes=8,  # a label
        ),
        Case(
            "token_stats", stats,
            {"stats": ("student_logits",), "gradient": ("student_logits", *GRADIENTS)}, _judge_stats, HEADS,
            row_bytes=40,  # an id, and of what comes out four numbers of 4 bytes and two of 8
        ),
        Case("topk_targets", topk, {"targets": ("teacher_logits",)}, truth.judge_topk, TEACHER_HEAD, True),
        Case(
            "kd_loss_ensemble", ensemble, _loss_modes("student_logits", "teacher_logits", "student_logits"),
            _judge_ensemble, HEADS,
        ),
        Case(
            "sample", draw, {"draws": ("teacher_logits",)}, truth.judge_draws, TEACHER_HEAD,
            row_bytes=16,  # an id and two log-probabilities
        ),
        Case(
            "sampled_targets", draw_targets, {"targets": ("teacher_logits",)}, truth.judge_sampled_targets,
            TEACHER_HEAD, row_bytes=8,  # an offset; how many entries of 16 bytes come out is drawn
            backends=UNBUILT_ON_CUDA,
        ),
        Case(
            "accept_or_resample", accept, {"draws": ("teacher_logits",)}, _judge_accepted, TEACHER_HEAD,
            row_bytes=33,  # two ids, a rank, two log-probabilities, and whether it was accepted
            backends=UNBUILT_ON_CUDA,
        ),
    )
}
