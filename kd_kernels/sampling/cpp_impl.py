"""Draws on the CPU (``csrc/cpu/sampling.cpp``). Same contract as ``reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels._backend import extension
from kd_kernels.products import RawRows
from kd_kernels.sampling.reference import Request, RowSamples, RowTargets, TargetRequest

NATIVE = False
PRECISIONS = {torch.float32: "fp32", torch.float64: "fp64"}


def scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of each thread: the logits where the head has a map, a masked copy and the ids near the cut where there are
    filters."""
    return 0, torch.get_num_threads() * columns * (2 * dtype.itemsize + 24)


def sample_rows(rows: RawRows, request: Request, out: RowSamples) -> None:
    """Draws and scores a chunk. Bytes: reads C V elements of the work dtype, twice at temperatures other than 1."""
    run = getattr(extension(), "sample_" + PRECISIONS[rows.raw.dtype])
    tensors = request._asdict() | out._asdict()
    race = tensors.pop("race")
    run(
        logits=rows.addresses(), rows=rows.raw.shape[0], vocab=rows.raw.shape[1], race=race,
        threads=torch.get_num_threads(), **_addresses(tensors),
    )


def target_scratch(columns: int, request: TargetRequest, dtype: torch.dtype) -> tuple[int, int]:
    """Of each thread: logits where the head has a map, a copy without the certain ids, the draws and the entries."""
    entries = 24 * (min(columns, 2 * request.certain) + request.draws)
    return 0, torch.get_num_threads() * (2 * columns * dtype.itemsize + entries + columns)


def target_rows(rows: RawRows, request: TargetRequest, out: RowTargets) -> None:
    """Draws and counts for a chunk. Bytes: reads C V elements of the work dtype, twice unless rows are the proposal."""
    run = getattr(extension(), "sampled_targets_" + PRECISIONS[rows.raw.dtype])
    numbers = {name: getattr(request, name) for name in ("inverse", "draws", "certain")}
    places = {name: getattr(request, name) for name in ("seeds", "keys", "positions")}
    run(
        logits=rows.addresses(), rows=rows.raw.shape[0], vocab=rows.raw.shape[1], width=out.ids.shape[1],
        threads=torch.get_num_threads(), **numbers, **_addresses(places | out._asdict()),
    )


def _addresses(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    return {name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}
