"""From nouns to chunks of rows of logits: the products of the language-model head, and the memory that they may take.

Every verb walks its rows in chunks through a :class:`Source`. A source yields :class:`RawRows`: the *products* of a chunk,
in fp32 (fp64 where an input is fp64), with the elementwise map that turns them into logits still to be applied, because
the row kernels apply it while they read.

Products are never rounded to bf16 or fp16, unless the caller names that (``precision="input"``): the gradient of a
divergence is a difference p - q, which rounding the logits makes wrong by 3 to 30 percent as the student gets good. On a
CPU, torch's product of two bf16 matrices rounds its result, so half-precision weights are widened tile by tile and
multiplied in fp32; a bf16 input is exact in fp32, and the result is what fp32 accumulation gives.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Iterator

import torch
from torch import Tensor

from kd_kernels import _check
from kd_kernels.logits import EnsembleLogits, LinearLogits, Logits, vocab

WEIGHT_TILE_BYTES = 8 << 20
"""Widened rows of a half-precision weight held at a time: enough columns for the product to run at full speed."""

DEFAULT_SCRATCH_BYTES = {"cpu": 256 << 20}
"""Scratch that a verb takes when the caller gives no ``max_scratch_bytes``, by device type."""
FALLBACK_SCRATCH_BYTES = 1 << 30


@dataclass(frozen=True)
class RawRows:
    """Rows that stand for logits ``softcap * tanh(scale * (raw + bias) / softcap)``; ``raw`` is ``[C, V]``, work dtype."""

    raw: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self) -> Tensor:
        """``[C, V]``, in the dtype of ``raw``. A new tensor unless there is nothing to apply."""
        z = self.raw
        if self.bias is not None:
            z = z + self.bias
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def work_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any of the tensors is, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def tensors_of(logits: Logits) -> list[Tensor]:
    """Every tensor in a dense noun."""
    if isinstance(logits, Tensor):
        return [logits]
    if isinstance(logits, LinearLogits):
        return [t for t in (logits.hidden, logits.weight, logits.bias) if t is not None]
    return [t for member in logits.members for t in tensors_of(member)]


@functools.lru_cache(maxsize=1)
def has_native_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware; without, torch's bf16 product is slower than fp32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


class Source(ABC):
    """Rows of one noun, chunk by chunk. ``bytes_per_row`` and ``fixed_bytes`` say what its scratch takes."""

    bytes_per_row: int = 0
    fixed_bytes: int = 0

    @abstractmethod
    def open(self, rows_per_chunk: int) -> None:
        """Allocate scratch for chunks of at most so many rows."""

    @abstractmethod
    def chunk(self, begin: int, end: int) -> RawRows:
        """Rows ``begin`` to ``end`` of those selected. Valid until the next call."""


class TensorSource(Source):
    """Logits that exist. Rows are viewed where they can be, copied to the work dtype where they cannot.

    Args:
        logits: ``[N, V]``.
        rows: int64 ``[M]``, or None for all.
        writable: the caller will overwrite the rows (with their gradient), so they must not be the noun's own.
    """

    def __init__(self, logits: Tensor, rows: Tensor | None, dtype: torch.dtype, columns: int, writable: bool = False) -> None:
        self.logits, self.rows, self.dtype = logits[:, :columns], rows, dtype
        self.copies = writable or rows is not None or logits.dtype != dtype or (columns > 1 and logits.stride(1) != 1)
        self.bytes_per_row = columns * dtype.itemsize if self.copies else 0

    def open(self, rows_per_chunk: int) -> None:
        if self.copies:
            self.scratch = torch.empty(rows_per_chunk, self.logits.shape[1], dtype=self.dtype, device=self.logits.device)

    def chunk(self, begin: int, end: int) -> RawRows:
        picked = self.logits[begin:end] if self.rows is None else self.logits[self.rows[begin:end]]
        return RawRows(self.scratch[: end - begin].copy_(picked) if self.copies else picked)


class LinearSource(Source):
    """Products of a head, ``hidden @ weight.T``, and their backward.

    Args:
        linear: the noun, ``hidden`` of shape ``[N, H]``.
        rows: int64 ``[M]``, or None for all: rows left out take no part in any product.
        dtype: work dtype of the products.
        columns: only the first so many rows of ``weight`` exist.
        precision: "float32", or "input" to round the products to the dtype of the inputs (cheaper where the hardware
            multiplies bf16; wrong by percents in the gradient of a divergence).
        autocast: the dtype that autocast wants the inputs rounded to, or None.
    """

    def __init__(
        self, linear: LinearLogits, rows: Tensor | None, dtype: torch.dtype, columns: int, precision: str = "float32",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.linear, self.rows, self.dtype, self.columns, self.precision = linear, rows, dtype, columns, precision
        self.autocast = None if dtype == torch.float64 else autocast
        self.weight = linear.weight[:columns]
        self.bias = None if linear.bias is None else linear.bias[:columns].to(dtype).contiguous()
        width = self.weight.shape[1]
        self.widens = self.weight.dtype != dtype or self.autocast is not None
        self.tile = max(64, WEIGHT_TILE_BYTES // (width * dtype.itemsize)) if self.widens else columns
        self.bytes_per_row = columns * dtype.itemsize + width * dtype.itemsize
        self.fixed_bytes = min(self.tile, columns) * width * dtype.itemsize if self.widens else 0
        # A product that is rounded to the input's dtype anyway (the gradients) may use hardware bf16.
        self.low_precision = self.weight.dtype if self.autocast is None else self.autocast
        inputs = {self.weight.dtype, linear.hidden.dtype} if self.autocast is None else {self.autocast}
        self.uses_bf16 = (
            inputs == {torch.bfloat16} and self.weight.device.type == "cpu" and has_native_bf16_products()
        )

    def open(self, rows_per_chunk: int) -> None:
        self.scratch = torch.empty(rows_per_chunk, self.columns, dtype=self.dtype, device=self.weight.device)

    def _rounded(self, x: Tensor) -> Tensor:
        return x if self.autocast is None else x.to(self.autocast)

    def hidden(self, begin: int, end: int) -> Tensor:
        """Hidden states of the rows, ``[C, H]``, rounded as autocast wants them."""
        hidden = self.linear.hidden
        return self._rounded(hidden[begin:end] if self.rows is None else hidden[self.rows[begin:end]])

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Pieces of the weight, in the work dtype, that cover its columns."""
        for begin in range(0, self.columns, self.tile):
            piece = slice(begin, min(begin + self.tile, self.columns))
            yield piece, self._rounded(self.weight[piece]).to(self.dtype)

    def chunk(self, begin: int, end: int) -> RawRows:
        raw, hidden = self.scratch[: end - begin], self.hidden(begin, end)
        if self.precision == "input":
            raw.copy_(hidden.to(self.low_precision) @ self._rounded(self.weight).t())
        else:
            hidden = hidden.to(self.dtype)
            for piece, weight in self.tiles():
                torch.mm(hidden, weight.t(), out=raw[:, piece])
        return RawRows(raw, self.bias, self.linear.scale, self.linear.softcap)


