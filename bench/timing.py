"""Times that survive a noisy machine: everyone runs once a round, in rotating order, and ratios are taken per round."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Callable, Mapping

MIN_ROUNDS = 3


def milliseconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one call; its result is dropped after the clock has stopped."""
    begin = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - begin
    del result
    return 1e3 * elapsed


def interleaved(
    contenders: Mapping[str, Callable[[], object]], *, seconds: float, max_rounds: int = 40,
    before_each: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds by contender, one a round. The first call of each, which warms it up, is not among them.

    Rounds go on for ``seconds``, but for at least three and at most ``max_rounds``. ``before_each`` is not timed.
    """
    names = list(contenders)
    for name in names:
        before_each()
        contenders[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for round_ in range(max_rounds):
            if round_ >= MIN_ROUNDS and time.perf_counter() > end:
                break
            first = round_ % len(names)
            for name in (*names[first:], *names[:first]):
                before_each()
                times[name].append(milliseconds(contenders[name]))
    finally:
        gc.enable()
    return times


def summary(times: list[float]) -> dict[str, float]:
    """p20, p50, p80 and minimum, in ms."""
    p20, p50, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "min_ms": min(times)}


def ratio(times: list[float], floor: list[float]) -> float:
    """Median over rounds of the ratio to the floor of the same round: what slows both in a round cancels."""
    return statistics.median(a / b for a, b in zip(times, floor, strict=True))
