"""DistiLLM: its losses, the schedule replayed from recorded losses, a teacher not asked twice, a corpus beside."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter, deque

import pytest
import torch

import oracles
from kd_kernels import divergences, topk_targets
from kd_trainer import methods
from kd_trainer.config import Config, from_tree, to_yaml
from kd_trainer.data import Document, Plan
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective
from kd_trainer.teachers import LiveTeacher
from kd_trainer.tokens import OffPolicyTokens, ReplayBuffer, Schedule, uniform
from kd_trainer.trainer import load_parts, train
from objective_judge import VOCAB, check, toy
from processes import launch_kdk

SKEWED = {
    "skew_forward_kl(alpha=0.1)": lambda p, q: oracles.skew_forward_kl(p, q, 0.1),
    "skew_reverse_kl(alpha=0.1)": lambda p, q: oracles.skew_reverse_kl(p, q, 0.1),
}


@pytest.mark.parametrize("name", SKEWED)
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_the_loss(name, ce_weight):
    objective = DivergenceObjective(divergences.parse(name), kd_weight=1.0 - ce_weight, ce_weight=ce_weight)

    def oracle(case):
        rows = case.batch.counted
        p, q, labels = case.teacher_logprobs()[rows], case.logprobs()[rows], case.batch.labels[rows]
        return (1 - ce_weight) * SKEWED[name](p, q).sum() - ce_weight * q.gather(1, labels[:, None]).sum()

    case = toy()
    check(objective, case, oracle, case.teacher)


@pytest.mark.parametrize("name", SKEWED)
@pytest.mark.parametrize("k", [3, VOCAB])
def test_the_loss_on_replay(name, k):
    """From the k likeliest tokens and the mass of the others: the bucketed divergence, or the full one."""
    case = toy()
    targets = topk_targets(case.teacher, k)

    def oracle(case):
        total = 0.0
        for row in case.batch.counted.tolist():
            p, q = case.teacher_logprobs()[row], case.logprobs()[row]
            ids = p.topk(k).indices
            if k < VOCAB:
                p, q = oracles.coarsen(p, ids), oracles.coarsen(q, ids)
            total = total + SKEWED[name](p, q).sum()
        return total

    check(DivergenceObjective(divergences.parse(name)), case, oracle, targets)


# ----------------------------------------------------------------------------------------------------- the schedule


class Echo:
    """Writes a text's own tokens again, as new documents."""

    def write(self, documents, step):
        return [Document(document.tokens.clone(), document.first_target) for document in documents]


def recorded(losses: list[float]):
    """A validation that reads what it finds from a record."""
    left = iter(losses)
    return lambda: next(left)


