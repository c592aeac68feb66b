"""Adds sequences to a cache, and never loses what it has written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor

from kd_kernels import _check
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.format import MAX_BLOCK_ROWS, Piece, ShardHeader, check_writer_name
from kd_kernels.cache.key import content_key
from kd_kernels.cache.learner import ModelLearner
from kd_kernels.cache.lock import WriterLock
from kd_kernels.cache.manifest import CacheManifest, create_manifest
from kd_kernels.cache.reader import CacheReader
from kd_kernels.cache.recovery import recover_writer, seal
from kd_kernels.cache.rows import CachedRows, canonical_rows
from kd_kernels.cache.shard import TEMPORARY, ShardBuilder
from kd_kernels.cache.sources import is_url
from kd_kernels.logits import SparseTargets

__all__ = ["CacheWriter"]


class CacheWriter:
    """Adds sequences to a cache. Use it as a context manager.

    A killed process, a full disk or a power cut costs the sequences that were not yet written (at most a block of short
    ones, or one long one; after a power cut, those since :meth:`flush`), and nothing that was. Opening the folder again
    recovers the rest, and ``key in writer`` says what need not be scored again::

        with CacheWriter(folder, manifest) as writer:
            for tokens in sequences:
                if writer.key(tokens) not in writer:
                    writer.add(tokens, topk_targets(teacher(tokens[:-1]), manifest.k))

    Many processes can write into one folder, each under a ``writer`` name of its own. Readers see a shard when it is
    sealed: when it is full, and on :meth:`close`.

    Args:
        folder: made if it is not there.
        manifest: compared with the folder's, if it has one.
        writer: prefix of the files that this writer owns: 1 to 24 of A-Z a-z 0-9 _. :func:`writer_name` makes one that
            no other process of a job has.
        rows_per_shard: a shard is sealed when it has this many rows (2^20 rows of k = 64 take about 115 MB).
        rows_per_block: rows that are compressed together, 1..256. Short sequences share a block; a longer one has
            blocks of its own.

    Raises:
        CacheError: the folder cannot be written or holds another cache, its files are damaged, or another process is
            writing under this name.
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self, folder: str | os.PathLike[str], manifest: CacheManifest, *, writer: str = "w0",
        rows_per_shard: int = 1 << 20, rows_per_block: int = 128,
    ) -> None:
        where = "CacheWriter"
        if not isinstance(manifest, CacheManifest):
            _check.fail_type(where, "manifest", "a CacheManifest", type(manifest).__name__)
        if is_url(folder):
            _check.fail(where, "folder", "a local path", repr(folder), "write to a disk and copy the folder there")
        check_writer_name(where, writer)
        if rows_per_shard < 1:
            _check.fail(where, "rows_per_shard", "at least 1", rows_per_shard)
        if not 1 <= rows_per_block <= MAX_BLOCK_ROWS:
            _check.fail(where, "rows_per_block", f"in 1..{MAX_BLOCK_ROWS}", rows_per_block)
        self.folder, self.manifest = Path(folder), manifest
        self._writer, self._rows_per_shard, self._rows_per_block = writer, rows_per_shard, rows_per_block
        self._journal = self.folder / f"{writer}.journal"
        self._waiting: list[tuple[bytes, CachedRows]] = []
        self._added: set[bytes] = set()
        self._builder: ShardBuilder | None = None
        self._learner = ModelLearner(manifest)
        self._lock: WriterLock | None = WriterLock(self.folder, writer)
        try:
            self._digest = create_manifest(self.folder, manifest, f"{writer}.manifest{TEMPORARY}")
            self._next_number, _ = recover_writer(self.folder, writer, self._digest)
            self._sealed = CacheReader(self.folder)
        except BaseException:
            self._lock.close()
            raise

    def key(self, tokens: Tensor, layout: Sequence[int] | None = None) -> bytes:
        """The key of a sequence in this cache: see :func:`content_key`."""
        return content_key(tokens, self.manifest, layout)

    def __contains__(self, key: bytes) -> bool:
        """Whether the sequence was added here, or was in a sealed shard (of any writer) when this writer was opened."""
        return key in self._added or key in self._sealed

    def __len__(self) -> int:
        """Number of sequences of which ``key in writer`` is true."""
        return len(self._added) + len(self._sealed)

    def add(
        self, tokens: Tensor, targets: SparseTargets, *, next_logprobs: Tensor | None = None,
        positions: Tensor | None = None, layout: Sequence[int] | None = None,
    ) -> bool:
        """Adds a sequence; False, and nothing happens, if it is there already.

        Args:
            tokens: int64 or int32 ``[L]``, L >= 2, ids below V.
            targets: the teacher's rows, on any device: row i is the distribution after ``tokens[: i + 1]``, which
                predicts ``tokens[i + 1]``. L - 1 rows, or as many as ``positions`` has. At most ``manifest.k`` entries
                a row, in any order, distinct and finite; a row without entries counts as not cached. ``temperatures``,
                ``tail_logprob`` and ``importance`` as the manifest declares them.
            next_logprobs: floats, one a row of ``targets``, nats: the teacher's log-probability of ``tokens[i + 1]``.
                NaN, or None for all of them: not known. Where the entries have the token, theirs is stored.
            positions: bool ``[L - 1]``: the rows that ``targets`` has. None: all.
            layout: lengths of the segments that did not see each other; None: one. Part of the key.

        Raises:
            ValueError, TypeError: an argument is not as above; a mass above 1; ``next_logprobs`` that contradict the
                entries. Nothing was added, and the writer can go on.
            CacheError: the disk is full or fails. The writer is closed; open the folder again to go on.
        """
        where = "CacheWriter.add"
        self._check_open()
        key = self.key(tokens, layout)
        if key in self:
            return False
        rows = canonical_rows(where, tokens, targets, next_logprobs, positions, self.manifest)
        if self._waiting_rows() + len(rows) > self._rows_per_block:
            self._write_waiting()
        self._added.add(key)
        self._waiting.append((key, rows))
        if self._waiting_rows() >= self._rows_per_block:
            self._write_waiting()
        return True

    def flush(self) -> None:
        """Returns when all sequences that were added are on the disk: the next writer recovers them after a power cut.

        Closes the block that was waiting for more rows; readers do not see them before the shard is sealed.
        """
        self._check_open()
        self._write_waiting()
        if self._builder is not None:
            with self._closed_on_error():
                self._builder.sync()

    def close(self) -> None:
        """Writes what waits, seals the shard and lets go of the name. A second call does nothing."""
        if self._lock is not None:
            self._write_waiting()
            self._seal()
            self._abandon()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _waiting_rows(self) -> int:
        return sum(len(rows) for _, rows in self._waiting)

    def _write_waiting(self) -> None:
        """Short sequences that fit in one block together, or one sequence of any length."""
        if not self._waiting:
            return
        rows = CachedRows.cat([rows for _, rows in self._waiting])
        parts = []
        for start in range(0, len(rows), self._rows_per_block):
            part = rows.slice(start, start + self._rows_per_block)
            if len(self._waiting) == 1:
                pieces = [_piece(self._waiting[0][0], len(rows), start, part)]
            else:
                pieces = [_piece(key, len(whole), 0, whole) for key, whole in self._waiting]
            parts.append((pieces, part))
        is_new = any([self._learner.see(part) for _, part in parts])
        with self._closed_on_error():
            if self._builder is None:
                header = ShardHeader(self._writer, self._next_number, self._digest)
                self._builder = ShardBuilder.create(self.folder, header)
                self._next_number += 1
                is_new = True
            if is_new:
                self._builder.append_model(self._learner.payload)
            encode = self._learner.model.encode
            self._builder.append([(pieces, encode(part), part.targets.ids.shape[0]) for pieces, part in parts])
        self._waiting = []
        if self._builder.rows >= self._rows_per_shard:
            self._seal()

    def _seal(self) -> None:
        if self._builder is not None:
            builder, self._builder = self._builder, None
            with self._closed_on_error():
                seal(builder, self._journal)

    def _check_open(self) -> None:
        if self._lock is None:
            what = f"writer {self._writer}"
            raise CacheError.mismatch(self.folder, None, what, "open", "closed", "open the folder again")

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """What a failed write left in the file is for the next writer to sort out, not for this one to write after."""
        try:
            yield
        except CacheError:
            self._abandon()
            raise

    def _abandon(self) -> None:
        self._waiting, self._builder = [], None
        lock, self._lock = self._lock, None
        lock.close()


def _piece(key: bytes, sequence_rows: int, first_row: int, rows: CachedRows) -> Piece:
    return Piece(key, sequence_rows, first_row, len(rows), int(rows.positions.sum()))
