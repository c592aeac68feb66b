"""Ours, plain torch and other libraries on the same inputs, in alternation, as ratios to the bare matrix products.

    python -m bench.side_by_side --out bench/results/cpu_side_by_side.json [--only NAME ...] [--seconds 30]
    python -m bench.side_by_side --device cuda --out bench/results/gpu_side_by_side.json

Every comparison first checks our result against float64 and refuses to go on if it is wrong. Then all contenders run
once a round, in an order that rotates; times are quantiles over rounds, ratios are medians of what the rounds give.
The file is written after every comparison. With ``--only``, the other comparisons in it stay as they are; they must
come from the same machine. A comparison that fails is reported, the others go on, and the exit status is 1.

A bf16 comparison on a CPU also has the bare products of the same numbers in fp32: without bf16 instructions torch
emulates bf16 products, so a ratio to those flatters whoever multiplies in fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from bench import ceilings, comparisons, contenders, devices, inputs, launches, machine, memory, report, timing
from bench.cases import CASES
from bench.comparisons import FP32, TIMED_AT, Comparison, Sweep
from bench.contenders import OURS, Unavailable
from bench.devices import CUDA, Device
from bench.inputs import Inputs

SECONDS = {"cpu": 30.0, "cuda": 8.0}
"""Of rounds, for a comparison; the points of a sweep share it."""


def _build(comparison: Comparison, device: Device, total_variation: float = TIMED_AT) -> Inputs:
    device.tidy()
    return inputs.build(comparison.shape, comparison.dtype, device.torch_name, total_variation)


def _options(comparison: Comparison) -> dict[str, str]:
    return {} if comparison.divergence is None else {"divergence": comparison.divergence}


def _attempt(comparison: Comparison, name: str, device: Device, made: Inputs) -> dict[str, object]:
    """Errors and cosines of one contender, and how long its first call took; or why there are none.

    Raises:
        Exception: ours failed, or is not what float64 says. Another library's failure is a result.
    """
    case = CASES[comparison.case]
    try:
        begin = time.perf_counter()
        result = contenders.prepare(comparison.case, name, made, comparison.divergence, comparison.budget_bytes)()
        device.synchronize()
        first_call_s = time.perf_counter() - begin
        verdict = (case.verify if name == OURS else case.judge)(made, result, **_options(comparison))
    except Unavailable as reason:
        return {"skipped": str(reason)}
    except Exception as error:
        if name == OURS:
            raise
        made.clear_gradients()
        device.tidy()
        what = "out of memory" if isinstance(error, torch.OutOfMemoryError) else " ".join(str(error).split())[:200]
        return {"skipped": f"failed: {what or type(error).__name__}"}
    return {"errors": verdict.errors, "cosines": verdict.cosines, "first_call_s": first_call_s}


def _judged(comparison: Comparison, device: Device) -> dict[str, dict]:
    """Every contender's errors at every distance; who cannot run is marked as skipped."""
    results: dict[str, dict] = {name: {} for name in comparison.contenders}
    for total_variation in comparison.total_variations:
        made = _build(comparison, device, total_variation)
        for name, result in results.items():
            if "skipped" in result:
                continue
            found = _attempt(comparison, name, device, made)
            if "skipped" in found:
                results[name] = found
                continue
            result.setdefault("first_call_s", found["first_call_s"])
            for kind in ("errors", "cosines"):
                result.setdefault(kind, {})[str(total_variation)] = found[kind]
    return results


def compare(comparison: Comparison, device: Device, seconds: float) -> dict[str, object]:
    """The record of a comparison: errors, times and ratios of every contender; on a GPU memory and launches too."""
    case, mode = CASES[comparison.case], comparison.mode
    results = _judged(comparison, device)
    made = _build(comparison, device)
    floors = {"products": case.floor(mode, made)}
    if device.name == "cpu":
        floors["products_reused"] = case.floor(mode, made, reuse=True)
        if comparison.dtype != FP32:
            floors["products_fp32"] = case.floor(mode, made.to(FP32))
    calls = {
        name: contenders.prepare(comparison.case, name, made, comparison.divergence, comparison.budget_bytes)
        for name, result in results.items() if "skipped" not in result
    }
    times = timing.interleaved(floors | calls, device, seconds=seconds, before_each=made.clear_gradients)

    results = {name: {} for name in floors} | results
    floor, floor_fp32 = times["products"], times.get("products_fp32", times["products"])
    for name, measured in times.items():
        results[name] |= timing.summary(measured) | {
            "ratio": timing.ratio(measured, floor), "ratio_of_minima": min(measured) / min(floor),
            "ratio_to_fp32_products": timing.ratio(measured, floor_fp32),
        }
    if isinstance(device, CUDA):
        for name, call in calls.items():
            results[name] |= memory.on_gpu(device, call, made) | launches.count(call)
    return comparison.record() | {"rounds": len(floor), "contenders": results}


