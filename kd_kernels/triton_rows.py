"""Device functions that every Triton row kernel is made of: logits out of raw products, and their running normaliser.

One program owns one row and walks it in blocks. Sums are kept one a lane and joined at the end of the walk, so that no
block waits for a reduction, and loads of the next block can start early.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Stands for "no logit yet": the least number of fp32, so that it is above no logit, and a difference from it is no
NaN. A logit of just this number, with which models mask, counts as any other."""

LEAST_KEY = tl.constexpr(-2147483648)
LARGEST_KEY = tl.constexpr(2147483647)

BEYOND = tl.constexpr(1 << 21)
"""A group that no vocabulary has: of 16 columns or more each, they end at 2^24."""


@triton.jit
def tanh(x):
    """From ``e^(-2|x|)``, which cannot overflow; by its series near 0, where the quotient would cancel."""
    size = tl.abs(x)
    decay = tl.exp(-2.0 * size)
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
def load_block(raw_ptr, bias_ptr, has_bias, o_v, n_columns, n_readable, factor, height):
    """The same for a walk: -inf past the row's ``n_columns``, but read as far as there is memory. A mask that ends
    between any two columns would take every load of every block apart; ``n_readable`` is a multiple of 16 where it can
    be."""
    raw = tl.load(raw_ptr + o_v, mask=o_v < n_readable, other=0.0).to(tl.float32)
    if has_bias:
        raw += tl.load(bias_ptr + o_v, mask=o_v < n_columns, other=0.0)
    return tl.where(o_v < n_columns, map_raw(raw, factor, height), -float("inf"))


@triton.jit
def add_to_normaliser(z, peak, total):
    """Take up a block: ``total`` is the lane's sum of ``exp(z - peak)``, ``peak`` its largest logit so far."""
    higher = tl.maximum(peak, z)
    return higher, total * tl.exp(peak - higher) + tl.exp(z - higher)


@triton.jit
def join_normaliser(peak, total):
    """Over the lanes: the row's maximum, and its sum of ``exp(z - max)``, which is NaN where a logit was NaN or +inf.

    In fp64, once a row: every log-probability of the row shares the error of this sum.
    """
    top = tl.max(peak, 0)
    return top, tl.sum((total * tl.exp(peak - top)).to(tl.float64), 0).to(tl.float32)


@triton.jit
def join_argmax(best, best_id):
    """Over the lanes: the lowest id among those with the largest logit."""
    return tl.min(tl.where(best == tl.max(best, 0), best_id, 2147483647), 0)


@triton.jit
def p_log_p(logp):
    """``p log p``, 0 where p is 0."""
    return tl.where(logp > -1e30, tl.exp(logp) * logp, 0.0)


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
