"""Top-k targets in Triton (``triton_kernels.py``), for CUDA and ROCm: whole rows of products, chunk by chunk.

Nothing here reads from the device. What is wrong with a row shows in its count.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kd_kernels import products, row_launch
from kd_kernels.logits import Logits, leading_shape, vocab
from kd_kernels.targets import config
from kd_kernels.targets.triton_kernels import (
    N_STATE, group_kernel, select_groups_kernel, select_logits_kernel, write_targets_kernel,
)
from kd_kernels.targets.truncated import Truncated

ALIGNMENT = 16
"""Groups are counted in multiples of it: Triton then knows that four of them are one load."""

SORT_BYTES = 40
"""An entry, for torch's sort of a chunk's kept logits: what it returns is 4 and 8 bytes, and it needs as much again or
more."""


class Scratch(NamedTuple):
    """Of C rows: G groups, P of them selected, k entries, T temperatures beyond 1."""

    maxima: Tensor  # fp32 [C, G]
    sums: Tensor  # fp32 [C, 1 + T, G]
    groups: Tensor  # int32 [C, P]
    state: Tensor  # fp32 [C, 6], see triton_kernels.py
    columns: Tensor  # int32 [C, k]
    values: Tensor  # fp32 [C, k]

    def rows(self, count: int) -> Scratch:
        return Scratch(*(field[:count] for field in self))


def _layout(n_groups: int, n_selected: int, k: int, n_further: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype that each field of :class:`Scratch` has in one row."""
    real, index = torch.float32, torch.int32
    return {
        "maxima": ((n_groups,), real), "sums": ((1 + n_further, n_groups), real), "groups": ((n_selected,), index),
        "state": ((N_STATE.value,), real), "columns": ((k,), index), "values": ((k,), real),
    }


def topk(
    logits: Logits, dtype: torch.dtype, k: int, mass: float | None, temperatures: tuple[float, ...],
    max_scratch_bytes: int | None,
) -> Truncated:
    """See :class:`Truncated`."""
    (rows,), columns, device = leading_shape(logits), vocab(logits), logits.device
    group = config.group_columns(columns, k)
    n_groups = -(-columns // group)
    layout = _layout(-(-n_groups // ALIGNMENT) * ALIGNMENT, min(k, n_groups), k, len(temperatures))
    own_bytes = sum(kind.itemsize * math.prod(shape) for shape, kind in layout.values()) + SORT_BYTES * k

    source = products.source(logits, None, dtype, native=True)
    step = products.rows_per_chunk(
        "topk_targets", rows, source.bytes_per_row + own_bytes, source.fixed_bytes + 4 * len(temperatures),
        max_scratch_bytes, device,
    )
    new = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device=device)  # noqa: E731
    result = Truncated(
        counts=new(rows, dtype=torch.int64), ids=new(rows, k, dtype=torch.int64), logprobs=new(rows, k, dtype=dtype),
        tail_logprob=new(rows, dtype=dtype), log_z=new(rows, len(temperatures), dtype=dtype),
    )
    if rows == 0:
        return result
    inverses = new(len(temperatures), dtype=torch.float32)
    for inverse, temperature in zip(inverses, temperatures):
        inverse.fill_(1.0 / temperature)  # a launch, where a copy from the host would wait for the device
    scratch = Scratch(**{name: new(step, *shape, dtype=kind) for name, (shape, kind) in layout.items()})
    source.open(step)
    limit = math.inf if mass is None else mass
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        part = Truncated(*(field[begin:end] for field in result))
        _truncate(source.chunk(begin, end), group, k, limit, inverses, scratch.rows(end - begin), part)
    return result


def _truncate(
    chunk: products.RawRows, group: int, k: int, mass: float, inverses: Tensor, scratch: Scratch, result: Truncated
) -> None:
    """One chunk. Bytes: see the kernels."""
    raw, warp_size = chunk.raw, row_launch.lanes_per_warp()
    count, columns = raw.shape
    n_groups, n_selected, n_further = scratch.maxima.shape[1], scratch.groups.shape[1], inverses.shape[0]
    bias = scratch.state if chunk.bias is None else chunk.bias  # some memory, not to be read
    has_bias = int(chunk.bias is not None)
    factor, height = chunk.factor_and_height()

    launch = config.group_launch(columns, warp_size)
    n_blocks = -(-n_groups * group // launch.block)
    group_kernel[(count * n_blocks,)](
        raw, bias, inverses, scratch.maxima, scratch.sums, raw.stride(0), columns, row_launch.readable_columns(raw),
        n_groups, n_further, n_blocks, has_bias, factor, height,
        BLOCK=launch.block, GROUP=group, num_warps=launch.num_warps,
    )
    launch = config.select_launch(n_groups, warp_size)
    select_groups_kernel[(count,)](
        scratch.maxima, scratch.sums, inverses, scratch.groups, scratch.state, result.log_z, n_groups, n_further,
        n_selected, TILE=launch.tile, BLOCK=launch.block, **launch.options,
    )
    launch = config.select_launch(n_selected * group, warp_size)
    select_logits_kernel[(count,)](
        raw, bias, scratch.groups, scratch.state, scratch.columns, scratch.values, raw.stride(0), columns, n_selected,
        k, has_bias, factor, height, GROUP=group, TILE=launch.tile, BLOCK=launch.block, **launch.options,
    )
    # Candidates come by rising id: a stable sort leaves equal ones in that order.
    values, places = scratch.values.sort(dim=1, descending=True, stable=True)
    launch = config.write_launch(k, warp_size)
    write_targets_kernel[(count,)](
        values, places, scratch.columns, scratch.state, result.counts, result.ids, result.logprobs, result.tail_logprob,
        k, mass, BLOCK=launch.block, **launch.options,
    )
