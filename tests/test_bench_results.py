"""From measurements to pages: what results files hold, and that tables, plots and the README show what they say."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import comparisons, machine, memory, plots, render, report, side_by_side, timing  # noqa: E402
from bench.contenders import CONTENDERS, OURS  # noqa: E402
from bench.inputs import Shape  # noqa: E402
from kd_kernels import divergences  # noqa: E402

INVENTED = {"scratch_bytes": 3 << 20, "gradient_bytes": 1 << 20, "peak_bytes": 4 << 20}


def _invented(asked: memory.Request) -> list[dict]:
    measured = {"skipped": "cannot be imported: no trl"} if asked.contender == "trl" else INVENTED
    return [measured] * len(asked.shapes)


@pytest.fixture(scope="module", params=sorted(comparisons.PLANS))
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Every comparison of a plan on a tiny shape on the CPU, with invented memory."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    plan = comparisons.plan(request.param, tiny=True)
    common = ["--out", str(path), "--plan", request.param, "--tiny", "--seconds", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "measure", _invented)
        last = list(plan)[-2:]
        assert side_by_side.main([*common, "--only", *last]) == 0
        first = [name for name in plan if name not in last]
        assert side_by_side.main([*common, "--only", *first]) == 0  # joins them in the file
        assert list(json.loads(path.read_text())["comparisons"]) == list(plan)

        alien = json.loads(path.read_text())
        alien["machine"]["model"] = "another"
        path.with_name("alien.json").write_text(json.dumps(alien))
        with pytest.raises(SystemExit):
            side_by_side.main(["--out", str(path.with_name("alien.json")), "--tiny", "--only", "topk_fp32"])
    return json.loads(path.read_text())


def _records(results: dict) -> list[dict]:
    found = results["comparisons"].values()
    return [r for r in found if r["kind"] != "sweep"] + [p for r in found if r["kind"] == "sweep" for p in r["points"]]


def test_results_hold_all_that_a_reader_needs(results: dict) -> None:
    assert {"model", "cores", "instruction_sets", "torch"} <= results["machine"].keys()
    assert {"copy_bytes_per_s", "product_flops_per_s"} <= results["ceilings"].keys() and not results["failed"]
    for record in results["comparisons"].values():
        assert {"commit", "date", "modified", "load_average", "peers"} <= record["measured"].keys()
    for record in _records(results):
        ours = record["contenders"][OURS]
        assert record["flops"] > 0 and record["bytes"] > 0
        if record["kind"] == "memory":
            assert record["budget_bytes"] == 128 << 20 and ours["scratch_bytes"] == 3 << 20
            continue
        assert record["rounds"] == timing.MIN_ROUNDS
        assert {"p20_ms", "p50_ms", "p80_ms", "min_ms", "ratio", "ratio_of_minima", "errors", "cosines"} <= set(ours)
        assert record["contenders"]["products"]["ratio"] == 1.0
        assert ("products_fp32" in record["contenders"]) == (record["dtype"] == "bfloat16")
        for name, result in record["contenders"].items():
            assert name.startswith("products") or "skipped" in result or result["errors"], name


def test_a_sweep_changes_one_thing(results: dict) -> None:
    for name in ("rows", "vocab"):
        sweep = results["comparisons"][name]
        assert [point["shape"][name] for point in sweep["points"]] == sweep["values"]
        assert all("scratch_bytes" in point["contenders"][OURS] for point in sweep["points"])
    budget = results["comparisons"]["budget"]
    assert [point["budget_bytes"] for point in budget["points"]] == budget["values"]
    assert "torch_eager" in budget["points"][0]["contenders"]
    assert "torch_eager" not in budget["points"][1]["contenders"]  # it knows no budget


def test_what_fails_is_reported_and_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = tmp_path / "new" / "results.json"
    arguments = ["--out", str(path), "--tiny", "--seconds", "0", "--only", "topk_fp32", "ce_fp32"]

    def broken(inputs, divergence, **options):
        return lambda: {"ids": torch.zeros(0), "logprobs": torch.zeros(0), "tail_logprob": torch.zeros(0)}

    def too_large(inputs, divergence):
        raise torch.OutOfMemoryError("as much as there is")

    monkeypatch.setitem(CONTENDERS["topk_targets"], OURS, broken)
    monkeypatch.setitem(CONTENDERS["cross_entropy"], "torch_eager", too_large)
    assert side_by_side.main(arguments) == 1
    content = json.loads(path.read_text())
    assert list(content["comparisons"]) == ["ce_fp32"] and list(content["failed"]) == ["topk_fp32"]
    assert content["comparisons"]["ce_fp32"]["contenders"]["torch_eager"] == {"skipped": "failed: out of memory"}
    assert "topk_fp32 FAILED" in capsys.readouterr().err
    assert any("topk_fp32 FAILED" in line for line in report.lines(content))
    monkeypatch.undo()
    assert side_by_side.main(arguments) == 0 and not json.loads(path.read_text())["failed"]


STUDY_RUN = {
    "method": "kid", "seed": 0, "exact": 0.25, "execution": 0.5, "forward_kl": 1.5, "reverse_kl": 2.5,
    "agreement": 0.75, "excess_error": 12.0, "tokens_per_s": 99.0, "peak_bytes": 2**20,
}
STUDY = {
    "teacher": {"exact": 0.875, "execution": 0.9},
    "start": {"exact": 0.125, "execution": 0.1, "size": {
        "base": "a", "layers": [0, 1], "teacher_steps": 1, "start_steps": 2, "steps": 3, "batch_tokens": 4,
        "dev_questions": 5, "databases": 6, "fidelity_questions": 7,
    }},
    "runs": [STUDY_RUN, STUDY_RUN | {"seed": 1}], "latency": {"steps": {"kid": {"relative": 2.25}}},
}
CACHE = {"config": "out: run\n", "commands": [{"command": "kdk cache info c", "output": "rows 3"}]}
DEMO = {
    "models": {
        "teacher": dict(perplexity=12.34, forward_kl=0.0, reverse_kl=0.0, agreement=1.0, acceptance=1.0, ece=0.02),
    },
    "tokens": 12345, "seconds": {"train": 60.0, "evaluate": 30.0},
}
GPU = {
    "device": "cuda", "model": "a GPU", "capability": "9.0", "memory_bytes": 1 << 37, "driver": None, "cuda": "13",
    "triton": "3.6.0", "torch": "2.11.0",
}

SIDE = {"peak_bytes": 7 << 20, "p50_ms": 4.0}
DROP_IN = {
    "machine": {"model": "a CPU", "cores": 2, "torch": "2.13.0"}, "versions": {"trl": "1.16.0", "torchtune": None},
    "shape": {"rows": 64, "vocab": 100, "hidden": 8, "width": 4},
    "comparisons": {
        "trl_gkd": {
            "theirs": SIDE, "ours": SIDE | {"p50_ms": 2.0},
            "measured": {"date": "2026-01-01", "commit": "a" * 40, "modified": False},
        },
        "torchtune": {
            "theirs": {"skipped": "no torchtune"}, "ours": SIDE,
            "measured": {"date": "2026-01-01", "commit": "a" * 40, "modified": False},
        },
    },
}


CONVERGENCE = {
    "machine": DROP_IN["machine"], "steps": 2, "tokens_a_step": 64,
    "comparisons": {
        "a model, trl": {
            "theirs": [2.0, 1.0], "ours": [2.0, 1.002], "largest_difference": 0.002,
            "measured": {"date": "2026-01-01", "commit": "a" * 40, "modified": False},
        },
    },
}
MOMENT = {"date": "2026-01-01", "commit": "a" * 40, "modified": False}
ON_A_CPU = {"machine": {"model": "a CPU", "torch": "2.13.0"}, "moment": MOMENT}
SAMPLING = ON_A_CPU | {
    "targets": {"sample": 1.15},
    "results": {
        "small, 256 rows": {"product": {"p50_ms": 3.0, "of_product": 1.0}, "sample": {"of_product": 1.04}},
        "large, 256 rows": {"product": {"p50_ms": 5.0, "of_product": 1.0}, "sample": {"skipped": "no room"}},
    },
}
ROLLOUTS = ON_A_CPU | {"results": {"tiny, 1, greedy": {
    "tokens_per_s": 900.0, "generate_tokens_per_s": 800.0, "times_as_fast": 1.12, "sampler": 0.2,
    "theirs_outside_of_the_model": 0.3,
}}}
OTHER_FILES = {
    render.DEMO: DEMO, render.DROP_IN: DROP_IN, render.CONVERGENCE: CONVERGENCE, render.CACHE: CACHE,
    render.STUDY: STUDY, render.SAMPLING: SAMPLING, render.ROLLOUTS: ROLLOUTS, render.GPU_SAMPLING: SAMPLING,
}
"""Beside those of the comparisons."""


def _file_of(results: dict) -> dict[str, dict]:
    """Results of either plan, as the file that the README reads for it."""
    if "dense_fp32" in results["comparisons"]:
        return {render.CPU: results}
    return {render.GPU: results | {"machine": GPU}}


def _files(results: dict) -> dict[str, dict]:
    """The same, with all others."""
    found = _file_of(results) | OTHER_FILES
    return found | ({render.AVX2: results} if render.CPU in found else {})


def _reader(files: dict[str, dict]):
    def read(file: str) -> dict:
        if file not in files:
            raise FileNotFoundError(file)
        return files[file]

    return read


MARKERS = "before\n" + "".join(f"<!-- bench:{n} -->\nold\n<!-- /bench -->\nbetween\n" for n in render.BLOCKS)
MARKERS += "<!-- divergences -->\n<!-- /divergences -->\n<!-- methods -->\n<!-- /methods -->\nafter\n"


def test_rendering_fills_the_markers_and_is_stable(results: dict) -> None:
    files = _files(results)
    new = render.rendered(MARKERS, _reader(files))
    assert new.startswith("before\n") and new.endswith("after\n") and "old\n" not in new
    assert new.count("between\n") == len(render.BLOCKS)
    assert render.rendered(new, _reader(files)) == new
    assert "| teacher | 12.3 | 0.000 | 0.000 | 100.0% | 100.0% | 0.020 |" in new and "1.5 minutes" in new
    assert "| 7 to 7 MiB | 4 to 2 ms |" in new and "ForwardKLWithChunkedOutputLoss` (no torchtune)" in new
    assert "$ kdk cache info c\nrows 3" in new and "| 2.25 | 99 | 1 MiB |" in new and "Seeds of each method: 2" in new
    assert "| a model, trl | 1.501 to 1.501 | 0.2% |" in new
    on_cpu = render.CPU in files
    assert ("Not yet measured on a GPU." in new) == on_cpu and ("3 MiB" in new) == on_cpu
    assert ("The same ops in fp32" in new) == on_cpu
    assert ("cpu_rows.png" if on_cpu else "gpu_rows.png") in new

    slower = copy.deepcopy(files)
    first = next(iter(slower[render.CPU if on_cpu else render.GPU]["comparisons"].values()))
    first["contenders"][OURS]["ratio"] = 98.76
    assert "98.76" in render.rendered(new, _reader(slower))


def test_every_row_of_a_table_has_all_columns(results: dict) -> None:
    files = _files(results)
    for file, content in files.items():
        for block in (block for block in render.BLOCKS.values() if block.file == file):
            text = block.text(_reader({file: content}))
            for lines in text.split("\n\n"):
                rows = [line for line in lines.splitlines() if line.startswith("|")]
                assert len({line.replace(r"\|", "").count("|") for line in rows}) <= 1, text


def test_plots_are_drawn_and_know_what_they_show(results: dict, tmp_path: Path) -> None:
    (file, content), = _file_of(results).items()
    (tmp_path / file).write_text(json.dumps(content))
    asked = ["--results", str(tmp_path)]
    assert plots.main([*asked, "--check"]) == 1
    assert plots.main(asked) == 0 and plots.main([*asked, "--check"]) == 0
    drawn = sorted((tmp_path / "plots").iterdir())
    names = ("rows", "vocab", "budget") if file == render.GPU else tuple(plots.PLOTS)  # its ceilings were a CPU's
    assert [path.name for path in drawn] == sorted(f"{file[:3]}_{name}.png" for name in names)
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 100_000
    content["comparisons"]["rows"]["points"][0]["contenders"][OURS]["p50_ms"] *= 2
    assert plots.stale(content, tmp_path / "plots") == [f"{file[:3]}_rows.png"]


def test_labels_are_moved_apart() -> None:
    moved = plots.spread([10.0, 0.0, 11.0, 50.0], 14.0)
    assert sorted(range(4), key=moved.__getitem__) == [1, 0, 2, 3]
    assert min(b - a for a, b in zip(sorted(moved), sorted(moved)[1:])) >= 14.0
    assert sum(moved) == pytest.approx(71.0)


def test_rendering_refuses_a_marker_without_a_block() -> None:
    with pytest.raises(KeyError, match="no-such"):
        render.rendered("<!-- bench:no-such -->\n<!-- /bench -->")


def test_check_names_what_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / render.DEMO).write_text(json.dumps(DEMO))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:demo -->\n<!-- /bench -->\n<!-- divergences -->\n<!-- /divergences -->\n")
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    monkeypatch.setattr(render, "PAGES", (readme,))
    assert render.main(["--check"]) == 1
    assert "README.md is stale: demo, divergences" in capsys.readouterr().err
    assert render.main([]) == 0 and render.main(["--check"]) == 0


def test_divergence_table_has_every_divergence_and_its_range() -> None:
    lines = {line.split("`")[1]: line for line in render.divergence_table().splitlines()[2:]}
    assert list(lines) == list(divergences.REGISTRY)
    assert "`beta` in (0, 1)" in lines["jsd"] and "0.693 at beta=0.5" in lines["jsd"]
    assert "`m = beta p + (1 - beta) q`" in lines["jsd"]
    assert "other than 0 and -alpha" in lines["alpha_beta"]
    for line in lines.values():
        assert line.replace(r"\|", "").count("|") == 6, line


def test_pages_show_the_results() -> None:
    pages = [page.read_text() for page in render.PAGES]
    assert {m["name"] for text in pages for m in render.MARKED.finditer(text)} >= set(render.BLOCKS)
    assert all(render.rendered(text) == text for text in pages), "run python -m bench.render"
    if not (render.RESULTS / render.GPU).exists():
        assert "Not yet measured on a GPU." in render.README.read_text()


def test_pictures_show_the_results() -> None:
    for file in plots.FILES:
        if (render.RESULTS / file).exists():
            stale = plots.stale(render.read_results(file), render.RESULTS / "plots")
            assert not stale, "run python -m bench.plots"


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    """Of kd-kernels on two budgets, and of plain torch, whose matrices of logits are all there."""
    shape = Shape(rows=512, vocab=16384, student_hidden=16, teacher_hidden=16)
    logits = 4 * 512 * 16384
    ask = lambda name, *budgets: memory.measure(memory.Request(  # noqa: E731
        "kd_loss_dense", name, "forward_kl", "float32", (shape,) * len(budgets), budgets
    ))
    small, large = ask(OURS, 2 << 20, 16 << 20)
    assert small["gradient_bytes"] == large["gradient_bytes"] == 4 * 16 * (512 + 16384)
    assert 0 < small["scratch_bytes"] < large["scratch_bytes"] < logits / 2
    assert ask("torch_eager", None)[0]["scratch_bytes"] > 2 * logits


def test_machine_names_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    described = machine.describe()
    assert described["cores"] >= 1 and described["model"] and described["device"] == "cpu"
    monkeypatch.setattr(machine, "_git", lambda *arguments: None)  # a copy without its history
    monkeypatch.setenv("KD_COMMIT", "0123abc")
    assert machine.moment()["commit"] == "0123abc" and machine.moment()["modified"] is None
