"""The bytes of a shard: header, blocks, index, trailer. FORMAT.md is the normative text.

Everything is little-endian. Every checksum but the header's own starts from the header's, so that bytes of another
shard never pass for bytes of this one, even at the same offset.
"""

from __future__ import annotations

import re
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Sequence

from kd_kernels import _check
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.manifest import VERSION

__all__ = [
    "BLOCK_HEAD_BYTES", "Block", "HEADER_BYTES", "IndexEntry", "MAX_BLOCK_ROWS", "Piece", "ShardHeader",
    "TRAILER_BYTES", "block_size", "check_writer_name", "decode_block", "decode_index", "decode_trailer",
    "encode_block", "encode_index", "shard_name", "unpack_entries",
]

if sys.byteorder != "little":
    raise ImportError("kd_kernels.cache: needs a little-endian machine, as its files are")

MAX_BLOCK_ROWS = 256

_HEADER = struct.Struct("<8sII16s24s4x")  # magic, version, number, digest of the manifest, writer
_BLOCK = struct.Struct("<QIII")  # own offset, pieces, bytes of the payload, bytes of it when inflated
_PIECE = struct.Struct("<16sIIHH")
_ENTRY = struct.Struct("<16sQQII")
_TRAILER = struct.Struct("<QQ")  # offset of the index, sequences
_CRC = struct.Struct("<I")
_HEADER_MAGIC, _BLOCK_MAGIC, _TRAILER_MAGIC = b"KDCACHE\n", b"KDCB", b"KDCINDEX"

HEADER_BYTES = _HEADER.size + _CRC.size
BLOCK_HEAD_BYTES = len(_BLOCK_MAGIC) + _CRC.size + _BLOCK.size
TRAILER_BYTES = _TRAILER.size + _CRC.size + len(_TRAILER_MAGIC)


class Piece(NamedTuple):
    """A run of rows of one sequence inside of one block."""

    key: bytes
    sequence_rows: int
    first_row: int
    rows: int
    cached_rows: int


class Block(NamedTuple):
    """What is compressed and checked together: pieces of sequences, at most 256 rows."""

    offset: int
    size: int
    pieces: tuple[Piece, ...]
    payload: memoryview
    inflated_bytes: int

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)


class IndexEntry(NamedTuple):
    """Where a sequence is: the blocks that hold its rows are the ``size`` bytes from ``offset`` on."""

    key: bytes
    offset: int
    size: int
    rows: int
    cached_rows: int


def shard_name(writer: str, number: int) -> str:
    """The file of a writer's shard of this number."""
    return f"{writer}-{number:06d}.kdc"


def check_writer_name(where: str, writer: str) -> None:
    if not isinstance(writer, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,24}", writer):
        _check.fail(where, "writer", "1 to 24 of A-Z a-z 0-9 _", repr(writer))


@dataclass(frozen=True)
class ShardHeader:
    """Which shard of which cache a file is. The same facts are in its name: renaming a shard is found out."""

    writer: str
    number: int
    manifest: bytes

    @property
    def name(self) -> str:
        return shard_name(self.writer, self.number)

    @property
    def crc(self) -> int:
        return zlib.crc32(self._fields())

    def _fields(self) -> bytes:
        return _HEADER.pack(_HEADER_MAGIC, VERSION, self.number, self.manifest, self.writer.encode())

    def encode(self) -> bytes:
        return self._fields() + _CRC.pack(self.crc)

    def check(self, path: Path, data: bytes) -> None:
        """Raises CacheError unless ``data`` is this header."""
        if len(data) < HEADER_BYTES:
            raise CacheError.mismatch(path, 0, "shard header", f"{HEADER_BYTES} bytes", f"{len(data)}")
        (found_crc,) = _CRC.unpack_from(data, _HEADER.size)
        crc = zlib.crc32(data[: _HEADER.size])
        if crc != found_crc:
            raise CacheError.mismatch(path, 0, "CRC-32 of the shard header", f"{crc:08x}", f"{found_crc:08x}")
        magic, version, number, manifest, writer = _HEADER.unpack_from(data)
        for what, expected, found in (
            ("magic of the shard", _HEADER_MAGIC, magic),
            ("format version", VERSION, version),
            ("writer of the shard", self.writer, writer.rstrip(b"\0").decode("ascii", "replace")),
            ("number of the shard", self.number, number),
            ("manifest of the shard", self.manifest.hex(), manifest.hex()),
        ):
            if expected != found:
                raise CacheError.mismatch(path, 0, what, expected, found)


