"""What the student is pulled towards, the second of a method's three choices: nothing, a live model, or a cache."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import torch

from kd_kernels import EnsembleLogits, LinearLogits, SparseTargets
from kd_kernels.cache import CacheError, CacheReader, content_key
from kd_trainer.data import Batch, Document
from kd_trainer.errors import fail
from kd_trainer.memory import check_fits
from kd_trainer.models import TOO_LARGE, CausalLM, reading_of

if TYPE_CHECKING:
    from kd_trainer.config import Config
    from kd_trainer.methods.base import Parts

Targets = LinearLogits | EnsembleLogits | SparseTargets | tuple[LinearLogits, ...] | None
"""What a teacher, or several, can say about a batch."""


class Teacher(Protocol):
    """A source of targets for the rows of a batch."""

    name: str

    def check(self, documents: Sequence[Document]) -> None:
        """Raise, before training starts, where targets for these documents cannot be had."""

    def expect(self, documents: Sequence[Document]) -> None:
        """Told which documents come next, most likely: what can be begun without the device may begin."""

    def targets(self, batch: Batch) -> Targets:
        """Targets for the batch's rows, one for each of ``batch.rows``."""


class NoTeacher(Teacher):
    """No target, for objectives with ``kd_weight`` 0."""

    name = "none"

    def targets(self, batch: Batch) -> None:
        return None


class LiveTeacher(Teacher):
    """A model that is run on every batch, without gradient."""

    def __init__(self, model: CausalLM, fingerprint: str) -> None:
        self.name = fingerprint
        self._model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def targets(self, batch: Batch) -> LinearLogits:
        device = batch.rows.device
        if self._model.device != device:
            needed = sum(parameter.numel() * parameter.element_size() for parameter in self._model.parameters())
            name = self._model.model.name_or_path
            check_fits("train", "teacher.model", name, needed, device, TOO_LARGE)
            self._model.to(device)
        with torch.autocast(device.type, enabled=False):  # a teacher computes in the dtype that it was loaded in
            return self._model(batch)


class SeveralTeachers(Teacher):
    """Several live models side by side, for objectives that choose between them."""

    def __init__(self, members: Sequence[LiveTeacher]) -> None:
        self.name = ", ".join(member.name for member in members)
        self._members = tuple(members)

    def targets(self, batch: Batch) -> tuple[LinearLogits, ...]:
        return tuple(member.targets(batch) for member in self._members)


class EnsembleTeacher(SeveralTeachers):
    """Several live models as one, averaged densely: of their logits or of their probabilities."""

    def __init__(self, members: Sequence[LiveTeacher], space: str = "logit") -> None:
        super().__init__(members)
        self.name, self._space = f"{space} mean of {self.name}", space

    def targets(self, batch: Batch) -> EnsembleLogits:
        return EnsembleLogits(super().targets(batch), space=self._space)


class CachedTeacher(Teacher):
    """Targets that were computed once and lie on disk; a document that is not there is an error, never a plain loss.

    Rows of documents that are expected are read and decoded by threads while the device works on others.
    """

    def __init__(self, reader: CacheReader) -> None:
        self.name = reader.manifest.teacher
        self.reader = reader
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="kd-cache")
        self._begun: dict[int, tuple[Document, Future[SparseTargets]]] = {}  # a document that is held keeps its id()

    def check(self, documents: Sequence[Document]) -> None:
        missing = sum(self.key(document) not in self.reader for document in documents)
        if missing:
            raise CacheError(
                f"train: cache {self.reader.folder} must hold every document, got {missing} of {len(documents)} "
                "that it lacks (another text, or other data options, than it was built from); "
                "add them with kdk cache build",
                self.reader.folder,
            )
        if self.reader.cached_rows < self.reader.rows:  # it was built with prompts left out: are they the same prompts?
            for document in documents:
                self.document_targets(document)

    def key(self, document: Document) -> bytes:
        return content_key(document.tokens, self.reader.manifest, document.layout)

    def document_targets(self, document: Document) -> SparseTargets:
        """The L - 1 rows of one document."""
        return self.reader.targets(document.tokens, layout=document.layout, required=document.counted)

    def expect(self, documents: Sequence[Document]) -> None:
        """Begin to read these. What was expected before and is not among them is forgotten."""
        known = self._begun
        self._begun = {
            id(document): known.get(id(document)) or (document, self._threads.submit(self.document_targets, document))
            for document in documents
        }

    def targets(self, batch: Batch) -> SparseTargets:
        begun = [self._begun.get(id(document)) for document in batch.documents]
        rows = [
            self.document_targets(document) if found is None else found[1].result()
            for document, found in zip(batch.documents, begun)
        ]
        return SparseTargets.cat(rows).to(batch.rows.device)


