"""FIRST: the teacher's five likeliest tokens from a cache, recalibrated before they are learned from.

Shum et al. 2024, "FIRST: Teach A Reliable Large Language Model Through Efficient Trustworthy Distillation", arXiv
2408.12168. A fine-tuned teacher is over-confident; its k likeliest tokens hold nearly all of its mass. With l their
log-probabilities,

- "temperature": p_i ~ exp(l_i / c), with the c that gives the least expected calibration error on the validation text
  (``data.holdout`` is what is left out of training; without it, on the training text);
- "smoothing": delta of the mass moves from the first to the other k - 1, evenly;

and the student's KL from the recalibrated p is taken over those k tokens, both renormalised there; a prompt's tokens do
not count. Which of the two the paper ends with, and how it selects c, could not be read in its text. The released code
feeds probabilities where log-probabilities belong, and smooths the student too: neither is done here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kd_kernels import SparseTargets, divergences
from kd_trainer.config import Config
from kd_trainer.data import Batch, Document
from kd_trainer.errors import check_one_of, check_positive, fail
from kd_trainer.evaluate import Calibration
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, Parts, held_out
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import CachedTeacher, teacher_of

TEMPERATURES = tuple(math.exp(0.05 * i) for i in range(-14, 29))
"""From 0.5 to 4: over-confidence and under-confidence by steps of five percent."""


@dataclass(frozen=True)
class Options:
    k: int = 5
    recalibration: str = "temperature"
    temperature: float | None = None  # of "temperature"; None: by expected calibration error
    delta: float = 0.1  # of "smoothing"

    def __post_init__(self) -> None:
        check_one_of("config", "options.recalibration", self.recalibration, ("temperature", "smoothing", "none"))
        if self.k < 2:
            fail("config", "options.k", "at least 2", self.k)
        if self.temperature is not None:
            check_positive("config", "options.temperature", self.temperature)
        if not 0.0 <= self.delta < 1.0:
            fail("config", "options.delta", "in [0, 1)", self.delta)


def heads(targets: SparseTargets, k: int) -> SparseTargets:
    """The first k entries of every row, renormalised over them; entries fall in log-probability."""
    counts = targets.offsets.diff()
    row = targets.row_of_entry()
    kept = torch.arange(len(row), device=row.device) - targets.offsets[row] < k
    offsets = torch.nn.functional.pad(counts.clamp(max=k).cumsum(0), (1, 0))
    return renormalized(SparseTargets(offsets, targets.ids[kept], targets.logprobs[kept]))


def renormalized(targets: SparseTargets) -> SparseTargets:
    """Entries of mass 1 a row."""
    row = targets.row_of_entry()
    total = torch.zeros(len(targets.offsets) - 1, dtype=torch.float64, device=row.device)
    total.index_add_(0, row, targets.logprobs.double().exp())
    logprobs = targets.logprobs.double() - total.log()[row]
    return dataclasses.replace(targets, logprobs=logprobs.to(targets.logprobs.dtype))


def tempered(targets: SparseTargets, temperature: float) -> SparseTargets:
    """``p_i ~ exp(l_i / c)`` over the entries of each row."""
    return renormalized(dataclasses.replace(targets, logprobs=targets.logprobs / temperature))


def smoothed(targets: SparseTargets, delta: float) -> SparseTargets:
    """``delta`` of the mass taken from the first entry and spread over the others; never more than the first one
    has."""
    counts, row = targets.offsets.diff(), targets.row_of_entry()
    is_first = torch.arange(len(row), device=row.device) == targets.offsets[row]
    p = targets.logprobs.double().exp()
    moved = torch.where(counts > 1, p[targets.offsets[:-1].clamp(max=max(len(p) - 1, 0))].clamp(max=delta), 0.0)
    p = torch.where(is_first, p - moved[row], p + moved[row] / (counts[row] - 1).clamp(min=1))
    return dataclasses.replace(targets, logprobs=p.clamp_min(1e-30).log().to(targets.logprobs.dtype))


class RecalibratedTeacher:
    """The rows of a cache, cut to their head and recalibrated."""

    def __init__(self, cached: CachedTeacher, options: Options, temperature: float) -> None:
        self.name = f"{cached.name}, first {options.k}, {options.recalibration} {temperature:g}"
        self._cached, self._options, self.temperature = cached, options, temperature

    def check(self, documents: Sequence[Document]) -> None:
        self._cached.check(documents)

    def expect(self, documents: Sequence[Document]) -> None:
        self._cached.expect(documents)

    def targets(self, batch: Batch) -> SparseTargets:
        head = heads(self._cached.targets(batch), self._options.k)
        if self._options.recalibration == "smoothing":
            return smoothed(head, self._options.delta)
        return tempered(head, self.temperature)


def best_temperature(cached: CachedTeacher, documents: Sequence[Document], k: int) -> float:
    """The one of TEMPERATURES with the least expected calibration error (15 bins) of the head's first entry."""
    cached.check(documents)
    errors = {temperature: Calibration() for temperature in TEMPERATURES}
    for document in documents:
        targets = cached.document_targets(document).select(document.counted.nonzero()[:, 0])
        labels = document.tokens[1:][document.counted]
        head = heads(targets, k)
        first = head.offsets[:-1]
        correct = head.ids[first] == labels
        for temperature, calibration in errors.items():
            calibration.add(tempered(head, temperature).logprobs[first].exp(), correct)
    return min(errors, key=lambda temperature: (errors[temperature].error(), temperature))


def build(config: Config, parts: Parts) -> Method:
    options = config.options
    cached = teacher_of(config, parts)
    if cached.reader.manifest.k < options.k:
        fail(
            "train", "options.k", f"at most the {cached.reader.manifest.k} that the cache keeps", options.k,
            f"build it with kdk cache build --k {options.k}",
        )
    temperature = 1.0
    if options.recalibration == "temperature":
        temperature = options.temperature or best_temperature(cached, held_out(config, parts), options.k)
        print(f"first: teacher's head at temperature {temperature:.3g}")
    objective = DivergenceObjective(
        divergences.parse(config.objective.divergence), kd_weight=config.objective.kd_weight,
        ce_weight=config.objective.ce_weight, tail="renormalize",
    )
    teacher = RecalibratedTeacher(cached, options, temperature)
    return Method.single("first", DatasetTokens.of(config, parts.documents), teacher, objective)


register(MethodSpec(
    "first", "the teacher's first five tokens from a cache, recalibrated", "Shum et al. 2024, arXiv 2408.12168", build,
    Options, needs=("cache",),
))
