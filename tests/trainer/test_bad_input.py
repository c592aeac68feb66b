"""Mistakes that several methods share: each is an error before the first step, and names the option and the remedy."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kd_kernels.cache import CacheError, CacheReader
from kd_trainer import memory, registry
from kd_trainer.caching.build import build_cache
from kd_trainer.caching.options import CacheOptions
from kd_trainer.config import Config, from_tree
from kd_trainer.memory import free_memory, weight_bytes
from kd_trainer.methods.base import DatasetTokens, Method, cross_entropy
from kd_trainer.models import CausalLM, load_pretrained
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import LiveTeacher, NoTeacher
from kd_trainer.trainer import train


def needing(*needs: str) -> list[str]:
    return [name for name, spec in registry.specs().items() if set(needs) & set(spec.needs)]


def given(method: str, **changes) -> Config:
    tree = {"out": "o", "method": method, "student": {"model": "m"}, "data": {"source": "d"}, **changes}
    return from_tree(Config, tree)


TEACHERS = {"teacher": {"model": "t"}, "more_teachers": [{"model": "u"}]}


@pytest.mark.parametrize("method", needing("live teacher"))
def test_a_live_teacher_is_no_cache(method):
    teachers = TEACHERS if "several teachers" in registry.spec(method).needs else {"teacher": {"model": "t"}}
    with pytest.raises(ValueError, match=f"cache must be absent for method {method}, whose teacher must run"):
        given(method, cache="c", **teachers)
    with pytest.raises(ValueError, match=f"teacher.model must be given for method {method}, got None; its teacher"):
        given(method, cache="c")


@pytest.mark.parametrize("method", needing("live teacher", "teacher", "cache"))
def test_a_method_without_its_teacher(method):
    with pytest.raises(ValueError, match=f"(teacher.model|cache) must be given for method {method}, got None; "):
        given(method)


@pytest.mark.parametrize("method", needing("several teachers"))
def test_one_teacher_where_several_are_needed(method):
    with pytest.raises(ValueError, match=f"more_teachers must be at least one for method {method}, got none"):
        given(method, teacher={"model": "t"})


@pytest.mark.parametrize("method", [name for name, spec in registry.specs().items() if not spec.has_teacher])
def test_a_cache_that_nobody_reads(method):
    with pytest.raises(ValueError, match=f"cache must be absent for method {method}, which has no teacher"):
        given(method, cache="c")


# -------------------------------------------------------------------------------------------------- what a cache lacks


@pytest.fixture
def cache(make_config, tiny, tmp_path):
    folder = tmp_path / "cache"
    build_cache(str(tiny), make_config().data, folder, CacheOptions(k=3))
    return str(folder)


def test_fewer_tokens_than_first_recalibrates(make_config, cache):
    message = "options.k must be at most the 3 that the cache keeps, got 5; build it with kdk cache build --k 5"
    with pytest.raises(ValueError, match=message):
        train(make_config(method="first", cache=cache))


@pytest.mark.parametrize("method", [name for name in needing("teacher") if name not in ("churn", "sel")])
def test_a_temperature_that_the_cache_has_no_normaliser_for(make_config, cache, method):
    data = {"holdout": 0.3}  # which tgeo_kd asks for
    with pytest.raises(ValueError, match="objective.temperature must be 1 or one of the cache's .*--temperatures 1 2"):
        train(make_config(method=method, cache=cache, objective={"temperature": 2.0}, data=data))


def test_labels_that_a_cache_cannot_draw(make_config, cache):
    with pytest.raises(ValueError, match='options.labels must be "text" with a cache, got "teacher"; a cache cannot'):
        train(make_config(method="sel", cache=cache))


def test_next_tokens_that_the_cache_says_nothing_about(make_config, cache, monkeypatch):
    lookup = CacheReader.lookup

    def without(self, *args, **kwargs):  # as of a server that was not asked for it
        rows = lookup(self, *args, **kwargs)
        return dataclasses.replace(rows, next_logprobs=rows.next_logprobs.index_fill(0, torch.tensor([4]), torch.nan))

    monkeypatch.setattr(CacheReader, "lookup", without)
    message = "must hold the teacher's log-probability of every next token, got none at row 4 .* kdk cache build"
    with pytest.raises(CacheError, match=message):
        train(make_config(method="sel", cache=cache, options={"labels": "text"}))


# ----------------------------------------------------------------------------------------------- nothing to learn from


class Silent(DatasetTokens):
    """What a roll-out leaves where every completion is empty: prompts alone."""

    def produce(self, documents, index):
        return [dataclasses.replace(document, labels=torch.full((len(document) - 1,), -100)) for document in documents]


def test_roll_outs_that_produce_nothing(make_config, monkeypatch):
    monkeypatch.setattr(registry, "_specs", dict(registry.specs()))

    def build(config, parts):
        return Method.single("silent", Silent.of(config, parts.documents), NoTeacher(), cross_entropy())

    register(MethodSpec("silent", "", "", build))
    message = "a step must be left with tokens that count, got none; were all roll-outs empty"
    with pytest.raises(ValueError, match=message):
        train(make_config(method="silent"))


def test_prompts_that_leave_no_room_for_a_completion(make_config, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "what is it that sits over there? ", "completion": "a cat."}\n')
    with pytest.raises(ValueError, match="at least one completion token, got none in 1 texts .*raise data.max_length"):
        train(make_config(data={"source": str(path), "max_length": 16}))


# --------------------------------------------------------------------------------------------------- too large a model


def test_a_model_that_does_not_fit_is_not_loaded(make_config, tiny, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # would be called
    message = r"model must be a model that fits into the 0.00 GiB that are free on cpu, got .* with weights of 0.00 GiB"
    with pytest.raises(ValueError, match=message + r"; load it in bfloat16 \(teacher.dtype, .*kdk cache build"):
        train(make_config(method="kd", teacher={"model": str(tiny)}))


def test_a_teacher_that_does_not_fit_beside_the_student(tiny, monkeypatch):
    teacher = LiveTeacher(CausalLM(load_pretrained(str(tiny))), "")
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000)
    batch = type("OnDevice", (), {"rows": torch.zeros(1, device="meta")})
    with pytest.raises(ValueError, match="train: teacher.model must be a model that fits into .* free on meta, got"):
        teacher.targets(batch)


def test_the_size_of_a_model(tiny):
    config, model = AutoConfig.from_pretrained(tiny), load_pretrained(str(tiny))
    state = torch.get_rng_state()
    assert weight_bytes(config, torch.bfloat16) == 2 * sum(p.numel() for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())  # asking costs a run none of its draws


def test_free_memory_is_the_least_that_is_said(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:  4000 kB\n", "/sys/fs/cgroup/memory.max": "3000000\n",
        "/sys/fs/cgroup/memory.current": "1000000\n", "/sys/fs/cgroup/memory.stat": "anon 7\ninactive_file 500000\n",
    }

    def read(path):
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr("pathlib.Path.read_text", read)
    cpu = torch.device("cpu")
    assert free_memory(cpu) == 2_500_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert free_memory(cpu) == 4000 * 1024
    files.clear()
    assert free_memory(cpu) is None


# ----------------------------------------------------------------------------------------------- settings out of range


@pytest.mark.parametrize(("method", "options", "message"), [
    ("baby_llama", {"space": "rank"}, "options.space must be one of logit, prob, got 'rank'"),
    ("churn", {"old_weight": 0.0}, r"options.old_weight must be in \(0, 1\], got 0.0; method: sft has no old model"),
    ("first", {"k": 1}, "options.k must be at least 2, got 1"),
    ("first", {"delta": 1.0}, r"options.delta must be in \[0, 1\), got 1.0"),
    ("first", {"temperature": 0.0}, "options.temperature must be finite and greater than 0, got 0.0"),
    ("first", {"recalibration": "mixup"}, "options.recalibration must be one of temperature, smoothing, none, got"),
    ("layerskip", {"scale": "cube"}, "options.scale must be one of one, l, sum, sqrt, inverse, got 'cube'"),
    ("layerskip", {"rotation": 0}, "options.rotation must be at least 1, got 0"),
    ("mix_distillation", {"weights": [0.5, -0.5]}, r"options.weights must be finite and above 0, got \[0.5, -0.5\]"),
    ("muscle", {"judge": "nobody"}, "options.judge must be one of student, new, got 'nobody'"),
    ("pesf_kd", {"alpha": 0.0}, r"options.alpha must be in \(0, 1\], got 0.0"),
    ("pesf_kd", {"temperature": float("inf")}, "options.temperature must be finite and greater than 0, got inf"),
    ("pesf_kd", {"width": 0}, "options.width must be at least 1, got 0"),
    ("pesf_kd", {"dropout": 1.0}, r"options.dropout must be in \[0, 1\), got 1.0"),
    ("sel", {"labels": "student"}, "options.labels must be one of teacher, text, got 'student'"),
])
def test_settings_out_of_range(method, options, message):
    with pytest.raises(ValueError, match=f"config: {message}"):
        given(method, options=options)
