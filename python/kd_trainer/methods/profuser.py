"""ProFuser: several models fused into one, each text learnt from the one of them that is best at it.

Shi et al. 2024, "ProFuser: Progressive Fusion of Large Language Models", arXiv 2408.04998. The sources are ``teacher``
and ``more_teachers``, of one vocabulary (aligning others is out of scope). Of a text (x, y) there are two lessons:

- train mode: y, with the source that finds it likeliest (least cross-entropy, "Min-CE");
- inference mode: every source writes an answer to x; the best answer, with the source that wrote it.

    w_infer L(best answer) + w_train L(y),        L(y) = mean_t -log q(y_t) + beta KL(p_source || q)

The first ``first_stage`` of the steps has w = (1, 0), the rest (``infer_weight``, 1) = (0.1, 1): from easy to hard.
Sources are frozen, so they write, and are chosen, once for every text; then one of them reads it, not all.

Uncertain: beta (``objective.kd_weight``, 1 here) and where the stages meet could not be read; the KL is written
D(student, teacher) without a direction that one could rely on, and is ``objective.divergence``. Not the paper's: its
answers are voted on by reward models, which have no place here. ``judge: reference`` takes the answer with the most
tokens in common with y (F1), ``likelihood`` the one that all sources together find likeliest by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kd_kernels import KDLoss, LinearLogits
from kd_trainer.config import Config
from kd_trainer.data import Batch
from kd_trainer.errors import check_one_of, fail
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, Parts, summed
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import live_teachers
from kd_trainer.tokens import ChosenTeachers, Lessons, check_prompts


@dataclass(frozen=True)
class Options:
    first_stage: float = 0.5  # of the run's steps
    infer_weight: float = 0.1  # of the best answers, in the second stage
    judge: str = "reference"

    def __post_init__(self) -> None:
        check_one_of("config", "options.judge", self.judge, ("reference", "likelihood"))
        if not 0.0 <= self.first_stage <= 1.0:
            fail("config", "options.first_stage", "a fraction in [0, 1]", self.first_stage)
        if not 0.0 <= self.infer_weight < float("inf"):
            fail("config", "options.infer_weight", "finite and at least 0", self.infer_weight)

    def weight(self, tag: str, step: int, steps: int) -> float:
        if step < self.first_stage * steps:
            return 1.0 if tag == "answer" else 0.0
        return self.infer_weight if tag == "answer" else 1.0


class Fusion(DivergenceObjective):
    """The loss of one kind of lesson, with its weight in the step."""

    weigh: Callable[[int], float]
    weight = 1.0

    def begin_step(self, index: int) -> None:
        self.weight = self.weigh(index)

    def loss(
        self, student: LinearLogits, targets: Sequence[tuple[Tensor, LinearLogits]], batch: Batch, normalizer: float,
        max_scratch_bytes: int | None = None,
    ) -> KDLoss:
        return summed(
            self.over(rows, student, teacher, batch, normalizer / self.weight, max_scratch_bytes)
            for rows, teacher in targets
        )


def build(config: Config, parts: Parts) -> Method:
    if config.objective.kd_weight == 0.0:
        fail("config", "objective.kd_weight", "above 0 for method profuser", 0.0, "without it nothing is fused")
    check_prompts(parts.documents, config.rollout.prompt_tokens)
    options, texts = config.options, DatasetTokens.of(config, parts.documents)
    steps = config.train.steps or texts.plan.steps_in(config.train.epochs)
    lessons = Lessons(
        config, parts, texts, options.judge, lambda tag, step: options.weight(tag, step, steps) > 0.0
    )
    objectives = {}
    for tag in ("answer", "text"):
        objectives[tag] = Fusion.of(config)
        objectives[tag].weigh = lambda step, tag=tag: options.weight(tag, step, steps)
    return Method("profuser", lessons, ChosenTeachers(live_teachers(config, parts), lessons, config), objectives)


register(MethodSpec(
    "profuser", "each text from the one of several teachers that is best at it", "Shi et al. 2024, arXiv 2408.04998",
    build, Options, defaults={"objective": {"ce_weight": 1.0}}, needs=("live teacher", "several teachers", "prompts"),
))
