"""Run a teacher once over a text and keep its top tokens on disk: ``kdk cache build`` and ``kdk cache info``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from kd_kernels import LinearLogits, SparseTargets, topk_targets
from kd_kernels.cache import CacheManifest, CacheReader, CacheWriter
from kd_trainer.config import DataConfig
from kd_trainer.data import Document, load_documents
from kd_trainer.evaluate import batches_by_length
from kd_trainer.files import progress
from kd_trainer.models import (
    CausalLM, bos_policy, load_pretrained, load_tokenizer, model_fingerprint, tokenizer_fingerprint, vocab_of,
)
from kd_trainer.teachers import CachedTeacher


@dataclass(frozen=True)
class CacheOptions:
    """What ``kdk cache build`` is asked for, beside teacher, data and folder."""

    k: int = 64
    mass: float | None = None
    temperatures: tuple[float, ...] = (1.0,)
    step_nats: float = 1 / 16
    dtype: str = "float32"
    batch_tokens: int = 2048
    writer: str = "w0"


def build_cache(
    teacher_name: str, data: DataConfig, out: str | Path, options: CacheOptions = CacheOptions()
) -> dict[str, float]:
    """Score every document of a data set with a teacher and write its targets; go on where an earlier call stopped.

    Rows that do not count (a prompt's) are not scored into the cache. Documents that are there already are skipped.

    Returns:
        ``{"documents", "rows", "bytes", "bytes_per_row"}`` of the whole cache.

    Raises:
        CacheError: ``out`` holds a cache of another teacher, tokenizer or with other options, or cannot be written.
        ValueError, FileNotFoundError: as in :func:`~kd_trainer.data.load_documents` and in loading a model.
    """
    tokenizer = load_tokenizer(teacher_name)
    model = load_pretrained(teacher_name, options.dtype)
    fingerprint = model_fingerprint(model)
    teacher = CausalLM(model, vocab_of(tokenizer)).requires_grad_(False)
    documents = load_documents(data, tokenizer, teacher.vocab)
    manifest = CacheManifest(
        teacher=fingerprint, tokenizer=tokenizer_fingerprint(tokenizer), vocab=teacher.vocab,
        k=min(options.k, teacher.vocab), mass=options.mass, temperatures=options.temperatures,
        step_nats=options.step_nats, head_dtype=options.dtype, bos_policy=bos_policy(tokenizer),
        meta={
            "teacher": teacher_name, "data": data.source, "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
    teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    with CacheWriter(out, manifest, writer=options.writer) as writer:
        write_targets(teacher, documents, writer, options)
    reader = CacheReader(out)
    CachedTeacher(reader).check(documents)
    return summary(reader)


@torch.no_grad()
def write_targets(teacher: CausalLM, documents: list[Document], writer: CacheWriter, options: CacheOptions) -> None:
    """Score the documents that the writer lacks, in batches of nearly one length."""
    todo: dict[bytes, Document] = {}
    for document in documents:
        if (key := writer.key(document.tokens)) not in writer:
            twin = todo.setdefault(key, document)
            if document.first_target < twin.first_target:  # the same tokens after a shorter prompt have more rows
                todo[key] = document
    if len(todo) < len(documents):
        print(f"{len(documents) - len(todo)} of {len(documents)} documents are in the cache already, or occur twice")
    with progress(total=sum(len(document) for document in todo.values()), desc="cache", unit="tok") as bar:
        for batch in batches_by_length(list(todo.values()), options.batch_tokens):
            batch = batch.to(teacher.device)
            logits = teacher(batch)
            logits = dataclasses.replace(logits, hidden=logits.hidden[batch.counted])
            k = min(options.k, teacher.vocab)
            targets = topk_targets(logits, k, mass=options.mass, temperatures=options.temperatures)
            next_logprobs = label_logprobs(logits, batch.labels[batch.counted], targets).cpu()
            targets = targets.to("cpu")
            first = 0
            for document in batch.documents:
                positions = document.counted
                rows = torch.arange(first, first + int(positions.sum()))
                first += len(rows)
                writer.add(
                    document.tokens, targets.select(rows), next_logprobs=next_logprobs[rows],
                    positions=None if bool(positions.all()) else positions,
                )
                bar.update(len(document))


def label_logprobs(logits: LinearLogits, labels: Tensor, targets: SparseTargets) -> Tensor:
    """fp32 ``[N]``: log-probability of each row's label, from its logit and that of the row's most probable token.

    The log-probability of the first entry fixes the row's normaliser, so that two dot products of length H a row take
    the place of a pass over the vocabulary.
    """
    top, top_logprob = targets.ids[targets.offsets[:-1]].long(), targets.logprobs[targets.offsets[:-1]]
    return top_logprob + _logits_at(logits, labels) - _logits_at(logits, top)


def _logits_at(logits: LinearLogits, ids: Tensor) -> Tensor:
    """fp32 ``[N]``: one logit a row."""
    value = (logits.hidden.float() * logits.weight[ids].float()).sum(1)
    if logits.bias is not None:
        value = value + logits.bias[ids].float()
    value = value * logits.scale
    return value if logits.softcap is None else logits.softcap * torch.tanh(value / logits.softcap)


def summary(reader: CacheReader) -> dict[str, float]:
    """Documents, rows and bytes of a cache."""
    rows = reader.cached_rows
    return {"documents": len(reader), "rows": rows, "bytes": reader.bytes, "bytes_per_row": reader.bytes / max(1, rows)}


def describe(reader: CacheReader) -> str:
    """What ``kdk cache info`` prints."""
    manifest, numbers = reader.manifest, summary(reader)
    lines = {
        "documents": f"{numbers['documents']:,}",
        "rows": f"{numbers['rows']:,}",
        "bytes": f"{numbers['bytes']:,} ({numbers['bytes_per_row']:.1f} a row)",
        "kept": f"top {manifest.k}" + ("" if manifest.mass is None else f", at most mass {manifest.mass:g}"),
        "temperatures": ", ".join(f"{temperature:g}" for temperature in manifest.temperatures),
        "step": f"{manifest.step_nats:g} nats" if manifest.step_nats else "exact",
        "vocabulary": f"{manifest.vocab:,}",
        "head dtype": manifest.head_dtype,
        "chat template": manifest.chat_template,
        "BOS policy": manifest.bos_policy,
        "teacher": manifest.teacher,
        "tokenizer": manifest.tokenizer,
    } | {f"meta {key}": value for key, value in manifest.meta.items()}
    width = max(map(len, lines))
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in lines.items())
