"""Compiles the kernels for the GPUs that they are for, on a machine that has none: ``python -m kd_kernels.aot``.

Of each specialisation that ``launches.py`` finds, and of the CUDA sources where there is an nvcc, it notes registers,
spills, shared memory and the width of loads. A kernel that does not compile, or a register spilled on the main path,
ends it with status 1. Triton's cache is not used: every kernel is compiled anew.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from kd_kernels import launches
from kd_kernels.divergences import triton_terms
from kd_kernels.launches import TARGETS, TERMS_OF, Specialisation

ROOT = Path(__file__).resolve().parent.parent
NVCC_ARCHITECTURES = ("80", "90a", "100")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel for one target.

    Attributes:
        kernel, target: names.
        arguments: what it was specialised on.
        is_main: on the main path.
        registers: of a lane; on AMD those of vectors.
        spilled: bytes of a lane's registers that are kept in memory.
        shared: bytes of a program.
        instructions: in PTX, or in AMD's assembly.
        wide_loads: of those, loads of 16 bytes or more a lane from the device's memory.
        error: why it did not compile, else "".
    """

    kernel: str
    target: str
    arguments: str
    is_main: bool
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instructions: int = 0
    wide_loads: int = 0
    error: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# Triton
# ---------------------------------------------------------------------------------------------------------------------


def _constexpr(detail: Any) -> Any:
    if isinstance(detail, str) and detail.startswith(TERMS_OF):
        return triton_terms(detail.removeprefix(TERMS_OF))
    return detail


