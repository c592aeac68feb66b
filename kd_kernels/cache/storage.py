"""The few system calls that the cache writes with. Every failure is a CacheError that names the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from kd_kernels.cache.errors import CacheError

__all__ = ["sync_folder", "system_errors", "write_at"]


@contextlib.contextmanager
def system_errors(path: Path, what: str, offset: int | None = None, remedy: str = "") -> Iterator[None]:
    """Turns an OSError (full disk, missing right, missing file) into a CacheError."""
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        raise CacheError.mismatch(path, offset, what, "success", found, remedy) from error


def write_at(file: int, data: bytes, offset: int) -> None:
    """Writes all of ``data`` at ``offset``: one call may write a part only."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Makes names that were created or renamed in ``folder`` survive a power cut."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
