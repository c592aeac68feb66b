"""What a student wrote in earlier steps, kept to be trained on again, with what the teacher said about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from kd_kernels import SparseTargets, topk_targets
from kd_trainer.data import Batch, Document
from kd_trainer.errors import fail
from kd_trainer.models import rows_of
from kd_trainer.teachers import LiveTeacher, Targets, Teacher

FIELDS = ("offsets", "ids", "logprobs", "tail_logprob", "log_z")


class ReplayBuffer:
    """The newest ``capacity`` sequences of one process, in the order they came.

    Attributes:
        documents: they themselves.
        targets: the teacher's targets of those that it has read, ``[L - 1]`` rows each, on the host. They go when their
            sequence goes.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            fail("ReplayBuffer", "capacity", "at least 1", capacity)
        self.documents: deque[Document] = deque(maxlen=capacity)
        self.targets: WeakKeyDictionary[Document, SparseTargets] = WeakKeyDictionary()

    @property
    def is_full(self) -> bool:
        return len(self.documents) == self.documents.maxlen

    def add(self, documents: Sequence[Document]) -> None:
        """Keep these; the oldest make room."""
        self.documents.extend(documents)

    def draw(self, count: int, seed: int) -> list[Document]:
        """``count`` different ones, each as likely as any other; all of them where there are no more."""
        generator = torch.Generator().manual_seed(seed % 2**32)  # of a seed, it looks at 32 bits alone
        return [self.documents[i] for i in torch.randperm(len(self.documents), generator=generator)[:count].tolist()]

    def state(self) -> dict[str, Any]:
        return {"sequences": [self._saved(document) for document in self.documents]}

    def _saved(self, document: Document) -> dict[str, Any]:
        known = self.targets.get(document)
        targets = None if known is None else {name: getattr(known, name) for name in FIELDS} | {"T": known.temperatures}
        fields = {name: getattr(document, name) for name in ("tokens", "first_target", "tag")}
        return fields | {"targets": targets}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.documents.clear()
        for saved in state.get("sequences", []):
            document = Document(saved["tokens"], saved["first_target"], tag=saved["tag"])
            self.add([document])
            if (targets := saved["targets"]) is not None:
                fields = {name: targets[name] for name in FIELDS}
                self.targets[document] = SparseTargets(**fields, temperatures=tuple(targets["T"]))


class RememberingTeacher(Teacher):
    """A live teacher that reads a sequence of a replay buffer once: later its k likeliest tokens come from the buffer.

    A batch that was read before costs no pass of the teacher; one with a single new sequence is read as a whole, and
    its targets are the exact, dense ones. Kept are the rows that count, 12 k bytes each: their k likeliest tokens with
    the exact mass of all others (which the objective's ``tail`` treats as with a cache), at temperature 1 and the
    objective's.
    """

    def __init__(self, teacher: LiveTeacher, buffer: ReplayBuffer, k: int, temperature: float = 1.0) -> None:
        self.name = f"{teacher.name}, first {k} on replay"
        self._teacher, self._buffer, self._k = teacher, buffer, k
        self._temperatures = (1.0,) if temperature == 1.0 else (1.0, temperature)

    def check(self, documents: Sequence[Document]) -> None:
        self._teacher.check(documents)

    def targets(self, batch: Batch) -> Targets:
        known = [self._buffer.targets.get(document) for document in batch.documents]
        if all(targets is not None for targets in known):
            return SparseTargets.cat(known).to(batch.rows.device)
        live = self._teacher.targets(batch)
        kept = [document in self._buffer.documents for document in batch.documents]
        if any(kept):
            for document, is_kept, targets in zip(batch.documents, kept, self._of_documents(live, batch)):
                if is_kept:
                    self._buffer.targets[document] = targets
        return live

    def _of_documents(self, live: Targets, batch: Batch) -> list[SparseTargets]:
        """The k likeliest tokens of each document's rows; none in rows that do not count."""
        counted, rows = batch.counted.cpu(), len(batch.labels)
        head = topk_targets(rows_of(live, batch.counted), self._k, temperatures=self._temperatures).to("cpu")
        counts = torch.zeros(rows, dtype=torch.int64).index_copy(0, counted, head.offsets.diff())
        spread = lambda x: x.new_zeros(rows, *x.shape[1:]).index_copy(0, counted, x)  # noqa: E731
        whole = SparseTargets(
            torch.nn.functional.pad(counts.cumsum(0), (1, 0)), head.ids, head.logprobs, spread(head.tail_logprob),
            temperatures=head.temperatures, log_z=spread(head.log_z),
        )
        lengths = [len(document) - 1 for document in batch.documents]
        return [whole.select(part) for part in torch.arange(rows).split(lengths)]
