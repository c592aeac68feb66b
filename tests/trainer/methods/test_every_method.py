"""Every method by its name: it lowers its own objective, splitting a step changes nothing, and a resumed run is the
same run.

A method that is registered and has no entry in CASES fails here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd_trainer import registry
from kd_trainer.caching.build import build_cache
from kd_trainer.caching.options import CacheOptions
from kd_trainer.config import DataConfig
from kd_trainer.tiny import save_tiny_model
from kd_trainer.trainer import train

WRITTEN = {"prompt_tokens": 6, "max_new_tokens": 12}
CASES: dict[str, dict] = {
    "baby_llama": {"teachers": 2},
    "bash": {"options": {"round_steps": 3, "first_fraction": 0.1}},
    "churn": {"teachers": 1},
    "comblm": {"teachers": 2},
    "dco": {"options": {"samples": 4}},
    "distillm": {
        "teachers": 1, "rollout": WRITTEN, "data": {"holdout": 0.3},
        "options": {"threshold": 0.9, "validate_every": 2, "capacity": 18, "fresh": "constant"},
    },
    "distillm2": {"teachers": 1, "rollout": WRITTEN, "options": {"adaptive": True, "ramp": True}},
    "f_distill": {"teachers": 1, "rollout": WRITTEN, "options": {"each": "text"}},
    "first": {"cached": True},
    "gkd": {"teachers": 1, "rollout": WRITTEN, "options": {"each": "text"}},
    "griffin": {"teachers": 1, "student": {"model": None, "layers": [3]}, "options": {"align_k": 40}},
    "idk": {"options": {"token": "<end>"}},
    "imitkd": {"teachers": 1, "rollout": WRITTEN},
    "kd": {"teachers": 1, "objective": {"divergence": "jsd(beta=0.3)"}},
    "kid": {"teachers": 1, "options": {"mask": "<end>", "mle": "text"}},
    "layerskip": {},
    "masked_thought": {"options": {"mask": "<end>"}},
    "mix_distillation": {"options": {"sources": ["<text>"], "weights": [0.5, 0.5]}},
    "mixce": {},
    "muscle": {"teachers": 2},
    "pesf_kd": {"teachers": 1},
    "profuser": {
        "teachers": 2, "options": {"first_stage": 0.34, "infer_weight": 0.01},
        "rollout": {"prompt_tokens": 8, "max_new_tokens": 6},
    },
    "rac": {"options": {"round_steps": 3, "template": " so:"}, "rollout": {"prompt_tokens": 8, "max_new_tokens": 6}},
    "sel": {"teachers": 1, "options": {"labels": "text"}},
    "sequence_match": {"options": {"backspace": "Ā", "mistakes": 0.1, "refresh": 2}, "rollout": WRITTEN},
    "seqkd": {"teachers": 1, "rollout": WRITTEN},
    "sft": {},
    "skd": {"teachers": 1, "rollout": WRITTEN, "options": {"last_k": 5, "gamma": 2, "last_gamma": 4}},
    "tgeo_kd": {"teachers": 1, "data": {"holdout": 0.3}},
    "supervised_kd": {"cached": True},
}
"""By name: how many live teachers a method has here, or whether it has a cache of one, and what it is told beside its
defaults; <text> stands for the text file."""


WITHOUT_DROPOUT = {"pesf_kd": {"options": {"dropout": 0.0}}}
"""By name: what is said beside where a step is split, which changes what is dropped."""


LOWERED = {"tgeo_kd": "held_out_loss"}
"""By name: the metric that a method lowers, where it is not its loss (whose terms it weighs anew in every step)."""


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = []
    for seed in (11, 12):
        torch.manual_seed(seed)
        folders.append(tmp_path_factory.mktemp("teacher"))
        save_tiny_model(folders[-1])
    return list(map(str, folders))


@pytest.fixture(scope="module")
def cache(teachers, text, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cache") / "cache"
    build_cache(teachers[0], DataConfig(source=str(text), max_length=32, limit=12), folder, CacheOptions(k=8))
    return str(folder)


@pytest.fixture
def method_config(make_config, teachers, cache, text):
    """A run of a method on a dozen short texts, all of them in every step."""

    def make(name: str, out: Path, changes: Mapping[str, dict] = {}, **train_changes):
        case = json.loads(json.dumps(CASES[name] | changes).replace("<text>", str(text)))
        count = case.pop("teachers", 0)
        if case.pop("cached", False):
            case["cache"] = cache
        if count:
            case["teacher"] = {"model": teachers[0]}
        if count > 1:
            case["more_teachers"] = [{"model": model} for model in teachers[1:count]]
        case.setdefault("data", {}).update(max_length=32, limit=12)
        settings = {"steps": 6, "batch_tokens": 12 * 32, "save_every": 2} | train_changes
        return make_config(out=str(out), method=name, train=settings, optim={"lr": 2e-3, "warmup": 0.0}, **case)

    return make


def metrics(out: Path) -> list[dict]:
    drop = ("tokens_per_s",)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in drop} for line in lines]


def test_every_method_has_a_case():
    assert sorted(CASES) == sorted(registry.specs())


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_run_lowers_its_objective_and_resumes_exactly(name, method_config, tmp_path, killed_at):
    whole = train(method_config(name, tmp_path / "whole"))
    losses = [line[LOWERED.get(name, "loss")] for line in metrics(tmp_path / "whole")]
    assert losses[-1] < losses[0], losses

    with killed_at(3):
        train(method_config(name, tmp_path / "halves"))
    torch.rand(3)  # the generator is somewhere else now
    halves = train(method_config(name, tmp_path / "halves"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "halves")
    one, other = (load_file(model / "model.safetensors") for model in (whole, halves))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", sorted(CASES))
def test_micro_batches_change_nothing(name, method_config, tmp_path):
    changes = WITHOUT_DROPOUT.get(name, {})
    train(method_config(name, tmp_path / "one", changes, steps=2))
    train(method_config(name, tmp_path / "three", changes, steps=2, accumulation=3))
    for whole, split in zip(metrics(tmp_path / "one"), metrics(tmp_path / "three"), strict=True):
        assert whole.keys() == split.keys()
        for key, value in whole.items():
            assert split[key] == pytest.approx(value, rel=2e-4, abs=1e-5), key
