"""Models that write on from the prompts of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kd_trainer import rollout
from kd_trainer.data import Document
from kd_trainer.errors import fail
from kd_trainer.models import CausalLM
from kd_trainer.rollout import RollOuts

if TYPE_CHECKING:
    from kd_trainer.config import Config
    from kd_trainer.methods.base import Parts


def prompt_length(document: Document, prompt_tokens: int | None) -> int:
    """How many first tokens of a text a model writes on from.

    Those before the first token that counts; of a text without a prompt ``prompt_tokens``, but never the whole of it.
    """
    first = int(document.counted.nonzero()[0]) + 1
    if first > 1 or prompt_tokens is None:
        return first
    return min(prompt_tokens, len(document) - 1)


def check_prompts(documents: Sequence[Document], prompt_tokens: int | None) -> None:
    """Raise ValueError, before anything is written, for texts that have no prompt, or that came packed."""
    if any(document.layout is not None for document in documents):
        what = "texts that a model writes on from"
        fail("train", what, "of one segment each", "packed sequences", "give them unpacked")
    without = sum(prompt_length(document, None) == 1 for document in documents)
    if without and prompt_tokens is None:
        fail(
            "config", "rollout.prompt_tokens", "given for texts without a prompt",
            f"None, with {without} of {len(documents)} such", "set it, or give texts with a prompt and a completion",
        )


class Writes(Protocol):
    """What writes texts in the place of others."""

    def write(self, documents: Sequence[Document], step: int) -> list[Document]:
        """Each text's prompt with another continuation, in the texts' order; targets are the continuation."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the very same texts."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` returned."""


class Writer:
    """A model as it is at the time, the student for one.

    What it writes is a function of its weights, the text, ``seed``, ``purpose`` and the step: the same in whatever
    batch and on whatever process, but for the rounding of the model's own sums. Equal texts of a step are continued
    equally.

    Args:
        beside: the model whose device it moves to when it is asked to write.
        autocast: write under bf16 autocast, as a student trains with ``train.precision: bf16``.
        generate: what draws: :func:`kd_trainer.rollout.generate`, or what takes its place.
    """

    def __init__(
        self, model: CausalLM, options: rollout.Options, *, seed: int, purpose: str, prompt_tokens: int | None = None,
        beside: CausalLM | None = None, autocast: bool = False, generate: Callable[..., RollOuts] = rollout.generate,
    ) -> None:
        self.options, self.purpose, self._generate = options, purpose, generate
        self._model, self._seed, self._prompt_tokens = model, seed, prompt_tokens
        self._beside, self._autocast = beside or model, autocast

    @classmethod
    def student(
        cls, config: Config, parts: Parts, generate: Callable[..., RollOuts] = rollout.generate,
        purpose: str = "student's text",
    ) -> Writer:
        """The student, by the ``rollout`` section."""
        return cls(
            parts.student, rollout_options(config, parts), seed=config.seed, purpose=purpose,
            prompt_tokens=config.rollout.prompt_tokens, autocast=config.train.precision == "bf16", generate=generate,
        )

    @classmethod
    def teacher(cls, config: Config, parts: Parts) -> Writer:
        """The first teacher, likewise."""
        return cls(
            parts.teachers[0], rollout_options(config, parts), seed=config.seed, purpose="teacher's text",
            prompt_tokens=config.rollout.prompt_tokens, beside=parts.student,
        )

    def write(self, documents: Sequence[Document], step: int, **how: Any) -> list[Document]:
        """``how``: what else is said to what draws."""
        if not documents:
            return []
        device = self._beside.device
        if self._model.device != device:
            self._model.to(device)
        prompts = [document.tokens[: prompt_length(document, self._prompt_tokens)] for document in documents]
        keys = torch.tensor([document.key for document in documents])
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            seed = rollout.step_seed(self._seed, step, self.purpose)
            return self._generate(self._model, prompts, self.options, seed=seed, keys=keys, **how).documents()

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        assert not state


class KeptWriter:
    """A model that does not change, the teacher for one: it writes once for every text, when first asked.

    Kept on the host, 8 bytes a token, and saved with a checkpoint.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._kept: dict[int, Document] = {}

    def write(self, documents: Sequence[Document], step: int) -> list[Document]:
        new = list({document.key: document for document in documents if document.key not in self._kept}.values())
        self._kept |= zip((document.key for document in new), self._writer.write(new, 0))
        return [self._kept[document.key] for document in documents]

    def state(self) -> dict[str, Any]:
        return {"kept": {key: (document.tokens, document.first_target) for key, document in self._kept.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._kept = {key: Document(tokens, first) for key, (tokens, first) in state.get("kept", {}).items()}


def rollout_options(config: Config, parts: Parts) -> rollout.Options:
    """How a run writes: up to ``rollout.max_new_tokens``, ``data.max_length`` with the prompt, or end of sequence."""
    section, end = config.rollout, parts.tokenizer.eos_token_id
    return rollout.Options(
        max_new_tokens=section.max_new_tokens, max_length=config.data.max_length,
        stop_ids=() if end is None else (end,), batch_size=section.batch_size,
        sampling=rollout.Sampling(section.temperature, section.top_k, section.top_p),
    )
