"""Fixtures that every test has, and the closing lines that say what did not run."""

from __future__ import annotations

import collections
import os
import sys
import zlib
from pathlib import Path

# Read when OpenMP starts, so before torch is imported: threads that spin while they wait slow a shared machine by ten.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))  # tests import oracles and helpers by name, from any folder

hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    max_examples=12,
    database=None,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture
    ],  # `backend` is a string, the rest is per test
)
hypothesis.settings.load_profile("suite")

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.install()

_did_not_run: collections.Counter[str] = collections.Counter()


EVERY = 40
"""Of the cases that every backend shares, the interpreter (a hundred times slower than a kernel) runs one in so
many."""


def _thinned(items: list[pytest.Item]) -> set[pytest.Item]:
    """Cases of backend="triton" that the interpreter leaves out: all but one in EVERY, the first of each test, and the
    first of each divergence in a file.

    Which, is a hash of the case's name: the same ones every time. KD_INTERPRET_ALL=1 runs all.
    """
    seen, left_out = set(), set()
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("backend") != "triton" or os.environ.get("KD_INTERPRET_ALL") == "1":
            continue
        file = item.location[0]
        kinds = {(file, item.originalname), (file, str(params.get("divergence")))}  # type: ignore[attr-defined]
        if kinds <= seen and zlib.crc32(item.nodeid.encode()) % EVERY:
            left_out.add(item)
        seen |= kinds
    return left_out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: torch sees no GPU here"))
        if item.get_closest_marker("interpret") and not interpreted:
            item.add_marker(pytest.mark.skip(reason="interpret: needs a process of its own, with TRITON_INTERPRET=1"))
    left_out = _thinned(items)
    _did_not_run[
        f"triton in the interpreter, where one case in {EVERY} is taken (KD_INTERPRET_ALL=1: all)"
    ] += len(left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """What the Triton kernels refuse by contract is no failure of theirs; test_errors.py holds the refusal itself."""
    try:
        return (yield)
    except TypeError as error:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("backend") == "triton" and "got torch.float64; pass backend=" in str(error):
            pytest.skip("float64: the Triton kernels have none")
        raise


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        _did_not_run[report.longrepr[2].removeprefix("Skipped: ")] += 1


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _did_not_run[f"all of {report.nodeid}: " + report.longrepr[2].removeprefix("Skipped: ")] += 1


def pytest_deselected(items: list[pytest.Item]) -> None:
    _did_not_run["deselected on the command line (-m, -k or --deselect)"] += len(items)


def pytest_terminal_summary(terminalreporter) -> None:
    if not _did_not_run:
        terminalreporter.write_line("Every collected test ran.")
    for reason, count in sorted(_did_not_run.items()):
        if not count:
            continue
        terminalreporter.write_line(f"DID NOT RUN: {count} x {reason}")


@pytest.fixture(params=["reference", "cpp", pytest.param("triton", marks=pytest.mark.interpret)])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on this machine's CPU. A missing extension is an error, never a skip."""
    return request.param


@pytest.fixture(params=[False, True], ids=["fp32 products", "bf16 products"])
def bf16_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on a CPU without and with bf16 products in hardware: either must be tested on any machine."""
    monkeypatch.setattr("kd_kernels.heads.has_native_bf16_products", lambda: request.param)
    return request.param


@pytest.fixture
def unpoisoned() -> None:
    """Asked for by tests whose tracing must not see the patched allocators (torch.compile)."""


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def _poisoning(allocate):
    def poisoned(*args, **kwargs):
        made = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "kd_kernels":
            made.fill_(_poison(made.dtype))
        return made

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library allocates and does not write is NaN (or the least integer), so that a result shows it."""
    if "unpoisoned" in request.fixturenames:
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))
