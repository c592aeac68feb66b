"""JSON lines that carry their own checksum: the journals, which say what shards there are, and the manifest."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.storage import sync_folder, system_errors, write_at

__all__ = ["append_line", "encode_line", "parse_lines", "read_lines"]

_HEAD = b'{"crc32":"%08x","record":'
_HEAD_BYTES = len(_HEAD % 0)
_TAIL = b"}\n"


def encode_line(record: dict[str, Any]) -> bytes:
    """One line of JSON: the record, and in front of it the CRC-32 of the record's own bytes."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return _HEAD % zlib.crc32(body) + body + _TAIL


def read_lines(path: Path) -> list[tuple[int, bytes, dict[str, Any]]]:
    """The lines of a local file: see :func:`parse_lines`. A missing file is a CacheError as well."""
    with system_errors(path, "reading"):
        data = path.read_bytes()
    return parse_lines(path, data)


def parse_lines(path: Path | str, data: bytes) -> list[tuple[int, bytes, dict[str, Any]]]:
    """Every whole line of a file, as (offset, bytes of the record, record).

    What follows the last newline is the torn tail of an append that was cut short, and is left out.

    Raises:
        CacheError: a whole line is not what was written.
    """
    lines, offset = [], 0
    whole = data.rfind(b"\n") + 1
    for line in data[:whole].splitlines(keepends=True):
        body = line[_HEAD_BYTES : -len(_TAIL)]
        expected = _HEAD % zlib.crc32(body)
        if line != expected + body + _TAIL:
            raise CacheError.mismatch(path, offset, "line", repr(expected), repr(line[:_HEAD_BYTES]))
        try:
            record = json.loads(body)
        except ValueError as error:
            raise CacheError.mismatch(path, offset, "line", "a JSON object", error) from error
        if not isinstance(record, dict):
            raise CacheError.mismatch(path, offset, "line", "a JSON object", type(record).__name__)
        lines.append((offset, body, record))
        offset += len(line)
    return lines


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends after the last whole line, over a torn tail if there is one, and returns when it is on the disk."""
    with system_errors(path, "appending to the journal", remedy="the shard is safe: the next writer journals it"):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            whole = os.pread(file, os.fstat(file).st_size, 0).rfind(b"\n") + 1
            os.ftruncate(file, whole)
            write_at(file, encode_line(record), whole)
            os.fsync(file)
        finally:
            os.close(file)
        sync_folder(path.parent)
