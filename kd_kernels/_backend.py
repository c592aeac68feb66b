"""Which implementation runs: chosen by the tensors' device, or the one that the caller named. Never another one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch

from kd_kernels import _check

BACKENDS = ("reference", "cpp", "triton")

MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)
MAX_VOCAB = 1 << 24
"""Columns that the Triton kernels take: ids below it are exact in fp32. The counter of the draws names no groups beyond
it."""


@functools.cache
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


@functools.cache
def _say_once_if_not_built() -> None:
    if importlib.util.find_spec("kd_kernels._C") is None:
        warnings.warn(
            "kd_kernels: the CPU kernels are not built (was there a C++ compiler when it was installed?); "
            'running backend="reference", as asked: slower, and with more memory',
            stacklevel=4,
        )


@functools.cache
def _triton() -> ModuleType:
    """Triton, new enough.

    Raises:
        RuntimeError: it is missing or too old; the message says what to install.
    """
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        raise RuntimeError(
            f'kd_kernels: backend "triton" must be installed, got no module triton ({error}); '
            f'pip install "triton>={MIN_TRITON[0]}.{MIN_TRITON[1]}", or pass backend="reference"'
        ) from error
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MIN_TRITON:
        raise RuntimeError(
            f"kd_kernels: triton must be {MIN_TRITON[0]}.{MIN_TRITON[1]} or newer, got {triton.__version__}; "
            f'pip install "triton>={MIN_TRITON[0]}.{MIN_TRITON[1]}", or pass backend="reference"'
        )
    return triton


def interprets() -> bool:
    """Whether Triton's kernels are interpreted, on tensors of the CPU (``TRITON_INTERPRET=1``)."""
    return _triton().knobs.runtime.interpret


@functools.cache
def _check_gpu(where: str, index: int | None) -> None:
    """Raise RuntimeError for an NVIDIA GPU that is too old. (AMD's are refused by Triton where it has no code for
    them.)"""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        raise RuntimeError(
            _check.complaint(
                where, "the GPU", f"of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer",
                f"{capability[0]}.{capability[1]} ({torch.cuda.get_device_name(index)})", 'pass backend="reference"',
            )
        )


def _runs_on(name: str, device: torch.device) -> bool:
    if name == "triton":
        return device.type == "cuda" or (device.type == "cpu" and (torch.compiler.is_compiling() or interprets()))
    return name == "reference" or device.type == "cpu"


def check_triton_takes(where: str, columns: int, *tensors: torch.Tensor) -> None:
    """Raise for what the Triton kernels do not do, before anything is allocated: fp64, and more columns than they can
    count."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        _check.fail_type(
            where, "tensors", 'of dtype float32, bfloat16 or float16 for backend="triton"', torch.float64,
            'pass backend="reference", which computes in float64',
        )
    if columns > MAX_VOCAB:
        _check.fail(where, "the vocabulary", f'at most {MAX_VOCAB} for backend="triton"', columns)


def check_not_capturing(where: str, argument: str, requirement: str, got: object, remedy: str) -> None:
    """Raise while a CUDA graph is being captured: sizes that depend on the data must be read by the host."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            _check.complaint(where, argument, requirement + " while a CUDA graph is captured", got, remedy)
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
                where, "backend", "one that this version has: " + ", ".join(built),
                f'"{name}" for a tensor on {device}', 'pass backend="reference", which runs on every device',
            )
        )
    if not _runs_on(name, device):
        remedy = "move the tensors to a GPU, or pass " if name == "triton" else "pass "
        others = 'backend="cpp" or backend="reference"' if on_cpu else 'backend="reference"'
        raise RuntimeError(
            _check.complaint(where, "backend", f"one for tensors on {device}", f'"{name}"', remedy + others)
        )
    if torch.compiler.is_compiling():  # a compiled graph finds out when the op runs
        return name
    if name == "triton":
        _triton()
        _check_gpu(where, device.index)
    elif on_cpu:
        extension() if name == "cpp" else _say_once_if_not_built()
    return name
