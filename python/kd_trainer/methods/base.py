"""What a method is made of: a source of tokens, a teacher's target, an objective.

Each is a small object, and a method is a named combination of three. What the trainer asks of them, in the order of a
step:

1. ``tokens.step(i)``: the texts of the step, the same on every process, which are then dealt out;
2. ``tokens.produce(texts, i)``: what is trained on in their place (roll-outs, rewritten contexts), on each process its
   own. Draws are functions of the run's seed, the step and the document's own tokens, so a split changes none of them;
3. ``method.before_step(i, documents, add_gradient)``, where a method looks ahead;
4. documents are grouped by their tag, and each group goes through the objective of that tag in micro-batches;
5. ``teacher.targets(batch)``, where the objective has a teacher;
6. ``objective.loss(student, targets, batch, normalizer)``, which knows the step from ``begin_step``: its share of the
   mean over all documents of that tag in the step;
7. ``method.after_step(i, metrics)``: schedules move on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kd_kernels import KDLoss, LinearLogits, TokenStats, divergences, kd_loss, token_stats
from kd_kernels.divergences import Divergence
from kd_trainer.config import Config
from kd_trainer.data import Batch, Document, Plan, load_documents
from kd_trainer.errors import fail
from kd_trainer.models import CausalLM, rows_of
from kd_trainer.teachers import NoTeacher, Targets, Teacher


@dataclass(frozen=True)
class Parts:
    """What is loaded before a method is put together. ``teachers`` is empty where a cache or no teacher is used."""

    student: CausalLM
    documents: Sequence[Document]
    tokenizer: PreTrainedTokenizerBase
    tokenizer_fingerprint: str
    teachers: tuple[CausalLM, ...]
    teacher_fingerprints: tuple[str, ...]

    def token_id(self, option: str, token: str | None) -> int:
        """The id of what an option names, a token of the vocabulary; None stands for the tokenizer's BOS token."""
        name = self.tokenizer.bos_token if token is None else token
        found = None if name is None else self.tokenizer.convert_tokens_to_ids(name)
        stands_for_others = found == self.tokenizer.unk_token_id and name != self.tokenizer.unk_token
        if found not in range(self.student.vocab) or stands_for_others:
            why = " (this tokenizer has no BOS token)" if name is None else ""
            remedy = "name one that texts never use, or add it to the tokenizer and resize the models' embeddings" + why
            fail("config", option, "a token of the vocabulary", repr(token), remedy)
        return found


def held_out(config: Config, parts: Parts) -> Sequence[Document]:
    """The texts that ``data.holdout`` leaves out of training; all of them where it leaves out none."""
    if not config.data.holdout:
        return parts.documents
    return load_documents(dataclasses.replace(config.data, part="holdout"), parts.tokenizer, parts.student.vocab)


class TokenSource(Protocol):
    """Where the tokens of a step come from."""

    documents: Sequence[Document]  # the texts that they are, or that they are made from
    plan: Plan

    def step(self, index: int) -> list[Document]:
        """The texts of one optimiser step, of all micro-batches and processes together."""

    def produce(self, documents: Sequence[Document], index: int) -> list[Document]:
        """What step ``index`` trains on in the place of these texts, which are one process's share."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the source to go on exactly; plain values and tensors."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` returned."""


@dataclass(frozen=True)
class DatasetTokens:
    """Token source: the documents of a data set, in the order of a seeded plan, as they are."""

    documents: Sequence[Document]
    plan: Plan

    @classmethod
    def of(cls, config: Config, documents: Sequence[Document], **more: Any) -> Self:
        """``more``: fields of a subclass."""
        plan = Plan([len(document) for document in documents], config.train.batch_tokens, config.seed)
        return cls(documents, plan, **more)

    def step(self, index: int) -> list[Document]:
        return [self.documents[i] for i in self.plan.step(index)]

    def produce(self, documents: Sequence[Document], index: int) -> list[Document]:
        return list(documents)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        assert not state


class Objective(nn.Module):
    """What is minimised on the documents of one tag. A module, because some objectives have parameters of their own.

    Attributes:
        stats: statistics to log, as :func:`kd_kernels.kd_loss` names them.
        has_teacher: whether it looks at the teacher's targets.
        pace: what the learning rate of its own parameters is multiplied by.
    """

    stats: tuple[str, ...] = ("label_logprob",)
    has_teacher: bool = True
    pace: float = 1.0

    def begin_step(self, index: int) -> None:
        """Told which step comes, before it begins: for draws and schedules, which are functions of it."""

    def count(self, document: Document) -> int:
        """What a document adds to the step's normaliser: its rows that count; of objectives on whole sequences, 1."""
        return int(document.counted.sum())

    def loss(
        self, student: LinearLogits, targets: Targets, batch: Batch, normalizer: float,
        max_scratch_bytes: int | None = None,
    ) -> KDLoss:
        """The share of one micro-batch in the step's mean: its sum over what counts, divided by ``normalizer``."""
        raise NotImplementedError

    def forward(
        self, student: CausalLM, targets: Targets, batch: Batch, normalizer: float, max_scratch_bytes: int | None = None
    ) -> KDLoss:
        """The same, from the model: overridden where more than the last hidden states is needed."""
        return self.loss(student(batch), targets, batch, normalizer, max_scratch_bytes)


