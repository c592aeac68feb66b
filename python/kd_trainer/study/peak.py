"""The most memory that a piece of work needs."""

from __future__ import annotations

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
    """The largest number of bytes that were held at one time inside of the block.

    On a GPU, of tensors, by torch's allocator. Else of the whole process (resident memory: libraries and what was there before
    included), by Linux, whose high-water mark is put back at the start.
    """
    peak = Peak()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated()
        return
    try:
        REFERENCES.write_text("5")
    except OSError:  # not Linux, or a container that forbids it
        yield peak
        return
    yield peak
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    peak.bytes = int(line.split()[1]) * 1024
