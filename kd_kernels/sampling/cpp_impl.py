"""Draws in C++ (csrc/cpu/sampling.cpp), for CPU tensors. Same contract as ``reference.py``, for ids that exist: on a CPU they
are checked before."""

from __future__ import annotations

import torch

from kd_kernels._backend import extension
from kd_kernels.products import RawRows
from kd_kernels.sampling.philox import GROUP
from kd_kernels.sampling.reference import Request, RowSamples

NATIVE = False


def scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """A row a thread: its logits where they are not the products themselves, ids ranked by logit, and three numbers a group."""
    return 0, (columns * (dtype.itemsize + 2 * dtype.itemsize) + 3 * dtype.itemsize * -(-columns // GROUP)) * torch.get_num_threads()


def sample_rows(rows: RawRows, request: Request, out: RowSamples) -> None:
    """Draws and scores a chunk. Bytes: reads C V elements of the work dtype; with filters, from cache, some of them again."""
    raw = rows.raw
    address = lambda x: 0 if x is None else x.data_ptr()  # noqa: E731
    assert all(x is None or x.is_contiguous() for x in (*request[:8], *out))
    run = getattr(extension(), {torch.float32: "sample_rows_fp32", torch.float64: "sample_rows_fp64"}[raw.dtype])
    run(
        logits=rows.addresses(), rows=raw.shape[0], vocab=raw.shape[1], request=tuple(address(x) for x in request[:7]),
        given=address(request.given), race=request.race, threads=torch.get_num_threads(),
        **{name: address(field) for name, field in out._asdict().items()},
    )
