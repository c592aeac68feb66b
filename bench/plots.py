"""Pictures of the results, as PNG: time and memory against N and V, against the scratch budget, and a roofline.

    python -m bench.plots            draws what the files in bench/results/ hold into bench/results/plots/
    python -m bench.plots --check    exits with 1, and says what is stale, if that would draw something else

A picture carries a digest of the numbers in it, by which the check knows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
RESULTS = Path(__file__).resolve().parent / "results"
FILES = ("cpu_side_by_side.json", "gpu_side_by_side.json")
DIGEST = "Source"
"""The PNG text field that holds the digest: one of those that the format names."""

BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072b2", "#d55e00", "#009e73", "#aa3377", "#56b4e9", "#7f7f7f"
NAMED = {  # short names and colours; these are told apart by colour-blind readers too
    "products": ("bare products", GREY),
    "kd_kernels": ("kd-kernels", BLUE),
    "torch_eager": ("torch", ORANGE),
    "trl": ("TRL", GREEN),
    "liger_chunked": ("Liger, chunked", PURPLE),
    "liger_jsd": ("Liger, Triton", SKY),
    "torch_compile": ("torch.compile", SKY),
    "torch_linear_cross_entropy": ("torch, in chunks", PURPLE),
    "cut_cross_entropy": ("cut-cross-entropy", GREEN),
}


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        about: what it shows, in a sentence without a full stop.
        numbers: the part of the results that it shows; None where they do not hold it.
        draw: ``numbers -> figure``.
    """

    about: str
    numbers: Callable[[dict], object | None]
    draw: Callable[[object], object]


# -------------------------------------------------------------------------------------------------------------- pieces


