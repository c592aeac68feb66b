"""Text out of results: one function for each of the README's blocks, from the content of a file in bench/results/."""

from __future__ import annotations

from collections.abc import Callable

from bench import integrations
from bench.cases import CASES, PRODUCTS
from kd_trainer.study import lineup
from kd_trainer.study import report as study_report

MIB, GIB = 2**20, 2**30

LABELS = {
    "products": "bare matrix products",
    "products_reused": "the same, into memory that exists already",
    "products_fp32": "bare matrix products, in fp32",
    "kd_kernels": "**kd-kernels**",
    "kd_kernels_rounded_logits": '**kd-kernels**, `logits_dtype="input"`',
    "torch_eager": "plain torch, all logits in fp32",
    "torch_compile": "the same under `torch.compile`",
    "torch_linear_cross_entropy": "torch's `F.linear_cross_entropy`, in chunks",
    "checkpointed_chunks": "checkpointed chunks of 256 rows, in fp32",
    "trl": "TRL {trl}, `ChunkedDivergenceFunction`",
    "liger_jsd": "Liger {liger-kernel}, `LigerFusedLinearJSD`",
    "liger_chunked": "Liger {liger-kernel}, `LigerFusedLinearJSDLoss`",
    "liger_chunked_compiled": "the same, compiled",
    "liger_kl": "Liger {liger-kernel}, `LigerFusedLinearKLDivLoss`",
    "liger_flce": "Liger {liger-kernel}, `LigerFusedLinearCrossEntropyLoss`",
    "fla": "flash-linear-attention {flash-linear-attention}, `FusedKLDivLoss`",
    "cut_cross_entropy": "cut-cross-entropy {cut-cross-entropy}",
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
    """``N=512, V=32768, Hs=512, Ht=1024``, with the widths that the op's products have, and k of a sparse teacher."""
    shape, case = record["shape"], CASES[record["case"]]
    widths = {PRODUCTS[product].width for product in case.products[record["mode"]]}
    used = {"N": "rows", "V": "vocab", "Hs": "student_hidden", "Ht": "teacher_hidden", "k": "kept"}
    left_out = {"student_hidden", "teacher_hidden"} - widths | (set() if case.has_entries else {"kept"})
    return ", ".join(f"{letter}={shape[name]}" for letter, name in used.items() if name not in left_out)


def percent(fraction: float) -> str:
    """Two significant digits."""
    return f"{float(f'{100 * fraction:.2g}'):g}%"


def worst_error(result: dict, total_variation: str | None = None) -> float | None:
    """The worse of dH and dW, at one distance or the worst of all; None of what has no gradient."""
    by_distance = result.get("errors", {})
    chosen = by_distance.values() if total_variation is None else [by_distance[total_variation]]
    gradients = [errors[x] for errors in chosen for x in ("student_hidden", "student_weight") if x in errors]
    return max(gradients, default=None)


def took_part(*records: dict) -> list[str]:
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


def _provenance(results: dict) -> str:
    """When and from which commit."""
    moments = [record["measured"] for record in results["comparisons"].values()]
    commits = sorted({(m["commit"] or "unknown")[:9] + ("+" if m["modified"] else "") for m in moments})
    dates = sorted({moment["date"][:10] for moment in moments})
    return f"torch {results['machine']['torch']}; {', '.join(dates)}, commit {', '.join(commits)}"


# ---------------------------------------------------------------------------------------------------------- on a CPU


def _machine(results: dict) -> str:
    """On what, with what, when."""
    on = results["machine"]
    is_in_fp32 = all(record["dtype"] == "float32" for record in results["comparisons"].values())
    emulated = "" if is_in_fp32 or any("bf16" in name for name in on["instruction_sets"]) else (
        ". It has no bf16 instructions: torch emulates bf16 products, which takes longer than fp32, so a ratio to them "
        "flatters whoever multiplies in fp32, as kd-kernels does; the last column is the honest one"
    )
    return (
        f"{on['model']}, {on['cores']} cores, {on['memory_bytes'] / GIB:.0f} GiB, "
        f"{', '.join(on['instruction_sets'])}; {_provenance(results)}{emulated}."
    )


def headline(results: dict) -> str:
    """The numbers that matter, in two sentences."""
    timed, held = results["comparisons"]["dense_fp32"], results["comparisons"]["memory_fp32"]
    ours, plain = (timed["contenders"][name]["ratio"] for name in ("kd_kernels", "torch_eager"))
    scratch, plain_scratch = (held["contenders"][name]["scratch_bytes"] / MIB for name in ("kd_kernels", "torch_eager"))
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
        for name in took_part(fp32, bf16)
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


def cross_entropy(results: dict) -> str:
    """``kd_loss`` of labels alone, beside fused cross-entropies: times, and what each takes beside the gradients."""
    text = f"Cross-entropy alone (`kd_weight=0`, no teacher), loss and gradients. {_times(results, 'ce')}"
    budgets = results["comparisons"].get("ce_budget")
    return text if budgets is None else f"{text}\n\n{_time_and_memory(budgets)}"


def _time_and_memory(budgets: dict) -> str:
    """Of a sweep over the budget: ours at each, the others as they are."""
    cells = lambda result: [  # noqa: E731
        f"{result['p50_ms']:.0f}", f"{result['ratio']:.2f}",
        f"{result['scratch_bytes'] / MIB:,.1f}" if "scratch_bytes" in result else "-",
    ]
    first = budgets["points"][0]
    rows = [
        [f"**kd-kernels**, `max_scratch_bytes` of {budget / MIB:,.4g} MiB", *cells(point["contenders"]["kd_kernels"])]
        for budget, point in zip(budgets["values"], budgets["points"])
    ]
    others = [name for name in took_part(first) if not name.startswith(("products", "kd_kernels"))]
    rows += [[label(name, budgets), *cells(first["contenders"][name])] for name in others]
    about = f"Time against memory in {budgets['dtype']}, {shape_of(budgets)}; scratch is all but the gradients"
    return f"{about}.\n\n{table(['', 'ms', '/ products', 'scratch, MiB'], rows)}"


FP32_OPS = {
    "dense_fp32": "dense teacher", "sparse_fp32": "sparse teacher", "ce_fp32": "cross-entropy",
    "topk_fp32": "`topk_targets`", "stats_fp32": "`token_stats`",
}
"""By comparison, the head of its column."""


def fp32_ratios(results: dict) -> str:
    """Every op in fp32, a column each: times over the bare products, and cross-entropy's memory."""
    records = {op: results["comparisons"][op] for op in FP32_OPS}
    cell = lambda result: [f"{result['ratio']:.2f}"]  # noqa: E731
    rows = [
        [label(name, records["dense_fp32"]), *(x for record in records.values() for x in _cells(record, name, cell, 1))]
        for name in took_part(*records.values())
    ]
    products = ", ".join(
        f"{FP32_OPS[op]} {record['contenders']['products']['p50_ms']:,.0f} ms" for op, record in records.items()
    )
    text = (
        f"The same ops in fp32 on {_machine(results)} Times over the bare products ({products}).\n\n"
        f"{table(['of the products', *FP32_OPS.values()], rows)}"
    )
    budgets = results["comparisons"].get("ce_budget")
    return text if budgets is None else f"{text}\n\nCross-entropy there. {_time_and_memory(budgets)}"


def topk(results: dict) -> str:
    """``topk_targets`` from hidden states."""
    return f"`topk_targets`, from hidden states. {_times(results, 'topk')}"


def stats(results: dict) -> str:
    """``token_stats`` from hidden states."""
    return f"`token_stats`, from hidden states, without a gradient. {_times(results, 'stats')}"


def precision(results: dict) -> str:
    """Errors of the gradients, by how far the student is from the teacher, and what they cost."""
    fp32, bf16 = records = [results["comparisons"][f"dense_{dtype}"] for dtype in ("fp32", "bf16")]
    names = [n for n in took_part(*records) if not n.startswith("products")]
    distances = list(bf16["contenders"]["kd_kernels"]["errors"])
    header = ["", *(f"{dtype}, TV {tv}" for dtype in ("fp32", "bf16") for tv in distances), "bf16, ms"]

    def cells(result: dict) -> list[str]:
        return [percent(worst_error(result, tv)) for tv in distances]

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
    mebibytes = lambda result: [f"{result['scratch_bytes'] / MIB:,.0f} MiB"]  # noqa: E731
    rows = [
        [label(name, first), *(cell for r in records.values() for cell in _cells(r, name, mebibytes, 1))]
        for name in took_part(*records.values())
    ]
    gradients = ", ".join(
        f"{r['contenders']['kd_kernels']['gradient_bytes'] / MIB:.0f} MiB in {d}" for d, r in records.items()
    )
    text = (
        f"`{first['divergence']}`, {shape_of(first)}; kd-kernels with `max_scratch_bytes` of "
        f"{first['budget_bytes'] / MIB:.0f} MiB. Peak resident memory above the level before the call, less the "
        f"gradients that were asked for ({gradients}); one fp32 matrix of logits is "
        f"{first['logits_bytes'] / MIB:,.0f} MiB.\n\n"
    )
    return text + table(["", *records], rows) + _skipped(*records.values())


# ----------------------------------------------------------------------------------------------------------- on a GPU


def _gpu_block(record: dict) -> str:
    """One comparison: times, ratio, memory, the worst gradient, launches."""
    kind = f"`{record['divergence']}`, " if record["divergence"] else ""

    def cells(result: dict) -> list[str]:
        error = worst_error(result)
        return [
            f"{result['p50_ms']:.1f}", f"{result['p20_ms']:.1f} to {result['p80_ms']:.1f}", f"{result['ratio']:.2f}",
            f"{result['scratch_bytes'] / GIB:.2f}" if "scratch_bytes" in result else "-",
            "-" if error is None else percent(error),
            f"{result['launches']} / {result['host_syncs']}" if "launches" in result else "-",
        ]

    header = ["", "ms", "p20 to p80", "/ products", "scratch, GiB", "worst gradient", "launches / syncs"]
    rows = [[label(name, record), *_cells(record, name, cells, 6)] for name in took_part(record)]
    about = f"`{record['case']}`, {kind}{record['dtype']}, {shape_of(record)}; medians of {record['rounds']} rounds"
    return f"{about}.\n\n{table(header, rows)}{_skipped(record)}"


def gpu(results: dict) -> str:
    """Every comparison on a GPU, one table each."""
    on, bounds = results["machine"], results["ceilings"]
    text = (
        f"{on['model']} (capability {on['capability']}, {on['memory_bytes'] / GIB:.0f} GiB, driver {on['driver']}, "
        f"CUDA {on['cuda']}, Triton {on['triton']}); {_provenance(results)}. Measured ceilings: a copy moves "
        f"{bounds['copy_bytes_per_s'] / 1e9:,.0f} GB/s, a product of {bounds['product']} does "
        f"{bounds['product_flops_per_s'] / 1e12:,.0f} TFLOP/s. Scratch is peak allocated memory less inputs and "
        f"gradients."
    )
    timed = [record for record in results["comparisons"].values() if record["kind"] == "time"]
    return "\n\n".join([text, *(_gpu_block(record) for record in timed)])


# ---------------------------------------------------------------------------------------------- other people's trainers


def drop_in(results: dict) -> str:
    """Their line, our line, and what changes: of what was measured."""
    rows, reasons = [], []
    for name, record in results["comparisons"].items():
        case, sides = integrations.CASES[name], (record["theirs"], record["ours"])
        reasons += [f"Not measured: `{case.theirs}` ({side['skipped']})." for side in sides if "skipped" in side]
        cells = []
        for key, unit, scale in (("peak_bytes", "MiB", MIB), ("p50_ms", "ms", 1)):
            before, after = (f"{side[key] / scale:,.0f}" if key in side else "-" for side in sides)
            cells.append(f"{before} to {after} {unit}")
        rows.append([f"`{case.theirs}`", f"`{case.ours}`", *cells])
    shape, versions = results["shape"], results["versions"]
    measured = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    about = (
        f"{results['machine']['model']}, {results['machine']['cores']} cores; {measured}; {_provenance(results)}. "
        f"Loss and gradients of {shape['rows']:,} tokens over {shape['vocab']:,} ids in fp32: from hidden states of "
        f"width {shape['hidden']}, or one micro-batch of a small Llama of width {shape['width']} in its trainer. Peak "
        f"of resident memory above the level before, gradients included; time on the clock."
    )
    return "\n\n".join([table(["yours", "ours", "memory", "time"], rows), *reasons, about])


def convergence(results: dict) -> str:
    """Whether a run by our loss is the run that it was by theirs."""
    rows = []
    for name, record in results["comparisons"].items():
        first, last = (sum(part) / len(part) for part in (record["ours"][:5], record["ours"][-5:]))
        rows.append([name, f"{first:.3f} to {last:.3f}", f"{100 * record['largest_difference']:.2g}%"])
    header = ["teacher, trainer", "loss, means of the first and the last five", "apart at any step by at most"]
    return (
        f"{results['steps']} steps of AdamW in fp32 by their loss and by ours, of one student on the same batches of "
        f"{results['tokens_a_step']} tokens that the teacher sampled (DistillationTrainer: the student); "
        f"{results['machine']['model']}, "
        f"{_provenance(results)}:\n\n{table(header, rows)}"
    )


# ------------------------------------------------------------------------------------------------------------ the demo


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


# ----------------------------------------------------------------------------------------------------------- the cache


def cache(results: dict) -> str:
    """The commands of the page on the cache, with what they printed."""
    shown = "\n\n".join(f"$ {step['command']}\n{step['output']}" for step in results["commands"])
    return f"With `run.yaml` as\n\n```yaml\n{results['config'].strip()}\n```\n\nthe whole way is\n\n```\n{shown}\n```"


def codec(results: dict) -> str:
    """Bytes, divergence and speed of the cache's rows, and of other layouts; and the reader beside a trainer."""
    rows, others = [], []
    for name, case in results["cases"].items():
        if "cold" not in case:
            others += [f"{name.partition(',')[0]}, {layout}: {size:.0f}" for layout, size in case.items()]
            continue
        speed = case["rows_per_second"]
        rows.append([
            name, f"{case['cold']:.1f}", f"{case['warm']:.1f}", f"{case['kl_mean']:.1e}", f"{case['kl_max']:.1e}",
            *(f"{speed[way] / 1e6:.2f}" for way in ("encode", "decode")),
        ])
    header = ["text, kept, step", "bytes a row", "in a larger cache", "KL, mean", "KL, max", "M rows/s in", "out"]
    reader = results["reader"]
    read, trained = reader["rows_per_second"], reader["trained_tokens_per_second"]
    return (
        f"{2 * results['rows']:,} rows of SmolLM2-135M-Instruct a text, half of them unseen and measured; all files "
        f"count. One core of {_one_moment(results)}.\n\n{table(header, rows)}\n\nOther packings of the same rows, "
        f"without index and checksums, in bytes: {'; '.join(others)}. The reader gives {read:,.0f} rows a second in "
        f"random order, {read / trained:,.0f} times what a ten-layer student of 135M trains on there ({trained:,.0f})."
    )


def fuzz(results: dict) -> str:
    """What the decoder's fuzzer has covered."""
    return (
        f"The decoder must never read out of bounds, whatever the bytes. `{results['command']}`, under the sanitizers "
        f"{results['sanitizers'].replace(',', ' and ')}, ran {results['runs']:,} inputs in {results['seconds']:,} s "
        f"from {results['seeds']} valid blocks, kept {results['corpus']} of them for reaching something new, "
        f"{results['edges']:,} edges in all, and found no fault ({results['moment']['date'][:10]}, commit "
        f"{results['moment']['commit'][:9]})."
    )


# ---------------------------------------------------------------------------------------------------------- the sampler


def _one_moment(results: dict) -> str:
    """Of a file that was written by one run."""
    measured = results["moment"]
    commit = (measured["commit"] or "unknown")[:9] + ("+" if measured["modified"] else "")
    on = results["machine"]
    return f"{on['model']}, torch {on['torch']}; {measured['date'][:10]}, commit {commit}"


def walks(results: dict) -> str:
    """Bytes a clock at which each walk keeps up with its memory, a column a target."""
    devices = {"sm_80": ("A100",), "sm_90": ("H100", "H200"), "sm_100": ("B200",)}
    gives = results["memory_bytes_per_clock"]
    targets = list(dict.fromkeys(kernel["target"] for kernel in results["kernels"]))
    rates: dict[str, dict[str, str]] = {}
    for kernel in results["kernels"]:
        shown = ", ".join(f"{walk['bytes_per_clock']:.0f}" for walk in kernel["walks"])
        rates.setdefault(kernel["name"], {})[kernel["target"]] = shown
    header = ["bytes a clock and multiprocessor", *(f"{', '.join(devices[target])} (`{target}`)" for target in targets)]
    memory = ["what the memory gives at most"]
    memory += [", ".join(f"{gives[device]:.0f}" for device in devices[target]) for target in targets]
    rows = [memory] + [[f"`{name}`", *(found[target] for target in targets)] for name, found in rates.items()]
    versions = results["versions"]
    return f"Triton {versions['triton']}, commit {versions['commit']}.\n\n{table(header, rows)}"


def sampling(results: dict) -> str:
    """Times over that of the bare product of the head, a column a head and number of rows."""
    heads, targets = results["results"], results["targets"]
    names = dict.fromkeys(name for found in heads.values() for name in found)
    cell = lambda row: f"{row['of_product']:.2f}" if "of_product" in row else "-"  # noqa: E731
    rows = [
        [name, *(cell(found.get(name, {})) for found in heads.values()), str(targets.get(name, ""))]
        for name in names if name != "product"
    ]
    products = ", ".join(f"{name}: {found['product']['p50_ms']:,.0f} ms" for name, found in heads.items())
    about = f"From hidden states, over the bare product of the head ({products}). {_one_moment(results)}."
    return f"{about}\n\n{table(['of the product', *heads, 'at most, on a CPU at 256 rows'], rows)}"


def rollouts(results: dict) -> str:
    """Tokens a second of whole roll-outs, beside ``generate()``."""
    rows = [
        [
            name, f"{row['tokens_per_s']:,.0f}", f"{row['generate_tokens_per_s']:,.0f}", f"{row['times_as_fast']:.2f}",
            f"{row['sampler']:.0%}", f"{row['theirs_outside_of_the_model']:.0%}",
        ]
        for name, row in results["results"].items()
    ]
    header = [
        "model, batch, sampling", "tokens/s", "`generate()`", "times as fast", "of it `sample`",
        "theirs, outside of the model",
    ]
    about = (
        "`kd_trainer.rollout.generate` beside transformers' `generate()` of the same model, prompts and lengths, "
        f"in turns. {_one_moment(results)}."
    )
    return f"{about}\n\n{table(header, rows)}"


# --------------------------------------------------------------------------------------------------------- the methods


def command(config: str | None, line: str, printed: str = "") -> str:
    """A YAML file, and a command with what it printed."""
    file = "" if config is None else f"```yaml\n{config.strip()}\n```\n\n"
    return f"{file}```\n$ {line}\n{printed}```"


def example(results: dict, name: str) -> str:
    """A run of docs/methods.md."""
    shown = results["examples"][name]
    metrics = f"\n# lines of metrics.jsonl, some fields left out\n{shown['metrics']}\n" if shown["metrics"] else ""
    return command(shown["config"], shown["command"], f"{shown['output']}\n{metrics}")


def on_policy(results: dict) -> str:
    """Seconds of a step by where its texts come from."""
    rows = [
        [run, origin, f"{found['median_s']:.2f}", f"{found['of_sft']:.2f}", str(found["steps"])]
        for run, origins in results["runs"].items() for origin, found in origins.items()
    ]
    header = ["method", "its texts", "seconds a step", "of SFT's", "steps"]
    made = results["machine"]
    return f"{table(header, rows)}\n\nMedians, on {made['model']}, {made['threads']} threads."


def kid(results: dict) -> str:
    """KID's readings beside each other."""
    columns = {
        f"{key} on {where}": f"{title}, {short}"
        for where, short in (("the text", "text"), ("its own text", "own"))
        for key, title in (("forward_kl", r"KL(p\|\|q)"), ("reverse_kl", r"KL(q\|\|p)"))
    }
    rows = []
    for name, found in results["variants"].items():
        spread = found["deviation"] or {}
        shown = [f"{found['mean'][key]:.3f}" + (f" ± {spread[key]:.3f}" if spread else "") for key in columns]
        rows.append([name, f"{found['processor time over sft']:.2f}", *shown])
    steps, seeds = results["settings"]["steps"], len(results["settings"]["seeds"])
    about = f"{steps} steps, one seed" if seeds == 1 else f"{steps} steps, {seeds} seeds; ± is the standard deviation"
    return table(["", "processor time / SFT", *columns.values()], rows) + f"\n\n{about}."


# ----------------------------------------------------------------------------------------------------------- the study


def study(results: dict) -> str:
    """``kdk study text2sql``: its table, how much was trained, and what it does not have."""
    seeds: dict[str, int] = {}
    for run in results["runs"]:
        seeds[run["method"]] = seeds.get(run["method"], 0) + 1
    size = results["start"]["size"]
    missing = [entry.label for name, entry in lineup.ENTRIES.items() if name not in seeds]
    few = min(seeds.values())
    many = max(seeds.values())
    counts = f"Seeds of each method: {few}" + (f" to {many}" if many > few else "")
    layers = ", ".join(map(str, size["layers"]))
    about = (
        f"Teacher: {size['base']} after {size['teacher_steps']} steps; student: layers {layers} of it "
        f"after {size['start_steps']} steps, from which every method goes on for {size['steps']} steps of about "
        f"{size['batch_tokens']} tokens. {size['dev_questions']} questions, queries run on {size['databases']} seeded "
        f"databases; KL and ExAccErr on {size['fidelity_questions']} of them. {counts}; ± is the standard deviation "
        "over them. Tokens a second are those of runs that shared the machine with others."
    )
    if missing:
        about += f" Not run at this size: {', '.join(missing)}."
    return f"{study_report.table(results)}\n\n{about}"
