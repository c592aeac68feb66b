"""One shard file: read, or under construction."""

from __future__ import annotations

import itertools
import logging
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kd_kernels.cache.codec import RowModel, row_model
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.format import (
    BLOCK_HEAD_BYTES, HEADER_BYTES, MODEL_HEAD_BYTES, TRAILER_BYTES, Block, IndexEntry, Piece, ShardHeader, block_size,
    decode_block, decode_index, decode_model, decode_trailer, encode_block, encode_index, encode_model, is_model,
    model_size, unpack_entries,
)
from kd_kernels.cache.manifest import CacheManifest
from kd_kernels.cache.rows import CachedRows
from kd_kernels.cache.sources import LocalFile, SourceFile
from kd_kernels.cache.storage import sync_folder, system_errors, write_at

__all__ = ["Shard", "ShardBuilder", "TEMPORARY"]

TEMPORARY = ".tmp"

_log = logging.getLogger(__name__)
_MAKE_ROOM = "nothing that was written before is lost: make room and open the folder again"


class Shard:
    """Read access to a shard, sealed or not. Opening checks the header; reading checks what is read.

    Threads and forked processes can share one object.

    Args:
        file: a local path, or a file of a folder that is read from (:mod:`kd_kernels.cache.sources`).
    """

    def __init__(self, file: Path | SourceFile, header: ShardHeader) -> None:
        self._file = LocalFile(file) if isinstance(file, Path) else file
        self.path, self.size = self._file.path, self._file.size
        self._header, self._seed = header, header.crc
        self._models: dict[int, RowModel] = {}
        header.check(self.path, self._file.read(0, min(HEADER_BYTES, self.size)))

    def index(self) -> tuple[bytes, int, int]:
        """The packed entries of a sealed shard, their CRC-32, and their offset."""
        trailer = self._file.read(max(self.size - TRAILER_BYTES, 0), min(TRAILER_BYTES, self.size))
        offset = decode_trailer(self.path, self.size, bytes(trailer))
        packed, crc = decode_index(self.path, self._seed, offset, bytes(self._file.read(offset, self.size - offset)))
        return packed, crc, offset

    def check(
        self, manifest: CacheManifest | None = None, progress: Callable[[int], None] | None = None
    ) -> list[IndexEntry]:
        """Reads all of a sealed shard and compares it with its index; with a manifest, decodes the rows too."""
        packed, _, stop = self.index()
        found: list[IndexEntry] = []
        last = 0
        for end, whole in self.sequences(stop, manifest):
            found += whole
            if progress is not None:
                progress(end - last)
            last = end
        expected = unpack_entries(packed)
        for indexed, scanned in itertools.zip_longest(expected, found):
            if indexed != scanned:
                raise CacheError.mismatch(self.path, stop, "index entry", scanned, indexed)
        return found

    def record(self) -> dict[str, int]:
        """The journal's line on a sealed shard. Checks all of it first: what is journalled is whole."""
        entries = self.check()
        rows = sum(entry.rows for entry in entries)
        crc = self.index()[1]
        return {
            "number": self._header.number, "bytes": self.size, "sequences": len(entries), "rows": rows,
            "index_crc32": f"{crc:08x}",
        }

    def rows(self, entry: IndexEntry, manifest: CacheManifest) -> CachedRows:
        """The rows of one sequence. Raises CacheError unless they are there, all of them, and that sequence's."""
        data = memoryview(self._file.read(entry.offset, entry.size))
        blocks: list[Block] = []
        at = done = 0
        while at < entry.size:
            blocks.append(decode_block(self.path, self._seed, entry.offset + at, data[at:]))
            at += blocks[-1].size
        decoded = self._decode(blocks, manifest)
        begin = start = 0
        for piece in itertools.chain.from_iterable(block.pieces for block in blocks):
            begin = begin if done else start
            expected = (entry.key, entry.rows, done, begin + done)
            if (piece.key, piece.sequence_rows, piece.first_row, start) == expected:
                done += piece.rows
            start += piece.rows
        if done != entry.rows:
            what = f"rows of sequence {entry.key.hex()}"
            raise CacheError.mismatch(self.path, entry.offset, what, entry.rows, done)
        return decoded.slice(begin, begin + done)

    def stream_bytes(
        self, manifest: CacheManifest, seen: Callable[[bytes, CachedRows], None] | None = None
    ) -> Counter[str]:
        """What each stream of the rows takes of a sealed shard, and what stands around them; the sum is its size.
        ``seen`` is called with the key and rows of every piece of a sequence.

        Reads and decodes every block. Rows share the words of a code, so that their parts are fractions of a byte,
        rounded down to whole ones for the shard; what that leaves counts as heads of blocks.
        """
        _, _, stop = self.index()
        bits: Counter[str] = Counter()
        models, offset = 0, HEADER_BYTES
        while offset < stop:
            head = self._file.read(offset, min(BLOCK_HEAD_BYTES, stop - offset))
            if is_model(head):
                size = self._check_model(offset, stop, manifest)
                models += size
            else:
                size = min(block_size(self.path, offset, head), stop - offset)
                block = decode_block(self.path, self._seed, offset, memoryview(self._file.read(offset, size)))
                decoded = self._decode([block], manifest)
                bits.update(self._model(block.model, manifest).bits(decoded))
                start = 0
                for piece in block.pieces if seen is not None else ():
                    seen(piece.key, decoded.slice(start, start + piece.rows))
                    start += piece.rows
            offset += size
        found = Counter({name: int(value / 8) for name, value in bits.items() if value})
        heads = stop - HEADER_BYTES - models - found.total()
        return found + Counter({"models": models, "heads of blocks": heads, "index": self.size - stop + HEADER_BYTES})

    def sequences(self, stop: int, manifest: CacheManifest | None = None) -> Iterator[tuple[int, list[IndexEntry]]]:
        """Reads the blocks before ``stop`` in order. Yields, wherever a block ends and no sequence is left open, that
        offset and the entries of the sequences since the last one. With a manifest, rows are decoded too.

        Raises:
            CacheError: at the first block that is damaged, out of place, or breaks off a sequence.
        """
        offset, begin, done, cached = HEADER_BYTES, 0, 0, 0
        open_piece: Piece | None = None
        whole: list[IndexEntry] = []
        while offset < stop:
            head = self._file.read(offset, min(BLOCK_HEAD_BYTES, stop - offset))
            if done == 0 and is_model(head):
                offset += self._check_model(offset, stop, manifest)
                continue
            size = min(block_size(self.path, offset, head), stop - offset)
            block = decode_block(self.path, self._seed, offset, memoryview(self._file.read(offset, size)))
            if manifest is not None:
                self._decode([block], manifest)
            for piece in block.pieces:
                if done == 0:
                    open_piece, begin, cached = piece, offset, 0
                expected = (open_piece.key.hex(), open_piece.sequence_rows, done)
                found = (piece.key.hex(), piece.sequence_rows, piece.first_row)
                if expected != found:
                    raise CacheError.mismatch(self.path, offset, "sequence, its rows, and first row", expected, found)
                if not 1 <= piece.rows <= piece.sequence_rows - done:
                    left = f"1..{piece.sequence_rows - done}"
                    raise CacheError.mismatch(self.path, offset, "rows of a piece", left, piece.rows)
                done, cached = done + piece.rows, cached + piece.cached_rows
                if done == piece.sequence_rows:
                    whole.append(IndexEntry(piece.key, begin, offset + block.size - begin, done, cached))
                    done = 0
            offset += block.size
            if done == 0:
                yield offset, whole
                whole = []
        if done:
            what = f"rows of sequence {open_piece.key.hex()}"
            raise CacheError.mismatch(self.path, offset, what, open_piece.sequence_rows, done)

    def _check_model(self, offset: int, stop: int, manifest: CacheManifest | None) -> int:
        """The size of the model there, after checking it."""
        payload = self._model_payload(offset, stop)
        if manifest is not None:
            self._model(offset, manifest)
        return MODEL_HEAD_BYTES + len(payload)

    def _model_payload(self, offset: int, stop: int) -> bytes:
        head = self._file.read(offset, min(MODEL_HEAD_BYTES, stop - offset))
        size = min(model_size(self.path, offset, head), stop - offset)
        return decode_model(self.path, self._seed, offset, memoryview(self._file.read(offset, size)))

    def _model(self, offset: int, manifest: CacheManifest) -> RowModel:
        if offset not in self._models:
            payload = self._model_payload(offset, self.size)
            try:
                self._models[offset] = row_model(payload, manifest)
            except ValueError as error:
                raise CacheError(f"{self.path}, offset {offset}: {error}", self.path, offset) from error
        return self._models[offset]

    def _decode(self, blocks: Sequence[Block], manifest: CacheManifest) -> CachedRows:
        """The rows of blocks that follow on each other: in one call, as long as they have the same model."""
        parts = [
            self._decode_alike(list(alike), manifest)
            for _, alike in itertools.groupby(blocks, key=operator.attrgetter("model"))
        ]
        return parts[0] if len(parts) == 1 else CachedRows.cat(parts)

    def _decode_alike(self, blocks: list[Block], manifest: CacheManifest) -> CachedRows:
        model = self._model(blocks[0].model, manifest)
        try:
            rows = model.decode([(block.payload, block.rows, block.entries) for block in blocks])
        except ValueError as error:
            if len(blocks) > 1:  # which of them is it?
                for block in blocks:
                    self._decode_alike([block], manifest)
            raise CacheError(f"{self.path}, offset {blocks[0].offset}: {error}", self.path, blocks[0].offset) from error
        positions, start = rows.positions, 0
        for block in blocks:
            found = int(positions[start : start + block.rows].sum())
            expected = sum(piece.cached_rows for piece in block.pieces)
            if found != expected:
                raise CacheError.mismatch(self.path, block.offset, "cached rows of a block", expected, found)
            start += block.rows
        return rows


