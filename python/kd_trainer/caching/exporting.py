"""A cache as files that other tools open: ``kdk cache export``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from kd_kernels.cache import CachedRows, CacheReader
from kd_trainer.errors import check_one_of, fail
from kd_trainer.files import new_folder, progress

WHERE = "export_cache"
FORMATS = ("safetensors", "parquet")
VERSION = "kd-kernels cache export 1"
MANIFEST = "_manifest.json"
"""Readers of a folder of Parquet files skip names that begin so."""


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A sequence of a cache, with its tokens where they are known: a cache has their hash alone."""

    key: bytes
    rows: CachedRows
    tokens: Tensor | None


def export_cache(
    folder: str | Path, out: str | Path, form: str, *, rows_per_file: int = 1 << 18,
    tokens: Mapping[bytes, Tensor] | None = None
) -> int:
    """Write every sequence, in the order of their keys, into files of about ``rows_per_file`` rows.

    ``out`` appears when it is complete. It also gets :data:`MANIFEST`: what the cache is of. Log-probabilities are
    natural logarithms, normalised over the whole vocabulary, with the rounding that the cache has. Rows that are not
    cached have no entries; their next-token log-probability is NaN.

    ``safetensors``, N rows of S sequences with E entries in a file: ``keys`` u8 [S, 16]; ``rows`` i64 [S + 1], where
    each sequence's rows begin; ``offsets`` i64 [N + 1], where each row's entries begin; ``ids`` i32 [E]; ``logprobs``
    f32 [E]; ``importance`` f32 [E] of sampled ones; ``tail_logprob`` f32 [N] of others; ``next_logprobs`` f32 [N];
    ``log_z`` f32 [N, T] where temperatures beside 1 are declared; with tokens, ``token_offsets`` i64 [S + 1] and
    ``tokens`` i32.

    ``parquet``, a row a sequence: ``key`` 16 bytes; ``counts``, entries of each row; ``ids``, ``logprobs`` and
    ``importance``, those of all rows one after the other; ``tail_logprob``, ``next_logprobs``; ``log_z``, T numbers a
    row; ``tokens``.

    Args:
        tokens: by key, tokens to put beside the rows; sequences without are left out.

    Returns:
        The number of sequences that were written.

    Raises:
        CacheError: the cache is not there or damaged.
        ValueError: an unknown format; ``out`` exists; tokens of which none is in the cache.
    """
    check_one_of(WHERE, "--format", form, FORMATS)
    out = Path(out)
    if out.exists():
        fail(WHERE, "--out", "a folder that does not exist yet", str(out))
    if rows_per_file < 1:
        fail(WHERE, "--rows-per-file", "at least 1", rows_per_file)
    reader = CacheReader(folder)
    keys = sorted(reader.keys() if tokens is None else [key for key in tokens if key in reader])
    if not keys:
        fail(WHERE, "the cache", "of at least one of the sequences", f"none of {len(tokens or [])}")
    manifest = {"format": VERSION, **dataclasses.asdict(reader.manifest)}
    write = {"safetensors": _write_safetensors, "parquet": _write_parquet}[form]
    with new_folder(out) as temporary, progress(total=len(keys), desc="export", unit="seq") as bar:
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for number, part in enumerate(_parts(reader, keys, tokens, rows_per_file)):
            write(temporary / f"part-{number:05d}.{form}", part, manifest)
            bar.update(len(part))
    return len(keys)


def _parts(
    reader: CacheReader, keys: list[bytes], tokens: Mapping[bytes, Tensor] | None, rows_per_file: int
) -> Iterator[list[Sequence]]:
    part, rows = [], 0
    for key in keys:
        part.append(Sequence(key, reader.read(key), None if tokens is None else tokens[key]))
        rows += len(part[-1].rows)
        if rows >= rows_per_file:
            yield part
            part, rows = [], 0
    if part:
        yield part


def _offsets(counts: list[int]) -> Tensor:
    return torch.nn.functional.pad(torch.tensor(counts).cumsum(0), (1, 0))


def _write_safetensors(path: Path, part: list[Sequence], manifest: Mapping[str, object]) -> None:
    from safetensors.torch import save_file

    whole = CachedRows.cat([sequence.rows for sequence in part])
    targets = whole.targets
    tensors = {
        "keys": torch.tensor([list(sequence.key) for sequence in part], dtype=torch.uint8),
        "rows": _offsets([len(sequence.rows) for sequence in part]),
        "offsets": targets.offsets, "ids": targets.ids.int(), "logprobs": targets.logprobs,
        "importance": targets.importance, "tail_logprob": targets.tail_logprob, "next_logprobs": whole.next_logprobs,
        "log_z": targets.log_z if len(manifest["temperatures"]) > 1 else None,
    }
    if part[0].tokens is not None:
        tensors["token_offsets"] = _offsets([len(sequence.tokens) for sequence in part])
        tensors["tokens"] = torch.cat([sequence.tokens for sequence in part]).int()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, path, metadata={"manifest": json.dumps(manifest)})


def _write_parquet(path: Path, part: list[Sequence], manifest: Mapping[str, object]) -> None:
    import pyarrow
    from pyarrow import parquet

    def lists(values: list[Tensor]) -> pyarrow.Array:
        offsets = pyarrow.array(_offsets([value.numel() for value in values]).numpy(), pyarrow.int32())
        return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(torch.cat([v.reshape(-1) for v in values]).numpy()))

    def column(name: str, kind: torch.dtype | None = None) -> dict[str, pyarrow.Array]:
        values = [getattr(sequence.rows.targets, name) for sequence in part]
        return {} if values[0] is None else {name: lists([value.to(kind or value.dtype) for value in values])}

    columns = {
        "key": pyarrow.array([sequence.key for sequence in part], pyarrow.binary(16)),
        "counts": lists([sequence.rows.targets.offsets.diff().int() for sequence in part]),
        **column("ids", torch.int32), **column("logprobs"), **column("importance"), **column("tail_logprob"),
        "next_logprobs": lists([sequence.rows.next_logprobs for sequence in part]),
    }
    if len(manifest["temperatures"]) > 1:
        columns |= column("log_z")
    if part[0].tokens is not None:
        columns["tokens"] = lists([sequence.tokens.int() for sequence in part])
    table = pyarrow.table(columns, metadata={"manifest": json.dumps(manifest)})
    parquet.write_table(table, path, compression="zstd")
