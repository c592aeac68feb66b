"""A tiny model, its tokenizer and a text, made once for all tests of the trainer."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from kd_trainer.config import Config, from_tree
from kd_trainer.tiny import save_tiny_model, tiny_texts
from kd_trainer.trainer import learning_rate
from transformers_fixtures import fresh_accelerator, one_thread  # noqa: F401  (for every test of this folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained four-layer Llama with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty sentences as JSON lines."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in tiny_texts(60)))
    return path


@pytest.fixture
def make_config(tiny: Path, text: Path, tmp_path: Path):
    """A short run on the tiny model; sections and keys can be changed: ``make_config(train={"steps": 3})``."""

    def make(**changes) -> Config:
        tree = {
            "out": str(tmp_path / "run"), "method": "sft", "student": {"model": str(tiny)},
            "data": {"source": str(text), "max_length": 48}, "optim": {"lr": 1e-3},
            "train": {"steps": 4, "batch_tokens": 256, "tensorboard": False, "plot": False},
        }
        for key, value in changes.items():
            tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
        return from_tree(Config, tree)

    return make


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch):
    """``with killed_at(step):`` a training inside of it dies as that step, counted from 0, begins."""

    class Killed(Exception):
        pass

    @contextlib.contextmanager
    def killed(step: int):
        def dies(index, *rest):
            if index == step:
                raise Killed
            return learning_rate(index, *rest)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr("kd_trainer.trainer.learning_rate", dies)
            yield

    return killed
