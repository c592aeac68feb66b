"""Supervised fine-tuning: next-token cross-entropy on the data, without a teacher. Every other method's baseline."""

from __future__ import annotations

from kd_trainer.config import Config
from kd_trainer.methods.base import DatasetTokens, Method, Parts, cross_entropy
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import NoTeacher


def build(config: Config, parts: Parts) -> Method:
    return Method.single("sft", DatasetTokens.of(config, parts.documents), NoTeacher(), cross_entropy())


register(
    MethodSpec("sft", "next-token cross-entropy on the data, without a teacher", "the baseline of all others", build)
)
