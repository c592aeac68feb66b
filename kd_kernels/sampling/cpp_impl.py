"""Draws on the CPU (``csrc/cpu/sampling.cpp``). Same contract as ``reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels import products
from kd_kernels._backend import extension
from kd_kernels.logits import Logits, vocab
from kd_kernels.products import RawRows
from kd_kernels.sampling.reference import Request, RowSamples, RowTargets, TargetRequest, Verdicts

NATIVE = False
PRECISIONS = {torch.float32: "fp32", torch.float64: "fp64"}


def scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of each thread: the logits where the head has a map; a masked copy, weights and the ids near the cut where there
    are filters."""
    return 0, torch.get_num_threads() * columns * (3 * dtype.itemsize + 24)


def sample_rows(rows: RawRows, request: Request, out: RowSamples) -> None:
    """Draws and scores a chunk of whole rows. Bytes: reads C V elements of the work dtype; with top_p once more for
    every time that a bracket of its cut is halved."""
    _run(rows, request, out, rows.raw.shape[1])


picked_scratch = scratch
"""Of :func:`sample_picked`."""


def sample_picked(rows: RawRows, picked: Tensor, request: Request, out: RowSamples) -> None:
    """The same for those ``picked`` (int64 ``[R]``) of the chunk alone, where they are."""
    _run(rows, request, out, rows.raw.shape[1], picked=picked)


def sample_panels(
    where: str, noun: Logits, dtype: torch.dtype, autocast: torch.dtype | None, max_scratch_bytes: int | None,
    request: Request, out: RowSamples,
) -> None:
    """Draws and scores the rows of a noun, without filters, panel by panel: a product is still in cache when it is
    read, and memory for whole rows of logits need not be got from the system."""
    columns, count = vocab(noun), out.ids.shape[0]
    is_whole = isinstance(noun, Tensor) or products.needs_whole_rows(noun)
    width = columns if is_whole else products.panel_columns(count, columns)
    row_bytes = getattr(extension(), "sample_bytes_" + PRECISIONS[dtype])
    panel = lambda first, last: products.source(  # noqa: E731
        products.columns_of(noun, first, last), None, dtype, autocast=autocast
    )
    widest = panel(0, width)
    fitting = products.rows_per_chunk(
        where, count, widest.bytes_per_row + row_bytes,
        widest.fixed_bytes + torch.get_num_threads() * width * dtype.itemsize, max_scratch_bytes, noun.device,
    )
    step = products.panel_rows(count, fitting)
    widest.open(step)
    running = torch.empty(step * row_bytes, dtype=torch.uint8)
    for begin in range(0, count, step):
        here = slice(begin, min(begin + step, count))
        part, part_out = (request, out) if step >= count else (request.of(here), out.of(here))
        for first in range(0, columns, width):
            rows = widest
            if first > 0:
                rows = panel(first, min(first + width, columns))
                rows.borrow(widest)
            _run(rows.chunk(begin, here.stop), part, part_out, columns, first, running)


def _run(
    rows: RawRows, request: Request, out: RowSamples, vocab: int, first_column: int = 0, running: Tensor | None = None,
    picked: Tensor | None = None,
) -> None:
    run = getattr(extension(), "sample_" + PRECISIONS[rows.raw.dtype])
    tensors = out._asdict() | {"running": running, "picked": picked}
    run(
        logits=rows.addresses(), rows=out.ids.shape[0], vocab=vocab, first_column=first_column,
        columns=rows.raw.shape[1], race=request.race, places=_places(request), warp=_warp(request),
        threads=torch.get_num_threads(), **_addresses(tensors),
    )


def judge_scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """As :func:`scratch`: for both rows, and what is left of the teacher's."""
    return 0, 2 * scratch(columns, dtype)[1] + torch.get_num_threads() * columns * dtype.itemsize


def judge_rows(
    teacher: RawRows, student: RawRows, drafts: Tensor, teacher_request: Request, student_request: Request,
    out: Verdicts,
) -> None:
    """Speculative sampling of a chunk: tests drafts (int64 ``[C]``) and replaces those that are refused. Bytes: reads
    C V elements of the work dtype of either, and those of refused rows twice more."""
    run = getattr(extension(), "judge_" + PRECISIONS[teacher.raw.dtype])
    run(
        teacher=teacher.addresses(), student=student.addresses(), rows=len(drafts), vocab=teacher.raw.shape[1],
        places=_places(teacher_request), teacher_warp=_warp(teacher_request), student_warp=_warp(student_request),
        threads=torch.get_num_threads(), **_addresses(out._asdict() | {"drafts": drafts}),
    )


def target_scratch(columns: int, request: TargetRequest, dtype: torch.dtype) -> tuple[int, int]:
    """Of each thread: logits where the head has a map, a copy without the certain ids, the draws and the entries."""
    entries = 24 * (min(columns, 2 * request.certain) + request.draws)
    return 0, torch.get_num_threads() * (2 * columns * dtype.itemsize + entries + columns)


def target_rows(rows: RawRows, request: TargetRequest, out: RowTargets) -> None:
    """Draws and counts for a chunk. Bytes: reads C V elements of the work dtype, twice unless rows are the proposal."""
    run = getattr(extension(), "sampled_targets_" + PRECISIONS[rows.raw.dtype])
    run(
        logits=rows.addresses(), rows=rows.raw.shape[0], vocab=rows.raw.shape[1], width=out.ids.shape[1],
        places=_places(request), inverse=request.inverse, draws=request.draws, certain=request.certain,
        threads=torch.get_num_threads(), **_addresses(out._asdict()),
    )


def _places(request: Request | TargetRequest) -> tuple[int, ...]:
    return tuple(map(_address, (request.seeds, request.keys, request.positions)))


def _warp(request: Request) -> tuple[int, ...]:
    return tuple(map(_address, (request.inverse, request.top_k, request.top_p, request.min_p)))


def _addresses(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    return {name: _address(x) for name, x in tensors.items()}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
