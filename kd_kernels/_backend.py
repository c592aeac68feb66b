"""Which implementation runs: chosen by the tensors' device, or the one that the caller named. Never another one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch

from kd_kernels import _check

BACKENDS = ("reference", "cpp", "triton", "cuda")


@functools.lru_cache(maxsize=None)
def extension() -> ModuleType:
    """The compiled extension ``kd_kernels._C``.

    Raises:
        RuntimeError: it was not built.
    """
    try:
        return importlib.import_module("kd_kernels._C")
    except ImportError as error:
        raise RuntimeError(
            'kd_kernels: backend "cpp" must be built, got no extension kd_kernels._C '
            f'({error}); install a C++ compiler and reinstall kd-kernels, or pass backend="reference"'
        ) from error


@functools.lru_cache(maxsize=None)
def _say_once_if_not_built() -> None:
    if importlib.util.find_spec("kd_kernels._C") is None:
        warnings.warn(
            "kd_kernels: the CPU kernels are not built (was there a C++ compiler when it was installed?); "
            'running backend="reference", as asked: slower, and with more memory',
            stacklevel=4,
        )


def choose(where: str, backend: str | None, device: torch.device, built: tuple[str, ...]) -> str:
    """The backend for tensors on ``device``: ``backend`` if it is named, else "cpp" on the CPU and "triton" on a GPU.

    Args:
        built: the backends that the calling verb has.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend does not exist for this verb, or not for this device.
    """
    on_cpu = device.type == "cpu"
    name = ("cpp" if on_cpu else "triton") if backend is None else _check.one_of(where, "backend", backend, BACKENDS)
    if name not in built:
        raise RuntimeError(
            _check.complaint(
                where, "backend", "one that this version has: " + ", ".join(built), f'"{name}" for a tensor on {device}',
                'pass backend="reference", which runs on every device',
            )
        )
    if name != "reference" and (name == "cpp") != on_cpu:
        raise RuntimeError(_check.complaint(where, "backend", f"one for tensors on {device}", f'"{name}"'))
    if on_cpu and not torch.compiler.is_compiling():  # a compiled graph finds out when the op runs
        extension() if name == "cpp" else _say_once_if_not_built()
    return name
