"""Statistics of rows as a Triton kernel: one program a row, one walk. Same arithmetic as ``reference.py``."""

import triton
import triton.language as tl

from kd_kernels.triton_rows import LOWEST, join_argmax, load_block, load_logits


@triton.jit
def add_to_entropy(z, peak, total, weighted):
    """``total`` is the lane's sum of ``exp(gap)``, ``weighted`` that of ``exp(gap) gap``; gap = z - peak.

    When the lane's peak rises, both are taken to the new one; that is exact, and no gap is ever above 0.
    """
    higher = tl.maximum(peak, z)
    fall, gap = peak - higher, z - higher
    shrink, share = tl.exp(fall), tl.exp(gap)
    # What fell so far has no share left, and the share of a logit of -inf has none: 0 times -inf would be NaN.
    weighted = shrink * (weighted + tl.where(fall > -1e30, fall * total, 0.0)) + tl.where(gap > -1e30, share * gap, 0.0)
    return higher, total * shrink + share, weighted


@triton.jit
def join_entropy(peak, total, weighted):
    """Over the lanes: the row's maximum and its two sums, NaN where a logit was NaN or +inf."""
    top = tl.max(peak, 0)
    fall = tl.maximum(peak - top, -1e30)  # a lane without a logit, or without one that counts
    shrink = tl.exp(fall)
    return top, tl.sum(total * shrink, 0), tl.sum((weighted + fall * total) * shrink, 0)


# A flag is compared at run time, by a branch that all lanes take: one kernel serves both.
@triton.jit(do_not_specialize=["n_columns", "has_bias"])
def token_stats_kernel(
    raw_ptr,  # [C, V], any float dtype
    bias_ptr,  # [V] fp32
    ids_ptr,  # [C] int64
    logprob_ptr,  # [C] fp32
    lse_ptr,  # [C] fp32
    entropy_ptr,  # [C] fp32
    max_ptr,  # [C] fp32
    argmax_ptr,  # [C] int64
    rank_ptr,  # [C] int64
    raw_stride, n_columns, n_readable, has_bias, factor, height, BLOCK: tl.constexpr,
):
    """Normaliser, entropy, maximum, and the place of one id. Moves C V s bytes, s those of a logit, and 40 C.

    The id's logit is read before the walk, from where the walk reads it, so it equals itself.
    """
    row = tl.program_id(0).to(tl.int64)
    raw_row = raw_ptr + row * raw_stride
    token = tl.load(ids_ptr + row)
    exists = (token >= 0) & (token < n_columns)
    z_id = load_logits(raw_row, bias_ptr, has_bias, tl.where(exists, token, 0), exists, factor, height)

    o_b = tl.arange(0, BLOCK)
    peak, best_id = tl.full([BLOCK], LOWEST, tl.float32), o_b
    total, weighted = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    before = tl.zeros([BLOCK], tl.int32)
    for block in range(0, tl.cdiv(n_columns, BLOCK)):
        o_v = block * BLOCK + o_b
        z = load_block(raw_row, bias_ptr, has_bias, o_v, n_columns, n_readable, factor, height)
        before += ((z > z_id) | ((z == z_id) & (o_v < token))).to(tl.int32)
        best_id = tl.where((z > peak) | (total == 0), o_v, best_id)
        peak, total, weighted = add_to_entropy(z, peak, total, weighted)

    argmax = join_argmax(tl.where(total > 0, peak, -float("inf")), best_id)
    top, row_sum, row_weighted = join_entropy(peak, total, weighted)
    log_sum = tl.log(row_sum)
    is_whole = (row_sum > 0) & (row_sum < float("inf"))
    nan = float("nan")
    tl.store(logprob_ptr + row, tl.where(is_whole & exists, (z_id - top) - log_sum, nan))
    tl.store(lse_ptr + row, tl.where(is_whole, top + log_sum, nan))
    tl.store(entropy_ptr + row, tl.where(is_whole, log_sum - row_weighted / row_sum, nan))
    tl.store(max_ptr + row, tl.where(is_whole, top, nan))
    tl.store(argmax_ptr + row, tl.where(is_whole, argmax, -1).to(tl.int64))
    tl.store(rank_ptr + row, tl.where(is_whole & exists, tl.sum(before, 0), -1).to(tl.int64))