class EnsembleSource(Source):
    """Several teachers reduced densely: mean of logits, or log of the mean probability."""

    def __init__(self, ensemble: EnsembleLogits, members: list[Source], dtype: torch.dtype, columns: int) -> None:
        self.ensemble, self.members, self.dtype, self.columns = ensemble, members, dtype, columns
        # The result, one member's logits after its map, and one temporary of the reduction.
        self.bytes_per_row = 3 * columns * dtype.itemsize + sum(member.bytes_per_row for member in members)
        self.fixed_bytes = sum(member.fixed_bytes for member in members)

    def open(self, rows_per_chunk: int) -> None:
        device = self.ensemble.device
        self.scratch = torch.empty(rows_per_chunk, self.columns, dtype=self.dtype, device=device)
        for member in self.members:
            member.open(rows_per_chunk)

    def chunk(self, begin: int, end: int) -> RawRows:
        total = self.scratch[: end - begin]
        if self.ensemble.space == "logit":
            total.zero_()
            for weight, member in zip(self.ensemble.weights, self.members):
                total.add_(member.chunk(begin, end).logits(), alpha=weight)
        else:
            total.fill_(-torch.inf)
            for weight, member in zip(self.ensemble.weights, self.members):
                logprobs = torch.log_softmax(member.chunk(begin, end).logits(), 1).add_(math.log(weight))
                torch.logaddexp(total, logprobs, out=total)
        return RawRows(total)


def source(
    logits: Logits, rows: Tensor | None, dtype: torch.dtype, *, columns: int | None = None, writable: bool = False,
    precision: str = "float32", autocast: torch.dtype | None = None,
) -> Source:
    """The source of a dense noun whose leading dimensions are flattened to ``[N]``."""
    columns = vocab(logits) if columns is None else columns
    if isinstance(logits, Tensor):
        return TensorSource(logits, rows, dtype, columns, writable)
    if isinstance(logits, LinearLogits):
        return LinearSource(logits, rows, dtype, columns, precision, autocast)
    members = [
        source(member, rows, dtype, columns=columns, precision=precision, autocast=autocast) for member in logits.members
    ]
    return EnsembleSource(logits, members, dtype, columns)


def flattened(logits: Logits) -> Logits:
    """The same noun with one leading dimension. Differentiable; views where they are possible."""
    if isinstance(logits, Tensor):
        return logits.reshape(-1, logits.shape[-1])
    if isinstance(logits, LinearLogits):
        hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1])
        return LinearLogits(hidden, logits.weight, logits.bias, logits.scale, logits.softcap, logits.valid_vocab)
    return EnsembleLogits(tuple(flattened(m) for m in logits.members), logits.weights, logits.space)


def rows_per_chunk(
    where: str, rows: int, bytes_per_row: int, fixed_bytes: int, max_scratch_bytes: int | None, device: torch.device
) -> int:
    """How many rows a chunk may have, spread evenly over the chunks.

    Raises:
        ValueError: the budget is too small for one row; the message says how much one row needs.
    """
    budget = max_scratch_bytes
    if budget is None:
        budget = max(DEFAULT_SCRATCH_BYTES.get(device.type, FALLBACK_SCRATCH_BYTES), fixed_bytes + bytes_per_row)
    fitting = (budget - fixed_bytes) // max(bytes_per_row, 1)
    if fitting < 1:
        _check.fail(
            where, "max_scratch_bytes", f"at least {fixed_bytes + bytes_per_row} bytes, which one row takes", max_scratch_bytes
        )
    if rows == 0:
        return 1
    chunks = -(-rows // min(fitting, rows))
    return -(-rows // chunks)
