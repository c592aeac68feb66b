"""PESF-KD: a small adapter on the teacher's last hidden state, trained to make it a better teacher for this student.

Rao et al. 2023, "Parameter-Efficient and Student-Friendly Knowledge Distillation", arXiv 2205.15308. The teacher's body
is frozen; what it says is ``z' = W (h + A(h))``, A a two-layer network that starts at 0. Per token,

    alpha T^2 D(p', q) + (1 - alpha) (CE(y, q) + CE(y, p'))

reaches the student through q, and the adapter through p': the teacher is moved towards the labels and towards what the
student can follow. The paper adds ``W0 h`` beside the network, a second head of V x H; a hidden adapter is within the
head's rows and costs 2 H r parameters. D is the KL (the vision code; the text code has a squared error of
probabilities).

``kd_loss`` never differentiates its teacher, so the adapter's share is the same divergence with the two changed around,
its mirror: KL(p' || q) as a function of p' is the reverse KL of student p' and teacher q.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_kernels import KDLoss, LinearLogits, divergences, kd_loss
from kd_trainer.config import Config
from kd_trainer.data import Batch
from kd_trainer.errors import check_positive, fail
from kd_trainer.methods.base import DatasetTokens, Method, Objective, Parts
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import live_teachers


@dataclass(frozen=True)
class Options:
    alpha: float = 0.7
    temperature: float = 5.0
    width: int = 64  # of the adapter's hidden layer
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0:
            fail("config", "options.alpha", "in (0, 1]", self.alpha)
        check_positive("config", "options.temperature", self.temperature)
        if self.width < 1:
            fail("config", "options.width", "at least 1", self.width)
        if not 0.0 <= self.dropout < 1.0:
            fail("config", "options.dropout", "in [0, 1)", self.dropout)


class Adapter(nn.Module):
    """``h + A(h)``; A is 0 at first, so that training starts from the teacher as it is."""

    def __init__(self, hidden: int, width: int, dropout: float) -> None:
        super().__init__()
        self.down, self.up, self.dropout = nn.Linear(hidden, width), nn.Linear(
            width, hidden, bias=False
        ), nn.Dropout(dropout)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.up(self.dropout(torch.relu(self.down(hidden.to(self.down.weight.dtype)))))


class StudentFriendly(Objective):
    stats = ("divergence", "label_logprob")

    def __init__(self, adapter: Adapter, alpha: float, temperature: float) -> None:
        super().__init__()
        self.adapter, self.alpha, self.temperature = adapter, alpha, temperature

    def loss(
        self, student: LinearLogits, targets: LinearLogits, batch: Batch, normalizer: float,
        max_scratch_bytes: int | None = None,
    ) -> KDLoss:
        teacher = dataclasses.replace(targets, hidden=self.adapter(targets.hidden.detach()))
        shared = dict(
            labels=batch.labels, kd_weight=self.alpha, ce_weight=1.0 - self.alpha, temperature=self.temperature,
            squared_temperature=True, normalizer=normalizer, rows=batch.counted, max_scratch_bytes=max_scratch_bytes,
        )

        def still(noun):
            return dataclasses.replace(noun, hidden=noun.hidden.detach(), weight=noun.weight.detach())

        of_student = kd_loss(student, still(teacher), divergences.forward_kl(), stats=self.stats, **shared)
        of_adapter = kd_loss(teacher, still(student), divergences.reverse_kl(), **shared)
        # The divergence is in both; it is counted once, and its gradient goes both ways.
        repeated = self.alpha * self.temperature**2 * of_student.stats["divergence"][batch.counted].sum() / normalizer
        return KDLoss(of_student.loss + of_adapter.loss - repeated, of_student.stats)


def build(config: Config, parts: Parts) -> Method:
    options, (teacher, *_) = config.options, live_teachers(config, parts)
    adapter = Adapter(parts.teachers[0].head.weight.shape[1], options.width, options.dropout)
    objective = StudentFriendly(adapter, options.alpha, options.temperature)
    return Method.single("pesf_kd", DatasetTokens.of(config, parts.documents), teacher, objective)


register(MethodSpec(
    "pesf_kd", "a teacher with an adapter that learns to suit the student", "Rao et al. 2023, arXiv 2205.15308", build,
    Options, needs=("live teacher",),
))
