"""A cache against the teacher that it is of: ``kdk cache verify``.

Documents are scored again, twice: batched as ``kdk cache build`` does, and in another order in smaller batches. How far
the two differ is the teacher's own noise (a product is not the same to the last bit in another shape, least of all on a
GPU), and the cache has to be as near to the first as the second is, but for what it rounded.

With s the step in nats, entries that are off by at most s / 2 and then scaled to the row's mass differ by at most s
from the teacher's, and the KL of a row by at most s^2 / 8 (Hoeffding's lemma), s^2 / 24 on average (the variance of a
uniform error, halved). Errors in log-probabilities add; KL is near half a mean square, so that its roots add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kd_kernels import EnsembleLogits, SparseTargets
from kd_kernels.cache import CachedRows, CacheError, CacheReader, with_mass_one
from kd_trainer.caching.scoring import Logits, Scorer, rows_of
from kd_trainer.data import Batch, Document, collate
from kd_trainer.errors import fail
from kd_trainer.evaluate import batches_by_length
from kd_trainer.files import progress
from kd_trainer.models import dense_logits

NOISE_FACTOR = 2.0
"""How many times the control's error is forgiven, and how many times as often: it is one draw of the noise, and the
cache another. Where a kernel rounds otherwise for few shapes only, few entries have all of the noise."""

FLOOR_NATS = 2e-4
"""Forgiven where the control shows nothing: another kernel than the capture's formed these logits in fp32."""

GROUP = 16
"""Documents that are compared at a time."""

CHUNK_BYTES = 64 * 2**20


# ------------------------------------------------------------------------------------------------------ sums over rows


