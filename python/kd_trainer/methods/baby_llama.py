"""Baby Llama: a student of several teachers, whose logits are averaged.

Timiryasov and Tastet 2023, "Baby Llama: knowledge distillation from an ensemble of teachers trained on a small dataset
with no performance penalty", arXiv 2308.02019:

    alpha CE(y, q) + (1 - alpha) T^2 KL(softmax(mean_i z_i / T) || softmax(z / T)),     alpha = 0.5, T = 2.

``space: prob`` averages probabilities instead of logits (Stanton et al. 2021, arXiv 2106.05945). The released code
divides the KL by the number of sequences and the cross-entropy by the number of tokens, so that the teachers weigh as
many times more than alpha says as a sequence has tokens (128 there); ``kd_scale`` is that factor, 1 by default: as the
formula has it.

A cache of the ensemble (``kdk cache build --teacher a --teacher b``) serves method kd with the same objective.
"""

from __future__ import annotations

from dataclasses import dataclass

from kd_kernels import divergences
from kd_trainer.config import Config
from kd_trainer.errors import check_one_of, check_positive, fail
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, Parts
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import EnsembleTeacher, live_teachers


@dataclass(frozen=True)
class Options:
    alpha: float = 0.5  # weight of the labels
    temperature: float = 2.0
    space: str = "logit"
    kd_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha < 1.0:
            fail("config", "options.alpha", "in [0, 1)", self.alpha)
        check_one_of("config", "options.space", self.space, ("logit", "prob"))
        check_positive("config", "options.temperature", self.temperature)
        check_positive("config", "options.kd_scale", self.kd_scale)


def build(config: Config, parts: Parts) -> Method:
    options = config.options
    objective = DivergenceObjective(
        divergences.parse("forward_kl"), kd_weight=options.kd_scale * (1.0 - options.alpha), ce_weight=options.alpha,
        temperature=options.temperature, squared_temperature=True,
    )
    teacher = EnsembleTeacher(live_teachers(config, parts), options.space)
    return Method.single("baby_llama", DatasetTokens.of(config, parts.documents), teacher, objective)


register(MethodSpec(
    "baby_llama", "labels, and the mean of several teachers", "Timiryasov & Tastet 2023, arXiv 2308.02019", build,
    Options, needs=("live teacher", "several teachers"),
))
