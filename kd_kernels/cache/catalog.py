"""Which shards a folder has: what the journals say, held against the shards themselves."""

from __future__ import annotations

import re
from typing import NamedTuple

from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.format import ShardHeader, check_writer_name, shard_name
from kd_kernels.cache.journal import parse_lines
from kd_kernels.cache.shard import TEMPORARY, Shard
from kd_kernels.cache.sources import SourceFolder

__all__ = ["JOURNAL", "Sealed", "journalled", "open_sealed", "unsealed"]

JOURNAL = ".journal"
_FIELDS = {"number": int, "bytes": int, "sequences": int, "rows": int, "index_crc32": str}
_SHARD = re.compile(r"[A-Za-z0-9_]{1,24}-\d{6,}\.kdc")


class Sealed(NamedTuple):
    """One sealed shard, as a journal has it.

    Attributes:
        writer, number: whose journal it is, and the shard's number there: the name of the file.
        header: what the shard says of itself: the same, unless a merge gave it another name.
        offset: of the line in the journal.
        record: the line.
    """

    writer: str
    number: int
    header: ShardHeader
    offset: int
    record: dict

    @property
    def name(self) -> str:
        return shard_name(self.writer, self.number)


def journalled(folder: SourceFolder, digest: bytes) -> list[Sealed]:
    """The sealed shards of a folder whose manifest has this digest, by writer and number.

    Raises:
        CacheError: a line of a journal is damaged, or is not what a writer writes.
    """
    found: list[Sealed] = []
    for name in folder.names():
        if not name.endswith(JOURNAL):
            continue
        writer, path = name.removesuffix(JOURNAL), folder.path(name)
        lines = {}
        for offset, _, record in parse_lines(path, folder.read(name)):
            types = {field: type(record.get(field)) for field in _FIELDS}
            if types != _FIELDS:
                raise CacheError.mismatch(path, offset, "line", f"fields {', '.join(_FIELDS)}", record)
            lines[record["number"]] = offset, record
        for number, (offset, record) in sorted(lines.items()):
            try:
                own_writer, own_number = record.get("origin", f"{writer}-{number}").split("-")
                check_writer_name("journal", own_writer)
                header = ShardHeader(own_writer, int(own_number), digest)
            except (AttributeError, ValueError) as error:
                raise CacheError.mismatch(path, offset, "origin", "WRITER-NUMBER", record.get("origin")) from error
            found.append(Sealed(writer, number, header, offset, record))
    return found


def open_sealed(folder: SourceFolder, sealed: Sealed) -> tuple[Shard, bytes]:
    """The shard and its packed index, which agree with the journal.

    Raises:
        CacheError: the file is not there, or not the one that was sealed.
    """
    shard, record = Shard(folder.open(sealed.name), sealed.header), sealed.record
    line = f"by {sealed.writer}{JOURNAL} at {sealed.offset}"
    if shard.size != record["bytes"]:
        raise CacheError.mismatch(shard.path, shard.size, f"bytes of the shard, {line}", record["bytes"], shard.size)
    packed, crc, at = shard.index()
    if f"{crc:08x}" != record["index_crc32"]:
        what = f"CRC-32 of the index, {line}"
        raise CacheError.mismatch(shard.path, at, what, record["index_crc32"], f"{crc:08x}")
    return shard, packed


def unsealed(folder: SourceFolder, sealed: list[Sealed]) -> list[str]:
    """Names of shards that readers do not see: under construction, or sealed and not in a journal."""
    known = {shard.name for shard in sealed}
    return [
        name for name in folder.names()
        if _SHARD.fullmatch(name.removesuffix(TEMPORARY)) and name not in known
    ]
