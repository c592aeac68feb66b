"""TGeo-KD: how much a token learns from the teacher and how much from its label is learnt too, by what it does for
held-out text.

Hu et al. 2024, "Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation", arXiv
2312.15112:

    L(theta, phi) = mean_i a_i T^2 KL(p_i || q_i; T) + (1 - a_i) CE_i,        a_i = sigmoid(network_phi(features_i))

theta descends L with a fixed; phi descends the cross-entropy of held-out text (``data.holdout``) at theta -
``inner_lr`` dL/dtheta, see :mod:`kd_trainer.unrolled`. The authors' code forms a_i without gradient, so that its
network is never trained: not here. A step costs two more gradients (of its own text, and of as much held-out text) and
two more passes.

The paper classifies images, and features are vectors there. Here they are numbers of a token with label y: p(y), q(y),
and the mean p(y) of that y so far; squared differences of these and 1; KL, both entropies, and whether teacher and
student agree. Layers of 32 and 16, T = 1.5. The paper has learning rate 0.1 for both levels; here the network's is
``pace`` times the student's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from kd_kernels import KDLoss, LinearLogits, divergences, kd_loss, token_stats
from kd_trainer.config import Config
from kd_trainer.data import Batch, Document
from kd_trainer.errors import check_positive, fail
from kd_trainer.methods.base import AddGradient, DatasetTokens, Method, Objective, Parts, held_out
from kd_trainer.models import CausalLM, rows_of
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import Targets, teacher_of
from kd_trainer.unrolled import UnrolledStep

SEEN = ("divergence", "student_entropy", "teacher_entropy", "agreement", "label_logprob", "teacher_label_logprob")


@dataclass(frozen=True)
class Options:
    inner_lr: float = 0.01  # of the unrolled step
    pace: float = 30.0

    def __post_init__(self) -> None:
        check_positive("config", "options.inner_lr", self.inner_lr)
        check_positive("config", "options.pace", self.pace)


class LearntShares(Objective):
    stats = ("divergence", "label_logprob", "teacher_share")

    def __init__(self, config: Config, student: CausalLM) -> None:
        super().__init__()
        self.pace, self.divergence = config.options.pace, divergences.parse(config.objective.divergence)
        self.how = dict(temperature=config.objective.temperature, squared_temperature=True, tail=config.objective.tail)
        layers = nn.Linear(12, 32), nn.LeakyReLU(), nn.Linear(32, 16), nn.LeakyReLU(), nn.Linear(16, 1)
        self.network = nn.Sequential(*layers)
        nn.init.zeros_(self.network[-1].weight)  # half and half at first
        nn.init.zeros_(self.network[-1].bias)
        self.largest_entropy = math.log(student.vocab)
        self.register_buffer("labels_seen", torch.zeros(2, student.vocab, dtype=torch.float64))  # count; sum of p(y)
        self.new_labels = torch.zeros_like(self.labels_seen)  # of this process, in this step
        self.unrolled = UnrolledStep(student, config.options.inner_lr, self.parameters())
        self.phase = "step"  # or "unrolled", the same without a gradient for phi; or "held out", cross-entropy alone

    @property
    def has_teacher(self) -> bool:
        return self.phase != "held out"

    def forward(
        self, student: CausalLM, targets: Targets, batch: Batch, normalizer: float, max_scratch_bytes: int | None = None
    ) -> KDLoss:
        labels = batch.labels[batch.counted]

        def both(noun: LinearLogits) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            """``T^2 KL``, cross-entropy, and what else is seen; ``[M]`` each, for the rows that count."""
            label = -token_stats(rows_of(noun, batch.counted), labels, max_scratch_bytes=max_scratch_bytes).logprob
            if self.phase == "held out":
                return torch.zeros_like(label), label, {}
            pull = kd_loss(
                noun, targets, self.divergence, labels=batch.labels, rows=batch.counted, reduction="none", stats=SEEN,
                max_scratch_bytes=max_scratch_bytes, **self.how,
            )
            return pull.loss[batch.counted], label, {name: x[batch.counted] for name, x in pull.stats.items()}

        slopes = 0.0
        if self.phase == "step":
            slopes = self.unrolled.slopes(lambda: torch.sub(*both(student(batch))[:2])) / normalizer
        pull, label, seen = both(student(batch))
        features = self.features(seen, labels) if seen else self.network[0].weight.new_zeros(len(pull), 12)
        share = torch.sigmoid(self.network(features)[:, 0])
        bend = (slopes * share).sum()  # 0, with the gradient of the held-out loss
        fixed = share.detach().to(label.dtype) if seen else torch.zeros_like(label)
        loss = (fixed * pull + (1.0 - fixed) * label).sum() / normalizer + (bend - bend.detach())
        if self.phase == "step":
            p = torch.stack([torch.ones_like(features[:, 0]), features[:, 0]]).double()
            self.new_labels = self.new_labels.to(p.device).index_add(1, labels, p)
        stats = dict(zip(self.stats, (pull.detach(), -label.detach(), fixed)))
        return KDLoss(loss, {name: batch.spread(values) for name, values in stats.items()})

    def features(self, seen: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """``[M, 12]``, in the network's precision."""
        # A label that a cache does not hold is one that the teacher found unlikely.
        p, q = seen["teacher_label_logprob"].nan_to_num(nan=-torch.inf).exp(), seen["label_logprob"].exp()
        count, total = self.labels_seen[:, labels]
        mean = ((total + 0.5) / (count + 1.0)).to(p.dtype)
        gaps = [(mean - q).square(), (1.0 - q).square(), (p - q).square(), (1.0 - p).square(), (1.0 - mean).square()]
        entropies = [seen[f"{whose}_entropy"] / self.largest_entropy for whose in ("teacher", "student")]
        kl = torch.log1p(seen["divergence"].clamp_min(0.0))
        return torch.stack([p, q, mean, *gaps, kl, *entropies, seen["agreement"]], 1).to(self.network[0].weight.dtype)

    def look_ahead(self, held: DatasetTokens) -> Callable[[int, Sequence[Document], AddGradient], dict[str, float]]:
        def before_step(step: int, documents: Sequence[Document], add_gradient: AddGradient) -> dict[str, float]:
            def add_held_out() -> Mapping[str, float]:
                self.phase = "held out"
                return add_gradient(held.step(step), of_all=True)

            self.phase = "unrolled"
            metrics = self.unrolled.look(lambda: add_gradient(documents), add_held_out)
            self.phase = "step"
            return {"held_out_loss": metrics["loss"]}

        return before_step

    def after_step(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Labels of all processes count from the next step on: within a step their order must not matter."""
        self.labels_seen += reduce(self.new_labels, "sum").to(self.labels_seen.device)
        self.new_labels = torch.zeros_like(self.labels_seen)
        return {}


def build(config: Config, parts: Parts) -> Method:
    if not config.data.holdout:
        fail("config", "data.holdout", "above 0 for method tgeo_kd", 0.0, "its shares are learnt on held-out text")
    if parts.student.head.weight.dtype not in (torch.float32, torch.float64):
        fail("config", "student.dtype", "float32 for method tgeo_kd, which takes differences", config.student.dtype)
    tokens, held = (DatasetTokens.of(config, documents) for documents in (parts.documents, held_out(config, parts)))
    steps = config.train.steps or tokens.plan.steps_in(config.train.epochs)
    held.plan.check_parts(steps, config.train.accumulation * PartialState().num_processes)
    objective = LearntShares(config, parts.student)
    return Method.single(
        "tgeo_kd", tokens, teacher_of(config, parts), objective, before_step=objective.look_ahead(held),
        after_step=objective.after_step,
    )


register(MethodSpec(
    "tgeo_kd", "teacher and label in shares learnt for each token", "Hu et al. 2024, arXiv 2312.15112", build, Options,
    defaults={"objective": {"temperature": 1.5}}, needs=("teacher",),
))
