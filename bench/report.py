"""What the results say, in lines for a terminal: ``python -m bench.report FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

MIB = 2**20


def _of_contender(name: str, result: dict) -> str:
    if "skipped" in result and "p50_ms" not in result:
        return f"  {name:28} skipped: {result['skipped']}"
    parts = []
    if "p50_ms" in result:
        parts.append(f"{result['p50_ms']:10.2f} ms {result['ratio']:7.2f} (minima {result['ratio_of_minima']:.2f})")
    if "scratch_bytes" in result:
        parts.append(f"{result['scratch_bytes'] / MIB:9.1f} MiB of scratch")
    if "launches" in result:
        parts.append(f"{result['launches']} launches, {result['host_syncs']} syncs")
    if errors := result.get("errors"):
        worst = max(max(by_name.values()) for by_name in errors.values())
        parts.append(f"error {worst:.1e}")
    return f"  {name:28} " + "; ".join(parts)


def of_comparison(name: str, record: dict) -> list[str]:
    """A heading and a line for every contender; of a sweep, for every point."""
    if record["kind"] == "sweep":
        found = [f"{name}: {record['case']} over {record['over']} ({record.get('took_s', 0):.0f} s)"]
        for value, point in zip(record["values"], record["points"]):
            found += [f" {record['over']} = {value}"]
            found += [_of_contender(who, result) for who, result in point["contenders"].items()]
        return found
    shape = "x".join(str(x) for x in record["shape"].values())
    about = f"{record['case']} {record['divergence'] or ''} {record['dtype']} {shape}"
    return [f"{name}: {about} ({record.get('took_s', 0):.0f} s)"] + [
        _of_contender(who, result) for who, result in record["contenders"].items()
    ]


def lines(content: dict) -> list[str]:
    """Everything in a file, with the machine first and what failed last."""
    on = content["machine"]
    found = [f"{on['model']}, torch {on['torch']}"]
    if bounds := content.get("ceilings"):
        found.append(
            f"copy {bounds['copy_bytes_per_s'] / 1e9:.0f} GB/s, {bounds['product']} product "
            f"{bounds['product_flops_per_s'] / 1e12:.2f} TFLOP/s"
        )
    for name, record in content["comparisons"].items():
        found += of_comparison(name, record)
    return found + [f"{name} FAILED: {why}" for name, why in content.get("failed", {}).items()]


if __name__ == "__main__":
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text()))))
