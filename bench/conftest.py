"""The fixture that times one row: first the truth, then rounds in which the floor runs right before the op.

``--tiny`` runs every row on a tiny shape: whether all of it works, in seconds. Its times mean nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics

import pytest
import torch

from bench import inputs, timing
from bench.cases import Case
from bench.inputs import Inputs, Shape

ROUNDS = 7
TINY = Shape(rows=24, vocab=512, student_hidden=16, teacher_hidden=24, kept=8)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tiny", action="store_true", help="every row on a tiny shape")


@functools.lru_cache(maxsize=2)
def _inputs(shape: Shape, dtype: torch.dtype) -> Inputs:
    return inputs.build(shape, dtype)


class Rows:
    """Times rows with pytest-benchmark and writes formulas and ratio beside them."""

    def __init__(self, benchmark, tiny: bool) -> None:
        self.benchmark, self.tiny = benchmark, tiny

    def time(
        self, case: Case, shape: Shape, dtype: torch.dtype, mode: str, *, backend: str = "cpp",
        divergence: str | None = None,
    ) -> None:
        shape = TINY if self.tiny else shape
        made = _inputs(shape, dtype)
        chosen = {} if divergence is None else {"divergence": divergence}
        errors = case.verify(made, case.run(made, mode, backend=backend, **chosen), **chosen)

        floor, floors = case.floor(mode, made), []

        def time_floor() -> None:
            made.clear_gradients()
            floors.append(timing.milliseconds(floor))

        self.benchmark.group = case.name
        self.benchmark.extra_info.update(
            mode=mode, backend=backend, dtype=str(dtype), shape=dataclasses.asdict(shape),
            flops=case.flops(mode, shape), bytes=case.bytes(mode, shape, dtype), errors=errors, **chosen,
        )
        self.benchmark.pedantic(
            lambda: case.run(made, mode, backend=backend, **chosen), setup=time_floor, rounds=ROUNDS, warmup_rounds=1
        )
        if self.benchmark.stats is not None:  # None under --benchmark-disable
            floor_ms = statistics.median(floors[1:])
            median_ms = 1e3 * self.benchmark.stats.stats.median
            self.benchmark.extra_info.update(floor_ms=floor_ms, ratio_to_floor=median_ms / floor_ms)


@pytest.fixture
def rows(benchmark, request: pytest.FixtureRequest) -> Rows:
    return Rows(benchmark, request.config.getoption("--tiny"))
