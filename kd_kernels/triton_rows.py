"""Device functions that every Triton row kernel is made of: logits out of raw products, and their running normaliser.

One program owns one row and walks it in blocks. Sums are kept by lanes and joined at the end of the walk, so that no
block waits for a reduction, and loads of the next block can start early.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Is subtracted where there is no logit yet: the least number of fp32, so that it is above no logit, and a difference
from it is no NaN. A logit of just this number, with which models mask, counts as any other."""

LEAST_KEY = tl.constexpr(-2147483648)
LARGEST_KEY = tl.constexpr(2147483647)

BEYOND = tl.constexpr(1 << 21)
"""A group that no vocabulary has: of 16 columns or more each, they end at 2^24."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """``e^x`` as a multiplication and the GPU's own power of two, 0 below 2^-126: for numbers that are smaller still,
    ``tl.exp`` has three more instructions."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def fold(x):
    """Sums of four neighbours, which one lane holds: no data moves."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 4, 4]), 1)


@triton.jit
def tanh(x):
    """From ``e^(-2|x|)``, which cannot overflow; by its series near 0, where the quotient would cancel."""
    size = tl.abs(x)
    decay = exp(-2.0 * size)
    value = tl.where(size < 0.02, size - size * size * size * (1.0 / 3.0), (1.0 - decay) / (1.0 + decay))
    return tl.where(x < 0, -value, value)


@triton.jit
def map_raw(raw, factor, height):
    """Logits of products that the bias was added to: ``height tanh(factor raw)``, or ``factor raw`` where ``height`` is
    0.

    ``factor`` is scale / softcap or scale / T, ``height`` softcap / T.
    """
    z = raw * factor
    if height > 0:
        z = tanh(z) * height
    return z


@triton.jit
def load_logits(raw_ptr, bias_ptr, has_bias, o_v, mask, factor, height):
    """Logits of one row at the columns ``o_v``, in fp32; -inf where ``mask`` is false. Reads the row's dtype."""
    raw = tl.load(raw_ptr + o_v, mask=mask, other=0.0).to(tl.float32)
    if has_bias:
        raw += tl.load(bias_ptr + o_v, mask=mask, other=0.0)
    return tl.where(mask, map_raw(raw, factor, height), -float("inf"))


@triton.jit
def load_raw(raw_ptr, o_v, end, n_columns, n_readable):
    """Products for a block of a walk, before column ``end``: -inf past the row's ``n_columns``. Only the last block has
    a mask. One that ends between any two columns would take its loads apart, so it reads as far as there is memory:
    ``n_readable`` is a multiple of 16 where it can be."""
    if end <= n_columns:
        raw = tl.load(raw_ptr + o_v).to(tl.float32)
    else:
        raw = tl.load(raw_ptr + o_v, mask=o_v < n_readable, other=0.0).to(tl.float32)
        raw = tl.where(o_v < n_columns, raw, -float("inf"))
    return raw


@triton.jit
def logits_of(raw, bias_ptr, has_bias, o_v, n_columns, factor, height):
    """Logits of the products that :func:`load_raw` returned, -inf past the row. Options are branches that all lanes
    take."""
    if has_bias:
        raw += tl.load(bias_ptr + o_v, mask=o_v < n_columns, other=0.0)
    z = map_raw(raw, factor, height)
    if height > 0:  # which makes a finite number of -inf
        z = tl.where(o_v < n_columns, z, -float("inf"))
    return z


@triton.jit
def load_block(raw_ptr, bias_ptr, has_bias, o_v, end, n_columns, n_readable, factor, height):
    """Logits for a block of a walk, in fp32: those of the columns ``o_v``, before ``end``. Reads the row's dtype."""
    raw = load_raw(raw_ptr, o_v, end, n_columns, n_readable)
    return logits_of(raw, bias_ptr, has_bias, o_v, n_columns, factor, height)


@triton.jit
def add_to_normaliser(z, best, total):
    """Take up a block of logits ``[B]``: ``best`` ``[B / 4]`` is the largest so far of four neighbours, which one lane
    holds, ``total`` ``[B / 4, 4]`` the sum of each one's ``exp(z - best)``."""
    four = tl.reshape(z, total.shape)
    higher = tl.maximum(best, tl.max(four, 1))
    peak = tl.maximum(higher, LOWEST)
    return higher, total * exp(tl.maximum(best, LOWEST) - peak)[:, None] + exp(four - peak[:, None])


@triton.jit
def join_normaliser(best, total):
    """Over the lanes: the row's maximum, and its sum of ``exp(z - max)``, which is NaN where a logit was NaN or +inf.

    In fp64, once a row: every log-probability of the row shares the error of this sum.
    """
    top = tl.max(best, 0)
    parts = total * exp(best - tl.maximum(top, LOWEST))[:, None]
    return top, tl.sum(tl.sum(parts.to(tl.float64), 1), 0).to(tl.float32)


@triton.jit
def argmax_of(row_ptr, bias_ptr, has_bias, best_begin, top, n_columns, factor, height):
    """The first column whose logit is ``top``. ``best_begin`` ``[B / 4]``: where the block begins in which each lane
    saw its largest first. That is all a walk keeps; the four logits that the lane had there are read again."""
    o_q = tl.arange(0, best_begin.shape[0])
    columns = (best_begin + 4 * o_q)[:, None] + tl.arange(0, 4)[None, :]
    four = load_logits(row_ptr, bias_ptr, has_bias, columns, columns < n_columns, factor, height)
    return tl.min(tl.min(tl.where(four == top, columns, 2147483647), 1), 0)


@triton.jit
def join_argmax(best, best_id):
    """Over the lanes: the lowest id among those with the largest logit."""
    return tl.min(tl.where(best == tl.max(best, 0), best_id, 2147483647), 0)


@triton.jit
def p_log_p(logp):
    """``p log p``, 0 where p is 0."""
    return exp(logp) * tl.maximum(logp, -1e30)


@triton.jit
def finite_or_zero(maximum):
    """A number to subtract: -inf, the maximum where everything is masked, would leave NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def load_candidates(
    row_ptr, bias_ptr, has_bias, parents_ptr, o_n, n, n_columns, factor, height, GROUP: tl.constexpr,
):
    """Candidates ``o_n``, the columns that they are, and which of them exist. With GROUP 0, they are the row's first n
    columns; else the members of the groups that ``parents_ptr`` lists."""
    if GROUP == 0:
        columns, mask = o_n, o_n < n
    else:
        columns = tl.load(parents_ptr + o_n // GROUP, mask=o_n < n, other=BEYOND) * GROUP + o_n % GROUP
        mask = columns < n_columns
    return load_logits(row_ptr, bias_ptr, has_bias, columns, mask, factor, height), columns, mask


@triton.jit
def keys_of(z, mask):
    """Integers that are ordered as the numbers are, zeros of both signs equal; where ``mask`` is false, below all that
    exist."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(mask, tl.where(bits < 0, bits ^ LARGEST_KEY, bits), LEAST_KEY)
