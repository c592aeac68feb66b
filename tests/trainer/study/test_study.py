"""``kdk study text2sql`` from end to end on a model of four layers, what it does not do twice, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kd_trainer.cli import main
from kd_trainer.study.options import SIZES, Size, changed

SMALL = (
    "layers=[0, 3]", "max_length=160", "max_new_tokens=12", "teacher_steps=2", "start_steps=2", "steps=2",
    "train_questions=20", "dev_questions=4", "fidelity_questions=4", "fine_tuning_tokens=320", "batch_tokens=320",
    "precision=fp32", "teacher_dtype=float32",
)


def command(tiny: Path, questions: Path, out: Path, *more: str) -> list[str]:
    return [
        "study", "text2sql", "--data", str(questions), "--out", str(out), "--seeds", "2", "--rounds", "2",
        "--set", f"base={tiny}", *SMALL, *more,
    ]


@pytest.fixture(scope="module")
def finished(tiny: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of two methods with two seeds."""
    out = tmp_path_factory.mktemp("study")
    assert main(command(tiny, questions, out, "--methods", "sft", "rkl")) == 0
    return out


def test_every_run_is_in_the_json_and_the_table(finished, tiny, questions, capsys):
    assert main(command(tiny, questions, finished, "--methods", "sft", "rkl", "--only", "report")) == 0
    printed = capsys.readouterr().out
    result = json.loads((finished / "study.json").read_text())
    assert [(run["method"], run["seed"]) for run in result["runs"]] == [("sft", 0), ("sft", 1), ("rkl", 0), ("rkl", 1)]
    for run in result["runs"]:
        assert 0.0 <= run["exact"] <= run["execution"] <= run["valid"] <= 1.0
        assert run["forward_kl"] > 0.0 and run["tokens_per_s"] > 0.0 and run["size"]["steps"] == 2
    assert result["runs"][0]["forward_kl"] != result["runs"][1]["forward_kl"], "seeds that learn alike"
    steps = result["latency"]["steps"]
    assert steps["sft"]["relative"] == steps["sft"]["cpu_relative"] == 1.0 and set(steps) == {"sft", "rkl"}
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    rows = [line.split(" | ")[0] for line in lines[2:]]
    assert rows == ["| teacher", "| start of all students", "| SFT", "| reverse KL"]
    assert len({line.count(" | ") for line in lines}) == 1
    assert (finished / "study.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_there_is_not_done_again(finished, tiny, questions, capsys):
    before = {file: (file.stat().st_mtime_ns, file.read_text()) for file in (finished / "results").glob("*.json")}
    gone = finished / "results" / "rkl-1.json"
    gone.unlink()
    for folder in (finished / "runs").iterdir():
        (folder / "metrics.jsonl").unlink()
    assert main(command(tiny, questions, finished, "--methods", "sft", "rkl")) == 0
    assert capsys.readouterr().out.count("holds this run, finished") == 2, "teacher and start"
    assert [folder.name for folder in (finished / "runs").iterdir() if (folder / "metrics.jsonl").exists()] == ["rkl-1"]
    for file, (time, text) in before.items():
        if file != gone:
            assert (file.stat().st_mtime_ns, file.read_text()) == (time, text)
    again, first = json.loads(gone.read_text()), json.loads(before[gone][1])
    assert again["forward_kl"] == pytest.approx(first["forward_kl"], rel=1e-6) and again["exact"] == first["exact"]


def test_first_has_its_cache_built(finished, tiny, questions):
    assert main(command(tiny, questions, finished, "--methods", "first", "--seeds", "1", "--only", "runs")) == 0
    assert json.loads((finished / "results" / "first-0.json").read_text())["label"] == "FIRST"


@pytest.mark.parametrize(("changes", "message"), [
    (("--methods", "sft", "rlk"), "kdk: study: --methods must be one of sft, fkl, rkl, .*, got 'rlk'"),
    (("--seeds", "0"), "kdk: study: --seeds must be at least 1, got 0"),
    (("--rounds", "0"), "kdk: study: --rounds must be at least 1, got 0"),
    (("--data", "./absent"), "kdk: load_documents: data.source must be .*absent"),
    (("--data", "{empty}"), "kdk: study: --data must hold train.jsonl or .jsonl.gz, got '{empty}'"),
    (("--set", "steps=0"), "kdk: study: steps must be at least 1, got 0"),
    (("--set", "step=3"), "kdk: config: key step must be one of .*did you mean steps"),
    (("--set", "steps"), "kdk: study: --set must be of the form key=value, got 'steps'"),
    (("--set", "lr=-1.0"), "kdk: study: lr must be finite and greater than 0"),
    (("--set", "precision=fp8"), "kdk: study: precision must be one of fp32, bf16, got 'fp8'"),
    (("--set", "base={tiny}", "max_length=20"), "kdk: study: max_length must be above the length of .*, got 20"),
])
def test_mistakes(capsys, tiny, questions, tmp_path, changes, message):
    (tmp_path / "empty").mkdir()
    names = {"tiny": tiny, "empty": tmp_path / "empty"}
    arguments = ["study", "text2sql", "--data", str(questions), "--out", str(tmp_path / "out")]
    assert main(arguments + [change.format(**names) for change in changes]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "kdk:" in line]
    assert len(lines) == 1 and re.search(message.format(**names), lines[0]), lines


def test_results_of_another_size_are_refused(capsys, finished, tiny, questions):
    assert main(command(tiny, questions, finished, "databases=1", "--methods", "sft", "--only", "runs")) == 2
    error = capsys.readouterr().err
    assert "study: databases must be 3 as in" in error and "choose another --out" in error


def test_sizes_can_be_changed_by_key():
    size = changed(SIZES["small"], ["steps=7", "lr=1e-4", "layers=[1, 2]"])
    assert (size.steps, size.lr, size.layers) == (7, 1e-4, (1, 2))
    assert changed(size, []) == size and Size() == SIZES["small"]
