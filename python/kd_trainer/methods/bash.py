"""BASH, batch-scheduled sampling: labels of the data, after contexts in which the student has put some of the words.

Cen et al. 2025, "Bridging the Training-Inference Gap in LLMs by Leveraging Self-Generated Tokens", arXiv 2410.14655. Of
a text (x, y) each token of the context is, with probability beta, not y's but what the student says after the context
so far:

    mean_t -log q(y_t | x, c_<t),        c_t = y_t with probability 1 - beta, else c_t ~ q(.|x, c_<t)

Contexts are made for a whole round of steps at once (``round_steps``; None: for all texts, once an epoch), by the
student as it is when the round begins, and trained on until the next one. Unlike those of method kid, they are decoded
token by token, from ``rollout`` 's distribution. No teacher takes part.

Uncertain: the paper's probabilities, their schedule and its number of rounds could not be read. Here beta rises
linearly over the run from ``first_fraction`` to ``fraction``, round by round; by default it is constant. Tokens that
are labels of no row stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kd_trainer.config import Config
from kd_trainer.data import Document
from kd_trainer.errors import fail
from kd_trainer.methods.base import DatasetTokens, Method, Parts, cross_entropy
from kd_trainer.models import CausalLM
from kd_trainer.registry import MethodSpec, register
from kd_trainer.rollout import Sampling, labelled, mix, step_seed
from kd_trainer.teachers import NoTeacher
from kd_trainer.tokens import Rounds


@dataclass(frozen=True)
class Options:
    fraction: float = 0.25  # beta, at the end
    first_fraction: float | None = None  # at the beginning; None: the same
    round_steps: int | None = None  # None: an epoch's

    def __post_init__(self) -> None:
        for name, least in (("fraction", "above 0"), ("first_fraction", "at least 0")):
            value = getattr(self, name)
            if value is not None and not (0.0 <= value <= 1.0 and (value or name == "first_fraction")):
                fail("config", f"options.{name}", f"{least}, up to 1", value)
        if self.round_steps is not None and self.round_steps < 1:
            fail("config", "options.round_steps", "at least 1", self.round_steps)


class Mixer:
    """Makes the contexts of a round."""

    def __init__(self, config: Config, student: CausalLM, steps: int) -> None:
        rollout = config.rollout
        self._options, self._student, self._steps, self._seed = config.options, student, steps, config.seed
        self._sampling = Sampling(rollout.temperature, rollout.top_k, rollout.top_p)
        self._batch_size, self._autocast = rollout.batch_size, config.train.precision == "bf16"

    def fraction(self, step: int) -> float:
        last = self._options.fraction
        first = last if self._options.first_fraction is None else self._options.first_fraction
        return first + (last - first) * step / max(1, self._steps - 1)

    def __call__(self, texts: Sequence[Document], begin: int) -> list[Document]:
        if not (fraction := self.fraction(begin)):
            return list(texts)
        keys = torch.tensor([text.key for text in texts], dtype=torch.int64)
        with torch.autocast(self._student.device.type, torch.bfloat16, enabled=self._autocast):
            seed = step_seed(self._seed, begin, "contexts")
            mixed = mix(
                self._student, texts, fraction=fraction, sampling=self._sampling, seed=seed, keys=keys,
                batch_size=self._batch_size,
            )
        return labelled(mixed.documents, texts)


def build(config: Config, parts: Parts) -> Method:
    if any(document.layout is not None for document in parts.documents):
        fail("train", "texts for method bash", "of one segment each", "packed sequences", "give them unpacked")
    texts = DatasetTokens.of(config, parts.documents)
    mixer = Mixer(config, parts.student, config.train.steps or texts.plan.steps_in(config.train.epochs))
    tokens = Rounds.of(config, texts, mixer, config.options.round_steps)
    return Method.single("bash", tokens, NoTeacher(), cross_entropy())


register(MethodSpec(
    "bash", "labels, after contexts that mix the text with the student's words", "Cen et al. 2025, arXiv 2410.14655",
    build, Options,
))