def open_cache(
    folder: str, *, teacher: str | None, tokenizer: str, vocab: int, temperature: float, bos: str | None = None,
    chat_template: str | None = None,
) -> CacheReader:
    """A cache that is known to come from this teacher and tokenizer, and to know the temperature that is asked for.

    Args:
        teacher: the fingerprint that it must have; None: any.
        bos, chat_template: what :func:`~kd_trainer.models.bos_policy` says of the tokenizer, and the fingerprint of the
            template that the texts went through (``"none"``: through none); None: any.

    Raises:
        CacheError: it is not there, damaged, or of another teacher or tokenizer.
        ValueError: another vocabulary, or a temperature that it has no normaliser for.
    """
    reader = CacheReader(folder)
    manifest = reader.manifest
    build = "build a cache of this one with kdk cache build"
    for what, expected, found, remedy in (
        ("chat template", chat_template, manifest.chat_template, f"set tokenizer to the teacher's, or {build}"),
        ("BOS policy", bos, manifest.bos_policy, f"set tokenizer to the teacher's, or {build}"),
        ("teacher", teacher, manifest.teacher, f"set teacher.model to that one, or {build}"),
        ("tokenizer", tokenizer, manifest.tokenizer, f"set tokenizer to the teacher's, or {build}"),
    ):
        if expected not in (None, found):
            name = manifest.meta.get("teacher", "unknown")
            raise CacheError(
                f"train: cache {folder} must be of {what} {expected}, got {found} (built with {name}); {remedy}", folder
            )
    if manifest.vocab != vocab:
        fail("train", f"the vocabulary of cache {folder}", f"the student's {vocab}", manifest.vocab)
    if temperature not in (1.0, *manifest.temperatures):
        fail(
            "train", "objective.temperature", f"1 or one of the cache's {manifest.temperatures}", temperature,
            f"build it with kdk cache build --temperatures 1 {temperature:g}",
        )
    return reader


def teacher_of(config: Config, parts: Parts) -> Teacher:
    """The teacher of methods that take either: the model, run on every batch, or the cache of its rows.

    Raises:
        CacheError, ValueError: as :func:`open_cache`; a model with another vocabulary than the student's.
    """
    if config.cache is not None:
        bos, chat_template = reading_of(parts.documents, parts.tokenizer)
        return CachedTeacher(open_cache(
            config.cache, teacher=parts.teacher_fingerprints[0], tokenizer=parts.tokenizer_fingerprint,
            vocab=parts.student.vocab, temperature=config.objective.temperature, bos=bos, chat_template=chat_template,
        ))
    return live_teachers(config, parts)[0]


def live_teachers(config: Config, parts: Parts) -> list[LiveTeacher]:
    """Every teacher as a model that is run.

    Raises:
        ValueError: one has another vocabulary than the student.
    """
    for model, named in zip(parts.teachers, (config.teacher, *config.more_teachers)):
        if model.vocab != parts.student.vocab:
            fail(
                "train", "the student's vocabulary", f"the {model.vocab} of teacher {named.model}", parts.student.vocab,
                "teacher and student must share a tokenizer",
            )
    return [LiveTeacher(model, name) for model, name in zip(parts.teachers, parts.teacher_fingerprints)]
