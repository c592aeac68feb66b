"""Tables, pictures and printed lines of README.md and docs/methods.md: from files under bench/results/, and the
divergences and methods that there are.

    python -m bench.render            rewrites both between their markers
    python -m bench.render --check    exits with 1, and says what is stale, if that would change anything

Markers: ``<!-- bench:NAME -->`` to ``<!-- /bench -->`` with a name from :data:`BLOCKS`, and ``<!-- NAME -->`` to
``<!-- /NAME -->`` with one from :data:`REGISTRIES`. Nothing is typed by hand: what no file holds is said not to be
measured yet.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import methods_page, plots, tables
from kd_kernels import divergences
from kd_trainer import registry

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CPU, GPU, DEMO, DROP_IN = "cpu_side_by_side.json", "gpu_side_by_side.json", "demo.json", "cpu_integrations.json"
SAMPLING, GPU_SAMPLING, ROLLOUTS = "cpu_sampling.json", "gpu_sampling.json", "cpu_rollouts.json"
AVX2 = "cpu_side_by_side_avx2.json"
CACHE, STUDY, METHODS = "cache_page.json", "cpu_study_text2sql.json", "methods_page.json"
CONVERGENCE = "cpu_convergence.json"
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs" / "methods.md")


@dataclass(frozen=True)
class Block:
    """What stands between two markers.

    Attributes:
        file: in bench/results/.
        needs: comparisons in it without which there is nothing to show.
        missing: what is said where the file or one of them is not there.
    """

    file: str
    text_of: Callable[[dict], str]
    needs: tuple[str, ...] = ()
    missing: str = "Not yet measured."

    def text(self, read: Callable[[str], dict]) -> str:
        try:
            results = read(self.file)
        except FileNotFoundError:
            return self.missing
        if set(self.needs) - set(results.get("comparisons", {})):
            return self.missing
        return self.text_of(results)


def _pictures(results: dict) -> str:
    """Every plot that these results give, with what it shows."""
    drawn = plots.available(results)
    return "\n\n".join(f"![{plot.about}](bench/results/plots/{plots.file_of(results, name)})" for name, plot in drawn)


BLOCKS = {
    "headline": Block(CPU, tables.headline, ("dense_fp32", "memory_fp32")),
    "loss": Block(CPU, tables.loss, ("dense_fp32", "dense_bf16", "sparse_fp32", "sparse_bf16")),
    "precision": Block(CPU, tables.precision, ("dense_fp32", "dense_bf16")),
    "cross-entropy": Block(CPU, tables.cross_entropy, ("ce_fp32", "ce_bf16")),
    "memory": Block(CPU, tables.memory, ("memory_fp32",)),
    "topk": Block(CPU, tables.topk, ("topk_fp32", "topk_bf16")),
    "stats": Block(CPU, tables.stats, ("stats_fp32", "stats_bf16")),
    "avx2": Block(AVX2, tables.fp32_ratios, tuple(tables.FP32_OPS)),
    "plots": Block(CPU, _pictures, ("rows", "vocab", "budget")),
    "gpu": Block(GPU, tables.gpu, missing="Not yet measured on a GPU."),
    "gpu-plots": Block(GPU, _pictures, missing="Not yet drawn: nothing was measured on a GPU."),
    "demo": Block(DEMO, tables.demo),
    "cache": Block(CACHE, tables.cache),
    "cache-codec": Block("cpu_cache_codec.json", tables.codec),
    "cache-fuzz": Block("cache_fuzz.json", tables.fuzz),
    "study": Block(STUDY, tables.study),
    "integrations": Block(DROP_IN, tables.drop_in),
    "convergence": Block(CONVERGENCE, tables.convergence),
    "sampling": Block(SAMPLING, tables.sampling),
    "rollouts": Block(ROLLOUTS, tables.rollouts),
    "walks": Block("walks.json", tables.walks),
    "gpu-sampling": Block(GPU_SAMPLING, tables.sampling, missing="Not yet measured: draws on a GPU."),
    "on-policy": Block("cpu_on_policy.json", tables.on_policy),
    "kid": Block("cpu_kid.json", tables.kid),
} | {
    f"method-{name}": Block(
        METHODS, functools.partial(tables.example, name=name), missing=tables.command(example.config, example.command)
    )
    for name, example in methods_page.EXAMPLES.items()
}
"""By marker."""


# ---------------------------------------------------------------------------------------------------------- registries


def _range(factory: Callable[..., divergences.Divergence], name: str, others: dict[str, float]) -> str:
    """What the library itself says of a number out of range: the requirement in its message."""
    try:
        factory(**others, **{name: math.inf})
    except ValueError as error:
        return re.search(r"must be (.*?), got inf", str(error))[1]
    raise AssertionError(f"{factory.__name__} takes {name}=inf")


def divergence_table() -> str:
    """Name, formula (from the docstring's first line), parameters with their ranges, bound, source."""
    rows = []
    for name, factory in divergences.REGISTRY.items():
        parameters = inspect.signature(factory).parameters
        needed = {p.name: 0.5 for p in parameters.values() if p.default is p.empty}
        made = factory(**needed)
        ranges = [
            f"`{p}` {_range(factory, p, {k: v for k, v in needed.items() if k != p})}" for p, _ in made.params
        ] + [f"`{p.name}`" for p in parameters.values() if isinstance(p.default, bool)]
        formulas = re.findall(r"``(.*?)``", inspect.getdoc(factory).splitlines()[0])
        at = ", ".join(f"{p}={value:g}" for p, value in made.params)
        bound = "none" if made.bound is None else f"{made.bound:.3g}" + (f" at {at}" if at else "")
        formula = ", ".join(f"`{f}`" for f in formulas).replace("|", r"\|")
        rows.append([f"`{name}`", formula, "; ".join(ranges), bound, made.paper])
    return _markdown(["name", "formula", "parameters", "bound, nats", "source"], rows)


def method_table() -> str:
    """What ``kdk methods`` lists."""
    rows = [
        [f"`{name}`", spec.summary, ", ".join(spec.needs), spec.source] for name, spec in registry.specs().items()
    ]
    return _markdown(["name", "what it does", "needs", "source"], rows)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


REGISTRIES = {"divergences": divergence_table, "methods": method_table}
"""By marker."""


# --------------------------------------------------------------------------------------------------------------- pages

MARKED = re.compile(
    r"(?P<begin><!-- (?:bench:(?P<name>[\w-]+)|(?P<registry>divergences|methods)) -->\n).*?"
    r"(?P<end><!-- /(?:bench|divergences|methods) -->)", re.DOTALL,
)


def read_results(file: str) -> dict:
    """A file in bench/results/."""
    return json.loads((RESULTS / file).read_text())


def rendered(text: str, read: Callable[[str], dict] = read_results) -> str:
    """A page with what is between its markers written anew.

    Args:
        read: the content of a file in bench/results/, by name; FileNotFoundError where it is not there.

    Raises:
        KeyError: a marker names no block.
    """

    def block(match: re.Match) -> str:
        body = REGISTRIES[match["registry"]]() if match["name"] is None else BLOCKS[match["name"]].text(read)
        return f"{match['begin']}{body}\n{match['end']}"

    return MARKED.sub(block, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page is stale")
    asked = parser.parse_args(arguments)
    for page in PAGES:
        text = page.read_text()
        new = rendered(text)
        if not asked.check:
            page.write_text(new)
            continue
        stale = [
            m["name"] or m["registry"] for m, n in zip(MARKED.finditer(text), MARKED.finditer(new)) if m[0] != n[0]
        ]
        if stale:
            print(f"{page.name} is stale: {', '.join(stale)}; run python -m bench.render", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
