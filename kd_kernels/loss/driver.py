"""One pass over the rows: products, row pass, gradient products, chunk by chunk under the scratch budget.

The gradient of a chunk is formed while its logits are still there, so a dense teacher costs 6 N Hs V + 2 N Ht V operations
and a sparse one 6 N Hs V: the minimum. The same pass serves the forward (weights known before it) and, given the upstream
gradient of each token as weights, the backward of ``reduction="none"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor

from kd_kernels import _check
from kd_kernels.logits import LinearLogits, SparseTargets, Targets, leading_shape
from kd_kernels.loss import cpp_impl, reference
from kd_kernels.loss.plan import ID_STATS, STATS, Plan
from kd_kernels.products import LinearSource, Source, TensorSource, flattened, rows_per_chunk, source, tensors_of, work_dtype

ROW_IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference, "cpp": cpp_impl}
"""Modules with ``dense_rows`` and ``sparse_rows``, by backend."""


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the gradient of a tensor is kept in until its backward: fp16 has no room before the loss scale is applied."""
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
    """``loss`` is fp64: a scalar (mean, sum) or ``[N]``; ``stats`` one ``[N]`` a name; ``gradients`` one for each True in needs_grad."""

    loss: Tensor
    stats: list[Tensor]
    gradients: list[Tensor]


class LinearGradient:
    """Gradients of a head's inputs, accumulated over chunks: ``d hidden = G W``, ``d weight = G^T hidden``, ``d bias = sum G``.

    ``d weight`` is summed in the work dtype. Where the head has another dtype and there is more than one chunk, that sum
    is a tensor of its own, ``V H`` elements, beside the scratch budget.
    """

    def __init__(self, products: LinearSource, needs_grad: tuple[bool, ...], chunks: int) -> None:
        self.products, self.chunks = products, chunks
        linear = products.linear
        needs_hidden, needs_weight, needs_bias = (*needs_grad, False)[:3]
        dtype = gradient_dtype(linear.hidden.dtype)
        self.hidden = torch.zeros(linear.hidden.shape, dtype=dtype, device=linear.device) if needs_hidden else None
        self.weight = torch.empty(linear.weight.shape, dtype=products.dtype, device=linear.device) if needs_weight else None
        self.bias = torch.zeros(linear.weight.shape[0], dtype=products.dtype, device=linear.device) if needs_bias else None
        self.is_first = True

    def add(self, gradient: Tensor, begin: int, end: int) -> None:
        products = self.products
        narrow = gradient.to(torch.bfloat16) if products.uses_bf16 else None
        if self.hidden is not None:
            rows = slice(begin, end) if products.rows is None else products.rows[begin:end]
            if narrow is not None:
                self.hidden[rows] = (narrow @ products.weight.to(torch.bfloat16)).to(self.hidden.dtype)
            elif not products.widens and self.hidden.dtype == products.dtype and products.rows is None:
                torch.mm(gradient, products.weight, out=self.hidden[rows])
            else:
                total = gradient.new_zeros(end - begin, products.weight.shape[1])
                for piece, weight in products.tiles():
                    total.addmm_(gradient[:, piece], weight)
                self.hidden[rows] = total.to(self.hidden.dtype)
        if self.weight is not None:
            hidden = products.hidden(begin, end)
            if narrow is not None and self.chunks == 1:
                product = narrow.t() @ hidden.to(torch.bfloat16)
                if products.linear.weight.dtype == torch.bfloat16:
                    self.weight = torch.empty_like(products.linear.weight)
                self.weight[: products.columns] = product
            else:
                used, hidden = self.weight[: products.columns], hidden.to(products.dtype)
                if self.is_first:
                    torch.mm(gradient.t(), hidden, out=used)
                else:
                    torch.addmm(used, gradient.t(), hidden, out=used)
        if self.bias is not None:
            self.bias[: products.columns] += gradient.sum(0)
        self.is_first = False

    def finish(self) -> list[Tensor]:
        linear, done = self.products.linear, []
        if self.hidden is not None:
            done.append(self.hidden)
        if self.weight is not None:
            self.weight[0 if self.is_first else self.products.columns :] = 0
            done.append(self.weight.to(gradient_dtype(linear.weight.dtype)))
        if self.bias is not None:
            done.append(self.bias.to(gradient_dtype(linear.bias.dtype)))
        return done


