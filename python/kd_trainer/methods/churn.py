"""Churn reduction: a new model that keeps the answers of the old one where it can.

Jiang et al. 2021, "Churn Reduction via Distillation", arXiv 2106.02654:

    (1 - lambda) CE(y, q) + lambda CE(p, q)

with p the *old model*, which is what bounds ``E[KL(p || q)]``. Churn is the share of tokens where the likeliest one
differs; it is logged as ``churn``. The paper takes lambda from 0.1 to 0.9 by the trade-off that one wants. CE(p, q) and
KL(p || q) have the same gradient, and the latter is logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kd_kernels import divergences
from kd_trainer.config import Config
from kd_trainer.errors import fail
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, Parts
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import teacher_of


@dataclass(frozen=True)
class Options:
    old_weight: float = 0.5  # lambda

    def __post_init__(self) -> None:
        if not 0.0 < self.old_weight <= 1.0:
            fail("config", "options.old_weight", "in (0, 1]", self.old_weight, "method: sft has no old model")


def _churn(step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    return {"churn": 1.0 - metrics["agreement"]}


def build(config: Config, parts: Parts) -> Method:
    weight = config.options.old_weight
    objective = DivergenceObjective(
        divergences.parse("forward_kl"), kd_weight=weight, ce_weight=1.0 - weight, tail=config.objective.tail,
        stats=("divergence", "label_logprob", "agreement"),
    )
    tokens = DatasetTokens.of(config, parts.documents)
    return Method.single("churn", tokens, teacher_of(config, parts), objective, after_step=_churn)


register(MethodSpec(
    "churn", "labels, and the old model's distribution", "Jiang et al. 2021, arXiv 2106.02654", build, Options,
    needs=("teacher",),
))
