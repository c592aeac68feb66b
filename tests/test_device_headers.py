"""The CUDA sources, and what the headers have for devices, compile for NVIDIA's without spilling a register."""

from __future__ import annotations

import shutil

import pytest

from kd_kernels import aot, divergences


@pytest.mark.parametrize("architecture", aot.NVCC_ARCHITECTURES)
def test_cuda_compiles_without_spills(architecture):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    found = aot.compile_cuda(architecture)
    assert len([each for each in found if each.kernel == "formulas.cu"]) == len(divergences.FORMULAS)
    assert {"philox.cu", "row_decoder.cu"} <= {each.kernel for each in found}
    wrong = aot.offences(found)
    assert not wrong, "\n".join(wrong)
