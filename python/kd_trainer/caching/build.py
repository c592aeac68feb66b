"""Run a teacher once over a text and keep what it says: ``kdk cache build``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from kd_kernels.cache import CacheManifest, CacheReader, CacheWriter
from kd_trainer.caching.describe import summary
from kd_trainer.caching.options import CacheOptions
from kd_trainer.caching.scoring import Scorer, Selector, kept_targets, label_logprobs, load_scorer, memory_named
from kd_trainer.caching.team import Team, check_fresh
from kd_trainer.config import DataConfig
from kd_trainer.data import Document, load_documents
from kd_trainer.evaluate import batches_by_length
from kd_trainer.files import progress
from kd_trainer.models import bos_policy, reading_of, tokenizer_fingerprint
from kd_trainer.records import IGNORED
from kd_trainer.teachers import CachedTeacher

REDRAW_SECONDS = 1.0


def build_cache(
    teachers: str | Sequence[str], data: DataConfig, out: str | Path, options: CacheOptions = CacheOptions()
) -> dict[str, float]:
    """Score every document of a data set with a teacher and write its targets; go on where an earlier call stopped.

    Rows that do not count (a prompt's) are not scored into the cache. Documents that are there already are skipped. Run
    by torchrun or accelerate, every process scores a share of the documents and writes files of its own; a number of
    processes goes on with what any other number left.

    Args:
        teachers: a name or folder; or several of one tokenizer, averaged before anything is left out.

    Returns:
        ``{"documents", "rows", "bytes", "bytes_per_row"}`` of the whole cache, the same in every process.

    Raises:
        CacheError: ``out`` holds a cache of another teacher, tokenizer or with other options, or cannot be written.
        ValueError, FileNotFoundError: as in :func:`~kd_trainer.data.load_documents` and in loading a model; an option
            out of range; a teacher whose hidden states or logits are not finite.
    """
    out, team = Path(out), Team.of(options)
    if not options.resume:
        check_fresh(out)
    scorer = load_scorer([teachers] if isinstance(teachers, str) else teachers, options)
    documents = load_documents(data, scorer.tokenizer, scorer.vocab)
    scorer.check_length(documents)
    scorer.check_layouts(documents)
    scorer.to(team.device)
    selector = Selector(options, scorer.tokenizer, team.device)
    manifest = manifest_of(scorer, documents, data, options)
    team.recover(out)
    with CacheWriter(out, manifest, writer=team.writer(options.writer)) as writer:
        team.wait()  # all have seen the same sealed shards before the first seals another
        write_targets(scorer, selector, own_documents(documents, writer, team), writer, options, team)
    team.wait()
    reader = CacheReader(out)
    if team.size == 1 and not options.selects:
        CachedTeacher(reader).check(documents)
    return summary(reader)


def manifest_of(
    scorer: Scorer, documents: Sequence[Document], data: DataConfig, options: CacheOptions
) -> CacheManifest:
    """What the folder is a cache of."""
    bos, chat_template = reading_of(documents, scorer.tokenizer)
    meta = {
        "teacher": scorer.name, "data": data.source, "dtype": options.dtype, "positions": options.positions,
        "padding": f"{scorer.padding} columns of the head", "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if options.sampled is not None:
        draws = f"{options.sampled} draws at temperature {options.proposal_temperature:g}"
        meta["sampled"] = f"{draws}, beside the first {options.k}"
    if len(scorer.models) > 1:
        meta["ensemble"] = f"{options.ensemble}, weights {options.weights or 'equal'}"
    return CacheManifest(
        teacher=scorer.fingerprint, tokenizer=tokenizer_fingerprint(scorer.tokenizer), vocab=scorer.vocab,
        k=min(options.entries, scorer.vocab), mass=options.mass, temperatures=options.temperatures,
        tail=options.sampled is None, importance=options.sampled is not None,
        step_nats=options.step_nats, head_dtype=scorer.head_dtype,
        bos_policy=bos or bos_policy(scorer.tokenizer), chat_template=chat_template or "none",
        meta=meta,
    )


def own_documents(documents: Sequence[Document], writer: CacheWriter, team: Team) -> list[Document]:
    """The documents that the cache lacks and this process has to score, each once."""
    todo: dict[bytes, Document] = {}
    there = 0
    for document in documents:
        key = writer.key(document.tokens, document.layout)
        if key in writer:
            there += 1
        elif team.owns(key):
            todo[key] = _joined(todo[key], document) if key in todo else document
    if there and team.rank == 0:
        print(f"{there} of {len(documents)} documents are in the cache already")
    return list(todo.values())


def _joined(one: Document, other: Document) -> Document:
    """The same tokens with the rows that count in either: after a shorter prompt there are more."""
    counted = one.counted | other.counted
    labels = None if bool(counted.all()) else one.tokens[1:].masked_fill(~counted, IGNORED)
    return Document(one.tokens, labels=labels, layout=one.layout)


@torch.no_grad()
def write_targets(
    scorer: Scorer, selector: Selector, documents: Sequence[Document], writer: CacheWriter, options: CacheOptions,
    team: Team
) -> None:
    """Score documents in batches of nearly one length."""
    label = "cache" if team.size == 1 else f"cache ({team.rank + 1} of {team.size})"
    total = sum(map(len, documents))
    files = f"{team.writer(options.writer)}-*.kdc*"
    size = lambda: sum(path.stat().st_size for path in writer.folder.glob(files))  # noqa: E731
    rows, drawn, start = 0, 0.0, size()
    with progress(total=total, desc=label, unit="tok", disable=team.rank > 0) as bar:
        for batch in batches_by_length(documents, options.batch_tokens):
            with memory_named(batch):
                batch = batch.to(scorer.device)
                kept, logits, next_logprobs = selector.rows(batch, scorer)
                targets = kept_targets(logits, batch, kept, options, scorer.vocab)
                if next_logprobs is None:
                    next_logprobs = label_logprobs(logits, batch.labels[kept], targets)
            targets, next_logprobs, kept = targets.to("cpu"), next_logprobs.cpu(), kept.cpu()
            begin = 0
            for document in batch.documents:
                length = len(document) - 1
                here = ((kept >= begin) & (kept < begin + length)).nonzero().squeeze(1)
                positions = torch.zeros(length, dtype=torch.bool).index_fill_(0, kept[here] - begin, True)
                writer.add(
                    document.tokens, targets.select(here), next_logprobs=next_logprobs[here],
                    positions=None if bool(positions.all()) else positions, layout=document.layout,
                )
                begin += length
                bar.update(len(document))
            rows += len(kept)
            if rows and (now := time.monotonic()) > drawn + REDRAW_SECONDS and (written := size() - start):
                drawn = now
                bar.set_postfix_str(f"{written / rows:.1f} B a row", refresh=False)

