"""The row pass as Triton kernels: one program a row. Same arithmetic as ``reference.py``.

A divergence comes in as TERMS, the device function of ``divergences.py``; see there for f, g and G. Every sum of a row
is kept one a lane, in fp32. A row of weight 0 costs its zeros; a row with something wrong in it gets a loss and a
gradient of NaN.
"""

import triton
import triton.language as tl

from kd_kernels.triton_rows import (
    LOWEST, add_to_normaliser, argmax_of, exp, fold, join_normaliser, load_logits, load_raw, logits_of, p_log_p,
)

BAD_STUDENT = tl.constexpr(1)
BAD_TEACHER = tl.constexpr(2)
BAD_LABEL = tl.constexpr(4)
BAD_IDS = tl.constexpr(8)
BAD_TAIL = tl.constexpr(16)
BAD_IMPORTANCE = tl.constexpr(32)
# Bits of a row's status, as in reference.py.

N_STATS = tl.constexpr(11)
BUCKET = tl.constexpr(0)
RENORMALIZE = tl.constexpr(1)

UNIT = tl.constexpr(2.0**-24)
"""Of a sum that could overflow: of differences between the largest and the least number of fp32, all over a row."""

KEPT = tl.constexpr(0x7FC0FACE)
"""Bits that are written over the kept logits of a sparse row, so that what remains is its tail: a NaN that no
arithmetic makes."""

LARGEST_LOGPROB = tl.constexpr(1e-4)
LARGEST_MASS = tl.constexpr(1.1)
"""A cache rounds log-probabilities; unnormalised scores miss by far more."""


@triton.jit
def apply_terms(logp, logq, first_param, second_param, TERMS: tl.constexpr, N_PARAMS: tl.constexpr):
    if N_PARAMS == 0:
        f, g = TERMS(logp, logq)
    elif N_PARAMS == 1:
        f, g = TERMS(logp, logq, first_param)
    else:
        f, g = TERMS(logp, logq, first_param, second_param)
    return f, g


@triton.jit
def load_both(
    student_row, teacher_row, student_bias_ptr, teacher_bias_ptr, student_has_bias, teacher_has_bias, o_v, end,
    n_columns, n_readable, student_factor, student_height, teacher_factor, teacher_height,
):
    """Logits of both models for a block of a walk. Both are under way before the first is waited for: the branches of
    the options would keep the compiler from seeing to that."""
    raw_z = load_raw(student_row, o_v, end, n_columns, n_readable)
    raw_y = load_raw(teacher_row, o_v, end, n_columns, n_readable)
    z = logits_of(raw_z, student_bias_ptr, student_has_bias, o_v, n_columns, student_factor, student_height)
    return z, logits_of(raw_y, teacher_bias_ptr, teacher_has_bias, o_v, n_columns, teacher_factor, teacher_height)


@triton.jit
def carry_reverse(reverse, q_total, q_from, q_to, p_from, p_to):
    """A lane's sum of ``exp(z - a) ((z - a) - (y - b)) UNIT``, taken from the maxima a, b of student and teacher to
    higher ones. ``q_total`` is its sum of ``exp(z - a)``."""
    q_fall = tl.maximum(tl.maximum(q_from, LOWEST) - tl.maximum(q_to, LOWEST), LOWEST)
    p_fall = tl.maximum(tl.maximum(p_from, LOWEST) - tl.maximum(p_to, LOWEST), LOWEST)
    shrink = exp(q_fall)
    carried = reverse + (q_fall - p_fall) * UNIT * tl.sum(q_total, 1)
    return tl.where(shrink > 0, shrink * carried, 0.0)  # where the teacher has no mass, it may have been infinite


@triton.jit
def add_to_reverse(z, y, reverse, q_total, q_best, q_higher, p_best, p_higher):
    """Take up a block, as :func:`add_to_normaliser` did, which tells of both models the largest logits before and
    after."""
    q_gap = tl.reshape(z, q_total.shape) - tl.maximum(q_higher, LOWEST)[:, None]
    p_gap = tl.reshape(y, q_total.shape) - tl.maximum(p_higher, LOWEST)[:, None]
    share = exp(q_gap)
    own = tl.sum(tl.where(share > 0, share * ((q_gap - p_gap) * UNIT), 0.0), 1)
    return carry_reverse(reverse, q_total, q_best, q_higher, p_best, p_higher) + own


