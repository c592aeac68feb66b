"""DCO, direct coverage optimisation: the likelihood that one of N samples is the answer.

Chen et al. 2025, "Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical
Reasoning", arXiv 2502.07154. With pi the probability of a whole completion under the student,

    L = -log(1 - (1 - pi)^N),     dL = F(pi) d(-log pi),     F = N pi (1 - pi)^(N - 1) / (1 - (1 - pi)^N)

F falls from 1 to 0 as pi rises past 1 / N: completions that N samples find anyway are left alone. N = 1 is maximum
likelihood. The mean is over completions. ``length_normalized`` divides each completion's gradient by its number of
tokens, as the released code does (it multiplies the mean token loss by F); the loss that is reported is L in both.

The probability of a long chain of thought underflows, and F with it is 1 throughout; the paper then estimates pi by
sampling and trains on problems of which fewer than a tenth of 64 samples are right. That is a choice of data, to be
made before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kernels import LinearLogits, TokenStats
from kd_trainer.config import Config
from kd_trainer.data import Batch, Document
from kd_trainer.errors import fail
from kd_trainer.methods.base import DatasetTokens, LabelObjective, Method, Parts
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import NoTeacher

TINY = 1e-9
"""N pi below which L is -log(N pi) and F is 1, to the last digit of fp64 that the formulas could give."""


@dataclass(frozen=True)
class Options:
    samples: int = 256  # N
    length_normalized: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            fail("config", "options.samples", "at least 1", self.samples)


def coverage(log_pi: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """L and F of completions with these log-probabilities; fp64, nats."""
    log_pi = log_pi.double().clamp(max=-1e-15)  # pi = 1 would leave 0 * inf
    log_miss = torch.log1p(-log_pi.exp())  # of one sample
    log_cover = torch.log(-torch.expm1(samples * log_miss))
    factor = torch.exp(math.log(samples) + log_pi + (samples - 1) * log_miss - log_cover)
    tiny = log_pi + math.log(samples) < math.log(TINY)
    return torch.where(tiny, -log_pi - math.log(samples), -log_cover), torch.where(tiny, 1.0, factor)


class DirectCoverage(LabelObjective):
    def __init__(self, samples: int, length_normalized: bool) -> None:
        super().__init__()
        self.samples, self.length_normalized = samples, length_normalized

    def count(self, document: Document) -> int:
        return int(bool(document.counted.any()))

    def token_loss(self, stats: TokenStats, student: LinearLogits, batch: Batch) -> Tensor:
        """``[documents]``: the value is L, the gradient F d(-log pi)."""
        lengths = [int(document.counted.sum()) for document in batch.documents]
        log_pi = torch.stack([part.double().sum() for part in stats.logprob.split(lengths)])
        value, factor = coverage(log_pi.detach(), self.samples)
        if self.length_normalized:
            factor = factor / torch.tensor(lengths, device=factor.device).clamp(min=1)
        loss = value - factor * (log_pi - log_pi.detach())
        return torch.where(torch.tensor(lengths, device=loss.device) > 0, loss, 0.0)


def build(config: Config, parts: Parts) -> Method:
    tokens = DatasetTokens.of(config, parts.documents)
    objective = DirectCoverage(config.options.samples, config.options.length_normalized)
    return Method.single("dco", tokens, NoTeacher(), objective)


register(MethodSpec(
    "dco", "likelihood that one of N samples is the answer", "Chen et al. 2025, arXiv 2502.07154", build, Options,
))
