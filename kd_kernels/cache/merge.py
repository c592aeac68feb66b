"""Several folders of one cache as one folder."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kd_kernels import _check
from kd_kernels.cache.catalog import JOURNAL, Sealed, journalled, open_sealed, unsealed
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.format import shard_name
from kd_kernels.cache.journal import append_line
from kd_kernels.cache.lock import WriterLock
from kd_kernels.cache.manifest import CacheManifest, check_same, create_manifest, read_manifest
from kd_kernels.cache.shard import TEMPORARY, Shard
from kd_kernels.cache.sources import LocalFolder, is_url
from kd_kernels.cache.storage import sync_folder, system_errors

__all__ = ["Merged", "merge"]

_COPY = ".copy"
"""Ends the name of a file that is being copied. Neither readers nor writers look at it."""


class Merged(NamedTuple):
    """What :func:`merge` did.

    Attributes:
        shards: how many the merged folder has in all.
        added: how many of them came with this call; the others were there.
        copied_bytes: of those that could not be linked, because they are on another file system.
        renamed: new names of the shards whose own were taken, as ``(folder, name) -> name``.
    """

    shards: int
    added: int
    copied_bytes: int
    renamed: dict[tuple[Path, str], str]


def merge(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Merged:
    """Puts the sequences of several caches into one folder, without reading a row.

    Shards are linked (on another file system: copied and checked) and journalled one by one, never rewritten. So the
    call can be repeated after it was stopped, and ``out`` may be a cache that exists. Sequences that several folders
    hold are found once. Where two folders have shards of one name, the later ones get another writer's name, and their
    journal says what they were called when they were written.

    Args:
        folders: local paths of caches that are of one identity: everything in their manifests but ``meta``.
        out: local path; made if it is not there, with the first folder's ``meta``.

    Raises:
        CacheError: a folder is no cache, of another identity, damaged, or has shards that are not sealed; ``out`` is
            being written to under one of the names, or cannot be written.
        ValueError: no folders, one of them twice or also ``out``, or a URL.

    Cost: no space, or that of the copies; two syncs a shard.
    """
    where = "merge"
    for name, value in [("out", out), *(("folders", folder) for folder in folders)]:
        if is_url(value):
            _check.fail(where, name, "local paths", repr(value), "copy the folder first")
    paths, out = [Path(folder) for folder in folders], Path(out)
    if not paths or len({path.resolve() for path in (*paths, out)}) <= len(paths):
        _check.fail(
            where, "folders", "at least one, all different from each other and from out", [str(p) for p in paths]
        )
    sources = [LocalFolder(path) for path in paths]
    manifest, shards = _sealed_shards(sources)
    digest = _make(out, manifest)
    there = journalled(LocalFolder(out), digest)
    _refuse_unsealed(out, [name for name in unsealed(LocalFolder(out), there) if name.endswith(TEMPORARY)])

    known = {_identity(sealed) for sealed in there}
    names = _Names(out, there)
    added, copied, renamed = 0, 0, {}
    with names:
        for source, sealed in shards:
            if _identity(sealed) in known:
                continue
            known.add(_identity(sealed))
            name = names.take(source.location, sealed)
            if name != sealed.name:
                renamed[source.location, sealed.name] = name
            copied += _bring(source.path(sealed.name), out / name, sealed)
            record = {field: value for field, value in sealed.record.items() if field != "origin"}
            if name != sealed.header.name:
                record["origin"] = sealed.header.name.removesuffix(".kdc")
            append_line(out / f"{name.split('-')[0]}{JOURNAL}", record)
            added += 1
    return Merged(len(there) + added, added, copied, renamed)


def _sealed_shards(sources: Sequence[LocalFolder]) -> tuple[CacheManifest, list[tuple[LocalFolder, Sealed]]]:
    """The manifest that all have, and their shards, each of which is the one that its journal says."""
    first, first_digest = read_manifest(sources[0])
    shards = []
    for source in sources:
        manifest, digest = read_manifest(source)
        path = source.path("manifest.jsonl")
        check_same(path, first, manifest, f"like {sources[0].location}: caches of one identity can be merged")
        if digest != first_digest:
            raise CacheError.mismatch(path, 0, "digest of the manifest", first_digest.hex(), digest.hex())
        found = journalled(source, digest)
        _refuse_unsealed(source.location, unsealed(source, found))
        for sealed in found:
            open_sealed(source, sealed)
            shards.append((source, sealed))
    return first, shards


def _refuse_unsealed(folder: Path, names: list[str]) -> None:
    if names:
        remedy = "close their writers; of writers that were killed, kd_kernels.cache.recover(folder)"
        raise CacheError.mismatch(folder, None, "shards that are not sealed", "none", ", ".join(names), remedy)


def _make(out: Path, manifest: CacheManifest) -> bytes:
    with system_errors(out, "making the folder"):
        out.mkdir(parents=True, exist_ok=True)
    return create_manifest(out, manifest, f"merge_{os.getpid()}.manifest{TEMPORARY}")


def _identity(sealed: Sealed) -> tuple[object, ...]:
    """Equal for copies of one shard, whatever they are called."""
    return sealed.header, sealed.record["bytes"], sealed.record["index_crc32"]


class _Names:
    """Gives shards names in a folder, and holds the writers' names that it has given until it is left."""

    def __init__(self, out: Path, there: Sequence[Sealed]) -> None:
        self._out = out
        self._taken = {sealed.name for sealed in there}
        self._locks: dict[str, WriterLock] = {}

    def take(self, folder: Path, sealed: Sealed) -> str:
        """The shard's name if it is free, else that of the same number under the next free of
        ``WRITER_2, WRITER_3, ...``."""
        for again in itertools.count(1):
            suffix = f"_{again}"
            writer = sealed.writer if again == 1 else sealed.header.writer[: 24 - len(suffix)] + suffix
            name = shard_name(writer, sealed.number)
            if name not in self._taken and _is_free(self._out / name, sealed):
                if writer not in self._locks:
                    self._locks[writer] = WriterLock(self._out, writer)
                self._taken.add(name)
                return name
        raise AssertionError("unreachable")

    def __enter__(self) -> _Names:
        return self

    def __exit__(self, *error: object) -> None:
        for lock in self._locks.values():
            lock.close()


def _is_free(path: Path, sealed: Sealed) -> bool:
    """Whether nothing has this name, or this shard has, from a merge that was stopped before it journalled it."""
    if not path.exists():
        return True
    with contextlib.suppress(CacheError):
        shard = Shard(path, sealed.header)
        return shard.size == sealed.record["bytes"] and f"{shard.index()[1]:08x}" == sealed.record["index_crc32"]
    return False


def _bring(source: Path, target: Path, sealed: Sealed) -> int:
    """Gives the file another name, or a copy of it that name. Returns the bytes that were copied."""
    if target.exists():
        return 0
    try:
        os.link(source, target)
        copied = 0
    except OSError:  # another file system, or one without links
        copied = _copy(source, target, sealed)
    with system_errors(target, "syncing the folder"):
        sync_folder(target.parent)
    return copied


def _copy(source: Path, target: Path, sealed: Sealed) -> int:
    temporary = target.with_name(target.name + _COPY)
    remedy = "nothing that was there before is lost: make room and merge again"
    with system_errors(target, "copying a shard", remedy=remedy), _removed_on_error(temporary):
        shutil.copyfile(source, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        Shard(temporary, sealed.header).check()
        os.rename(temporary, target)
    return sealed.record["bytes"]


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