@pytest.mark.parametrize("fresh", ["decreasing", "constant", "increasing"])
def test_the_schedule_replayed_from_recorded_losses(fresh):
    """Against the schedule written out once more, over four hundred steps in which the loss rises, falls and rises."""
    steps, every, capacity = 400, 20, 50
    losses = [3.0 + 0.8 * math.sin(i / 2) + 0.1 * i for i in range(1 + steps // every)]
    texts = [Document(torch.tensor([i, i + 1, i + 2]), 1) for i in range(30)]
    source = DatasetTokens(texts, Plan([3] * 30, 12, seed=1))
    buffer = ReplayBuffer(capacity)
    schedule = Schedule(steps, validate_every=every, fresh=fresh)
    tokens = OffPolicyTokens(source, Echo(), buffer, recorded(losses), schedule, seed=9)

    phi, reference, memory, seen = 0.0, losses[0], deque(maxlen=capacity), Counter()
    for t in range(1, steps + 1):
        documents = tokens.step(t - 1)
        produced = tokens.produce(documents, t - 1)
        r = uniform(9, t - 1, "origin")
        threshold = {"decreasing": phi * (1 - t / steps), "constant": phi * 0.5, "increasing": phi * t / steps}[fresh]
        if r < threshold or (r < phi and len(memory) < capacity):
            expected = "written"
            memory.extend(produced)
            assert [d.tokens.tolist() for d in produced] == [d.tokens.tolist() for d in documents]
            assert not any(a is b for a, b in zip(produced, documents))
        elif r < phi:
            expected = "replayed"
            assert len(produced) == len(documents) and all(any(d is kept for kept in memory) for d in produced)
        else:
            expected = "text"
            assert all(a is b for a, b in zip(produced, documents))
        seen[expected] += 1
        assert tokens.origin == expected, t
        assert list(buffer.documents) == list(memory)
        logged = tokens.after_step(t - 1, {})
        if t % every == 0:
            loss = losses[t // every]
            assert logged["validation_loss"] == loss
            if loss >= reference + 0.1:
                phi, reference = min(phi + 0.1, 1.0), loss
        else:
            assert "validation_loss" not in logged
        assert logged["threshold"] == tokens.threshold == pytest.approx(phi)
        assert (logged["written"], logged["replayed"]) == (expected == "written", expected == "replayed")
    assert phi > 0.3 and min(seen[origin] for origin in ("written", "replayed", "text")) > 20, (phi, seen)


def test_a_threshold_that_stays_validates_nothing():
    texts = [Document(torch.tensor([1, 2, 3]), 1)]
    source = DatasetTokens(texts, Plan([3], 3, seed=1))
    schedule = Schedule(5, threshold=1.0, raise_by=0.0)
    tokens = OffPolicyTokens(source, Echo(), ReplayBuffer(2), recorded([]), schedule, seed=0)
    for step in range(5):
        tokens.produce(texts, step)
        assert tokens.after_step(step, {})["threshold"] == 1.0


# -------------------------------------------------------------------------------------------------------- as a method


@pytest.fixture
def config(make_config, teacher_folder):
    def make(**changes):
        tree = {
            "method": "distillm", "teacher": {"model": teacher_folder},
            "rollout": {"prompt_tokens": 6, "max_new_tokens": 8},
            "data": {"max_length": 32, "limit": 12, "holdout": 0.3}, "train": {"steps": 14, "batch_tokens": 96},
        }
        options = {"threshold": 1.0, "raise_by": 0.0, "capacity": 8, "fresh": "constant"}
        for key, value in changes.items():
            tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
        return make_config(**(tree | {"options": options | changes.get("options", {})}))

    return make


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("replay_k", [16, 0])
def test_replay_skips_the_teacher(replay_k, config, tmp_path, monkeypatch):
    """The teacher reads once for every step whose texts are new, and for each replayed one only with replay_k = 0."""
    passes = Counter()
    whole = LiveTeacher.targets

    def counting(self, batch):
        passes["teacher"] += 1
        return whole(self, batch)

    monkeypatch.setattr(LiveTeacher, "targets", counting)
    train(config(options={"replay_k": replay_k}))
    lines = metrics(tmp_path / "run")
    written, replayed = sum(line["written"] for line in lines), sum(line["replayed"] for line in lines)
    assert written + replayed == len(lines) == 14 and written >= 4 and replayed >= 4
    assert passes["teacher"] == (written if replay_k else written + replayed)
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_replayed_text_at_another_temperature_and_with_all_tokens_is_as_if_read_again(config, tmp_path):
    """k = the whole vocabulary leaves no tail: the run is the one whose teacher reads again, to rounding."""
    for name, k in (("kept", 257), ("again", 0)):
        train(config(out=str(tmp_path / name), options={"replay_k": k}, objective={"temperature": 2.0}))
    for kept, again in zip(metrics(tmp_path / "kept"), metrics(tmp_path / "again"), strict=True):
        assert kept["replayed"] == again["replayed"]
        assert kept["loss"] == pytest.approx(again["loss"], rel=1e-3)


def test_a_resumed_run_goes_on_with_the_buffer_and_what_the_teacher_said(config, tmp_path, monkeypatch):
    """From the checkpoint before a replayed step: the same lines, and no pass of the teacher for that step."""
    kept = {"save_every": 1, "keep_checkpoints": 99}
    train(config(train=kept))
    whole = metrics(tmp_path / "run")
    at = next(i for i in range(2, 13) if whole[i]["replayed"] and whole[i - 1]["written"])
    shutil.rmtree(tmp_path / "run" / "model")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > at:
            shutil.rmtree(folder)
    passes, read = [], LiveTeacher.targets
    monkeypatch.setattr(LiveTeacher, "targets", lambda self, batch: passes.append(batch) or read(self, batch))
    train(config(train=kept))
    drop = "tokens_per_s"
    for one, other in zip(whole, metrics(tmp_path / "run"), strict=True):
        assert {key: one[key] for key in one if key != drop} == {key: other[key] for key in other if key != drop}
    assert len(passes) == sum(line["written"] for line in whole[at:]) < len(whole[at:])


def test_two_processes_with_a_buffer_each(config, tmp_path):
    """Until something is replayed they are the run of one; then each replays what it wrote itself."""
    runs = {name: config(out=str(tmp_path / name), train={"steps": 8, "batch_tokens": 192}, options={"capacity": 16})
            for name in ("one", "two")}
    train(runs["one"])
    (tmp_path / "two.yaml").write_text(to_yaml(runs["two"]))
    launch_kdk(["train", str(tmp_path / "two.yaml")], timeout=300)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    alike = next(i for i, line in enumerate(one) if line["replayed"])
    assert alike >= 1 and len(two) == 8
    for a, b in zip(one[:alike], two[:alike]):
        assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert any(line["replayed"] for line in two) and all(math.isfinite(line["loss"]) for line in two)


def test_the_corpus_beside(config, tmp_path, text):
    built = config(options={"lm_source": str(text), "lm_weight": 2.0})
    method = methods.build(built, load_parts(built)[0])
    groups = method.group(method.tokens.produce(method.tokens.step(0), 0))
    tokens = {tag: sum(map(len, group)) for tag, group in groups.items()}
    assert set(groups) == {"main", "lm"} and tokens["lm"] == pytest.approx(96, abs=32)
    assert method.objectives["lm"].has_teacher is False and method.objectives["lm"].ce_weight == 2.0
    train(built)
    options = {"lm_source": str(text), "lm_weight": 2.0}
    train(config(out=str(tmp_path / "split"), options=options, train={"accumulation": 3}))
    for whole, split in zip(metrics(tmp_path / "run"), metrics(tmp_path / "split"), strict=True):
        assert whole["loss"] == pytest.approx(whole["main/divergence"] + 2.0 * whole["lm/next_token_loss"], rel=1e-5)
        assert whole["loss"] == pytest.approx(split["loss"], rel=1e-3)


def test_the_loss_on_held_out_text_raises_the_threshold(config, tmp_path):
    """A student that is ruined by its learning rate: phi goes up at the first validation."""
    options = {"threshold": 0.7, "raise_by": 0.2, "tolerance": 0.0, "validate_every": 2}
    train(config(options=options, optim={"lr": 0.3, "warmup": 0.0}, train={"steps": 4}))
    lines = metrics(tmp_path / "run")
    assert ["validation_loss" in line for line in lines] == [False, True, False, True]
    assert lines[1]["validation_loss"] > 6  # a uniform guess has 5.5
    assert lines[0]["threshold"] == 0.7 and lines[1]["threshold"] == pytest.approx(0.9)


@pytest.mark.parametrize(("changes", "message"), [
    ({"options": {"threshold": 1.5}}, r"options.threshold must be in \[0, 1\], got 1.5"),
    ({"options": {"raise_by": -0.1}}, r"options.raise_by must be in \[0, 1\], got -0.1"),
    ({"options": {"tolerance": -1.0}}, "options.tolerance must be at least 0, got -1.0"),
    ({"options": {"capacity": 0}}, "options.capacity must be at least 1, got 0"),
    ({"options": {"validate_every": 0}}, "options.validate_every must be at least 1, got 0"),
    ({"options": {"replay_k": -1}}, "options.replay_k must be at least 0, got -1"),
    ({"options": {"lm_weight": 0.0}}, "options.lm_weight must be finite and greater than 0, got 0.0"),
    ({"options": {"fresh": "never"}}, "options.fresh must be one of decreasing, constant, increasing, got 'never'"),
    ({"objective": {"divergence": "skew_reverse_kl(alpha=1.0)"}}, r"alpha must be in \(0, 1\), got 1.0"),
    ({"cache": "c"}, "cache must be absent for method distillm, whose teacher must run"),
])
def test_settings_out_of_range(changes, message):
    base = {"out": "o", "student": {"model": "m"}, "teacher": {"model": "t"}, "data": {"source": "d"}}
    with pytest.raises(ValueError, match=message):
        from_tree(Config, base | {"method": "distillm"} | changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"rollout": {"prompt_tokens": None}}, "rollout.prompt_tokens must be given for texts without a prompt"),
    ({"objective": {"kd_weight": 0.0, "ce_weight": 1.0}}, "objective.kd_weight must be above 0 for method distillm"),
    ({"options": {"capacity": 1}}, "options.capacity must be at least the [0-9]+ texts of a step, got 1"),
    (
        {"data": {"holdout": 0.0}, "options": {"raise_by": 0.1}},
        "data.holdout must be above 0 for method distillm, got 0.0; its schedule goes by the loss on those texts",
    ),
])
def test_settings_that_do_not_fit_together(changes, message, config):
    built = config(**changes)
    with pytest.raises(ValueError, match=message):
        methods.build(built, load_parts(built)[0])
