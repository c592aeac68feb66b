"""LayerSkip: every layer learns to predict through the one head, so that a model can stop early and verify itself.

Elhoushi et al. 2024, "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding", arXiv 2404.16710:

    L = sum_l s_l CE(head(norm(h_l)), y) / sum_l s_l        over the layers that are on in this step

with ``s_l`` by ``scale``: one, l, sum (of 0..l: the paper's), sqrt, or inverse (of the distance to the last), all but
the last layer's times ``exit_scale``. ``curriculum`` says which layers are on: "all"; "rotational", every
``rotation``-th, moved on by one each step; or "gradual", from the last down to the first over the first half of
``gradual_steps``. The last layer always is. Dropping layers at random, the paper's other half, is the model's own
business (a transformers option where it has one).

With ``distil: true`` the early exits learn from the last layer's distribution (forward KL, no gradient into it) instead
of the labels: all exits are rows of one head, so it is still one call of the loss.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from kd_kernels import KDLoss, divergences, kd_loss
from kd_trainer.config import Config
from kd_trainer.data import Batch
from kd_trainer.errors import check_one_of, check_positive, fail
from kd_trainer.methods.base import DatasetTokens, Method, Objective, Parts
from kd_trainer.models import CausalLM
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import NoTeacher, Targets

SCALES = {
    "one": lambda layer, last: 1.0,
    "l": lambda layer, last: layer + 1.0,
    "sum": lambda layer, last: (layer + 1.0) * (layer + 2.0) / 2.0,
    "sqrt": lambda layer, last: math.sqrt(layer + 1.0),
    "inverse": lambda layer, last: 1.0 / (last - layer + 1.0),
}


@dataclass(frozen=True)
class Options:
    scale: str = "sum"
    exit_scale: float = 1.0
    curriculum: str = "rotational"
    rotation: int = 4  # of "rotational": every so many layers are on
    gradual_steps: int = 1000  # of "gradual": steps until all layers are on, times two
    distil: bool = False

    def __post_init__(self) -> None:
        check_one_of("config", "options.scale", self.scale, tuple(SCALES))
        check_one_of("config", "options.curriculum", self.curriculum, ("all", "rotational", "gradual"))
        check_positive("config", "options.exit_scale", self.exit_scale)
        for name in ("rotation", "gradual_steps"):
            if getattr(self, name) < 1:
                fail("config", f"options.{name}", "at least 1", getattr(self, name))


def layers_on(layers: int, step: int, options: Options) -> list[int]:
    """Which of ``layers`` layers are trained in a step, rising; the last one always is."""
    last = layers - 1
    if options.curriculum == "all":
        return list(range(layers))
    if options.curriculum == "rotational":
        return sorted(
            {layer for layer in range(layers) if layer % options.rotation == step % options.rotation} | {last}
        )
    down_to = last - min(last, int(layers * 2 * step / options.gradual_steps))
    return list(range(down_to, layers))


class EarlyExits(Objective):
    """The exits of a step are rows of one call, each with its weight."""

    stats = ("label_logprob",)
    has_teacher = False

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options, self.step = options, 0

    def begin_step(self, index: int) -> None:
        self.step = index

    def forward(
        self, student: CausalLM, targets: Targets, batch: Batch, normalizer: float, max_scratch_bytes: int | None = None
    ) -> KDLoss:
        hidden = student.hidden_of_layers(batch)  # [L, N, H], the last as the head gets it
        on = layers_on(len(hidden), self.step, self.options)
        scales = [SCALES[self.options.scale](layer, len(hidden) - 1) for layer in on]
        scales = [
            scale * (self.options.exit_scale if layer < len(hidden) - 1 else 1.0) for layer, scale in zip(on, scales)
        ]
        share = [scale / sum(scales) for scale in scales]
        logits = student.logits_of(hidden[on])  # [E, N] rows
        weight = torch.tensor(share, dtype=torch.float64, device=hidden.device)[:, None].expand(logits.leading_shape)
        options = dict(normalizer=normalizer, max_scratch_bytes=max_scratch_bytes)
        labels = batch.labels.expand(logits.leading_shape)
        if not self.options.distil or len(on) == 1:
            result = kd_loss(
                logits, None, labels=labels, kd_weight=0.0, ce_weight=1.0, token_weight=weight, stats=self.stats,
                **options
            )
            return KDLoss(result.loss, {"label_logprob": result.stats["label_logprob"][-1]})
        last = dataclasses.replace(logits, hidden=hidden[-1])
        result = kd_loss(
            last, None, labels=batch.labels, kd_weight=0.0, ce_weight=share[-1], stats=self.stats, **options
        )
        exits = dataclasses.replace(logits, hidden=hidden[on[:-1]])
        teacher = dataclasses.replace(logits, hidden=hidden[-1].detach().expand(len(on) - 1, -1, -1))
        distilled = kd_loss(
            exits, teacher, divergences.parse("forward_kl"), labels=labels[:-1], token_weight=weight[:-1], **options
        )
        return KDLoss(result.loss + distilled.loss, result.stats)


def build(config: Config, parts: Parts) -> Method:
    tokens = DatasetTokens.of(config, parts.documents)
    return Method.single("layerskip", tokens, NoTeacher(), EarlyExits(config.options))


register(MethodSpec(
    "layerskip", "labels at every layer, through the one head", "Elhoushi et al. 2024, arXiv 2404.16710", build,
    Options,
))
