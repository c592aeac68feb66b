"""What a result was measured on, and with what."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
"""Those that decide how fast a matrix product can be. Without the bf16 ones a bf16 product is emulated in fp32."""

PEERS = ("trl", "liger-kernel", "transformers", "triton")


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor."""
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    return fields


def describe() -> dict[str, object]:
    """Processor, memory and versions. Two results with equal descriptions may stand in one file."""
    cpu = _cpuinfo()
    has = set(cpu.get("flags", "").split())
    return {
        "device": "cpu",
        "model": "{model name} (family {cpu family}, model {model})".format(**cpu),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in has],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def peers() -> dict[str, str | None]:
    """Versions of the other libraries; None where one is not installed."""
    versions: dict[str, str | None] = {}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def moment() -> dict[str, object]:
    """When, from which commit, and how busy the machine was: the load average of the last minute."""
    root = Path(__file__).resolve().parent.parent
    git = lambda *arguments: subprocess.run(  # noqa: E731
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        "load_average": round(os.getloadavg()[0], 2),
    }
