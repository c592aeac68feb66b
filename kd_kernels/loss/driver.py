"""One pass over the rows: products, row pass, gradient products, chunk by chunk under the scratch budget.

The gradient of a chunk is formed while its logits are still there, so a dense teacher costs 6 N Hs V + 2 N Ht V
operations and a sparse one 6 N Hs V: the minimum. The same pass serves the forward (weights known before it) and, given
the upstream gradient of each token as weights, the backward of ``reduction="none"``.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor

from kd_kernels import _backend, _check
from kd_kernels.logits import LinearLogits, SparseTargets, Targets, leading_shape
from kd_kernels.loss import reference
from kd_kernels.loss.plan import ID_STATS, STATS, Plan
from kd_kernels.products import (
    LinearSource, Source, SparseSource, TensorSource, flattened, new_memory, rows_per_chunk, scratch_budget, source,
    tensors_of, work_dtype,
)

ROW_IMPLEMENTATIONS = {"reference": "reference", "cpp": "cpp_impl", "triton": "triton_impl"}
"""By backend, the module with its ``dense_rows`` and ``sparse_rows``; imported when the backend first runs."""

FP16_HEADROOM = 64.0
"""A gradient tile in fp16 is written for rows of this weight: entries down to 1e-6 of a row then keep their precision,
and the largest, a few units, stay far from 65,504."""


def row_implementation(backend: str) -> ModuleType:
    return importlib.import_module(f"kd_kernels.loss.{ROW_IMPLEMENTATIONS[backend]}")


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the gradient of a tensor is kept in until its backward: fp16 has no room before the loss scale is
    applied."""
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True)
class RowInputs:
    """Per-row inputs of one call, flattened to ``[N]``."""

    labels: Tensor | None = None
    token_weight: Tensor | None = None
    normalizer: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """``loss`` is fp64: a scalar (mean, sum) or ``[N]``; ``stats`` one ``[N]`` a name; ``gradients`` one for each True
    in needs_grad."""

    loss: Tensor
    stats: list[Tensor]
    gradients: list[Tensor]


class LinearGradient:
    """Gradients of a head's inputs, accumulated over chunks: ``d hidden = G W``, ``d weight = G^T hidden``,
    ``d bias = sum G``.

    ``d weight`` is summed in the work dtype. Where the head has another dtype and there is more than one chunk, that
    sum is a tensor of its own, ``V H`` elements, beside the scratch budget.
    """

    def __init__(
        self, products: LinearSource, needs_grad: tuple[bool, ...], chunks: int, weight_of_row: Tensor
    ) -> None:
        self.products, self.head = products, products.head
        linear = products.linear
        needs_hidden, needs_weight, needs_bias = (*needs_grad, False)[:3]
        dtype = gradient_dtype(linear.hidden.dtype)
        self.hidden = torch.zeros(linear.hidden.shape, dtype=dtype, device=linear.device) if needs_hidden else None
        self.weight: Tensor | None = None
        if needs_weight:
            self.weight = new_memory(*linear.weight.shape, dtype=self.head.weight_total(chunks), device=linear.device)
        self.bias = torch.zeros(
            linear.weight.shape[0], dtype=products.dtype, device=linear.device
        ) if needs_bias else None
        self.is_first = True
        self.unit: Tensor | None = None
        if self.head.tile_dtype == torch.float16 and weight_of_row.numel():
            largest = weight_of_row.abs().amax()
            self.unit = torch.where(largest > 0, largest / FP16_HEADROOM, 1.0)

    def tile(self, raw: Tensor, begin: int, end: int) -> Tensor:
        """Where the gradient of a chunk goes: into the memory of its logits, which nobody needs afterwards."""
        return raw if self.head.tile_dtype == raw.dtype else raw.view(self.head.tile_dtype)[:, : raw.shape[1]]

    def add(self, gradient: Tensor, begin: int, end: int) -> None:
        products, columns = self.products, gradient.shape[1]
        if self.hidden is not None:
            rows = slice(begin, end) if products.rows is None else products.rows[begin:end]
            out = self.hidden[rows] if products.rows is None else None
            product = self.head.hidden_gradient(gradient, out)
            if product is not out:
                self.hidden[rows] = product.to(self.hidden.dtype)
        if self.weight is not None:
            self.head.add_weight_gradient(gradient, products.hidden(begin, end), self.weight[:columns], self.is_first)
        if self.bias is not None:
            self.bias[:columns] += gradient.sum(0, dtype=self.bias.dtype)
        self.is_first = False

    def finish(self) -> list[Tensor]:
        linear = self.products.linear
        if self.weight is not None:
            self.weight[0 if self.is_first else self.products.columns :] = 0
        totals = ((self.hidden, linear.hidden), (self.weight, linear.weight), (self.bias, linear.bias))
        if self.unit is not None:
            for total, _ in totals:
                if total is not None:
                    total *= self.unit
        return [total.to(gradient_dtype(of.dtype)) for total, of in totals if total is not None]


