"""Statistics of rows in Triton (``triton_kernels.py``), for CUDA and ROCm. Same contract as ``reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels.products import RawRows
from kd_kernels.row_launch import readable_columns, row_launch
from kd_kernels.stats.reference import RowStats
from kd_kernels.stats.triton_kernels import token_stats_kernel

NATIVE = True


def scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """A row is read where it is."""
    return 0, 0


def stat_rows(rows: RawRows, ids: Tensor, out: RowStats) -> None:
    """Statistics of a chunk. Bytes: see the kernel."""
    count, columns = rows.raw.shape
    launch = row_launch(columns)
    if count:
        token_stats_kernel[(count,)](
            rows.raw, out.lse if rows.bias is None else rows.bias, ids, *out, rows.raw.stride(0), columns,
            readable_columns(rows.raw), int(rows.bias is not None), *rows.factor_and_height(),
            BLOCK=launch.block, num_warps=launch.num_warps,
        )
