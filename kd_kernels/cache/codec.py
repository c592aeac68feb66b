"""Rows to bytes and back, in C++ (``csrc/codec``). FORMAT.md, section 4, is the normative text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_kernels._backend import extension
from kd_kernels.cache.manifest import CacheManifest
from kd_kernels.cache.rows import CachedRows
from kd_kernels.logits import SparseTargets

__all__ = ["RowModel", "learn_model", "row_model", "to_bytes"]


# Contexts of FORMAT.md, section 4.2; those of log Z follow.
_STREAMS = (
    ("counts", 0, 1), ("tail", 1, 3), ("next", 3, 5), ("weights", 6, 7), ("logprobs", 7, 15), ("ids", 15, 59),
)


def to_bytes(values: Tensor) -> bytearray:
    """The elements of a CPU tensor in order, as they lie in memory."""
    data = bytearray(values.numel() * values.element_size())
    if data:
        torch.frombuffer(data, dtype=values.dtype).copy_(values.reshape(-1))
    return data


class RowModel:
    """How likely gaps, ids and the rest are, as a shard's model block says: what rows are coded with.

    Threads can share one object.

    Args:
        payload: of a model block.
        manifest: of the cache that it is from.

    Raises:
        ValueError: the payload is no model of such a cache.
        RuntimeError: the extension was not built.

    Cost: about 0.5 MiB. If the model ranks ids, 1 byte an id of the vocabulary, and 4 more for every thread that
    decodes at a time (8 where it encodes). Such a thread keeps 12 bytes an entry of its largest block, too.
    """

    def __init__(self, payload: bytes | memoryview, manifest: CacheManifest) -> None:
        self._manifest = manifest
        self._native = extension().RowModel()
        _raise(self._native.read(_layout(manifest), payload))

    def encode(self, rows: CachedRows) -> bytes:
        """The payload of a block of these rows, which are as :func:`canonical_rows` gives them."""
        arguments, _ = _addresses(rows.targets, rows.next_logprobs, self._manifest)
        return self._native.encode(arguments)

    def bits(self, rows: CachedRows) -> dict[str, float]:
        """What each stream takes of the payload of these rows, in bits; to the lanes' 68 bytes, they add up to it."""
        arguments, _ = _addresses(rows.targets, rows.next_logprobs, self._manifest)
        by_context = self._native.bits(arguments)
        sums = {name: sum(by_context[begin:end]) for name, begin, end in _STREAMS}
        return sums | {"log Z": sum(by_context[_STREAMS[-1][2] :])}

    def decode(self, blocks: Sequence[tuple[bytes | memoryview, int, int]]) -> CachedRows:
        """The rows of blocks, one after the other. Nothing larger is allocated than their rows and entries take.

        Args:
            blocks: payload, rows and entries of each, as its head says.

        Raises:
            ValueError: a payload is not what :meth:`encode` makes of so many rows and entries.
        """
        manifest, rows, entries = self._manifest, 0, 0
        for _, block_rows, block_entries in blocks:
            if not 0 <= block_entries <= block_rows * manifest.k:
                raise ValueError(f"entries of a block: expected 0..{block_rows * manifest.k}, found {block_entries}")
            rows, entries = rows + block_rows, entries + block_entries
        offsets, ids = torch.empty(rows + 1, dtype=torch.int64), torch.empty(entries, dtype=torch.int64)
        logprobs, following = torch.empty(entries), torch.empty(rows)
        tail = torch.empty(rows) if manifest.tail else None
        weights = torch.empty(entries) if manifest.importance else None
        stored = torch.empty(len(manifest.stored_temperatures), rows)
        columns = _tuple(rows, offsets, ids, logprobs, tail, stored, following, weights)
        _raise(self._native.decode(blocks, columns))
        targets = SparseTargets(offsets, ids, logprobs, tail, weights, manifest.temperatures, _log_z(stored, manifest))
        return CachedRows(targets, following)


@functools.lru_cache(maxsize=32)
def row_model(payload: bytes, manifest: CacheManifest) -> RowModel:
    """The model for reading. The shards of one writer mostly have the same, which is then held once."""
    return RowModel(payload, manifest)


def learn_model(rows: Sequence[CachedRows], id_counts: Tensor | None, manifest: CacheManifest) -> bytes:
    """The payload of a model for rows like these.

    Args:
        rows: as :func:`canonical_rows` gives them.
        id_counts: int32 ``[V]``: how often each id was kept so far. None: ids are coded as they are, which costs a
            tenth more, and the model takes a few hundred bytes instead of about 0.3 an id.
    """
    pairs = [_addresses(part.targets, part.next_logprobs, manifest) for part in rows]
    counts = 0 if id_counts is None else id_counts.data_ptr()
    return extension().learn_model(_layout(manifest), [arguments for arguments, _ in pairs], counts)


def _layout(manifest: CacheManifest) -> Any:
    return extension().RowLayout(
        vocab=manifest.vocab, k=manifest.k, step=manifest.step_nats, temperatures=len(manifest.stored_temperatures),
        tail=manifest.tail, weights=manifest.importance,
    )


def _addresses(
    targets: SparseTargets, next_logprobs: Tensor, manifest: CacheManifest
) -> tuple[tuple[int, ...], list[Tensor | None]]:
    """What the extension takes for rows, and the tensors that must live as long."""
    columns = [manifest.temperatures.index(t) for t in manifest.stored_temperatures]
    log_z = targets.log_z[:, columns].t().contiguous() if columns else None
    tensors = [
        None if x is None else x.contiguous()
        for x in (
            targets.offsets, targets.ids, targets.logprobs, targets.tail_logprob, log_z, next_logprobs,
            targets.importance
        )
    ]
    return _tuple(next_logprobs.shape[0], *tensors), tensors


def _tuple(rows: int, *tensors: Tensor | None) -> tuple[int, ...]:
    return rows, *(0 if x is None else x.data_ptr() for x in tensors)


def _log_z(stored: Tensor, manifest: CacheManifest) -> Tensor:
    """``[rows, temperatures]``, of which T = 1 is not stored."""
    if not stored.shape[0]:
        return torch.zeros(stored.shape[1], 1)
    columns = iter(stored)
    return torch.stack(
        [torch.zeros(stored.shape[1]) if t == 1.0 else next(columns) for t in manifest.temperatures], dim=1
    )


def _raise(wrong: tuple[str, int, int] | None) -> None:
    if wrong is not None:
        what, expected, found = wrong
        raise ValueError(f"{what}: expected {expected}, found {found}")
