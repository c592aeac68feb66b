"""Texts that a student makes in rounds: for many steps at once, by the weights that it has when they begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from kd_trainer.data import Document, deal

if TYPE_CHECKING:
    from kd_trainer.config import Config
    from kd_trainer.methods.base import DatasetTokens

Make = Callable[[Sequence[Document], int], list[Document]]
"""What stands in the place of some texts, in their order, and in the round that begins with a step."""


class Rounds:
    """Token source: texts of a data set, and in the place of each what is made of it once a round.

    In large batches, which is what decoding wants. Each process makes its own share of the round. Kept on the host, and
    saved with a checkpoint: 8 bytes a token, as much again where a text has labels of its own.

    Args:
        texts: what is made into something else.
        length: steps of a round.
        steps: of the run; its last round may be shorter.
    """

    def __init__(self, texts: DatasetTokens, make: Make, length: int, steps: int) -> None:
        self.documents, self.plan = texts.documents, texts.plan
        self._texts, self._make, self._length, self._steps = texts, make, length, steps
        self._begin: int | None = None
        self._made: dict[int, Document] = {}  # by the key of the text

    @classmethod
    def of(cls, config: Config, texts: DatasetTokens, make: Make, length: int | None) -> Rounds:
        """``length`` None: of the steps that it takes to read the texts once."""
        steps = config.train.steps or texts.plan.steps_in(config.train.epochs)
        return cls(texts, make, length or texts.plan.steps_in(1.0), steps)

    def step(self, index: int) -> list[Document]:
        return self._texts.step(index)

    def produce(self, documents: Sequence[Document], index: int) -> list[Document]:
        begin = index - index % self._length
        if begin != self._begin:
            self._begin, self._made = begin, self._make_round(begin)
        return [self._made[document.key] for document in documents]

    def _make_round(self, begin: int) -> dict[int, Document]:
        world = PartialState()
        texts = {}
        for step in range(begin, min(begin + self._length, self._steps)):
            share = deal(self.step(step), world.num_processes)[world.process_index]
            texts |= {document.key: document for document in share}
        return dict(zip(texts, self._make(list(texts.values()), begin)))

    def state(self) -> dict[str, Any]:
        if self._begin is None:
            return {}
        made = {key: (d.tokens, d.first_target, d.labels, d.tag) for key, d in self._made.items()}
        return {"begin": self._begin, "made": made}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._begin = state.get("begin")
        self._made = {key: Document(*fields) for key, fields in state.get("made", {}).items()}
