"""Which backend runs, and what is said when the one that was meant is not there."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kd_kernels import kd_loss

Z = torch.zeros(2, 5)


@pytest.mark.parametrize("name, error, message", [
    ("fast", ValueError, "kd_loss: backend must be one of reference, cpp, triton, got 'fast'"),
])  # fmt: skip
def test_a_backend_that_is_not_there_is_refused(name, error, message):
    with pytest.raises(error, match=message):
        kd_loss(Z, Z, backend=name)


def test_cpp_refuses_a_tensor_on_another_device():
    z = torch.zeros(2, 5, device="meta")
    with pytest.raises(RuntimeError, match='backend must be one for tensors on meta, got "cpp"'):
        kd_loss(z, z, backend="cpp")


WITHOUT_EXTENSION = """
import importlib.abc, sys, warnings
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "kd_kernels._C":
            raise ModuleNotFoundError("No module named 'kd_kernels._C'")
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "kd_kernels._C" else find(name, package)
sys.meta_path.insert(0, Missing())
import torch
from kd_kernels import kd_loss
z = torch.randn(3, 7)
try:
    kd_loss(z, z)
except RuntimeError as error:
    print("REFUSED", error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        print("LOSS", kd_loss(z, z, backend="reference").loss.item())
print("WARNED", len(caught), caught[0].message)
"""


def test_without_the_extension_nothing_falls_back_in_silence():
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, check=True)
    refused, *losses, warned = done.stdout.splitlines()
    assert 'backend "cpp" must be built' in refused and 'pass backend="reference"' in refused
    assert len(losses) == 3 and warned.startswith("WARNED 1 ") and "not built" in warned
