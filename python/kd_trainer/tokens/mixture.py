"""Texts from several places in one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kd_trainer.data import Document, Plan
from kd_trainer.rollout.options import sequence_seed, step_seed

if TYPE_CHECKING:
    from kd_trainer.methods.base import TokenSource
    from kd_trainer.tokens.writers import Writes


def uniform(seed: int, step: int, purpose: str, key: int | None = None) -> float:
    """A number in [0, 1): a function of the run's seed, the step, what it is for, and a text's key where given."""
    bits = step_seed(seed, step, purpose)
    if key is not None:
        bits = sequence_seed(bits, key)
    return (bits >> 10) / 2**53


class MixedTokens:
    """Token source: texts of a data set, or what models write in their place, each with its probability.

    Args:
        texts: what is written on from, and trained on as it is with the probability that the writers leave.
        writers: by a name, a writer and its probability; their sum is at most 1.
        each: "step" draws once for all texts of a step (TRL, GKD's algorithm); "text" draws for every text by itself,
            which has the same expectation and less variance.
    """

    def __init__(
        self, texts: TokenSource, writers: Mapping[str, tuple[Writes, float]], *, seed: int, each: str = "step"
    ) -> None:
        self.documents, self.plan = texts.documents, texts.plan
        self._texts, self._writers, self._seed, self._each = texts, writers, seed, each

    def step(self, index: int) -> list[Document]:
        return self._texts.step(index)

    def produce(self, documents: Sequence[Document], index: int) -> list[Document]:
        origins = [self.origin(document, index) for document in documents]
        produced = self._texts.produce(documents, index)
        for name, (writer, _) in self._writers.items():
            members = [i for i, origin in enumerate(origins) if origin == name]
            for i, document in zip(members, writer.write([documents[i] for i in members], index)):
                produced[i] = document
        return produced

    def origin(self, document: Document, index: int) -> str | None:
        """Which writer a text of a step goes to; None: it stays as it is."""
        left = uniform(self._seed, index, "origin", document.key if self._each == "text" else None)
        for name, (_, probability) in self._writers.items():
            if left < probability:
                return name
            left -= probability
        return None

    def state(self) -> dict[str, Any]:
        return {name: state for name, (writer, _) in self._writers.items() if (state := writer.state())}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, (writer, _) in self._writers.items():
            writer.load_state(state.get(name, {}))


class SideBySide:
    """Token source: in every step the texts of one source, and beside them those of a data set with another tag.

    Args:
        source: the texts that data position and length of the run go by.
        documents: the other data set; its plan is as long in tokens a step.
    """

    def __init__(
        self, source: TokenSource, documents: Sequence[Document], tag: str, batch_tokens: int, seed: int
    ) -> None:
        self.documents, self.plan = source.documents, source.plan
        self._source, self._tag = source, tag
        self._others = [dataclasses.replace(document, tag=tag) for document in documents]
        self._others_plan = Plan([len(document) for document in documents], batch_tokens, seed + 1)

    def step(self, index: int) -> list[Document]:
        return self._source.step(index) + [self._others[i] for i in self._others_plan.step(index)]

    def produce(self, documents: Sequence[Document], index: int) -> list[Document]:
        own = [document for document in documents if document.tag != self._tag]
        others = [document for document in documents if document.tag == self._tag]
        return self._source.produce(own, index) + others

    def state(self) -> dict[str, Any]:
        return self._source.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._source.load_state(state)
