"""The fixture that times one row: first the truth, then rounds in which the floor runs right before the op.

``--device cuda`` measures on a GPU, with a clock that waits for it. ``--tiny`` runs every row on a tiny shape: whether
all of it works, in seconds. Its times mean nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics

import pytest
import torch

from bench import devices, inputs
from bench.cases import CASES, DTYPES, Case
from bench.comparisons import TINY
from bench.devices import Device
from bench.inputs import Inputs, Shape
from kd_kernels.divergences import REGISTRY

ROUNDS = 7


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=tuple(devices.DEVICES), default="cpu", help="where the rows run")
    parser.addoption("--tiny", action="store_true", help="every row on a tiny shape")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case in every mode, on the device's backends, in every dtype; and every divergence."""
    if "case" in metafunc.fixturenames:
        device = metafunc.config.getoption("--device")
        metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
        metafunc.parametrize(("case", "mode", "backend"), [
            (name, mode, backend)
            for name, case in CASES.items() for mode in case.products for backend in case.backends[device]
        ])
    if "divergence" in metafunc.fixturenames:
        metafunc.parametrize("divergence", REGISTRY)


@functools.lru_cache(maxsize=1)
def _inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    return inputs.build(shape, dtype, device)


class Rows:
    """Times rows with pytest-benchmark and writes formulas and ratio beside them."""

    def __init__(self, benchmark, device: Device, tiny: bool) -> None:
        self.benchmark, self.device, self.tiny = benchmark, device, tiny

    def time(self, case: Case, dtype: torch.dtype, mode: str, backend: str, **options: str) -> None:
        shape = TINY if self.tiny else case.shapes[self.device.name]
        made = _inputs(shape, dtype, self.device.torch_name)
        prepare = lambda: case.prepare(made, mode, backend=backend, **options)  # noqa: E731
        verdict = case.verify(made, prepare()(), **options)
        floor, floors = case.floor(mode, made), []

        def set_up() -> tuple[tuple[object], dict]:
            made.clear_gradients()
            floors.append(self.device.milliseconds(floor))
            call = prepare()
            self.device.synchronize()
            return (call,), {}

        def timed(call) -> None:
            call()
            self.device.synchronize()

        self.benchmark.group = case.name
        self.benchmark.extra_info.update(
            mode=mode, backend=backend, device=self.device.name, dtype=str(dtype).removeprefix("torch."),
            shape=dataclasses.asdict(shape), flops=case.flops(mode, shape), bytes=case.bytes(mode, shape, dtype),
            errors=verdict.errors, cosines=verdict.cosines, **options,
        )
        self.benchmark.pedantic(timed, setup=set_up, rounds=ROUNDS, warmup_rounds=1)
        if self.benchmark.stats is not None:  # None under --benchmark-disable
            floor_ms = statistics.median(floors[1:])
            median_ms = 1e3 * self.benchmark.stats.stats.median
            self.benchmark.extra_info.update(floor_ms=floor_ms, ratio_to_floor=median_ms / floor_ms)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Device:
    return devices.find(request.config.getoption("--device"))


@pytest.fixture
def rows(benchmark, device: Device, request: pytest.FixtureRequest) -> Rows:
    return Rows(benchmark, device, request.config.getoption("--tiny"))