def compare_memory(points: list[Comparison]) -> list[dict[str, dict]]:
    """Bytes by contender, for points that differ in shape and budget alone, on a CPU: one process a contender."""
    first = points[0]
    found: list[dict[str, dict]] = [{} for _ in points]
    for name in dict.fromkeys(name for point in points for name in point.contenders):
        taking_part = [i for i, point in enumerate(points) if name in point.contenders]
        asked = memory.Request(
            first.case, name, first.divergence, str(first.dtype).removeprefix("torch."),
            tuple(points[i].shape for i in taking_part), tuple(points[i].budget_bytes for i in taking_part),
        )
        for i, measured in zip(taking_part, memory.measure(asked)):
            found[i][name] = measured
    return found


def sweep(asked: Sweep, device: Device, seconds: float) -> dict[str, object]:
    """The record of a sweep: a record of a comparison for every point, with memory on any device."""
    points = asked.points()
    records = [compare(point, device, seconds / len(points)) for point in points]
    if device.name == "cpu":
        ran = [tuple(n for n in p.contenders if "p50_ms" in r["contenders"][n]) for p, r in zip(points, records)]
        points = [dataclasses.replace(point, contenders=names) for point, names in zip(points, ran)]
        for record, measured in zip(records, compare_memory(points)):
            for name, result in measured.items():
                reason = {"memory_skipped": result["skipped"]} if "skipped" in result else result
                record["contenders"][name] |= reason
    return asked.base.record() | {
        "kind": "sweep", "over": asked.over, "values": list(asked.values), "points": records,
    }


def run(asked: Comparison | Sweep, device: Device, seconds: float) -> dict[str, object]:
    """The record of one comparison or sweep, with when, from what and with whom it was made."""
    circumstances = machine.moment(device.name) | {"peers": machine.peers()}
    if isinstance(asked, Sweep):
        made = sweep(asked, device, seconds)
    elif asked.kind == "memory":
        made = asked.record() | {"contenders": compare_memory([asked])[0]}
    else:
        made = compare(asked, device, seconds)
    return made | {"measured": circumstances}


def _content(path: Path, device: Device, tiny: bool) -> dict[str, object]:
    """Of the file as it is, or of a new one.

    Raises:
        ValueError: the file is of another machine.
    """
    content = {"machine": machine.describe(device.name), "comparisons": {}, "failed": {}}
    if path.exists():
        read = json.loads(path.read_text())
        if read["machine"] != content["machine"]:
            raise ValueError(f"--out must be a new file or one of this machine, got {path} of {read['machine']}")
        content |= read
    if "ceilings" not in content:
        content["ceilings"] = ceilings.measure(device, *((0.01, 0.0) if tiny else ()))
    return content


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written anew after every comparison")
    parser.add_argument("--device", choices=tuple(devices.DEVICES), default="cpu")
    parser.add_argument("--plan", choices=tuple(comparisons.PLANS), help="whose comparisons (those of the device)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the comparisons (all)")
    parser.add_argument("--seconds", type=float, help="of rounds, for each comparison of times (30; on a GPU 8)")
    parser.add_argument("--tiny", action="store_true", help="all on tiny shapes: whether it works; times mean nothing")
    asked = parser.parse_args(arguments)
    plan = comparisons.plan(asked.plan or asked.device, asked.tiny)
    unknown = set(asked.only or ()) - set(plan)
    if unknown:
        parser.error(f"--only must be among {', '.join(plan)}, got {', '.join(sorted(unknown))}")
    seconds = SECONDS[asked.device] if asked.seconds is None else asked.seconds
    try:
        device = devices.find(asked.device)
        content = _content(asked.out, device, asked.tiny)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    for name in asked.only or plan:
        begin = time.perf_counter()
        content["comparisons"].pop(name, None)
        content["failed"].pop(name, None)
        try:
            record = run(plan[name], device, seconds)
            content["comparisons"][name] = record | {"took_s": round(time.perf_counter() - begin, 1)}
            print("\n".join(report.of_comparison(name, content["comparisons"][name])), flush=True)
        except Exception as error:
            content["failed"][name] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            print(f"{name} FAILED: {content['failed'][name]}", file=sys.stderr, flush=True)
        content["comparisons"] = {n: content["comparisons"][n] for n in plan if n in content["comparisons"]}
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        written = asked.out.with_suffix(".partial")
        written.write_text(json.dumps(content, indent=1) + "\n")
        written.replace(asked.out)
    return 1 if set(asked.only or plan) & set(content["failed"]) else 0


if __name__ == "__main__":
    sys.exit(main())