class TensorGradient:
    """Gradient of logits that the caller has, in their dtype: written there at once where the row pass can, else by
    chunk."""

    def __init__(self, products: TensorSource, shape: torch.Size, dtype: torch.dtype, columns: int) -> None:
        self.products, self.is_direct = products, not products.copies
        self.unit = None
        self.logits = new_memory(*shape, dtype=dtype, device=products.logits.device)
        if products.rows is not None or not self.is_direct:
            self.logits.zero_()
        else:
            self.logits[:, columns:] = 0

    def tile(self, raw: Tensor, begin: int, end: int) -> Tensor:
        return self.logits[begin:end, : raw.shape[1]] if self.is_direct else raw

    def add(self, gradient: Tensor, begin: int, end: int) -> None:
        if not self.is_direct:
            rows = slice(begin, end) if self.products.rows is None else self.products.rows[begin:end]
            self.logits[rows, : gradient.shape[1]] = gradient.to(self.logits.dtype)

    def finish(self) -> list[Tensor]:
        return [self.logits]


def row_weights(plan: Plan, count: int, device: torch.device, inputs: RowInputs) -> Tensor:
    """fp64 ``[N]``: what each row's loss is multiplied by. 0 for rows that do not count. No synchronisation."""
    weight = torch.ones(count, dtype=torch.float64, device=device)
    if inputs.token_weight is not None:
        weight = inputs.token_weight.double()
    if inputs.labels is not None:
        weight = weight.masked_fill(inputs.labels == plan.ignore_index, 0.0)
    if inputs.rows is not None:
        weight = torch.zeros_like(weight).index_copy_(0, inputs.rows, weight[inputs.rows])
    if plan.reduction != "mean":
        return weight
    total = weight.sum() if inputs.normalizer is None else inputs.normalizer.double()
    return torch.where(total == 0, 0.0, weight / total)


def run(
    plan: Plan, student: Targets, teacher: Targets | None, inputs: RowInputs, *, with_gradient: bool,
    upstream: Tensor | None = None,
) -> Outcome:
    """The pass. ``upstream`` (``[N]``) multiplies the rows' weights: the gradient that ``reduction="none"`` receives.

    Raises:
        ValueError: the scratch budget holds no row; on a CPU also NaN or +inf in logits, labels or ids out of range,
            ids that repeat in a row, a tail mass above 1.
        RuntimeError: ``compact=True`` without ``rows`` while a CUDA graph is captured.
        torch.OutOfMemoryError: with the budget that was in force.
    """
    try:
        with torch.autocast(student.device.type, enabled=False):
            return _run(plan, flattened(student), teacher, inputs, with_gradient, upstream)  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        budget = scratch_budget(plan.max_scratch_bytes, student.device)
        raise torch.OutOfMemoryError(
            _check.complaint(
                plan.where, "max_scratch_bytes", "smaller (gradients come on top of it)", f"{budget} bytes",
                f"the device said: {error}",
            )
        ) from error


