"""Fixtures that every test has, and the closing lines that say what did not run."""

from __future__ import annotations

import collections
import os
import sys
import zlib
from pathlib import Path

# Read when OpenMP starts, so before torch is imported: threads that spin while they wait slow a shared machine by ten,
# and the workers of pytest-xdist are one a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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

# Skipped tests are counted where they are reported: with pytest-xdist, in the process that starts the workers. What was
# left out when tests were collected is known to the workers, and the same for each of them.
_skipped: collections.Counter[str] = collections.Counter()
_not_collected: collections.Counter[str] = collections.Counter()


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
    _not_collected[
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
        _skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _not_collected[f"all of {report.nodeid}: " + report.longrepr[2].removeprefix("Skipped: ")] += 1


def pytest_deselected(items: list[pytest.Item]) -> None:
    _not_collected["deselected on the command line (-m, -k or --deselect)"] += len(items)


def pytest_sessionstart() -> None:
    """A pytest that a test starts is no worker of xdist, though its environment would say so."""
    os.environ.pop("PYTEST_XDIST_WORKER", None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_collected"] = dict(_not_collected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """A worker of pytest-xdist is done, or died (then it has nothing to tell, and the run fails)."""
    told = getattr(node, "workeroutput", {}).get("not_collected")
    if told is not None:  # the last worker's word; this process has counted modules alone
        _not_collected.clear()
        _not_collected.update(told)


def pytest_terminal_summary(terminalreporter) -> None:
    did_not_run = _skipped + _not_collected
    if not did_not_run:
        terminalreporter.write_line("Every collected test ran.")
    for reason, count in sorted(did_not_run.items()):
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


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a seed of its own depends neither on the tests before it nor on who ran them."""
    torch.manual_seed(0)


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
