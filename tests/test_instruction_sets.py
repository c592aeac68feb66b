"""The build of the CPU kernels for each instruction set that this processor has gives the same results.

KD_ISA is read when the extension is loaded, hence another process for each.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import every_verb
from kd_kernels._backend import extension

KNOWN = ("baseline", "avx2", "avx512")


@functools.cache
def expected() -> dict[str, Tensor]:
    """Of the best that there is, which all other tests run."""
    return every_verb.results()


@pytest.mark.parametrize("isa", KNOWN[:-1])
def test_every_verb(isa: str, tmp_path: Path) -> None:
    if KNOWN.index(isa) >= KNOWN.index(extension().isa):
        pytest.skip(f"{isa}: what all other tests run on this processor, or more than it has")
    command = [sys.executable, every_verb.__file__, tmp_path / "results"]
    subprocess.run(command, env=os.environ | {"KD_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
    found = torch.load(tmp_path / "results", weights_only=True)
    assert found["isa"] == isa and found["results"].keys() == expected().keys()
    for name, value in expected().items():
        if value.is_floating_point():
            where = functools.partial("{}: {}".format, name)
            torch.testing.assert_close(found["results"][name], value, rtol=1e-6, atol=1e-6, equal_nan=True, msg=where)
        else:
            assert torch.equal(found["results"][name], value), name
