"""Files that are whole or not there, and progress that can be read on a terminal and in a log."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name, that appears as ``target`` only when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # another process that made the same folder first is no error
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[TextIO]:
    """A text file to write under a temporary name, that appears as ``target`` only when it is complete."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def progress(**options) -> tqdm:
    """A bar with rate and time left; redrawn every ten seconds where there is no terminal, to keep logs short."""
    return tqdm(mininterval=0.2 if sys.stderr.isatty() else 10.0, dynamic_ncols=True, smoothing=0.1, **options)
