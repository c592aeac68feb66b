"""From a noun and an id a row to statistics: the walk over chunks of rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kd_kernels import products
from kd_kernels.logits import Logits, vocab
from kd_kernels.products import RawRows, Source
from kd_kernels.stats.reference import RowStats

IMPLEMENTATIONS = {"reference": "reference", "cpp": "cpp_impl", "triton": "triton_impl"}
"""By backend, the module with its ``stat_rows``; imported when the backend first runs."""


def implementation(backend: str) -> ModuleType:
    return importlib.import_module(f"kd_kernels.stats.{IMPLEMENTATIONS[backend]}")


def empty(logits: list[Tensor], count: int) -> RowStats:
    dtype = products.work_dtype(*logits)
    return RowStats(*(logits[0].new_empty(count, dtype=d) for d in (dtype,) * 4 + (torch.int64,) * 2))


def walk(
    where: str, noun: Logits, ids: Tensor, *, autocast: torch.dtype | None, max_scratch_bytes: int | None, backend: str,
    check_source: Callable[[Source], None] = lambda source: None,
    each_chunk: Callable[[RowStats, int, RawRows], None] | None = None, each_scratch: tuple[int, int] = (0, 0),
) -> RowStats:
    """Statistics of all rows of a noun with one leading dimension.

    ``check_source`` comes before anything is allocated; ``each_chunk`` sees of each chunk the statistics, the number
    of its first row, and the logits; it may take ``each_scratch`` bytes: a row, and for any number of rows.
    """
    ids, count, columns = ids.contiguous(), ids.shape[0], vocab(noun)
    tensors = products.tensors_of(noun)
    dtype = products.work_dtype(*tensors)
    with torch.autocast(ids.device.type, enabled=False):
        rows_of = implementation(backend)
        rows = products.source(noun, None, dtype, autocast=autocast, native=rows_of.NATIVE)
        own_bytes_per_row, own_fixed_bytes = rows_of.scratch(columns, dtype)
        check_source(rows)
        out = empty(tensors, count)
        for here, (chunk,) in products.chunks_of(
            where, [rows], count, own_bytes_per_row + each_scratch[0], own_fixed_bytes + each_scratch[1],
            max_scratch_bytes, ids.device,
        ):
            part = RowStats(*(field[here] for field in out))
            rows_of.stat_rows(chunk, ids[here], part)
            if each_chunk is not None:
                each_chunk(part, here.start, chunk)
    return out
