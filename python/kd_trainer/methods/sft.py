"""Supervised fine-tuning: next-token cross-entropy on the data, without a teacher. Every other method's baseline."""

from __future__ import annotations

from kd_trainer.config import Config
from kd_trainer.methods.base import DatasetTokens, Method, Objective, Parts
from kd_trainer.teachers import NoTeacher


def build(config: Config, parts: Parts) -> Method:
    objective = Objective.of(config, ("label_logprob",), kd_weight=0.0, ce_weight=1.0, temperature=1.0)
    return Method("sft", DatasetTokens.of(config, parts.documents), NoTeacher(), objective)
