"""What a cache holds and what it costs: ``kdk cache report``.

Bytes by stream, entries and tails of the rows, and how well the teacher predicts the text are read from the files
alone. What rounding did to the rows, and whether the kept ids are the teacher's first, is known with the teacher at
hand: then the report has what :mod:`kd_trainer.caching.verify` measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kd_kernels.cache import CachedRows, CacheReader
from kd_trainer.caching.describe import columns, summary
from kd_trainer.caching.verify import Verdict
from kd_trainer.errors import fail
from kd_trainer.files import progress
from kd_trainer.plot import plot_cache

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}

TITLES = {
    "entries": "entries of a row",
    "tail_mass": "mass in the tail",
    "entropy": "entropy of a row, nats",
    "next_loss": "teacher's loss, nats a token",
}


def rows_in_numbers(stored: CachedRows) -> dict[str, Tensor]:
    """What :data:`TITLES` names, fp32 with one value a cached row of one sequence.

    Entropy takes the tail as one event, and is left out of sampled rows, whose entries are not the likeliest ones. The
    loss is minus the log-probability of the token that follows, where that is known.
    """
    targets, kept = stored.targets, stored.positions
    found = {"entries": targets.offsets.diff()[kept].float()}
    if targets.tail_logprob is not None:
        found["tail_mass"] = targets.tail_logprob[kept].exp()
    if targets.importance is None:
        terms = -targets.logprobs.exp() * targets.logprobs
        found["entropy"] = torch.zeros(len(stored)).index_add_(0, targets.row_of_entry(), terms)[kept]
        if "tail_mass" in found:
            found["entropy"] -= torch.special.xlogy(found["tail_mass"], found["tail_mass"])
    following = stored.next_logprobs[kept]
    return found | {"next_loss": -following[~following.isnan()]}


@dataclass(frozen=True)
class Report:
    """What :func:`report` found.

    Attributes:
        totals: documents, rows, bytes, bytes a row: of the whole cache.
        streams: bytes by what they hold; they add up to the size of the shards.
        rows: of the documents that were looked at, by the names of :data:`TITLES`, fp32.
        looked_at: how many documents that is.
        step_nats: to which log-probabilities were rounded.
        verdict: the comparison with the teacher, if there was one.
    """

    totals: dict[str, float]
    streams: dict[str, int]
    rows: dict[str, Tensor]
    looked_at: int
    step_nats: float
    verdict: Verdict | None = None

    def statistics(self) -> dict[str, dict[str, float]]:
        """Mean and quantiles of every number of the rows."""
        found = {}
        for name, values in self.rows.items():
            if values.numel():
                ordered = values.sort().values
                quantiles = {q: float(ordered[round(at * (len(ordered) - 1))]) for q, at in QUANTILES.items()}
                found[name] = {"mean": float(values.double().mean())} | quantiles
        return found

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "totals": self.totals, "stream_bytes": self.streams, "documents_looked_at": self.looked_at,
            "rows": self.statistics(), "step_nats": self.step_nats,
            "against_the_teacher": None if self.verdict is None else self.verdict.as_dict(),
        }

    def table(self) -> str:
        """For people."""
        rows, total = max(1, self.totals["rows"]), sum(self.streams.values())
        lines = {
            "documents": f"{self.totals['documents']:,}", "rows": f"{self.totals['rows']:,}",
            "bytes": f"{self.totals['bytes']:,} ({self.totals['bytes_per_row']:.1f} a row)",
        }
        lines |= {
            f"  {name}": f"{count / rows:8.2f} a row {count / total:7.1%}"
            for name, count in sorted(self.streams.items(), key=lambda item: -item[1])
        }
        for name, values in self.statistics().items():
            lines[TITLES[name]] = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        if self.looked_at < self.totals["documents"]:
            lines["looked at"] = f"{self.looked_at:,} documents, chosen by hash"
        table = columns(lines)
        return table if self.verdict is None else f"{table}\n\n{self.verdict.table()}"

    def plot(self, png: str | Path) -> None:
        """Bytes by stream, and a histogram of every number of the rows."""
        per_row = {name: count / max(1, self.totals["rows"]) for name, count in self.streams.items()}
        plot_cache(per_row, {TITLES[name]: values for name, values in self.rows.items() if values.numel()}, Path(png))


def report(reader: CacheReader, *, documents: int = 4096, verdict: Verdict | None = None) -> Report:
    """Look at a cache.

    Args:
        documents: how many are read, chosen by hash; 0: all. Bytes are always those of all.
        verdict: of :func:`~kd_trainer.caching.verify.verify`, to report along with it.

    Raises:
        ValueError: fewer than 0 documents; a cache without any.
        CacheError: a file is damaged.
    """
    if documents < 0:
        fail("report", "documents", "at least 1, or 0 for all", documents)
    keys = sorted(reader.keys())[: documents or None]  # keys are hashes: the first ones are any ones
    if not keys:
        fail("report", "the cache", "of at least one document", f"none in {reader.folder}")
    parts = []
    with progress(total=len(keys), desc="report", unit="document") as bar:
        for key in keys:
            parts.append(rows_in_numbers(reader.read(key)))
            bar.update()
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Report(summary(reader), reader.stream_bytes(), found, len(keys), reader.manifest.step_nats, verdict)
