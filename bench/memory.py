"""Peak memory of one call, less the gradients that it was asked for.

On a GPU torch's allocator knows. On a CPU a process of its own measures: ``python -m bench.memory '{...}'`` prints a
line of JSON for every shape; :func:`measure` calls it. Method: the inputs are built, the call runs once on 64 rows (the
result is compared with float64, and code and thread pools are loaded), what that freed is handed back to the system
(``malloc_trim``). Then the kernel's high-water mark of resident memory is reset (``5`` into ``/proc/self/clear_refs``),
resident memory is read (VmRSS), the call runs on all rows, and the mark is read (VmHWM). The difference, less the
gradients, is the scratch. Linux only. A limit on the process's memory turns what does not fit into an error instead of
swapping.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from bench import contenders, inputs
from bench.cases import CASES, Call
from bench.devices import CUDA
from bench.inputs import Inputs, Shape

WARM_UP_ROWS = 64
RESERVED_BYTES = 2 << 30
"""Left to the rest of the machine."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One contender, on one shape after another."""

    case: str
    contender: str
    divergence: str | None
    dtype: str
    shapes: tuple[Shape, ...]
    budgets: tuple[int | None, ...]
    """As many as shapes: the bound on the scratch of ours."""


def _scratch(peak: dict[str, int], made: Inputs) -> dict[str, int]:
    """A peak with the gradients in it told apart."""
    grown = (x.grad for x in (made.student_hidden, made.student_weight))
    gradients = sum(x.nbytes for x in grown if x is not None)
    return peak | {"gradient_bytes": gradients, "scratch_bytes": peak["peak_bytes"] - gradients}


def on_gpu(device: CUDA, call: Call, made: Inputs) -> dict[str, int]:
    """Bytes: ``peak`` above the level before the call, ``gradients`` of it, the rest, ``scratch``, and ``reserved``."""
    made.clear_gradients()
    return _scratch(device.peak(call), made)


def _field(path: str, name: str) -> int:
    """Bytes, from a line ``name: 123 kB``."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def _peak(asked: Request, shape: Shape, budget: int | None) -> dict[str, int]:
    """Of one call in this process."""
    made = inputs.build(shape, getattr(torch, asked.dtype))
    call_on = lambda given: contenders.prepare(  # noqa: E731
        asked.case, asked.contender, given, asked.divergence, budget
    )
    few = made.first(WARM_UP_ROWS)
    result = call_on(few)()
    if asked.contender == contenders.OURS:
        named = {} if asked.divergence is None else {"divergence": asked.divergence}
        CASES[asked.case].verify(few, result, **named)
    call = call_on(made)
    del few, result
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

    Path("/proc/self/clear_refs").write_text("5")
    before = _field("/proc/self/status", "VmRSS")
    call()
    return _scratch({"peak_bytes": _field("/proc/self/status", "VmHWM") - before}, made)


def _answer(asked: Request) -> None:
    available = _field("/proc/meminfo", "MemAvailable") - RESERVED_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (available, available))
    for shape, budget in zip(asked.shapes, asked.budgets, strict=True):
        print(json.dumps(_peak(asked, shape, budget)), flush=True)


def measure(asked: Request) -> list[dict[str, object]]:
    """Bytes for every shape, in a fresh process; ``{"skipped": reason}`` from where on it cannot run here.

    Raises:
        RuntimeError: this library's own call failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(dataclasses.asdict(asked))], capture_output=True, text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    measured = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"peak_bytes"')]
    if done.returncode == 0:
        return measured
    reason = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
    if asked.contender == contenders.OURS:
        raise RuntimeError(f"bench.memory: {reason}")
    skipped = {"skipped": reason.removeprefix("bench.peers.Unavailable: ")}
    return measured + [skipped] * (len(asked.shapes) - len(measured))


def _parsed(text: str) -> Request:
    fields = json.loads(text)
    shapes = tuple(Shape(**shape) for shape in fields["shapes"])
    return Request(**fields | {"shapes": shapes, "budgets": tuple(fields["budgets"])})


if __name__ == "__main__":
    _answer(_parsed(sys.argv[1]))
