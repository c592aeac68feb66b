"""Draws in Triton (``triton_kernels.py``), for CUDA and ROCm. Same contract as ``reference.py``.

Nothing here reads from the device. A row that is no distribution gets the id -1.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from kd_kernels import row_launch
from kd_kernels.products import LinearSource, RawRows, Source, row_pitch
from kd_kernels.sampling import config
from kd_kernels.sampling.philox import GROUP
from kd_kernels.sampling.reference import (
    ENTRY_BYTES, Request, RowSamples, RowTargets, TargetRequest, judge_by, write_entries,
)
from kd_kernels.sampling.triton_kernels import (
    N_BOUNDS, N_STATE, certain_kernel, draw_kernel, draw_targets_kernel, filter_kernel, group_sums_kernel,
    head_groups_kernel,
)
from kd_kernels.sampling.triton_residual import residual_kernel

NATIVE = True

ALIGNMENT = 16
"""Groups are counted in multiples of it: Triton then knows that four of them are one load."""

UNFUSED = {"enable_fp_fusion": False}
"""For the compiler: what the contract rounds is rounded."""

SUMMARIES = 6
"""Numbers of 4 bytes that a group has: maximum, three sums, and with filters another maximum and a place in a list."""


def groups_of(columns: int) -> int:
    """Groups of a row, with the empty ones that round their number up."""
    return -(-columns // (GROUP * ALIGNMENT)) * ALIGNMENT


def scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Summaries of the groups, 3 percent of the logits in fp32, and what the filters leave."""
    return 4 * (SUMMARIES * groups_of(columns) + N_BOUNDS.value), 0


class Summaries(NamedTuple):
    """Of the groups of C rows, fp32 ``[C, G]``; see ``triton_kernels.store_groups``."""

    maxima: Tensor
    sums: Tensor
    race_sums: Tensor
    weighted: Tensor


def _summaries(raw: Tensor) -> Summaries:
    count, columns = raw.shape
    return Summaries(*torch.empty(4, count, groups_of(columns), dtype=torch.float32, device=raw.device))


def sample_rows(rows: RawRows, request: Request, out: RowSamples) -> None:
    """Draws and scores a chunk. Bytes: see the kernels."""
    if rows.raw.shape[0]:
        _draw(rows, _summarised(rows, request.inverse, out.lse is not None), request, out)


def picked_scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """As :func:`scratch`, with the copies of :func:`sample_picked`."""
    return 4 * columns + scratch(columns, dtype)[0], 0


def sample_picked(rows: RawRows, picked: Tensor, request: Request, out: RowSamples) -> None:
    """The same for those ``picked`` (int64 ``[R]``) of a chunk alone."""
    sample_rows(rows.picked(picked), request, out)