class TensorGradient:
    """Gradient of logits that the caller has: the chunks' own, written down in the logits' dtype."""

    def __init__(self, products: TensorSource, shape: torch.Size, dtype: torch.dtype) -> None:
        self.products = products
        self.logits = torch.zeros(shape, dtype=dtype, device=products.logits.device)

    def add(self, gradient: Tensor, begin: int, end: int) -> None:
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
    """
    with torch.autocast(student.device.type, enabled=False):
        return _run(plan, flattened(student), teacher, inputs, with_gradient, upstream)  # type: ignore[arg-type]


def _run(
    plan: Plan, student: Targets, teacher: Targets | None, inputs: RowInputs, with_gradient: bool, upstream: Tensor | None
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
        _check.fail("kd_loss", "token_weight and normalizer", "such that every row's weight is finite", "NaN or inf")

    rows = None
    if plan.compact:
        candidates = weight if inputs.rows is None else weight[inputs.rows]
        rows = candidates.nonzero()[:, 0] if inputs.rows is None else inputs.rows[candidates != 0]
        if rows.shape[0] == count and inputs.rows is None:
            rows = None
    picked = lambda x: x if x is None or rows is None else x[rows]  # noqa: E731
    weight_of_row = picked(weight).contiguous()
    labels = picked(inputs.labels)
    labels = None if labels is None else labels.long().contiguous()
    chosen = weight_of_row.shape[0]

    dtype = work_dtype(*tensors_of(student), *([teacher.logprobs] if is_sparse else tensors_of(teacher)))
    options = dict(columns=columns, precision=plan.precision, autocast=plan.autocast_dtype)
    student_rows = source(student, rows, dtype, writable=with_gradient, **options)
    teacher_rows: Source | None = None
    if is_sparse:
        teacher = teacher if rows is None else teacher.select(rows)
        if device.type == "cpu":
            _check_offsets(teacher)
    else:
        teacher_rows = source(flattened(teacher), rows, dtype, **options)

    implementation = ROW_IMPLEMENTATIONS[plan.backend]
    sources = [s for s in (student_rows, teacher_rows) if s is not None]
    bytes_per_row = sum(s.bytes_per_row for s in sources)
    fixed_bytes = sum(s.fixed_bytes for s in sources)
    if implementation is reference:
        bytes_per_row += reference.BYTES_PER_LOGIT * columns * dtype.itemsize
    else:
        fixed_bytes += cpp_impl.thread_bytes(columns, dtype)
    step = rows_per_chunk("kd_loss", chosen, bytes_per_row, fixed_bytes, plan.max_scratch_bytes, device)
    chunks = -(-chosen // step)

    sink = None
    if with_gradient:
        if isinstance(student, LinearLogits):
            sink = LinearGradient(student_rows, plan.needs_grad, chunks)  # type: ignore[arg-type]
        else:
            sink = TensorGradient(student_rows, student.shape, gradient_dtype(student.dtype))  # type: ignore[arg-type]
    for each in sources:
        each.open(step)
    job, want_stats = plan.job(), bool(plan.stats)
    losses = torch.zeros(chosen, dtype=torch.float64, device=device)
    stats = torch.full((count, len(STATS)), torch.nan, dtype=torch.float64, device=device) if want_stats else None
    for begin in range(0, chosen, step):
        end = min(begin + step, chosen)
        here = student_rows.chunk(begin, end)
        gradient = here.raw if with_gradient else None
        shared = (job, None if labels is None else labels[begin:end], weight_of_row[begin:end], gradient, want_stats)
        if teacher_rows is None:
            loss, row_stats, status = implementation.sparse_rows(here, _slice(teacher, begin, end), *shared)
        else:
            loss, row_stats, status = implementation.dense_rows(here, teacher_rows.chunk(begin, end), *shared)
        if device.type == "cpu" and bool(status.any()):
            _complain(status, rows, begin, columns)
        losses[begin:end] = loss
        if stats is not None:
            stats[slice(begin, end) if rows is None else rows[begin:end]] = row_stats
        if sink is not None:
            sink.add(gradient, begin, end)

    weighted = losses * weight_of_row
    if plan.reduction != "none":
        total = weighted.sum()
    else:
        total = weighted if rows is None else weighted.new_zeros(count).index_copy_(0, rows, weighted)
    return Outcome(total, _named_stats(plan, stats), [] if sink is None else sink.finish())


def _no_targets(student: Targets) -> SparseTargets:
    """Rows without an entry: what a loss without a teacher sees."""
    count = leading_shape(student).numel()
    device = student.device
    empty = torch.empty(0, device=device)
    offsets = torch.zeros(count + 1, dtype=torch.int64, device=device)
    return SparseTargets(offsets, torch.empty(0, dtype=torch.int64, device=device), empty, importance=empty)


def _slice(targets: SparseTargets, begin: int, end: int) -> SparseTargets:
    """Consecutive rows; entries are viewed, not copied."""
    first, last = targets.offsets[begin].item(), targets.offsets[end].item()
    pick = lambda x, a, b: None if x is None else x[a:b]  # noqa: E731
    return SparseTargets(
        targets.offsets[begin : end + 1] - first, targets.ids[first:last], targets.logprobs[first:last],
        pick(targets.tail_logprob, begin, end), pick(targets.importance, first, last),
    )


def _check_offsets(targets: SparseTargets) -> None:
    offsets, entries = targets.offsets, targets.ids.shape[0]
    if offsets[0] != 0 or offsets[-1] != entries or bool((offsets.diff() < 0).any()):
        _check.fail("kd_loss", "teacher.offsets", f"non-decreasing from 0 to nnz={entries}", offsets.tolist()[:8])


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


def _complain(status: Tensor, rows: Tensor | None, begin: int, columns: int) -> NoReturn:
    first = int(status.nonzero()[0, 0])
    row = begin + first if rows is None else int(rows[begin + first])
    for bit, argument, requirement, remedy in _COMPLAINTS:
        if int(status[first]) & bit:
            _check.fail("kd_loss", argument, requirement.format(last=columns - 1), f"something else in row {row}", remedy)
    raise AssertionError(f"status {int(status[first])}")


def _named_stats(plan: Plan, stats: Tensor | None) -> list[Tensor]:
    if stats is None:
        return []
    columns = [stats[:, STATS.index(name)] for name in plan.stats]
    return [
        torch.where(c.isnan(), -1.0, c).long() if name in ID_STATS else c.float() for name, c in zip(plan.stats, columns)
    ]
