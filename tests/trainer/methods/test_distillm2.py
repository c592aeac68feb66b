"""DistiLLM-2: the pair's losses with a constant mixture, skews of their own, who answers what and when."""

from __future__ import annotations

import math

import pytest
import torch
from built_method import assert_rows_close

import oracles
from kd_trainer import methods
from kd_trainer.config import Config, from_tree
from kd_trainer.data import Document, collate
from kd_trainer.methods.distillm2 import OneAuthor, Options
from kd_trainer.teachers import LiveTeacher
from kd_trainer.trainer import load_parts
from objective_judge import VOCAB, check, toy
from toy_models import logprobs, sequence_logprob, texts, toy_model


def documents(seed: int = 3) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((7, 1), (5, 3), (9, 4), (6, 2))
    return [Document(torch.randint(VOCAB, (length,), generator=generator), first) for length, first in shapes]


def side(author: str, p: torch.Tensor, q: torch.Tensor, alpha: float) -> torch.Tensor:
    if author == "teacher":
        return oracles.skew_forward_kl(p, q, alpha)
    return oracles.skew_reverse_kl(p, q, alpha, detach_mixture=True)


def own_rows(case):
    """The rows that count of each document, one after the other."""
    return case.batch.counted.split([int(document.counted.sum()) for document in case.batch.documents])


@pytest.mark.parametrize("author", ["teacher", "student"])
@pytest.mark.parametrize("b", [1.0, 1.3])
def test_the_loss_of_one_author(author, b):
    options = Options(alpha_teacher=0.1, alpha_student=0.2, b=b)
    objective = OneAuthor(author, options, 10, dict)
    objective.begin_step(4)

    def oracle(case):
        p, q = case.teacher_logprobs(), case.logprobs()
        alpha, weight = (0.1, 2 - b) if author == "teacher" else (0.2, b)
        return weight * sum(side(author, p[rows], q[rows], alpha).sum(-1).mean() for rows in own_rows(case))

    case = toy(documents())
    assert [objective.count(document) for document in case.batch.documents] == [1, 1, 1, 1]
    check(objective, case, oracle, case.teacher)
    if author == "student":  # that the mixture is a constant shows in the gradient
        def flowing(case):
            p, q = case.teacher_logprobs(), case.logprobs()
            return b * sum(oracles.skew_reverse_kl(p[rows], q[rows], 0.2).sum(-1).mean() for rows in own_rows(case))

        with pytest.raises(AssertionError):
            check(objective, case, oracle, case.teacher, surrogate=flowing)


@pytest.mark.parametrize("author", ["teacher", "student"])
def test_skews_of_their_own(author):
    case, start = toy(documents(), sharpness=0.7), 0.4
    labels, gaps = case.batch.labels, []
    for rows in own_rows(case):
        p, q = (
            math.exp(float(z[rows].gather(1, labels[rows][:, None]).mean()))
            for z in (case.teacher_logprobs(), case.logprobs().detach())
        )
        gaps.append(p - q if author == "teacher" else q - p)
    m = 0.8 / (1 - start) * max(gaps)  # the text with the largest gap gets a skew of 0.2
    alphas = [min(max(1 - (1 - start) * m / (gap + 1e-5), 0.01), start) for gap in gaps]
    assert {0.01, start} <= set(alphas) and any(0.15 < alpha < 0.25 for alpha in alphas), alphas
    options = Options(alpha_teacher=start, alpha_student=start, adaptive=True)
    objective = OneAuthor(author, options, 10, lambda: {author: m})
    objective.begin_step(0)

    def oracle(case):
        p, q = case.teacher_logprobs(), case.logprobs()
        return sum(side(author, p[rows], q[rows], a).sum(-1).mean() for rows, a in zip(own_rows(case), alphas))

    check(objective, case, oracle, case.teacher)


def test_the_ramp_ends_at_half_of_the_run():
    sides = [OneAuthor(author, Options(ramp=True), 10, dict) for author in ("teacher", "student")]
    seen = []
    for step in range(10):
        for objective in sides:
            objective.begin_step(step)
        seen.append(tuple(round(objective.kd_weight, 6) for objective in sides))
    assert seen[:5] == [(0.9, 1.1), (0.8, 1.2), (0.7, 1.3), (0.6, 1.4), (0.5, 1.5)] and seen[5:] == [(0.5, 1.5)] * 5


def test_the_pair_over_all_that_both_can_write():
    """Value and gradient of E_{y ~ p} SKL(y) + E_{y' ~ q} SRKL(y'), each text with its chance under its author."""
    student, teacher = toy_model(1), toy_model(2)
    live = LiveTeacher(teacher, "t")
    chances = {
        author: torch.stack([sequence_logprob(model, text) for text in texts()]).detach().exp()
        for author, model in (("teacher", teacher), ("student", student))
    }
    expected = 0.0
    for author, chance in chances.items():
        for weight, text in zip(chance, texts()):
            p, q = logprobs(teacher, text).detach(), logprobs(student, text)
            expected = expected + weight * side(author, p, q, 0.1).sum(-1).mean()
    student.zero_grad()
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    total = 0.0
    for author, chance in chances.items():
        objective = OneAuthor(author, Options(), 10, dict)
        objective.begin_step(0)
        for weight, text in zip(chance, texts()):
            batch = collate([text], 8)
            loss = weight * objective(student, live.targets(batch), batch, 1.0).loss
            loss.backward()
            total += float(loss.detach())
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in student.named_parameters():  # norms are in fp32 whatever the weights are
        assert_rows_close(parameter.grad, gradients[name], 1e-5)


