"""From nouns to chunks of rows of logits: the products of the language-model head, and the memory that they may take.

Every verb walks its rows in chunks through a :class:`Source`. A dense source yields :class:`RawRows`: the *products* of
a chunk (``heads.py``), in fp32 (fp64 where an input is fp64), with the elementwise map that turns them into logits
still to be applied, because the row kernels apply it while they read. A sparse one yields :class:`SparseRows`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kd_kernels import _check, heads
from kd_kernels.logits import EnsembleLogits, LinearLogits, Logits, SparseTargets, leading_shape, vocab

DEFAULT_SCRATCH_BYTES = {"cpu": 256 << 20}
"""Scratch that a verb takes when the caller gives no ``max_scratch_bytes``, by device type."""
FALLBACK_SCRATCH_BYTES = 1400 << 20
"""Enough for 1,024 rows or more of two models at a vocabulary of 150,000: there the weights, which are read for every
chunk, and the gradient of the head, which is added to for every chunk, hide behind the products."""

PANEL_ROWS = 1024
MIN_PANEL_COLUMNS, MAX_PANEL_COLUMNS = 2048, 16_384
PANEL_LOGITS = 1 << 20
"""Logits in a panel on a CPU, some columns of many rows, if that leaves the product wide enough.

Measured with ``topk_targets`` as time of the whole call over that of the bare head product (2 cores with AVX-512 and
2 MiB of second-level cache each, fp32, H=576, V=49152, k=64). N=256: 0.91 with 2048 or 4096 columns, 0.97 with 8192 and
with whole rows. N=1024: 0.91 with 1024 rows at a time, 1.15 with 256, because the weight is read for every panel of
rows.
"""

PITCH = 64
"""Rows of scratch on a GPU begin at multiples of so many elements: matrix units and 16-byte loads want aligned rows."""

CACHE_LINE = 64
"""Rows of scratch on a CPU begin at odd multiples of so many bytes: a column of them meets every set of a cache. At
a multiple of a power of two it meets few, and products with such rows take up to a fifth longer."""

ROW_TILE = 128
"""Chunks on a GPU are multiples of so many rows, which is what one tile of a matrix product takes."""

HUGE_PAGE = 2 << 20
HUGE_FROM = 32 << 20
"""Bytes from which new memory on a CPU is asked for in huge pages. Less than this the C library keeps when it is freed,
and hands out again; more goes back to the system, and its first write then finds no pages."""


@dataclass(frozen=True)
class RawRows:
    """Rows that stand for logits ``softcap * tanh(scale * (raw + bias) / softcap)``.

    ``raw`` is ``[C, V]``, in the work dtype, or in the caller's own where the source is ``native``. ``bias`` is in the
    work dtype, contiguous. Columns of a row are adjacent; rows may be further apart.
    """

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

    def picked(self, rows: Tensor) -> RawRows:
        """A copy of some of the rows (int64 ``[R]``)."""
        columns, device = self.raw.shape[1], self.raw.device
        raw = self.raw.new_empty(len(rows), row_pitch(columns, self.raw.dtype, device))[:, :columns]
        return dataclasses.replace(self, raw=torch.index_select(self.raw, 0, rows, out=raw))

    def factor_and_height(self, temperature: float = 1.0) -> tuple[float, float]:
        """The map as Triton's kernels take it (``triton_rows.map_raw``), for logits over ``temperature``; height 0: no
        softcap."""
        if self.softcap is None:
            return self.scale / temperature, 0.0
        return self.scale / self.softcap, self.softcap / temperature

    def addresses(self) -> tuple[int, int, int, float, float]:
        """As the C++ extension takes them: raw, its row stride, bias or 0, scale, softcap or 0."""
        assert self.raw.stride(1) == 1 or self.raw.shape[1] == 1
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return self.raw.data_ptr(), self.raw.stride(0), bias, self.scale, self.softcap or 0.0


class SparseRows(NamedTuple):
    """C rows of a sparse teacher: row i has the entries ``starts[i]`` to ``ends[i]`` of the arrays that all rows
    share."""

    starts: Tensor  # int64 [C]
    ends: Tensor  # int64 [C]
    ids: Tensor  # int64 [nnz]
    logprobs: Tensor  # work dtype [nnz]
    tail_logprob: Tensor | None  # work dtype [C]
    importance: Tensor | None  # work dtype [nnz]


def work_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any of the tensors is, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def needs_whole_rows(logits: Logits) -> bool:
    """A mixture of probabilities does, for the normalisers of its members."""
    return isinstance(logits, EnsembleLogits) and logits.space == "prob"


def panel_columns(rows: int, vocab: int) -> int:
    """Columns of a panel when there are ``rows`` rows in all: a multiple of 128, or all of them."""
    wanted = PANEL_LOGITS // max(1, min(rows, PANEL_ROWS)) // 128 * 128
    return min(vocab, max(MIN_PANEL_COLUMNS, min(MAX_PANEL_COLUMNS, wanted)))


def panel_rows(rows: int, fitting: int) -> int:
    """Rows of a panel, at most ``fitting``, spread evenly over the panels."""
    panels = max(1, -(-rows // min(fitting, PANEL_ROWS)))
    return max(1, -(-rows // panels))


@functools.lru_cache(maxsize=1)
def _madvise() -> object | None:
    """The system's own, or None where it knows no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


