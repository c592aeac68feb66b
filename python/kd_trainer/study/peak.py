"""The most memory that a piece of work takes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """``bytes``: None where the system does not tell."""

    bytes: int | None = None


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The largest number of bytes that were held at one time inside of the block, above what was held before it.

    On a GPU, of tensors, by torch's allocator. Else of the process (resident memory), by Linux, whose high-water mark
    is put back at the start, when what was freed before has been handed back.
    """
    peak = Peak()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated() - before
        return
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    try:
        REFERENCES.write_text("5")
    except OSError:  # not Linux, or a container that forbids it
        yield peak
        return
    before = _resident("VmRSS")
    yield peak
    peak.bytes = _resident("VmHWM") - before


def _resident(name: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