def build(each: Specialisation, known: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Triton's compiled kernel. Arguments in ``known`` are compiled in as these values, as if they were constexpr."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = each.kernel.partition(":")
    backend = launches.backend_of(each.target)
    fixed = {a.name: known.get(a.name, _constexpr(a.detail)) for a in each.arguments
             if a.type == "constexpr" or a.name in known}
    source = ASTSource(
        fn=getattr(importlib.import_module(module), name),
        signature={a.name: "constexpr" if a.name in fixed else a.type for a in each.arguments},
        constexprs={(i,): fixed[a.name] for i, a in enumerate(each.arguments) if a.name in fixed},
        attrs={
            (i,): backend.parse_attr(a.detail)
            for i, a in enumerate(each.arguments) if a.name not in fixed and isinstance(a.detail, str)
        },
    )
    return triton.compile(source, target=GPUTarget(*TARGETS[each.target]), options=dict(each.options))


def _compile(each: Specialisation, is_main: bool) -> Compiled:
    log = io.StringIO()
    name = each.kernel.partition(":")[2]
    known = dict(kernel=name, target=each.target, arguments=str(each), is_main=is_main)
    try:
        with contextlib.redirect_stdout(log):  # ptxas writes there what it used
            made = build(each)
    except Exception as error:  # noqa: BLE001 - whatever a compiler throws is a result here
        return Compiled(**known, error=f"{type(error).__name__}: {error}"[:2000])
    numbers = _nvidia(made.asm["ptx"], log.getvalue()) if "ptx" in made.asm else _amd(made.asm["amdgcn"])
    return Compiled(**known, shared=made.metadata.shared, **numbers)


def _nvidia(ptx: str, log: str) -> dict[str, int]:
    (registers,) = re.findall(r"Used (\d+) registers", log)
    (stores,) = re.findall(r"(\d+) bytes spill stores", log)
    return dict(
        registers=int(registers), spilled=int(stores), instructions=len(re.findall(r"^\s.*;$", ptx, re.M)),
        wide_loads=len(re.findall(r"ld\.global[\w.:]*\.(?:v4\.[bfus]32|v2\.[bfus]64|v8\.|v4\.[bfus]64)", ptx)),
    )


def _amd(assembly: str) -> dict[str, int]:
    (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", assembly)
    (frame,) = re.findall(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    (spilled,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    return dict(
        registers=int(registers), spilled=max(int(frame), 4 * int(spilled)),
        instructions=len(re.findall(r"^\t[a-z]\w+(?:\s|$)", assembly, re.M)),
        wide_loads=len(re.findall(r"^\t(?:global|buffer)_load_dwordx4", assembly, re.M)),
    )


def _set_up_worker(cache: str) -> None:
    from triton import knobs

    os.nice(5)
    knobs.cache.dir = cache
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.disable_line_info = True


def compile_all(wanted: Iterable[tuple[Specialisation, bool]], workers: int | None = None) -> list[Compiled]:
    """Compile each specialisation; the flag says whether it is on the main path. In processes of their own."""
    wanted = list(wanted)
    with tempfile.TemporaryDirectory() as cache:
        pool = ProcessPoolExecutor(workers or os.cpu_count(), get_context("spawn"), _set_up_worker, (cache,))
        with pool:
            return list(pool.map(_compile, *zip(*wanted), chunksize=1)) if wanted else []


def main_path(targets: Iterable[str] = TARGETS) -> list[tuple[Specialisation, bool]]:
    """Every launch of the main path for each target."""
    return [(each, True) for target in targets for each in launches.main_path(target)]


def rest(targets: Iterable[str] = TARGETS) -> list[tuple[Specialisation, bool]]:
    """Every pair of values of the axes, for each target."""
    return [(each, False) for target in targets for each in launches.rest(target)]


def in_turn(targets: Iterable[str] = TARGETS, together: int = 1) -> list[tuple[Specialisation, bool]]:
    """Launches beside the main path, each for one target, that show every value (``together=1``) or every pair (2)."""
    n = len(list(targets))
    return [
        (each, False)
        for turn, target in enumerate(targets)
        for i, each in enumerate(launches.rest(target, together)) if i % n == turn
    ]


def main_path_in_turn() -> list[tuple[Specialisation, bool]]:
    """Every launch of the main path for one target. Turns move on by one a formula, so that each formula meets each."""
    n = len(TARGETS)
    return [
        (each, True)
        for turn, target in enumerate(TARGETS)
        for i, each in enumerate(launches.main_path(target)) if (i + i // n) % n == turn
    ]


# ---------------------------------------------------------------------------------------------------------------------
# CUDA C++
# ---------------------------------------------------------------------------------------------------------------------

FORMULA_KERNELS = """
#include <cmath>
#define KD_ISA device
namespace kd { namespace device {
using ::exp; using ::log; using ::abs;
template <class T> __device__ T exp_fall(T x) { return ::exp(x); }
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
  template __global__ void formula_kernel<kd::device::Formula>( \\
      const float*, const float*, const double*, float*, float*, int);
KD_FOR_EACH_FORMULA(INSTANCE)
"""
"""Kernels that do nothing but call a formula of the generated header."""

PHILOX_KERNEL = """
#include "kd/philox.h"
// seeds, keys: [n] 64 bits; positions: [n]; uniforms: [n, 4], of block i. Moves 52 n bytes.
__global__ void philox_kernel(const uint64_t* seeds, const uint64_t* keys, const uint32_t* positions,
                              double* uniforms, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const kd::Words words = kd::Place{seeds[i], keys[i], positions[i]}.words(kd::kRace, i);
  for (int j = 0; j < 4; ++j) uniforms[4 * i + j] = kd::uniform(words.w[j]);
}
"""
"""The words of the draws on a device."""

ROW_DECODER_KERNEL = """
#include "codec/row_decoder.h"
// One block of the cache a thread. slots: [contexts, kTotal]; payloads, outs, scratches, wrong: [n]; ids of ranks:
// [n, vocab].
__global__ void row_decoder_kernel(kd::RowLayout layout, const kd::Symbol* slots, uint32_t* id_of_rank,
                                   const kd::Span* payloads, const kd::RowsOut* outs, kd::RowScratch* scratches,
                                   kd::Complaint* wrong, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint32_t* ids = id_of_rank + static_cast<size_t>(i) * layout.vocab;
  wrong[i] = kd::RowDecoder(layout, slots, ids, outs[i], scratches[i]).decode(payloads[i]);
}
"""
"""The decoder of the cache on a device."""

HEADER_KERNELS = {"formulas.cu": FORMULA_KERNELS, "philox.cu": PHILOX_KERNEL, "row_decoder.cu": ROW_DECODER_KERNEL}


def compile_cuda(architecture: str) -> list[Compiled]:
    """Device code of the headers and every source in csrc/cuda, by nvcc, for "80", "90a" or "100": one entry a kernel.

    Raises:
        FileNotFoundError: nvcc is not installed.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("compile_cuda: nvcc must be on the PATH, got none")
    with tempfile.TemporaryDirectory() as folder:
        sources = [Path(folder) / name for name in HEADER_KERNELS]
        for source in sources:
            source.write_text(HEADER_KERNELS[source.name])
        sources += sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        return [each for source in sources for each in _compile_source(nvcc, source, architecture)]


def _compile_source(nvcc: str, source: Path, architecture: str) -> list[Compiled]:
    target = f"sm_{architecture}"
    command = [
        nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{architecture},code={target}", "-Xptxas", "-v", "-cubin",
        f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}", str(source), "-o", os.devnull,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [Compiled(source.name, target, "", True, error=done.stderr[:2000])]
    found = []
    for log in done.stderr.split("Compiling entry function")[1:]:
        mangled = re.findall(r"'(\w+)'", log)[0]
        (registers,) = re.findall(r"Used (\d+) registers", log)
        (spilled,) = re.findall(r"(\d+) bytes spill stores", log)
        shared = sum(map(int, re.findall(r"(\d+) bytes smem", log)))  # said only where there is some
        numbers = dict(registers=int(registers), spilled=int(spilled), shared=shared)
        found.append(Compiled(source.name, target, mangled, is_main=True, **numbers))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def offences(found: Iterable[Compiled]) -> list[str]:
    """What must not be: kernels that did not compile, and spills on the main path."""
    wrong = [each for each in found if each.error or (each.is_main and each.spilled)]
    return [f"{each.target}: {each.arguments}\n    {each.error or f'spills {each.spilled} bytes'}" for each in wrong]


def table(found: list[Compiled]) -> str:
    """A line a kernel and target, in Markdown."""
    span = lambda values: " to ".join(map(str, sorted({min(values), max(values)})))  # noqa: E731
    lines = [
        "| kernel | target | compiled | registers | spilled, bytes | shared memory, bytes | 16-byte loads |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    key = lambda each: (not each.is_main, each.kernel, list_of_targets.index(each.target))  # noqa: E731
    list_of_targets = list(dict.fromkeys(each.target for each in found))
    for (is_rest, kernel, target), group in itertools.groupby(sorted(found, key=key), key):
        each = [compiled for compiled in group if not compiled.error]
        if each:
            fields = ("registers", "spilled", "shared", "wide_loads")
            spans = [span([getattr(compiled, field) for compiled in each]) for field in fields]
            name = f"`{kernel}`" + (", rest" if is_rest else "")
            lines.append("| " + " | ".join([name, list_of_targets[target], str(len(each)), *spans]) + " |")
    return "\n".join(lines)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions() -> dict[str, str]:
    """Of the compilers, and the commit that was compiled ("+" where files differ from it)."""
    import triton
    from triton import knobs

    release = lambda tool: (re.findall(r"release ([\d.]+)", _output(tool, "--version")) or [""])[0]  # noqa: E731
    is_changed = bool(_output("git", "status", "--short", "kd_kernels"))
    return {
        "torch": torch.__version__, "triton": triton.__version__, "ptxas": release(knobs.nvidia.ptxas.path),
        "ptxas for sm_100": release(knobs.nvidia.ptxas_blackwell.path), "nvcc": release("nvcc"),
        "commit": _output("git", "rev-parse", "--short", "HEAD") + "+" * is_changed,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kd_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write every kernel's numbers there, as JSON")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPUs to compile for")
    parser.add_argument(
        "--rest", choices=("every", "turn", "none"), default="every",
        help="launches beside those that most users meet: each for every target, for one of all in turn, or left out",
    )
    parser.add_argument("--workers", type=int, help="processes; default: one a core")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    wanted = main_path(options.targets)
    if options.rest != "none":
        wanted += rest(options.targets) if options.rest == "every" else in_turn(options.targets, together=2)
    print(f"{len(wanted)} kernels to compile", file=sys.stderr)
    found = compile_all(wanted, options.workers)
    if shutil.which("nvcc"):
        for name in NVCC_ARCHITECTURES:
            found += compile_cuda(name) if f"sm_{name}".rstrip("a") in options.targets else []
    print(table(found))
    if options.out is not None:
        record = {"versions": versions(), "seconds": round(time.perf_counter() - started)}
        rows = ",\n".join(json.dumps(asdict(each)) for each in found)  # a line each
        options.out.write_text(json.dumps(record)[:-1] + ',\n"kernels": [\n' + rows + "\n]}\n")
    wrong = offences(found)
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
