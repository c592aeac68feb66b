"""Configurations: what is written is what is run, and mistakes are named."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path

import pytest

from kd_trainer import registry
from kd_trainer.config import (
    Config, DataConfig, ObjectiveConfig, RolloutConfig, StudentConfig, TeacherConfig, from_tree, load_config, to_yaml,
)
from kd_trainer.methods import gkd

MINIMAL = {"out": "o", "method": "sft", "student": {"model": "m"}, "data": {"source": "d"}}


def changed(**changes) -> dict:
    tree = dict(MINIMAL)
    for key, value in changes.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return tree


def test_every_default_is_written_and_read_back(tmp_path):
    tree = changed(student={"model": None, "layers": [0, 3]}, teacher={"model": "t"}, optim={"lr": 1e-4})
    config = from_tree(Config, tree)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    assert "weight_decay: 0.0" in path.read_text() and "tail: bucket" in path.read_text()


def test_overrides_reach_into_sections_and_keep_types(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("out: o\nmethod: sft\nstudent: {model: m}\ndata: {source: d}\noptim: {lr: 3e-4}\n")
    config = load_config(path, ["optim.lr=1e-5", "train.steps=7", "data.packing=false", "student.layers=[0, 2]",
                                "student.model=null", "teacher.model=t"])
    assert config.optim.lr == 1e-5 and config.train.steps == 7 and config.data.packing is False
    assert config.student.layers == (0, 2)
    assert load_config(path).optim.lr == 3e-4  # YAML 1.1 reads 3e-4 as text


@pytest.mark.parametrize(("tree", "message"), [
    (changed(methd="kd"), "config: key methd must be one of out, method, cache, .*, got 'methd'; did you mean method"),
    (
        changed(objective={"temprature": 2}),
        "key objective.temprature must be one of divergence, .*did you mean objective.temperature",
    ),
    (changed(train={"steps": "many"}), "train.steps must be of type int, got 'many'"),
    (changed(train={"steps": True}), "train.steps must be of type int, got True"),
    (changed(optim={"lr": "fast"}), "optim.lr must be of type float, got 'fast'"),
    (changed(optim={"betas": [0.9]}), r"optim.betas must be a list of 2 values, got \[0.9\]"),
    (MINIMAL | {"data": "text.txt"}, "data must be a section with keys, got 'text.txt'"),
    (changed(optim={"lr": -1.0}), "optim.lr must be finite and greater than 0, got -1.0"),
    (changed(method="gdk"), "method must be one of .*kd, .*sft.*, got 'gdk'"),
    (changed(student={"layers": [0]}), r"exactly one of model and layers, got model='m' and layers=\(0,\)"),
    (changed(student={"model": None, "layers": [0]}), "teacher.model must be given when the student is cut"),
    (changed(method="kd"), "teacher.model or cache must be given for method kd, got None; method: sft needs neither"),
    (changed(cache="c"), "cache must be absent for method sft"),
    (changed(more_teachers=[{"model": "t"}]), "more_teachers must be absent for method sft"),
    (changed(options={"alpha": 0.2}), "key options.alpha must be one of"),
    (changed(options=3), "options must be those of method sft, got int"),
    (changed(rollout={"top_p": 0.0}), r"rollout.top_p must be in \(0, 1\], got 0.0"),
    (changed(rollout={"max_new_tokens": 0}), "rollout.max_new_tokens must be at least 1, got 0"),
    (changed(objective={"divergence": "forward"}), "forward"),
    (changed(objective={"divergence": "jsd(beta=2)"}), "beta"),
    (changed(objective={"temperature": 0}), "objective.temperature must be finite and greater than 0, got 0.0"),
    (changed(objective={"tail": "cut"}), "objective.tail must be one of bucket, renormalize, drop"),
    (changed(data={"part": "holdout"}), "data.holdout must be above 0 with part=holdout"),
    (changed(data={"max_length": 1}), "data.max_length must be at least 2, got 1"),
    (changed(train={"precision": "fp8"}), "train.precision must be one of fp32, bf16"),
    (changed(train={"batch_tokens": 0}), "train.batch_tokens must be at least 1, got 0"),
    (changed(teacher={"dtype": "int8"}), "teacher.dtype must be one of float32, bfloat16, float16"),
    (changed(seed=-1), "seed must be in 0..2\\^31 - 1, got -1"),
    (changed(out=""), "out must be the folder of the run"),
])
def test_mistakes_are_named(tree, message):
    with pytest.raises(ValueError, match=message):
        from_tree(Config, tree)


@pytest.mark.parametrize("name", registry.specs())
def test_python_and_yaml_give_the_same_run(name):
    """What the paper decides stands where nothing was written, key by key, however the configuration is made."""
    spec = registry.spec(name)
    tree, given = changed(method=name), {"out": "o", "method": name, "student": StudentConfig("m")}
    if "cache" in spec.needs:
        tree["cache"] = given["cache"] = "c"
    elif spec.has_teacher:
        tree["teacher"], given["teacher"] = {"model": "t"}, TeacherConfig("t")
    if "several teachers" in spec.needs:
        tree["more_teachers"], given["more_teachers"] = [{"model": "t"}], (TeacherConfig("t"),)
    whole = Config(**given, data=DataConfig("d"))
    assert whole == from_tree(Config, tree) and pickle.loads(pickle.dumps(whole)) == whole
    sections = {"rollout": {"max_new_tokens": 6}, "objective": {"tail": "drop"}, "data": {"max_length": 64}}
    part = Config(
        **given, data=DataConfig("d", max_length=64), objective=ObjectiveConfig(tail="drop"),
        rollout=RolloutConfig(max_new_tokens=6),
    )
    assert part == from_tree(Config, changed(**tree | sections | {"data": {"source": "d", "max_length": 64}}))
    for section, values in spec.defaults.items():
        for key, value in values.items():
            assert getattr(getattr(part, section), key) == value
    plain = Config(  # the sections' own defaults, written
        **given, data=DataConfig("d", append_eos=False),
        objective=ObjectiveConfig("forward_kl", ce_weight=0.0, temperature=1.0),
        rollout=RolloutConfig(temperature=1.0, top_p=None),
    )
    assert (plain.objective, plain.rollout.temperature) == (ObjectiveConfig(kd_weight=plain.objective.kd_weight), 1.0)
    assert dataclasses.replace(plain, seed=3).objective == plain.objective


def test_options_of_a_class_that_methods_share():
    given = dict(out="o", student=StudentConfig("m"), teacher=TeacherConfig("t"), data=DataConfig("d"))
    mixed = Config(method="f_distill", options=gkd.Options(each="text"), **given)
    assert mixed.options == gkd.Options(0.5, 0.5, "text")
    assert Config(method="f_distill", options=gkd.Options(teacher=0.0), **given).options.teacher == 0.0
    with pytest.raises(ValueError, match="options must be those of method kid, got Options"):
        Config(method="kid", options=gkd.Options(), **given)


def test_modules_of_ones_own_are_imported_first(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_specs", dict(registry.specs()))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_my_own.py").write_text(
        "from kd_trainer.methods.sft import build\nfrom kd_trainer.registry import MethodSpec, register\n"
        "register(MethodSpec('of_my_own', '', '', build))\n"
    )
    assert from_tree(Config, changed(method="of_my_own", imports=["of_my_own"])).imports == ("of_my_own",)
    with pytest.raises(ValueError, match="imports must be modules that Python finds, got 'nowhere.at_all'; put its"):
        from_tree(Config, changed(imports=["nowhere.at_all"]))
    (tmp_path / "lacking.py").write_text("import nothing_of_that_name")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        from_tree(Config, changed(imports=["lacking"]))


@pytest.mark.parametrize(("content", "overrides", "message"), [
    ("- a list", [], "must be a YAML mapping, got list"),
    ("a: [", [], "must be YAML, got"),
    ("out: o", ["steps"], "override must be of the form key=value, got 'steps'"),
    ("out: o", ["out.x=1"], "out.x must be a key inside a section, got out, which holds a value"),
])
def test_files_that_are_no_configuration(tmp_path, content, overrides, message):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_config(path, overrides)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("path must be an existing YAML file, got")):
        load_config(tmp_path / "absent.yaml")


EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_configurations(path):
    load_config(path)


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
