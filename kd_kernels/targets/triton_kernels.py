"""The kernels of ``topk_targets``. A row of logits is read once; what follows works on summaries that are far smaller.

Columns are taken in groups of S adjacent ones, and each group is summarised by its maximum and its sum of exponentials.
The k largest logits of a row lie in the k groups with the largest maxima, ties to the lower index: a logit outside of
them is beaten by the maximum of each of the k, or equals it and has a higher id. So the same selection runs twice: k
groups out of V / S, then k logits out of the k S in those groups. What is not selected joins the tail, a group by its
sum: nothing is ever taken away from a sum, so the tail keeps all its digits however little mass it has.
"""

import triton
import triton.language as tl

from kd_kernels.triton_rows import (
    LARGEST_KEY, LOWEST, exp, finite_or_zero, keys_of, load_block, load_candidates,
)

INFINITE = tl.constexpr(-1)
NOT_A_NUMBER = tl.constexpr(-2)
# Instead of a number of entries, as in truncated.py.

N_STATE = tl.constexpr(6)
# A row's state: its maximum M and sum of exp(z - M); then peak and sum, relative to M, of the groups that were left
# out, and of the candidates that were.


@triton.jit(do_not_specialize=["n_columns", "n_further", "n_blocks", "has_bias"])
def group_kernel(
    raw_ptr,  # [C, V], any float dtype
    bias_ptr,  # [V] fp32
    inverses_ptr,  # [T] fp32: 1 / temperature, of those beyond 1
    maxima_ptr,  # [C, G] fp32
    sums_ptr,  # [C, 1 + T, G] fp32
    stride, n_columns, n_readable, n_groups, n_further, n_blocks, has_bias, factor, height,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):
    """Maximum m of every group, and its sums of ``exp((z - m) / temperature)``. Moves V (s + 4 (2 + T) / S) bytes a
    row, s those of a logit. G is a multiple of 16, so that all rows are aligned: the groups past V have a maximum of
    -inf, which loses every tie."""
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    first = tl.program_id(0) % n_blocks * (BLOCK // GROUP)
    o_g = first + tl.arange(0, BLOCK // GROUP)
    o_v = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    end = first * GROUP + BLOCK
    z = load_block(raw_ptr + row * stride, bias_ptr, has_bias, o_v, end, n_columns, n_readable, factor, height)
    maximum = tl.max(z, 1)
    below = z - finite_or_zero(maximum)[:, None]
    tl.store(maxima_ptr + row * n_groups + o_g, maximum, mask=o_g < n_groups)
    sums_row = sums_ptr + row * (1 + n_further) * n_groups
    tl.store(sums_row + o_g, tl.sum(exp(below), 1), mask=o_g < n_groups)
    for t in range(0, n_further):
        tempered = tl.sum(exp(below * tl.load(inverses_ptr + t)), 1)
        tl.store(sums_row + (t + 1) * n_groups + o_g, tempered, mask=o_g < n_groups)


@triton.jit
def bracket_kth(
    row_ptr, bias_ptr, has_bias, parents_ptr, n, n_columns, factor, height, k, GROUP: tl.constexpr, TILE: tl.constexpr,
):
    """Keys ``low <= high``, and how many candidates have one above ``high``: fewer than k, while at least k have one of
    at least ``low``. If more than k have, ``low`` is ``high``, and those that have it are equal.

    Bisection over the keys. The first TILE of them stay in registers, others are read from cache at each of at most 32
    steps. Only integers are compared, so this holds for any bits, NaN included."""
    o_t = tl.arange(0, TILE)
    z, _, mask = load_candidates(row_ptr, bias_ptr, has_bias, parents_ptr, o_t, n, n_columns, factor, height, GROUP)
    keys = keys_of(z, mask)
    low, high = tl.min(tl.where(mask, keys, LARGEST_KEY), 0), tl.max(keys, 0)
    n_low, n_above = tl.sum(mask.to(tl.int32), 0), tl.full([], 0, tl.int32)
    for begin in range(TILE, n, TILE):
        z, _, mask = load_candidates(
            row_ptr, bias_ptr, has_bias, parents_ptr, begin + o_t, n, n_columns, factor, height, GROUP
        )
        others = keys_of(z, mask)
        low = tl.minimum(low, tl.min(tl.where(mask, others, LARGEST_KEY), 0))
        high = tl.maximum(high, tl.max(others, 0))
        n_low += tl.sum(mask.to(tl.int32), 0)
    while (low < high) & (n_low != k):
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down; the sum would overflow
        n_beyond = tl.sum((keys > middle).to(tl.int32), 0)
        for begin in range(TILE, n, TILE):
            z, _, mask = load_candidates(
                row_ptr, bias_ptr, has_bias, parents_ptr, begin + o_t, n, n_columns, factor, height, GROUP
            )
            n_beyond += tl.sum((keys_of(z, mask) > middle).to(tl.int32), 0)
        enough = n_beyond >= k
        low, n_low = tl.where(enough, middle + 1, low), tl.where(enough, n_beyond, n_low)
        high, n_above = tl.where(enough, high, middle), tl.where(enough, n_above, n_beyond)
    return low, high, n_above


@triton.jit
def select(
    row_ptr, bias_ptr, has_bias, parents_ptr, sums_ptr, n, n_columns, factor, height, k, reference, columns_ptr,
    values_ptr, GROUP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write the columns of the k largest candidates, the lower ones among equals, rising; with GROUP also their values.
    Returns the maximum of the others, and their sum of exponentials relative to it, both relative to ``reference``.

    A candidate that is a group (GROUP 0) weighs as much as its sum says."""
    low, high, n_above = bracket_kth(
        row_ptr, bias_ptr, has_bias, parents_ptr, n, n_columns, factor, height, k, GROUP, TILE
    )
    o_b = tl.arange(0, BLOCK)
    wanted = k - n_above  # of those between low and high
    above_before, between_before = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    peak, total = tl.full([BLOCK], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in range(0, n, BLOCK):
        o_n = begin + o_b
        z, columns, mask = load_candidates(
            row_ptr, bias_ptr, has_bias, parents_ptr, o_n, n, n_columns, factor, height, GROUP
        )
        keys = keys_of(z, mask)
        is_above = mask & (keys > high)
        is_between = mask & (keys >= low) & (keys <= high)
        above = above_before + tl.cumsum(is_above.to(tl.int32), 0)
        between = between_before + tl.cumsum(is_between.to(tl.int32), 0)
        is_kept = is_above | (is_between & (between <= wanted))
        place = above + tl.minimum(between, wanted) - 1
        tl.store(columns_ptr + place, columns, mask=is_kept)
        weight = 1.0
        if GROUP == 0:
            weight = tl.load(sums_ptr + o_n, mask=mask & ~is_kept, other=0.0)
        else:
            tl.store(values_ptr + place, tl.where(z == 0, 0.0, z), mask=is_kept)  # no -0: a sort might put it below 0
        below = tl.where(is_kept, -float("inf"), z - reference)
        higher = tl.maximum(peak, below)
        peak, total = higher, total * exp(peak - higher) + weight * exp(below - higher)
        above_before += tl.sum(is_above.to(tl.int32), 0)
        between_before += tl.sum(is_between.to(tl.int32), 0)
    top = tl.max(peak, 0)
    return top, tl.sum(total * exp(peak - top), 0)


@triton.jit(do_not_specialize=["n_further", "k"])
def select_groups_kernel(
    maxima_ptr,  # [C, G] fp32
    sums_ptr,  # [C, 1 + T, G] fp32
    inverses_ptr,  # [T] fp32
    groups_ptr,  # [C, k] int32
    state_ptr,  # [C, 6] fp32
    log_z_ptr,  # [C, T] fp32
    n_groups, n_further, k, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    """The k groups in which the largest logits are, and the row's normalisers. Moves 4 G (3 + T) + 4 k bytes a row from
    and to memory; the rest comes from cache."""
    row = tl.program_id(0).to(tl.int64)
    maxima_row, sums_row = maxima_ptr + row * n_groups, sums_ptr + row * (1 + n_further) * n_groups
    o_b = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    for begin in range(0, n_groups, BLOCK):
        o_g = begin + o_b
        largest = tl.maximum(largest, tl.load(maxima_row + o_g, mask=o_g < n_groups, other=-float("inf")))
    peak = tl.max(largest, 0)
    reference = finite_or_zero(peak)
    sums = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, n_groups, BLOCK):
        o_g = begin + o_b
        below = tl.load(maxima_row + o_g, mask=o_g < n_groups, other=-float("inf")) - reference
        sums += tl.load(sums_row + o_g, mask=o_g < n_groups, other=0.0) * exp(below)
    total = tl.sum(sums, 0)
    tail_peak, tail_total = select(
        maxima_row, maxima_row, 0, groups_ptr, sums_row, n_groups, n_groups, 1.0, 0.0, k, reference,
        groups_ptr + row * k, maxima_row, 0, TILE, BLOCK,
    )
    state_row = state_ptr + row * N_STATE
    tl.store(state_row, peak)
    tl.store(state_row + 1, total)
    tl.store(state_row + 2, tail_peak)
    tl.store(state_row + 3, tail_total)
    for t in range(0, n_further):
        inverse = tl.load(inverses_ptr + t)
        sums = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, n_groups, BLOCK):
            o_g = begin + o_b
            below = tl.load(maxima_row + o_g, mask=o_g < n_groups, other=-float("inf")) - reference
            tempered = tl.load(sums_row + (t + 1) * n_groups + o_g, mask=o_g < n_groups, other=0.0)
            sums += tempered * exp(below * inverse)
        tl.store(log_z_ptr + row * n_further + t, tl.log(tl.sum(sums, 0)) - tl.log(total) * inverse)


@triton.jit(do_not_specialize=["n_parents", "k", "has_bias"])
def select_logits_kernel(
    raw_ptr,  # [C, V], any float dtype
    bias_ptr,  # [V] fp32
    groups_ptr,  # [C, P] int32
    state_ptr,  # [C, 6] fp32
    columns_ptr,  # [C, k] int32
    values_ptr,  # [C, k] fp32
    stride, n_columns, n_parents, k, has_bias, factor, height,
    GROUP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    """The k largest logits of the groups that were selected, by rising id. Moves P S s + 8 k bytes a row from and to
    memory, s those of a logit; the rest comes from cache."""
    row = tl.program_id(0).to(tl.int64)
    state_row, groups_row = state_ptr + row * N_STATE, groups_ptr + row * n_parents
    tail_peak, tail_total = select(
        raw_ptr + row * stride, bias_ptr, has_bias, groups_row, state_row, n_parents * GROUP, n_columns, factor, height,
        k, finite_or_zero(tl.load(state_row)), columns_ptr + row * k, values_ptr + row * k, GROUP, TILE, BLOCK,
    )
    tl.store(state_row + 4, tail_peak)
    tl.store(state_row + 5, tail_total)


@triton.jit(do_not_specialize=["k"])
def write_targets_kernel(
    values_ptr,  # [C, k] fp32, falling
    places_ptr,  # [C, k] int64: where in columns_ptr a value's column is
    columns_ptr,  # [C, k] int32
    state_ptr,  # [C, 6] fp32
    counts_ptr,  # [C] int64
    ids_ptr,  # [C, k] int64
    logprobs_ptr,  # [C, k] fp32
    tail_ptr,  # [C] fp32
    k, mass, BLOCK: tl.constexpr,
):
    """Entries in their order, cut to the shortest prefix that has ``mass``, and the tail. Moves 28 k bytes a row."""
    row = tl.program_id(0).to(tl.int64)
    values_row, state_row = values_ptr + row * k, state_ptr + row * N_STATE
    largest, sum_all = tl.load(state_row), tl.load(state_row + 1)
    reference, log_sum = finite_or_zero(largest), tl.log(sum_all)
    o_b = tl.arange(0, BLOCK)
    count, mass_before = tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float32)
    for begin in range(0, k, BLOCK):
        z = tl.load(values_row + begin + o_b, mask=begin + o_b < k, other=-float("inf"))
        p = exp((z - reference) - log_sum)
        reached = mass_before + (tl.cumsum(p, 0) - p)
        count += tl.sum(((z > -float("inf")) & (reached < mass)).to(tl.int32), 0)
        mass_before += tl.sum(p, 0)

    peak, total = tl.full([BLOCK], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in range(0, k, BLOCK):
        o_k = begin + o_b
        below = tl.load(values_row + o_k, mask=o_k < k, other=-float("inf")) - reference
        place = tl.load(places_ptr + row * k + o_k, mask=o_k < k, other=0)
        ids = tl.load(columns_ptr + row * k + place, mask=o_k < k, other=0)
        tl.store(ids_ptr + row * k + o_k, ids.to(tl.int64), mask=o_k < k)
        tl.store(logprobs_ptr + row * k + o_k, below - log_sum, mask=o_k < k)
        below = tl.where(o_k < count, -float("inf"), below)
        higher = tl.maximum(peak, below)
        peak, total = higher, total * exp(peak - higher) + exp(below - higher)
    cut = tl.max(peak, 0)
    of_groups, of_candidates = tl.load(state_row + 2), tl.load(state_row + 4)
    top = tl.maximum(cut, tl.maximum(of_groups, of_candidates))
    tail = tl.sum(total * exp(peak - top), 0)
    tail += tl.load(state_row + 3) * exp(of_groups - top) + tl.load(state_row + 5) * exp(of_candidates - top)
    tl.store(tail_ptr + row, tl.minimum((top + tl.log(tail)) - log_sum, 0.0))
    fault = tl.where(sum_all == 0, 0, tl.where(largest == float("inf"), INFINITE, NOT_A_NUMBER))
    tl.store(counts_ptr + row, tl.where((sum_all > 0) & (sum_all < float("inf")), count, fault).to(tl.int64))
