"""What measuring on a CPU and on a GPU do differently: the clock, the state before a call, and peak memory."""

from __future__ import annotations

import abc
import gc
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20
"""Written before a call on a GPU, so that its cache (60 MB on a Hopper) holds nothing of the call before."""


class Device(abc.ABC):
    """One kind of device.

    Attributes:
        name: "cpu" or "cuda"; tensors are made on ``torch_name``.
        warm_ups: calls of everyone before the clock counts, fewer where they last for a fifth of the time given.
    """

    name: str
    torch_name: str
    warm_ups: int

    @abc.abstractmethod
    def milliseconds(self, call: Callable[[], object]) -> float:
        """Time of one call. Its result is dropped after the clock has stopped."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Until all work that was started is done."""

    @abc.abstractmethod
    def tidy(self) -> None:
        """Gives memory that nobody holds back to the system, where it would not be reused."""


class CPU(Device):
    name = torch_name = "cpu"
    warm_ups = 1

    def milliseconds(self, call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - begin
        del result
        return 1e3 * elapsed

    def synchronize(self) -> None:
        pass

    def tidy(self) -> None:
        pass


class CUDA(Device):
    """NVIDIA's, or AMD's by the same names."""

    name = torch_name = "cuda"
    warm_ups = 10

    def __init__(self) -> None:
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.torch_name)

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Between two events in the stream of work; the cache is emptied, unfinished work is done, before the first."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda.synchronize()
        begin.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        del result
        return begin.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def tidy(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def peak(self, call: Callable[[], object]) -> dict[str, int]:
        """Bytes of one call above what was held before it: allocated, and reserved from the system for that."""
        self.tidy()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        result = call()
        torch.cuda.synchronize()
        del result
        return {
            "peak_bytes": torch.cuda.max_memory_allocated() - allocated,
            "reserved_bytes": torch.cuda.max_memory_reserved() - reserved,
        }


DEVICES: dict[str, Callable[[], Device]] = {"cpu": CPU, "cuda": CUDA}


def find(name: str) -> Device:
    """The device of that name.

    Raises:
        RuntimeError: torch sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        seen = f"one that torch {torch.__version__} sees"
        raise RuntimeError(f"bench: --device must be {seen}, got cuda; try --device cpu")
    return DEVICES[name]()