class Spread:
    """Largest value and quantiles (to a percent) of numbers of which there are too many to keep."""

    LOWEST, PER_DECADE, DECADES = 1e-9, 256, 12

    def __init__(self) -> None:
        self.largest, self.count = 0.0, 0
        self._bins = torch.zeros(self.PER_DECADE * self.DECADES, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        if values.numel():
            self.largest = max(self.largest, float(values.max()))
            self.count += values.numel()
            bins = ((values.clamp_min(self.LOWEST) / self.LOWEST).log10() * self.PER_DECADE).long()
            self._bins += torch.bincount(bins.clamp_max(len(self._bins) - 1), minlength=len(self._bins)).cpu()

    def above(self, share: float) -> float:
        """What no more than so large a share of the numbers exceeds."""
        if not self.count:
            return 0.0
        at = int(torch.searchsorted(self._bins.cumsum(0), math.ceil((1 - share) * self.count)))
        return min(self.largest, self.LOWEST * 10.0 ** ((at + 1) / self.PER_DECADE))


@dataclass
class Distance:
    """How far some rows are from the teacher's own."""

    logprobs: Spread = field(default_factory=Spread)  # |difference| of kept entries
    next: Spread = field(default_factory=Spread)  # of the following token
    log_z: Spread = field(default_factory=Spread)
    shortfall: Spread = field(default_factory=Spread)  # of an entry behind the last that should have been kept
    kl: Spread = field(default_factory=Spread)  # KL(teacher || rows), the tail as one event
    kl_sum: float = 0.0
    rows: int = 0
    shared: int = 0
    entries: int = 0

    @property
    def mean_kl(self) -> float:
        return self.kl_sum / max(1, self.rows)

    @property
    def agreement(self) -> float:
        """Fraction of entries that are among as many of the teacher's first."""
        return self.shared / max(1, self.entries)


@dataclass(frozen=True)
class Check:
    """One line of the verdict."""

    name: str
    cache: float
    control: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.cache <= self.allowed  # false for NaN


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found. ``agreement`` and ``control_agreement`` are reported, and judged by ``shortfall``:
    which of two equally likely tokens is kept means nothing."""

    documents: int
    rows: int
    checks: tuple[Check, ...]
    agreement: float
    control_agreement: float
    worst: str

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, object]:
        return {
            "documents": self.documents, "rows": self.rows, "passed": self.passed, "agreement": self.agreement,
            "control_agreement": self.control_agreement, "worst": self.worst,
            "checks": {
                check.name: {
                    "cache": check.cache, "control": check.control, "allowed": check.allowed, "passed": check.passed
                }
                for check in self.checks
            },
        }

    def table(self) -> str:
        """For people."""
        header = ("", "cache", "live again", "allowed", "")
        lines = [header] + [
            (c.name, f"{c.cache:.2e}", f"{c.control:.2e}", f"{c.allowed:.2e}", "ok" if c.passed else "FAILED")
            for c in self.checks
        ]
        if self.agreement == self.agreement:
            lines.append(("kept set in common", f"{self.agreement:.3%}", f"{self.control_agreement:.3%}", "", ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        rows = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
        rows.insert(1, "-" * len(rows[0]))
        end = "the cache is this teacher's" if self.passed else f"NOT this teacher's; worst: {self.worst}"
        return "\n".join([*rows, f"{self.rows:,} rows of {self.documents} documents; nats; {end}"])


# ---------------------------------------------------------------------------------------------------------- comparison


@torch.no_grad()
def verify(reader: CacheReader, scorer: Scorer, documents: Sequence[Document], *, batch_tokens: int = 2048) -> Verdict:
    """Compare the rows of documents with what the teacher says now.

    Args:
        scorer: on the device that it shall run on.
        documents: all of them must be in the cache.

    Raises:
        CacheError: the cache is of another teacher, a document is not in it, or a file is damaged.
    """
    check_identity(reader, scorer)
    documents = _once(documents)
    cache, control = Distance(), Distance()
    worst = (-1.0, "none")
    with progress(total=sum(map(len, documents)), desc="verify", unit="tok") as bar:
        for start in range(0, len(documents), GROUP):
            group = documents[start : start + GROUP]
            again = live_rows(scorer, batches_in_order(group[::-1], max(2, batch_tokens // 2)))
            for document, live in live_rows(scorer, batches_by_length(group, batch_tokens)).items():
                stored = reader.lookup(document.tokens, layout=document.layout)
                kl = _compare(document, stored, live, again[document], cache, control)
                if kl.numel() and (largest := float(kl.max())) > worst[0]:
                    begin = scorer.tokenizer.decode(document.tokens[:8])
                    row = int(stored.positions.nonzero()[int(kl.argmax())])
                    worst = (largest, f"{largest:.2g} nats at row {row} of the document that begins {begin!r}")
                bar.update(len(document))
    return _verdict(reader, len(documents), cache, control, worst[1])


def check_identity(reader: CacheReader, scorer: Scorer) -> None:
    """Raise where the manifest names another teacher."""
    manifest = reader.manifest
    for what, expected, found in (
        ("teacher", scorer.fingerprint, manifest.teacher), ("vocabulary", scorer.vocab, manifest.vocab),
        ("head dtype", scorer.head_dtype, manifest.head_dtype),
    ):
        if expected != found:
            raise CacheError.mismatch(
                reader.folder, None, what, f"{expected} ({scorer.name})", found,
                f"the cache was built with {manifest.meta.get('teacher', 'an unknown teacher')}",
            )


def _once(documents: Sequence[Document]) -> list[Document]:
    found = {(document.tokens.numpy().tobytes(), document.layout): document for document in documents}
    return list(found.values())


def batches_in_order(documents: Sequence[Document], batch_tokens: int) -> list[Batch]:
    """Batches of documents as they come, whatever their lengths."""
    batches: list[list[Document]] = []
    for document in documents:
        width = max(map(len, [document, *batches[-1]])) if batches else 0
        if not batches or width * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(document)
    return [collate(batch, max(map(len, batch)), packing=False) for batch in batches]


def live_rows(scorer: Scorer, batches: Sequence[Batch]) -> dict[Document, Logits]:
    """What stands for all L - 1 rows of every document."""
    found = {}
    for batch in batches:
        batch = batch.to(scorer.device)
        logits = scorer.logits(batch, torch.arange(len(batch.rows), device=scorer.device))
        begin = 0
        for document in batch.documents:
            rows = torch.arange(begin, begin := begin + len(document) - 1, device=scorer.device)
            found[document] = rows_of(logits, rows)
    return found


def dense_logprobs(logits: Logits) -> Tensor:
    """fp32 ``[N, V]`` of a few rows."""
    if not isinstance(logits, EnsembleLogits):
        return dense_logits(logits).log_softmax(-1)
    members = [dense_logits(member) for member in logits.members]
    if logits.space == "prob":
        weighted = [member.log_softmax(-1) + math.log(weight) for member, weight in zip(members, logits.weights)]
        return torch.stack(weighted).logsumexp(0)
    return sum(weight * member for member, weight in zip(members, logits.weights)).log_softmax(-1)


def _compare(
    document: Document, stored: CachedRows, live: Logits, again: Logits, cache: Distance, control: Distance
) -> Tensor:
    """Add one document to the distances. Returns KL(teacher || cache) of its cached rows (empty for sampled rows)."""
    kept = stored.positions.nonzero().squeeze(1)
    kls = [torch.zeros(0, dtype=torch.float64)]
    targets, following = with_mass_one(stored.targets.select(kept)), document.tokens[1:][kept]
    chunk = max(1, CHUNK_BYTES // (4 * live.vocab))
    for index in torch.arange(len(kept)).split(chunk):
        rows = targets.select(index)
        p = dense_logprobs(rows_of(live, kept[index].to(live.device))).cpu()
        q = dense_logprobs(rows_of(again, kept[index].to(live.device))).cpu()
        row, ids = rows.row_of_entry(), rows.ids.long()
        own, other = p[row, ids], q[row, ids]
        control_rows = SparseTargets(rows.offsets, ids, other, _tail(other, rows), rows.importance)
        kls.append(_add(cache, rows, own))
        _add(control, control_rows, own)
        if rows.importance is None:
            counts = rows.offsets.diff()
            written = torch.arange(int(counts.max())) < counts[:, None]
            _add_kept(cache, torch.zeros(written.shape, dtype=torch.int64).masked_scatter_(written, ids), written, p)
            _add_kept(control, q.topk(written.shape[1], dim=1).indices, written, p)
        labels = following[index][:, None]
        for distance, values in ((cache, stored.next_logprobs[kept[index]]), (control, q.gather(1, labels)[:, 0])):
            difference = (values - p.gather(1, labels)[:, 0]).abs()
            distance.next.add(difference[~difference.isnan()])
        for column, temperature in enumerate(rows.temperatures):
            if temperature != 1.0:
                log_z = (p / temperature).logsumexp(1)
                cache.log_z.add((rows.log_z[:, column] - log_z).abs())
                control.log_z.add(((q / temperature).logsumexp(1) - log_z).abs())
    return torch.cat(kls)


def _tail(logprobs: Tensor, rows: SparseTargets) -> Tensor:
    """Log of what the entries of each row leave of one."""
    kept = torch.zeros(rows.offsets.shape[0] - 1, dtype=torch.float64)
    kept.index_add_(0, rows.row_of_entry(), logprobs.double().exp())
    return (1.0 - kept).clamp_min(0.0).log().float()


def _add(distance: Distance, rows: SparseTargets, own: Tensor) -> Tensor:
    """Compare entries with the teacher's ``own`` log-probabilities of the same ids. Returns the rows' KL."""
    row, count = rows.row_of_entry(), rows.offsets.shape[0] - 1
    distance.logprobs.add((rows.logprobs - own).abs())
    distance.rows += count
    if rows.importance is not None:
        return torch.zeros(0, dtype=torch.float64)
    weight = own.double().exp()
    kl = torch.zeros(count, dtype=torch.float64).index_add_(0, row, weight * (own - rows.logprobs).double())
    left = 1.0 - torch.zeros_like(kl).index_add_(0, row, weight)
    told = rows.tail_logprob.double().clamp_min(-30.0)
    # Below a millionth, the fp32 numbers that `left` is the rest of say nothing about it.
    kl += torch.where(left > 1e-6, left * (left.clamp_min(1e-6).log() - told), 0.0)
    distance.kl.add(kl.clamp_min(0.0))
    distance.kl_sum += float(kl.sum())
    return kl


def _add_kept(distance: Distance, ids: Tensor, written: Tensor, p: Tensor) -> None:
    """Compare the ids of each row (``[N, k]``, those that are written) with as many of the teacher's first."""
    best = p.topk(written.shape[1], dim=1)
    first = torch.zeros_like(p, dtype=torch.bool).scatter_(1, best.indices, written)
    distance.shared += int((first.gather(1, ids) & written).sum())
    distance.entries += int(written.sum())
    last = best.values.gather(1, written.sum(1, keepdim=True) - 1)
    distance.shortfall.add((last - p.gather(1, ids)).clamp_min(0.0)[written])


def _verdict(reader: CacheReader, documents: int, cache: Distance, control: Distance, worst: str) -> Verdict:
    if not cache.rows:
        fail("verify_cache", "the documents", "of at least one cached row", "none")
    step = reader.manifest.step_nats
    add = lambda bound, noise: bound + NOISE_FACTOR * noise + FLOOR_NATS  # noqa: E731
    add_roots = lambda bound, noise: add(math.sqrt(bound), math.sqrt(noise)) ** 2  # noqa: E731
    checks = [
        Check("max |d logprob|", cache.logprobs.largest, control.logprobs.largest, add(step, control.logprobs.largest)),
        Check(
            "p99 |d logprob|", cache.logprobs.above(0.01), control.logprobs.above(0.01),
            add(step, control.logprobs.above(0.01 / NOISE_FACTOR)),
        ),
    ]
    if cache.next.count:
        checks.append(
            Check("max |d next logprob|", cache.next.largest, control.next.largest, add(step, control.next.largest))
        )
    if cache.log_z.count:
        checks.append(
            Check("max |d log Z|", cache.log_z.largest, control.log_z.largest, add(step, control.log_z.largest))
        )
    if not reader.manifest.importance:
        checks += [
            Check("mean KL", cache.mean_kl, control.mean_kl, add_roots(step**2 / 24, max(0.0, control.mean_kl))),
            Check("max KL", cache.kl.largest, control.kl.largest, add_roots(step**2 / 8, control.kl.largest)),
            Check(
                "max shortfall of an entry", cache.shortfall.largest, control.shortfall.largest,
                add(0.0, control.logprobs.largest),
            ),
        ]
    sampled = reader.manifest.importance
    return Verdict(
        documents, cache.rows, tuple(checks), math.nan if sampled else cache.agreement,
        math.nan if sampled else control.agreement, worst,
    )
