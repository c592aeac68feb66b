"""A cache out of what a serving API answered, line by line: ``kdk cache import``."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from kd_kernels import SparseTargets
from kd_kernels.cache import CacheManifest, CacheReader, CacheWriter, writer_name
from kd_trainer.caching.describe import columns, summary
from kd_trainer.caching.refused import Refused
from kd_trainer.caching.served import Reader, Scored
from kd_trainer.errors import fail
from kd_trainer.files import new_file, progress
from kd_trainer.models import bos_policy, load_tokenizer, tokenizer_fingerprint, vocab_of
from kd_trainer.records import IGNORED

WHERE = "import_cache"


@dataclass(frozen=True)
class ImportOptions:
    """What ``kdk cache import`` is asked for, beside files, tokenizer, teacher and folder."""

    k: int
    step_nats: float = 1 / 16
    head_dtype: str = "unknown"
    writer: str | None = None
    skip_refused: bool = False
    write_data: str | None = None


@dataclass
class ImportSummary:
    """What became of the records."""

    counts: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    first_refused: dict[str, str] = field(default_factory=dict)

    def refuse(self, error: Refused, place: str) -> None:
        self.refused[error.reason] += 1
        self.first_refused.setdefault(error.reason, f"first at {place}: {error.found}")

    def table(self) -> str:
        lines = {name: f"{count:,}" for name, count in self.counts.items()}
        lines |= {name: f"{count:,}" for name, count in sorted(self.notes.items())}
        lines |= {
            f"refused: {name}": f"{n:,}  ({self.first_refused[name]})" for name, n in sorted(self.refused.items())
        }
        return columns(lines)


def import_cache(
    files: Sequence[str | Path], tokenizer_name: str, teacher: str, out: str | Path, options: ImportOptions
) -> ImportSummary:
    """Turn JSON lines of served log-probabilities into a cache; go on where an earlier call stopped.

    The forms are those of :mod:`kd_trainer.caching.served`. Files are read line by line, so that they can be larger
    than memory. A tail is ``log(1 - sum p)`` of its row, summed in fp64, and as exact as the log-probabilities that
    were sent. They must be those of temperature 1: a served row does not determine any other.

    Args:
        files: ``.jsonl`` or ``.jsonl.gz``.
        tokenizer_name: of the model that was served.
        teacher: name and revision of that model; there are no weights to take a fingerprint of.
        options: with ``write_data``, the sequences are written to that file as token ids with labels, which
            ``kdk train`` reads as ``data.source``: the way to train on exactly these tokens.

    Raises:
        ValueError: a record that is refused, with its file and line, unless ``skip_refused``; an argument out of range.
        FileNotFoundError: a file or tokenizer is not there.
        CacheError: ``out`` holds another cache, or cannot be written.
    """
    paths = [Path(file).expanduser() for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{WHERE}: files must exist, got {str(path)!r}")
    if not teacher.strip():
        fail(WHERE, "--teacher", "a name that is not empty", repr(teacher), "such as name@revision")
    tokenizer = load_tokenizer(tokenizer_name)
    vocab = vocab_of(tokenizer)
    manifest = CacheManifest(
        teacher=teacher, tokenizer=tokenizer_fingerprint(tokenizer), vocab=vocab, k=options.k,
        step_nats=options.step_nats, head_dtype=options.head_dtype, bos_policy=bos_policy(tokenizer),
        meta={"teacher": teacher, "data": ", ".join(path.name for path in paths), "source": "imported"},
    )
    reader, found = Reader(tokenizer, vocab, options.k), ImportSummary()
    with ExitStack() as stack:
        writer = stack.enter_context(CacheWriter(out, manifest, writer=options.writer or writer_name()))
        data = stack.enter_context(new_file(Path(options.write_data).expanduser())) if options.write_data else None
        total = sum(path.stat().st_size for path in paths)
        bar = stack.enter_context(progress(total=total, desc="import", unit="B", unit_scale=True))
        for path in paths:
            for place, line in _lines(path, bar.update):
                try:
                    for scored in reader.read(_record(line)):
                        _add(writer, scored, found, data)
                except Refused as error:
                    if not options.skip_refused:
                        raise ValueError(
                            f"{WHERE}: {place} must be a record that can be imported, got {error}"
                        ) from error
                    found.refuse(error, place)
    found.notes = reader.notes
    found.counts |= {name: int(value) for name, value in summary(CacheReader(out)).items() if name != "bytes_per_row"}
    return found


def _lines(path: Path, progressed) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not empty, each with its place. Reports bytes of the file as they are read."""
    with open(path, "rb") as raw:
        lines = gzip.open(raw) if path.suffix == ".gz" else raw
        last = 0
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", line
            if number % 64 == 0:
                progressed((at := raw.tell()) - last)
                last = at
        progressed(raw.tell() - last)


def _record(line: str | bytes) -> object:
    try:
        return json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise Refused("a line that is no JSON", error, "the last line of a file that was cut short is one") from error


def _add(writer: CacheWriter, scored: Scored, found: ImportSummary, data: TextIO | None) -> None:
    tokens = torch.tensor(scored.tokens)
    positions = torch.tensor([row is not None for row in scored.rows])
    rows = [row for row in scored.rows if row is not None]
    if not rows:
        raise Refused("a sequence without a single row", f"{len(scored.tokens)} tokens")
    targets = SparseTargets(
        torch.nn.functional.pad(torch.tensor([len(row.ids) for row in rows]).cumsum(0), (1, 0)),
        torch.tensor([index for row in rows for index in row.ids]),
        torch.tensor([value for row in rows for value in row.logprobs]),
        torch.tensor([row.tail_logprob for row in rows]),
    )
    next_logprobs = torch.tensor([row.next_logprob for row in rows])
    try:
        added = writer.add(tokens, targets, next_logprobs=next_logprobs, positions=positions)
    except ValueError as error:
        raise Refused("rows that the cache does not take", error) from error
    found.counts["sequences added" if added else "sequences that were there already"] += 1
    if data is not None:
        labels = [
            IGNORED, *(token if row is not None else IGNORED for token, row in zip(scored.tokens[1:], scored.rows))
        ]
        data.write(json.dumps({"input_ids": scored.tokens, "labels": labels}) + "\n")