def _summarised(rows: RawRows, inverse: Tensor, stats: bool) -> Summaries:
    raw, groups = rows.raw, _summaries(rows.raw)
    count, n_groups = groups.maxima.shape
    launch = config.group_launch(raw.shape[1], row_launch.lanes_per_warp())
    n_blocks = -(-n_groups * GROUP // launch.block)
    group_sums_kernel[(count * n_blocks,)](
        raw, _or(rows.bias, groups.maxima), inverse, *groups, raw.stride(0), raw.shape[1],
        row_launch.readable_columns(raw), n_groups, n_blocks, int(rows.bias is not None), *rows.factor_and_height(),
        STATS=stats, BLOCK=launch.block, num_warps=launch.num_warps, **UNFUSED,
    )
    return groups


def fuses(source: Source, count: int) -> bool:
    """Whether :func:`sample_head` takes chunks of so many rows: few, and of a head in half precision."""
    if not isinstance(source, LinearSource) or count > config.MAX_FUSED_ROWS:
        return False
    dtype, hidden = source.head.weight.dtype, source.linear.hidden
    is_half = dtype in (torch.bfloat16, torch.float16) and (source.head.autocast or hidden.dtype) == dtype
    return is_half and source.head.weight.stride(1) == 1 and source.head.precision == "float32"


def sample_head(source: LinearSource, begin: int, end: int, request: Request, out: RowSamples) -> None:
    """The same for rows ``begin`` to ``end`` of a head, product and all: the weights are read once."""
    hidden, weight = source.hidden(begin, end).contiguous(), source.head.weight
    products = source.scratch[: end - begin, : source.columns]
    rows = RawRows(products, source.bias, source.linear.scale, source.linear.softcap)
    groups, launch = _summaries(rows.raw), config.fused_launch(end - begin, row_launch.lanes_per_warp())
    head_groups_kernel[(groups.maxima.shape[1],)](
        hidden, weight, rows.raw, _or(rows.bias, groups.maxima), request.inverse, *groups, hidden.stride(0),
        weight.stride(0), rows.raw.stride(0), end - begin, source.columns, hidden.shape[1], groups.maxima.shape[1],
        int(rows.bias is not None), *rows.factor_and_height(), STATS=out.lse is not None, ROWS=launch.rows,
        DEPTH=launch.depth, num_warps=launch.num_warps, num_stages=launch.num_stages, **UNFUSED,
    )
    _draw(rows, groups, request, out)


class Cut(NamedTuple):
    """What the filters leave of C rows."""

    is_filtered: bool
    maxima: Tensor  # fp32 [C, G], of what is left of each group
    sums: Tensor  # likewise
    bounds: Tensor  # int32 [C, N_BOUNDS], not to be read where nothing is filtered


def _cut(rows: RawRows, groups: Summaries, request: Request) -> Cut:
    raw, filters = rows.raw, (request.top_k, request.top_p, request.min_p)
    if all(x is None for x in filters):
        return Cut(False, groups.maxima, groups.race_sums, request.seeds.view(torch.int32))
    (count, n_groups), warp_size = groups.maxima.shape, row_launch.lanes_per_warp()
    # What a kernel is told not to follow still has the type of what it might: branches are compiled either way.
    no_ids, no_numbers = request.seeds, request.seeds.view(torch.float64)
    left, listed = torch.empty_like(groups.maxima), torch.empty_like(groups.maxima, dtype=torch.int32)
    bounds = torch.empty(count, N_BOUNDS.value, dtype=torch.int32, device=raw.device)
    filter_kernel[(count,)](
        raw, _or(rows.bias, groups.maxima), request.inverse, _or(request.top_k, no_ids),
        _or(request.top_p, no_numbers), _or(request.min_p, no_numbers), groups.maxima, left, groups.race_sums, listed,
        bounds, raw.stride(0), raw.shape[1], n_groups, int(rows.bias is not None),
        *(int(x is not None) for x in filters), *rows.factor_and_height(),
        BLOCK=config.race_launch(n_groups, warp_size).block, MEMBERS=config.MEMBERS,
        num_warps=config.MEMBERS // (8 * warp_size), **UNFUSED,
    )
    return Cut(True, left, groups.race_sums, bounds)


def _draw(rows: RawRows, groups: Summaries, request: Request, out: RowSamples) -> None:
    raw, (maxima, sums, _, weighted) = rows.raw, groups
    count, n_groups = maxima.shape
    cut, launch = _cut(rows, groups, request), config.draw_launch(n_groups, row_launch.lanes_per_warp())
    draw_kernel[(count,)](
        raw, _or(rows.bias, maxima), request.seeds, request.keys, request.positions, request.inverse,
        _or(request.given, request.seeds), _or(request.min_p, request.seeds.view(torch.float64)), maxima, sums,
        weighted, cut.maxima, cut.sums, cut.bounds, out.ids, out.logprobs, out.model_logprobs,
        _or(out.entropy, maxima), _or(out.lse, maxima), raw.stride(0), raw.shape[1], n_groups, request.race,
        int(rows.bias is not None), int(request.given is not None), int(request.min_p is not None),
        *rows.factor_and_height(), FILTERED=cut.is_filtered, STATS=out.lse is not None, BLOCK=launch.block,
        num_warps=launch.num_warps, **UNFUSED,
    )


def judge_scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """As :func:`scratch`: copies of refused rows, what is left of the teacher's, and summaries of all three."""
    return 3 * (4 * columns + scratch(columns, dtype)[0]), 0


def residual(teacher: RawRows, student: RawRows, teacher_request: Request, student_request: Request) -> Tensor:
    """Logits fp32 ``[R, V]`` of what is left of the teacher."""
    p_groups, q_groups = (
        _summarised(rows, request.inverse, stats=False)
        for rows, request in ((teacher, teacher_request), (student, student_request))
    )
    p_cut, q_cut = _cut(teacher, p_groups, teacher_request), _cut(student, q_groups, student_request)
    (count, columns), n_groups = teacher.raw.shape, p_groups.maxima.shape[1]
    pitch = row_pitch(columns, torch.float32, teacher.raw.device)
    left = torch.empty(count, pitch, dtype=torch.float32, device=teacher.raw.device)[:, :columns]
    no_numbers, launch = teacher_request.seeds.view(torch.float64), config.residual_launch(row_launch.lanes_per_warp())
    residual_kernel[(count,)](
        teacher.raw, student.raw, _or(teacher.bias, p_groups.maxima), _or(student.bias, q_groups.maxima),
        teacher_request.inverse, student_request.inverse, p_groups.maxima, q_groups.maxima, p_cut.bounds, q_cut.bounds,
        _or(teacher_request.min_p, no_numbers), _or(student_request.min_p, no_numbers), left, teacher.raw.stride(0),
        student.raw.stride(0), left.stride(0), columns, row_launch.readable_columns(teacher.raw, student.raw), n_groups,
        int(teacher.bias is not None), int(student.bias is not None), int(teacher_request.min_p is not None),
        int(student_request.min_p is not None), *teacher.factor_and_height(), *student.factor_and_height(),
        TEACHER_FILTERED=p_cut.is_filtered, STUDENT_FILTERED=q_cut.is_filtered, BLOCK=launch.block, **launch.options,
        **UNFUSED,
    )
    return left


judge_rows = functools.partial(judge_by, sample_rows, residual)


def target_scratch(columns: int, request: TargetRequest, dtype: torch.dtype) -> tuple[int, int]:
    """Summaries of the groups, lists of them with running sums, and the draws."""
    of_groups = (4 * SUMMARIES + 8) * groups_of(columns)
    return of_groups + ENTRY_BYTES * (request.draws + request.certain) + 8 * (N_STATE.value + N_BOUNDS.value), 0


def target_rows(rows: RawRows, request: TargetRequest, out: RowTargets) -> None:
    """Draws and counts for a chunk. Bytes: see the kernels."""
    raw, warp_size = rows.raw, row_launch.lanes_per_warp()
    count, columns = raw.shape
    if count == 0:
        return
    new = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device=raw.device)  # noqa: E731
    inverse = torch.full((count,), request.inverse, dtype=torch.float32, device=raw.device)
    maxima, sums, left_sums, _ = _summarised(rows, inverse, stats=False)
    n_groups, width = maxima.shape[1], request.certain + request.draws
    ids, logits = new(count, width, dtype=torch.int64), new(count, width, dtype=torch.float32)
    listed, bounds = new(count, n_groups, dtype=torch.int32), new(count, N_BOUNDS.value, dtype=torch.int32)
    state = new(count, N_STATE.value, dtype=torch.float64)
    bias, has_bias, logits_map = _or(rows.bias, maxima), int(rows.bias is not None), rows.factor_and_height()
    left_maxima, launch = maxima, config.race_launch(n_groups, warp_size)
    if request.certain:
        left_maxima = torch.empty_like(maxima)
        certain_kernel[(count,)](
            raw, bias, inverse, maxima, left_maxima, left_sums, listed, bounds, ids, logits, raw.stride(0), columns,
            n_groups, request.certain, width, has_bias, *logits_map, BLOCK=launch.block, MEMBERS=config.MEMBERS,
            **config.members_launch(warp_size).options, **UNFUSED,
        )
    draw_targets_kernel[(count,)](
        raw, bias, request.seeds, request.keys, request.positions, inverse, maxima, sums, left_maxima, left_sums,
        listed, new(count, n_groups, dtype=torch.float64), bounds, ids, logits, state, raw.stride(0), columns, n_groups,
        n_groups.bit_length(), request.draws, request.certain, width, has_bias, *logits_map,
        CERTAIN=request.certain > 0,
        BLOCK=launch.block, DRAWS=config.DRAWS, num_warps=config.DRAWS * GROUP // (8 * warp_size), **UNFUSED,
    )
    top, mass, peak, total = state.split(1, 1)
    is_whole = ((total > 0) & (total < torch.inf))[:, 0]
    write_entries(ids, logits, top, mass, peak.float(), total.log(), is_whole, request, out)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """``x``, or some memory, not to be read."""
    return other if x is None else x
