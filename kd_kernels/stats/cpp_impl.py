"""Statistics of rows in C++ (csrc/cpu/token_stats.cpp), for CPU tensors. Same contract as ``reference.py``, for ids
that exist: on a CPU they are checked before."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels._backend import extension
from kd_kernels.products import RawRows
from kd_kernels.stats.reference import RowStats

NATIVE = False


def scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """A row a thread: its logits, where they are not the products themselves."""
    return 0, columns * dtype.itemsize * torch.get_num_threads()


def stat_rows(rows: RawRows, ids: Tensor, out: RowStats) -> None:
    """Statistics of a chunk. Bytes: reads C V elements of the work dtype."""
    raw = rows.raw
    assert ids.dtype == torch.int64 and ids.is_contiguous()
    run = getattr(extension(), {torch.float32: "token_stats_fp32", torch.float64: "token_stats_fp64"}[raw.dtype])
    run(
        logits=rows.addresses(), rows=raw.shape[0], vocab=raw.shape[1], ids=ids.data_ptr(),
        threads=torch.get_num_threads(),
        **{name: field.data_ptr() for name, field in out._asdict().items()},
    )
