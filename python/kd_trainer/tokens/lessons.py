"""Texts and answers to them, each with the one of several frozen models that it is to be learnt from."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd_kernels import LinearLogits
from kd_trainer.data import Batch, Document, collate
from kd_trainer.rollout import score
from kd_trainer.teachers import LiveTeacher, SeveralTeachers
from kd_trainer.tokens.writers import KeptWriter, Writer, rollout_options

if TYPE_CHECKING:
    from kd_trainer.config import Config
    from kd_trainer.methods.base import DatasetTokens, Parts


def overlap(answer: Tensor, reference: Tensor) -> float:
    """F1 of the tokens, however they are ordered."""
    common = (Counter(answer.tolist()) & Counter(reference.tolist())).total()
    return 2.0 * common / (len(answer) + len(reference))


class Lessons:
    """Token source: texts, and the best answers to their prompts that the sources write.

    Two tags: "text", a text with the source that finds it likeliest; "answer", the best answer with the source that
    wrote it. Sources write once for every text, and are chosen once. Answers are kept on the host and saved with a
    checkpoint, see :class:`KeptWriter`.

    Args:
        judge: which answer is best. "reference": with the most tokens in common with the text's own completion (F1);
            "likelihood": which all sources together find likeliest by token.
        taught: whether a tag's lessons are wanted in a step.
    """

    def __init__(
        self, config: Config, parts: Parts, texts: DatasetTokens, judge: str, taught: Callable[[str, int], bool]
    ) -> None:
        self.documents, self.plan = texts.documents, texts.plan
        self._texts, self._judge, self._taught = texts, judge, taught
        self._sources, self._student = parts.teachers, parts.student
        own = dict(seed=config.seed, prompt_tokens=config.rollout.prompt_tokens, beside=parts.student)
        self._writers = [
            KeptWriter(Writer(source, rollout_options(config, parts), purpose=f"text of source {i}", **own))
            for i, source in enumerate(parts.teachers)
        ]
        self._best: dict[int, Document] = {}  # by the key of the text
        self._source: dict[tuple[str, int], int] = {}  # by tag, and key of the lesson

    def source_of(self, lesson: Document) -> int:
        """Which of the sources a document that was produced is to be learnt from."""
        return self._source[lesson.tag, lesson.key]

    def step(self, index: int) -> list[Document]:
        return self._texts.step(index)

    def produce(self, documents: Sequence[Document], index: int) -> list[Document]:
        lessons = {"answer": self._answers, "text": self._chosen}
        return [
            dataclasses.replace(document, tag=tag)
            for tag, lesson in lessons.items() if self._taught(tag, index) for document in lesson(documents)
        ]

    def _chosen(self, texts: Sequence[Document]) -> Sequence[Document]:
        if new := [text for text in texts if ("text", text.key) not in self._source]:
            likeliest = self._likelihoods(new).argmax(0).tolist()
            self._source |= {("text", text.key): source for text, source in zip(new, likeliest)}
        return texts

    def _answers(self, texts: Sequence[Document]) -> list[Document]:
        if new := [text for text in texts if text.key not in self._best]:
            answers = [writer.write(new, 0) for writer in self._writers]
            merits = torch.stack([self._merits(written, new) for written in answers])
            for i, (text, source) in enumerate(zip(new, merits.argmax(0).tolist())):
                self._best[text.key] = answers[source][i]
                self._source["answer", answers[source][i].key] = source
        return [self._best[text.key] for text in texts]

    def _merits(self, written: Sequence[Document], texts: Sequence[Document]) -> Tensor:
        if self._judge == "likelihood":
            return self._likelihoods(written).mean(0)
        pairs = zip(written, texts)
        return torch.tensor([overlap(a.tokens[a.first_target :], text.tokens[1:][text.counted]) for a, text in pairs])

    def _likelihoods(self, documents: Sequence[Document]) -> Tensor:
        """``[sources, documents]``: mean log-probability of a target token."""
        found = []
        for source in self._sources:
            source.to(self._student.device)
            found.append(torch.stack([stats.logprob.mean() for stats in score(source, documents)]))
        return torch.stack(found)

    def state(self) -> dict[str, Any]:
        return {str(i): state for i, writer in enumerate(self._writers) if (state := writer.state())["kept"]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for i, writer in enumerate(self._writers):
            writer.load_state(state.get(str(i), {}))


class ChosenTeachers(SeveralTeachers):
    """Each document of a batch is read by its own source alone.

    Targets are pairs: the rows that count in documents of one source, and what stands for its logits, valid there only.
    """

    def __init__(self, members: Sequence[LiveTeacher], lessons: Lessons, config: Config) -> None:
        super().__init__(members)
        self._lessons, self._data = lessons, config.data

    def targets(self, batch: Batch) -> tuple[tuple[Tensor, LinearLogits], ...]:
        device, read = batch.rows.device, []
        own = torch.tensor([self._lessons.source_of(document) for document in batch.documents], device=device)
        source = own.repeat_interleave(torch.tensor([len(document) - 1 for document in batch.documents], device=device))
        for i in sorted(set(own.tolist())):
            documents = [document for document, j in zip(batch.documents, own.tolist()) if j == i]
            noun = self._members[i].targets(collate(documents, self._data.max_length, self._data.packing).to(device))
            there = (source == i).nonzero()[:, 0]
            hidden = noun.hidden.new_zeros(len(source), noun.hidden.shape[1]).index_copy(0, there, noun.hidden)
            read.append((batch.counted[source[batch.counted] == i], dataclasses.replace(noun, hidden=hidden)))
        return tuple(read)
