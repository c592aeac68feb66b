"""Rows of cached sequences, looked up by their tokens."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from kd_kernels import _check
from kd_kernels.cache.catalog import Sealed, journalled, open_sealed, unsealed
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.index import MergedIndex
from kd_kernels.cache.key import FIELDS, content_key
from kd_kernels.cache.manifest import read_manifest
from kd_kernels.cache.masses import with_mass_one
from kd_kernels.cache.prefetch import ahead_of
from kd_kernels.cache.rows import CachedRows
from kd_kernels.cache.shard import Shard
from kd_kernels.cache.sources import open_folder
from kd_kernels.logits import SparseTargets

__all__ = ["CacheReader"]

OPEN_SHARDS = 64
OPENERS = 8
"""Threads that open shards: a request to a server waits far longer than it works."""


class CacheReader:
    """A folder of cached sequences, as it was when it was opened. Fails closed.

    Whatever is not exactly what a writer wrote, under this manifest, for these tokens, is a :class:`CacheError` that
    names the file, the offset, what was expected and what was found. Opening reads the manifest, the journals, and the
    header and index of every shard; blocks are read, checked and decoded when they are asked for. Threads can share a
    reader, and it can be pickled to worker processes or inherited by them: they share nothing but the files.

    :meth:`lookup` and :meth:`read` give rows as they are stored, :meth:`targets` and :meth:`batch` rows to train from,
    of mass one. The difference: rounding log-probabilities (``manifest.step_nats > 0``) moves the mass of a row's
    entries, by 0.3 percent in the mean over real rows at 1/16 nats and by 3 percent at most. A divergence is 0 at q = p
    only for masses that add up to one. So the entries are scaled to the mass that the tail leaves them, which moves
    none by more than half a step. Rows of fp32 (``step_nats = 0``), rows without a tail and sampled rows are as they
    are stored.

    Args:
        folder: where :class:`CacheWriter` wrote: a local path, whose files are memory-mapped, or a URL that fsspec
            opens (``s3://...``, ``hf://...``, ``memory://...``), which is read by ranges.
        teacher, tokenizer, chat_template, bos_policy: what the manifest must say; None takes any.
        storage_options: of the URL's file system: credentials, an endpoint. Pickled with the reader.

    Raises:
        CacheError: the folder is no cache, belongs to another teacher or was read in another way, or a file is missing
            or damaged.
        RuntimeError: a URL, and fsspec is not installed.

    Cost: 48 bytes of memory a sequence; opening, 4 reads a shard.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, teacher: str | None = None, tokenizer: str | None = None,
        chat_template: str | None = None, bos_policy: str | None = None, storage_options: dict[str, Any] | None = None,
    ) -> None:
        self._source = open_folder("CacheReader", folder, storage_options)
        self.folder = self._source.location
        self.manifest, digest = read_manifest(
            self._source, chat_template=chat_template, bos_policy=bos_policy, teacher=teacher, tokenizer=tokenizer
        )
        self._sealed = journalled(self._source, digest)
        with ThreadPoolExecutor(OPENERS) as pool:
            opened = list(pool.map(self._open_indexed, self._sealed))
        self.bytes = sum(size for size, _ in opened)
        self._index = MergedIndex([packed for _, packed in opened])
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
        """Everything that is stored for a sequence, as it is stored.

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
        """The teacher of ``tokens [L]``: L - 1 rows of mass one, of which row i predicts ``tokens[i + 1]``.

        Arguments and errors are those of :meth:`lookup`.
        """
        targets = self.lookup(tokens, layout=layout, required=required).targets
        return with_mass_one(targets) if self.manifest.step_nats else targets

    def batch(
        self, sequences: Sequence[Tensor], *, layouts: Sequence[Sequence[int] | None] | None = None
    ) -> SparseTargets:
        """The targets of several sequences, one after the other."""
        layouts = [None] * len(sequences) if layouts is None else layouts
        pairs = zip(sequences, layouts, strict=True)
        return SparseTargets.cat([self.targets(tokens, layout=layout) for tokens, layout in pairs])

    def ahead(
        self, sequences: Iterable[Tensor], *, threads: int = 2, depth: int = 64
    ) -> Iterator[SparseTargets]:
        """The targets of many sequences, in their order, decoded by threads before they are asked for.

        Args:
            sequences: int64 or int32 ``[L]`` each; taken as they are needed, so that they may be without end.
            threads: reading, checking and decoding hold no lock of Python's, so that two decode twice as fast.
            depth: sequences that are begun and not yet taken, at most: what is held in memory.

        Raises:
            CacheError, TypeError, ValueError: as :meth:`targets`, in the place of the sequence that it is about.
        """
        for name, value in (("threads", threads), ("depth", depth)):
            if value < 1:
                _check.fail("CacheReader.ahead", name, "at least 1", value)
        return ahead_of(self.targets, sequences, threads, depth)

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
        for number in range(len(self._sealed)):
            self._shard(number).check(self.manifest, progress)

    def stream_bytes(self) -> dict[str, int]:
        """Bytes by what they hold (ids, logprobs, tail, ...), over all shards; they add up to :attr:`bytes`. Reads
        every block.

        Raises:
            CacheError: a block is damaged.
        """
        return dict(sum((self._shard(n).stream_bytes(self.manifest) for n in range(len(self._sealed))), Counter()))

    def _read(self, key: bytes, wanted: str) -> CachedRows:
        found = self._index.find(key)
        if found is None:
            wanted += "".join(f", {name} {getattr(self.manifest, name)}" for name in FIELDS)
            names = unsealed(self._source, self._sealed)
            remedy = f"not sealed: {', '.join(names)}; open and close their writers" if names else ""
            raise CacheError.mismatch(self.folder, None, "sequence", wanted, f"none such among {len(self)}", remedy)
        shard, entry = found
        return self._shard(shard).rows(entry, self.manifest)

    def _open_indexed(self, sealed: Sealed) -> tuple[int, bytes]:
        shard, packed = open_sealed(self._source, sealed)
        return shard.size, packed

    def _open_shard(self, number: int) -> Shard:
        sealed = self._sealed[number]
        return Shard(self._source.open(sealed.name), sealed.header)

    # Files are opened when they are read, in every process anew, and the least recently used is let go of.
    def _open_lazily(self) -> None:
        self._shard = functools.lru_cache(OPEN_SHARDS)(self._open_shard)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shard"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_lazily()
