"""Word-level distillation: a divergence from the teacher's next-token distribution on the data's own tokens.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; Kim and Rush,
"Sequence-Level Knowledge Distillation", arXiv 1606.07947, section 3.1. The teacher is a model that is run, or a cache
of its top tokens.
"""

from __future__ import annotations

from kd_trainer.config import Config
from kd_trainer.errors import fail
from kd_trainer.methods.base import DatasetTokens, Method, Objective, Parts
from kd_trainer.teachers import CachedTeacher, LiveTeacher, Teacher, open_cache


def build(config: Config, parts: Parts) -> Method:
    if config.objective.kd_weight == 0.0:
        fail("config", "objective.kd_weight", "above 0 for method kd", 0.0, "method: sft trains on labels alone")
    objective = Objective.of(config, ("divergence", "label_logprob"))
    return Method("kd", DatasetTokens.of(config, parts.documents), _teacher(config, parts), objective)


def _teacher(config: Config, parts: Parts) -> Teacher:
    if config.cache is None:
        if parts.teacher_model.vocab != parts.student.vocab:
            fail(
                "train", "the student's vocabulary", f"the teacher's {parts.teacher_model.vocab}", parts.student.vocab,
                "teacher and student must share a tokenizer",
            )
        return LiveTeacher(parts.teacher_model, parts.teacher_fingerprint)
    reader = open_cache(
        config.cache, teacher=parts.teacher_fingerprint, tokenizer=parts.tokenizer_fingerprint,
        vocab=parts.student.vocab, temperature=config.objective.temperature,
    )
    return CachedTeacher(reader)
