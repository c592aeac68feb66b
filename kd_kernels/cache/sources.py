"""Where the bytes of a cache are read from: a folder of this machine, or whatever fsspec opens for reading."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from kd_kernels import _check
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.storage import system_errors

__all__ = ["LocalFile", "LocalFolder", "RemoteFolder", "SourceFile", "SourceFolder", "is_url", "open_folder"]


class SourceFile(Protocol):
    """A file of a known size, read at any offset, by any number of threads."""

    path: Path | str
    size: int

    def read(self, offset: int, size: int) -> memoryview | bytes:
        """Exactly so many bytes.

        Raises:
            CacheError: the file ends before, or cannot be read.
        """


class SourceFolder(Protocol):
    """The files of a cache. Pickled, it opens its files anew."""

    location: Path | str

    def names(self) -> list[str]: ...

    def path(self, name: str) -> Path | str: ...

    def read(self, name: str) -> bytes: ...

    def open(self, name: str) -> SourceFile: ...


def is_url(folder: object) -> bool:
    """``scheme://path``, also chained as in ``simplecache::s3://path``."""
    return isinstance(folder, str) and "://" in folder


def open_folder(where: str, folder: str | os.PathLike[str], options: dict[str, Any] | None = None) -> SourceFolder:
    """The folder at a local path, or at a URL that fsspec knows; ``options`` are fsspec's for that file system."""
    if is_url(folder):
        return RemoteFolder(where, str(folder), options or {})
    if options:
        _check.fail(where, "storage_options", f"None for the local path {os.fspath(folder)!r}", sorted(options))
    return LocalFolder(Path(folder))


class LocalFolder:
    """A folder of this machine's file system."""

    def __init__(self, location: Path) -> None:
        self.location = location

    def names(self) -> list[str]:
        with system_errors(self.location, "listing the folder"):
            return sorted(os.listdir(self.location))

    def path(self, name: str) -> Path:
        return self.location / name

    def read(self, name: str) -> bytes:
        with system_errors(self.path(name), "reading"):
            return self.path(name).read_bytes()

    def open(self, name: str) -> LocalFile:
        return LocalFile(self.path(name))


class LocalFile:
    """A memory-mapped file: what is read is neither copied nor kept by this process.

    A page beyond the end of a file that was cut since kills the process that touches it. So the size is looked at
    before every read: one system call of a microsecond.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with system_errors(path, "opening the shard"):
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed with the object
            self.size = os.fstat(self._file.fileno()).st_size
            # a map of no bytes is an error
            self._map = memoryview(mmap.mmap(self._file.fileno(), self.size, prot=mmap.PROT_READ) if self.size else b"")

    def read(self, offset: int, size: int) -> memoryview:
        _check_end(self, offset, size, os.fstat(self._file.fileno()).st_size)
        return self._map[offset : offset + size]


class RemoteFolder:
    """A folder at a URL. File systems are fsspec's, which keeps one for each process and thread."""

    def __init__(self, where: str, location: str, options: dict[str, Any]) -> None:
        self.location = location.rstrip("/")
        self._where, self._options = where, options
        self._system()

    def names(self) -> list[str]:
        system, root = self._system()
        with _remote_errors(self.location, "listing the folder"):
            system.invalidate_cache()  # what another process has sealed since
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in system.ls(root, detail=False))

    def path(self, name: str) -> str:
        return f"{self.location}/{name}"

    def read(self, name: str) -> bytes:
        system, root = self._system()
        with _remote_errors(self.path(name), "reading"):
            return system.cat_file(f"{root}/{name}")

    def open(self, name: str) -> RemoteFile:
        return RemoteFile(self, name)

    def size(self, name: str) -> int:
        system, root = self._system()
        with _remote_errors(self.path(name), "opening the shard"):
            return system.size(f"{root}/{name}")

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        system, root = self._system()
        with _remote_errors(self.path(name), "reading", offset):
            return system.cat_file(f"{root}/{name}", start=offset, end=offset + size)

    # Asked for at every read, and never kept: fsspec's file systems must not cross a fork, and it looks after that.
    def _system(self) -> tuple[Any, str]:
        try:
            import fsspec
        except ImportError as error:
            remedy = "pip install fsspec, and what it needs for that scheme"
            text = _check.complaint(self._where, "folder", "a local path without fsspec", repr(self.location), remedy)
            raise RuntimeError(text) from error
        with _remote_errors(self.location, "opening the file system"):
            return fsspec.core.url_to_fs(self.location, **self._options)


class RemoteFile:
    """A file at a URL, read by ranges: one request a read."""

    def __init__(self, folder: RemoteFolder, name: str) -> None:
        self.path, self.size = folder.path(name), folder.size(name)
        self._folder, self._name = folder, name

    def read(self, offset: int, size: int) -> bytes:
        _check_end(self, offset, size, self.size)
        data = self._folder.read_range(self._name, offset, size) if size else b""
        _check_end(self, offset, size, offset + len(data))
        return data


def _check_end(file: SourceFile, offset: int, size: int, end: int) -> None:
    if offset + size > end:
        found = max(end - offset, 0)
        raise CacheError.mismatch(file.path, offset, "bytes to the end of the file", f"at least {size}", found)


@contextlib.contextmanager
def _remote_errors(path: str, what: str, offset: int | None = None) -> Iterator[None]:
    """Turns what a file system of fsspec raises (its packages share no base class) into a CacheError."""
    try:
        yield
    except Exception as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CacheError.mismatch(path, offset, what, "success", found) from error
