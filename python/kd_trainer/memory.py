"""Whether a model fits, before it is loaded: a process that is killed for its memory says nothing of options."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from kd_trainer.errors import fail

GIB = 2**30


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device; None where the system does not say (no Linux)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_value(Path("/proc/meminfo"), "MemAvailable:", 1024)]
    group = Path("/sys/fs/cgroup")
    limit, used = (_value(group / f"memory.{name}") for name in ("max", "current"))
    reclaimable = _value(group / "memory.stat", "inactive_file")
    if None not in (limit, used):
        free.append(limit - used + (reclaimable or 0))
    known = [value for value in free if value is not None]
    return min(known) if known else None


def _value(file: Path, name: str | None = None, unit: int = 1) -> int | None:
    """The number in a file, or on its line that begins with a name; None where there is none."""
    try:
        words = file.read_text().split()
    except OSError:
        return None
    word = words[words.index(name) + 1] if name in words else words[0] if name is None and words else ""
    return int(word) * unit if word.isdigit() else None


def weight_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Of all parameters of a causal language model, tied ones once; nothing is allocated."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # initialising nothing draws all the same
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def check_fits(where: str, option: str, name: str, needed: int, device: torch.device, remedy: str) -> None:
    """Raise where ``needed`` bytes of weights are more than is free on a device.

    Raises:
        ValueError: it names the option, both sizes and the remedy.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        requirement = f"a model that fits into the {free / GIB:.2f} GiB that are free on {device}"
        fail(where, option, requirement, f"{name!r} with weights of {needed / GIB:.2f} GiB", remedy)
