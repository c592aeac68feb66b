"""Statistics of rows as a Triton kernel: one program a row, one walk. Same arithmetic as ``reference.py``."""

import triton
import triton.language as tl

from kd_kernels.triton_rows import LOWEST, argmax_of, exp, load_block, load_logits


@triton.jit
def add_to_entropy(four, highest, best, total, weighted):
    """Take up a block of logits, ``four`` ``[B / 4, 4]``, and the largest of each four. Of a lane, ``best`` is the
    largest so far; ``total`` of each column the sum of ``exp(gap)``, ``weighted`` that of ``exp(gap) gap``, where gap
    is z - best.

    When ``best`` rises, both are taken to the new one; that is exact, and no gap is ever above 0. A gap of -inf has no
    share, but 0 times it would be NaN.
    """
    higher = tl.maximum(best, highest)
    peak = tl.maximum(higher, LOWEST)
    fall = tl.maximum(tl.maximum(best, LOWEST) - peak, -1e30)[:, None]
    gap = four - peak[:, None]
    shrink, share = exp(fall), exp(gap)
    weighted = shrink * (weighted + fall * total) + share * tl.maximum(gap, -1e30)
    return higher, total * shrink + share, weighted


@triton.jit
def join_entropy(best, total, weighted):
    """Over the lanes: the row's maximum and its two sums, NaN where a logit was NaN or +inf."""
    top = tl.max(best, 0)
    fall = tl.maximum(best - tl.maximum(top, LOWEST), -1e30)[:, None]
    shrink = exp(fall)
    return top, tl.sum(tl.sum(total * shrink, 1), 0), tl.sum(tl.sum((weighted + fall * total) * shrink, 1), 0)


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
    best, best_begin = tl.full([BLOCK // 4], -float("inf"), tl.float32), tl.zeros([BLOCK // 4], tl.int32)
    total, weighted = tl.zeros([BLOCK // 4, 4], tl.float32), tl.zeros([BLOCK // 4, 4], tl.float32)
    before = tl.zeros([BLOCK // 4], tl.int32)
    for begin in range(0, n_columns, BLOCK):
        o_v, end = begin + o_b, begin + BLOCK
        z = load_block(raw_row, bias_ptr, has_bias, o_v, end, n_columns, n_readable, factor, height)
        beats = z > z_id
        if token >= end:
            beats = z >= z_id
        elif token >= begin:
            tl.debug_barrier()  # for no wait: without it the compiler compares ids in every block
            beats |= (z == z_id) & (o_v < token)
        before += tl.sum(tl.reshape(beats.to(tl.int32), [BLOCK // 4, 4]), 1)
        four = tl.reshape(z, [BLOCK // 4, 4])
        highest = tl.max(four, 1)
        best_begin = tl.where(highest > best, begin, best_begin)
        best, total, weighted = add_to_entropy(four, highest, best, total, weighted)

    top, row_sum, row_weighted = join_entropy(best, total, weighted)
    argmax = argmax_of(raw_row, bias_ptr, has_bias, best_begin, top, n_columns, factor, height)
    log_sum = tl.log(row_sum)
    is_whole = (row_sum > 0) & (row_sum < float("inf"))
    nan = float("nan")
    tl.store(logprob_ptr + row, tl.where(is_whole & exists, (z_id - top) - log_sum, nan))
    tl.store(lse_ptr + row, tl.where(is_whole, top + log_sum, nan))
    tl.store(entropy_ptr + row, tl.where(is_whole, log_sum - row_weighted / row_sum, nan))
    tl.store(max_ptr + row, tl.where(is_whole, top, nan))
    tl.store(argmax_ptr + row, tl.where(is_whole, argmax, -1).to(tl.int64))
    tl.store(rank_ptr + row, tl.where(is_whole & exists, tl.sum(before, 0), -1).to(tl.int64))
