"""Squared-error-logit loss: partial soft labels, of which only one probability a position is known.

Zhao et al. 2024, "Towards the Fundamental Limits of Knowledge Transfer over Finite Domains", arXiv 2310.07838. The
teacher draws a label a and says how likely it found it, and the student minimises

    1/2 (log q(a) - log p(a))^2

per token. Its optimum is q = p wherever labels were seen, at the rate of full soft labels but for logarithms.
(Weighting the cross-entropy of the same labels by p(a) tends to ``p^2 / sum p^2`` instead: a test shows it, nothing
here does it.)

``labels`` says where a comes from: "teacher" draws it anew from the live teacher at every position and step, which is
what the theory asks for; "text" takes the next token, for text that the teacher itself wrote by plain sampling. For
"text" a cache is enough, if it holds the teacher's log-probability of every next token. On labels that the *student*
draws, the same loss has the gradient of the reverse KL in expectation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kernels import KDLoss, LinearLogits, sample, token_stats
from kd_kernels.cache import CacheError
from kd_trainer.config import Config
from kd_trainer.data import Batch, Document
from kd_trainer.errors import check_one_of, fail
from kd_trainer.methods.base import DatasetTokens, Method, Objective, Parts
from kd_trainer.models import rows_of
from kd_trainer.registry import MethodSpec, register
from kd_trainer.rollout import step_seed
from kd_trainer.teachers import CachedTeacher, live_teachers, teacher_of


@dataclass(frozen=True)
class Options:
    labels: str = "teacher"

    def __post_init__(self) -> None:
        check_one_of("config", "options.labels", self.labels, ("teacher", "text"))


class SquaredErrorLogit(Objective):
    stats = ("label_logprob", "squared_error")

    def __init__(self, labels: str, seed: int = 0) -> None:
        super().__init__()
        self.labels, self.seed, self.step = labels, seed, 0

    def begin_step(self, index: int) -> None:
        self.step = index

    def loss(
        self, student: LinearLogits, targets: LinearLogits | Tensor, batch: Batch, normalizer: float,
        max_scratch_bytes: int | None = None,
    ) -> KDLoss:
        budget = dict(max_scratch_bytes=max_scratch_bytes)
        ids, teacher = self._labels(targets, batch, budget)
        logprob = token_stats(rows_of(student, batch.counted), ids, **budget).logprob
        error = 0.5 * (logprob - teacher).square()
        stats = {"label_logprob": batch.spread(logprob.detach()), "squared_error": batch.spread(error.detach())}
        return KDLoss(error.sum() / normalizer, stats)

    def _labels(self, targets: LinearLogits | Tensor, batch: Batch, budget: dict) -> tuple[Tensor, Tensor]:
        """``[M]`` twice: a label for each row that counts, and the teacher's log-probability of it."""
        text = batch.labels[batch.counted]
        if isinstance(targets, Tensor):
            return text, targets[batch.counted]
        teacher = rows_of(targets, batch.counted)
        if self.labels == "text":
            with torch.no_grad():
                return text, token_stats(teacher, text, **budget).logprob
        keys, places = (place[batch.counted] for place in batch.places())
        drawn = sample(teacher, seed=step_seed(self.seed, self.step, "labels"), keys=keys, positions=places, **budget)
        return drawn.ids, drawn.model_logprobs


class CachedLabels:
    """The teacher's log-probability of every next token, from its cache: fp32 ``[N]`` for a batch."""

    def __init__(self, cached: CachedTeacher) -> None:
        self.name, self._cached = cached.name, cached

    def _logprobs(self, document: Document) -> Tensor:
        rows = self._cached.reader.lookup(document.tokens, required=document.counted)
        unknown = (rows.next_logprobs.isnan() & document.counted).nonzero()
        if len(unknown):
            raise CacheError(
                f"train: cache {self._cached.reader.folder} must hold the teacher's log-probability of every next "
                f"token, got none at row {int(unknown[0])} of a document; build it "
                f"from the teacher with kdk cache build",
                self._cached.reader.folder,
            )
        return rows.next_logprobs

    def check(self, documents: Sequence[Document]) -> None:
        self._cached.check(documents)
        for document in documents:
            self._logprobs(document)

    def targets(self, batch: Batch) -> Tensor:
        return torch.cat([self._logprobs(document) for document in batch.documents]).to(batch.rows.device)


def build(config: Config, parts: Parts) -> Method:
    labels = config.options.labels
    if config.cache is not None and labels == "teacher":
        fail(
            "config", "options.labels", '"text" with a cache', '"teacher"',
            "a cache cannot draw other labels than it holds",
        )
    teacher = CachedLabels(teacher_of(config, parts)) if config.cache is not None else live_teachers(config, parts)[0]
    tokens = DatasetTokens.of(config, parts.documents)
    return Method.single("sel", tokens, teacher, SquaredErrorLogit(labels, config.seed))


register(MethodSpec(
    "sel", "squared error of the log-probability of one label the teacher drew", "Zhao et al. 2024, arXiv 2310.07838",
    build, Options, needs=("teacher",),
))
