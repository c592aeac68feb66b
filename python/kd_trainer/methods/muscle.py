"""MUSCLE: an updated model that does not lose what the old one had right.

Echterhoff et al. 2024, "MUSCLE: A Model Update Strategy for Compatible LLM Evolution", arXiv 2407.09435. Two frozen
teachers read the same text: the *old* model (``teacher``) and the *new* one (``more_teachers``), which the student is
an update of. Per token,

    m KL(p_old || q) + (1 - m) KL(p_new || q)

with m = 1 where the model that is asked has another token than the reference in the first place: there the student is
drawn towards the old model, elsewhere to the new one. Which model is asked (``judge``) and the direction of the KL
could not be verified in the paper: "student" follows its training, "new" is fixed; ``objective.divergence`` takes any.
Negative flips, right before and wrong after, are what the method is measured by: :mod:`kd_trainer.diagnostics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kernels import KDLoss, LinearLogits, token_stats
from kd_trainer.config import Config
from kd_trainer.data import Batch
from kd_trainer.errors import check_one_of, fail
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, Parts, summed
from kd_trainer.models import rows_of
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import SeveralTeachers, live_teachers


@dataclass(frozen=True)
class Options:
    judge: str = "student"

    def __post_init__(self) -> None:
        check_one_of("config", "options.judge", self.judge, ("student", "new"))


class OldWhereWrong(DivergenceObjective):
    """Each row goes to one of two teachers; no product is formed twice."""

    judge = "student"

    def loss(
        self, student: LinearLogits, targets: Sequence[LinearLogits], batch: Batch, normalizer: float,
        max_scratch_bytes: int | None = None,
    ) -> KDLoss:
        old, new = targets
        wrong = self._wrong(student if self.judge == "student" else new, batch, max_scratch_bytes)
        return summed(
            self.over(rows, student, teacher, batch, normalizer, max_scratch_bytes)
            for teacher, rows in ((old, batch.counted[wrong]), (new, batch.counted[~wrong]))
        )

    @torch.no_grad()
    def _wrong(self, model: LinearLogits, batch: Batch, max_scratch_bytes: int | None) -> Tensor:
        """bool ``[M]``: the rows that count where the model's likeliest token is not the label."""
        labels = batch.labels[batch.counted]
        return token_stats(rows_of(model, batch.counted), labels, max_scratch_bytes=max_scratch_bytes).argmax != labels


def build(config: Config, parts: Parts) -> Method:
    if len(parts.teachers) != 2:
        fail("config", "more_teachers", "one: the new model, beside the old one in teacher", len(parts.teachers) - 1)
    objective = OldWhereWrong.of(config)
    objective.judge = config.options.judge
    teacher = SeveralTeachers(live_teachers(config, parts))
    return Method.single("muscle", DatasetTokens.of(config, parts.documents), teacher, objective)


register(MethodSpec(
    "muscle", "the old model where the new one errs, else the new one", "Echterhoff et al. 2024, arXiv 2407.09435",
    build, Options, needs=("live teacher", "several teachers"),
))
