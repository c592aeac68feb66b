"""The benchmarks' own arithmetic, their refusal of wrong results, and that the README shows what the results say.

Nothing here is timed: every op runs on a tiny shape, and times that come out are looked at for their presence alone.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import contenders, inputs, machine, memory, render, side_by_side, timing  # noqa: E402
from bench.cases import CASES, WrongResult  # noqa: E402
from bench.inputs import Shape  # noqa: E402
from kd_kernels import divergences  # noqa: E402

TINY = Shape(rows=20, vocab=300, student_hidden=12, teacher_hidden=16, kept=8)


# --------------------------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize(
    ("case", "mode", "flops", "elements", "entries"),
    [
        # 6 N Hs V + 2 N Ht V; both hidden states and weights read, two gradients written.
        ("kd_loss_dense", "gradient", 2 * 20 * 300 * (3 * 12 + 16), 2 * (20 * 12 + 300 * 12) + 20 * 16 + 300 * 16, 0),
        ("kd_loss_dense", "loss", 2 * 20 * 300 * (12 + 16), 20 * 12 + 300 * 12 + 20 * 16 + 300 * 16, 0),
        ("kd_loss_sparse", "gradient", 6 * 20 * 300 * 12, 2 * (20 * 12 + 300 * 12), 20 * (8 * 12 + 12)),
        ("topk_targets", "targets", 2 * 20 * 300 * 16, 20 * 16 + 300 * 16, 20 * (8 * 12 + 12)),
    ],
)
def test_formulas_of_flops_and_bytes(case: str, mode: str, flops: int, elements: int, entries: int) -> None:
    assert CASES[case].flops(mode, TINY) == flops
    assert CASES[case].bytes(mode, TINY, torch.float32) == 4 * elements + entries
    assert CASES[case].bytes(mode, TINY, torch.bfloat16) == 2 * elements + entries


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_floor_multiplies_what_the_formula_says(case) -> None:
    made = inputs.build(TINY, torch.float32)
    for mode in case.products:
        floor = case.floor(mode, made)
        with FlopCounterMode(display=False) as counted:
            floor()
        assert counted.get_total_flops() == case.flops(mode, TINY)


def test_inputs_are_as_far_apart_as_asked_and_no_uniform_noise() -> None:
    made = inputs.build(dataclasses.replace(TINY, rows=100), torch.float32, total_variation=0.1, repeat_rows=True)
    hidden, weight, teacher_hidden, teacher_weight = (x.detach().double() for x in made.tensors)
    student, teacher = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
    total_variation = 0.5 * (student.softmax(1) - teacher.softmax(1)).abs().sum(1)[:64].mean().item()
    assert total_variation == pytest.approx(0.1, rel=0.02)
    assert 2 < teacher.std() < 8
    assert torch.equal(made.student_hidden[64:], made.student_hidden[:36])


@pytest.mark.parametrize("case", ("kd_loss_dense", "kd_loss_sparse"))
def test_wrong_gradients_are_not_timed(case: str) -> None:
    made = inputs.build(TINY, torch.float32)
    result = CASES[case].run(made, "gradient")
    CASES[case].verify(made, result)
    for name in ("loss", "student_hidden", "student_weight"):
        wrong = result | {name: 1.001 * result[name]}
        with pytest.raises(WrongResult, match=f"{case}.*{name}.*not timed"):
            CASES[case].verify(made, wrong)


def test_wrong_targets_are_not_timed() -> None:
    made = inputs.build(TINY, torch.float32)
    case = CASES["topk_targets"]
    result = case.run(made, "targets")
    case.verify(made, result)
    # An id that is not among the best, with its own true logprob.
    ids, logprobs = (result[name].reshape(TINY.rows, -1).clone() for name in ("ids", "logprobs"))
    true = (made.teacher_hidden @ made.teacher_weight.t()).log_softmax(1)
    ids[3, 5] = true[3].argmin()
    logprobs[3, 5] = true[3].min()
    with pytest.raises(WrongResult, match="missed"):
        case.verify(made, result | {"ids": ids, "logprobs": logprobs})
    with pytest.raises(WrongResult, match="tail_logprob"):
        case.verify(made, result | {"tail_logprob": result["tail_logprob"] + 1e-3})


def test_every_row_runs() -> None:
    """bench/ itself, each row on a tiny shape, with its check against float64."""
    command = [sys.executable, "-m", "pytest", "bench", "--tiny", "--benchmark-disable", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 24 + len(divergences.REGISTRY) + 4


# ---------------------------------------------------------------------------------------------------------- contenders


@pytest.mark.parametrize("divergence", ("jsd(beta=0.3)", "forward_kl", "reverse_kl"))
@pytest.mark.parametrize("name", [n for n in contenders.DENSE if n != "torch_compile"])  # which takes half a minute
def test_contenders_compute_the_same_loss(name: str, divergence: str) -> None:
    made = inputs.build(TINY, torch.float32)
    try:
        run = contenders.DENSE[name](made, divergence)
    except contenders.Unavailable as reason:
        pytest.skip(f"bench: {name} {reason}")
    CASES["kd_loss_dense"].verify(made, run(), divergence=divergence)


def test_a_peer_without_the_divergence_says_so() -> None:
    with pytest.raises(contenders.Unavailable, match="has no total_variation"):
        contenders.trl_dense(inputs.build(TINY, torch.float32), "total_variation")


# -------------------------------------------------------------------------------------------------------------- timing


def test_rounds_alternate_and_warm_up() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = timing.interleaved(runs, seconds=0.0, before_each=lambda: calls.append("-"))
    assert "".join(calls) == "-a-b-c" + "-a-b-c" + "-b-c-a" + "-c-a-b"
    assert {name: len(ms) for name, ms in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_summary_and_ratio() -> None:
    times = [float(x) for x in range(11)]
    assert timing.summary(times) == {"p20_ms": 2.0, "p50_ms": 5.0, "p80_ms": 8.0, "min_ms": 0.0}
    # A round that was slow for both says as much as the others.
    assert timing.ratio([2.0, 40.0, 2.2], [1.0, 20.0, 1.0]) == 2.0


# ---------------------------------------------------------------------------------------- side by side, memory, README


def _tiny(comparison):
    changes = {"shape": TINY}
    if isinstance(comparison, side_by_side.Comparison):
        changes["contenders"] = side_by_side.without(comparison.contenders, "torch_compile")
        changes["total_variations"] = comparison.total_variations[-1:]
    return dataclasses.replace(comparison, **changes)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Every comparison of times on a tiny shape, with invented memory."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side, "COMPARISONS", {n: _tiny(c) for n, c in side_by_side.COMPARISONS.items()})
        patch.setattr(memory, "measure", lambda name, *_: (
            {"scratch_bytes": 3 << 20, "gradient_bytes": 1 << 20, "peak_bytes": 4 << 20}
            if name != "trl" else {"skipped": "cannot be imported: no trl"}
        ))
        timed = [n for n in side_by_side.COMPARISONS if not n.startswith("memory")]
        side_by_side.main(["--out", str(path), "--seconds", "0", "--only", *timed])
        side_by_side.main(["--out", str(path), "--only", "memory_fp32", "memory_bf16"])  # joins the others in the file
        assert list(json.loads(path.read_text())["comparisons"]) == list(side_by_side.COMPARISONS)

        alien = json.loads(path.read_text())
        alien["machine"]["model"] = "another"
        path.with_name("alien.json").write_text(json.dumps(alien))
        with pytest.raises(SystemExit):
            side_by_side.main(["--out", str(path.with_name("alien.json")), "--only", "topk_fp32"])
    return json.loads(path.read_text())


def test_results_hold_all_that_a_reader_needs(results: dict) -> None:
    assert {"model", "cores", "instruction_sets", "torch"} <= results["machine"].keys()
    for name, record in results["comparisons"].items():
        assert {"commit", "date", "modified", "load_average", "peers"} <= record["measured"].keys()
        ours = record["contenders"]["kd_kernels"]
        if record["kind"] == "memory":
            assert record["budget_bytes"] == 128 << 20 and ours["scratch_bytes"] == 3 << 20
            continue
        assert record["flops"] > 0 and record["bytes"] > 0 and record["rounds"] == timing.MIN_ROUNDS
        assert {"p20_ms", "p50_ms", "p80_ms", "min_ms", "ratio", "ratio_of_minima", "errors"} <= set(ours), name
        assert record["contenders"]["products"]["ratio"] == 1.0
        assert ("products_fp32" in record["contenders"]) == (record["dtype"] == "bfloat16")


DEMO = {
    "models": {
        "teacher": dict(perplexity=12.34, forward_kl=0.0, reverse_kl=0.0, agreement=1.0, acceptance=1.0, ece=0.02),
    },
    "tokens": 12345, "seconds": {"train": 60.0, "evaluate": 30.0},
}


def test_rendering_fills_the_markers_and_is_stable(results: dict) -> None:
    files = {render.SIDE_BY_SIDE: results, render.DEMO: DEMO}
    text = "before\n" + "".join(f"<!-- bench:{n} -->\nold\n<!-- /bench -->\nbetween\n" for n in render.TABLES)
    text += "<!-- divergences -->\n<!-- /divergences -->\nafter\n"
    new = render.rendered(text, files.__getitem__)
    assert new.startswith("before\n") and new.endswith("after\n") and "old\n" not in new
    assert new.count("between\n") == len(render.TABLES)
    assert render.rendered(new, files.__getitem__) == new
    assert "3 MiB" in new and "cannot be imported: no trl" in new
    assert "| teacher | 12.3 | 0.000 | 0.000 | 100.0% | 100.0% | 0.020 |" in new and "1.5 minutes" in new

    slower = copy.deepcopy(results)
    slower["comparisons"]["dense_fp32"]["contenders"]["kd_kernels"]["ratio"] = 98.76
    assert "98.76" in render.rendered(new, (files | {render.SIDE_BY_SIDE: slower}).__getitem__)


def test_every_row_of_a_table_has_all_columns(results: dict) -> None:
    for name, (_, text_of) in render.TABLES.items():
        rows = [line for line in text_of(DEMO if name == "demo" else results).splitlines() if line.startswith("|")]
        blocks = {len(re.findall(r"(?<!\\)\|", line)) for line in rows}
        assert len(blocks) <= 1, name


def test_rendering_refuses_a_marker_without_a_table_or_results() -> None:
    with pytest.raises(KeyError, match="no-such"):
        render.rendered("<!-- bench:no-such -->\n<!-- /bench -->")
    with pytest.raises(FileNotFoundError, match="missing.json"):
        render.rendered("<!-- bench:topk -->\n<!-- /bench -->", lambda file: render.read_results("missing.json"))


def test_check_names_what_is_stale(results: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / render.SIDE_BY_SIDE).write_text(json.dumps(results))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:topk -->\n<!-- /bench -->\n<!-- divergences -->\n<!-- /divergences -->\n")
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    monkeypatch.setattr(render, "README", readme)
    assert render.main(["--check"]) == 1
    assert "stale: topk, divergences" in capsys.readouterr().err
    assert render.main([]) == 0 and render.main(["--check"]) == 0


def test_divergence_table_has_every_divergence_and_its_range() -> None:
    lines = {line.split("`")[1]: line for line in render.divergence_table().splitlines()[2:]}
    assert list(lines) == list(divergences.REGISTRY)
    assert "`beta` in (0, 1)" in lines["jsd"] and "0.693 at beta=0.5" in lines["jsd"]
    assert "`m = beta p + (1 - beta) q`" in lines["jsd"]
    assert "other than 0 and -alpha" in lines["alpha_beta"]
    for line in lines.values():
        assert len(re.findall(r"(?<!\\)\|", line)) == 6, line


def test_readme_shows_the_results() -> None:
    text = render.README.read_text() if render.README.exists() else ""
    if not render.BLOCK.search(text):
        pytest.skip("bench: README.md has no markers to render between")
    assert render.rendered(text) == text, "run python -m bench.render"


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    shape = Shape(rows=512, vocab=16384, student_hidden=16, teacher_hidden=16)
    budget, logits = 4 << 20, 4 * 512 * 16384
    measured = memory.measure("kd_kernels", "forward_kl", "float32", shape, budget)
    assert measured["gradient_bytes"] == 4 * 16 * (512 + 16384)
    assert 0 < measured["scratch_bytes"] < logits / 2  # two fp32 matrices of logits were never there
    assert memory.measure("torch_eager", "forward_kl", "float32", shape, budget)["scratch_bytes"] > 2 * logits


def test_machine_names_the_processor() -> None:
    described = machine.describe()
    assert described["cores"] >= 1 and described["model"] and described["device"] == "cpu"
