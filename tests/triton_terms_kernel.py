"""Kernels that do nothing but call a formula, or a function of its vocabulary, for the tests of Triton's rendering."""

import triton
import triton.language as tl


@triton.jit
def terms_kernel(
    logp_ptr,  # [n]
    logq_ptr,  # [n]
    f_ptr,  # [n]
    g_ptr,  # [n]
    n,
    first_param,
    second_param,
    TERMS: tl.constexpr,
    PARAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``f, g = TERMS(logp, logq, *params)``. Moves 16 n bytes in fp32."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < n
    logp = tl.load(logp_ptr + o_n, mask=mask, other=-float("inf"))
    logq = tl.load(logq_ptr + o_n, mask=mask, other=-float("inf"))
    if PARAMS == 0:
        f, g = TERMS(logp, logq)
    elif PARAMS == 1:
        f, g = TERMS(logp, logq, first_param)
    else:
        f, g = TERMS(logp, logq, first_param, second_param)
    tl.store(f_ptr + o_n, f, mask=mask)
    tl.store(g_ptr + o_n, g, mask=mask)


@triton.jit
def vocabulary_kernel(
    x_ptr,  # [n] fp32
    y_ptr,  # [n] fp32: out
    n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr,
):
    """A function of the formulas' vocabulary. Moves 8 n bytes."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + o_n, FUNCTION(tl.load(x_ptr + o_n, mask=o_n < n, other=1.0)), mask=o_n < n)
