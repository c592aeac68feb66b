"""Two answers to every prompt, the teacher's and the student's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd_trainer import rollout
from kd_trainer.data import Document
from kd_trainer.models import CausalLM
from kd_trainer.tokens.writers import KeptWriter, Writer

if TYPE_CHECKING:
    from kd_trainer.methods.base import TokenSource


class PairTokens:
    """Token source: in the place of each text two, its prompt answered by the teacher and by the student, their tags.

    The teacher answers each text once. The student does so before the first step, all texts of the run, or in every
    step as it is by then (``fixed=False``).

    Args:
        texts: whose prompts are answered.
        writers: by author, "teacher" and "student".
        models: likewise.
        steps: of the run.
        measure: find the ``gaps``; costs a pass of both models over the first step's answers.

    Attributes:
        gaps: by author, the mean over the first step's answers of the geometric mean probability of an answer's tokens
            under its author, minus that under the other model; before that step.
    """

    def __init__(
        self, texts: TokenSource, writers: Mapping[str, Writer], models: Mapping[str, CausalLM], steps: int,
        fixed: bool = True, measure: bool = False,
    ) -> None:
        self.documents, self.plan = texts.documents, texts.plan
        self.gaps: dict[str, float] = {}
        self._texts, self._models, self._steps, self._fixed, self._measure = texts, models, steps, fixed, measure
        self._writers = {"teacher": KeptWriter(writers["teacher"]), "student": writers["student"]}
        if fixed:
            self._writers["student"] = KeptWriter(writers["student"])

    def step(self, index: int) -> list[Document]:
        return self._texts.step(index)

    def produce(self, documents: Sequence[Document], index: int) -> list[Document]:
        if index == 0 and self._fixed:
            used = sorted({i for step in range(self._steps) for i in self.plan.step(step)})
            self._writers["student"].write([self.documents[i] for i in used], 0)
        if index == 0 and self._measure:
            self.gaps = {author: self._gap(author) for author in self._writers}
        return [document for author in self._writers for document in self._answers(author, documents, index)]

    def _answers(self, author: str, documents: Sequence[Document], index: int) -> list[Document]:
        return [dataclasses.replace(text, tag=author) for text in self._writers[author].write(documents, index)]

    def _gap(self, author: str) -> float:
        answers = self._answers(author, self.step(0), 0)  # of the whole step, so that the split changes nothing
        means = {
            name: geometric_means([score.logprob for score in rollout.score(model, answers)])
            for name, model in self._models.items()
        }
        other = "student" if author == "teacher" else "teacher"
        return float((means[author] - means[other]).mean())

    def state(self) -> dict[str, Any]:
        return {"gaps": self.gaps} | {author: writer.state() for author, writer in self._writers.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.gaps = dict(state["gaps"])
        for author, writer in self._writers.items():
            writer.load_state(state[author])


def geometric_means(logprobs: Sequence[Tensor]) -> Tensor:
    """fp64 ``[B]``: of the probabilities of each text's tokens, from their logarithms ``[n_i]``."""
    return torch.stack([values.double().mean().exp() for values in logprobs])
