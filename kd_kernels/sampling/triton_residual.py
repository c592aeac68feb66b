"""What a refused draft leaves of the teacher, as a Triton kernel: a row of logits, drawn from as any other
(``triton_kernels.py``). As there, multiplications and additions must not be fused."""

import triton
import triton.language as tl

from kd_kernels.sampling.triton_kernels import MOST_IDS, N_BOUNDS, largest_of, safe_inverse, stays
from kd_kernels.triton_rows import LEAST_KEY, finite_or_zero, load_block, load_raw, logits_of


@triton.jit
def law_of(
    row, raw_row, bias_ptr, has_bias, inverse_ptr, maxima_ptr, bounds_ptr, min_p_ptr, has_min_p, n_columns, n_readable,
    n_groups, factor, height, FILTERED: tl.constexpr, BLOCK: tl.constexpr,
):
    """How a row is tempered and cut: its largest logit, 1 / T, the first id with that logit where T is 0, and what the
    filters leave, as :func:`stays` takes it."""
    inverse, is_greedy, is_valid = safe_inverse(inverse_ptr, row)
    peak = finite_or_zero(largest_of(maxima_ptr + row * n_groups, n_groups, BLOCK))
    best = tl.full([], MOST_IDS, tl.int32)
    if is_greedy:
        for begin in range(0, n_columns, BLOCK):
            o_v = begin + tl.arange(0, BLOCK)
            z = load_block(raw_row, bias_ptr, has_bias, o_v, begin + BLOCK, n_columns, n_readable, factor, height)
            best = tl.minimum(best, tl.min(tl.where(z == peak, o_v, MOST_IDS), 0))
    key, last = tl.full([], LEAST_KEY, tl.int32), tl.full([], MOST_IDS, tl.int32)
    floor = tl.full([], -float("inf"), tl.float64)
    if FILTERED:
        key, last = tl.load(bounds_ptr + row * N_BOUNDS), tl.load(bounds_ptr + row * N_BOUNDS + 1)
        if has_min_p:
            floor = tl.log(tl.load(min_p_ptr + row))
    return peak, inverse, is_greedy, best, key, last, floor


@triton.jit
def heights_of(
    raw, bias_ptr, has_bias, o_v, n_columns, factor, height, peak, inverse, is_greedy, best, key, last, floor,
    FILTERED: tl.constexpr,
):
    """``(z - peak) / T`` in fp64 of products, -inf for what is cut; where T is 0, 0 for the first id with the largest
    logit alone."""
    z = logits_of(raw, bias_ptr, has_bias, o_v, n_columns, factor, height)
    tempered = (z.to(tl.float64) - peak.to(tl.float64)) * inverse.to(tl.float64)
    if FILTERED:
        tempered = tl.where(stays(z, o_v, key, last, floor, peak, inverse), tempered, -float("inf"))
    return tl.where(is_greedy, tl.where(o_v == best, 0.0, -float("inf")), tempered)


