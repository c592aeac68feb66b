"""Texts in which mistakes are taken back, beside what a student wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kd_trainer.data import Document
from kd_trainer.rollout import mistaken, step_seed
from kd_trainer.tokens.replay import ReplayBuffer

if TYPE_CHECKING:
    from kd_trainer.methods.base import TokenSource
    from kd_trainer.tokens.writers import Writes


class TakenBack:
    """Token source: every text with mistakes and backspaces, tag "text"; and as many texts of a replay buffer, tag
    "written", which a writer fills from the same prompts every ``refresh`` steps.

    Args:
        mistakes, backspace, vocab, never: as :func:`kd_trainer.rollout.mistaken` takes them.
    """

    def __init__(
        self, texts: TokenSource, writer: Writes, replay: ReplayBuffer, *, refresh: int, mistakes: float,
        backspace: int, vocab: int, never: Sequence[int], seed: int,
    ) -> None:
        self.documents, self.plan = texts.documents, texts.plan
        self._texts, self._writer, self._replay, self._refresh, self._seed = texts, writer, replay, refresh, seed
        self._mistakes = dict(rate=mistakes, backspace=backspace, vocab=vocab, never=never)

    def step(self, index: int) -> list[Document]:
        return self._texts.step(index)

    def produce(self, documents: Sequence[Document], index: int) -> list[Document]:
        if index % self._refresh == 0:
            written = self._writer.write(documents, index)
            self._replay.add([dataclasses.replace(document, tag="written") for document in written])
        seed = step_seed(self._seed, index, "mistakes")
        texts = [mistaken(document, **self._mistakes, seed=seed, key=document.key) for document in documents]
        replayed = self._replay.draw(len(documents), step_seed(self._seed, index, "replay"))
        return [dataclasses.replace(document, tag="text") for document in texts] + replayed

    def state(self) -> dict[str, Any]:
        return self._replay.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._replay.load_state(state)
