"""The versions that an integration was tested with. Others are refused: what a trainer calls internally changes with
them."""

from __future__ import annotations

import importlib.metadata

from kd_trainer.errors import complaint


def check_version(where: str, package: str, tested: tuple[str, ...], required: bool = True) -> None:
    """Raise where another ``major.minor`` of a package is installed than one of ``tested``.

    Args:
        required: False for a module that only takes over the package's signatures: then it may be missing.

    Raises:
        RuntimeError: another version, or none though one is required.
    """
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if not required:
            return
        found = "none"
    if ".".join(found.split(".")[:2]) not in tested:
        newest = tested[-1]
        versions = " or ".join(f"{version}.*" for version in tested)
        raise RuntimeError(complaint(where, package, versions, found, f'run: pip install "{package}=={newest}.*"'))
