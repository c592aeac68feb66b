"""The three matrix products of a language-model head, on the device where it lives.

With G the gradient of the loss with respect to the logits of a chunk of rows::

    logits    = hidden @ weight.T        [C, V]
    d hidden  = G @ weight               [C, H]
    d weight += G.T @ hidden             [V, H], summed in fp32

Logits are never rounded to bf16 or fp16, unless the caller names that (``precision="input"``): the gradient of a
divergence is a difference p - q, which rounding the logits makes wrong by 3 to 30 percent as the student gets good.
G itself may be rounded: its error stays relative to G.

On a GPU the products of half-precision operands are written in fp32 (``out_dtype``). torch's CPU products cannot do
that, so there half-precision weights are widened tile by tile and multiplied in fp32; a bf16 input is exact in fp32.
Where a CPU multiplies bf16 in hardware, the gradient of a bf16 head is a bf16 tile there as well.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from kd_kernels.logits import LinearLogits

WEIGHT_TILE_BYTES = 8 << 20
"""Widened rows of a half-precision weight held at a time: enough columns for the product to run at full speed."""

PRODUCT_COLUMNS = 8192
"""Columns of a product on a CPU. A BLAS may split the sum over threads and then holds the result twice: this bounds the
second."""


@functools.lru_cache(maxsize=1)
def has_native_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware; without, torch's bf16 product is slower than fp32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


class Head(ABC):
    """The products of one head.

    Args:
        linear: the noun, ``hidden`` of shape ``[N, H]``.
        dtype: work dtype: fp32, or fp64 where an input is fp64.
        columns: only the first so many rows of ``weight`` exist.
        precision: "float32", or "input" to round the logits to the dtype of the inputs.
        autocast: the dtype that autocast wants the inputs rounded to, or None.

    Attributes:
        tile_dtype: in which the gradient of a chunk of logits is wanted.
        fixed_bytes: scratch beside that of the rows.
    """

    tile_dtype: torch.dtype
    fixed_bytes: int = 0

    def __init__(
        self, linear: LinearLogits, dtype: torch.dtype, columns: int, precision: str, autocast: torch.dtype | None
    ) -> None:
        self.dtype, self.columns, self.precision = dtype, columns, precision
        self.autocast = None if dtype == torch.float64 else autocast
        self.weight = linear.weight[:columns]

    def rounded(self, x: Tensor) -> Tensor:
        """As autocast wants it."""
        return x if self.autocast is None else x.to(self.autocast)

    def borrow(self, wider: Head) -> None:  # noqa: B027  (most hold none)
        """Use the scratch of a head of as many columns or more."""

    def close(self) -> None:  # noqa: B027  (most hold none)
        """Give the scratch back."""

    @abstractmethod
    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """``hidden @ weight.T`` into ``out``, ``[C, V]`` in the work dtype; ``hidden`` is :meth:`rounded`."""

    @abstractmethod
    def hidden_gradient(self, gradient: Tensor, out: Tensor | None) -> Tensor:
        """``gradient @ weight``, into ``out`` if its dtype is one that the product can write, else into a new
        tensor."""

    @abstractmethod
    def weight_total(self, chunks: int) -> torch.dtype:
        """The dtype in which the gradient of the weight is to be summed."""

    @abstractmethod
    def add_weight_gradient(self, gradient: Tensor, hidden: Tensor, total: Tensor, is_first: bool) -> None:
        """``total += gradient.T @ hidden``; where it ``is_first``, ``total`` is memory that nothing was written to."""


class CpuHead(Head):
    """Widened tiles in fp32; the gradient tile and its products in bf16 where the processor has them and the inputs are
    bf16."""

    def __init__(
        self, linear: LinearLogits, dtype: torch.dtype, columns: int, precision: str, autocast: torch.dtype | None
    ) -> None:
        super().__init__(linear, dtype, columns, precision, autocast)
        inputs = {self.weight.dtype, linear.hidden.dtype} if self.autocast is None else {self.autocast}
        multiplies_bf16 = inputs == {torch.bfloat16} and dtype == torch.float32 and has_native_bf16_products()
        self.tile_dtype = torch.bfloat16 if multiplies_bf16 else dtype
        width = self.weight.shape[1]
        self.widens = self.weight.dtype != dtype or self.autocast is not None
        self.tile = max(64, WEIGHT_TILE_BYTES // (width * dtype.itemsize)) if self.widens else PRODUCT_COLUMNS
        self.fixed_bytes = min(self.tile, columns) * width * dtype.itemsize if self.widens else 0

    @functools.cached_property
    def _widened(self) -> Tensor:
        """``fixed_bytes`` of memory for all tiles: one that is freed leaves a hole in which the next has no room."""
        return torch.empty(self.fixed_bytes // self.dtype.itemsize, dtype=self.dtype)

    def borrow(self, wider: Head) -> None:
        if self.widens:
            vars(self)["_widened"] = wider._widened

    def close(self) -> None:
        vars(self).pop("_widened", None)

    def _in_widened(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """A matrix in the given dtype, in that memory if there is room for it. Valid until the next one."""
        room = self._widened.view(dtype)[: source.numel()]
        return room.view(source.shape).copy_(source) if room.numel() == source.numel() else source.to(dtype)

    def _tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Pieces of the weight, in the given dtype, that cover its columns. Each is valid until the next."""
        for piece in pieces(self.columns, self.tile):
            weight = self.weight[piece]
            yield piece, self._in_widened(self.rounded(weight), dtype) if self.widens else weight

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        if self.precision == "input":
            low = self.weight.dtype if self.autocast is None else self.autocast
            out.copy_(hidden.to(low) @ self.rounded(self.weight).t())
            return
        hidden = hidden.to(self.dtype)
        for piece, weight in self._tiles(self.dtype):
            torch.mm(hidden, weight.t(), out=out[:, piece])

    def hidden_gradient(self, gradient: Tensor, out: Tensor | None) -> Tensor:
        if self.weight.dtype == (self.autocast or self.weight.dtype) == self.tile_dtype:
            is_fit = out is not None and out.dtype == self.tile_dtype
            return torch.mm(gradient, self.weight, out=out) if is_fit else gradient @ self.weight
        total = gradient.new_zeros(gradient.shape[0], self.weight.shape[1], dtype=self.dtype)
        for piece, weight in self._tiles(self.tile_dtype):
            if self.tile_dtype == self.dtype:
                product_into(total, gradient[:, piece], weight, adds=True)
            else:
                total += gradient[:, piece] @ weight
        return total

    def weight_total(self, chunks: int) -> torch.dtype:
        return self.tile_dtype if chunks == 1 else self.dtype

    def add_weight_gradient(self, gradient: Tensor, hidden: Tensor, total: Tensor, is_first: bool) -> None:
        if total.dtype == self.tile_dtype:
            product_into(total, gradient.t(), hidden.to(total.dtype), adds=not is_first)
            return
        # torch has no product of bf16 with an fp32 sum on a CPU: the tile is widened where a tile of the weight was.
        hidden = hidden.to(self.dtype)
        for piece in pieces(self.columns, max(64, self.fixed_bytes // (gradient.shape[0] * self.dtype.itemsize))):
            widened = self._in_widened(gradient[:, piece], self.dtype)
            product_into(total[piece], widened.t(), hidden, adds=not is_first)


class GpuHead(Head):
    """Products on the matrix units: half-precision operands, fp32 sums, and fp32 results where they are logits or sums.

    Operands of two dtypes meet in the wider one; a weight that must be rounded or widened for that is held in the new
    dtype for the length of the call (``fixed_bytes``).
    """

    def __init__(
        self, linear: LinearLogits, dtype: torch.dtype, columns: int, precision: str, autocast: torch.dtype | None
    ) -> None:
        super().__init__(linear, dtype, columns, precision, autocast)
        self.operand = self.autocast or torch.promote_types(linear.hidden.dtype, self.weight.dtype)
        if dtype == torch.float64:
            self.operand = dtype
        if self.weight.dtype != self.operand:
            self.fixed_bytes = self.weight.numel() * self.operand.itemsize
            self.weight = self.weight.to(self.operand)
        self.tile_dtype = self.operand

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        hidden = hidden.to(self.operand)
        if self.precision == "input":
            out.copy_(hidden @ self.weight.t())
        else:
            product_into(out, hidden, self.weight.t())

    def hidden_gradient(self, gradient: Tensor, out: Tensor | None) -> Tensor:
        if out is None or out.dtype not in (self.operand, torch.float32):
            out = gradient.new_empty(gradient.shape[0], self.weight.shape[1])
        product_into(out, gradient, self.weight)
        return out

    def weight_total(self, chunks: int) -> torch.dtype:
        # A single product is rounded once, as any is; fp16 has no room before its loss scale is applied.
        return torch.bfloat16 if chunks == 1 and self.operand == torch.bfloat16 else self.dtype

    def add_weight_gradient(self, gradient: Tensor, hidden: Tensor, total: Tensor, is_first: bool) -> None:
        product_into(total, gradient.t(), hidden.to(self.operand), adds=not is_first)


def pieces(columns: int, width: int) -> Iterator[slice]:
    """Slices of at most ``width`` that cover ``columns``."""
    for begin in range(0, columns, width):
        yield slice(begin, min(begin + width, columns))


def product_into(out: Tensor, left: Tensor, right: Tensor, adds: bool = False) -> None:
    """``out = left @ right`` or ``out += left @ right``, where ``out`` has the operands' dtype or, on a GPU, is
    fp32."""
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, out=out) if adds else torch.mm(left, right, out=out)
    elif adds:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def head(
    linear: LinearLogits, dtype: torch.dtype, columns: int, precision: str = "float32",
    autocast: torch.dtype | None = None
) -> Head:
    """The head of a noun, for the device that it is on."""
    kind = CpuHead if linear.device.type == "cpu" else GpuHead
    return kind(linear, dtype, columns, precision, autocast)
