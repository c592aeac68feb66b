"""The README's tables, from files: results of ``bench.side_by_side``, of the demo, and the registry of divergences.

    python -m bench.render            rewrites README.md between its markers
    python -m bench.render --check    exits with 1, and says what is stale, if that would change anything

Markers: ``<!-- bench:NAME -->`` to ``<!-- /bench -->`` with a name from :data:`TABLES`, and ``<!-- divergences -->`` to
``<!-- /divergences -->``. A table of a result that no file holds is an error: nothing is typed by hand.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import sys
from pathlib import Path
from typing import Callable

from kd_kernels import divergences

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SIDE_BY_SIDE, DEMO = "cpu_side_by_side.json", "demo.json"
README = ROOT / "README.md"

LABELS = {
    "products": "bare matrix products",
    "products_reused": "the same, into memory that exists already",
    "products_fp32": "bare matrix products, in fp32",
    "kd_kernels": "**kd-kernels**",
    "kd_kernels_rounded_logits": '**kd-kernels**, `logits_dtype="input"`',
    "torch_eager": "plain torch, all logits in fp32",
    "torch_compile": "the same under `torch.compile`",
    "trl": "TRL {trl}, `ChunkedDivergenceFunction`",
    "liger_chunked": "Liger {liger-kernel}, `LigerFusedLinearJSDLoss`",
    "torch_topk": "plain torch: product, `topk`, `logsumexp`",
    "torch_topk_of_ready_logits": "`topk` and `logsumexp` alone, logits given",
}
"""A row of a table, by contender; versions are filled in from the results."""


# -------------------------------------------------------------------------------------------------------------- pieces


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is flush right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label(name: str, record: dict) -> str:
    return LABELS[name].format(**{peer: version or "?" for peer, version in record["measured"]["peers"].items()})


def shape_of(record: dict) -> str:
    """``N=512, V=32768, Hs=512, Ht=1024``, with the widths that the op uses, and k of a sparse teacher."""
    shape, case = record["shape"], record["case"]
    parts = [f"N={shape['rows']}", f"V={shape['vocab']}"]
    if case == "topk_targets":
        parts.append(f"H={shape['teacher_hidden']}")
    else:
        parts.append(f"Hs={shape['student_hidden']}")
    if case == "kd_loss_dense":
        parts.append(f"Ht={shape['teacher_hidden']}")
    if case != "kd_loss_dense":
        parts.append(f"k={shape['kept']}")
    return ", ".join(parts)


def percent(fraction: float) -> str:
    """Two significant digits."""
    return f"{float(f'{100 * fraction:.2g}'):g}%"


def _took_part(*records: dict) -> list[str]:
    """Contenders that ran in at least one of the records, in the order of :data:`LABELS`."""
    ran = {name for r in records for name, result in r["contenders"].items() if "skipped" not in result}
    return [name for name in LABELS if name in ran]


def _skipped(*records: dict) -> str:
    """A line for each contender that did not run, with the reason."""
    reasons = {
        (label(name, record), result["skipped"])
        for record in records for name, result in record["contenders"].items() if "skipped" in result
    }
    return "".join(f"\n\nNot measured: {who} ({why})." for who, why in sorted(reasons))


def _cells(record: dict, name: str, cell: Callable[[dict], list[str]], width: int) -> list[str]:
    result = record["contenders"].get(name, {"skipped": ""})
    return ["-"] * width if "skipped" in result else cell(result)


# -------------------------------------------------------------------------------------------------------------- tables


def _machine(results: dict) -> str:
    """On what, with what, when."""
    on, moments = results["machine"], [record["measured"] for record in results["comparisons"].values()]
    commits = sorted({moment["commit"][:9] + ("+" if moment["modified"] else "") for moment in moments})
    dates = sorted({moment["date"][:10] for moment in moments})
    emulated = "" if any("bf16" in name for name in on["instruction_sets"]) else (
        ". It has no bf16 instructions: torch emulates bf16 products, which takes longer than fp32, so a ratio to them "
        "flatters whoever multiplies in fp32, as kd-kernels does; the last column is the honest one"
    )
    return (
        f"{on['model']}, {on['cores']} cores, {on['memory_bytes'] / 2**30:.0f} GiB, "
        f"{', '.join(on['instruction_sets'])}; torch {on['torch']}; {', '.join(dates)}, "
        f"commit {', '.join(commits)}{emulated}."
    )


def headline(results: dict) -> str:
    """The numbers that matter, in two sentences."""
    timed, held = results["comparisons"]["dense_fp32"], results["comparisons"]["memory_fp32"]
    ours, plain = (timed["contenders"][name]["ratio"] for name in ("kd_kernels", "torch_eager"))
    scratch, plain_scratch = (
        held["contenders"][name]["scratch_bytes"] / 2**20 for name in ("kd_kernels", "torch_eager")
    )
    return (
        f"On a CPU with {results['machine']['cores']} cores, in fp32, the loss and all gradients of "
        f"`{timed['divergence']}` ({shape_of(timed)}) take **{ours:.2f} times** the bare matrix products; plain torch "
        f"takes {plain:.2f} times. At {shape_of(held)} they need **{scratch:,.0f} MiB** beside the gradients; plain "
        f"torch needs {plain_scratch:,.0f} MiB."
    )


def _times(results: dict, op: str) -> str:
    """Times and ratios of an op in both dtypes."""
    fp32, bf16 = (results["comparisons"][f"{op}_{dtype}"] for dtype in ("fp32", "bf16"))

    def cells(result: dict) -> list[str]:
        return [f"{result['p50_ms']:.0f}", f"{result['ratio']:.2f}"]

    def cells_bf16(result: dict) -> list[str]:
        return [*cells(result), f"{result['ratio_to_fp32_products']:.2f}"]

    header = ["", "fp32, ms", "/ products", "bf16, ms", "/ bf16 products", "/ fp32 products"]
    rows = [
        [label(name, fp32), *_cells(fp32, name, cells, 2), *_cells(bf16, name, cells_bf16, 3)]
        for name in _took_part(fp32, bf16)
    ]
    rounds = f"{shape_of(fp32)}; medians of {fp32['rounds']} rounds in fp32 and {bf16['rounds']} in bf16"
    return f"{rounds}.\n\n{table(header, rows)}{_skipped(fp32, bf16)}"


def loss(results: dict) -> str:
    """``kd_loss`` with gradients, dense and sparse."""
    dense, sparse = (results["comparisons"][f"{op}_fp32"]["divergence"] for op in ("dense", "sparse"))
    return (
        f"{_machine(results)}\n\n"
        f"A teacher with a head, `{dense}`, loss and gradients. {_times(results, 'dense')}\n\n"
        f"A sparse teacher, `{sparse}` with the tail as one event; no teacher logits among its products. "
        f"{_times(results, 'sparse')}"
    )


def topk(results: dict) -> str:
    """``topk_targets`` from hidden states."""
    return f"`topk_targets`, from hidden states. {_times(results, 'topk')}"


def precision(results: dict) -> str:
    """Errors of the gradients, by how far the student is from the teacher, and what they cost."""
    fp32, bf16 = records = [results["comparisons"][f"dense_{dtype}"] for dtype in ("fp32", "bf16")]
    names = [n for n in _took_part(*records) if not n.startswith("products")]
    distances = list(bf16["contenders"]["kd_kernels"]["errors"])
    header = ["", *(f"{dtype}, TV {tv}" for dtype in ("fp32", "bf16") for tv in distances), "bf16, ms"]

    def cells(result: dict) -> list[str]:
        worst = [max(result["errors"][tv][x] for x in ("student_hidden", "student_weight")) for tv in distances]
        return [percent(x) for x in worst]

    def cells_bf16(result: dict) -> list[str]:
        return [*cells(result), f"{result['p50_ms']:.0f}"]

    rows = [
        [
            label(name, bf16), *_cells(fp32, name, cells, len(distances)),
            *_cells(bf16, name, cells_bf16, len(distances) + 1),
        ]
        for name in names
    ]
    return (
        f"Relative L2 error against float64, the worse of dH and dW, `{bf16['divergence']}`, {shape_of(bf16)}, logits "
        f"of standard deviation {bf16['logit_std']:g}, by the total variation (TV) between student and teacher. A "
        f"gradient that is exact but for its own rounding to bf16 has 0.17%.\n\n" + table(header, rows)
    )


def memory(results: dict) -> str:
    """Scratch beside the gradients, in the dtypes that were measured."""
    records = {d: r for d in ("fp32", "bf16") if (r := results["comparisons"].get(f"memory_{d}"))}
    first = next(iter(records.values()))
    mebibytes = lambda result: [f"{result['scratch_bytes'] / 2**20:,.0f} MiB"]  # noqa: E731
    rows = [
        [label(name, first), *(cell for r in records.values() for cell in _cells(r, name, mebibytes, 1))]
        for name in _took_part(*records.values())
    ]
    gradients = ", ".join(
        f"{r['contenders']['kd_kernels']['gradient_bytes'] / 2**20:.0f} MiB in {d}" for d, r in records.items()
    )
    text = (
        f"`{first['divergence']}`, {shape_of(first)}; kd-kernels with `max_scratch_bytes` of "
        f"{first['budget_bytes'] / 2**20:.0f} MiB. Peak resident memory above the level before the call, less the "
        f"gradients that were asked for ({gradients}); one fp32 matrix of logits is "
        f"{first['logits_bytes'] / 2**20:,.0f} MiB.\n\n"
    )
    return text + table(["", *records], rows) + _skipped(*records.values())


def demo(results: dict) -> str:
    """What ``kdk demo`` wrote."""
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "perplexity": ("perplexity", lambda x: f"{x:.1f}"),
        "forward_kl": (r"KL(p\|\|q)", lambda x: f"{x:.3f}"),
        "reverse_kl": (r"KL(q\|\|p)", lambda x: f"{x:.3f}"),
        "agreement": ("top-1 agreement", lambda x: f"{100 * x:.1f}%"),
        "acceptance": ("acceptance", lambda x: f"{100 * x:.1f}%"),
        "ece": ("ECE", lambda x: f"{x:.3f}"),
    }
    models = results["models"].items()
    rows = [[name, *(show(model[key]) for key, (_, show) in columns.items())] for name, model in models]
    minutes = sum(results["seconds"].values()) / 60
    return (
        table(["", *(title for title, _ in columns.values())], rows)
        + f"\n\n{results['tokens']:,} held-out tokens; KL in nats a token; {minutes:.1f} minutes in all."
    )


TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "headline": (SIDE_BY_SIDE, headline),
    "loss": (SIDE_BY_SIDE, loss),
    "precision": (SIDE_BY_SIDE, precision),
    "memory": (SIDE_BY_SIDE, memory),
    "topk": (SIDE_BY_SIDE, topk),
    "demo": (DEMO, demo),
}
"""Marker name -> the file in bench/results/ that it reads, and the text out of that."""


# --------------------------------------------------------------------------------------------------------- divergences


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
    lines = [["name", "formula", "parameters", "bound, nats", "source"], ["---"] * 5, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -------------------------------------------------------------------------------------------------------------- README

BLOCK = re.compile(
    r"(<!-- (?:bench:(?P<name>[\w-]+)|divergences) -->\n).*?(<!-- /(?:bench|divergences) -->)", re.DOTALL
)


def read_results(file: str) -> dict:
    """A file in bench/results/."""
    return json.loads((RESULTS / file).read_text())


def rendered(text: str, read: Callable[[str], dict] = read_results) -> str:
    """A README with what is between its markers written anew.

    Args:
        read: the content of a file in bench/results/, by name.

    Raises:
        KeyError: a marker names no table.
        FileNotFoundError: a table whose results are not there.
    """

    def block(match: re.Match) -> str:
        if match["name"] is None:
            body = divergence_table()
        else:
            file, render = TABLES[match["name"]]
            body = render(read(file))
        return f"{match[1]}{body}\n{match[3]}"

    return BLOCK.sub(block, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the README is stale")
    asked = parser.parse_args(arguments)
    text = README.read_text()
    new = rendered(text)
    if asked.check:
        stale = [m["name"] or "divergences" for m, n in zip(BLOCK.finditer(text), BLOCK.finditer(new)) if m[0] != n[0]]
        if stale:
            print(f"README.md is stale: {', '.join(stale)}; run python -m bench.render", file=sys.stderr)
        return 1 if stale else 0
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
