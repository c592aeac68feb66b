"""Peak memory of one loss with its gradients, measured in a process of its own.

``python -m bench.memory '{"contender": ..., "shape": {...}, ...}'`` prints one line of JSON; :func:`measure` calls it.

Method: the inputs are built, the loss runs once on 64 rows (its result is compared with float64, and code and thread
pools are loaded), what that freed is handed back to the system (``malloc_trim``). Then the kernel's high-water mark of
resident memory is reset (``5`` into ``/proc/self/clear_refs``), resident memory is read (VmRSS), the loss and its
backward run on all rows, and the mark is read (VmHWM). The difference, less the gradients that the caller asked for, is
the scratch. Linux only. A limit on the process's memory turns what does not fit into an error instead of swapping.
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

from bench import contenders, inputs, truth
from bench.cases import CASES
from bench.inputs import Inputs, Shape

WARM_UP_ROWS = 64
RESERVED_BYTES = 2 << 30
"""Left to the rest of the machine."""


def _field(path: str, name: str) -> int:
    """Bytes, from a line ``name: 123 kB``."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def peak(contender: str, divergence: str, dtype: str, shape: Shape, max_scratch_bytes: int) -> dict[str, int]:
    """Bytes: ``peak`` above the level before the call, ``gradients`` of it, and the rest, ``scratch``."""
    available = _field("/proc/meminfo", "MemAvailable") - RESERVED_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (available, available))
    made = inputs.build(shape, getattr(torch, dtype), repeat_rows=True)

    def run_on(given: Inputs) -> contenders.Run:
        if contender == "kd_kernels":
            return contenders.ours_dense(given, divergence, max_scratch_bytes=max_scratch_bytes)
        return contenders.DENSE[contender](given, divergence)

    few = made.first(WARM_UP_ROWS)
    result = run_on(few)()
    if contender == "kd_kernels":
        CASES["kd_loss_dense"].verify(few, result, divergence=divergence)
    truth.dense.cache_clear()
    run = run_on(made)
    del few, result
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

    Path("/proc/self/clear_refs").write_text("5")
    before = _field("/proc/self/status", "VmRSS")
    run()
    above = _field("/proc/self/status", "VmHWM") - before
    gradients = sum(x.grad.nbytes for x in (made.student_hidden, made.student_weight))
    return {"peak_bytes": above, "gradient_bytes": gradients, "scratch_bytes": above - gradients}


def measure(contender: str, divergence: str, dtype: str, shape: Shape, max_scratch_bytes: int) -> dict[str, object]:
    """:func:`peak` in a fresh process; ``{"skipped": reason}`` if it cannot run here.

    Raises:
        RuntimeError: this library's own loss failed.
    """
    request = {
        "contender": contender, "divergence": divergence, "dtype": dtype, "shape": dataclasses.asdict(shape),
        "max_scratch_bytes": max_scratch_bytes,
    }
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(request)], capture_output=True, text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
    if contender == "kd_kernels":
        raise RuntimeError(f"bench.memory: {reason}")
    return {"skipped": reason}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(peak(**asked | {"shape": Shape(**asked["shape"])})))
