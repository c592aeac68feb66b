"""RAC, reference-answer-based correction: the student answers, and learns to give the reference after its own answer.

Cen et al. 2025, "Bridging the Training-Inference Gap in LLMs by Leveraging Self-Generated Tokens", arXiv 2410.14655. Of
a text (x, y)

    x, y', template, y        with y' what the student writes after x; the loss is next-token cross-entropy on y alone

so that no outside judge takes part, neither in training nor when the trained model is asked for a correction. ``share``
of the texts of a round are corrections, drawn anew in every round; the others are the data's, and teach the answer
itself. Answers are written for a round of steps at once, see :mod:`kd_trainer.methods.bash`; an answer is cut where the
whole would be longer than ``data.max_length``, and a text that leaves no room for one stays as it is.

Uncertain: the paper's template, and its proportions, could not be read. ``template`` is text, tokenised on its own. A
corrected text is longer than the text that ``train.batch_tokens`` counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_trainer.config import Config
from kd_trainer.data import Document
from kd_trainer.errors import fail
from kd_trainer.methods.base import DatasetTokens, Method, Parts, cross_entropy
from kd_trainer.records import IGNORED
from kd_trainer.registry import MethodSpec, register
from kd_trainer.teachers import NoTeacher
from kd_trainer.tokens import Rounds, Writer, check_prompts, prompt_length, uniform


@dataclass(frozen=True)
class Options:
    share: float = 0.5  # of texts that are corrections
    template: str = "\n\nThis answer may be wrong. The correct answer is:\n\n"
    round_steps: int | None = None  # None: an epoch's

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            fail("config", "options.share", "above 0, up to 1", self.share)
        if self.round_steps is not None and self.round_steps < 1:
            fail("config", "options.round_steps", "at least 1", self.round_steps)


def correction(text: Document, prompt: int, answer: Tensor, template: Tensor) -> Document:
    """``x, answer, template, y``, of which y counts as it did in the text, whose first ``prompt`` tokens are x."""
    tokens = torch.cat([text.tokens[:prompt], answer, template, text.tokens[prompt:]])
    first = prompt + len(answer) + len(template)
    labels = None
    if text.labels is not None:
        labels = torch.cat([torch.full((first - 1,), IGNORED), text.labels[prompt - 1 :]])
    return Document(tokens, first, labels)


class Corrections:
    """Makes the texts of a round."""

    def __init__(self, config: Config, parts: Parts, template: Tensor) -> None:
        self._options, self._seed, self._writer = config.options, config.seed, Writer.student(config, parts)
        self._template, self._end = template, parts.tokenizer.eos_token_id
        self._longest, self._prompt_tokens = config.data.max_length, config.rollout.prompt_tokens

    def room(self, text: Document) -> int:
        """Tokens that an answer may have."""
        return self._longest - len(text) - len(self._template)

    def __call__(self, texts: Sequence[Document], begin: int) -> list[Document]:
        made = list(texts)
        chosen = [
            i for i, text in enumerate(texts)
            if self.room(text) > 0 and uniform(self._seed, begin, "correction", text.key) < self._options.share
        ]
        for i, written in zip(chosen, self._writer.write([texts[i] for i in chosen], begin)):
            prompt = prompt_length(texts[i], self._prompt_tokens)
            answer = written.tokens[written.first_target :]
            if int(answer[-1]) == self._end:
                answer = answer[:-1]
            made[i] = correction(texts[i], prompt, answer[: self.room(texts[i])], self._template)
        return made


def build(config: Config, parts: Parts) -> Method:
    check_prompts(parts.documents, config.rollout.prompt_tokens)
    template = torch.tensor(parts.tokenizer(config.options.template, add_special_tokens=False)["input_ids"]).long()
    make = Corrections(config, parts, template)
    shortest = min(parts.documents, key=len)
    if make.room(shortest) < 1:
        need = f"above {len(shortest) + len(template)}, the tokens of the shortest text and the template"
        fail("config", "data.max_length", need, config.data.max_length, "an answer of the student must fit as well")
    texts = DatasetTokens.of(config, parts.documents)
    tokens = Rounds.of(config, texts, make, config.options.round_steps)
    return Method.single("rac", tokens, NoTeacher(), cross_entropy())


register(MethodSpec(
    "rac", "the reference, after the student's own answer", "Cen et al. 2025, arXiv 2410.14655", build, Options,
    needs=("prompts",),
))