@triton.jit
def reverse_kl_of(reverse, q_total, q_best, q_max, q_sum, p_best, p_max, p_sum):
    """KL(q || p): ``sum q ((z - max z) - (y - max y))``, less the difference of the logarithms of the sums."""
    parts = carry_reverse(reverse, q_total, q_best, q_max, p_best, p_max).to(tl.float64)
    return (tl.sum(parts, 0) / (q_sum * UNIT)).to(tl.float32) - (tl.log(q_sum) - tl.log(p_sum))


@triton.jit
def load_tail(student_row, bias_ptr, has_bias, o_v, end, n_columns, n_readable, factor, height):
    """Logits of a sparse row of which the kept ones were taken out: those are -inf."""
    raw = load_raw(student_row, o_v, end, n_columns, n_readable)
    was_kept = raw.to(tl.int32, bitcast=True) == KEPT
    return tl.where(was_kept, -float("inf"), logits_of(raw, bias_ptr, has_bias, o_v, n_columns, factor, height))


@triton.jit
def skip_row(
    gradient_ptr,  # [V]
    loss_ptr,  # []
    stats_ptr,  # [11]
    status_ptr,  # []
    n_readable, HAS_GRADIENT: tl.constexpr, HAS_STATS: tl.constexpr, BLOCK: tl.constexpr,
):
    """What a row of weight 0 has: no loss, no gradient, statistics of NaN."""
    tl.store(loss_ptr, tl.zeros([], tl.float64))
    tl.store(status_ptr, 0)
    if HAS_STATS:
        o_s = tl.arange(0, 16)
        tl.store(stats_ptr + o_s, tl.full([16], float("nan"), tl.float64), mask=o_s < N_STATS)
    if HAS_GRADIENT:
        o_b = tl.arange(0, BLOCK)
        for begin in range(0, n_readable, BLOCK):
            nothing = tl.zeros([BLOCK], tl.float32).to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + begin + o_b, nothing, mask=begin + o_b < n_readable)


@triton.jit
def read_label(labels_ptr, row, has_labels, n_columns):
    """The row's label, -1 where it has none or a bad one; and its status."""
    label = tl.full([], -1, tl.int32)
    status = tl.full([], 0, tl.int32)
    if has_labels:
        given = tl.load(labels_ptr + row)
        usable = (given >= 0) & (given < n_columns)
        label = tl.where(usable, given.to(tl.int32), label)
        status = tl.where(usable, 0, BAD_LABEL)
    return label, status


@triton.jit
def ce_slopes_of(ce_slope, temperature, untempered_total):
    """What cross-entropy gives each q, and each ``exp((z - max) T)``: it takes the distribution at temperature 1."""
    at_one = temperature == 1.0
    return tl.where(at_one, ce_slope, 0.0), tl.where(at_one, 0.0, ce_slope / untempered_total)


@triton.jit
def under_softcap(slot, z, relative, height):
    """Times d logit / d raw of a softcap, 1 where there is none. ``relative`` is T / softcap. Past the row, z is
    -inf."""
    if height > 0:
        slot = tl.where(z == -float("inf"), 0.0, slot * (1.0 - (z * relative) * (z * relative)))
    return slot


@triton.jit
def dense_gradient(
    z, logq, g, q_max, sum_g, kd_weight, kd_slope, q_slope, untempered_slope, ce_slope, temperature, relative, height,
):
    """With respect to the raw logits ``z``, those of one block or the one of the label, whose share is ``ce_slope``.
    Slopes include the row's weight, and d logit / d raw where there is no softcap."""
    q = exp(logq)
    slot = q * q_slope - ce_slope
    if kd_weight != 0:
        slot += (g - q * sum_g) * kd_slope
    if temperature != 1.0:
        slot += exp((z - q_max) * temperature) * untempered_slope
    return under_softcap(slot, z, relative, height)


@triton.jit
def tail_gradient(z, logq, q_max, q_slope, untempered_slope, ce_slope, temperature, relative, height):
    """The same for ids outside the kept set: what each gets is proportional to its q."""
    slot = exp(logq) * q_slope - ce_slope
    if temperature != 1.0:
        slot += exp((z - q_max) * temperature) * untempered_slope
    return under_softcap(slot, z, relative, height)


@triton.jit
def wait_for_readers(block, logits_ptr, gradient_ptr):
    """Before a narrower gradient takes the place of logits, of which block i covers those of block i / 2 or before: all
    that read these must have met since. They meet at block 0 and at each power of two."""
    if gradient_ptr.dtype.element_ty.primitive_bitwidth < logits_ptr.dtype.element_ty.primitive_bitwidth:
        if (block & (block - 1)) == 0:
            tl.debug_barrier()