def _panels(count: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(5.4 * count, 3.8), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e8e8e8", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, list(axes[0])


def spread(values: list[float], gap: float) -> list[float]:
    """Positions as near to the values as it takes for each two to be ``gap`` apart, in their order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = list(values)
    for before, after in zip(order, order[1:]):
        placed[after] = max(placed[after], placed[before] + gap)
    shift = sum(p - v for p, v in zip(placed, values)) / max(1, len(values))
    return [p - shift for p in placed]


def _label_ends(axis, ends: dict[str, tuple[float, float]]) -> None:
    """Names at the ends of their lines, moved apart where they would overlap."""
    axis.margins(x=0.05)
    axis.figure.canvas.draw()
    heights = [axis.transData.transform(point)[1] for point in ends.values()]
    for (name, point), height, moved in zip(ends.items(), heights, spread(heights, 14.0)):
        text, colour = NAMED[name]
        points_off = (moved - height) * 72 / axis.figure.dpi
        axis.annotate(text, point, (6, points_off), textcoords="offset points", color=colour, va="center", fontsize=9)


def _thousands(axis) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
        one.set_minor_locator(NullLocator())


def _shape(record: dict, *without: str) -> str:
    letters = {"N": "rows", "V": "vocab", "Hs": "student_hidden", "Ht": "teacher_hidden"}
    shape = record["shape"]
    return ", ".join(f"{k}={shape[name]:,}" for k, name in letters.items() if name not in without)


# --------------------------------------------------------------------------------------------------------------- plots


def _sweep(name: str) -> Callable[[dict], dict | None]:
    return lambda results: results["comparisons"].get(name)


def _against(record: dict):
    """Time, and scratch, of everyone against what is swept; both axes logarithmic."""
    figure, axes = _panels(2)
    over, points = record["over"], list(zip(record["values"], record["points"]))
    symbol = {"rows": "N", "vocab": "V"}[over]
    for axis, key, scale, title in (
        (axes[0], "p50_ms", 1.0, "time, ms"), (axes[1], "scratch_bytes", MIB, "scratch, MiB"),
    ):
        ends = {}
        for name, (_, colour) in NAMED.items():
            found = [(x, r["contenders"].get(name, {}).get(key)) for x, r in points]
            line = [(x, y / scale) for x, y in found if y]
            if line:
                style = "--" if name == "products" else "-"
                axis.plot(*zip(*line), style, marker=".", color=colour, linewidth=2.2 if name == "kd_kernels" else 1.3)
                ends[name] = line[-1]
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(record["values"])
        axis.set_xlabel(f"{symbol}, {'rows' if symbol == 'N' else 'vocabulary'}")
        axis.set_title(title, loc="left", fontsize=10)
        _thousands(axis)
        _label_ends(axis, ends)
    figure.suptitle(f"{record['divergence']}, {record['dtype']}, {_shape(record, over)}", fontsize=10)
    return figure


def _pareto(record: dict):
    """Time, as a ratio to the bare products, against scratch: ours at every budget, the others where they are."""
    figure, (axis,) = _panels(1)
    ours = [(x, r["contenders"]["kd_kernels"]) for x, r in zip(record["values"], record["points"])]
    line = [(result["scratch_bytes"] / MIB, result["ratio"]) for _, result in ours]
    axis.plot(*zip(*line), "-o", color=BLUE, markersize=4, linewidth=2)
    near = {"textcoords": "offset points", "fontsize": 9}
    for (budget, _), point in zip(ours, line):
        axis.annotate(f"{budget / MIB:,.4g}", point, (0, 7), color=BLUE, ha="center", **near)
    axis.annotate("kd-kernels, by\nmax_scratch_bytes\nin MiB", line[-1], (10, 0), color=BLUE, va="center", **near)
    for name, result in record["points"][0]["contenders"].items():
        if name != "kd_kernels" and result.get("scratch_bytes"):
            text, colour = NAMED[name]
            point = (result["scratch_bytes"] / MIB, result["ratio"])
            axis.plot(*point, "s", color=colour, markersize=5)
            axis.annotate(text, point, (8, 0), color=colour, va="center", **near)
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_yticks([1, 1.5, 2, 3, 5, 8])
    axis.set_ylim(0.9, None)
    axis.margins(x=0.15)
    axis.set_xlabel("scratch, MiB")
    axis.set_title("time / bare products", loc="left", fontsize=10)
    _thousands(axis)
    figure.suptitle(f"{record['divergence'] or 'cross-entropy'}, {record['dtype']}, {_shape(record)}", fontsize=10)
    return figure


def _of_roofline(results: dict) -> dict | None:
    """Ceilings, and of every comparison in the dtype that they were measured in: intensity and rates."""
    bounds, points = results.get("ceilings"), {}
    for name, record in results["comparisons"].items():
        if bounds is None or record["kind"] != "time" or not bounds["product"].endswith(record["dtype"]):
            continue
        rates = {
            who: record["flops"] / (1e-3 * result["p50_ms"])
            for who, result in record["contenders"].items() if "p50_ms" in result and "ready_logits" not in who
        }
        ours, floor = rates["kd_kernels"], rates["products"]
        others = max(rate for who, rate in rates.items() if not who.startswith(("kd_kernels", "products")))
        points[name] = {"intensity": record["flops"] / record["bytes"], "ours": ours, "floor": floor, "others": others}
    return {"ceilings": bounds, "points": points} if points else None


def _roofline(numbers: dict):
    """Operations a second on the fewest operations, against the fewest bytes that these need."""
    figure, (axis,) = _panels(1)
    bounds, points = numbers["ceilings"], numbers["points"]
    peak, bandwidth = bounds["product_flops_per_s"], bounds["copy_bytes_per_s"]
    tera = 1e12
    intensities = [point["intensity"] for point in points.values()]
    left, right = min(*intensities, peak / bandwidth) / 3, max(*intensities, peak / bandwidth) * 3
    knee = peak / bandwidth
    axis.plot([left, knee, right], [left * bandwidth / tera, peak / tera, peak / tera], color="black", linewidth=1.2)
    kinds = {
        "floor": ("bare products", GREY, "_"), "ours": ("kd-kernels", BLUE, "o"),
        "others": ("fastest other", ORANGE, "s"),
    }
    for kind, (text, colour, marker) in kinds.items():
        heights = [point[kind] / tera for point in points.values()]
        axis.scatter(intensities, heights, color=colour, marker=marker, s=30, label=text, zorder=3)
    places = spread([point["ours"] / peak for point in points.values()], 0.045)
    for (name, point), place in zip(points.items(), places):
        axis.annotate(
            name, (point["intensity"], point["ours"] / tera), (7, (place - point["ours"] / peak) * 230),
            textcoords="offset points", color=BLUE, fontsize=8, va="center",
        )
    axis.set_xscale("log")
    axis.set_ylim(0, 1.1 * max(peak, *(point[kind] for point in points.values() for kind in kinds)) / tera)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    axis.set_xlabel("operations a byte, at least")
    axis.set_title(
        f"TFLOP/s on the fewest operations; roof: {bounds['product']} and a copy", loc="left", fontsize=10
    )
    return figure


PLOTS = {
    "rows": Plot("Time and scratch against the number of rows, ours and other libraries'", _sweep("rows"), _against),
    "vocab": Plot("Time and scratch against the vocabulary, ours and other libraries'", _sweep("vocab"), _against),
    "budget": Plot("Time against scratch, ours at several budgets", _sweep("budget"), _pareto),
    "ce_budget": Plot(
        "Cross-entropy alone: time against scratch, ours at several budgets", _sweep("ce_budget"), _pareto
    ),
    "roofline": Plot("Operations a second under the device's roofline", _of_roofline, _roofline),
}


# --------------------------------------------------------------------------------------------------------------- files


def available(results: dict) -> list[tuple[str, Plot]]:
    """The plots whose numbers are there."""
    return [(name, plot) for name, plot in PLOTS.items() if plot.numbers(results) is not None]


def file_of(results: dict, name: str) -> str:
    return f"{'gpu' if results['machine']['device'] == 'cuda' else 'cpu'}_{name}.png"


def digest(numbers: object) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def draw(results: dict, folder: Path) -> list[Path]:
    """Every plot that the results give, into a folder."""
    from matplotlib import pyplot

    written = []
    for name, plot in available(results):
        numbers = plot.numbers(results)
        figure = plot.draw(numbers)
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / file_of(results, name))
        figure.savefig(written[-1], dpi=110, metadata={DIGEST: digest(numbers)})
        pyplot.close(figure)
    return written


def stale(results: dict, folder: Path) -> list[str]:
    """Files that are missing, or show other numbers."""
    from PIL import Image

    found = []
    for name, plot in available(results):
        path = folder / file_of(results, name)
        if not path.exists() or Image.open(path).info.get(DIGEST) != digest(plot.numbers(results)):
            found.append(path.name)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="draw nothing; exit with 1 if a picture is stale")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the files; plots/ in it is written")
    asked = parser.parse_args(arguments)
    old = []
    for file in FILES:
        if not (asked.results / file).exists():
            continue
        results = json.loads((asked.results / file).read_text())
        if asked.check:
            old += stale(results, asked.results / "plots")
        else:
            print("\n".join(str(path) for path in draw(results, asked.results / "plots")))
    if old:
        print(f"stale: {', '.join(old)}; run python -m bench.plots", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
