"""What a cache is, in words: ``kdk cache info``. No block is read."""

from __future__ import annotations

from collections.abc import Mapping

from kd_kernels.cache import CacheReader


def summary(reader: CacheReader) -> dict[str, float]:
    """Documents, rows and bytes of a cache."""
    rows = reader.cached_rows
    return {"documents": len(reader), "rows": rows, "bytes": reader.bytes, "bytes_per_row": reader.bytes / max(1, rows)}


def facts(reader: CacheReader) -> dict[str, str]:
    """Name and value of everything that indexes and manifest say."""
    manifest, numbers = reader.manifest, summary(reader)
    left_out = reader.rows - reader.cached_rows
    lines = {
        "documents": f"{numbers['documents']:,}",
        "rows": f"{numbers['rows']:,}" + (f" of {reader.rows:,}, {left_out:,} left out" if left_out else ""),
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
    }
    return lines | {f"meta {key}": value for key, value in manifest.meta.items()}


def describe(reader: CacheReader) -> str:
    """What ``kdk cache info`` prints."""
    return columns(facts(reader))


def columns(lines: Mapping[str, str]) -> str:
    """Names and values, a line each, in two columns."""
    width = max(map(len, lines))
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in lines.items())
