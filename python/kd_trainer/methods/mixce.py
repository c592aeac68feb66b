"""MixCE: cross-entropy from the text to the model mixed with cross-entropy from the model to the text.

Zhang et al. 2023, "MixCE: Training Autoregressive Language Models by Mixing Forward and Reverse Cross-Entropies",
arXiv 2305.16958. The reverse term needs the probability of the text under its source, which nobody has, so the paper
minimises, with ``sg`` for stop-gradient and q the student,

    - (eta + (1 - eta) sg(q(y))) log q(y)

per token of the text: a token counts the less, the less the model believes it. ``eta = 1`` is maximum likelihood. The
released models chose eta by MAUVE: 0.1 on WikiText, 0.3 on WebText, 0.7 on WritingPrompts. No teacher takes part; a
weight of the teacher's p(y) instead would be the biased loss that Fundamental Limits (arXiv 2310.07838) warns of.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kd_kernels import LinearLogits, TokenStats
from kd_trainer.config import Config
from kd_trainer.data import Batch
from kd_trainer.errors import fail
from kd_trainer.methods.base import DatasetTokens, LabelObjective, Method, Parts
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import NoTeacher


@dataclass(frozen=True)
class Options:
    eta: float = 0.1  # weight of the forward cross-entropy

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            fail("config", "options.eta", "in [0, 1]", self.eta)


class MixCE(LabelObjective):
    def __init__(self, eta: float) -> None:
        super().__init__()
        self.eta = eta

    def token_loss(self, stats: TokenStats, student: LinearLogits, batch: Batch) -> Tensor:
        return -(self.eta + (1.0 - self.eta) * stats.logprob.detach().exp()) * stats.logprob


def build(config: Config, parts: Parts) -> Method:
    tokens = DatasetTokens.of(config, parts.documents)
    return Method.single("mixce", tokens, NoTeacher(), MixCE(config.options.eta))


register(MethodSpec(
    "mixce", "labels weighted by what the student makes of them", "Zhang et al. 2023, arXiv 2305.16958", build, Options,
))
