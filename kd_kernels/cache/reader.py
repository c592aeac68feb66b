"""Rows of cached sequences, looked up by their tokens."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from kd_kernels import _check
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.format import ShardHeader
from kd_kernels.cache.index import MergedIndex
from kd_kernels.cache.journal import read_lines
from kd_kernels.cache.key import content_key
from kd_kernels.cache.manifest import read_manifest
from kd_kernels.cache.rows import CachedRows
from kd_kernels.cache.shard import TEMPORARY, Shard
from kd_kernels.logits import SparseTargets

__all__ = ["CacheReader"]

OPEN_SHARDS = 64


class CacheReader:
    """A folder of cached sequences, as it was when it was opened. Fails closed.

    Whatever is not exactly what a writer wrote, under this manifest, for these tokens, is a :class:`CacheError` that
    names the file, the offset, what was expected and what was found. Opening reads the manifest, the journals, and the
    header and index of every shard; blocks are read, checked and decoded when they are asked for. Threads can share a
    reader, and it can be pickled to worker processes or inherited by them.

    Args:
        folder: where :class:`CacheWriter` wrote.
        teacher, tokenizer: fingerprints that the cache must have been made with; None takes any.

    Raises:
        CacheError: the folder is no cache, belongs to another teacher or tokenizer, or a file is missing or damaged.

    Cost: 48 bytes of memory a sequence.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, teacher: str | None = None, tokenizer: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self.manifest, digest = read_manifest(self.folder, teacher=teacher, tokenizer=tokenizer)
        self._headers: list[ShardHeader] = []
        self.bytes = 0
        indexes = []
        for journal in sorted(self.folder.glob("*.journal")):
            records = {record["number"]: (offset, record) for offset, _, record in read_lines(journal)}
            for number, (offset, record) in records.items():
                header = ShardHeader(journal.stem, number, digest)
                shard = Shard(self.folder / header.name, header)
                if shard.size != record["bytes"]:
                    what = f"bytes of the shard, by {journal.name} at {offset}"
                    raise CacheError.mismatch(shard.path, shard.size, what, record["bytes"], shard.size)
                packed, crc, at = shard.index()
                if f"{crc:08x}" != record["index_crc32"]:
                    what = f"CRC-32 of the index, by {journal.name} at {offset}"
                    raise CacheError.mismatch(shard.path, at, what, record["index_crc32"], f"{crc:08x}")
                self._headers.append(header)
                self.bytes += shard.size
                indexes.append(packed)
        self._index = MergedIndex(indexes)
        self._open_lazily()

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._index)

    @property
    def rows(self) -> int:
        """Number of rows, cached or not: the sum of L - 1."""
        return self._index.rows

    @property
    def cached_rows(self) -> int:
        """Number of rows that are cached."""
        return self._index.cached_rows

    def __contains__(self, key: bytes) -> bool:
        return self._index.find(key) is not None

    def keys(self) -> list[bytes]:
        """The keys of all sequences, in no order that means anything."""
        return self._index.keys()

    def read(self, key: bytes) -> CachedRows:
        """All rows of the sequence with this key (see :func:`content_key`).

        Raises:
            CacheError: it is not in the cache, or damaged.
        """
        return self._read(key, f"key {key.hex()}")

    def lookup(
        self, tokens: Tensor, *, layout: Sequence[int] | None = None, required: Tensor | None = None
    ) -> CachedRows:
        """Everything that is stored for a sequence.

        Args:
            tokens: int64 or int32 ``[L]``.
            layout: as it was given to :meth:`CacheWriter.add`.
            required: bool ``[L - 1]``: the rows that have to be cached (those that count in the loss). None: none.

        Returns:
            L - 1 rows on the CPU: ids int64, the rest fp32.

        Raises:
            CacheError: the sequence is not in the cache, a required row of it is not, or the file is damaged.
            TypeError, ValueError: the arguments are not as above.
        """
        where = "CacheReader.lookup"
        key = content_key(tokens, self.manifest, layout)
        length = tokens.shape[0]
        rows = self._read(key, f"key {key.hex()} ({length} tokens, layout {layout or [length]})")
        if len(rows) != length - 1:
            raise CacheError.mismatch(self.folder, None, f"rows of sequence {key.hex()}", length - 1, len(rows))
        if required is not None:
            if _check.tensor(where, "required", required).dtype != torch.bool or required.shape != (length - 1,):
                rule = f"bool of shape [L - 1 = {length - 1}]"
                _check.fail(where, "required", rule, f"{required.dtype} {list(required.shape)}")
            missing = (required.cpu() & ~rows.positions).nonzero().flatten()
            if missing.numel():
                what = f"row {int(missing[0])} of sequence {key.hex()}"
                found = f"not cached, like {missing.numel() - 1} other required rows"
                raise CacheError.mismatch(self.folder, None, what, "cached", found)
        return rows

    def targets(
        self, tokens: Tensor, *, layout: Sequence[int] | None = None, required: Tensor | None = None
    ) -> SparseTargets:
        """The teacher of ``tokens [L]``: L - 1 rows, of which row i predicts ``tokens[i + 1]``. See :meth:`lookup`."""
        return self.lookup(tokens, layout=layout, required=required).targets

    def batch(
        self, sequences: Sequence[Tensor], *, layouts: Sequence[Sequence[int] | None] | None = None
    ) -> SparseTargets:
        """The targets of several sequences, one after the other."""
        layouts = [None] * len(sequences) if layouts is None else layouts
        pairs = zip(sequences, layouts, strict=True)
        return SparseTargets.cat([self.targets(tokens, layout=layout) for tokens, layout in pairs])

    def positions(self, tokens: Tensor, *, layout: Sequence[int] | None = None) -> Tensor:
        """bool ``[L - 1]``: which rows are cached."""
        return self.lookup(tokens, layout=layout).positions

    def next_logprobs(self, tokens: Tensor, *, layout: Sequence[int] | None = None) -> Tensor:
        """fp32 ``[L - 1]``, nats: the teacher's log-probability of ``tokens[i + 1]``, NaN where it is not known."""
        return self.lookup(tokens, layout=layout).next_logprobs

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Reads and decodes every block, and compares what is there with the indexes.

        Args:
            progress: called with the number of bytes since the last call; they add up to about :attr:`bytes`.

        Raises:
            CacheError: at the first thing that is not as it was written.
        """
        for number in range(len(self._headers)):
            self._shard(number).check(self.manifest, progress)

    def _read(self, key: bytes, wanted: str) -> CachedRows:
        found = self._index.find(key)
        if found is None:
            wanted += f", teacher {self.manifest.teacher}, tokenizer {self.manifest.tokenizer}"
            unsealed = sorted(path.name for path in self.folder.glob("*.kdc" + TEMPORARY))
            remedy = f"not sealed: {', '.join(unsealed)}; open and close their writers" if unsealed else ""
            raise CacheError.mismatch(self.folder, None, "sequence", wanted, f"none such among {len(self)}", remedy)
        shard, entry = found
        return self._shard(shard).rows(entry, self.manifest)

    def _open_shard(self, number: int) -> Shard:
        header = self._headers[number]
        return Shard(self.folder / header.name, header)

    # Files are opened when they are read, in every process anew, and the least recently used is let go of.
    def _open_lazily(self) -> None:
        self._shard = functools.lru_cache(OPEN_SHARDS)(self._open_shard)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shard"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_lazily()
