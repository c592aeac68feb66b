"""The row pass in Triton (``triton_kernels.py``), for CUDA and ROCm. Same contract as ``reference.py``.

Nothing here reads from the device. What is wrong with a row shows as NaN in its loss and gradient; its status is
written for whoever wants to look.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels.divergences import triton_terms
from kd_kernels.loss import config
from kd_kernels.loss.plan import STATS, TAILS, RowJob, Rows
from kd_kernels.loss.triton_kernels import dense_rows_kernel, scale_kernel, sparse_rows_kernel
from kd_kernels.products import RawRows, SparseRows
from kd_kernels.row_launch import readable_columns, row_launch

NATIVE = True


def scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """A row is worked on where it is. (Kept logits of sparse rows, 4 bytes an entry, are small beside the targets.)"""
    return 0, 0


def dense_rows(
    student: RawRows, teacher: RawRows, job: RowJob, labels: Tensor | None, weight: Tensor, gradient: Tensor | None,
    want_stats: bool,
) -> Rows:
    """Rows of a dense teacher. Bytes: see the kernel."""
    count, columns = student.raw.shape
    loss, stats, status = _outputs(student.raw, want_stats)
    # What the kernel is told not to follow still has the type of what it might: branches are compiled either way.
    no_bias, no_labels = loss.view(torch.float32), loss.view(torch.int64)
    launch = row_launch(columns)
    # The cross-entropy's own normaliser, at temperature 1, is not known before the walk that would write the gradient.
    knows_g = job.divergence.total_g is not None and (job.temperature == 1.0 or job.ce_weight == 0)
    student_map, teacher_map = _map(student, job.temperature), _map(teacher, job.temperature)
    if count:
        dense_rows_kernel[(count,)](
            student.raw, teacher.raw, _or(gradient, student.raw), _or(student.bias, no_bias),
            _or(teacher.bias, no_bias), _or(labels, no_labels), weight, loss, _or(stats, loss), status,
            student.raw.stride(0), teacher.raw.stride(0), 0 if gradient is None else gradient.stride(0), columns,
            readable_columns(student.raw, teacher.raw, _or(gradient, student.raw)),
            _needs_labels(labels, job, want_stats), int(student.bias is not None), int(teacher.bias is not None),
            *student_map, *teacher_map[:2], job.temperature, job.kd_weight, job.ce_weight, *_params(job),
            job.divergence.total_g or 0.0, job.divergence.reverse_share,
            TERMS=triton_terms(job.divergence.kernel), N_PARAMS=len(job.divergence.values), KNOWS_G=knows_g,
            SUMS_REVERSE=knows_g and gradient is not None and job.divergence.reverse_share != 0,
            HAS_GRADIENT=gradient is not None, HAS_STATS=want_stats, BLOCK=launch.block, **launch.options,
        )
    return loss, stats, status


def sparse_rows(
    student: RawRows, teacher: SparseRows, job: RowJob, labels: Tensor | None, weight: Tensor, gradient: Tensor | None,
    want_stats: bool,
) -> Rows:
    """Rows of a sparse teacher; ``student.raw`` is overwritten. Bytes: see the kernel."""
    count, columns = student.raw.shape
    loss, stats, status = _outputs(student.raw, want_stats)
    no_bias, no_labels = loss.view(torch.float32), loss.view(torch.int64)
    launch, entries = row_launch(columns), teacher.ids.shape[0]
    kept = torch.empty(entries, dtype=torch.float32, device=student.raw.device)
    if count:
        sparse_rows_kernel[(count,)](
            student.raw, _or(gradient, student.raw), _or(student.bias, no_bias), teacher.starts, teacher.ends,
            teacher.ids, teacher.logprobs, _or(teacher.importance, kept), _or(teacher.tail_logprob, kept), kept,
            _or(labels, no_labels), weight, loss, _or(stats, loss), status, student.raw.stride(0),
            0 if gradient is None else gradient.stride(0), columns,
            readable_columns(student.raw, _or(gradient, student.raw)), _needs_labels(labels, job, want_stats),
            int(student.bias is not None), int(teacher.tail_logprob is not None), int(teacher.importance is not None),
            TAILS.index(job.tail), *_map(student, job.temperature), job.temperature, job.kd_weight, job.ce_weight,
            *_params(job), TERMS=triton_terms(job.divergence.kernel), N_PARAMS=len(job.divergence.values),
            HAS_GRADIENT=gradient is not None, HAS_STATS=want_stats, BLOCK=launch.block,
            ENTRIES=config.entry_block(entries / count), **launch.options,
        )
    return loss, stats, status


def scale_in_place(x: Tensor, scale: Tensor) -> None:
    """``x *= scale``, a scalar on the device that nobody has to read: where it is 1, no byte of ``x`` is moved."""
    block = 4096
    if x.numel():
        scale_kernel[(-(-x.numel() // block),)](x, scale, x.numel(), BLOCK=block, num_warps=8)


def _outputs(raw: Tensor, want_stats: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    new = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device=raw.device)  # noqa: E731
    count = raw.shape[0]
    stats = new(count, len(STATS), dtype=torch.float64) if want_stats else None
    return new(count, dtype=torch.float64), stats, new(count, dtype=torch.int32)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """``x``, or other memory of its type for a pointer that the kernel is told not to follow."""
    return other if x is None else x


def _needs_labels(labels: Tensor | None, job: RowJob, want_stats: bool) -> int:
    return int(labels is not None and (job.ce_weight != 0 or want_stats))


def _params(job: RowJob) -> tuple[float, float]:
    return (*job.divergence.values, 0.0, 0.0)[:2]


def _map(rows: RawRows, temperature: float) -> tuple[float, float, float, float]:
    """``factor, height, scale, relative`` of the kernels' logits."""
    relative = 0.0 if rows.softcap is None else temperature / rows.softcap
    return *rows.factor_and_height(temperature), float(rows.scale), relative
