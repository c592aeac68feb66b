"""Mix Distillation: texts of several kinds in fixed proportions.

Li et al. 2025, "Small Models Struggle to Learn from Strong Reasoners", arXiv 2502.12143: students of up to 3 billion
parameters learn worse from long chains of thought, or from the largest teacher's, than from one part of those and four
of short ones, or of a smaller teacher's. Next-token loss; what is mixed is the data. ``data.source`` has the share
``weights[0]`` of the tokens of every step, ``sources`` have the others; all are read as ``data`` says. With a teacher
(live, or the cache of all the texts) and ``objective.kd_weight`` above 0, the objective is that of method kd.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from kd_trainer.config import Config
from kd_trainer.data import Document, Plan, load_documents
from kd_trainer.errors import fail
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, Parts, cross_entropy
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import NoTeacher, teacher_of


@dataclass(frozen=True)
class Options:
    sources: tuple[str, ...] = ()  # beside data.source
    weights: tuple[float, ...] = (0.2, 0.8)  # long : short = 1 : 4

    def __post_init__(self) -> None:
        if any(not 0.0 < weight < float("inf") for weight in self.weights):
            fail("config", "options.weights", "finite and above 0", list(self.weights))


class MixedPlan(Plan):
    """Plans of several sources, each with its share of a step's tokens; documents are numbered source after source."""

    def __init__(
        self, sources: Sequence[Sequence[Document]], weights: Sequence[float], batch_tokens: int, seed: int
    ) -> None:
        lengths = [[len(document) for document in source] for source in sources]
        super().__init__([length for source in lengths for length in source], batch_tokens, seed)
        shares = [max(1, round(batch_tokens * weight / sum(weights))) for weight in weights]
        for source, share in zip(lengths, shares):
            if share < max(source):
                fail(
                    "train", "train.batch_tokens",
                    f"so large that each share of it holds the longest document's {max(source)}",
                    f"{batch_tokens}, in shares of {shares}", "raise it, or shorten data.max_length",
                )
        self._first = [sum(map(len, lengths[:i])) for i in range(len(lengths))]
        self._plans = [Plan(source, share, seed + i) for i, (source, share) in enumerate(zip(lengths, shares))]

    def step(self, index: int) -> list[int]:
        return [first + i for first, plan in zip(self._first, self._plans) for i in plan.step(index)]


def build(config: Config, parts: Parts) -> Method:
    options = config.options
    if len(options.weights) != 1 + len(options.sources):
        rule = f"{1 + len(options.sources)} numbers, for data.source and options.sources"
        fail("config", "options.weights", rule, list(options.weights))
    more = [
        load_documents(dataclasses.replace(config.data, source=source), parts.tokenizer, parts.student.vocab)
        for source in options.sources
    ]
    sources = [list(parts.documents), *more]
    plan = MixedPlan(sources, options.weights, config.train.batch_tokens, config.seed)
    tokens = DatasetTokens([document for source in sources for document in source], plan)
    if config.objective.kd_weight == 0.0 or (config.cache is None and not parts.teachers):
        return Method.single("mix_distillation", tokens, NoTeacher(), cross_entropy())
    return Method.single("mix_distillation", tokens, teacher_of(config, parts), DivergenceObjective.of(config))


register(MethodSpec(
    "mix_distillation", "several kinds of text in fixed proportions", "Li et al. 2025, arXiv 2502.12143", build,
    Options, needs=("optional teacher",),
))
