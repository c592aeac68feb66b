"""GKD and its named points: the objective over all that models can write, lambda in frequency, whose words count."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from built_method import assert_rows_close

import oracles
from kd_trainer import methods, registry, rollout
from kd_trainer.config import Config, from_tree, to_yaml
from kd_trainer.data import Plan, collate
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective
from kd_trainer.teachers import LiveTeacher
from kd_trainer.tokens import MixedTokens, Writer
from kd_trainer.trainer import load_parts, train
from processes import launch_kdk
from toy_models import NEW, PROMPT, logprobs, sequence_logprob, texts, toy_model

SHARES = {
    "gkd": (0.5, 0.0), "imitkd": (0.5, 0.0), "f_distill": (0.5, 0.5), "seqkd": (0.0, 1.0), "supervised_kd": (0.0, 0.0),
}
TERMS = {
    "gkd": lambda p, q: oracles.jsd(p, q, 0.5), "imitkd": oracles.forward_kl, "f_distill": oracles.total_variation,
    "supervised_kd": oracles.forward_kl,
}
BASE = {"out": "o", "student": {"model": "m"}, "teacher": {"model": "t"}, "data": {"source": "d"}}


@pytest.fixture(scope="module")
def models():
    return toy_model(1), toy_model(2)


def objective_of(name: str) -> DivergenceObjective:
    return DivergenceObjective.of(from_tree(Config, BASE | {"method": name}))


@pytest.mark.parametrize("name", SHARES)
def test_the_objective_over_all_that_can_be_written(name, models):
    """Value and gradient of E_y D(y), with the chance of y held: no gradient passes through the drawing."""
    student, teacher = models
    objective, listed = objective_of(name), texts()
    author = teacher if name == "seqkd" else student
    chance = torch.stack([sequence_logprob(author, text) for text in listed]).detach().exp()
    assert float(chance.sum()) == pytest.approx(1.0, abs=1e-5) and float(chance.max()) < 0.5

    def oracle(text):
        if name == "seqkd":
            return -sequence_logprob(student, text)
        p, q = logprobs(teacher, text).detach(), logprobs(student, text)
        return TERMS[name](p, q).sum()

    student.zero_grad()
    expected = sum(weight * oracle(text) / NEW for weight, text in zip(chance, listed))
    expected.backward()
    wanted = {key: parameter.grad.clone() for key, parameter in student.named_parameters()}

    student.zero_grad()
    total, live = 0.0, LiveTeacher(teacher, "t")
    for weight, text in zip(chance, listed):
        batch = collate([text], 8)
        targets = live.targets(batch) if objective.has_teacher else None
        loss = objective(student, targets, batch, objective.count(text)).loss
        (weight * loss).backward()
        total += float(weight * loss.detach())
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    for key, parameter in student.named_parameters():  # norms are in fp32 whatever the weights are
        assert_rows_close(parameter.grad, wanted[key], 1e-5)
    assert max(float(gradient.abs().max()) for gradient in wanted.values()) > 1e-2


def test_a_students_own_words_as_labels_teach_it_nothing(models):
    """In expectation the gradient is 0, which is why such a configuration is refused."""
    student = models[0]
    student.zero_grad()
    scores = torch.stack([sequence_logprob(student, text) for text in texts()])
    (scores.detach().exp() * scores).sum().backward()
    assert max(float(parameter.grad.abs().max()) for parameter in student.parameters()) < 1e-5


def test_students_write_what_they_are_likely_to_write(models):
    """Frequencies of all 25 continuations against the product of the student's own probabilities."""
    student, listed = models[0], texts()
    chance = torch.stack([sequence_logprob(student, text) for text in listed]).detach().exp()
    writer = Writer(student, rollout.Options(max_new_tokens=NEW), seed=1, purpose="student")
    counts, steps = Counter(), 120
    for step in range(steps):
        for written in writer.write(listed, step):
            assert torch.equal(written.tokens[: len(PROMPT)], PROMPT)
            counts[tuple(written.tokens[len(PROMPT) :].tolist())] += 1
    expected = {tuple(text.tokens[len(PROMPT) :].tolist()): 25 * steps * float(c) for text, c in zip(listed, chance)}
    large = {end: mean for end, mean in expected.items() if mean >= 5}
    rare = sum(expected.values()) - sum(large.values()), sum(counts.values()) - sum(counts[end] for end in large)
    chi = sum((counts[end] - mean) ** 2 / mean for end, mean in large.items())
    chi += (rare[1] - rare[0]) ** 2 / max(rare[0], 1.0)
    assert chi < len(large) + 4 * math.sqrt(2 * len(large)), chi


