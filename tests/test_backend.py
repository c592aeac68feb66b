"""Which backend runs, and what is said when the one that was meant is not there."""

from __future__ import annotations

import os
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


ISA = "import kd_kernels._C as c; print(c.isa)"


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_loss(isa):
    program = (
        "import torch; from kd_kernels import kd_loss; import kd_kernels._C as c; torch.manual_seed(0);"
        "s = torch.randn(5, 1037, requires_grad=True); t = torch.randn(5, 1037) * 3;"
        "l = kd_loss(s, t, 'jsd(beta=0.3)').loss; l.backward();"
        "print(c.isa, l.item(), s.grad.abs().sum().item())"
    )
    best = subprocess.run([sys.executable, "-c", ISA], capture_output=True, text=True, check=True).stdout.strip()
    order = ["baseline", "avx2", "avx512"]
    if order.index(isa) > order.index(best):
        pytest.skip(f"this processor has no {isa}")
    environment = {**os.environ, "KD_ISA": isa}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    used, loss, size = done.stdout.split()
    torch.manual_seed(0)
    s = torch.randn(5, 1037, requires_grad=True)
    expected = kd_loss(s, torch.randn(5, 1037) * 3, "jsd(beta=0.3)", backend="reference").loss
    expected.backward()
    assert used == isa
    assert abs(float(loss) - expected.item()) < 1e-6 * expected.item()
    assert abs(float(size) - s.grad.abs().sum().item()) < 1e-5 * s.grad.abs().sum().item()
