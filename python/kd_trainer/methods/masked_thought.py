"""Masked thought: next-token prediction from a context with holes.

Chen et al. 2024, "Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of
Language Models", arXiv 2403.02178. Tokens of the answer y that the model reads are hidden behind a mask token, those
that it predicts are not:

    mean_t -log q(y_t | x, m(y)_<t),        m hides ``fraction(s)`` of the tokens of y, chosen anew in every step s

No teacher takes part: it is method kid with ``rewrite: false`` and without its KL. The share rises linearly from 0 to
``fraction`` over the first ``warmup`` of the run, 0.4 and 0.66 in the authors' script for GSM8K. They toss a coin for
every token; here it is the rounded share of every text. They mask with a token added for it, or with the padding token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kd_trainer.config import Config
from kd_trainer.data import Document
from kd_trainer.errors import fail
from kd_trainer.methods.base import DatasetTokens, Method, Parts, cross_entropy
from kd_trainer.registry import MethodSpec, register
from kd_trainer.rollout import choose_places, hide, labelled, step_seed
from kd_trainer.teachers import NoTeacher


@dataclass(frozen=True)
class Options:
    fraction: float = 0.4
    warmup: float = 0.66  # of the run's steps
    mask: str | None = None  # a token; None: the tokenizer's BOS token

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            fail("config", "options.fraction", "above 0, up to 1", self.fraction)
        if not 0.0 <= self.warmup <= 1.0:
            fail("config", "options.warmup", "a fraction in [0, 1]", self.warmup)


@dataclass(frozen=True)
class MaskedTokens(DatasetTokens):
    """Texts with holes, which are to be predicted as they are."""

    options: Options
    mask_id: int
    seed: int
    steps: int

    def fraction(self, index: int) -> float:
        rising = self.options.warmup * self.steps
        return self.options.fraction * min(1.0, index / rising if rising else 1.0)

    def produce(self, documents: Sequence[Document], index: int) -> list[Document]:
        if not (fraction := self.fraction(index)):
            return list(documents)
        keys = torch.tensor([document.key for document in documents], dtype=torch.int64)
        places = choose_places(documents, fraction, seed=step_seed(self.seed, index, "masks"), keys=keys)
        return labelled(hide(documents, places, self.mask_id), documents)


def build(config: Config, parts: Parts) -> Method:
    plan = DatasetTokens.of(config, parts.documents).plan
    tokens = MaskedTokens(
        parts.documents, plan, config.options, parts.token_id("options.mask", config.options.mask), config.seed,
        steps=config.train.steps or plan.steps_in(config.train.epochs),
    )
    return Method.single("masked_thought", tokens, NoTeacher(), cross_entropy())


register(MethodSpec(
    "masked_thought", "labels, from contexts with holes in them", "Chen et al. 2024, arXiv 2403.02178", build, Options,
))
