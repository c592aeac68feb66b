"""Speculative knowledge distillation: the student writes, and the teacher replaces what it would not have said.

Xu et al. 2024, "Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved Sampling",
arXiv 2410.11325, algorithm 1. A token y_t ~ q(.|y_<t, x) of the student's stays if it is among the K likeliest of the
teacher's p(.|y_<t, x); else y_t ~ p. Then

    mean_t D(p || q)(y_t | x, y_<t)                          D: objective.divergence, the forward KL

over the tokens of y. The student drafts ``gamma`` tokens at a time, and the teacher reads them in one pass. K = V is
on-policy distillation, K = 0 learns from the teacher's own texts (:func:`kd_trainer.rollout.interleave`).

Defaults are the paper's: K = 25, gamma = 5, the student draws at temperature 0.5 and top-p 0.5 (the ``rollout``
section), the teacher at 0.2 and 0.5. ``last_k`` and ``last_gamma`` are the values of the last step, with a straight
line up to there: the paper finds that a K which falls does worse than one that stays, and 5 to 50 to do about as well.

Uncertain: by which rounding K moves along its line (here to the nearest). The mean is over the tokens of a step here.

Not reproduced from the public code: a test on another token than the one that is kept; a test on logits that are
already tempered and cut, where beyond the nucleus all ids tie; a loss that leaves out the first token and takes in one
past the end; a batch of one.

Logged, of the texts of the first process: ``acceptance``, accepted drafts over tested ones, ``tokens_per_round`` of the
teacher's passes, ``k`` and ``gamma``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kd_trainer import rollout
from kd_trainer.config import Config
from kd_trainer.data import Document
from kd_trainer.errors import fail
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, Parts
from kd_trainer.models import CausalLM
from kd_trainer.registry import MethodSpec, register
from kd_trainer.rollout import RollOuts
from kd_trainer.teachers import live_teachers
from kd_trainer.tokens import Writer, check_prompts


@dataclass(frozen=True)
class Options:
    k: int = 25
    last_k: int | None = None  # None: as k
    gamma: int = 5
    last_gamma: int | None = None  # None: as gamma
    teacher_temperature: float = 0.2
    teacher_top_p: float | None = 0.5

    def __post_init__(self) -> None:
        for name, least in (("k", 0), ("last_k", 0), ("gamma", 1), ("last_gamma", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                fail("config", f"options.{name}", f"at least {least}", value)
        if not 0.0 <= self.teacher_temperature < float("inf"):
            fail("config", "options.teacher_temperature", "finite and at least 0", self.teacher_temperature)
        if self.teacher_top_p is not None and not 0.0 < self.teacher_top_p <= 1.0:
            fail("config", "options.teacher_top_p", "in (0, 1]", self.teacher_top_p)

    def at(self, step: int, steps: int) -> tuple[int, int]:
        """K and gamma of a step out of so many."""
        done = step / max(steps - 1, 1)
        between = lambda first, last: first if last is None else round(first + done * (last - first))  # noqa: E731
        return between(self.k, self.last_k), between(self.gamma, self.last_gamma)


@dataclass(frozen=True)
class Corrected:
    """What writes: the student with the teacher at its side."""

    teacher: CausalLM
    sampling: rollout.Sampling  # the teacher's
    found: dict[str, float] = field(default_factory=dict)  # what the last roll-out was like, to be logged

    def __call__(self, student: CausalLM, prompts: Sequence[Tensor], options: rollout.Options, **how: Any) -> RollOuts:
        if self.teacher.device != student.device:
            self.teacher.to(student.device)
        written = rollout.interleave(student, self.teacher, prompts, options, teacher_sampling=self.sampling, **how)
        self.found.update(acceptance=written.acceptance, tokens_per_round=written.tokens_per_round)
        return written


@dataclass(frozen=True)
class InterleavedTokens(DatasetTokens):
    """Each text's prompt, continued by a writer that is told K and gamma of the step."""

    writer: Writer
    options: Options
    steps: int
    found: Mapping[str, float]

    def produce(self, documents: Sequence[Document], index: int) -> list[Document]:
        k, gamma = self.options.at(index, self.steps)
        return self.writer.write(documents, index, k=k, gamma=gamma)

    def after_step(self, index: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """For :class:`Method`: what is logged."""
        k, gamma = self.options.at(index, self.steps)
        return {"k": float(k), "gamma": float(gamma), **self.found}


def build(config: Config, parts: Parts) -> Method:
    options = config.options
    if config.objective.kd_weight == 0.0:
        fail("config", "objective.kd_weight", "above 0 for method skd", 0.0, "method seqkd learns labels alone")
    for name in ("k", "last_k"):
        if (getattr(options, name) or 0) > parts.student.vocab:
            fail("config", f"options.{name}", f"at most V={parts.student.vocab}", getattr(options, name))
    check_prompts(parts.documents, config.rollout.prompt_tokens)
    teacher = live_teachers(config, parts)[0]
    corrected = Corrected(
        parts.teachers[0], rollout.Sampling(options.teacher_temperature, top_p=options.teacher_top_p)
    )
    plan = DatasetTokens.of(config, parts.documents).plan
    tokens = InterleavedTokens(
        parts.documents, plan, Writer.student(config, parts, corrected, purpose="skd"), options,
        steps=config.train.steps or plan.steps_in(config.train.epochs), found=corrected.found,
    )
    return Method.single("skd", tokens, teacher, DivergenceObjective.of(config), after_step=tokens.after_step)


register(MethodSpec(
    "skd", "the student's texts, in which the teacher replaces what it would not say",
    "Xu et al. 2024, arXiv 2410.11325", build, Options, {"rollout": {"temperature": 0.5, "top_p": 0.5}},
    ("live teacher", "prompts"),
))
