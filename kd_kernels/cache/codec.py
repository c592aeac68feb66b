"""Rows to bytes and back. FORMAT.md, section 4, is the normative text.

A block is a series of streams, and a stream is cut into byte planes (all low bytes, then all second bytes, and so on),
because bytes of the same significance resemble each other. Deflate codes every plane with a Huffman table of its own.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from kd_kernels.cache.manifest import CacheManifest
from kd_kernels.cache.rows import CachedRows
from kd_kernels.logits import SparseTargets

__all__ = ["decode_rows", "encode_rows", "to_bytes"]

FRACTIONS = 256
"""The first entry of a row is stored to step_nats / 256, and the others relative to it."""

ESCAPE = 255
"""A gap that stands for: at least 255, the value is in the next stream."""


def to_bytes(values: Tensor) -> bytearray:
    """The elements of a CPU tensor in order, as they lie in memory."""
    data = bytearray(values.numel() * values.element_size())
    if data:
        torch.frombuffer(data, dtype=values.dtype).copy_(values.reshape(-1))
    return data


def encode_rows(rows: CachedRows, manifest: CacheManifest) -> tuple[bytes, int]:
    """The payload of a block, and how many bytes it has when inflated."""
    targets = rows.targets
    counts = targets.offsets.diff()
    cached = counts > 0
    planes = _planes(counts.int(), 2)
    if manifest.tail:
        planes += _planes(targets.tail_logprob[cached])
    for temperature in manifest.stored_temperatures:
        planes += _planes(targets.log_z[cached, manifest.temperatures.index(temperature)])
    planes += _planes(rows.next_logprobs[cached])
    planes += _planes(targets.ids.int(), manifest.id_bytes)
    if manifest.step_nats:
        fractions, gaps = _quantise(targets.logprobs, counts[cached], manifest.step_nats)
        planes += _planes(fractions.int(), 1) + _planes(gaps.clamp_max(ESCAPE).int(), 1)
        planes += _planes(gaps[gaps >= ESCAPE].int())
    else:
        planes += _planes(targets.logprobs)
    if manifest.importance:
        planes += _planes(targets.importance)
    return _deflate(planes)


def decode_rows(payload: bytes | memoryview, inflated_bytes: int, count: int, manifest: CacheManifest) -> CachedRows:
    """The ``count`` rows of a payload.

    Raises:
        ValueError: the payload is not what :func:`encode_rows` makes for this manifest.
    """
    most = count * (2 + 4 * (3 + len(manifest.temperatures)) + manifest.k * (manifest.id_bytes + 9))
    if not 2 * count <= inflated_bytes <= most:
        raise ValueError(f"inflated bytes: expected {2 * count}..{most}, found {inflated_bytes}")
    streams = _Streams(_inflate(payload, inflated_bytes))
    counts = streams.take(count, torch.int32, 2).long()
    if int(counts.max()) > manifest.k:
        raise ValueError(f"entries of a row: expected at most k={manifest.k}, found {int(counts.max())}")
    cached = counts > 0
    spread = lambda values, fill: torch.full((count,), fill).masked_scatter_(cached, values)  # noqa: E731
    floats = int(cached.sum())
    entries = int(counts.sum())
    tail = spread(streams.take(floats, torch.float32), 0.0) if manifest.tail else None
    log_z = {t: spread(streams.take(floats, torch.float32), math.nan) for t in manifest.stored_temperatures}
    next_logprobs = spread(streams.take(floats, torch.float32), math.nan)
    ids = streams.take(entries, torch.int32, manifest.id_bytes).long()
    if manifest.step_nats:
        fractions, gaps = streams.take(floats, torch.int32, 1), streams.take(entries, torch.int32, 1).long()
        escaped = gaps == ESCAPE
        gaps[escaped] = streams.take(int(escaped.sum()), torch.int32).long()
        logprobs = _dequantise(fractions, gaps, counts[cached], manifest.step_nats)
    else:
        logprobs = streams.take(entries, torch.float32)
    importance = streams.take(entries, torch.float32) if manifest.importance else None
    streams.end()
    if entries and int(ids.max()) >= manifest.vocab:
        raise ValueError(f"ids: expected 0..{manifest.vocab - 1}, found {int(ids.max())}")
    columns = [log_z.get(t, torch.zeros(count)) for t in manifest.temperatures]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    targets = SparseTargets(
        offsets, ids, logprobs, tail, importance, manifest.temperatures, torch.stack(columns, dim=1)
    )
    return CachedRows(targets, next_logprobs)


def _quantise(logprobs: Tensor, counts: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """``logprob = -step * (level + fraction / 256)``, the fraction that of the row's first entry; levels as gaps."""
    first = counts.cumsum(0) - counts
    scaled = logprobs.double() / -step
    fractions = (scaled[first] * FRACTIONS).round().clamp_min(0).long() % FRACTIONS
    levels = (scaled - torch.repeat_interleave(fractions.double() / FRACTIONS, counts)).round().clamp_min(0).long()
    gaps = levels.diff(prepend=levels.new_zeros(1))
    gaps[first] = levels[first]
    return fractions, gaps


