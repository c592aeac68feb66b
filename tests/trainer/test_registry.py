"""Methods by name: what a paper decides, what a user changes, and methods of one's own."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kd_trainer import registry
from kd_trainer.cli import main
from kd_trainer.config import Config, from_tree
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, cross_entropy
from kd_trainer.registry import MethodSpec, register
from kd_trainer.rollout import step_seed
from kd_trainer.teachers import NoTeacher
from kd_trainer.trainer import train

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


@dataclass(frozen=True)
class Halved:
    weight: float = 0.5


@pytest.fixture
def halved():
    """A method that a user wrote: every second document by half the loss."""

    @dataclass(frozen=True)
    class Tagged(DatasetTokens):
        def produce(self, documents, index):
            return [dataclasses.replace(d, tag="odd" if d.key % 2 else "even") for d in documents]

    class Scaled(DivergenceObjective):
        def loss(self, student, targets, batch, normalizer, max_scratch_bytes=None):
            return super().loss(student, targets, batch, normalizer / self.kept, max_scratch_bytes)

    def build(config, parts):
        odd = Scaled.of(config, kd_weight=0.0, ce_weight=1.0)
        odd.kept = config.options.weight
        return Method("halved", Tagged.of(config, parts.documents), NoTeacher(), {"odd": odd, "even": cross_entropy()})

    defaults = {"optim": {"lr": 2e-3}, "rollout": {"top_p": 0.9}}
    spec = register(MethodSpec("halved", "odd documents count half", "no paper", build, Halved, defaults))
    yield spec
    del registry._specs["halved"]


def test_a_method_of_ones_own_runs_by_name(halved, make_config):
    config = make_config(method="halved", options={"weight": 0.25}, train={"steps": 2, "accumulation": 2})
    assert config.options == Halved(0.25)
    train(config)
    last = json.loads((Path(config.out) / "metrics.jsonl").read_text().splitlines()[-1])
    total = 0.25 * last["odd/next_token_loss"] + last["even/next_token_loss"]
    assert last["loss"] == pytest.approx(total, rel=1e-6)
    assert "weight: 0.25" in (Path(config.out) / "config.yaml").read_text()


def test_the_pages_method_of_ones_own_runs_as_it_stands_there(tiny, text, tmp_path, monkeypatch, capsys):
    section = PAGE.read_text().split("## A method of one's own")[1]
    monkeypatch.setattr(registry, "_specs", dict(registry.specs()))
    monkeypatch.setitem(sys.modules, "rare", None)
    monkeypatch.delitem(sys.modules, "rare")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for language, file in (("python", "rare.py"), ("yaml", "rare.yaml")):
        Path(file).write_text(section.split(f"```{language}\n")[1].split("```")[0])
    Path("teacher").symlink_to(tiny)
    Path("text.jsonl").symlink_to(text)
    assert main(["train", "rare.yaml"]) == 0 and "runs/rare/model" in capsys.readouterr().out
    assert len(Path("runs/rare/metrics.jsonl").read_text().splitlines()) == 3
    written = Path("runs/rare/config.yaml").read_text()
    assert all(line in written for line in ("below: 0.9", "divergence: reverse_kl", "kd_weight: 1.0", "- rare"))
    assert main(["train", "rare.yaml", "options.below=2"]) == 2
    assert "options.below must be in (0, 1], got 2" in capsys.readouterr().err
    assert main(["methods", "--imports", "rare"]) == 0 and "no paper" in capsys.readouterr().out
    assert main(["methods", "--imports", "nowhere.at_all"]) == 2
    assert "imports must be modules that Python finds, got 'nowhere.at_all'" in capsys.readouterr().err


def test_what_the_paper_decides_gives_way_to_what_is_written(halved):
    tree = {"out": "o", "method": "halved", "student": {"model": "m"}, "data": {"source": "d"}}
    default = from_tree(Config, tree)
    assert default.optim.lr == 2e-3 and default.rollout.top_p == 0.9 and default.options == Halved(0.5)
    written = from_tree(Config, tree | {"optim": {"lr": 1e-5, "clip": 0.5}, "rollout": {"top_p": None}})
    assert (written.optim.lr, written.optim.clip, written.rollout.top_p) == (1e-5, 0.5, None)


def test_a_name_is_given_once(halved):
    with pytest.raises(ValueError, match="name must be free, got 'halved'"):
        register(halved)
    with pytest.raises(ValueError, match="needs of other must be among .*, got a reward model"):
        register(MethodSpec("other", "", "", halved.build, needs=("a reward model",)))
    with pytest.raises(ValueError, match="options of other must be a Section, since .* got Halved"):
        register(MethodSpec("other", "", "", halved.build, Halved, {"options": {"weight": 0.1}}))


def test_every_method_is_listed_with_its_source_and_needs(capsys):
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    for name, spec in registry.specs().items():
        assert name in printed and spec.summary in printed and spec.source in printed
        assert spec.summary and spec.source
        spec.options()  # every setting has a default


def test_seeds_differ_by_step_and_purpose():
    seeds = {step_seed(seed, step, use) for seed in range(3) for step in range(50) for use in ("sample", "mask")}
    assert len(seeds) == 300 and all(0 <= seed < 2**63 for seed in seeds)
    assert torch.tensor(list(seeds)).dtype == torch.int64
