"""The generated formulas compile for NVIDIA devices as they stand, without spilling a register."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNEL = """
#include <cmath>
#define KD_ISA device
namespace kd { namespace device {
using ::exp; using ::log; using ::abs; using ::sqrt;
template <class T> __device__ T splat(double x) { return static_cast<T>(x); }
template <class T> __device__ T where(bool mask, T a, T b) { return mask ? a : b; }
}}
#include "kd/terms.h"
// logp, logq, f, g: [n]. Moves 16 n bytes in fp32.
template <class Formula>
__global__ void formula_kernel(const float* logp, const float* logq, const double* params, float* f, float* g, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) Formula::template terms<float>(logp[i], logq[i], params, f[i], g[i]);
}
#define INSTANCE(Formula) \\
  template __global__ void formula_kernel<kd::device::Formula>(const float*, const float*, const double*, float*, float*, int);
KD_FOR_EACH_FORMULA(INSTANCE)
"""


@pytest.mark.parametrize("arch", ["80", "90a", "100"])
def test_formulas_compile_without_spills(tmp_path, arch):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    source = tmp_path / "formulas.cu"
    source.write_text(KERNEL)
    command = [nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-c",
               f"-I{ROOT}/csrc/include", str(source), "-o", str(tmp_path / "formulas.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
    assert len(spills) == 2 * 12 and not any(spills)