@triton.jit
def store_stats(
    stats_ptr,  # [C, 11] fp64
    row, divergence, student_entropy, teacher_entropy, agreement, captured_mass, label_logprob, teacher_label_logprob,
    student_top1, teacher_top1, student_confidence, teacher_confidence,
):
    """One row of statistics, in the order of ``plan.STATS``. Moves 88 bytes."""
    at = stats_ptr + row * N_STATS
    tl.store(at + 0, divergence.to(tl.float64))
    tl.store(at + 1, student_entropy.to(tl.float64))
    tl.store(at + 2, teacher_entropy.to(tl.float64))
    tl.store(at + 3, agreement.to(tl.float64))
    tl.store(at + 4, captured_mass.to(tl.float64))
    tl.store(at + 5, label_logprob.to(tl.float64))
    tl.store(at + 6, teacher_label_logprob.to(tl.float64))
    tl.store(at + 7, student_top1.to(tl.float64))
    tl.store(at + 8, teacher_top1.to(tl.float64))
    tl.store(at + 9, student_confidence.to(tl.float64))
    tl.store(at + 10, teacher_confidence.to(tl.float64))


# Flags are compared at run time, by a branch that all lanes take: one kernel serves them all.
@triton.jit(do_not_specialize=["n_columns", "has_labels", "student_has_bias", "teacher_has_bias"])
def dense_rows_kernel(
    student_ptr,  # [C, V], any float dtype
    teacher_ptr,  # [C, V], any float dtype
    gradient_ptr,  # [C, V], any float dtype; may begin where student_ptr does
    student_bias_ptr,  # [V] fp32
    teacher_bias_ptr,  # [V] fp32
    labels_ptr,  # [C] int64
    weight_ptr,  # [C] fp64
    loss_ptr,  # [C] fp64
    stats_ptr,  # [C, 11] fp64
    status_ptr,  # [C] int32
    student_stride, teacher_stride, gradient_stride, n_columns, n_readable, has_labels, student_has_bias,
    teacher_has_bias,
    student_factor, student_height, student_scale, student_relative, teacher_factor, teacher_height, temperature,
    kd_weight, ce_weight, first_param, second_param, total_g, reverse_share,
    TERMS: tl.constexpr, N_PARAMS: tl.constexpr, KNOWS_G: tl.constexpr, SUMS_REVERSE: tl.constexpr,
    HAS_GRADIENT: tl.constexpr, HAS_STATS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Rows of a dense teacher. Moves C V (3 (s + t) + d) bytes, s, t, d those of a student's, a teacher's logit and a
    gradient's entry; (2 (s + t) + d) where G is known after the first walk, 2 (s + t) without a gradient. Every other
    walk goes backwards, so that it begins with what the one before it left in cache."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + row).to(tl.float32)
    student_row, teacher_row = student_ptr + row * student_stride, teacher_ptr + row * teacher_stride
    gradient_row = gradient_ptr + row * gradient_stride
    nan = float("nan")
    if weight == 0:
        skip_row(
            gradient_row, loss_ptr + row, stats_ptr + row * N_STATS, status_ptr + row, n_readable, HAS_GRADIENT,
            HAS_STATS, BLOCK,
        )
    else:
        o_b = tl.arange(0, BLOCK)
        label, status = read_label(labels_ptr, row, has_labels, n_columns)
        # Before the sums that all wait for: a gradient may take the logit's place.
        at_label = tl.maximum(label, 0)
        z_label = load_logits(
            student_row, student_bias_ptr, student_has_bias, at_label, label >= 0, student_factor, student_height
        )
        y_label = load_logits(
            teacher_row, teacher_bias_ptr, teacher_has_bias, at_label, label >= 0, teacher_factor, teacher_height
        )

        # First walk: normalisers.
        q_best = tl.full([BLOCK // 4], -float("inf"), tl.float32)
        p_best = tl.full([BLOCK // 4], -float("inf"), tl.float32)
        q_total, p_total = tl.zeros([BLOCK // 4, 4], tl.float32), tl.zeros([BLOCK // 4, 4], tl.float32)
        q_begin, p_begin = tl.zeros([BLOCK // 4], tl.int32), tl.zeros([BLOCK // 4], tl.int32)
        reverse = tl.zeros([BLOCK // 4], tl.float32)
        for begin in range(0, n_columns, BLOCK):
            o_v, end = begin + o_b, begin + BLOCK
            z, y = load_both(
                student_row, teacher_row, student_bias_ptr, teacher_bias_ptr, student_has_bias, teacher_has_bias, o_v,
                end, n_columns, n_readable, student_factor, student_height, teacher_factor, teacher_height,
            )
            q_higher, q_grown = add_to_normaliser(z, q_best, q_total)
            p_higher, p_total = add_to_normaliser(y, p_best, p_total)
            if SUMS_REVERSE:
                reverse = add_to_reverse(z, y, reverse, q_total, q_best, q_higher, p_best, p_higher)
            if HAS_STATS:
                q_begin = tl.where(q_higher > q_best, begin, q_begin)
                p_begin = tl.where(p_higher > p_best, begin, p_begin)
            q_best, p_best, q_total = q_higher, p_higher, q_grown
        q_max, q_sum = join_normaliser(q_best, q_total)
        p_max, p_sum = join_normaliser(p_best, p_total)
        q_log_sum, p_log_sum = tl.log(q_sum), tl.log(p_sum)
        status |= tl.where((q_sum > 0) & (q_sum < float("inf")), 0, BAD_STUDENT)
        status |= tl.where((p_sum > 0) & (p_sum < float("inf")), 0, BAD_TEACHER)
        weight = tl.where(status == 0, weight, nan)
        if SUMS_REVERSE:
            total_g += reverse_share * reverse_kl_of(
                reverse, q_total, q_best, q_max, q_sum, p_best, p_max, p_sum
            )

        if HAS_STATS:
            student_top1 = argmax_of(
                student_row, student_bias_ptr, student_has_bias, q_begin, q_max, n_columns, student_factor,
                student_height,
            )
            teacher_top1 = argmax_of(
                teacher_row, teacher_bias_ptr, teacher_has_bias, p_begin, p_max, n_columns, teacher_factor,
                teacher_height,
            )
        ce = tl.where(label >= 0, ce_weight, 0.0)
        kd_slope, ce_slope = kd_weight / temperature * student_scale * weight, ce * student_scale * weight

        # Second walk: the sums of f and of g; the gradient as well where G is known. Third walk: the gradient.
        f_lanes, g_lanes = tl.zeros([BLOCK // 4], tl.float32), tl.zeros([BLOCK // 4], tl.float32)
        q_log_q, p_log_p_lanes = tl.zeros([BLOCK // 4], tl.float32), tl.zeros([BLOCK // 4], tl.float32)
        untempered = tl.zeros([BLOCK // 4], tl.float32)
        n_blocks = tl.cdiv(n_columns, BLOCK)
        for i in range(0, n_blocks):
            # The gradient may be narrower than the logits it replaces: write behind the reads.
            block = n_blocks - 1 - i
            if KNOWS_G and HAS_GRADIENT:
                block = i
            o_v, end = block * BLOCK + o_b, block * BLOCK + BLOCK
            z, y = load_both(
                student_row, teacher_row, student_bias_ptr, teacher_bias_ptr, student_has_bias, teacher_has_bias, o_v,
                end, n_columns, n_readable, student_factor, student_height, teacher_factor, teacher_height,
            )
            logq, logp = (z - q_max) - q_log_sum, (y - p_max) - p_log_sum
            f, g = apply_terms(logp, logq, first_param, second_param, TERMS, N_PARAMS)
            f_lanes += fold(f)
            g_lanes += fold(g)
            if temperature != 1.0:
                untempered += fold(exp((z - q_max) * temperature))
            if HAS_STATS:
                q_log_q += fold(p_log_p(logq))
                p_log_p_lanes += fold(p_log_p(logp))
            if KNOWS_G and HAS_GRADIENT:
                slot = dense_gradient(
                    z, logq, g, q_max, total_g, kd_weight, kd_slope, ce_slope, 0.0, 0.0, 1.0, student_relative,
                    student_height,
                )
                wait_for_readers(block, student_ptr, gradient_ptr)
                tl.store(gradient_row + o_v, slot.to(gradient_ptr.dtype.element_ty), mask=o_v < n_readable)
        divergence, sum_g = tl.sum(f_lanes, 0), tl.sum(g_lanes, 0)
        untempered_total = q_sum
        if temperature != 1.0:
            untempered_total = tl.sum(untempered, 0)
        label_logprob = tl.where(label >= 0, (z_label - q_max) * temperature - tl.log(untempered_total), nan)

        loss = tl.where(kd_weight != 0, kd_weight * divergence, 0.0) - tl.where(ce != 0, ce * label_logprob, 0.0)
        tl.store(loss_ptr + row, tl.where(status == 0, loss, nan).to(tl.float64))
        tl.store(status_ptr + row, status)
        if HAS_STATS:
            teacher_label = tl.where(label >= 0, (y_label - p_max) - p_log_sum, nan)
            store_stats(
                stats_ptr, row, divergence, -tl.sum(q_log_q, 0), -tl.sum(p_log_p_lanes, 0),
                student_top1 == teacher_top1,
                q_sum * 0.0 + 1.0, label_logprob, teacher_label, student_top1, teacher_top1, 1.0 / q_sum, 1.0 / p_sum,
            )
        q_slope, untempered_slope = ce_slopes_of(ce_slope, temperature, untempered_total)
        if KNOWS_G:
            sum_g = total_g
        if HAS_GRADIENT and not KNOWS_G:
            for block in range(0, n_blocks):
                o_v, end = block * BLOCK + o_b, block * BLOCK + BLOCK
                z, y = load_both(
                    student_row, teacher_row, student_bias_ptr, teacher_bias_ptr, student_has_bias, teacher_has_bias,
                    o_v, end, n_columns, n_readable, student_factor, student_height, teacher_factor, teacher_height,
                )
                logq, logp = (z - q_max) - q_log_sum, (y - p_max) - p_log_sum
                f, g = apply_terms(logp, logq, first_param, second_param, TERMS, N_PARAMS)
                slot = dense_gradient(
                    z, logq, g, q_max, sum_g, kd_weight, kd_slope, q_slope, untempered_slope, 0.0, temperature,
                    student_relative, student_height,
                )
                wait_for_readers(block, student_ptr, gradient_ptr)
                tl.store(gradient_row + o_v, slot.to(gradient_ptr.dtype.element_ty), mask=o_v < n_readable)
        if HAS_GRADIENT:
            if label >= 0:  # once more, now with what cross-entropy takes off
                logq, logp = (z_label - q_max) - q_log_sum, (y_label - p_max) - p_log_sum
                f, g = apply_terms(logp, logq, first_param, second_param, TERMS, N_PARAMS)
                slot = dense_gradient(
                    z_label, logq, g, q_max, sum_g, kd_weight, kd_slope, q_slope, untempered_slope, ce_slope,
                    temperature, student_relative, student_height,
                )
                tl.debug_barrier()
                tl.store(gradient_row + label, slot.to(gradient_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["n_columns", "has_labels", "has_bias", "has_tail", "has_importance", "treatment"])
def sparse_rows_kernel(
    student_ptr,  # [C, V] fp32, overwritten
    gradient_ptr,  # [C, V], any float dtype; may begin where student_ptr does
    bias_ptr,  # [V] fp32
    starts_ptr,  # [C] int64
    ends_ptr,  # [C] int64
    ids_ptr,  # [nnz] int64
    logprobs_ptr,  # [nnz] fp32
    importance_ptr,  # [nnz] fp32
    tail_ptr,  # [C] fp32
    kept_ptr,  # [nnz] fp32 scratch: the kept logits
    labels_ptr,  # [C] int64
    weight_ptr,  # [C] fp64
    loss_ptr,  # [C] fp64
    stats_ptr,  # [C, 11] fp64
    status_ptr,  # [C] int32
    student_stride, gradient_stride, n_columns, n_readable, has_labels, has_bias, has_tail, has_importance, treatment,
    factor, height, scale, relative, temperature, kd_weight, ce_weight, first_param, second_param,
    TERMS: tl.constexpr, N_PARAMS: tl.constexpr, HAS_GRADIENT: tl.constexpr, HAS_STATS: tl.constexpr,
    BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):
    """Rows of a teacher known at k ids. Moves C V (4 + 4 + d) bytes, d those of a gradient's entry, and about 50 an
    entry: one walk for the normaliser, one for the gradient. The kept logits are taken out of the row first, so that
    the tail's mass is a sum over the tail, never one minus the rest."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + row).to(tl.float32)
    student_row, gradient_row = student_ptr + row * student_stride, gradient_ptr + row * gradient_stride
    nan = float("nan")
    if weight == 0:
        skip_row(
            gradient_row, loss_ptr + row, stats_ptr + row * N_STATS, status_ptr + row, n_readable, HAS_GRADIENT,
            HAS_STATS, BLOCK,
        )
    else:
        o_b, o_e = tl.arange(0, BLOCK), tl.arange(0, ENTRIES)
        first, last = tl.load(starts_ptr + row), tl.load(ends_ptr + row)
        label, status = read_label(labels_ptr, row, has_labels, n_columns)
        z_label = load_logits(student_row, bias_ptr, has_bias, tl.maximum(label, 0), label >= 0, factor, height)

        # Take the kept logits out. Each entry first leaves its number at its id: one that finds another's there is a
        # repeat.
        outside = tl.zeros([ENTRIES], tl.int32)
        for begin in range(first, last, ENTRIES):
            o_k = begin + o_e
            ids = tl.load(ids_ptr + o_k, mask=o_k < last, other=0)
            inside = (o_k < last) & (ids >= 0) & (ids < n_columns)
            outside += ((o_k < last) & ~inside).to(tl.int32)
            kept = load_logits(student_row, bias_ptr, has_bias, ids, inside, factor, height)
            tl.store(kept_ptr + o_k, kept, mask=o_k < last)
        tl.debug_barrier()
        for begin in range(first, last, ENTRIES):
            o_k = begin + o_e
            ids = tl.load(ids_ptr + o_k, mask=o_k < last, other=0)
            inside = (o_k < last) & (ids >= 0) & (ids < n_columns)
            tl.store(student_row + ids, (o_k - first).to(tl.float32), mask=inside)
        tl.debug_barrier()
        repeated = tl.zeros([ENTRIES], tl.int32)
        for begin in range(first, last, ENTRIES):
            o_k = begin + o_e
            ids = tl.load(ids_ptr + o_k, mask=o_k < last, other=0)
            inside = (o_k < last) & (ids >= 0) & (ids < n_columns)
            number = tl.load(student_row + ids, mask=inside, other=0.0)
            repeated += (inside & (number != (o_k - first).to(tl.float32))).to(tl.int32)
        tl.debug_barrier()
        for begin in range(first, last, ENTRIES):
            o_k = begin + o_e
            ids = tl.load(ids_ptr + o_k, mask=o_k < last, other=0)
            inside = (o_k < last) & (ids >= 0) & (ids < n_columns)
            taken = tl.full([ENTRIES], KEPT, tl.int32).to(tl.float32, bitcast=True)
            tl.store(student_row + ids, taken, mask=inside)
        tl.debug_barrier()
        status |= tl.where(tl.sum(outside + repeated, 0) > 0, BAD_IDS, 0)

        # The tail's normaliser, and that of the kept ids.
        best, total = tl.full([BLOCK // 4], -float("inf"), tl.float32), tl.zeros([BLOCK // 4, 4], tl.float32)
        best_begin = tl.zeros([BLOCK // 4], tl.int32)
        for begin in range(0, n_columns, BLOCK):
            z = load_tail(
                student_row, bias_ptr, has_bias, begin + o_b, begin + BLOCK, n_columns, n_readable, factor, height
            )
            higher, total = add_to_normaliser(z, best, total)
            if HAS_STATS:
                best_begin = tl.where(higher > best, begin, best_begin)
            best = higher
        tail_max, tail_sum = join_normaliser(best, total)
        if HAS_STATS:
            tail_top1 = argmax_of(student_row, bias_ptr, has_bias, best_begin, tail_max, n_columns, factor, height)
        kept_best = tl.full([ENTRIES // 4], -float("inf"), tl.float32)
        kept_total = tl.zeros([ENTRIES // 4, 4], tl.float32)
        mass, wrong = tl.zeros([ENTRIES], tl.float32), tl.zeros([ENTRIES], tl.int32)
        for begin in range(first, last, ENTRIES):
            o_k = begin + o_e
            z = tl.load(kept_ptr + o_k, mask=o_k < last, other=-float("inf"))
            logp = tl.load(logprobs_ptr + o_k, mask=o_k < last, other=-float("inf"))
            kept_best, kept_total = add_to_normaliser(z, kept_best, kept_total)
            mass += exp(logp)
            wrong |= tl.where(logp <= LARGEST_LOGPROB, 0, BAD_TEACHER)
            if has_importance:
                importance = tl.load(importance_ptr + o_k, mask=o_k < last, other=0.0)
                wrong |= tl.where((importance >= 0) & (importance < float("inf")), 0, BAD_IMPORTANCE)
        kept_max, kept_sum = join_normaliser(kept_best, kept_total)
        q_max = tl.maximum(tail_max, kept_max)
        # Relative to the larger of both. The logarithms know nothing of that: far below it, its exponential is rounded.
        log_tail_sum, log_kept_sum = (tail_max - q_max) + tl.log(tail_sum), (kept_max - q_max) + tl.log(kept_sum)
        tail_sum = tl.where(tail_sum == 0, 0.0, tail_sum * exp(tail_max - q_max))
        kept_sum = tl.where(kept_sum == 0, 0.0, kept_sum * exp(kept_max - q_max))
        q_sum = tail_sum + kept_sum
        q_log_sum = tl.log(q_sum)
        kept_mass = tl.sum(mass, 0)
        bucket = (treatment == BUCKET) & (has_importance == 0)
        renormalise = (treatment == RENORMALIZE) & (has_importance == 0)
        tail_logp = tl.full([], -float("inf"), tl.float32)
        if has_tail:
            tail_logp = tl.load(tail_ptr + row)
        status |= tl.where((q_sum > 0) & (q_sum < float("inf")), 0, BAD_STUDENT)
        status |= tl.reduce(wrong, 0, _or)
        status |= tl.where((has_importance == 0) & ~(kept_mass <= LARGEST_MASS), BAD_TEACHER, 0)
        status |= tl.where(bucket & ~(tail_logp <= LARGEST_LOGPROB), BAD_TAIL, 0)
        status |= tl.where(bucket & ~(kept_mass + exp(tail_logp) <= LARGEST_MASS), BAD_TEACHER, 0)
        weight = tl.where(status == 0, weight, nan)

        # The events: kept ids, and with "bucket" the tail as one more.
        p_shift = tl.where(renormalise, tl.log(kept_mass), 0.0)
        q_shift = tl.where(renormalise, log_kept_sum, q_log_sum)
        f_lanes, g_lanes = tl.zeros([ENTRIES], tl.float32), tl.zeros([ENTRIES], tl.float32)
        for begin in range(first, last, ENTRIES):
            o_k = begin + o_e
            here = o_k < last
            logq = (tl.load(kept_ptr + o_k, mask=here, other=-float("inf")) - q_max) - q_shift
            logp = tl.load(logprobs_ptr + o_k, mask=here, other=-float("inf")) - p_shift
            f, g = apply_terms(logp, logq, first_param, second_param, TERMS, N_PARAMS)
            if has_importance:
                importance = tl.load(importance_ptr + o_k, mask=here, other=0.0)
                f, g = f * importance, g * importance
            f_lanes += tl.where(here, f, 0.0)
            g_lanes += tl.where(here, g, 0.0)
        divergence, sum_g = tl.sum(f_lanes, 0), tl.sum(g_lanes, 0)
        tail_logq = log_tail_sum - q_log_sum
        f_tail, g_tail = apply_terms(tail_logp, tail_logq, first_param, second_param, TERMS, N_PARAMS)
        divergence += tl.where(bucket, f_tail, 0.0)
        sum_g += tl.where(bucket, g_tail, 0.0)

        untempered_total = q_sum
        if temperature != 1.0:
            lanes = tl.zeros([BLOCK // 4], tl.float32)
            for begin in range(0, n_columns, BLOCK):
                z = load_tail(
                    student_row, bias_ptr, has_bias, begin + o_b, begin + BLOCK, n_columns, n_readable, factor, height
                )
                lanes += fold(exp((z - q_max) * temperature))
            kept_lanes = tl.zeros([ENTRIES], tl.float32)
            for begin in range(first, last, ENTRIES):
                o_k = begin + o_e
                z = tl.load(kept_ptr + o_k, mask=o_k < last, other=-float("inf"))
                kept_lanes += exp((z - q_max) * temperature)
            untempered_total = tl.sum(lanes, 0) + tl.sum(kept_lanes, 0)
        label_logprob = tl.where(label >= 0, (z_label - q_max) * temperature - tl.log(untempered_total), nan)
        ce = tl.where(label >= 0, ce_weight, 0.0)
        loss = tl.where(kd_weight != 0, kd_weight * divergence, 0.0) - tl.where(ce != 0, ce * label_logprob, 0.0)
        tl.store(loss_ptr + row, tl.where(status == 0, loss, nan).to(tl.float64))
        tl.store(status_ptr + row, status)

        # What an id outside the kept set gets is proportional to its q: the tail's g spread over it, less its share of
        # G.
        spread = tl.where(renormalise, 0.0, -sum_g)
        spread += tl.where(bucket & (tail_sum > 0), g_tail * (q_sum / tail_sum), 0.0)
        kd_slope, ce_slope = kd_weight / temperature * scale * weight, ce * scale * weight
        q_slope, untempered_slope = ce_slopes_of(ce_slope, temperature, untempered_total)
        q_slope += tl.where(kd_weight != 0, spread * kd_slope, 0.0)
        q_log_q = tl.zeros([BLOCK // 4], tl.float32)
        if HAS_GRADIENT or HAS_STATS:
            for block in range(0, tl.cdiv(n_columns, BLOCK)):
                o_v, end = block * BLOCK + o_b, block * BLOCK + BLOCK
                z = load_tail(
                    student_row, bias_ptr, has_bias, o_v, end, n_columns, n_readable, factor, height
                )
                logq = (z - q_max) - q_log_sum
                if HAS_STATS:
                    q_log_q += fold(p_log_p(logq))
                if HAS_GRADIENT:
                    slot = tail_gradient(
                        z, logq, q_max, q_slope, untempered_slope, 0.0, temperature, relative, height
                    )
                    wait_for_readers(block, student_ptr, gradient_ptr)
                    tl.store(gradient_row + o_v, slot.to(gradient_ptr.dtype.element_ty), mask=o_v < n_readable)
            tl.debug_barrier()
        if HAS_GRADIENT:
            if label >= 0:  # once more, now with what cross-entropy takes off; if it was kept, that follows
                logq = (z_label - q_max) - q_log_sum
                slot = tail_gradient(
                    z_label, logq, q_max, q_slope, untempered_slope, ce_slope, temperature, relative, height
                )
                tl.store(gradient_row + label, slot.to(gradient_ptr.dtype.element_ty))
                tl.debug_barrier()

        kept_q_log_q, kept_p_log_p = tl.zeros([ENTRIES], tl.float32), tl.zeros([ENTRIES], tl.float32)
        best_logp = tl.full([ENTRIES], -float("inf"), tl.float32)
        best_logp_id = tl.full([ENTRIES], 2147483647, tl.int64)
        top_kept_id = tl.full([ENTRIES], 2147483647, tl.int64)
        label_logp, has_label_logp = tl.zeros([ENTRIES], tl.float32), tl.zeros([ENTRIES], tl.int32)
        for begin in range(first, last, ENTRIES):
            o_k = begin + o_e
            here = o_k < last
            ids = tl.load(ids_ptr + o_k, mask=here, other=0)
            z = tl.load(kept_ptr + o_k, mask=here, other=-float("inf"))
            given = tl.load(logprobs_ptr + o_k, mask=here, other=-float("inf"))
            if HAS_GRADIENT:
                logq, logp = (z - q_max) - q_shift, given - p_shift
                f, g = apply_terms(logp, logq, first_param, second_param, TERMS, N_PARAMS)
                if has_importance:
                    g *= tl.load(importance_ptr + o_k, mask=here, other=0.0)
                slot = tl.where(kd_weight != 0, (g - exp(logq) * sum_g) * kd_slope, 0.0)
                slot += (exp((z - q_max) * temperature) / untempered_total - (ids == label).to(tl.float32)) * ce_slope
                if height > 0:
                    slot *= 1.0 - (z * relative) * (z * relative)
                inside = here & (ids >= 0) & (ids < n_columns)
                tl.store(gradient_row + ids, slot.to(gradient_ptr.dtype.element_ty), mask=inside)
            if HAS_STATS:
                kept_q_log_q += p_log_p((z - q_max) - q_log_sum)
                kept_p_log_p += p_log_p(given)
                top_kept_id = tl.where(here & (z == q_max), tl.minimum(ids, top_kept_id), top_kept_id)
                better = here & ((given > best_logp) | ((given == best_logp) & (ids < best_logp_id)))
                best_logp, best_logp_id = tl.where(better, given, best_logp), tl.where(better, ids, best_logp_id)
                label_logp += tl.where(here & (ids == label), given, 0.0)
                has_label_logp += (here & (ids == label)).to(tl.int32)
        if HAS_STATS:
            tail_top1 = tl.where(tail_max == q_max, tail_top1, 2147483647).to(tl.int64)
            student_top1 = tl.minimum(tl.min(top_kept_id, 0), tail_top1)
            top_logp = tl.max(best_logp, 0)
            teacher_top1 = tl.min(tl.where(best_logp == top_logp, best_logp_id, 2147483647), 0)
            teacher_top1 = tl.where(last > first, teacher_top1, -1)
            teacher_label = tl.where(tl.sum(has_label_logp, 0) > 0, tl.sum(label_logp, 0), nan)
            store_stats(
                stats_ptr, row, divergence, -(tl.sum(q_log_q, 0) + tl.sum(kept_q_log_q, 0)),
                -(tl.sum(kept_p_log_p, 0) + p_log_p(tail_logp)), student_top1 == teacher_top1, kept_mass, label_logprob,
                teacher_label, student_top1, teacher_top1, 1.0 / q_sum, tl.where(last > first, exp(top_logp), nan),
            )


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def scale_kernel(
    x_ptr,  # [n], any float dtype
    scale_ptr,  # [] fp32 or fp64
    n, BLOCK: tl.constexpr,
):
    """``x *= scale``, in fp32. Moves 2 n elements, and nothing where the scale is 1."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + o_n, mask=o_n < n)
        tl.store(x_ptr + o_n, (x.to(tl.float32) * scale).to(x_ptr.dtype.element_ty), mask=o_n < n)
