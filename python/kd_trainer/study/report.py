"""A study's results as a table, a picture and one JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kd_trainer.files import new_file
from kd_trainer.plot import BLUE, GREY, ORANGE, figure_of, save_figure
from kd_trainer.study.lineup import ENTRIES

COLUMNS = {
    "exact": ("exact match", "{:.1%}"), "execution": ("execution", "{:.1%}"), "forward_kl": ("KL(p||q)", "{:.3f}"),
    "reverse_kl": ("KL(q||p)", "{:.3f}"), "agreement": ("agreement", "{:.1%}"), "excess_error": ("ExAccErr", "{:.0f}%"),
}
"""Of a run: what it is called and how it is written; p is the teacher."""


def collect(out: Path) -> dict[str, object]:
    """The results in a study's folder: ``{"teacher", "start", "runs": [...], "latency"}``, as far as they are there."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted((out / "results").glob("*.json"))}
    order = list(ENTRIES)
    runs = [result for result in found.values() if "seed" in result]
    runs.sort(key=lambda result: (order.index(result["method"]), result["seed"]))
    single = {name: found[name] for name in ("teacher", "start", "latency") if name in found}
    return single | {"runs": runs}


def summary(result: Mapping) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Of each method, each quantity's mean over seeds and its standard deviation (None of one seed)."""
    by_method: dict[str, list[Mapping]] = {}
    for run in result["runs"]:
        by_method.setdefault(run["method"], []).append(run)
    return {
        name: {key: _spread([run[key] for run in runs]) for key in (*COLUMNS, "tokens_per_s", "peak_bytes")}
        for name, runs in by_method.items()
    }


def _spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    if None in values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def table(result: Mapping) -> str:
    """Markdown: a row a method, after the teacher and the student that all began with."""
    header = [*(title.replace("|", r"\|") for title, _ in COLUMNS.values()), "latency / SFT", "tokens/s", "peak memory"]
    lines = [["", *header], ["---", *["---:"] * len(header)]]
    for name, label in (("teacher", "teacher"), ("start", "start of all students")):
        if name in result:
            lines.append([label, *(_number(key, (result[name].get(key), None)) for key in COLUMNS), "", "", ""])
    steps = result.get("latency", {}).get("steps", {})
    for name, values in summary(result).items():
        relative = f"{steps[name]['relative']:.2f}" if name in steps else ""
        speed, peak = values["tokens_per_s"][0], values["peak_bytes"][0]
        cells = [_number(key, values[key]) for key in COLUMNS]
        memory = "" if peak is None else f"{peak / 2**20:.0f} MiB"
        lines.append([ENTRIES[name].label, *cells, relative, f"{speed:.0f}", memory])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(key: str, value: tuple[float | None, float | None]) -> str:
    form, (mean, deviation) = COLUMNS[key][1], value
    if mean is None:
        return ""
    return form.format(mean) + ("" if deviation is None else f" ± {form.format(deviation)}")


def write(result: Mapping, file: Path) -> None:
    """The JSON, and the picture beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as handle:
        json.dump(result, handle, indent=1)
    if result["runs"]:
        plot(result, file.with_suffix(".png"))


def plot(result: Mapping, png: Path) -> None:
    """Execution accuracy, KL from the teacher and latency of each method; dots are seeds, lines the student's start."""
    found = summary(result)
    labels = [ENTRIES[name].label for name in found]
    steps = result.get("latency", {}).get("steps", {})
    figure, axes = figure_of(3, height=0.32 * len(found) + 1.2)
    for axis, key, title in (
        (axes[0], "execution", "execution accuracy"), (axes[1], "forward_kl", "KL(p||q), nats a token"),
        (axes[2], None, "seconds of a step, SFT's = 1"),
    ):
        bars = [found[name][key][0] if key else steps.get(name, {}).get("relative", 0.0) for name in found]
        axis.barh(labels, bars, color=BLUE, height=0.6)
        if key:
            for run in result["runs"]:
                axis.plot(run[key], ENTRIES[run["method"]].label, ".", color=ORANGE)
            if "start" in result:
                axis.axvline(result["start"][key], color=GREY, linewidth=1.0)
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(axis="x", color="#e0e0e0", linewidth=0.6)
        axis.grid(visible=False, axis="y")
        axis.invert_yaxis()
        if axis is not axes[0]:
            axis.set_yticklabels([])
    save_figure(figure, png)
