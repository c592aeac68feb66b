"""What a step costs by where its texts come from: the data, the student now, the student earlier.

    python -m bench.on_policy --out bench/results/cpu_on_policy.json       some four minutes on two cores

SmolLM2-135M is the teacher, ten of its layers the student, introductions of Wikipedia's articles the text: 16 tokens
of prompt and up to 48 more. Each run is `kdk train` by name; a step's seconds are those of its line in metrics.jsonl
(writing, teacher, student, optimiser). The first two steps of a run are left out; the median of each origin is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from bench import machine
from kd_trainer import assets
from kd_trainer.config import Config, from_tree
from kd_trainer.trainer import train

WARM_UP = 2
SKEWED = {"divergence": "skew_reverse_kl(alpha=0.1)"}
HALF = {"threshold": 1.0, "raise_by": 0.0, "fresh": "constant", "capacity": 12}
"""A schedule that writes and replays in turn, and never reads the data."""
RUNS: dict[str, dict] = {
    "sft": {"method": "sft"},
    "kd": {"method": "kd", "objective": SKEWED},
    "gkd": {"method": "gkd", "objective": SKEWED, "options": {"student": 1.0}},
    "distillm": {"method": "distillm", "options": HALF},
    "distillm, teacher reads again": {"method": "distillm", "options": HALF | {"replay_k": 0}},
}


def seconds_of_steps(name: str, steps: int, out: Path) -> dict[str, list[float]]:
    """Of each step after the first ones, by its origin."""
    run = RUNS[name]
    train(from_tree(Config, {
        "out": str(out), "teacher": {"model": assets.SMOLLM2}, "student": {"layers": list(range(0, 30, 3))},
        "data": {"source": assets.WIKI_INTROS, "limit": 400, "max_length": 64},
        "rollout": {"prompt_tokens": 16, "max_new_tokens": 48}, "optim": {"lr": 1e-4},
        "train": {"steps": steps, "batch_tokens": 4 * 64, "tensorboard": False},
    } | run))
    found: dict[str, list[float]] = defaultdict(list)
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()[WARM_UP:]):
        own = "written" if run["method"] == "gkd" else "text"
        origin = next((origin for origin in ("written", "replayed") if line.get(origin)), own)
        found[origin].append(line["tokens"] / line["tokens_per_s"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--steps", type=int, default=8, help="of every run (%(default)s)")
    arguments = parser.parse_args()
    results: dict[str, dict] = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            steps = seconds_of_steps(name, arguments.steps, Path(folder) / "run")
        results[name] = {
            origin: {"steps": len(seconds), "median_s": round(statistics.median(seconds), 3)}
            for origin, seconds in steps.items()
        }
        print(name, results[name], flush=True)
    base = results["sft"]["text"]["median_s"]
    for origins in results.values():
        for origin in origins.values():
            origin["of_sft"] = round(origin["median_s"] / base, 2)
    made = {"machine": machine.describe(), "made": machine.moment(), "runs": results}
    arguments.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