@pytest.mark.parametrize("each", ["step", "text"])
def test_the_mixture_minimises_the_mixed_objective(each, models):
    """The mean loss of what the source produces is (1 - lambda) L(data) + lambda sum_y q(y) L(y)."""
    student, teacher = models
    share, data = 0.3, texts()[7:9]
    loss = {}
    for text in texts():
        p, q = logprobs(teacher, text).detach(), logprobs(student, text).detach()
        loss[tuple(text.tokens.tolist())] = float(oracles.jsd(p, q, 0.5).sum() / NEW)
    on_policy = sum(
        float(sequence_logprob(student, text).detach().exp()) * loss[tuple(text.tokens.tolist())] for text in texts()
    )
    on_data = sum(loss[tuple(text.tokens.tolist())] for text in data) / len(data)
    expected = (1 - share) * on_data + share * on_policy
    writer = Writer(student, rollout.Options(max_new_tokens=NEW), seed=1, purpose="student")
    source = MixedTokens(DatasetTokens(data, Plan([5, 5], 10, 0)), {"student": (writer, share)}, seed=4, each=each)
    means = torch.tensor([
        sum(loss[tuple(document.tokens.tolist())] for document in source.produce(data, step)) / len(data)
        for step in range(1500)
    ], dtype=torch.float64)
    assert abs(float(means.mean()) - expected) < 4 * float(means.std()) / math.sqrt(len(means))
    assert abs(on_data - on_policy) > 10 * float(means.std()) / math.sqrt(len(means))  # another lambda would be seen


# ----------------------------------------------------------------------------------------------------- as methods


@pytest.fixture
def made(make_config, teacher_folder):
    """A method of the tiny model on a few texts."""

    def make(name: str, **changes):
        changes = {"rollout": {"prompt_tokens": 8, "max_new_tokens": 6}} | changes
        config = make_config(method=name, teacher={"model": teacher_folder}, **changes)
        parts = load_parts(config)[0]
        return methods.build(config, parts), parts

    return make


@pytest.mark.parametrize("name", SHARES)
def test_lambda_in_frequency(name, made):
    method, parts = made(name, options={"each": "text"})
    counts = Counter(method.tokens.origin(text, step) for step in range(60) for text in parts.documents)
    draws = sum(counts.values())
    student, teacher = SHARES[name]
    for origin, share in (("student", student), ("teacher", teacher), (None, 1 - student - teacher)):
        if share in (0.0, 1.0):
            assert counts[origin] == share * draws
        else:
            assert abs(counts[origin] - share * draws) < 4 * math.sqrt(draws * share * (1 - share)), counts


def test_seqkd_learns_the_teachers_greedy_words(made):
    method, parts = made("seqkd")
    some = parts.documents[:5]
    produced = method.tokens.produce(some, 3)
    teacher = parts.teachers[0].model
    for text, written in zip(some, produced):
        own = teacher.generate(text.tokens[None, :8], max_new_tokens=6, do_sample=False)[0]
        assert torch.equal(written.tokens, own[: len(written)]) and written.first_target == 8
    assert [id(document) for document in method.tokens.produce(some, 4)] == [id(document) for document in produced]
    assert method.objectives["main"].has_teacher is False


@pytest.mark.parametrize("name", ["gkd", "supervised_kd"])
def test_what_a_student_writes_is_not_what_the_data_says(name, made):
    method, parts = made(name, options={"each": "text"})
    some = parts.documents[:20]
    same = [torch.equal(a.tokens, b.tokens) for a, b in zip(some, method.tokens.produce(some, 0))]
    assert all(same) if name == "supervised_kd" else 0 < sum(same) < 20


def test_two_processes_write_and_learn_what_one_does(make_config, teacher_folder, tmp_path):
    lines = []
    for name in ("one", "two"):
        config = make_config(
            out=str(tmp_path / name), method="gkd", teacher={"model": teacher_folder}, options={"each": "text"},
            rollout={"prompt_tokens": 6, "max_new_tokens": 8}, train={"steps": 3},
        )
        if name == "one":
            train(config)
        else:
            (tmp_path / "two.yaml").write_text(to_yaml(config))
            launch_kdk(["train", str(tmp_path / "two.yaml")], timeout=300)
        lines.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    for one, two in zip(*lines, strict=True):
        assert one["tokens"] == two["tokens"] and one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(("changes", "message"), [
    ({"options": {"student": 1.5}}, r"options.student must be a probability in \[0, 1\], got 1.5"),
    ({"options": {"teacher": -0.1}}, r"options.teacher must be a probability in \[0, 1\], got -0.1"),
    ({"options": {"student": 0.7, "teacher": 0.7}}, r"options.student \+ options.teacher must be at most 1, got 1.4"),
    ({"options": {"each": "token"}}, "options.each must be one of step, text, got 'token'"),
    ({"cache": "c"}, "cache must be absent for method gkd, whose teacher must run"),
    ({"teacher": {"model": None}}, "teacher.model must be given for method gkd"),
    ({"rollout": {"temperature": -1.0}}, "rollout.temperature must be finite and at least 0, got -1.0"),
])
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        from_tree(Config, BASE | {"method": "gkd"} | changes)


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("gkd", {"rollout": {}}, "rollout.prompt_tokens must be given for texts without a prompt, got None, with 65 of 65"),
    ("gkd", {"objective": {"kd_weight": 0.0, "ce_weight": 1.0}}, "what a student wrote is no label for it"),
    ("supervised_kd", {"objective": {"kd_weight": 0.0}}, "kd_weight must be above 0 .*nothing is left to learn"),
])
def test_settings_that_do_not_fit_together(name, changes, message, made):
    with pytest.raises(ValueError, match=message):
        made(name, **changes)


def test_a_cache_holds_no_written_texts(make_config):
    config = make_config(method="supervised_kd", cache="folder", options={"student": 0.5})
    with pytest.raises(ValueError, match="options.student and options.teacher must be 0 with a cache, got student=0.5"):
        registry.spec("supervised_kd").build(config, None)
