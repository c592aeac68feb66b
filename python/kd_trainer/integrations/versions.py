"""The versions that the integrations were tested with. Others are refused: what a trainer calls internally changes with
them."""

from __future__ import annotations

import importlib.metadata

import torch

from kd_trainer.errors import complaint

TESTED = {
    "transformers": ("5.23",), "accelerate": ("1.15",), "peft": ("0.21",), "trl": ("1.16",), "liger-kernel": ("0.8",),
    "torchtune": ("0.6",), "lightning": ("2.6",),
}
"""Of each package the ``major.minor`` that the tests passed with; the extra ``integrations`` pins one of each."""

OLDEST_TORCH = "2.11"
"""The library's own lower bound. torch has no upper one: its losses' signatures are public, nothing else is used."""


def check_versions(where: str, *packages: str, required: bool = True) -> None:
    """Raise where another ``major.minor`` of a package is installed than one of :data:`TESTED`.

    Args:
        required: False for a module that only takes over the package's signatures: then it may be missing.

    Raises:
        RuntimeError: another version, or none though one is required.
    """
    for package in packages:
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if not required:
                continue
            found = "none"
        tested = TESTED[package]
        if ".".join(found.split(".")[:2]) not in tested:
            wanted = " or ".join(f"{version}.*" for version in tested)
            remedy = f'run: pip install "{package}=={tested[-1]}.*"'
            raise RuntimeError(complaint(where, package, wanted, found, remedy))


def check_torch(where: str) -> None:
    """Raise RuntimeError where torch is older than :data:`OLDEST_TORCH`."""
    if torch.__version__ < OLDEST_TORCH:  # torch's own type of version, which compares numbers
        remedy = f'run: pip install "torch>={OLDEST_TORCH}"'
        raise RuntimeError(complaint(where, "torch", f"{OLDEST_TORCH} or newer", torch.__version__, remedy))
