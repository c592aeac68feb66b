"""[IDK]: a token for "I do not know" takes the mass of labels that the model does not put first.

Cohen et al. 2024, "I Don't Know: Explicit Modeling of Uncertainty with an [IDK] Token", arXiv 2412.06676. Where the
student's likeliest token is the label y, with i the id of [IDK],

    - log q(y) - log(1 - q(i)),

and where it is not, with w the uncertainty,

    - (1 - w) log q(y) - w log q(i),     w = ceiling (1 - (q(y) / max q)^power).

The paper has ceiling 0.5 and power 1; the code that trained Mistral has ceiling 1 and power 2. The authors' codes let
the gradient through w, so that a loss could also be lowered by moving the target; here w is a constant.

The token must be in the vocabulary: add it to tokenizer and models first, or name one that is never used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kernels import LinearLogits, TokenStats, token_stats
from kd_trainer.config import Config
from kd_trainer.data import Batch
from kd_trainer.errors import fail
from kd_trainer.methods.base import DatasetTokens, LabelObjective, Method, Parts
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import NoTeacher


@dataclass(frozen=True)
class Options:
    token: str = "[IDK]"
    ceiling: float = 0.5
    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.ceiling <= 1.0:
            fail("config", "options.ceiling", "in (0, 1]", self.ceiling)
        if self.power <= 0.0:
            fail("config", "options.power", "above 0", self.power)


class IDontKnow(LabelObjective):
    def __init__(self, token: int, ceiling: float = 0.5, power: float = 1.0) -> None:
        super().__init__()
        self.token, self.ceiling, self.power = token, ceiling, power

    def token_loss(self, stats: TokenStats, student: LinearLogits, batch: Batch) -> Tensor:
        labels = batch.labels[batch.counted]
        unsure = token_stats(student, torch.full_like(labels, self.token)).logprob
        max_logprob = stats.max - stats.lse
        # Clamped, because a label that is first by a rounding has a ratio of a little above 1.
        ratio = (stats.logprob.detach() - max_logprob).clamp(max=0.0)
        weight = self.ceiling * (1.0 - torch.exp(self.power * ratio))
        known = -stats.logprob - torch.log(-torch.expm1(unsure.clamp(max=-1e-7)))
        unknown = -(1.0 - weight) * stats.logprob - weight * unsure
        return torch.where(stats.argmax == labels, known, unknown)


def build(config: Config, parts: Parts) -> Method:
    options = config.options
    token = parts.token_id("options.token", options.token)
    objective = IDontKnow(token, options.ceiling, options.power)
    return Method.single("idk", DatasetTokens.of(config, parts.documents), NoTeacher(), objective)


register(MethodSpec(
    "idk", "mass for an [IDK] token where the label is not the likeliest", "Cohen et al. 2024, arXiv 2412.06676", build,
    Options,
))
