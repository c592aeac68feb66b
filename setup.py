"""Builds ``kd_kernels._C``: C++ for the CPU, and CUDA where nvcc is found. pyproject.toml holds everything else.

The sources in csrc/cpu and the cache's decoder are compiled once for each instruction set, and the extension picks one
when it is loaded, so that one build runs anywhere. No header of torch is used: the build takes seconds and serves every
torch release.

Environment: KD_CPP=0 leaves the extension out; KD_CUDA=0 leaves CUDA out; KD_CUDA_ARCHS lists compute capabilities
("80;90a;100"); CXX and NVCC name the compilers.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
# name, bytes in a vector register, compiler flags. Elsewhere than on x86 the baseline's 16 bytes are NEON or the like.
INSTRUCTION_SETS = [("baseline", 16, "")] + [
    ("avx2", 32, "-mavx2 -mfma -mf16c"),
    ("avx512", 64, "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mf16c"),
] * X86
# No -ffast-math: NaN and inf are part of the contract. Errno and traps are not, and without them loops vectorise.
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Wno-psabi"
)
NVCC_FLAGS = "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -cudart static -Xptxas -v"


def find_nvcc() -> str | None:
    if os.environ.get("KD_CUDA") == "0" or not any((ROOT / "csrc" / "cuda").glob("*.cu")):
        return None
    return shutil.which(os.environ.get("NVCC", "nvcc"))


def ninja_file(output: Path) -> str:
    import pybind11

    cxx = os.environ.get("CXX", "g++")
    python = sysconfig.get_paths()["include"]
    flags = f"{CXX_FLAGS} -I{ROOT}/csrc/include -I{ROOT}/csrc -DKD_X86={int(X86)}"
    lines = [
        "rule cxx", f"  command = {cxx} -MMD -MF $out.d {flags} $more -c $in -o $out", "  depfile = $out.d",
        "  deps = gcc", "rule link", f"  command = {cxx} -shared -fopenmp $in $libraries -o $out",
    ]
    objects = ["binding.o", "codec.o"]
    nvcc = find_nvcc()
    include = f"-I{pybind11.get_include()} -I{python} -DKD_CUDA={int(nvcc is not None)}"
    lines += [f"build binding.o: cxx {ROOT}/csrc/binding.cpp", f"  more = {include}"]
    lines.append(f"build codec.o: cxx {ROOT}/csrc/codec/codec.cpp")
    for source in [ROOT / "csrc" / "codec" / "decode_rows.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]:
        for name, width, isa_flags in INSTRUCTION_SETS:
            objects.append(f"{source.stem}_{name}.o")
            lines += [
                f"build {objects[-1]}: cxx {source}", f"  more = -DKD_ISA={name} -DKD_VECTOR_BYTES={width} {isa_flags}"
            ]
    libraries = ""
    if nvcc:
        archs = os.environ.get("KD_CUDA_ARCHS", "80;90a;100").split(";")
        targets = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
        flags = f"{NVCC_FLAGS} {targets} -I{ROOT}/csrc/include"
        lines += [
            "rule cuda", f"  command = {nvcc} {flags} -MD -MF $out.d -c $in -o $out", "  depfile = $out.d",
            "  deps = gcc",
        ]
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            objects.append(f"{source.stem}_cuda.o")
            lines.append(f"build {objects[-1]}: cuda {source}")
        libraries = f"-L{Path(nvcc).resolve().parent.parent}/lib64 -lcudart_static -ldl -lrt -lpthread"
    lines += [f"build {output}: link {' '.join(objects)}", f"  libraries = {libraries}", f"default {output}"]
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(output))
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        subprocess.run([*ninja, "-C", str(folder)], check=True)


def extensions() -> list[Extension]:
    if os.environ.get("KD_CPP") == "0":
        return []
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("kd-kernels: no C++ compiler found, so the CPU kernels are not built; backend='reference' still works "
              "where it is asked for by name", file=sys.stderr)
        return []
    return [Extension("kd_kernels._C", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