def encode_block(seed: int, offset: int, pieces: Sequence[Piece], payload: bytes, inflated_bytes: int) -> bytes:
    """The block that stands at ``offset`` of the shard whose header has the CRC-32 ``seed``."""
    fields = _BLOCK.pack(offset, len(pieces), len(payload), inflated_bytes)
    body = b"".join((fields, *(_PIECE.pack(*piece) for piece in pieces), payload))
    return _BLOCK_MAGIC + _CRC.pack(zlib.crc32(body, seed)) + body


def block_size(path: Path, offset: int, head: bytes | memoryview) -> int:
    """How long the block is that begins with ``head``, going by what it says itself."""
    if len(head) < BLOCK_HEAD_BYTES:
        raise CacheError.mismatch(path, offset, "head of a block", f"{BLOCK_HEAD_BYTES} bytes", len(head))
    magic = bytes(head[: len(_BLOCK_MAGIC)])
    if magic != _BLOCK_MAGIC:
        raise CacheError.mismatch(path, offset, "magic of a block", _BLOCK_MAGIC, magic)
    _, pieces, payload, _ = _BLOCK.unpack_from(head, len(_BLOCK_MAGIC) + _CRC.size)
    return BLOCK_HEAD_BYTES + pieces * _PIECE.size + payload


def decode_block(path: Path, seed: int, offset: int, data: memoryview) -> Block:
    """The block that ``data`` begins with, which was read from ``offset``. Its payload is checked, not yet inflated."""
    size = block_size(path, offset, data[:BLOCK_HEAD_BYTES])
    if len(data) < size:
        raise CacheError.mismatch(path, offset, "block", f"{size} bytes", len(data))
    (found_crc,) = _CRC.unpack_from(data, len(_BLOCK_MAGIC))
    start = len(_BLOCK_MAGIC) + _CRC.size
    crc = zlib.crc32(data[start:size], seed)
    if crc != found_crc:
        raise CacheError.mismatch(path, offset, "CRC-32 of a block", f"{crc:08x}", f"{found_crc:08x}")
    own_offset, count, payload, inflated_bytes = _BLOCK.unpack_from(data, start)
    if own_offset != offset:
        raise CacheError.mismatch(path, offset, "own offset of a block", offset, own_offset)
    table = data[BLOCK_HEAD_BYTES : size - payload]
    pieces = tuple(Piece(*fields) for fields in _PIECE.iter_unpack(table))
    block = Block(offset, size, pieces, data[size - payload : size], inflated_bytes)
    if not 1 <= block.rows <= MAX_BLOCK_ROWS:
        raise CacheError.mismatch(path, offset, "rows of a block", f"1..{MAX_BLOCK_ROWS}", block.rows)
    return block


def encode_index(seed: int, offset: int, entries: Sequence[IndexEntry]) -> bytes:
    """The index that stands at ``offset``, and the trailer after it."""
    index = b"".join(_ENTRY.pack(*entry) for entry in entries)
    trailer = _TRAILER.pack(offset, len(entries))
    return index + trailer + _CRC.pack(zlib.crc32(index + trailer, seed)) + _TRAILER_MAGIC


def decode_trailer(path: Path, file_size: int, data: bytes) -> int:
    """Where the index begins, from the last bytes of a file."""
    at = max(file_size - TRAILER_BYTES, 0)
    if len(data) < TRAILER_BYTES or not data.endswith(_TRAILER_MAGIC):
        raise CacheError.mismatch(path, at, "trailer", f"{TRAILER_BYTES} bytes up to {_TRAILER_MAGIC!r}", repr(data))
    offset, sequences = _TRAILER.unpack_from(data)
    if offset + sequences * _ENTRY.size != at:
        raise CacheError.mismatch(path, at, "end of the index", at, offset + sequences * _ENTRY.size)
    return offset


def decode_index(path: Path, seed: int, offset: int, data: bytes) -> tuple[bytes, int]:
    """The packed entries and the CRC-32, out of the index and the trailer, which were read from ``offset``."""
    checked = len(data) - TRAILER_BYTES + _TRAILER.size
    (found,) = _CRC.unpack_from(data, checked)
    crc = zlib.crc32(data[:checked], seed)
    if crc != found:
        raise CacheError.mismatch(path, offset, "CRC-32 of the index", f"{crc:08x}", f"{found:08x}")
    return data[: checked - _TRAILER.size], crc


def unpack_entries(packed: bytes) -> list[IndexEntry]:
    return [IndexEntry(*fields) for fields in _ENTRY.iter_unpack(packed)]
