"""Top-k targets on the CPU: panels of logits into ``csrc/cpu/topk.cpp``, which sees each logit once.

A panel is some columns of many rows, not all columns of a few. So the head's weight is read (and, in half precision,
widened) once for hundreds of rows, and a product is still in cache when the row pass reads it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_kernels import _backend, products
from kd_kernels.logits import Logits, leading_shape, vocab
from kd_kernels.targets.truncated import Truncated


def _mapped(rows: products.RawRows) -> Tensor:
    """The logits of a panel, in its own memory: only products of a head have a map, and those are scratch."""
    z = rows.raw
    if rows.bias is not None:
        z += rows.bias
    if rows.scale != 1.0:
        z *= rows.scale
    if rows.softcap is not None:
        z.div_(rows.softcap).tanh_().mul_(rows.softcap)
    return z


def topk(
    logits: Logits, dtype: torch.dtype, k: int, mass: float | None, temperatures: tuple[float, ...],
    max_scratch_bytes: int | None,
) -> Truncated:
    """See :class:`Truncated`."""
    extension = _backend.extension()
    run = extension.topk_rows_fp64 if dtype == torch.float64 else extension.topk_rows_fp32
    (rows,), columns = leading_shape(logits), vocab(logits)
    width = columns if products.needs_whole_rows(logits) else products.panel_columns(rows, columns)
    capacity = min(2 * k, columns) + extension.topk_slack

    widest = products.source(products.columns_of(logits, 0, width), None, dtype)
    state_bytes = 2 * dtype.itemsize * capacity + 8 * (3 + len(temperatures))  # a candidate is a logit and an id
    fitting = products.rows_per_chunk(
        "topk_targets", rows, widest.bytes_per_row + state_bytes, widest.fixed_bytes, max_scratch_bytes, logits.device
    )
    step = products.panel_rows(rows, fitting)

    result = Truncated(
        counts=torch.empty(rows, dtype=torch.int64),
        ids=torch.empty(rows, k, dtype=torch.int64),
        logprobs=torch.empty(rows, k, dtype=dtype),
        tail_logprob=torch.empty(rows, dtype=dtype),
        log_z=torch.empty(rows, len(temperatures), dtype=dtype),
    )
    candidates = torch.empty(step, 2 * capacity, dtype=dtype)
    running = torch.empty(step, 3 + len(temperatures), dtype=torch.float64)
    widest.open(step)

    def add(begin: int, end: int, first: int, last: int, addresses: dict[str, int]) -> None:
        """Columns ``first`` to ``last`` of some rows."""
        source = products.source(products.columns_of(logits, first, last), None, dtype)
        source.borrow(widest)
        panel = _mapped(source.chunk(begin, end))
        run(
            panel=panel.data_ptr(), stride=panel.stride(0), rows=end - begin, first_column=first, columns=last - first,
            is_last=last == columns, k=k, mass=math.inf if mass is None else mass, temperatures=temperatures,
            capacity=capacity, threads=torch.get_num_threads(), **addresses,
        )

    for begin in range(0, rows, step):
        written = {name: field[begin:].data_ptr() for name, field in result._asdict().items()}
        addresses = written | {"candidates": candidates.data_ptr(), "running": running.data_ptr()}
        for first in range(0, columns, width):
            add(begin, min(begin + step, rows), first, min(first + width, columns), addresses)
    return result
