"""Every integration names the versions that it was tested with and refuses others, before it does anything."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from kd_trainer.integrations.hf import KDCallback
from kd_trainer.integrations.versions import OLDEST_TORCH, TESTED
from trainers import lora_of, model

installed = importlib.metadata.version
ROOT = Path(__file__).resolve().parents[2]


def pretend(monkeypatch: pytest.MonkeyPatch, package: str, version: str | None) -> None:
    def found(name: str) -> str:
        if name != package:
            return installed(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)


def import_anew(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.delitem(sys.modules, f"kd_trainer.integrations.{module}", raising=False)
    importlib.import_module(f"kd_trainer.integrations.{module}")


@pytest.mark.parametrize(
    ("module", "package", "version", "tested"),
    (
        ("liger", "liger-kernel", "0.7.0", "0.8.*"), ("torchtune", "torchtune", "0.5.0", "0.6.*"),
        ("trl", "trl", "1.17.0", "1.16.*"), ("trl", "transformers", "4.57.1", "5.23.*"),
        ("trl", "accelerate", "1.14.0", "1.15.*"),
    ),
)
def test_another_version_is_refused_on_import(
    monkeypatch, module: str, package: str, version: str, tested: str
) -> None:
    if module == "trl":
        pytest.importorskip("trl", reason="trl is not installed")
    pretend(monkeypatch, package, version)
    message = f'{package} must be {tested}, got {version}; run: pip install "{package}=={tested}"'
    with pytest.raises(RuntimeError, match=re.escape(message)):
        import_anew(monkeypatch, module)


def test_signatures_alone_need_no_package(monkeypatch) -> None:
    for module, package in (("liger", "liger-kernel"), ("torchtune", "torchtune")):
        pretend(monkeypatch, package, None)
        import_anew(monkeypatch, module)


def test_an_older_torch_than_the_librarys_is_refused_on_import(monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cu128"))
    message = 'torch must be 2.11 or newer, got 2.9.1+cu128; run: pip install "torch>=2.11"'
    with pytest.raises(RuntimeError, match=re.escape(message)):
        import_anew(monkeypatch, "torch")


def test_lightnings_example_refuses_another_version(monkeypatch) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    pretend(monkeypatch, "lightning", "2.5.0")
    with pytest.raises(RuntimeError, match=re.escape("lightning must be 2.6.*, got 2.5.0")):
        runpy.run_path(str(ROOT / "examples" / "lightning_module.py"))


def test_what_is_tested_is_what_the_projects_extra_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch>={OLDEST_TORCH}" in project["dependencies"]
    pins = dict(wish.split("==") for wish in project["optional-dependencies"]["integrations"] if "==" in wish)
    assert {package: (".".join(pins[package].split(".")[:2]),) for package in TESTED} == TESTED


def test_transformers_and_peft_are_looked_at_when_they_are_used(monkeypatch) -> None:
    student = lora_of(model(1))
    for package, version, tested in (("transformers", "4.57.1", "5.23.*"), ("accelerate", "1.16.0", "1.15.*")):
        with monkeypatch.context() as patch, pytest.raises(
            RuntimeError, match=re.escape(f"{package} must be {tested}, got {version}; run: pip install")
        ):
            pretend(patch, package, version)
            KDCallback(model(2))
    pretend(monkeypatch, "peft", "0.15.0")
    with pytest.raises(RuntimeError, match=re.escape("attach: peft must be 0.21.*, got 0.15.0")):
        KDCallback("adapter-off").on_init_end(arguments(), None, None, model=student)


def arguments():
    from transformers import TrainingArguments

    return TrainingArguments(use_cpu=True)
