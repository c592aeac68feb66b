"""Methods whose teacher is chosen or mixed: Baby Llama, churn, MUSCLE; and mixtures of texts."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from kd_kernels import EnsembleLogits, LinearLogits, divergences
from kd_trainer.data import Document
from kd_trainer.methods.base import DivergenceObjective
from kd_trainer.methods.mix_distillation import MixedPlan
from kd_trainer.methods.muscle import OldWhereWrong
from objective_judge import check, toy


@pytest.mark.parametrize("space", ["logit", "prob"])
def test_baby_llama(space):
    case = toy()
    other = LinearLogits(case.teacher.hidden.flip(0), case.teacher.weight.flip(0))
    objective = DivergenceObjective(
        divergences.parse("forward_kl"), kd_weight=0.5, ce_weight=0.5, temperature=2.0, squared_temperature=True
    )

    def oracle(case):
        rows, labels = case.batch.counted, case.batch.labels[case.batch.counted]
        z = [t.hidden @ t.weight.T for t in (case.teacher, other)]
        mean = (z[0] + z[1]) / 2 if space == "logit" else ((z[0].softmax(-1) + z[1].softmax(-1)) / 2).log()
        p = (mean / 2).log_softmax(-1)[rows]
        q = (case.hidden @ case.weight.T / 2).log_softmax(-1)[rows]
        ce = -case.logprobs()[rows].gather(1, labels[:, None]).sum()
        return 0.5 * ce + 0.5 * 4 * (p.exp() * (p - q)).sum()

    check(objective, case, oracle, EnsembleLogits((case.teacher, other), space=space))


@pytest.mark.parametrize("judge", ["student", "new"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_muscle(judge, divergence):
    case = toy(sharpness=1.0)
    # The labels of some rows are what the judge puts first, so that both teachers have rows.
    new = LinearLogits(case.teacher.hidden.flip(0), case.teacher.weight)
    asked = case.logprobs().detach() if judge == "student" else (new.hidden @ new.weight.T).log_softmax(-1)
    labels = case.batch.labels.clone()
    labels[case.batch.counted[::2]] = asked.argmax(-1)[case.batch.counted[::2]]
    case.batch = dataclasses.replace(case.batch, labels=labels)
    objective = OldWhereWrong(divergences.parse(divergence))
    objective.judge = judge
    seen = set()

    def oracle(case):
        total = 0.0
        for row in case.batch.counted.tolist():
            wrong = int(asked[row].argmax()) != int(labels[row])
            seen.add(wrong)
            teacher = case.teacher if wrong else new
            p, q = (teacher.hidden[row] @ teacher.weight.T).log_softmax(-1), case.logprobs()[row]
            a, b = (p, q) if divergence == "forward_kl" else (q, p)
            total = total + (a.exp() * (a - b)).sum()
        return total

    check(objective, case, oracle, (case.teacher, new))
    assert seen == {True, False}


def documents(count: int, length: int, first: int) -> list[Document]:
    return [Document(torch.full((length,), first + i)) for i in range(count)]


def test_mixed_texts_have_their_shares_and_every_text_its_turn():
    sources = [documents(40, 5, 0), documents(60, 7, 1000)]
    plan = MixedPlan(sources, (0.2, 0.8), 100, seed=3)
    tokens, seen = Counter(), Counter()
    for step in range(30):
        chosen = plan.step(step)
        assert chosen == plan.step(step)
        for i in chosen:
            tokens["long" if i < 40 else "short"] += 5 if i < 40 else 7
            seen[i] += 1
    assert tokens["long"] / sum(tokens.values()) == pytest.approx(0.2, abs=0.02)
    assert len(seen) == 100 and max(seen.values()) - min(seen[i] for i in range(40)) <= 4
    assert plan.steps_in(1.0) == round((40 * 5 + 60 * 7) / 100)
    with pytest.raises(ValueError, match="train.batch_tokens must be so large that each share of it holds"):
        MixedPlan(sources, (0.02, 0.98), 100, seed=3)
