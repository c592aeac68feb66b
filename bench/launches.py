"""How many kernels one call launches on a GPU, and how often the host waits for it, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

REGION = "bench.launches"
LAUNCHES = ("cudaLaunch", "cuLaunchKernel", "cudaGraphLaunch", "hipLaunch", "hipModuleLaunch", "hipExtLaunch")
WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "hipStreamSynchronize",
    "hipDeviceSynchronize", "hipEventSynchronize",
)


def counted(events: Iterable[tuple[str, float, float]]) -> dict[str, int]:
    """Launches and waits among ``(name, start, end)`` that begin within the region.

    The profiler's own waiting, when it starts and stops, is outside of it.
    """
    events = list(events)
    begin, end = next((start, stop) for name, start, stop in events if name == REGION)
    inside = [name for name, start, _ in events if begin <= start <= end]
    return {
        "launches": sum(name.startswith(LAUNCHES) for name in inside),
        "host_syncs": sum(name.startswith(WAITS) for name in inside),
    }


def count(call: Callable[[], object]) -> dict[str, int]:
    """Kernels that one call launches, and times that the host waits in it."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        with record_function(REGION):
            result = call()
        torch.cuda.synchronize()
    del result
    on_host = (event for event in profiled.events() if event.device_type == DeviceType.CPU)
    return counted((event.name, event.time_range.start, event.time_range.end) for event in on_host)
