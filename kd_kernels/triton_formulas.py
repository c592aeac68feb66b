"""The vocabulary of the formulas in ``divergences.py`` as Triton device functions. The compiler's own exponential and
logarithm take more instructions than a walk has time for while it reads logits.
"""

import triton
import triton.language as tl

from kd_kernels.triton_rows import LOG2_E
from kd_kernels.triton_rows import exp as exp_small

LN_2 = tl.constexpr(0.6931471805599453)
LN_2_HIGH = tl.constexpr(0.693359375)
"""So few bits of ln 2 that a whole number of up to 150 times it is exact."""
LN_2_LOW = tl.constexpr(-2.12194440e-4)
ROUND = tl.constexpr(12582912.0)
"""1.5 2^23: what is added to it is rounded to a whole number."""
ROOT_HALF = tl.constexpr(0x3F3504F3)
"""Bits of sqrt(1/2)."""


@triton.jit
def where(condition, x, y):
    """``x`` where the condition holds, else ``y``."""
    return tl.where(condition, x, y)


@triton.jit
def abs(x):
    """``|x|``."""
    return tl.abs(x)


@triton.jit
def exp_fall(x):
    """``e^x`` for x of at most 0, where the error of ``x log2(e)`` is below 2^-24 of the largest result, 1. The power's
    own is 2^-22 of it."""
    return exp_small(x)


@triton.jit
def exp(x):
    """``e^x`` of any x, as good as the GPU's power of two: ``2^n e^r``, where r is what x has beyond n ln 2."""
    x = tl.maximum(x, -104.0)
    n = tl.minimum((x * LOG2_E + ROUND) - ROUND, 127.0)
    r = (x - n * LN_2_HIGH) - n * LN_2_LOW
    return exp_small(r) * tl.exp2(n)


@triton.jit
def log(x):
    """``ln x`` within 1.3 ulp, of normal positive numbers alone. 15 instructions; libdevice's, which knows all others,
    has 22."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - ROOT_HALF) >> 23
    # The mantissa in [sqrt(1/2), sqrt(2)): its logarithm is small there, and has all its digits.
    r = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = r * 0.08734750747680664 - 0.14307482540607452
    p = p * r + 0.14917989075183868
    p = p * r - 0.165705144405365
    p = p * r + 0.19962070882320404
    p = p * r - 0.25001755356788635
    p = p * r + 0.33333951234817505
    p = p * r - 0.49999991059303284
    return exponent.to(tl.float32) * LN_2 + (r * r * p + r)
