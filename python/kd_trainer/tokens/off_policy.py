"""DistiLLM's adaptive off-policy schedule: when a student writes, reads what it wrote, or reads the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd_trainer.data import Document
from kd_trainer.rollout.options import step_seed
from kd_trainer.tokens.mixture import uniform
from kd_trainer.tokens.replay import ReplayBuffer

if TYPE_CHECKING:
    from kd_trainer.methods.base import TokenSource
    from kd_trainer.tokens.writers import Writes

FRESH = {"decreasing": lambda done: 1.0 - done, "constant": lambda done: 0.5, "increasing": lambda done: done}
"""g / phi, of the fraction of the steps that is done."""


@dataclass(frozen=True)
class Schedule:
    """Its constants.

    Args:
        steps: T, of the run.
        threshold: phi at the start.
        raise_by: what a validation that found the loss risen adds to phi; 0: phi stays, and nothing is validated.
        tolerance: by how many nats it must have risen.
        validate_every: steps.
        fresh: a key of :data:`FRESH`.
    """

    steps: int
    threshold: float = 0.0
    raise_by: float = 0.1
    tolerance: float = 0.1
    validate_every: int = 1
    fresh: str = "decreasing"


class OffPolicyTokens:
    """Token source: the texts of a step are of one origin, by u, uniform in [0, 1), and t, the steps done.

    "written" now by the student and put into the buffer, where ``u < phi FRESH(t / T)``, or ``u < phi`` while the
    buffer is not full; else "replayed", as many drawn from the buffer, where ``u < phi``; else "text", those of the
    data. phi rises where the validation loss is at least the reference + tolerance, and then that is the new reference;
    the first reference is the loss before the first step.

    Args:
        texts: what is written on from, and read.
        writer: the student.
        buffer: of this process.
        validate: the loss of the student on held-out text. Every process validates the whole of it, and finds the same.
    """

    def __init__(
        self, texts: TokenSource, writer: Writes, buffer: ReplayBuffer, validate: Callable[[], float],
        schedule: Schedule, seed: int,
    ) -> None:
        self.documents, self.plan = texts.documents, texts.plan
        self.threshold, self.origin = schedule.threshold, ""
        self._reference: float | None = None
        self._texts, self._writer, self._buffer, self._validate = texts, writer, buffer, validate
        self._schedule, self._seed = schedule, seed

    def step(self, index: int) -> list[Document]:
        return self._texts.step(index)

    def produce(self, documents: Sequence[Document], index: int) -> list[Document]:
        schedule = self._schedule
        if schedule.raise_by and self._reference is None:
            self._reference = self._validate()
        u, fresh = uniform(self._seed, index, "origin"), FRESH[schedule.fresh]((index + 1) / schedule.steps)
        if u < self.threshold * fresh or (u < self.threshold and not self._buffer.is_full):
            self.origin = "written"
            written = self._writer.write(documents, index)
            self._buffer.add(written)
            return written
        if u < self.threshold:
            self.origin = "replayed"
            return self._buffer.draw(len(documents), step_seed(self._seed, index, "replay"))
        self.origin = "text"
        return self._texts.produce(documents, index)

    def after_step(self, index: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """For :class:`~kd_trainer.methods.base.Method`: validate and move on; what is logged."""
        schedule, found = self._schedule, {name: float(self.origin == name) for name in ("written", "replayed")}
        if schedule.raise_by and (index + 1) % schedule.validate_every == 0:
            loss = found["validation_loss"] = self._validate()
            if loss >= self._reference + schedule.tolerance:
                self.threshold, self._reference = min(self.threshold + schedule.raise_by, 1.0), loss
        return found | {"threshold": self.threshold}

    def state(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "reference": self._reference, "buffer": self._buffer.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.threshold, self._reference = state["threshold"], state["reference"]
        self._buffer.load_state(state["buffer"])
