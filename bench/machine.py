"""What a result was measured on, and with what."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from bench.peers import INSTALLED_AS

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
"""Those that decide how fast a matrix product can be. Without the bf16 ones a bf16 product is emulated in fp32."""
CLOCKS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "celsius": "temperature.gpu", "watts": "power.draw"}
"""What nvidia-smi is asked for before every comparison, by the name in the results."""


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor."""
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    return fields


def version(distribution: str) -> str | None:
    """Of an installed distribution; None where it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(*fields: str) -> list[str | None]:
    """Fields of the first GPU; None for all where there is no nvidia-smi or it fails."""
    nothing: list[str | None] = [None] * len(fields)
    if shutil.which("nvidia-smi") is None:
        return nothing
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"],
        capture_output=True, text=True,
    )
    return [field.strip() for field in done.stdout.splitlines()[0].split(",")] if done.returncode == 0 else nothing


def _cpu() -> dict[str, object]:
    cpu = _cpuinfo()
    has = set(cpu.get("flags", "").split())
    return {
        "device": "cpu",
        "model": "{model name} (family {cpu family}, model {model})".format(**cpu),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in has],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _gpu() -> dict[str, object]:
    found = torch.cuda.get_device_properties(0)
    (driver,) = _nvidia_smi("driver_version")
    return {
        "device": "cuda",
        "model": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "cache_bytes": found.L2_cache_size,
        "driver": driver,
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "triton": version("triton"),
    }


def describe(device: str = "cpu") -> dict[str, object]:
    """Device, memory and versions. Two results with equal descriptions may stand in one file."""
    of_device = _gpu() if device == "cuda" else _cpu()
    return of_device | {"python": platform.python_version(), "torch": torch.__version__}


def peers() -> dict[str, str | None]:
    """Versions of the other libraries; None where one is not installed."""
    return {name: version(name) for name in INSTALLED_AS}


def _git(*arguments: str) -> str | None:
    """What git says of the checkout; None where it is a copy without its history."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def moment(device: str = "cpu") -> dict[str, object]:
    """When, from which commit, and in what state: the last minute's load average, a GPU's clocks.

    Of a copy without git the environment's KD_COMMIT says which commit it is; whether it was modified is then unknown.
    """
    status = _git("status", "--porcelain", "--untracked-files=no")
    made = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("KD_COMMIT"),
        "modified": None if status is None else bool(status),
        "load_average": round(os.getloadavg()[0], 2),
    }
    return made | (dict(zip(CLOCKS, _nvidia_smi(*CLOCKS.values()))) if device == "cuda" else {})