class DivergenceObjective(Objective):
    """Divergence from the teacher and cross-entropy with the labels, weighted, out of one pass over the logits."""

    def __init__(
        self, divergence: Divergence, kd_weight: float = 1.0, ce_weight: float = 0.0, temperature: float = 1.0,
        squared_temperature: bool = False, tail: str = "bucket",
        stats: tuple[str, ...] = ("divergence", "label_logprob"),
    ) -> None:
        super().__init__()
        self.divergence, self.kd_weight, self.ce_weight = divergence, kd_weight, ce_weight
        self.temperature, self.squared_temperature, self.tail = temperature, squared_temperature, tail
        self.has_teacher = kd_weight != 0.0
        self.stats = stats if self.has_teacher else tuple(name for name in stats if name != "divergence")

    @classmethod
    def of(cls, config: Config, **changes: Any) -> DivergenceObjective:
        """The objective that the configuration describes, with some of its fields decided by the method."""
        fields = dataclasses.asdict(config.objective)
        fields["divergence"] = divergences.parse(fields["divergence"])
        return cls(**(fields | changes))

    def loss(
        self, student: LinearLogits, targets: Targets, batch: Batch, normalizer: float,
        max_scratch_bytes: int | None = None,
    ) -> KDLoss:
        return self.over(batch.counted, student, targets, batch, normalizer, max_scratch_bytes)

    def over(
        self, rows: Tensor, student: LinearLogits, targets: Targets, batch: Batch, normalizer: float,
        max_scratch_bytes: int | None,
    ) -> KDLoss:
        """The loss of some of the rows (int64) that count."""
        return kd_loss(
            student, targets, self.divergence, labels=batch.labels, ce_weight=self.ce_weight, kd_weight=self.kd_weight,
            temperature=self.temperature, squared_temperature=self.squared_temperature, normalizer=normalizer,
            tail=self.tail, stats=self.stats, rows=rows, max_scratch_bytes=max_scratch_bytes,
        )


class LabelObjective(Objective):
    """A function of the labels' log-probabilities under the student, exact and differentiable, without a teacher."""

    has_teacher = False

    def token_loss(self, stats: TokenStats, student: LinearLogits, batch: Batch) -> Tensor:
        """``[M]``, for the rows that count; ``student`` stands for these rows alone."""
        raise NotImplementedError

    def loss(
        self, student: LinearLogits, targets: Targets, batch: Batch, normalizer: float,
        max_scratch_bytes: int | None = None,
    ) -> KDLoss:
        counted = rows_of(student, batch.counted)
        stats = token_stats(counted, batch.labels[batch.counted], max_scratch_bytes=max_scratch_bytes)
        loss = self.token_loss(stats, counted, batch).sum() / normalizer
        return KDLoss(loss, {"label_logprob": batch.spread(stats.logprob.detach())})


def cross_entropy(weight: float = 1.0) -> DivergenceObjective:
    """Next-token cross-entropy, without a teacher."""
    return DivergenceObjective(divergences.parse("forward_kl"), kd_weight=0.0, ce_weight=weight)


def summed(parts: Iterable[KDLoss]) -> KDLoss:
    """Losses of disjoint rows as one; each has the statistics of its own rows, and NaN elsewhere."""
    parts = list(parts)
    stats = {name: sum(part.stats[name].nan_to_num(nan=0.0) for part in parts) for name in parts[0].stats}
    return KDLoss(sum(part.loss for part in parts), stats)


class AddGradient(Protocol):
    """Adds the gradient of the mean loss over some documents; returns that loss, and statistics, by name."""

    def __call__(self, documents: Sequence[Document], of_all: bool = False) -> Mapping[str, float]:
        """``of_all``: the documents are those of all processes together, and not this one's share."""


def _nothing(step: int, *rest: object) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Method:
    """Tokens x teacher's target x objective.

    Args:
        objectives: by the tag of the documents that each is for. The loss of a step is the sum over tags of their
            means. Their parameters, if they have any (adapters, mixing weights), are trained with the student's.
        before_step: called before the gradient of a step is formed, with its number, its documents, and what forms
            gradients: for methods that look ahead. It leaves parameters as they were and gradients None; what it
            returns is logged.
        after_step: told every step's number and metrics; what it returns is logged with them.
    """

    name: str
    tokens: TokenSource
    teacher: Teacher = field(default_factory=NoTeacher)
    objectives: Mapping[str, Objective] = field(default_factory=dict)
    before_step: Callable[[int, Sequence[Document], AddGradient], dict[str, float]] = field(
        default=_nothing, kw_only=True
    )
    after_step: Callable[[int, Mapping[str, float]], dict[str, float]] = field(default=_nothing, kw_only=True)

    @classmethod
    def single(cls, name: str, tokens: TokenSource, teacher: Teacher, objective: Objective, **hooks: Any) -> Method:
        """One objective for all documents."""
        return cls(name, tokens, teacher, {"main": objective}, **hooks)

    def group(self, documents: Sequence[Document]) -> dict[str, list[Document]]:
        """Documents by their tag, in the order of the objectives."""
        groups: dict[str, list[Document]] = {tag: [] for tag in self.objectives}
        for document in documents:
            groups[document.tag].append(document)
        return groups