class ShardBuilder:
    """A shard under construction, in a file whose name ends in ``.tmp`` until it is sealed.

    A failure to write is a CacheError, after which the object is of no use: :meth:`recover` takes up what it wrote.
    """

    def __init__(self, path: Path, header: ShardHeader, entries: list[IndexEntry], end: int) -> None:
        self.header, self.path = header, path
        self.rows = sum(entry.rows for entry in entries)
        self._entries, self._end = entries, end
        self._model = 0
        with system_errors(path, "opening the shard for writing"):
            self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  closed by seal, or with the object

    @classmethod
    def create(cls, folder: Path, header: ShardHeader) -> ShardBuilder:
        path = folder / (header.name + TEMPORARY)
        with system_errors(path, "creating the shard", remedy=_MAKE_ROOM), open(path, "xb", buffering=0) as file:
            write_at(file.fileno(), header.encode(), 0)
        return cls(path, header, [], HEADER_BYTES)

    @classmethod
    def recover(cls, folder: Path, header: ShardHeader) -> ShardBuilder:
        """Takes up the file of a writer that was killed, as far as whole sequences go."""
        path = folder / (header.name + TEMPORARY)
        entries: list[IndexEntry] = []
        end = HEADER_BYTES
        with system_errors(path, "looking at an unsealed shard"):
            size = path.stat().st_size
        if size > HEADER_BYTES:
            shard = Shard(path, header)
            try:
                for reached, whole in shard.sequences(size):
                    end = reached
                    entries += whole
            except CacheError as torn:
                _log.warning("%s: %d bytes after the last whole sequence are dropped (%s)", path, size - end, torn)
        return cls(path, header, entries, end)

    def append_model(self, payload: bytes) -> None:
        """Writes the model that the blocks after it are coded with."""
        data = encode_model(self.header.crc, self._end, payload)
        with system_errors(self.path, "writing a model", self._end, _MAKE_ROOM):
            write_at(self._file.fileno(), data, self._end)
        self._model, self._end = self._end, self._end + len(data)

    def append(self, blocks: Sequence[tuple[Sequence[Piece], bytes, int]]) -> None:
        """Writes blocks, given as (pieces, payload, its entries), that together hold whole sequences."""
        data = bytearray()
        cached: Counter[tuple[bytes, int]] = Counter()
        for pieces, payload, entries in blocks:
            data += encode_block(self.header.crc, self._end + len(data), self._model, pieces, payload, entries)
            for piece in pieces:
                cached[piece.key, piece.sequence_rows] += piece.cached_rows
        with system_errors(self.path, "writing a block", self._end, _MAKE_ROOM):
            write_at(self._file.fileno(), data, self._end)
        self._entries += [IndexEntry(key, self._end, len(data), rows, n) for (key, rows), n in cached.items()]
        self.rows += sum(rows for _, rows in cached)
        self._end += len(data)

    def sync(self) -> None:
        """Returns when everything that was appended is on the disk."""
        with system_errors(self.path, "syncing", self._end, _MAKE_ROOM):
            os.fsync(self._file.fileno())
            sync_folder(self.path.parent)

    def seal(self) -> Shard | None:
        """Adds the index and gives the file its final name, whole and on the disk. Without sequences: removes it."""
        final = self.path.with_name(self.header.name)
        with system_errors(self.path, "sealing the shard", self._end, _MAKE_ROOM):
            if not self._entries:
                self.path.unlink()
                return None
            if final.exists():
                what = "sealed shard of the same number"
                raise CacheError.mismatch(final, None, what, "none", f"one beside {self.path.name}")
            os.ftruncate(self._file.fileno(), self._end)
            write_at(self._file.fileno(), encode_index(self.header.crc, self._end, self._entries), self._end)
            os.fsync(self._file.fileno())
            self._file.close()
            os.rename(self.path, final)
            sync_folder(final.parent)
        return Shard(final, self.header)