# -------------------------------------------------------------------------------------------------------- as a method


@pytest.fixture
def made(make_config, teacher_folder):
    def make(**changes):
        changes = {"rollout": {"prompt_tokens": 6, "max_new_tokens": 8}} | changes
        config = make_config(
            method="distillm2", teacher={"model": teacher_folder}, data={"max_length": 32, "limit": 8},
            train={"steps": 5, "batch_tokens": 96}, **changes,
        )
        parts = load_parts(config)[0]
        return methods.build(config, parts), parts

    return make


def words(documents: list[Document]) -> list[tuple]:
    return [(document.tag, *document.tokens.tolist()) for document in documents]


@pytest.mark.parametrize("rewrite", ["never", "step"])
def test_who_answers_what_and_when(rewrite, made):
    method, parts = made(options={"rewrite": rewrite})
    some = method.tokens.step(0)
    first = method.tokens.produce(some, 0)
    groups = method.group(first)
    assert [document.tag for document in first] == ["teacher"] * len(some) + ["student"] * len(some)
    for text, *pair in zip(some, groups["teacher"], groups["student"]):
        prompt = text.tokens[: min(6, len(text) - 1)]
        assert all(torch.equal(answer.tokens[: len(prompt)], prompt) for answer in pair)
    assert not any(torch.equal(y.tokens, other.tokens) for y, other in zip(groups["teacher"], groups["student"]))
    later = method.tokens.step(3)
    before = words(method.tokens.produce(later, 3))
    with torch.no_grad():
        for parameter in parts.student.parameters():
            parameter.mul_(1.5)
    after = words(method.tokens.produce(later, 3))
    assert after[: len(later)] == before[: len(later)]  # the teacher's
    assert (after == before) == (rewrite == "never")
    if rewrite == "never":
        resumed, _ = made(options={"rewrite": rewrite})
        resumed.tokens.load_state(method.tokens.state())
        assert words(resumed.tokens.produce(later, 3)) == before


def test_gaps_are_those_of_the_first_step(made):
    method, parts = made(options={"adaptive": True})
    half = method.tokens.step(0)[:2]  # one process's share
    method.tokens.produce(half, 0)
    for author, documents in method.group(method.tokens.produce(method.tokens.step(0), 1)).items():
        means = []
        for model in (parts.teachers[0], parts.student):
            means.append(torch.stack([
                model.model(d.tokens[None]).logits[0, d.first_target - 1 : -1].double().log_softmax(-1)
                .gather(1, d.tokens[d.first_target :, None]).mean().exp() for d in documents
            ]).detach())
        gap = float((means[0] - means[1]).mean()) * (1 if author == "teacher" else -1)
        assert method.tokens.gaps[author] == pytest.approx(gap, abs=1e-6) and abs(gap) > 1e-6
    assert made()[0].tokens.gaps == {}


@pytest.mark.parametrize(("changes", "message"), [
    ({"options": {"alpha_teacher": 1.0}}, r"options.alpha_teacher must be in \[0.01, 1\), got 1.0"),
    ({"options": {"alpha_student": 0.0}}, r"options.alpha_student must be in \[0.01, 1\), got 0.0"),
    ({"options": {"b": 2.0}}, r"options.b must be in \(0, 2\), got 2.0"),
    ({"options": {"b": 1.2, "ramp": True}}, "options.b must be 1 with ramp, which begins there, got 1.2"),
    ({"options": {"rewrite": "epoch"}}, "options.rewrite must be one of never, step, got 'epoch'"),
    ({"cache": "c"}, "cache must be absent for method distillm2, whose teacher must run"),
])
def test_settings_out_of_range(changes, message):
    base = {"out": "o", "student": {"model": "m"}, "teacher": {"model": "t"}, "data": {"source": "d"}}
    with pytest.raises(ValueError, match=message):
        from_tree(Config, base | {"method": "distillm2"} | changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"objective": {"divergence": "jsd"}}, "objective.divergence must be left at forward_kl for method distillm2"),
    ({"objective": {"ce_weight": 0.5}}, "objective.ce_weight must be left at 0.0 for method distillm2"),
    ({"objective": {"kd_weight": 0.5}}, "objective.kd_weight must be left at 1.0 for method distillm2"),
    ({"rollout": {}}, "rollout.prompt_tokens must be given for texts without a prompt"),
])
def test_settings_that_do_not_fit_together(changes, message, made):
    with pytest.raises(ValueError, match=message):
        made(**changes)
