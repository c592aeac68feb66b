"""The one exception of the cache."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["CacheError"]


class CacheError(RuntimeError):
    """A file of the cache is missing, damaged, foreign, or cannot be written. Rows are never returned instead.

    Attributes:
        path: the file (or the folder) that it is about; a string where it is a URL.
        offset: the byte in that file, or None where the file as a whole is meant.
    """

    # The message comes first and the rest has defaults: a DataLoader rebuilds an exception of its worker from the
    # message alone.
    def __init__(self, message: str, path: str | os.PathLike[str] | None = None, offset: int | None = None) -> None:
        super().__init__(message)
        self.path = path if path is None or (isinstance(path, str) and "://" in path) else Path(path)
        self.offset = offset

    @classmethod
    def mismatch(
        cls, path: str | os.PathLike[str], offset: int | None, what: str, expected: object, found: object,
        remedy: str = "",
    ) -> CacheError:
        """``<path>[, offset <n>]: <what>: expected <expected>, found <found>[; <remedy>]``."""
        place = f"{path}" if offset is None else f"{path}, offset {offset}"
        text = f"{place}: {what}: expected {expected}, found {found}" + (f"; {remedy}" if remedy else "")
        return cls(text, path, offset)
