"""Ours, plain torch and other libraries on the same inputs, in alternation, as ratios to the bare matrix products.

    python -m bench.side_by_side --out bench/results/cpu_side_by_side.json [--only NAME ...] [--seconds 90]

Every comparison first checks our result against float64 and refuses to go on if it is wrong. Then all contenders run
once a round, in an order that rotates; times are quantiles over rounds, ratios are medians of what the rounds give.
With ``--only``, the other comparisons in the file stay as they are; they must come from the same machine.

A bf16 comparison also has the bare products of the same numbers in fp32: on a CPU without bf16 instructions torch
emulates bf16 products, so a ratio to those flatters whoever multiplies in fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import contenders, inputs, machine, memory, timing
from bench.cases import CASES
from bench.contenders import Contender, Unavailable
from bench.inputs import Inputs, Shape

TIMED_AT = 0.1
"""Total variation between student and teacher of the inputs that are timed."""


@dataclass(frozen=True)
class Comparison:
    """One op on one shape in one dtype.

    Attributes:
        target: what the ratio of ours to the bare products should be at most.
        total_variations: the distances between student and teacher at which errors are measured.
    """

    case: str
    mode: str
    divergence: str | None
    dtype: torch.dtype
    shape: Shape
    contenders: dict[str, Contender]
    target: float | None = None
    total_variations: tuple[float, ...] = (TIMED_AT,)

    def record(self) -> dict[str, object]:
        case = CASES[self.case]
        return {
            "kind": "time", "case": self.case, "mode": self.mode, "divergence": self.divergence,
            "dtype": str(self.dtype).removeprefix("torch."), "shape": dataclasses.asdict(self.shape),
            "flops": case.flops(self.mode, self.shape), "bytes": case.bytes(self.mode, self.shape, self.dtype),
            "target": self.target, "logit_std": inputs.LOGIT_STD, "timed_at_total_variation": TIMED_AT,
        }


@dataclass(frozen=True)
class MemoryComparison:
    """Peak memory of one loss under a budget for its scratch."""

    divergence: str
    dtype: torch.dtype
    shape: Shape
    budget_bytes: int
    contenders: tuple[str, ...]

    def record(self) -> dict[str, object]:
        return {
            "kind": "memory", "case": "kd_loss_dense", "mode": "gradient", "divergence": self.divergence,
            "dtype": str(self.dtype).removeprefix("torch."), "shape": dataclasses.asdict(self.shape),
            "budget_bytes": self.budget_bytes, "logits_bytes": 4 * self.shape.rows * self.shape.vocab,
        }


def without(table: dict[str, Contender], *names: str) -> dict[str, Contender]:
    return {name: contender for name, contender in table.items() if name not in names}


FP32, BF16 = torch.float32, torch.bfloat16
SHAPE = Shape(rows=512, vocab=32768, student_hidden=512, teacher_hidden=1024)
TOPK_SHAPE = Shape(rows=256, vocab=49152, student_hidden=64, teacher_hidden=576)
MEMORY_SHAPE = Shape(rows=2048, vocab=151936, student_hidden=512, teacher_hidden=1024)
NEAR = (0.3, 0.1, 0.03)
MEMORY_CONTENDERS = ("kd_kernels", "torch_eager", "trl", "liger_chunked")
ROUNDED = "kd_kernels_rounded_logits"  # says nothing in fp32: there is nothing to round

COMPARISONS: dict[str, Comparison | MemoryComparison] = {
    "dense_fp32": Comparison(
        "kd_loss_dense", "gradient", "jsd(beta=0.5)", FP32, SHAPE, without(contenders.DENSE, ROUNDED), 1.35, NEAR
    ),
    "dense_bf16": Comparison("kd_loss_dense", "gradient", "jsd(beta=0.5)", BF16, SHAPE, contenders.DENSE, 4.0, NEAR),
    "sparse_fp32": Comparison(
        "kd_loss_sparse", "gradient", "forward_kl", FP32, SHAPE, without(contenders.SPARSE, ROUNDED), 1.25, NEAR
    ),
    "sparse_bf16": Comparison("kd_loss_sparse", "gradient", "forward_kl", BF16, SHAPE, contenders.SPARSE, None, NEAR),
    "topk_fp32": Comparison("topk_targets", "targets", None, FP32, TOPK_SHAPE, contenders.TOPK, 1.15),
    "topk_bf16": Comparison("topk_targets", "targets", None, BF16, TOPK_SHAPE, contenders.TOPK),
    "memory_fp32": MemoryComparison("jsd(beta=0.5)", FP32, MEMORY_SHAPE, 128 << 20, MEMORY_CONTENDERS),
    "memory_bf16": MemoryComparison("jsd(beta=0.5)", BF16, MEMORY_SHAPE, 128 << 20, MEMORY_CONTENDERS),
}


@functools.lru_cache(maxsize=3)
def _inputs(shape: Shape, total_variation: float) -> Inputs:
    return inputs.build(shape, torch.float32, total_variation)


def _options(comparison: Comparison) -> dict[str, str]:
    return {} if comparison.divergence is None else {"divergence": comparison.divergence}


def _errors(comparison: Comparison, results: dict[str, dict]) -> None:
    """Every contender's errors at every distance, into ``results``; who cannot run is marked as skipped.

    Raises:
        WrongResult: ours are not what float64 says.
    """
    case = CASES[comparison.case]
    for total_variation in comparison.total_variations:
        made = _inputs(comparison.shape, total_variation).to(comparison.dtype)
        for name, contender in comparison.contenders.items():
            if "skipped" in results[name]:
                continue
            try:
                begin = time.perf_counter()
                result = contender(made, comparison.divergence)()
                results[name].setdefault("first_call_s", time.perf_counter() - begin)
            except Unavailable as reason:
                results[name] = {"skipped": str(reason)}
            else:
                judge = case.verify if name == "kd_kernels" else case.errors
                errors = judge(made, result, **_options(comparison))
                results[name].setdefault("errors", {})[str(total_variation)] = errors


def compare(comparison: Comparison, seconds: float) -> dict[str, object]:
    """The record of a comparison: errors, times and ratios of every contender."""
    case, mode = CASES[comparison.case], comparison.mode
    results: dict[str, dict] = {"products": {}, "products_reused": {}} | {name: {} for name in comparison.contenders}
    _errors(comparison, results)

    made = _inputs(comparison.shape, TIMED_AT).to(comparison.dtype)
    runs = {"products": case.floor(mode, made), "products_reused": case.floor(mode, made, reuse=True)}
    if comparison.dtype != FP32:
        runs["products_fp32"] = case.floor(mode, made.to(FP32))
        results["products_fp32"] = {}
    for name, contender in comparison.contenders.items():
        if "skipped" not in results[name]:
            runs[name] = contender(made, comparison.divergence)
    times = timing.interleaved(runs, seconds=seconds, before_each=made.clear_gradients)

    floor, floor_fp32 = times["products"], times.get("products_fp32", times["products"])
    for name, measured in times.items():
        results[name] |= timing.summary(measured) | {
            "ratio": timing.ratio(measured, floor), "ratio_of_minima": min(measured) / min(floor),
            "ratio_to_fp32_products": timing.ratio(measured, floor_fp32),
        }
    return comparison.record() | {"rounds": len(floor), "contenders": results}


def compare_memory(comparison: MemoryComparison) -> dict[str, object]:
    """The record of a memory comparison, one process a contender."""
    dtype = str(comparison.dtype).removeprefix("torch.")
    results = {
        name: memory.measure(name, comparison.divergence, dtype, comparison.shape, comparison.budget_bytes)
        for name in comparison.contenders
    }
    return comparison.record() | {"contenders": results}


def run(name: str, comparison: Comparison | MemoryComparison, seconds: float) -> dict[str, object]:
    """The record of one comparison, with when, from what and with whom it was made."""
    circumstances = machine.moment() | {"peers": machine.peers()}
    made = compare_memory(comparison) if isinstance(comparison, MemoryComparison) else compare(comparison, seconds)
    return made | {"measured": circumstances}


def report(name: str, record: dict) -> None:
    """A few lines for whoever waits."""
    print(f"{name}: {record['case']} {record['shape']}")
    for contender, result in record["contenders"].items():
        if "skipped" in result:
            print(f"  {contender:28} skipped: {result['skipped']}")
        elif record["kind"] == "memory":
            scratch, gradients = result["scratch_bytes"] / 2**20, result["gradient_bytes"] / 2**20
            print(f"  {contender:28} {scratch:9.1f} MiB beside {gradients:.1f} MiB of gradients")
        else:
            print(
                f"  {contender:28} {result['p50_ms']:9.1f} ms (min {result['min_ms']:.1f}) {result['ratio']:7.2f} "
                f"(minima {result['ratio_of_minima']:.2f}; fp32 {result['ratio_to_fp32_products']:.2f})"
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written anew after every comparison")
    parser.add_argument("--only", nargs="+", choices=tuple(COMPARISONS), default=list(COMPARISONS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=90.0, help="of rounds, for each comparison of times")
    asked = parser.parse_args(arguments)

    content = {"machine": machine.describe(), "comparisons": {}}
    if asked.out.exists():
        content = json.loads(asked.out.read_text())
        if content["machine"] != machine.describe():
            parser.error(f"--out must be a new file or one of this machine, got {asked.out} of {content['machine']}")
    for name in asked.only:
        record = run(name, COMPARISONS[name], asked.seconds)
        report(name, record)
        content["comparisons"][name] = record
        content["comparisons"] = {n: content["comparisons"][n] for n in COMPARISONS if n in content["comparisons"]}
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
