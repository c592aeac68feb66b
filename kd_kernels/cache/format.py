"""The bytes of a shard: header, models and blocks, index, trailer. FORMAT.md is the normative text.

Everything is little-endian. Every checksum but the header's own starts from the header's, so that bytes of another
shard never pass for bytes of this one, even at the same offset.
"""

from __future__ import annotations

import re
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kd_kernels import _check
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.manifest import VERSION

__all__ = [
    "BLOCK_HEAD_BYTES", "Block", "HEADER_BYTES", "IndexEntry", "MAX_BLOCK_ROWS", "MODEL_HEAD_BYTES", "Piece",
    "ShardHeader", "TRAILER_BYTES", "block_size", "check_writer_name", "decode_block", "decode_index", "decode_model",
    "decode_trailer", "encode_block", "encode_index", "encode_model", "is_model", "model_size", "shard_name",
    "unpack_entries",
]

if sys.byteorder != "little":
    raise ImportError("kd_kernels.cache: needs a little-endian machine, as its files are")

MAX_BLOCK_ROWS = 256

_HEADER = struct.Struct("<8sII16s24s4x")  # magic, version, number, digest of the manifest, writer
_BLOCK = struct.Struct("<QQIII")  # own offset, offset of its model, pieces, bytes of the payload, entries
_MODEL = struct.Struct("<QI")  # own offset, bytes of the payload
_PIECE = struct.Struct("<16sIIHH")
_ENTRY = struct.Struct("<16sQQII")
_TRAILER = struct.Struct("<QQ")  # offset of the index, sequences
_CRC = struct.Struct("<I")
_HEADER_MAGIC, _BLOCK_MAGIC, _MODEL_MAGIC, _TRAILER_MAGIC = b"KDCACHE\n", b"KDCB", b"KDCM", b"KDCINDEX"

HEADER_BYTES = _HEADER.size + _CRC.size
BLOCK_HEAD_BYTES = len(_BLOCK_MAGIC) + _CRC.size + _BLOCK.size
MODEL_HEAD_BYTES = len(_MODEL_MAGIC) + _CRC.size + _MODEL.size
TRAILER_BYTES = _TRAILER.size + _CRC.size + len(_TRAILER_MAGIC)


class Piece(NamedTuple):
    """A run of rows of one sequence inside of one block."""

    key: bytes
    sequence_rows: int
    first_row: int
    rows: int
    cached_rows: int


class Block(NamedTuple):
    """What is compressed and checked together: pieces of sequences, at most 256 rows. ``model`` is an offset."""

    offset: int
    size: int
    model: int
    pieces: tuple[Piece, ...]
    payload: memoryview
    entries: int

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


def encode_block(
    seed: int, offset: int, model: int, pieces: Sequence[Piece], payload: bytes, entries: int
) -> bytes:
    """The block that stands at ``offset`` of the shard whose header has the CRC-32 ``seed``; its model is at
    ``model``."""
    fields = _BLOCK.pack(offset, model, len(pieces), len(payload), entries)
    body = b"".join((fields, *(_PIECE.pack(*piece) for piece in pieces), payload))
    return _BLOCK_MAGIC + _CRC.pack(zlib.crc32(body, seed)) + body


def encode_model(seed: int, offset: int, payload: bytes) -> bytes:
    """The model block that stands at ``offset``."""
    body = _MODEL.pack(offset, len(payload)) + payload
    return _MODEL_MAGIC + _CRC.pack(zlib.crc32(body, seed)) + body


def is_model(head: bytes | memoryview) -> bool:
    """Whether a model begins with these bytes, going by what they say themselves."""
    return bytes(head[: len(_MODEL_MAGIC)]) == _MODEL_MAGIC


def block_size(path: Path, offset: int, head: bytes | memoryview) -> int:
    """How long the block is that begins with ``head``, going by what it says itself."""
    _check_head(path, offset, head, "block", _BLOCK_MAGIC, BLOCK_HEAD_BYTES)
    _, _, pieces, payload, _ = _BLOCK.unpack_from(head, len(_BLOCK_MAGIC) + _CRC.size)
    return BLOCK_HEAD_BYTES + pieces * _PIECE.size + payload


def model_size(path: Path, offset: int, head: bytes | memoryview) -> int:
    """How long the model is that begins with ``head``, going by what it says itself."""
    _check_head(path, offset, head, "model", _MODEL_MAGIC, MODEL_HEAD_BYTES)
    _, payload = _MODEL.unpack_from(head, len(_MODEL_MAGIC) + _CRC.size)
    return MODEL_HEAD_BYTES + payload


def decode_block(path: Path, seed: int, offset: int, data: memoryview) -> Block:
    """The block that ``data`` begins with, which was read from ``offset``. Its payload is checked, not yet decoded."""
    size = block_size(path, offset, data[:BLOCK_HEAD_BYTES])
    start = _check_body(path, seed, offset, data, size, "block")
    own_offset, model, _, payload, entries = _BLOCK.unpack_from(data, start)
    if own_offset != offset:
        raise CacheError.mismatch(path, offset, "own offset of a block", offset, own_offset)
    table = data[BLOCK_HEAD_BYTES : size - payload]
    pieces = tuple(Piece(*fields) for fields in _PIECE.iter_unpack(table))
    block = Block(offset, size, model, pieces, data[size - payload : size], entries)
    if not 1 <= block.rows <= MAX_BLOCK_ROWS:
        raise CacheError.mismatch(path, offset, "rows of a block", f"1..{MAX_BLOCK_ROWS}", block.rows)
    if not HEADER_BYTES <= model <= offset - MODEL_HEAD_BYTES:
        expected = f"{HEADER_BYTES}..{offset - MODEL_HEAD_BYTES}"
        raise CacheError.mismatch(path, offset, "offset of a block's model", expected, model)
    return block


def decode_model(path: Path, seed: int, offset: int, data: memoryview) -> bytes:
    """The payload of the model that ``data`` begins with, which was read from ``offset``."""
    size = model_size(path, offset, data[:MODEL_HEAD_BYTES])
    start = _check_body(path, seed, offset, data, size, "model")
    own_offset, _ = _MODEL.unpack_from(data, start)
    if own_offset != offset:
        raise CacheError.mismatch(path, offset, "own offset of a model", offset, own_offset)
    return bytes(data[MODEL_HEAD_BYTES:size])


def _check_head(path: Path, offset: int, head: bytes | memoryview, what: str, magic: bytes, size: int) -> None:
    if len(head) < size:
        raise CacheError.mismatch(path, offset, f"head of a {what}", f"{size} bytes", len(head))
    found = bytes(head[: len(magic)])
    if found != magic:
        raise CacheError.mismatch(path, offset, f"magic of a {what}", magic, found)


def _check_body(path: Path, seed: int, offset: int, data: memoryview, size: int, what: str) -> int:
    """Where the checked bytes begin, after the magic and the CRC-32."""
    if len(data) < size:
        raise CacheError.mismatch(path, offset, what, f"{size} bytes", len(data))
    (found,) = _CRC.unpack_from(data, len(_BLOCK_MAGIC))
    start = len(_BLOCK_MAGIC) + _CRC.size
    crc = zlib.crc32(data[start:size], seed)
    if crc != found:
        raise CacheError.mismatch(path, offset, f"CRC-32 of a {what}", f"{crc:08x}", f"{found:08x}")
    return start


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