def new_memory(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, for what is written all over. On a CPU in huge pages where Linux grants them on request: handing
    out pages of 4 KiB at the first write takes up to a tenth of the time of the products that write there."""
    tensor = torch.empty(*shape, dtype=dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= HUGE_FROM and (advise := _madvise()) is not None:
        first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE  # whole pages only: no memory beside the tensor is taken
        advise(first, (tensor.data_ptr() + tensor.nbytes - first) // HUGE_PAGE * HUGE_PAGE, mmap.MADV_HUGEPAGE)
    return tensor


def row_pitch(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Elements from one row of products to the next."""
    if device.type != "cpu":
        return -(-columns // PITCH) * PITCH
    line = CACHE_LINE // dtype.itemsize
    return (-(-columns // line) | 1) * line


def tensors_of(logits: Logits) -> list[Tensor]:
    """Every tensor in a dense noun."""
    if isinstance(logits, Tensor):
        return [logits]
    if isinstance(logits, LinearLogits):
        return [t for t in (logits.hidden, logits.weight, logits.bias) if t is not None]
    row_weights = [logits.weights] if isinstance(logits.weights, Tensor) else []
    return [t for member in logits.members for t in tensors_of(member)] + row_weights


class Source(ABC):
    """Rows of one noun, chunk by chunk. ``bytes_per_row`` and ``fixed_bytes`` say what its scratch takes."""

    columns: int
    bytes_per_row: int = 0
    fixed_bytes: int = 0

    @abstractmethod
    def open(self, rows_per_chunk: int) -> None:
        """Allocate scratch for chunks of at most so many rows."""

    @abstractmethod
    def chunk(self, begin: int, end: int) -> RawRows:
        """Rows ``begin`` to ``end`` of those selected. Valid until the next call."""

    def borrow(self, wider: Source) -> None:
        """Instead of :meth:`open`: the scratch of a source of as many columns or more of the same noun. Memory that is
        freed and asked for again may have gone back to the system meanwhile."""
        if hasattr(wider, "scratch"):
            self.scratch = wider.scratch[:, : self.columns]

    def close(self) -> None:
        """Give the scratch back."""
        vars(self).pop("scratch", None)


class TensorSource(Source):
    """Logits that exist. Rows are viewed where they can be, copied to the work dtype where they cannot.

    Args:
        logits: ``[N, V]``.
        rows: int64 ``[M]``, or None for all.
        writable: the caller will overwrite the rows, so they must not be the noun's own.
        native: the caller reads any dtype.
    """

    def __init__(
        self, logits: Tensor, rows: Tensor | None, dtype: torch.dtype, columns: int, writable: bool = False,
        native: bool = False,
    ) -> None:
        self.logits, self.rows, self.dtype, self.columns = logits[:, :columns], rows, dtype, columns
        is_readable = native or logits.dtype == dtype
        self.copies = writable or rows is not None or not is_readable or (columns > 1 and logits.stride(1) != 1)
        self.bytes_per_row = columns * dtype.itemsize if self.copies else 0

    def open(self, rows_per_chunk: int) -> None:
        if self.copies:
            self.scratch = new_memory(rows_per_chunk, self.logits.shape[1], dtype=self.dtype, device=self.logits.device)

    def chunk(self, begin: int, end: int) -> RawRows:
        picked = self.logits[begin:end] if self.rows is None else self.logits[self.rows[begin:end]]
        return RawRows(self.scratch[: end - begin].copy_(picked) if self.copies else picked)


class LinearSource(Source):
    """Products of a head, ``hidden @ weight.T``.

    Args:
        linear: the noun, ``hidden`` of shape ``[N, H]``.
        rows: int64 ``[M]``, or None for all: rows left out take no part in any product.
        dtype, columns, precision, autocast: as for :class:`heads.Head`.
    """

    def __init__(
        self, linear: LinearLogits, rows: Tensor | None, dtype: torch.dtype, columns: int, precision: str = "float32",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.linear, self.rows, self.columns = linear, rows, columns
        self.head = heads.head(linear, dtype, columns, precision, autocast)
        self.dtype = dtype
        self.bias = None if linear.bias is None else linear.bias[:columns].to(dtype).contiguous()
        self.pitch = row_pitch(columns, dtype, linear.device)
        # Of the hidden states' width: what is rounded or widened of them, or a sum of their gradient and what is added
        # to it.
        self.bytes_per_row = (self.pitch + 2 * linear.weight.shape[1]) * dtype.itemsize
        self.fixed_bytes = self.head.fixed_bytes

    def open(self, rows_per_chunk: int) -> None:
        self.scratch = new_memory(rows_per_chunk, self.pitch, dtype=self.dtype, device=self.linear.device)

    def borrow(self, wider: Source) -> None:
        super().borrow(wider)
        self.head.borrow(wider.head)

    def hidden(self, begin: int, end: int) -> Tensor:
        """Hidden states of the rows, ``[C, H]``, rounded as autocast wants them."""
        hidden = self.linear.hidden
        return self.head.rounded(hidden[begin:end] if self.rows is None else hidden[self.rows[begin:end]])

    def chunk(self, begin: int, end: int) -> RawRows:
        raw = self.scratch[: end - begin, : self.columns]
        self.head.logits(self.hidden(begin, end), raw)
        return RawRows(raw, self.bias, self.linear.scale, self.linear.softcap)

    def close(self) -> None:
        super().close()
        self.head.close()


class EnsembleSource(Source):
    """Several teachers reduced densely: mean of logits, or log of the mean probability."""

    def __init__(
        self, ensemble: EnsembleLogits, members: list[Source], rows: Tensor | None, dtype: torch.dtype, columns: int
    ) -> None:
        self.ensemble, self.members, self.dtype, self.columns = ensemble, members, dtype, columns
        # The result, one member's logits after its map, and one temporary of the reduction.
        self.bytes_per_row = 3 * columns * dtype.itemsize + sum(member.bytes_per_row for member in members)
        self.fixed_bytes = sum(member.fixed_bytes for member in members)
        weights = ensemble.weights
        self.row_weights = isinstance(weights, Tensor)
        if self.row_weights:
            weights = (weights if rows is None else weights[rows]).to(dtype)
        self.weights = weights

    def open(self, rows_per_chunk: int) -> None:
        device = self.ensemble.device
        self.scratch = new_memory(rows_per_chunk, self.columns, dtype=self.dtype, device=device)
        for member in self.members:
            member.open(rows_per_chunk)

    def borrow(self, wider: Source) -> None:
        super().borrow(wider)
        for member, wider_member in zip(self.members, wider.members, strict=True):
            member.borrow(wider_member)

    def _weight(self, number: int, begin: int, end: int) -> float | Tensor:
        """Of one member: a number, or ``[C, 1]``."""
        return self.weights[begin:end, number, None] if self.row_weights else self.weights[number]

    def chunk(self, begin: int, end: int) -> RawRows:
        total = self.scratch[: end - begin]
        is_mean_of_logits = self.ensemble.space == "logit"
        total.fill_(0.0 if is_mean_of_logits else -torch.inf)
        for number, member in enumerate(self.members):
            weight, logits = self._weight(number, begin, end), member.chunk(begin, end).logits()
            if is_mean_of_logits and self.row_weights:
                # A member of weight 0 takes no part, its masked columns included: 0 * -inf would be NaN.
                total.add_((logits * weight).masked_fill_(weight == 0.0, 0.0))
            elif is_mean_of_logits:
                total.add_(logits, alpha=weight)
            else:
                log_weight = weight.log() if self.row_weights else math.log(weight)
                # Without a name, or one member's would be there beside the next one's.
                torch.logaddexp(total, torch.log_softmax(logits, 1).add_(log_weight), out=total)
        return RawRows(total)

    def close(self) -> None:
        super().close()
        for member in self.members:
            member.close()


class SparseSource:
    """Rows of sparse targets, chunk by chunk. Entries are never copied row by row, and no size is read from the
    device."""

    bytes_per_row = fixed_bytes = 0

    def __init__(self, targets: SparseTargets, rows: Tensor | None, dtype: torch.dtype) -> None:
        convert = lambda x: None if x is None else x.to(dtype).contiguous()  # noqa: E731
        pick = lambda x: x if x is None or rows is None else x[rows]  # noqa: E731
        self.starts, self.ends = pick(targets.offsets[:-1]).long(), pick(targets.offsets[1:]).long()
        self.ids, self.logprobs = targets.ids.long().contiguous(), convert(targets.logprobs)
        self.importance, self.tail_logprob = convert(targets.importance), convert(pick(targets.tail_logprob))

    def open(self, rows_per_chunk: int) -> None:
        pass

    def close(self) -> None:
        pass

    def chunk(self, begin: int, end: int) -> SparseRows:
        tail = None if self.tail_logprob is None else self.tail_logprob[begin:end]
        return SparseRows(self.starts[begin:end], self.ends[begin:end], self.ids, self.logprobs, tail, self.importance)


def source(
    logits: Logits, rows: Tensor | None, dtype: torch.dtype, *, columns: int | None = None, writable: bool = False,
    precision: str = "float32", autocast: torch.dtype | None = None, native: bool = False,
) -> Source:
    """The source of a dense noun whose leading dimensions are flattened to ``[N]``."""
    columns = vocab(logits) if columns is None else columns
    if isinstance(logits, Tensor):
        return TensorSource(logits, rows, dtype, columns, writable, native)
    if isinstance(logits, LinearLogits):
        return LinearSource(logits, rows, dtype, columns, precision, autocast)
    members = [
        source(
            member, rows, dtype, columns=columns, precision=precision, autocast=autocast
        ) for member in logits.members
    ]
    return EnsembleSource(logits, members, rows, dtype, columns)


def flattened(logits: Logits) -> Logits:
    """The same noun with one leading dimension. Differentiable; views where they are possible."""
    if len(leading_shape(logits)) == 1:
        return logits
    if isinstance(logits, Tensor):
        return logits.reshape(-1, logits.shape[-1])
    if isinstance(logits, LinearLogits):
        hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1])
        return LinearLogits(hidden, logits.weight, logits.bias, logits.scale, logits.softcap, logits.valid_vocab)
    weights = logits.weights.reshape(-1, len(logits.members)) if isinstance(logits.weights, Tensor) else logits.weights
    return EnsembleLogits(tuple(flattened(m) for m in logits.members), weights, logits.space)


def columns_of(logits: Logits, begin: int, end: int) -> Logits:
    """Some columns of a dense noun with one leading dimension, as a noun. Not of one that needs whole rows."""
    if isinstance(logits, Tensor):
        return logits[:, begin:end]
    if isinstance(logits, LinearLogits):
        bias = None if logits.bias is None else logits.bias[begin:end]
        return LinearLogits(logits.hidden, logits.weight[begin:end], bias, logits.scale, logits.softcap)
    return EnsembleLogits(tuple(columns_of(m, begin, end) for m in logits.members), logits.weights, logits.space)


def scratch_budget(max_scratch_bytes: int | None, device: torch.device) -> int:
    """What the caller asked for, or what a verb takes where nobody asked."""
    return DEFAULT_SCRATCH_BYTES.get(
        device.type, FALLBACK_SCRATCH_BYTES
    ) if max_scratch_bytes is None else max_scratch_bytes


def rows_per_chunk(
    where: str, rows: int, bytes_per_row: int, fixed_bytes: int, max_scratch_bytes: int | None, device: torch.device
) -> int:
    """How many rows a chunk may have, spread evenly over the chunks.

    Raises:
        ValueError: the budget is too small for one row; the message says how much one row needs.
    """
    budget, least = scratch_budget(max_scratch_bytes, device), fixed_bytes + bytes_per_row
    if max_scratch_bytes is None:
        budget = max(budget, least)
    if budget < least:
        _check.fail(where, "max_scratch_bytes", f"at least {least} bytes, which one row takes", max_scratch_bytes)
    if rows == 0:
        return 1
    fitting = (budget - fixed_bytes) // bytes_per_row if bytes_per_row else rows
    tile = ROW_TILE if device.type != "cpu" and min(fitting, rows) >= ROW_TILE else 1
    chunks = math.ceil(rows / min(fitting // tile * tile, rows))
    return math.ceil(math.ceil(rows / chunks) / tile) * tile


def chunks_of(
    where: str, sources: Sequence[Source], rows: int, own_bytes_per_row: int, own_fixed_bytes: int,
    max_scratch_bytes: int | None, device: torch.device,
) -> Iterator[tuple[slice, list[RawRows]]]:
    """The same rows of several sources, chunk by chunk: which, and each source's. The caller takes ``own`` scratch
    beside theirs."""
    step = rows_per_chunk(
        where, rows, own_bytes_per_row + sum(x.bytes_per_row for x in sources),
        own_fixed_bytes + sum(x.fixed_bytes for x in sources), max_scratch_bytes, device,
    )
    for x in sources:
        x.open(min(step, max(rows, 1)))
    for begin in range(0, rows, step):
        here = slice(begin, min(begin + step, rows))
        yield here, [x.chunk(here.start, here.stop) for x in sources]
