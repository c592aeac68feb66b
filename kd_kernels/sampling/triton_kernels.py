"""The draws of ``DRAWS.md`` as Triton kernels. A row of logits is read once; the race is between summaries.

First pass, over all of a chunk: each vocabulary group's maximum and sums (of few rows, with the head's product).
Second, only where there are filters: the key of the last logit that stays, and the sums of what is left. Third, a
program a row: the race between the groups, the pick inside of the one that won, and the numbers that go with it. Only
the group that won is looked at again.

What the contract rounds to fp32 is rounded, so multiplications and additions must not be fused
(``enable_fp_fusion=False``).
"""

import triton
import triton.language as tl

from kd_kernels.triton_rows import (
    LARGEST_KEY, LEAST_KEY, exp, finite_or_zero, join_argmax, keys_of, load_block, load_candidates, load_logits,
)

GROUP = tl.constexpr(128)
"""Ids of the vocabulary that share one word of the race."""

SLICE = tl.constexpr(16)
"""Rows whose groups are summarised together, after a product of few rows."""

N_BOUNDS = tl.constexpr(2)
# What the filters leave of a row: logits with a key above the first number, and those with just that key up to the
# second id.

N_STATE = tl.constexpr(4)
# Of a row that is drawn from with replacement, see draw_targets_kernel.

MOST_IDS = tl.constexpr(1 << 24)

TARGETS = tl.constexpr(2)
"""The purpose of the words of sampled_targets."""


