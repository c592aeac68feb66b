"""Text to documents, documents to batches.

A document is a run of at most ``max_length`` tokens that is attended to as a whole and by nothing else. L tokens make
L - 1 predictions (*rows*): row ``i`` reads tokens ``0..i`` and predicts token ``i + 1``. Where a document has a
prompt, the rows that predict the prompt's tokens do not count.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kd_trainer import assets
from kd_trainer.config import DataConfig
from kd_trainer.errors import fail
from kd_trainer.files import progress
from kd_trainer.records import IGNORED, Chat, Record, Text, Tokens, encode_chat, record_of

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True, eq=False)
class Document:
    """Tokens that a model reads, and which of its predictions count.

    Args:
        tokens: int64 ``[L]``.
        first_target: index of the first token that is a target: 1, or where the completion begins.
        labels: int64 ``[L - 1]``, what the rows should predict where that is not ``tokens[1:]`` (a context that was
            rewritten, with the labels of the text that it was made of). -100 where a row does not count.
        tag: which of a method's objectives it is for.
        layout: lengths of the segments of a sequence that came packed, none of which sees another; None: one segment.
        origin: "text", "chat" (its messages went through the tokenizer's template) or "tokens" (it came as ids).
    """

    tokens: Tensor
    first_target: int = 1
    labels: Tensor | None = None
    tag: str = "main"
    layout: tuple[int, ...] | None = None
    origin: str = "text"

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def counted(self) -> Tensor:
        """bool ``[L - 1]``: the rows whose prediction counts."""
        after_prompt = torch.arange(1, len(self)) >= self.first_target
        return after_prompt if self.labels is None else after_prompt & (self.labels != IGNORED)

    @property
    def key(self) -> int:
        """64 bits of the tokens and of where the completion begins: names the document in draws, whatever its place."""
        digest = hashlib.blake2b(self.first_target.to_bytes(8, "little"), digest_size=8)
        digest.update(self.tokens.numpy().tobytes())
        return int.from_bytes(digest.digest(), "little", signed=True)


# ------------------------------------------------------------------------------------------------------ reading


def load_documents(config: DataConfig, tokenizer: PreTrainedTokenizerBase, vocab: int | None = None) -> list[Document]:
    """The documents that a :class:`DataConfig` names, in the order of their texts' hashes.

    Args:
        vocab: ids must lie below it, when given.

    Raises:
        FileNotFoundError: no such file, folder or data set.
        ValueError: a record without its field, an empty source, no target token left, an id outside the vocabulary.
    """
    texts = sorted(read_texts(config), key=lambda text: text.hash)
    if config.holdout:
        train_below = round((1.0 - config.holdout) * 2**64)
        texts = [text for text in texts if (text.hash < train_below) == (config.part == "train")]
    texts = texts[: config.limit]
    if not texts:
        fail("load_documents", "data.source", "a source of at least one text", f"none from {config.source!r}")
    documents = tokenize(texts, tokenizer, config)
    if not documents:
        fail(
            "load_documents", "data", "documents with at least one completion token",
            f"none in {len(texts)} texts of {config.source!r}", "raise data.max_length above the length of the prompts",
        )
    if vocab is not None and (largest := max(int(document.tokens.max()) for document in documents)) >= vocab:
        fail("load_documents", "token ids", f"below the model's vocabulary of {vocab}", largest)
    return documents


def read_texts(config: DataConfig) -> list[Record]:
    """The records of a source, before any selection."""
    source = config.source
    if source == assets.WIKI_INTROS:
        return [Text(text) for text in assets.wiki_intros()]
    if files := _files(source):
        return [text for file in files for text in _read_file(file, config)]
    looks_like_a_path = source.endswith(TEXT_SUFFIXES) or source.startswith((".", "/", "~"))
    if looks_like_a_path and not is_saved_dataset(Path(source).expanduser()):
        raise FileNotFoundError(f"load_documents: data.source must be an existing file or folder, got {source!r}")
    return [record_of(record, config, source) for record in datasets_records(source, config.split)]


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        if not path.name.endswith(TEXT_SUFFIXES):
            fail("load_documents", "data.source", "a file of kind " + ", ".join(TEXT_SUFFIXES), repr(source))
        return [path]
    if path.is_dir() and not is_saved_dataset(path):
        return sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(TEXT_SUFFIXES))
    if any(character in source for character in "*?["):
        root = Path(path.anchor or ".")
        found = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
        if not found:
            raise FileNotFoundError(f"load_documents: data.source must match at least one file, got {source!r}")
        return found
    return []


def _read_file(file: Path, config: DataConfig) -> list[Record]:
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        text = file.read_text(encoding="utf-8")
        return [Text(text)] if text.strip() else []
    opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8")
    texts = []
    with opened as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"load_documents: {where} must be a line of JSON, got {error}") from error
            if not isinstance(record, dict):
                fail("load_documents", where, "a JSON object", type(record).__name__)
            texts.append(record_of(record, config, where))
    return texts


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` wrote this folder."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def datasets_records(source: str, split: str) -> Iterable[dict]:
    """The records of one split of a data set that `datasets` finds, by name or in a folder that it wrote."""
    import datasets

    path = Path(source).expanduser()
    try:
        if is_saved_dataset(path):
            found = datasets.load_from_disk(str(path))
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # the hub's client has no common base class for "not there"
        raise FileNotFoundError(
            f"load_documents: data.source must be a file, a folder or a datasets name with split {split!r}, "
            f"got {source!r} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


# ------------------------------------------------------------------------------------------------- tokenisation


def tokenize(texts: Sequence[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[Document]:
    """Documents of at most ``max_length`` tokens.

    A text is split into consecutive documents. A prompt with its completion stays one document, and so does a chat: it
    is cut at ``max_length``, and left out when no token that counts remains. Token ids are taken as they are. Documents
    of one token predict nothing and are left out.
    """
    eos = []
    if config.append_eos:
        if tokenizer.eos_token_id is None:
            fail("tokenize", "data.append_eos", "false for a tokenizer without an end-of-sequence token", True)
        eos = [tokenizer.eos_token_id]
    documents: list[Document] = []
    with progress(total=len(texts), desc="tokenise", unit="text") as bar:
        for start in range(0, len(texts), 256):
            part = texts[start : start + 256]
            plain = [record if isinstance(record, Text) else Text("") for record in part]
            heads = _ids(tokenizer, [text.prompt or text.text for text in plain], special=True)
            tails = _ids(tokenizer, [text.text if text.prompt else "" for text in plain], special=False)
            for record, head, tail in zip(part, heads, tails):
                if isinstance(record, Chat):
                    documents += _masked(*encode_chat(record, tokenizer), config, "chat")
                elif isinstance(record, Tokens):
                    if len(record.ids) > config.max_length:
                        fail(
                            "tokenize", "data.max_length", f"at least the {len(record.ids)} ids of a record",
                            config.max_length,
                        )
                    documents += _masked(record.ids, record.counted, config, "tokens", record.layout)
                elif record.prompt:
                    ids = torch.tensor((head + tail + eos)[: config.max_length])
                    if len(ids) > len(head):
                        documents.append(Document(ids, max(1, len(head))))
                else:
                    pieces = torch.tensor(head + eos).split(config.max_length)
                    documents += [Document(piece) for piece in pieces if len(piece) > 1]
            bar.update(len(part))
    return documents


def _masked(
    ids: Sequence[int], counted: Sequence[bool], config: DataConfig, origin: str, layout: tuple[int, ...] | None = None
) -> list[Document]:
    """One document in which some tokens count, or none where no token does."""
    tokens, targets = torch.tensor(ids[: config.max_length]), torch.tensor(counted[: config.max_length])[1:]
    if not bool(targets.any()):
        return []
    labels = None if bool(targets.all()) else tokens[1:].masked_fill(~targets, IGNORED)
    return [Document(tokens, labels=labels, layout=layout, origin=origin)]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


# ------------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True, eq=False)
class Batch:
    """Documents laid out for a model, with its rows in the order of the documents.

    Args:
        documents: what it is made of.
        input_ids, position_ids: int64 ``[B, R]``. Positions restart with every document, and segment of one.
        rows: int64 ``[N]``, N = sum of (L - 1): where in the flattened ``[B * R]`` the predictions are made.
        labels: int64 ``[N]``: the token that each row predicts, -100 where it does not count.
        counted: int64 ``[M]``: the rows that do count.
    """

    documents: tuple[Document, ...]
    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    labels: Tensor
    counted: Tensor

    @property
    def tag(self) -> str:
        """The tag of its documents, which is one."""
        return self.documents[0].tag

    def starts(self) -> list[int]:
        """Where in the flattened ``[B * R]`` each document begins."""
        lengths = torch.tensor([0, *(len(document) - 1 for document in self.documents[:-1])])
        return self.rows[lengths.cumsum(0).to(self.rows.device)].tolist()

    def spread(self, values: Tensor) -> Tensor:
        """``[N]`` out of ``[M]`` for the rows that count: NaN in the others, as :func:`kd_kernels.kd_loss` has its
        statistics."""
        return torch.full_like(self.labels, torch.nan, dtype=values.dtype).index_copy(0, self.counted, values)

    def places(self) -> tuple[Tensor, Tensor]:
        """int64 ``[N]`` twice: the key of each row's document, and the row's place in it. Names a row in draws."""
        lengths = torch.tensor([len(document) - 1 for document in self.documents])
        keys = torch.tensor([document.key for document in self.documents]).repeat_interleave(lengths)
        places = torch.cat([torch.arange(length) for length in lengths.tolist()])
        return keys.to(self.rows.device), places.to(self.rows.device)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on another device."""
        tensors = (self.input_ids, self.position_ids, self.rows, self.labels, self.counted)
        return Batch(self.documents, *(tensor.to(device, non_blocking=True) for tensor in tensors))


def collate(documents: Sequence[Document], row_length: int, packing: bool = True) -> Batch:
    """Lay documents out in rows of at most ``row_length`` tokens.

    With packing, documents share rows, longest first into the first row with room; their positions restart at 0, from
    which transformers derives a mask that keeps them apart, and the padding at the end of a row is kept apart likewise.
    Without it each has a row of its own, padded on the right, where causal attention never looks.
    """
    bins: list[list[int]] = []
    if packing:
        room: list[int] = []
        for i in sorted(range(len(documents)), key=lambda i: -len(documents[i])):
            fits = next((b for b, left in enumerate(room) if left >= len(documents[i])), None)
            if fits is None:
                fits = len(bins)
                bins.append([])
                room.append(max(row_length, len(documents[i])))
            bins[fits].append(i)
            room[fits] -= len(documents[i])
    else:
        bins = [[i] for i in range(len(documents))]

    width = max(sum(len(documents[i]) for i in members) for members in bins)
    input_ids = torch.zeros(len(bins), width, dtype=torch.int64)
    position_ids = torch.arange(width).repeat(len(bins), 1)
    first_row = torch.zeros(len(documents), dtype=torch.int64)
    for b, members in enumerate(bins):
        column = 0
        for i in members:
            length = len(documents[i])
            input_ids[b, column : column + length] = documents[i].tokens
            segments = documents[i].layout or (length,)
            position_ids[b, column : column + length] = torch.cat([torch.arange(segment) for segment in segments])
            first_row[i] = b * width + column
            column += length
        input_ids[b, column:] = input_ids[b, 0]  # any id does; this one is no padding token that a model warns about
        if packing:
            position_ids[b, column:] = torch.arange(width - column)

    rows = torch.cat([first + torch.arange(len(document) - 1) for first, document in zip(first_row, documents)])
    counts = torch.cat([document.counted for document in documents])
    labels = torch.cat(
        [d.tokens[1:] if d.labels is None else d.labels for d in documents]
    ).masked_fill(~counts, IGNORED)
    return Batch(tuple(documents), input_ids, position_ids, rows, labels, counts.nonzero().squeeze(1))


class Plan:
    """Which documents each optimiser step learns from: a pure function of the lengths, ``batch_tokens`` and the seed.

    Epochs are permutations laid end to end. Step ``s`` takes the documents that begin in tokens ``s * batch_tokens`` to
    ``(s + 1) * batch_tokens`` of that stream, so steps hold ``batch_tokens`` on average (at most one document more)
    and any step can be named without those before it: that is what makes a resumed run exact.
    """

    def __init__(self, lengths: Sequence[int], batch_tokens: int, seed: int) -> None:
        longest = max(lengths)
        if batch_tokens < longest:
            fail("train", "train.batch_tokens", f"at least the longest document's {longest} tokens", batch_tokens)
        self._lengths = torch.tensor(lengths)
        self._epoch_tokens = int(self._lengths.sum())
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._epochs: dict[int, tuple[Tensor, Tensor]] = {}

    def steps_in(self, epochs: float) -> int:
        """The number of steps, at least one, that read the documents ``epochs`` times."""
        return max(1, round(epochs * self._epoch_tokens / self._batch_tokens))

    def step(self, index: int) -> list[int]:
        """Indices of the documents of one step, in the stream's order."""
        begin, end = index * self._batch_tokens, (index + 1) * self._batch_tokens
        chosen: list[int] = []
        for epoch in range(begin // self._epoch_tokens, (end - 1) // self._epoch_tokens + 1):
            order, starts = self._epoch(epoch)
            window = torch.tensor([begin, end]) - epoch * self._epoch_tokens
            first, last = torch.searchsorted(starts, window).tolist()
            chosen += order[first:last].tolist()
        return chosen

    def check_parts(self, steps: int, parts: int) -> None:
        """Raise where one of the steps has no document for each of the parts: before training, not during it."""
        smallest = min(len(self.step(index)) for index in range(steps))
        if smallest < parts:
            fail(
                "train", "train.batch_tokens", f"large enough for {parts} documents a step (accumulation x processes)",
                f"{self._batch_tokens}, which leaves a step with {smallest}", "raise it, or shorten data.max_length",
            )

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        if epoch not in self._epochs:
            # hashed, because torch's host generator looks at the low 32 bits of a seed alone
            digest = hashlib.blake2b(f"{self._seed}/{epoch}".encode(), digest_size=4).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            order = torch.randperm(len(self._lengths), generator=generator)
            lengths = self._lengths[order]
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1}  # a step touches neighbours only
            self._epochs[epoch] = (order, lengths.cumsum(0) - lengths)
        return self._epochs[epoch]


def deal(documents: Sequence[Document], parts: int) -> list[list[Document]]:
    """A step's documents in ``parts`` micro-batches of nearly equal size: longest first, each to the emptiest."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for i in sorted(range(len(documents)), key=lambda i: -len(documents[i])):
        lightest = min(range(parts), key=lambda part: (bool(dealt[part]), load[part]))
        dealt[lightest].append(i)
        load[lightest] += len(documents[i])
    return [[documents[i] for i in sorted(members)] for members in dealt]


def data_fingerprint(documents: Sequence[Document]) -> str:
    """128 bits over every token and mask in order: two runs with the same fingerprint read the same text."""
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        digest.update(len(document).to_bytes(8, "little") + document.first_target.to_bytes(8, "little"))
        digest.update(document.tokens.numpy().tobytes())
        if document.labels is not None:
            digest.update(document.labels.numpy().tobytes())
        if document.layout is not None:
            digest.update(repr(document.layout).encode())
    return digest.hexdigest()
