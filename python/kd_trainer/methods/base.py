"""What a method is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kd_kernels import KDLoss, LinearLogits, divergences, kd_loss
from kd_kernels.divergences import Divergence
from kd_trainer.config import Config
from kd_trainer.data import Batch, Document, Plan
from kd_trainer.models import CausalLM
from kd_trainer.teachers import Targets, Teacher


@dataclass(frozen=True)
class Parts:
    """What is loaded before a method is put together. ``teacher_model`` is None where a cache or no teacher is used."""

    student: CausalLM
    documents: Sequence[Document]
    tokenizer_fingerprint: str
    teacher_model: CausalLM | None
    teacher_fingerprint: str | None


@dataclass(frozen=True)
class DatasetTokens:
    """Token source: the documents of a data set, in the order of a seeded plan."""

    documents: Sequence[Document]
    plan: Plan

    @classmethod
    def of(cls, config: Config, documents: Sequence[Document]) -> DatasetTokens:
        return cls(documents, Plan([len(document) for document in documents], config.train.batch_tokens, config.seed))

    def step(self, index: int) -> list[Document]:
        """The documents of one optimiser step, of all micro-batches and processes together."""
        return [self.documents[i] for i in self.plan.step(index)]


@dataclass(frozen=True)
class Objective:
    """Divergence from the teacher and cross-entropy with the labels, weighted, out of one pass over the logits."""

    divergence: Divergence
    kd_weight: float
    ce_weight: float
    temperature: float
    squared_temperature: bool
    tail: str
    stats: tuple[str, ...]

    @classmethod
    def of(cls, config: Config, stats: tuple[str, ...], **changes: float) -> Objective:
        """The objective that the configuration describes, with some of its fields decided by the method."""
        o = config.objective
        fields = dict(
            divergence=divergences.parse(o.divergence), kd_weight=o.kd_weight, ce_weight=o.ce_weight,
            temperature=o.temperature, squared_temperature=o.squared_temperature, tail=o.tail, stats=stats,
        )
        return cls(**(fields | changes))

    def loss(
        self, student: LinearLogits, targets: Targets, batch: Batch, normalizer: float,
        max_scratch_bytes: int | None = None,
    ) -> KDLoss:
        """The share of one micro-batch in the step's mean: its sum over the rows that count, over the step's rows."""
        return kd_loss(
            student, targets, self.divergence, labels=batch.labels, ce_weight=self.ce_weight, kd_weight=self.kd_weight,
            temperature=self.temperature, squared_temperature=self.squared_temperature, normalizer=normalizer,
            tail=self.tail, stats=self.stats, rows=batch.counted, max_scratch_bytes=max_scratch_bytes,
        )


@dataclass(frozen=True)
class Method:
    """Tokens x teacher's target x objective."""

    name: str
    tokens: DatasetTokens
    teacher: Teacher
    objective: Objective
