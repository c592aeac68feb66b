"""DistiLLM: skewed divergences, on texts that the student writes more often the more it needs them, and reads again.

Ko et al. 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models", arXiv 2402.03898. Two parts.

*Skew KL.* ``KL(p || a p + (1 - a) q)`` or, the default, ``KL(q || (1 - a) p + a q)``, both with a = 0.1: bounded where
one model has no mass. The gradient flows through the mixture (DistiLLM-2 stops it there). The loss is ``kd_weight D +
ce_weight CE``, and with ``options.lm_source`` also ``lm_weight`` times the next-token loss of as many tokens of a plain
text corpus, read as ``data`` says but for the holdout.

*Adaptive off-policy schedule.* With phi the threshold, u uniform in [0, 1), t of T steps done (this one included) and

    g = phi (1 - t / T)      ("decreasing"; "constant": phi / 2; "increasing": phi t / T)

a step trains on texts that the student writes now (u < g, or u < phi while the buffer is not full), else on some from
the buffer of those that it wrote before (u < phi), else on the data. phi starts at 0; at every validation, once an
epoch, a next-token loss on the held-out texts (``data.holdout``) of at least the reference + ``tolerance`` raises phi
by ``raise_by``, up to 1, and becomes the reference. The first reference is the untrained student's.

A replayed text costs no pass of the teacher: with it lie its ``replay_k`` likeliest tokens and the exact mass of all
others, which ``objective.tail`` treats as with a cache (its bucket makes the divergence a lower bound of the full one).
``replay_k: 0`` reads it again, as the released code does. Buffers (12 k bytes a token, on the host and in checkpoints)
belong to one process each, as there: what a process replays is what it wrote, so that once something is replayed a run
on another number of processes is another run, and one is resumed on as many as it began on.

Defaults are the released scripts', whose corpus is OpenWebText. The schedule is as released; that the paper's is the
same could not be checked. Not reproduced from the released code: a forward loss without the teacher's entropy (no
divergence by its value), and a threshold computed from None in every mode but the adaptive one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kd_trainer import rollout
from kd_trainer.config import Config
from kd_trainer.data import Document, load_documents
from kd_trainer.errors import check_one_of, check_positive, fail
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, Parts, cross_entropy
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import live_teachers
from kd_trainer.tokens import (
    FRESH, OffPolicyTokens, RememberingTeacher, ReplayBuffer, Schedule, SideBySide, Writer, check_prompts,
)


@dataclass(frozen=True)
class Options:
    threshold: float = 0.0  # phi at the start
    raise_by: float = 0.1  # 0: phi stays, and nothing is validated
    tolerance: float = 0.1  # nats
    validate_every: int | None = None  # steps; None: an epoch's
    fresh: str = "decreasing"
    capacity: int = 1000  # sequences in the buffer, of each process
    replay_k: int = 64
    lm_source: str = ""  # as data.source
    lm_weight: float = 1.0

    def __post_init__(self) -> None:
        check_one_of("config", "options.fresh", self.fresh, tuple(FRESH))
        for name in ("threshold", "raise_by"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                fail("config", f"options.{name}", "in [0, 1]", getattr(self, name))
        for name, least in (("tolerance", 0), ("replay_k", 0), ("capacity", 1), ("validate_every", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                fail("config", f"options.{name}", f"at least {least}", value)
        check_positive("config", "options.lm_weight", self.lm_weight)


def build(config: Config, parts: Parts) -> Method:
    options = config.options
    if config.objective.kd_weight == 0.0:
        remedy = "what a student wrote is no label for it"
        fail("config", "objective.kd_weight", "above 0 for method distillm", 0.0, remedy)
    check_prompts(parts.documents, config.rollout.prompt_tokens)
    texts, buffer = DatasetTokens.of(config, parts.documents), ReplayBuffer(options.capacity)
    steps = config.train.steps or texts.plan.steps_in(config.train.epochs)
    largest = max(len(texts.plan.step(index)) for index in range(steps))
    if options.capacity < largest:
        fail("config", "options.capacity", f"at least the {largest} texts of a step", options.capacity)
    held_out = _documents(config, parts, part="holdout") if options.raise_by else []

    def validate() -> float:
        scores = rollout.score(parts.student, held_out)
        return -float(torch.cat([score.logprob for score in scores]).double().mean())

    every = options.validate_every or texts.plan.steps_in(1.0)
    schedule = Schedule(steps, options.threshold, options.raise_by, options.tolerance, every, options.fresh)
    own = OffPolicyTokens(texts, Writer.student(config, parts), buffer, validate, schedule, config.seed)
    teacher = live_teachers(config, parts)[0]
    if options.replay_k:
        teacher = RememberingTeacher(teacher, buffer, options.replay_k, config.objective.temperature)
    tokens, objectives = own, {"main": DivergenceObjective.of(config)}
    if options.lm_source:
        corpus = _documents(config, parts, source=options.lm_source, part="train", holdout=0.0)
        tokens = SideBySide(own, corpus, "lm", config.train.batch_tokens, config.seed)
        objectives["lm"] = cross_entropy(options.lm_weight)
    return Method("distillm", tokens, teacher, objectives, after_step=own.after_step)


def _documents(config: Config, parts: Parts, **data: object) -> Sequence[Document]:
    """Texts as ``data`` says, but for some of its keys."""
    if data["part"] == "holdout" and not config.data.holdout:
        remedy = "its schedule goes by the loss on those texts; or set options.raise_by=0"
        fail("config", "data.holdout", "above 0 for method distillm", config.data.holdout, remedy)
    return load_documents(dataclasses.replace(config.data, **data), parts.tokenizer, parts.student.vocab)


register(MethodSpec(
    "distillm", "a skew KL, with the student's own texts on demand and replayed", "Ko et al. 2024, arXiv 2402.03898",
    build, Options, {"objective": {"divergence": "skew_reverse_kl(alpha=0.1)"}}, ("live teacher", "prompts"),
))
