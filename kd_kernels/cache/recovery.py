"""What writers left behind that were killed: recovered as far as it is whole, sealed, and journalled."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kd_kernels.cache.catalog import JOURNAL, journalled, unsealed
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.format import ShardHeader
from kd_kernels.cache.journal import append_line, read_lines
from kd_kernels.cache.lock import NameHeld, WriterLock
from kd_kernels.cache.manifest import read_manifest
from kd_kernels.cache.shard import TEMPORARY, Shard, ShardBuilder
from kd_kernels.cache.sources import LocalFolder

__all__ = ["recover", "recover_writer", "seal"]


def seal(builder: ShardBuilder, journal: Path) -> bool:
    """Seals a shard and journals it; False where there is nothing in it, and it is removed."""
    shard = builder.seal()
    if shard is not None:
        append_line(journal, shard.record())
    return shard is not None


def recover_writer(folder: Path, writer: str, digest: bytes) -> tuple[int, list[str]]:
    """Seals and journals what earlier processes left under this name, whose lock the caller holds.

    Returns:
        The next free number of a shard, and the names of the shards that readers see from now on.

    Raises:
        CacheError: a file is damaged in a way that no crash explains, or the disk fails.
    """
    journal = folder / f"{writer}{JOURNAL}"
    lines = read_lines(journal) if journal.exists() else []
    done = {record["number"] for _, _, record in lines}
    next_number, recovered = max(done, default=-1) + 1, []
    name = re.compile(rf"{writer}-(\d+)\.kdc({re.escape(TEMPORARY)})?")
    for path in LocalFolder(folder).names():
        if (found := name.fullmatch(path)) is None:
            continue
        header = ShardHeader(writer, int(found[1]), digest)
        next_number = max(next_number, header.number + 1)
        if found[2]:
            if seal(ShardBuilder.recover(folder, header), journal):
                recovered.append(header.name)
        elif header.number not in done:
            append_line(journal, Shard(folder / path, header).record())
            recovered.append(header.name)
    return next_number, recovered


def recover(folder: str | os.PathLike[str]) -> list[str]:
    """Makes readable what writers left unsealed that are no more, whatever their names: after a job that died.

    A writer does that for its own name when it is opened. This is for names that will not come again: before a job goes
    on with another number of processes or on other machines, so that nothing is computed twice. Names that a running
    process holds are left to it.

    Args:
        folder: a local path.

    Returns:
        Names of the shards that readers see from now on.

    Raises:
        CacheError: the folder is no cache, a file is damaged in a way that no crash explains, the disk fails; or a
            process of another machine did not let go of its name (see ``WriterLock``): raised after the other names are
            done.
    """
    folder = Path(folder)
    source = LocalFolder(folder)
    _, digest = read_manifest(source)
    recovered: list[str] = []
    undecided: CacheError | None = None
    for writer in sorted({name.split("-")[0] for name in unsealed(source, journalled(source, digest))}):
        try:
            lock = WriterLock(folder, writer)
        except NameHeld:
            continue
        except CacheError as error:
            undecided = undecided or error
            continue
        try:
            recovered += recover_writer(folder, writer, digest)[1]
        finally:
            lock.close()
    if undecided is not None:
        raise undecided
    return recovered

