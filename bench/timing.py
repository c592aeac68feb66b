"""Times that survive a noisy machine: everyone runs once a round, in rotating order, and ratios are taken per round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

from bench.devices import Device

MIN_ROUNDS, MAX_ROUNDS = 3, 40


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: Device, *, seconds: float,
    before_each: Callable[[], object] = lambda: None, min_rounds: int = MIN_ROUNDS,
) -> dict[str, list[float]]:
    """Milliseconds by name, one a round. Warm-up calls (see :class:`Device`) are not among them.

    Rounds go on for ``seconds``, but for at least ``min_rounds`` and at most forty. ``before_each`` is not timed.
    """
    names = list(calls)

    def round_from(first: int) -> dict[str, float]:
        times = {}
        for name in (*names[first:], *names[:first]):
            before_each()
            times[name] = device.milliseconds(calls[name])
        return times

    end = time.perf_counter() + seconds / 5
    for warm_up in range(device.warm_ups):
        if warm_up and time.perf_counter() > end:
            break
        round_from(0)
    rounds: list[dict[str, float]] = []
    gc.freeze()  # collections go on, for a call may leave memory in cycles, but only look at what is new
    try:
        end = time.perf_counter() + seconds
        while len(rounds) < min_rounds or (len(rounds) < MAX_ROUNDS and time.perf_counter() < end):
            rounds.append(round_from(len(rounds) % len(names)))
    finally:
        gc.unfreeze()
    return {name: [times[name] for times in rounds] for name in names}


def summary(times: list[float]) -> dict[str, float]:
    """p20, p50, p80 and minimum, in ms."""
    p20, p50, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "min_ms": min(times)}


def ratio(times: list[float], floor: list[float]) -> float:
    """Median over rounds of the ratio to the floor of the same round: what slows both in a round cancels."""
    return statistics.median(a / b for a, b in zip(times, floor, strict=True))