def _dequantise(fractions: Tensor, gaps: Tensor, counts: Tensor, step: float) -> Tensor:
    first = counts.cumsum(0) - counts
    total = gaps.cumsum(0)
    before_row = total[first] - gaps[first]
    levels = total - torch.repeat_interleave(before_row, counts)
    units = levels * FRACTIONS + torch.repeat_interleave(fractions.long(), counts)
    return (-units).double().mul_(step / FRACTIONS).float()


def _planes(values: Tensor, size: int = 4) -> list[Tensor]:
    """The ``size`` lowest bytes of 32-bit values, each as a plane."""
    return list(values.contiguous().view(torch.uint8).reshape(-1, 4)[:, :size].t())


def _deflate(planes: list[Tensor]) -> tuple[bytes, int]:
    # Run lengths and Huffman codes, without the search for repeated strings, which costs two thirds of the time and
    # makes these bytes larger. The flush starts a new Huffman table. Any deflate stream will do for a reader.
    deflate = zlib.compressobj(strategy=zlib.Z_RLE)
    parts = []
    for plane in planes:
        parts += deflate.compress(to_bytes(plane)), deflate.flush(zlib.Z_PARTIAL_FLUSH)
    return b"".join((*parts, deflate.flush())), sum(plane.numel() for plane in planes)


def _inflate(payload: bytes | memoryview, inflated_bytes: int) -> bytearray:
    inflate = zlib.decompressobj()
    try:
        data = bytearray(inflate.decompress(payload, inflated_bytes + 1))
    except zlib.error as error:
        raise ValueError(f"payload: expected a zlib stream, found {error}") from error
    if len(data) != inflated_bytes or not inflate.eof or inflate.unused_data:
        end = "reached" if inflate.eof else "not reached"
        found = f"{len(data)}, end {end}, {len(inflate.unused_data)} bytes after it"
        raise ValueError(f"inflated bytes: expected {inflated_bytes}, found {found}")
    return data


class _Streams:
    """Takes streams off the front of an inflated payload."""

    def __init__(self, data: bytearray) -> None:
        self._data = torch.frombuffer(data, dtype=torch.uint8)
        self._at = 0

    def take(self, count: int, dtype: torch.dtype, size: int = 4) -> Tensor:
        """``count`` 32-bit values, of which the ``size`` lowest bytes are stored."""
        stop = self._at + count * size
        if stop > self._data.shape[0]:
            raise ValueError(f"streams: expected at least {stop} bytes, found {self._data.shape[0]}")
        values = torch.zeros(count, 4, dtype=torch.uint8)
        values[:, :size] = self._data[self._at : stop].view(size, count).t()
        self._at = stop
        return values.view(dtype).reshape(count)

    def end(self) -> None:
        if self._at != self._data.shape[0]:
            raise ValueError(f"streams: expected {self._at} bytes, found {self._data.shape[0]}")
