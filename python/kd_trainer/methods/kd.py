"""Word-level distillation: a divergence from the teacher's next-token distribution on the data's own tokens.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; Kim and Rush,
"Sequence-Level Knowledge Distillation", arXiv 1606.07947, section 3.1. The teacher is a model that is run, or a cache
of its top tokens.
"""

from __future__ import annotations

from kd_trainer.config import Config
from kd_trainer.errors import fail
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, Parts
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import teacher_of


def build(config: Config, parts: Parts) -> Method:
    if config.objective.kd_weight == 0.0:
        fail("config", "objective.kd_weight", "above 0 for method kd", 0.0, "method: sft trains on labels alone")
    objective = DivergenceObjective.of(config)
    return Method.single("kd", DatasetTokens.of(config, parts.documents), teacher_of(config, parts), objective)


register(MethodSpec(
    "kd", "a divergence from the teacher on the data's own tokens", "Hinton et al. 2015, arXiv 1503.02531", build,
    needs=("teacher",),
))
