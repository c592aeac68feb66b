"""Repairs of Triton's interpreter, for the tests: bf16 is rounded and multiplied as on a GPU; half of the time is
saved."""

from __future__ import annotations

import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class _Scope:
    """The patches of one launch; :meth:`restore` ends it."""

    def __init__(self, scope, patched: set) -> None:
        self.scope, self.patched = scope, patched

    def restore(self) -> None:
        self.patched.clear()
        self.scope.restore()


def _patch_the_language_once() -> None:
    """Once a launch, not anew for every call of a device function: those find the language patched already."""
    patch_lang, patched = interpreter._patch_lang, set()

    def patch_once(fn):
        modules = frozenset(id(x) for x in fn.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core))
        if modules in patched:
            return None  # a device function's patches are those of the launch around it, which restores them
        patched.add(modules)
        return _Scope(patch_lang(fn), patched)

    interpreter._patch_lang = patch_once


def _round_bf16() -> None:
    """fp32 to bf16 goes to the nearest, ties to even, as on every GPU. The interpreter cuts the lower bits off."""
    convert = interpreter._convert_float

    def convert_float(x, from_dtype, to_dtype, rounding_mode):
        if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
            return convert(x, from_dtype, to_dtype, rounding_mode)
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)

    interpreter._convert_float = convert_float


def _multiply_bf16() -> None:
    """A product of bf16 is that of the numbers. The interpreter multiplies the 16 bits of each, as integers."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot_of_numbers(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot_of_numbers


def install() -> None:
    _patch_the_language_once()
    _round_bf16()
    _multiply_bf16()
