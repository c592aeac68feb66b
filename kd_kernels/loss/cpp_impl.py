"""The row pass in C++ (csrc/cpu/row_loss.cpp), for CPU tensors. Same contract as ``reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels._backend import extension
from kd_kernels.loss.plan import STATS, TAILS, RowJob, Rows
from kd_kernels.products import RawRows, SparseRows

NATIVE = False


def scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Two rows a thread."""
    return 0, 2 * columns * dtype.itemsize * torch.get_num_threads()


def dense_rows(
    student: RawRows, teacher: RawRows, job: RowJob, labels: Tensor | None, weight: Tensor, gradient: Tensor | None,
    want_stats: bool,
) -> Rows:
    """Rows of a dense teacher. Bytes: reads 2 C V and writes C V elements of the work dtype."""
    call, outputs = _job(student, job, labels, weight, gradient, want_stats)
    suffix = _suffix(student.raw)
    getattr(extension(), f"dense_rows_{suffix}")(call, teacher.addresses())
    return outputs


def sparse_rows(
    student: RawRows, teacher: SparseRows, job: RowJob, labels: Tensor | None, weight: Tensor, gradient: Tensor | None,
    want_stats: bool,
) -> Rows:
    """Rows of a sparse teacher. Bytes: reads and writes C V elements of the work dtype, and the entries."""
    call, outputs = _job(student, job, labels, weight, gradient, want_stats)
    address = lambda t: 0 if t is None else t.data_ptr()  # noqa: E731
    # Weighted entries have no tail to treat. (The address of no weights at all is 0, like that of None.)
    treatment = TAILS.index(job.tail if teacher.importance is None else "drop")
    arguments = (*(address(t) for t in teacher), treatment)
    getattr(extension(), f"sparse_rows_{_suffix(student.raw)}")(call, arguments)
    return outputs


def _suffix(raw: Tensor) -> str:
    return {torch.float32: "fp32", torch.float64: "fp64"}[raw.dtype]


def _job(
    student: RawRows, job: RowJob, labels: Tensor | None, weight: Tensor, gradient: Tensor | None, want_stats: bool
) -> tuple[object, Rows]:
    rows, columns = student.raw.shape
    assert weight.dtype == torch.float64 and weight.is_contiguous()
    assert labels is None or (labels.dtype == torch.int64 and labels.is_contiguous())
    is_bf16 = gradient is not None and gradient.dtype == torch.bfloat16
    assert gradient is None or is_bf16 or gradient.dtype == student.raw.dtype
    loss = torch.empty(rows, dtype=torch.float64)
    stats = torch.empty(rows, len(STATS), dtype=torch.float64) if want_stats else None
    status = torch.empty(rows, dtype=torch.int32)
    call = extension().Job(
        rows=rows, vocab=columns, student=student.addresses(), formula=job.divergence.kernel,
        params=list(job.divergence.values), temperature=job.temperature, kd_weight=job.kd_weight,
        ce_weight=job.ce_weight, labels=0 if labels is None else labels.data_ptr(), weight=weight.data_ptr(),
        gradient=0 if gradient is None else gradient.data_ptr(), gradient_is_bf16=is_bf16,
        gradient_stride=0 if gradient is None else gradient.stride(0), loss=loss.data_ptr(),
        stats=0 if stats is None else stats.data_ptr(), status=status.data_ptr(), threads=torch.get_num_threads(),
    )
    return call, (loss, stats, status)
