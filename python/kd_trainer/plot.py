"""Pictures of runs, as PNG."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#7f7f7f"  # told apart by colour-blind readers too
LABELS = {
    "divergence": "divergence from the teacher, nats a token", "next_token_loss": "next-token loss, nats",
    "grad_norm": "gradient norm", "lr": "learning rate",
}


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Columns of a ``metrics.jsonl``."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in (lines[0] if lines else {})}


def plot_run(metrics: Path, png: Path) -> None:
    """Losses, gradient norm and learning rate of one run over its steps."""
    columns = read_metrics(metrics)
    names = [name for name in LABELS if name in columns]
    figure, axes = figure_of(len(names))
    for axis, name in zip(axes, names):
        axis.plot(columns["step"], columns[name], color=BLUE, linewidth=1.5)
        axis.set_xlabel("step")
        axis.set_title(LABELS[name], loc="left", fontsize=10)
    save_figure(figure, png)


def plot_comparison(runs: Mapping[str, Path], result: Mapping[str, object], png: Path) -> None:
    """Next-token loss of several runs over their steps, and where their students ended, seen from the teacher."""
    figure, (curves, kl, agreement) = figure_of(3)
    colours = dict(zip(runs, (ORANGE, BLUE, GREEN)))
    for name, metrics in runs.items():
        columns = read_metrics(metrics)
        curves.plot(columns["step"], columns["next_token_loss"], label=name, color=colours[name], linewidth=1.5)
    curves.set_xlabel("step")
    curves.set_title("next-token loss in training, nats", loc="left", fontsize=10)
    curves.legend(frameon=False)
    students = {name: values for name, values in result["models"].items() if name != "teacher"}
    for axis, key, label, form in (
        (kl, "forward_kl", "KL(p||q) on held-out text, nats a token", "{:.3g}"),
        (agreement, "agreement", "top-1 agreement with the teacher, held-out", "{:.1%}"),
    ):
        bars = axis.bar(
            list(students), [values[key] for values in students.values()],
            color=[colours.get(name, GREY) for name in students], width=0.6,
        )
        axis.bar_label(bars, [form.format(values[key]) for values in students.values()], padding=2)
        axis.set_title(label, loc="left", fontsize=10)
        axis.margins(y=0.12)
    save_figure(figure, png)


def plot_cache(bytes_per_row: Mapping[str, float], rows: Mapping[str, Tensor], png: Path) -> None:
    """Where the bytes of a cache are, and how some numbers are spread over its rows; both by their titles."""
    figure, (streams, *spreads) = figure_of(1 + len(rows))
    names = sorted(bytes_per_row, key=bytes_per_row.__getitem__)
    bars = streams.barh(names, [bytes_per_row[name] for name in names], color=BLUE, height=0.6)
    streams.bar_label(bars, fmt="{:.3g}", padding=2)
    streams.set_title("bytes a row", loc="left", fontsize=10)
    streams.margins(x=0.15)
    for axis, (title, values) in zip(spreads, rows.items()):
        axis.hist(values.numpy(), bins=40, color=BLUE)
        axis.set_title(f"{title} (rows)", loc="left", fontsize=10)
    save_figure(figure, png)


def figure_of(panels: int, height: float = 3.4):
    """A figure of panels beside each other, and their axes; saved by :func:`save_figure`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(4.2 * panels, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e0e0e0", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes[0]


def save_figure(figure, png: Path) -> None:
    """Write a figure and forget it."""
    from matplotlib import pyplot

    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=130)
    pyplot.close(figure)