def _run(
    plan: Plan, student: Targets, teacher: Targets | None, inputs: RowInputs, with_gradient: bool,
    upstream: Tensor | None
) -> Outcome:
    device, columns = student.device, plan.columns
    is_sparse = teacher is None or isinstance(teacher, SparseTargets)
    if teacher is None:
        teacher = _no_targets(student)
    count = leading_shape(student).numel()
    weight = row_weights(plan, count, device, inputs)
    if upstream is not None:
        weight = weight * upstream.double()
    if device.type == "cpu" and not bool(weight.isfinite().all()):
        _check.fail(plan.where, "token_weight and normalizer", "such that every row's weight is finite", "NaN or inf")

    rows = None
    if plan.compact and inputs.rows is not None:
        # On a GPU, which of the listed rows count stays unread: the others are masked.
        rows = inputs.rows[weight[inputs.rows] != 0] if device.type == "cpu" else inputs.rows
    elif plan.compact:
        _backend.check_not_capturing(
            plan.where, "compact", "None or False", True,
            "pass the rows that count as rows=, or let the others be masked"
        )
        counting = weight.nonzero()[:, 0]
        rows = counting if counting.shape[0] < count else None
    picked = lambda x: x if x is None or rows is None else x[rows]  # noqa: E731
    weight_of_row = picked(weight).contiguous()
    labels = picked(inputs.labels)
    labels = None if labels is None else labels.long().contiguous()
    chosen = weight_of_row.shape[0]

    dtype = work_dtype(*tensors_of(student), *([teacher.logprobs] if is_sparse else tensors_of(teacher)))
    implementation = row_implementation(plan.backend)
    # Rows that the pass works on in place, or whose place their gradient takes, are not the caller's own.
    writable = is_sparse if implementation.NATIVE else with_gradient
    options = dict(
        columns=columns, precision=plan.precision, autocast=plan.autocast_dtype, native=implementation.NATIVE
    )
    student_rows = source(student, rows, dtype, writable=writable, **options)
    if is_sparse:
        if device.type == "cpu":
            _check_offsets(plan.where, teacher)
        teacher_rows = SparseSource(teacher, rows, dtype)
        row_pass = implementation.sparse_rows
    else:
        teacher_rows = source(flattened(teacher), rows, dtype, **options)
        row_pass = implementation.dense_rows

    own_bytes_per_row, own_fixed_bytes = implementation.scratch(columns, dtype)
    bytes_per_row = student_rows.bytes_per_row + teacher_rows.bytes_per_row + own_bytes_per_row
    fixed_bytes = student_rows.fixed_bytes + teacher_rows.fixed_bytes + own_fixed_bytes
    step = rows_per_chunk(plan.where, chosen, bytes_per_row, fixed_bytes, plan.max_scratch_bytes, device)

    sink: LinearGradient | TensorGradient | None = None
    if with_gradient and isinstance(student, LinearLogits):
        chunks = -(-chosen // step)
        sink = LinearGradient(student_rows, plan.needs_grad, chunks, weight_of_row)  # type: ignore[arg-type]
    elif with_gradient:
        dtype = gradient_dtype(student.dtype)
        sink = TensorGradient(student_rows, student.shape, dtype, columns)  # type: ignore[arg-type]
    for each in (student_rows, teacher_rows):
        each.open(min(step, max(chosen, 1)))
    job, want_stats = plan.job(), bool(plan.stats)
    row_scale = weight_of_row if sink is None or sink.unit is None else weight_of_row / sink.unit
    losses = torch.zeros(chosen, dtype=torch.float64, device=device)
    stats = torch.full((count, len(STATS)), torch.nan, dtype=torch.float64, device=device) if want_stats else None
    for begin in range(0, chosen, step):
        end = min(begin + step, chosen)
        here = student_rows.chunk(begin, end)
        gradient = None if sink is None else sink.tile(here.raw, begin, end)
        loss, row_stats, status = row_pass(
            here, teacher_rows.chunk(begin, end), job, None if labels is None else labels[begin:end],
            row_scale[begin:end], gradient, want_stats,
        )
        if device.type == "cpu" and bool(status.any()):
            _complain(plan.where, status, rows, begin, columns)
        losses[begin:end] = loss
        if stats is not None:
            stats[slice(begin, end) if rows is None else rows[begin:end]] = row_stats
        if sink is not None:
            sink.add(gradient, begin, end)
    here = gradient = None  # the last views of the scratch: a sum that is rounded to the head's dtype takes its place
    for each in (student_rows, teacher_rows):
        each.close()

    weighted = losses * weight_of_row
    if plan.reduction != "none":
        total = weighted.sum()
    else:
        total = weighted if rows is None else weighted.new_zeros(count).index_copy_(0, rows, weighted)
    return Outcome(total, _named_stats(plan, stats), [] if sink is None else sink.finish())


def check_gradient_fits(plan: Plan, student: LinearLogits | Tensor, rows: Source) -> None:
    """Raise where the backward of a loss without a dense teacher would find ``max_scratch_bytes`` too small. It works
    in a copy of logits that the forward, from ``rows``, only reads."""
    dtype = work_dtype(*tensors_of(student))
    if isinstance(student, Tensor):
        rows = source(student, None, dtype, columns=plan.columns, writable=True)
    own_bytes_per_row, own_fixed_bytes = row_implementation(plan.backend).scratch(plan.columns, dtype)
    bytes_per_row, fixed_bytes = rows.bytes_per_row + own_bytes_per_row, rows.fixed_bytes + own_fixed_bytes
    rows_per_chunk(plan.where, 1, bytes_per_row, fixed_bytes, plan.max_scratch_bytes, student.device)


def _no_targets(student: Targets) -> SparseTargets:
    """Rows without an entry: what a loss without a teacher sees."""
    count = leading_shape(student).numel()
    device = student.device
    empty = torch.empty(0, device=device)
    offsets = torch.zeros(count + 1, dtype=torch.int64, device=device)
    return SparseTargets(offsets, torch.empty(0, dtype=torch.int64, device=device), empty, importance=empty)


def _check_offsets(where: str, targets: SparseTargets) -> None:
    offsets, entries = targets.offsets, targets.ids.shape[0]
    if offsets[0] != 0 or offsets[-1] != entries or bool((offsets.diff() < 0).any()):
        _check.fail(where, "teacher.offsets", f"non-decreasing from 0 to nnz={entries}", offsets.tolist()[:8])


_COMPLAINTS = (
    (reference.BAD_STUDENT, "student logits", "free of NaN and +inf, with a finite entry in every row", ""),
    (reference.BAD_IDS, "teacher.ids", "in 0..V-1={last} and distinct within a row", ""),
    (reference.BAD_TAIL, "teacher.tail_logprob", "at most 0: the log of a mass", ""),
    (reference.BAD_IMPORTANCE, "teacher.importance", "finite and at least 0", ""),
    (reference.BAD_LABEL, "labels", "in 0..V-1={last}, or ignore_index", ""),
    (
        reference.BAD_TEACHER, "teacher",
        "free of NaN and +inf with a finite entry in every row, and its log-probabilities those of masses up to 1", "",
    ),
)


def _complain(where: str, status: Tensor, rows: Tensor | None, begin: int, columns: int) -> NoReturn:
    first = int(status.nonzero()[0, 0])
    row = begin + first if rows is None else int(rows[begin + first])
    for bit, argument, requirement, remedy in _COMPLAINTS:
        if int(status[first]) & bit:
            _check.fail(where, argument, requirement.format(last=columns - 1), f"something else in row {row}", remedy)
    raise AssertionError(f"status {int(status[first])}")


def _named_stats(plan: Plan, stats: Tensor | None) -> list[Tensor]:
    if stats is None:
        return []
    columns = [stats[:, STATS.index(name)] for name in plan.stats]
    return [
        torch.where(c.isnan(), -1.0, c).long() if name in ID_STATS else c.float() for name, c in zip(
            plan.stats,
            columns,
        )
    ]