# ---------------------------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def add_by_halves(t):
    """``[G, 128]`` to ``[G]`` in the contract's order: 64 sums of two, 32 of those, and so on."""
    for _ in tl.static_range(7):
        t = tl.sum(tl.reshape(t, [t.shape[0], 2, t.shape[1] // 2]), 1)
    return tl.reshape(t, [t.shape[0]])


@triton.jit
def safe_inverse(inverse_ptr, row):
    """1 / T of the row as a number to multiply by; whether T is 0; whether it is a temperature."""
    inverse = tl.load(inverse_ptr + row)
    is_greedy, is_valid = inverse == float("inf"), inverse == inverse
    return tl.where(is_valid & (inverse < float("inf")), inverse, 1.0), is_greedy, is_valid


@triton.jit
def store_groups(
    z, at, mask, maxima_ptr, sums_ptr, race_sums_ptr, weighted_ptr, inverse, is_tempered, STATS: tl.constexpr,
):
    """Of logits ``[G, 128]``: maximum m; sums of ``exp(z - m)``, of ``exp((z - m) / T)``, of ``exp(z - m) (z - m)``."""
    maximum = tl.max(z, 1)
    below = z - finite_or_zero(maximum)[:, None]
    share = exp(below)
    total = add_by_halves(share)
    tl.store(maxima_ptr + at, maximum, mask=mask)
    tl.store(sums_ptr + at, total, mask=mask)
    if is_tempered:
        total = add_by_halves(exp(below * inverse))
    tl.store(race_sums_ptr + at, total, mask=mask)
    if STATS:
        weighted = tl.sum(share * tl.maximum(below, -1e30), 1)
        tl.store(weighted_ptr + at, weighted, mask=mask)


@triton.jit(do_not_specialize=["n_columns", "n_blocks", "has_bias"])
def group_sums_kernel(
    raw_ptr,  # [C, V], any float dtype
    bias_ptr,  # [V] fp32
    inverse_ptr,  # [C] fp32
    maxima_ptr,  # [C, G] fp32
    sums_ptr,  # [C, G] fp32
    race_sums_ptr,  # [C, G] fp32
    weighted_ptr,  # [C, G] fp32
    stride, n_columns, n_readable, n_groups, n_blocks, has_bias, factor, height,
    STATS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Summaries of the groups. Moves V s + 12 G bytes a row (16 G with STATS), s those of a logit. G is a multiple of
    16, so that all rows are aligned: groups past V are empty."""
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    first = tl.program_id(0) % n_blocks * (BLOCK // GROUP)
    o_g = first + tl.arange(0, BLOCK // GROUP)
    o_v = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inverse, is_greedy, is_valid = safe_inverse(inverse_ptr, row)
    end = first * GROUP + BLOCK
    z = load_block(raw_ptr + row * stride, bias_ptr, has_bias, o_v, end, n_columns, n_readable, factor, height)
    store_groups(
        z, row * n_groups + o_g, o_g < n_groups, maxima_ptr, sums_ptr, race_sums_ptr, weighted_ptr, inverse,
        inverse != 1.0, STATS,
    )


@triton.jit(do_not_specialize=["n_rows", "n_columns", "has_bias"])
def head_groups_kernel(
    hidden_ptr,  # [C, H] bf16 or fp16
    weight_ptr,  # [V, H] bf16 or fp16
    raw_ptr,  # [C, V] fp32: out
    bias_ptr,  # [V] fp32
    inverse_ptr,  # [C] fp32
    maxima_ptr,  # [C, G] fp32
    sums_ptr,  # [C, G] fp32
    race_sums_ptr,  # [C, G] fp32
    weighted_ptr,  # [C, G] fp32
    hidden_stride, weight_stride, stride, n_rows, n_columns, n_hidden, n_groups, has_bias, factor, height,
    STATS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):
    """The head's product for up to ROWS rows, and the summaries of the one group that this program has of each. Moves
    2 V H bytes of weights, once, 4 C V of products, which it and what follows find in cache, and 12 G a row."""
    group = tl.program_id(0).to(tl.int64)
    o_j, o_r, o_h = tl.arange(0, GROUP), tl.arange(0, ROWS), tl.arange(0, DEPTH)
    exists, is_row = group * GROUP + o_j < n_columns, o_r < n_rows
    weight_tile = weight_ptr + group * GROUP * weight_stride + o_j[:, None] * weight_stride
    hidden_tile = hidden_ptr + o_r[None, :] * hidden_stride
    products = tl.zeros([GROUP, ROWS], tl.float32)
    for begin in range(0, n_hidden, DEPTH):
        inside = begin + o_h < n_hidden
        weight = tl.load(weight_tile + (begin + o_h)[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
        hidden = tl.load(hidden_tile + (begin + o_h)[:, None], mask=inside[:, None] & is_row[None, :], other=0.0)
        products = tl.dot(weight, hidden, products)
    o_v = group * GROUP + o_j
    rows_tile = raw_ptr + o_r[:, None].to(tl.int64) * stride
    tl.store(rows_tile + o_v[None, :], tl.trans(products), mask=is_row[:, None] & exists[None, :])
    # Read again, a few rows at a time: with all of them in its lanes' registers, a program would have a multiprocessor
    # to itself, which would load no weights meanwhile.
    tl.debug_barrier()
    for begin in range(0, n_rows, SLICE):
        o_s = begin + tl.arange(0, SLICE)
        here = o_s < n_rows
        z = load_logits(
            raw_ptr + o_s[:, None].to(tl.int64) * stride, bias_ptr, has_bias, o_v[None, :],
            here[:, None] & exists[None, :], factor, height,
        )
        inverse = tl.load(inverse_ptr + o_s, mask=here, other=1.0)
        inverse = tl.where((inverse == inverse) & (inverse < float("inf")), inverse, 1.0)
        store_groups(
            z, o_s * n_groups + group, here, maxima_ptr, sums_ptr, race_sums_ptr, weighted_ptr, inverse[:, None],
            tl.max((inverse != 1.0).to(tl.int32), 0) > 0, STATS,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Filters
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def logit_of(key):
    """The number that :func:`keys_of` made the key of."""
    return tl.where(key < 0, key ^ LARGEST_KEY, key).to(tl.float32, bitcast=True)


@triton.jit
def stays(z, columns, key, last, floor, peak, inverse):
    """Whether the filters leave the ids ``columns`` in. ``floor`` is log(min_p), compared in fp64."""
    keys = keys_of(z, True)
    tempered = (z.to(tl.float64) - peak.to(tl.float64)) * inverse.to(tl.float64)
    return ((keys > key) | ((keys == key) & (columns <= last))) & (tempered >= floor)


@triton.jit
def largest_of(row_ptr, n, BLOCK: tl.constexpr):
    """Of the first n numbers; -inf if there are none."""
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    for begin in range(0, n, BLOCK):
        o_n = begin + tl.arange(0, BLOCK)
        highest = tl.maximum(highest, tl.load(row_ptr + o_n, mask=o_n < n, other=-float("inf")))
    return tl.max(highest, 0)


@triton.jit
def masses_of(z, peak, inverse):
    """``exp((z - peak) / T)``."""
    return exp((z - peak) * inverse)


@triton.jit
def find_last_key(
    row_ptr, bias_ptr, has_bias, groups_ptr, n, n_columns, factor, height, low, high, wanted, peak, inverse,
    MEMBERS: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr,
):
    """The largest key at which the candidates with at least that key have ``wanted`` together, and what those above it
    have: a mass, or without MASS a number. Between ``low``, which is taken if all have less, and ``high``, above which
    is none.

    Candidates are the members of listed groups, or without MEMBERS the first ``n`` of the row. Bisection, at most 32
    steps."""
    above = tl.full([], 0.0, tl.float64)
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down; the sum would overflow
        beyond = tl.full([], 0.0, tl.float64)
        for begin in range(0, n, BLOCK):
            o_n = begin + tl.arange(0, BLOCK)
            z, columns, mask = load_candidates(
                row_ptr, bias_ptr, has_bias, groups_ptr, o_n, n, n_columns, factor, height, MEMBERS
            )
            counts = keys_of(z, mask) > middle
            if MASS:
                beyond += tl.sum(tl.where(counts, masses_of(z, peak, inverse), 0.0).to(tl.float64), 0)
            else:
                beyond += tl.sum(counts.to(tl.int32), 0).to(tl.float64)
        enough = beyond >= wanted
        low = tl.where(enough, middle + 1, low)
        high, above = tl.where(enough, high, middle), tl.where(enough, above, beyond)
    return low, above


@triton.jit
def list_groups(maxima_row, groups_row, n_groups, from_key, floor, peak, inverse, BLOCK: tl.constexpr):
    """Write the groups whose maximum has at least the key and is not below ``floor``; return how many they are."""
    n_listed = tl.full([], 0, tl.int32)
    for begin in range(0, n_groups, BLOCK):
        o_g = begin + tl.arange(0, BLOCK)
        maximum = tl.load(maxima_row + o_g, mask=o_g < n_groups, other=-float("inf"))
        reaches = stays(maximum, o_g, from_key, MOST_IDS, floor, peak, inverse)
        is_listed = (o_g < n_groups) & (maximum > -float("inf")) & reaches
        place = n_listed + tl.cumsum(is_listed.to(tl.int32), 0) - 1
        tl.store(groups_row + place, o_g, mask=is_listed)
        n_listed += tl.sum(is_listed.to(tl.int32), 0)
    return n_listed


@triton.jit
def id_of_nth_equal(
    row_ptr, bias_ptr, has_bias, groups_ptr, n, n_columns, factor, height, key, wanted, BLOCK: tl.constexpr,
):
    """Of candidates with just this key, by rising id: the id of the n-th; beyond all ids if there are fewer."""
    seen, last = tl.full([], 0, tl.int32), tl.full([], MOST_IDS, tl.int32)
    for begin in range(0, n, BLOCK):
        o_n = begin + tl.arange(0, BLOCK)
        z, columns, mask = load_candidates(
            row_ptr, bias_ptr, has_bias, groups_ptr, o_n, n, n_columns, factor, height, GROUP
        )
        is_equal = mask & (keys_of(z, mask) == key)
        place = seen + tl.cumsum(is_equal.to(tl.int32), 0)
        last = tl.minimum(last, tl.min(tl.where(is_equal & (place == wanted), columns, MOST_IDS), 0))
        seen += tl.sum(is_equal.to(tl.int32), 0)
    return last


@triton.jit
def mass_left(
    row_ptr, bias_ptr, has_bias, groups_ptr, n, n_columns, factor, height, key, last, peak, inverse,
    BLOCK: tl.constexpr,
):
    """What the candidates that top_k leaves have together."""
    mass = tl.full([], 0.0, tl.float64)
    for begin in range(0, n, BLOCK):
        o_n = begin + tl.arange(0, BLOCK)
        z, columns, mask = load_candidates(
            row_ptr, bias_ptr, has_bias, groups_ptr, o_n, n, n_columns, factor, height, GROUP
        )
        left = stays(z, columns, key, last, -float("inf"), peak, inverse)
        mass += tl.sum(tl.where(left, masses_of(z, peak, inverse), 0.0).to(tl.float64), 0)
    return mass


@triton.jit(do_not_specialize=["has_bias", "has_top_k", "has_top_p", "has_min_p"])
def filter_kernel(
    raw_ptr,  # [C, V], any float dtype
    bias_ptr,  # [V] fp32
    inverse_ptr,  # [C] fp32
    top_k_ptr,  # [C] int64
    top_p_ptr,  # [C] fp64
    min_p_ptr,  # [C] fp64
    maxima_ptr,  # [C, G] fp32
    race_maxima_ptr,  # [C, G] fp32
    race_sums_ptr,  # [C, G] fp32: in, of all ids; out, of those that stay
    groups_ptr,  # [C, G] int32 scratch
    bounds_ptr,  # [C, 2] int32
    stride, n_columns, n_groups, has_bias, has_top_k, has_top_p, has_min_p, factor, height,
    BLOCK: tl.constexpr, MEMBERS: tl.constexpr,
):
    """What the filters leave of a row, and the groups' maxima and sums of that. Nothing is sorted: the k-th largest
    logit is no smaller than the k-th largest maximum of a group, and the prefix of a mass ends no lower than the prefix
    of maxima that has it, so only groups from there on are searched, and the search is for a key. Moves 20 G bytes a
    row, and s a member of those groups, s those of a logit, from and to memory; up to 64 times more from cache."""
    row = tl.program_id(0).to(tl.int64)
    raw_row, groups_row = raw_ptr + row * stride, groups_ptr + row * n_groups
    maxima_row, race_sums_row = maxima_ptr + row * n_groups, race_sums_ptr + row * n_groups
    race_maxima_row = race_maxima_ptr + row * n_groups
    inverse, is_greedy, is_valid = safe_inverse(inverse_ptr, row)
    o_b = tl.arange(0, BLOCK)

    peak = finite_or_zero(largest_of(maxima_row, n_groups, BLOCK))
    lanes = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, n_groups, BLOCK):
        o_g = begin + o_b
        maximum = tl.load(maxima_row + o_g, mask=o_g < n_groups, other=-float("inf"))
        race_sum = tl.load(race_sums_row + o_g, mask=o_g < n_groups, other=0.0)
        lanes += (race_sum * masses_of(maximum, peak, inverse)).to(tl.float64)
    mass = tl.sum(lanes, 0)

    k, top_p = tl.full([], MOST_IDS, tl.int64), tl.full([], 1.0, tl.float64)
    floor = tl.full([], -float("inf"), tl.float64)
    if has_top_k:
        k = tl.load(top_k_ptr + row)
    if has_top_p:
        top_p = tl.load(top_p_ptr + row)
    if has_min_p:
        floor = tl.log(tl.load(min_p_ptr + row))
    highest_key, lowest_key = keys_of(peak, True), keys_of(-float("inf") + peak, True)

    # Which groups may have an id that counts.
    from_key, above = lowest_key, tl.full([], 0.0, tl.float64)
    if k < n_columns:
        from_key, above = find_last_key(
            maxima_row, bias_ptr, 0, groups_row, n_groups, n_groups, 1.0, 0.0, lowest_key, highest_key,
            k.to(tl.float64), peak, inverse, 0, False, BLOCK,
        )
    elif top_p < 1:
        from_key, above = find_last_key(
            maxima_row, bias_ptr, 0, groups_row, n_groups, n_groups, 1.0, 0.0, lowest_key, highest_key,
            top_p * mass, peak, inverse, 0, True, BLOCK,
        )
    floor_of_groups = tl.where((k < n_columns) | (top_p < 1), -float("inf"), floor)
    n_listed = list_groups(maxima_row, groups_row, n_groups, from_key, floor_of_groups, peak, inverse, BLOCK)
    for begin in range(0, n_groups, BLOCK):
        o_g = begin + o_b
        tl.store(race_maxima_row + o_g, tl.full([BLOCK], -float("inf"), tl.float32), mask=o_g < n_groups)
        tl.store(race_sums_row + o_g, tl.zeros([BLOCK], tl.float32), mask=o_g < n_groups)
    tl.debug_barrier()
    n = n_listed * GROUP

    key, last = lowest_key, tl.full([], MOST_IDS, tl.int32)
    if k < n_columns:
        key, above = find_last_key(
            raw_row, bias_ptr, has_bias, groups_row, n, n_columns, factor, height, from_key, highest_key,
            k.to(tl.float64), peak, inverse, GROUP, False, MEMBERS,
        )
        wanted = k.to(tl.int32) - above.to(tl.int32)
        last = id_of_nth_equal(
            raw_row, bias_ptr, has_bias, groups_row, n, n_columns, factor, height, key, wanted, MEMBERS
        )
        mass = mass_left(
            raw_row, bias_ptr, has_bias, groups_row, n, n_columns, factor, height, key, last, peak, inverse, MEMBERS
        )
    if top_p < 1:
        last_key, above = find_last_key(
            raw_row, bias_ptr, has_bias, groups_row, n, n_columns, factor, height, tl.maximum(key, from_key),
            highest_key, top_p * mass, peak, inverse, GROUP, True, MEMBERS,
        )
        each = tl.exp((logit_of(last_key).to(tl.float64) - peak.to(tl.float64)) * inverse.to(tl.float64))
        wanted = tl.where(each > 0, tl.ceil((top_p * mass - above) / each), 0.0)
        wanted = tl.where(each > 0, tl.minimum(tl.maximum(wanted, 1.0), 16777216.0), 16777216.0).to(tl.int32)
        last_equal = id_of_nth_equal(
            raw_row, bias_ptr, has_bias, groups_row, n, n_columns, factor, height, last_key, wanted, MEMBERS
        )
        last = tl.where(last_key == key, tl.minimum(last, last_equal), last_equal)
        key = last_key
    tl.store(bounds_ptr + row * N_BOUNDS, key)
    tl.store(bounds_ptr + row * N_BOUNDS + 1, last)

    for begin in range(0, n_listed, MEMBERS // GROUP):
        o_l = begin + tl.arange(0, MEMBERS // GROUP)
        o_g = tl.load(groups_row + o_l, mask=o_l < n_listed, other=0)
        columns = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        exists = (o_l < n_listed)[:, None] & (columns < n_columns)
        z = load_logits(raw_row, bias_ptr, has_bias, columns, exists, factor, height)
        z = tl.where(stays(z, columns, key, last, floor, peak, inverse), z, -float("inf"))
        maximum = tl.max(z, 1)
        total = add_by_halves(exp((z - finite_or_zero(maximum)[:, None]) * inverse))
        tl.store(race_maxima_row + o_g, maximum, mask=o_l < n_listed)
        tl.store(race_sums_row + o_g, total, mask=o_l < n_listed)


# ---------------------------------------------------------------------------------------------------------------------
# The draw
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def words_of(seed, key, position, purpose, block):
    """Four words of each block, as in ``DRAWS.md`` section 1. ``block`` is int32; the others are scalars of 64 bits."""
    first = block.to(tl.uint32) + (purpose.to(tl.uint32) << 28)
    return tl.philox(seed, first, position.to(tl.uint32), key.to(tl.uint32), (key >> 32).to(tl.uint32))


@triton.jit
def uniform(word):
    """The middle of the word's 2^-32, in fp64, exactly."""
    return (word.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)


@triton.jit
def exponential(v):
    """``-log1p(-v)``, with the rounding of ``1 - v`` taken out again."""
    rest = 1.0 - v
    return -tl.log(rest) * (v / (1.0 - rest))


@triton.jit(do_not_specialize=["race", "has_bias", "has_given", "has_min_p"])
def draw_kernel(
    raw_ptr,  # [C, V], any float dtype
    bias_ptr,  # [V] fp32
    seeds_ptr,  # [C] int64
    keys_ptr,  # [C] int64
    positions_ptr,  # [C] int64
    inverse_ptr,  # [C] fp32
    given_ptr,  # [C] int64
    min_p_ptr,  # [C] fp64
    maxima_ptr,  # [C, G] fp32
    sums_ptr,  # [C, G] fp32
    weighted_ptr,  # [C, G] fp32
    race_maxima_ptr,  # [C, G] fp32
    race_sums_ptr,  # [C, G] fp32
    bounds_ptr,  # [C, 2] int32
    ids_ptr,  # [C] int64
    logprobs_ptr,  # [C] fp32
    model_logprobs_ptr,  # [C] fp32
    entropy_ptr,  # [C] fp32
    lse_ptr,  # [C] fp32
    stride, n_columns, n_groups, race, has_bias, has_given, has_min_p, factor, height,
    FILTERED: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr,
):
    """The race between groups, the pick in the winner, or instead of both a given id; and the numbers of that id. Moves
    12 G bytes a row (4 G more with STATS, 4 G with FILTERED), and 128 logits."""
    row = tl.program_id(0).to(tl.int64)
    raw_row, at = raw_ptr + row * stride, row * n_groups
    inverse, is_greedy, is_valid = safe_inverse(inverse_ptr, row)
    seed, sequence, position = tl.load(seeds_ptr + row), tl.load(keys_ptr + row), tl.load(positions_ptr + row)
    o_b, o_q = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 4)

    highest, highest_group = tl.full([BLOCK], -float("inf"), tl.float32), o_b
    for begin in range(0, n_groups, BLOCK):
        o_g = begin + o_b
        maximum = tl.load(maxima_ptr + at + o_g, mask=o_g < n_groups, other=-float("inf"))
        highest_group = tl.where(maximum > highest, o_g, highest_group)
        highest = tl.maximum(highest, maximum)
    peak, peak_group = tl.max(highest, 0), join_argmax(highest, highest_group)

    total, race_total = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    weighted = tl.zeros([BLOCK], tl.float64)
    best, best_group = tl.full([BLOCK], -float("inf"), tl.float64), o_b
    for begin in range(0, n_groups, BLOCK):
        o_g = begin + o_b
        mask = o_g < n_groups
        fall = tl.load(maxima_ptr + at + o_g, mask=mask, other=-float("inf")) - peak
        share = tl.load(sums_ptr + at + o_g, mask=mask, other=0.0) * tl.exp(fall)
        total += share.to(tl.float64)
        if STATS:
            own = tl.load(weighted_ptr + at + o_g, mask=mask, other=0.0) * tl.exp(fall)
            weighted += (own + tl.where(fall > -1e30, share * fall, 0.0)).to(tl.float64)
        race_maximum = tl.load(race_maxima_ptr + at + o_g, mask=mask, other=-float("inf"))
        race_sum = tl.load(race_sums_ptr + at + o_g, mask=mask, other=0.0).to(tl.float64)
        tempered = (race_maximum.to(tl.float64) - peak.to(tl.float64)) * inverse.to(tl.float64)
        race_total += race_sum * tl.exp(tempered.to(tl.float32)).to(tl.float64)
        w0, w1, w2, w3 = words_of(seed, sequence, position, race, begin // 4 + o_q)
        word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])
        score = tempered + tl.log(race_sum / exponential(uniform(word)))
        best_group = tl.where(score > best, o_g, best_group)
        best = tl.where(score > best, score, best)
    winner = tl.where(is_greedy, peak_group, join_argmax(best, best_group))
    row_sum, race_sum = tl.sum(total, 0), tl.sum(race_total, 0)

    key, last, floor = LEAST_KEY, MOST_IDS, tl.full([], -float("inf"), tl.float64)
    if FILTERED:
        key, last = tl.load(bounds_ptr + row * N_BOUNDS), tl.load(bounds_ptr + row * N_BOUNDS + 1)
        if has_min_p:
            floor = tl.log(tl.load(min_p_ptr + row))
    o_j = tl.arange(0, GROUP)
    columns = winner * GROUP + o_j
    z = load_logits(raw_row, bias_ptr, has_bias, columns, columns < n_columns, factor, height)
    left = z > -float("inf")
    if FILTERED:
        left &= stays(z, columns, key, last, floor, peak, inverse)
    top = tl.max(tl.where(left, z, -float("inf")), 0)
    tempered = (z.to(tl.float64) - finite_or_zero(top).to(tl.float64)) * inverse.to(tl.float64)
    share = tl.where(left, tl.exp(tempered), 0.0)
    running = tl.cumsum(share, 0)
    w0, w1, w2, w3 = words_of(seed, sequence, position, race + 1, winner // 4)
    word = tl.where(winner % 4 < 2, tl.where(winner % 4 == 0, w0, w1), tl.where(winner % 4 == 2, w2, w3))
    passed = (share > 0) & (running > uniform(word) * tl.max(running, 0))
    passed = tl.where(is_greedy, z == peak, passed)
    token = tl.min(tl.where(passed, columns, MOST_IDS), 0).to(tl.int64)

    drawn = token
    if has_given:
        token = tl.load(given_ptr + row)
    exists = (token >= 0) & (token < n_columns)
    z_id = load_logits(raw_row, bias_ptr, has_bias, tl.where(exists, token, 0), exists, factor, height)
    below = z_id.to(tl.float64) - peak.to(tl.float64)
    logprob = below * inverse.to(tl.float64) - tl.log(race_sum)
    if FILTERED:
        logprob = tl.where(stays(z_id, token, key, last, floor, peak, inverse), logprob, -float("inf"))
    logprob = tl.where(is_greedy, tl.where(token == drawn, 0.0, -float("inf")), logprob)
    log_sum = tl.log(row_sum)
    is_whole = (row_sum > 0) & (row_sum < float("inf")) & is_valid
    nan = float("nan")
    tl.store(ids_ptr + row, tl.where(is_whole & exists, token, -1))
    tl.store(logprobs_ptr + row, tl.where(is_whole & exists, logprob, nan).to(tl.float32))
    tl.store(model_logprobs_ptr + row, tl.where(is_whole & exists, below - log_sum, nan).to(tl.float32))
    if STATS:
        entropy = log_sum - tl.sum(weighted, 0) / row_sum
        tl.store(entropy_ptr + row, tl.where(is_whole, entropy, nan).to(tl.float32))
        tl.store(lse_ptr + row, tl.where(is_whole, peak.to(tl.float64) + log_sum, nan).to(tl.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Draws with replacement
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_columns", "certain", "width", "has_bias"])
def certain_kernel(
    raw_ptr,  # [C, V], any float dtype
    bias_ptr,  # [V] fp32
    inverse_ptr,  # [C] fp32
    maxima_ptr,  # [C, G] fp32
    left_maxima_ptr,  # [C, G] fp32: out
    left_sums_ptr,  # [C, G] fp32: in, of all ids; out, of those that are left
    groups_ptr,  # [C, G] int32 scratch
    bounds_ptr,  # [C, 2] int32
    ids_ptr,  # [C, W] int64
    logits_ptr,  # [C, W] fp32
    stride, n_columns, n_groups, certain, width, has_bias, factor, height,
    BLOCK: tl.constexpr, MEMBERS: tl.constexpr,
):
    """The ``certain`` largest logits of a row, by rising id, and the groups' maxima and sums of all others. An id that
    does not exist has the logit -inf. Found as :func:`filter_kernel` finds what top_k leaves, and as cheaply."""
    row = tl.program_id(0).to(tl.int64)
    raw_row, groups_row = raw_ptr + row * stride, groups_ptr + row * n_groups
    maxima_row, at = maxima_ptr + row * n_groups, row * n_groups
    inverse = tl.load(inverse_ptr + row)
    peak = finite_or_zero(largest_of(maxima_row, n_groups, BLOCK))
    wanted = certain.to(tl.float64)
    highest_key, lowest_key = keys_of(peak, True), keys_of(-float("inf") + peak, True)
    from_key, above = find_last_key(
        maxima_row, bias_ptr, 0, groups_row, n_groups, n_groups, 1.0, 0.0, lowest_key, highest_key, wanted, peak,
        inverse, 0, False, BLOCK,
    )
    n_listed = list_groups(maxima_row, groups_row, n_groups, from_key, -float("inf"), peak, inverse, BLOCK)
    for begin in range(0, n_groups, BLOCK):
        o_g = begin + tl.arange(0, BLOCK)
        maximum = tl.load(maxima_row + o_g, mask=o_g < n_groups, other=-float("inf"))
        tl.store(left_maxima_ptr + at + o_g, maximum, mask=o_g < n_groups)
    for begin in range(0, certain, BLOCK):
        o_k = begin + tl.arange(0, BLOCK)
        tl.store(ids_ptr + row * width + o_k, tl.zeros([BLOCK], tl.int64), mask=o_k < certain)
        tl.store(logits_ptr + row * width + o_k, tl.full([BLOCK], -float("inf"), tl.float32), mask=o_k < certain)
    tl.debug_barrier()
    n = n_listed * GROUP
    key, above = find_last_key(
        raw_row, bias_ptr, has_bias, groups_row, n, n_columns, factor, height, from_key, highest_key, wanted, peak,
        inverse, GROUP, False, MEMBERS,
    )
    last = id_of_nth_equal(
        raw_row, bias_ptr, has_bias, groups_row, n, n_columns, factor, height, key, certain - above.to(tl.int32),
        MEMBERS
    )
    tl.store(bounds_ptr + row * N_BOUNDS, key)
    tl.store(bounds_ptr + row * N_BOUNDS + 1, last)

    taken, no_floor = tl.full([], 0, tl.int32), -float("inf")
    for begin in range(0, n, MEMBERS):
        o_n = begin + tl.arange(0, MEMBERS)
        z, columns, mask = load_candidates(
            raw_row, bias_ptr, has_bias, groups_row, o_n, n, n_columns, factor, height, GROUP
        )
        is_taken = mask & (z > -float("inf")) & stays(z, columns, key, last, no_floor, peak, inverse)
        place = taken + tl.cumsum(is_taken.to(tl.int32), 0) - 1
        has_room = is_taken & (place < certain)  # keys of NaN may let more through
        tl.store(ids_ptr + row * width + place, columns.to(tl.int64), mask=has_room)
        tl.store(logits_ptr + row * width + place, z, mask=has_room)
        taken += tl.sum(is_taken.to(tl.int32), 0)
    for begin in range(0, n_listed, MEMBERS // GROUP):
        o_l = begin + tl.arange(0, MEMBERS // GROUP)
        o_g = tl.load(groups_row + o_l, mask=o_l < n_listed, other=0)
        columns = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        exists = (o_l < n_listed)[:, None] & (columns < n_columns)
        z = load_logits(raw_row, bias_ptr, has_bias, columns, exists, factor, height)
        z = tl.where(stays(z, columns, key, last, no_floor, peak, inverse), -float("inf"), z)
        maximum = tl.max(z, 1)
        total = add_by_halves(exp((z - finite_or_zero(maximum)[:, None]) * inverse))
        tl.store(left_maxima_ptr + at + o_g, maximum, mask=o_l < n_listed)
        tl.store(left_sums_ptr + at + o_g, total, mask=o_l < n_listed)


@triton.jit(do_not_specialize=["n_columns", "search_steps", "draws", "certain", "width", "has_bias"])
def draw_targets_kernel(
    raw_ptr,  # [C, V], any float dtype
    bias_ptr,  # [V] fp32
    seeds_ptr,  # [C] int64
    keys_ptr,  # [C] int64
    positions_ptr,  # [C] int64
    inverse_ptr,  # [C] fp32
    maxima_ptr,  # [C, G] fp32
    sums_ptr,  # [C, G] fp32
    left_maxima_ptr,  # [C, G] fp32
    left_sums_ptr,  # [C, G] fp32
    groups_ptr,  # [C, G] int32 scratch
    upto_ptr,  # [C, G] fp64 scratch
    bounds_ptr,  # [C, 2] int32
    ids_ptr,  # [C, W] int64
    logits_ptr,  # [C, W] fp32
    state_ptr,  # [C, 4] fp64
    stride, n_columns, n_groups, search_steps, draws, certain, width, has_bias, factor, height,
    CERTAIN: tl.constexpr, BLOCK: tl.constexpr, DRAWS: tl.constexpr,
):
    """Ids that are drawn, each with its logit, behind the row's certain ones; -inf where nothing is left to draw. Moves
    20 G bytes a row and 12 a draw from and to memory; 128 logits a draw and the search come from cache.

    A row's state: the largest logit that is left, the mass of those relative to it at the temperature; the largest
    logit of all, and the sum of all relative to it."""
    row = tl.program_id(0).to(tl.int64)
    raw_row, at = raw_ptr + row * stride, row * n_groups
    inverse = tl.load(inverse_ptr + row).to(tl.float64)
    o_b = tl.arange(0, BLOCK)
    peak, left_peak = largest_of(maxima_ptr + at, n_groups, BLOCK), largest_of(left_maxima_ptr + at, n_groups, BLOCK)
    shift, left_shift = finite_or_zero(peak).to(tl.float64), finite_or_zero(left_peak).to(tl.float64)

    # Groups without mass are left out of the list: rounding in the running sum cannot make one of them the first.
    total, before = tl.zeros([BLOCK], tl.float64), tl.full([], 0.0, tl.float64)
    n_filled = tl.full([], 0, tl.int32)
    for begin in range(0, n_groups, BLOCK):
        o_g = begin + o_b
        mask = o_g < n_groups
        fall = tl.load(maxima_ptr + at + o_g, mask=mask, other=-float("inf")).to(tl.float64) - shift
        total += tl.load(sums_ptr + at + o_g, mask=mask, other=0.0).to(tl.float64) * tl.exp(fall)
        fall = tl.load(left_maxima_ptr + at + o_g, mask=mask, other=-float("inf")).to(tl.float64) - left_shift
        left_sum = tl.load(left_sums_ptr + at + o_g, mask=mask, other=0.0).to(tl.float64)
        mass = tl.where(left_sum > 0, left_sum * tl.exp(fall * inverse), 0.0)
        place = at + n_filled + tl.cumsum((mass > 0).to(tl.int32), 0) - 1
        tl.store(groups_ptr + place, o_g, mask=mass > 0)
        tl.store(upto_ptr + place, before + tl.cumsum(mass, 0), mask=mass > 0)
        before += tl.sum(mass, 0)
        n_filled += tl.sum((mass > 0).to(tl.int32), 0)
    tl.debug_barrier()
    end = tl.maximum(n_filled - 1, 0)
    all_left = tl.load(upto_ptr + at + end, mask=n_filled > 0, other=0.0)
    tl.store(state_ptr + row * N_STATE, left_shift)
    tl.store(state_ptr + row * N_STATE + 1, all_left)
    tl.store(state_ptr + row * N_STATE + 2, peak.to(tl.float64))
    tl.store(state_ptr + row * N_STATE + 3, tl.sum(total, 0))

    key, last = LARGEST_KEY, tl.full([], -1, tl.int32)
    if CERTAIN:
        key, last = tl.load(bounds_ptr + row * N_BOUNDS), tl.load(bounds_ptr + row * N_BOUNDS + 1)
    seed, sequence, position = tl.load(seeds_ptr + row), tl.load(keys_ptr + row), tl.load(positions_ptr + row)
    o_j = tl.arange(0, GROUP)
    for begin in range(0, draws, DRAWS):
        o_d = begin + tl.arange(0, DRAWS)
        is_draw = (o_d < draws) & (n_filled > 0)
        w0, w1, w2, w3 = words_of(seed, sequence, position, tl.full([], TARGETS, tl.int32), o_d << 16)
        u = (w0.to(tl.float64) * 1048576.0 + (w1 >> 12).to(tl.float64) + 0.5) * (1.0 / 4503599627370496.0)
        target = u * all_left
        low, high = tl.zeros([DRAWS], tl.int32), tl.zeros([DRAWS], tl.int32) + end
        for _ in range(0, search_steps):
            middle = (low + high) // 2
            is_reached = tl.load(upto_ptr + at + middle, mask=is_draw, other=0.0) > target
            high = tl.where(is_reached, middle, high)
            low = tl.where(is_reached, low, tl.minimum(middle + 1, high))
        group = tl.load(groups_ptr + at + high, mask=is_draw, other=0)
        upto = tl.load(upto_ptr + at + high, mask=is_draw, other=1.0)
        passed_over = tl.load(upto_ptr + at + high - 1, mask=is_draw & (high > 0), other=0.0)
        top = tl.load(left_maxima_ptr + at + group, mask=is_draw, other=0.0).to(tl.float64)
        columns = group[:, None] * GROUP + o_j[None, :]
        exists = is_draw[:, None] & (columns < n_columns)
        z = load_logits(raw_row, bias_ptr, has_bias, columns, exists, factor, height)
        is_left = z > -float("inf")
        if CERTAIN:
            is_left &= ~stays(z, columns, key, last, -float("inf"), peak, inverse)
        share = tl.where(is_left, tl.exp((z.to(tl.float64) - top[:, None]) * inverse), 0.0)
        running = tl.cumsum(share, 1)
        part = (target - passed_over) / (upto - passed_over) * tl.max(running, 1)
        first = tl.min(tl.where((share > 0) & (running > part[:, None]), columns, MOST_IDS), 1)
        token = tl.where(first < MOST_IDS, first, tl.max(tl.where(share > 0, columns, 0), 1))
        logit = tl.max(tl.where(is_left & (columns == token[:, None]), z, -float("inf")), 1)
        at_draw = row * width + certain + o_d
        tl.store(ids_ptr + at_draw, token.to(tl.int64), mask=o_d < draws)
        tl.store(logits_ptr + at_draw, logit, mask=o_d < draws)