@triton.jit(do_not_specialize=[
    "n_columns", "teacher_has_bias", "student_has_bias", "teacher_has_min_p", "student_has_min_p",
])
def residual_kernel(
    teacher_ptr,  # [R, V], any float dtype
    student_ptr,  # [R, V], any float dtype
    teacher_bias_ptr,  # [V] fp32
    student_bias_ptr,  # [V] fp32
    teacher_inverse_ptr,  # [R] fp32
    student_inverse_ptr,  # [R] fp32
    teacher_maxima_ptr,  # [R, G] fp32
    student_maxima_ptr,  # [R, G] fp32
    teacher_bounds_ptr,  # [R, 2] int32
    student_bounds_ptr,  # [R, 2] int32
    teacher_min_p_ptr,  # [R] fp64
    student_min_p_ptr,  # [R] fp64
    left_ptr,  # [R, V] fp32: out, with room for n_readable columns
    teacher_stride, student_stride, left_stride, n_columns, n_readable, n_groups, teacher_has_bias,
    student_has_bias, teacher_has_min_p, student_has_min_p, teacher_factor, teacher_height, student_factor,
    student_height,
    TEACHER_FILTERED: tl.constexpr, STUDENT_FILTERED: tl.constexpr, BLOCK: tl.constexpr,
):
    """``log(max(p - q, 0))``, or log p where that leaves no id. In fp64: where the student is near the teacher, fp32
    sums are as far off as p is from q. Moves (4 + 2 s) V bytes a row, s those of a logit, and 2 s V more from cache."""
    row = tl.program_id(0).to(tl.int64)
    teacher_row, student_row = teacher_ptr + row * teacher_stride, student_ptr + row * student_stride
    left_row, o_b = left_ptr + row * left_stride, tl.arange(0, BLOCK)
    p_peak, p_inverse, p_greedy, p_best, p_key, p_last, p_floor = law_of(
        row, teacher_row, teacher_bias_ptr, teacher_has_bias, teacher_inverse_ptr, teacher_maxima_ptr,
        teacher_bounds_ptr, teacher_min_p_ptr, teacher_has_min_p, n_columns, n_readable, n_groups, teacher_factor,
        teacher_height, TEACHER_FILTERED, BLOCK,
    )
    q_peak, q_inverse, q_greedy, q_best, q_key, q_last, q_floor = law_of(
        row, student_row, student_bias_ptr, student_has_bias, student_inverse_ptr, student_maxima_ptr,
        student_bounds_ptr, student_min_p_ptr, student_has_min_p, n_columns, n_readable, n_groups, student_factor,
        student_height, STUDENT_FILTERED, BLOCK,
    )
    p_lanes, q_lanes = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for begin in range(0, n_columns, BLOCK):
        o_v, end = begin + o_b, begin + BLOCK
        raw_p = load_raw(teacher_row, o_v, end, n_columns, n_readable)  # both before either is waited for
        raw_q = load_raw(student_row, o_v, end, n_columns, n_readable)
        p_lanes += tl.exp(heights_of(
            raw_p, teacher_bias_ptr, teacher_has_bias, o_v, n_columns, teacher_factor, teacher_height, p_peak,
            p_inverse, p_greedy, p_best, p_key, p_last, p_floor, TEACHER_FILTERED,
        ))
        q_lanes += tl.exp(heights_of(
            raw_q, student_bias_ptr, student_has_bias, o_v, n_columns, student_factor, student_height, q_peak,
            q_inverse, q_greedy, q_best, q_key, q_last, q_floor, STUDENT_FILTERED,
        ))
    p_mass, q_mass = tl.log(tl.sum(p_lanes, 0)), tl.log(tl.sum(q_lanes, 0))
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    for begin in range(0, n_columns, BLOCK):
        o_v, end = begin + o_b, begin + BLOCK
        raw_p = load_raw(teacher_row, o_v, end, n_columns, n_readable)
        raw_q = load_raw(student_row, o_v, end, n_columns, n_readable)
        log_p = heights_of(
            raw_p, teacher_bias_ptr, teacher_has_bias, o_v, n_columns, teacher_factor, teacher_height, p_peak,
            p_inverse, p_greedy, p_best, p_key, p_last, p_floor, TEACHER_FILTERED,
        ) - p_mass
        log_q = heights_of(
            raw_q, student_bias_ptr, student_has_bias, o_v, n_columns, student_factor, student_height, q_peak,
            q_inverse, q_greedy, q_best, q_key, q_last, q_floor, STUDENT_FILTERED,
        ) - q_mass
        is_left = log_p > log_q
        share = tl.exp(tl.where(is_left, log_q - log_p, -1.0))
        left = tl.where(is_left, log_p + tl.log(1.0 - share), -float("inf")).to(tl.float32)
        tl.store(left_row + o_v, left, mask=o_v < n_readable)
        highest = tl.maximum(highest, left)
    if tl.max(highest, 0) == -float("inf"):
        for begin in range(0, n_columns, BLOCK):
            o_v = begin + o_b
            raw_p = load_raw(teacher_row, o_v, begin + BLOCK, n_columns, n_readable)
            log_p = heights_of(
                raw_p, teacher_bias_ptr, teacher_has_bias, o_v, n_columns, teacher_factor, teacher_height, p_peak,
                p_inverse, p_greedy, p_best, p_key, p_last, p_floor, TEACHER_FILTERED,
            ) - p_mass
            tl.store(left_row + o_v, log_p.to(tl.float32), mask=o_v < n_readable)
