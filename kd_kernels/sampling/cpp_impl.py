"""Draws on the CPU (``csrc/cpu/sampling.cpp``). Same contract as ``reference.py``."""

from __future__ import annotations

import torch

from kd_kernels._backend import extension
from kd_kernels.products import RawRows
from kd_kernels.sampling.reference import Request, RowSamples

NATIVE = False


def scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of each thread: the logits where the head has a map, a masked copy and the ids near the cut where there are filters."""
    return 0, torch.get_num_threads() * columns * (2 * dtype.itemsize + 24)


def sample_rows(rows: RawRows, request: Request, out: RowSamples) -> None:
    """Draws and scores a chunk. Bytes: reads C V elements of the work dtype, twice at temperatures other than 1."""
    address = lambda x: 0 if x is None else x.data_ptr()  # noqa: E731
    run = getattr(extension(), {torch.float32: "sample_fp32", torch.float64: "sample_fp64"}[rows.raw.dtype])
    tensors = request._asdict() | out._asdict()
    race = tensors.pop("race")
    run(
        logits=rows.addresses(), rows=rows.raw.shape[0], vocab=rows.raw.shape[1], race=race,
        threads=torch.get_num_threads(), **{name: address(x) for name, x in tensors.items()},
    )
