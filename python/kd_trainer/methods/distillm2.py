"""DistiLLM-2: up with what the teacher says, down with what the student says, each on its own words, by its own loss.

Ko et al. 2025, "DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs", arXiv 2503.07067. A prompt is
answered twice, by the teacher (y) and by the student (y'), and with p, q the next-token distributions

    (2 - b) KL(p || a p + (1 - a) q)(y)  +  b KL(q || (1 - a') p + a' sg(q))(y')

each the mean over a text's tokens, then the mean over texts. In the second the mixture is a constant (sg): another
gradient than DistiLLM's. ``b`` is 1, or with ``ramp`` rises from 1 to 1.5 over the first half of the run. ``adaptive``
gives every text a skew of its own,

    a = clip(1 - (1 - a0) m / (d + 1e-5), 0.01, a0)

with d the difference of the two models' geometric mean probabilities of its tokens (teacher's - student's for y, the
other way round for y') and m the mean of d over the first step's texts, before that step.

The pairs are fixed: both models answer each text once, the student before the first step. ``rewrite: "step"`` has it
answer in every step as it is by then; the paper does so between epochs, by running the released code anew.

Defaults are the released configuration's: a0 = 0.1 for both, b = 1, ramp and adaptive off, answers drawn at 0.8. Its m
is the first value that one process logs; here the split of a step changes nothing. Uncertain: the schedule of b.

Cost: twice the tokens of a step of ``kd``; before the first step the student's answers to the run's texts, by every
process (8 bytes a token, on the host and in checkpoints). ``adaptive``: two more products of the head, and a call of
the loss for every skew, each with a gradient of the head; ``train.accumulation`` bounds how many are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kd_kernels import Divergence, KDLoss, LinearLogits, divergences, kd_loss, token_stats
from kd_trainer.config import Config, ObjectiveConfig
from kd_trainer.data import Batch, Document
from kd_trainer.errors import check_one_of, fail
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, Parts, summed
from kd_trainer.models import rows_of
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import live_teachers
from kd_trainer.tokens import PairTokens, Writer, check_prompts, geometric_means

LEAST_ALPHA = 0.01


@dataclass(frozen=True)
class Options:
    alpha_teacher: float = 0.1  # a0 of the teacher's texts
    alpha_student: float = 0.1
    adaptive: bool = False
    b: float = 1.0  # weight of the student's texts; 2 - b of the teacher's
    ramp: bool = False
    rewrite: str = "never"  # or "step"

    def __post_init__(self) -> None:
        check_one_of("config", "options.rewrite", self.rewrite, ("never", "step"))
        for name in ("alpha_teacher", "alpha_student"):
            if not LEAST_ALPHA <= getattr(self, name) < 1.0:
                fail("config", f"options.{name}", f"in [{LEAST_ALPHA}, 1)", getattr(self, name))
        if not 0.0 < self.b < 2.0:
            fail("config", "options.b", "in (0, 2)", self.b)
        if self.ramp and self.b != 1.0:
            fail("config", "options.b", "1 with ramp, which begins there", self.b)


def skewed(author: str, alpha: float) -> Divergence:
    """The divergence for the texts of one author."""
    by_teacher = author == "teacher"
    return divergences.skew_forward_kl(alpha) if by_teacher else divergences.skew_reverse_kl(alpha, detach_mixture=True)


class OneAuthor(DivergenceObjective):
    """The loss of one author's texts: the mean over each text's tokens, then over texts.

    Args:
        gaps: m, by author, as it is when the loss is asked for: with ``adaptive``.
        steps: of the run.
    """

    def __init__(
        self, author: str, options: Options, steps: int, gaps: Callable[[], Mapping[str, float]], **settings: Any
    ) -> None:
        super().__init__(skewed(author, getattr(options, f"alpha_{author}")), **settings)
        self.author, self._options, self._steps, self._gaps = author, options, steps, gaps

    def begin_step(self, index: int) -> None:
        b = self._options.b + (min(0.5, (index + 1) / self._steps) if self._options.ramp else 0.0)
        self.kd_weight = b if self.author == "student" else 2.0 - b

    def count(self, document: Document) -> int:
        return int(bool(document.counted.any()))

    def loss(
        self, student: LinearLogits, targets: LinearLogits, batch: Batch, normalizer: float,
        max_scratch_bytes: int | None = None,
    ) -> KDLoss:
        lengths = [int(document.counted.sum()) for document in batch.documents]
        texts = batch.counted.split(lengths)
        weight = torch.zeros(len(batch.labels), dtype=torch.float64, device=batch.labels.device)
        for rows in texts:
            weight[rows] = 1.0 / max(len(rows), 1)
        chosen = [self.divergence] * len(texts)
        if self._options.adaptive:
            chosen = self._divergences(student, targets, batch, lengths, max_scratch_bytes)
        return summed(
            kd_loss(
                student, targets, divergence, labels=batch.labels, kd_weight=self.kd_weight,
                temperature=self.temperature, squared_temperature=self.squared_temperature, token_weight=weight,
                normalizer=normalizer, stats=self.stats, max_scratch_bytes=max_scratch_bytes,
                rows=torch.cat([rows for rows, its in zip(texts, chosen) if its == divergence]),
            )
            for divergence in dict.fromkeys(chosen)
        )

    @torch.no_grad()
    def _divergences(
        self, student: LinearLogits, targets: LinearLogits, batch: Batch, lengths: list[int], budget: int | None
    ) -> list[Divergence]:
        """One for each text, of its own skew."""
        labels = batch.labels[batch.counted]
        found = (token_stats(rows_of(z, batch.counted), labels, max_scratch_bytes=budget) for z in (targets, student))
        p, q = (geometric_means(stats.logprob.split(lengths)) for stats in found)
        d, start = p - q if self.author == "teacher" else q - p, self.divergence.values[0]
        alphas = (1.0 - (1.0 - start) * self._gaps()[self.author] / (d + 1e-5)).clamp(LEAST_ALPHA, start)
        return [skewed(self.author, alpha) for alpha in alphas.tolist()]


def build(config: Config, parts: Parts) -> Method:
    options = config.options
    for name in ("divergence", "kd_weight", "ce_weight"):
        if (value := getattr(config.objective, name)) != (own := getattr(ObjectiveConfig(), name)):
            fail("config", f"objective.{name}", f"left at {own} for method distillm2, whose losses are its own", value)
    check_prompts(parts.documents, config.rollout.prompt_tokens)
    teacher, texts = live_teachers(config, parts)[0], DatasetTokens.of(config, parts.documents)
    steps = config.train.steps or texts.plan.steps_in(config.train.epochs)
    writers = {"teacher": Writer.teacher(config, parts), "student": Writer.student(config, parts)}
    models = {"teacher": parts.teachers[0], "student": parts.student}
    tokens = PairTokens(texts, writers, models, steps, fixed=options.rewrite == "never", measure=options.adaptive)
    settings = dict(temperature=config.objective.temperature, squared_temperature=config.objective.squared_temperature)
    objectives = {author: OneAuthor(author, options, steps, lambda: tokens.gaps, **settings) for author in writers}
    return Method("distillm2", tokens, teacher, objectives)


register(MethodSpec(
    "distillm2", "each model's own words, by a skew KL of its own", "Ko et al. 2025, arXiv 2503.07067", build, Options,
    {"rollout": {"temperature": 0.8}}, ("live teacher", "prompts"),
))
