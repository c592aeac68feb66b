"""What is stored for a sequence, and the checks that bring a caller's targets into that form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kernels import _check
from kd_kernels.cache.manifest import CacheManifest
from kd_kernels.logits import SparseTargets

__all__ = ["CachedRows", "canonical_rows"]

MASS_TOLERANCE = 1e-3
"""How far above 1 the mass of a row may come out: a teacher that answers in half precision rounds."""

NEXT_TOLERANCE_NATS = 0.1
"""How far ``next_logprobs`` may be from the kept entry of the same id. Rows that are off by one miss it by nats."""

MIN_LEVEL = -(2.0**30)
"""Log-probabilities below this many steps do not fit the format."""

MAX_LOG_Z_STEPS = 2.0**26
"""Nor do log Z above this many steps, or below as many."""


@dataclass(frozen=True, eq=False)
class CachedRows:
    """The rows of one sequence, as the cache gives them back.

    Attributes:
        targets: N = L - 1 rows, entries in descending order; of those that rounding made equal, the teacher's first
            choice comes first and then the lower id. A row that is not cached has no entries: all of its mass
            is tail (``tail_logprob`` 0), and its log Z is NaN.
        next_logprobs: fp32 ``[N]``, nats: the teacher's log-probability of the token that follows. NaN where not known.
    """

    targets: SparseTargets
    next_logprobs: Tensor

    @property
    def positions(self) -> Tensor:
        """bool ``[N]``: which rows are cached."""
        return self.targets.offsets.diff() > 0

    def __len__(self) -> int:
        return self.next_logprobs.shape[0]

    def slice(self, start: int, stop: int) -> CachedRows:
        """Rows ``start`` to ``stop``, as views."""
        if (start, stop) == (0, len(self)):
            return self
        targets = self.targets
        offsets = targets.offsets[start : stop + 1]
        entries, rows = slice(int(offsets[0]), int(offsets[-1])), slice(start, stop)
        cut = lambda values, part: None if values is None else values[part]  # noqa: E731
        part = dataclasses.replace(
            targets, offsets=offsets - offsets[0], ids=targets.ids[entries], logprobs=targets.logprobs[entries],
            tail_logprob=cut(targets.tail_logprob, rows), importance=cut(targets.importance, entries),
            log_z=cut(targets.log_z, rows),
        )
        return CachedRows(part, self.next_logprobs[rows])

    @staticmethod
    def cat(parts: Sequence[CachedRows]) -> CachedRows:
        """Rows of several parts, one after the other."""
        targets = SparseTargets.cat([part.targets for part in parts])
        return CachedRows(targets, torch.cat([part.next_logprobs for part in parts]))


def canonical_rows(
    where: str, tokens: Tensor, targets: SparseTargets, next_logprobs: Tensor | None, positions: Tensor | None,
    manifest: CacheManifest,
) -> CachedRows:
    """Checks all that a caller can get wrong, and returns L - 1 rows on the CPU: fp32, entries sorted.

    Raises:
        TypeError, ValueError: as :meth:`CacheWriter.add` says.
    """
    if not isinstance(targets, SparseTargets):
        _check.fail_type(where, "targets", "SparseTargets", type(targets).__name__)
    rows = tokens.shape[0] - 1
    if positions is None:
        stored = torch.arange(rows)
    else:
        if _check.tensor(where, "positions", positions).dtype != torch.bool or tuple(positions.shape) != (rows,):
            rule = f"bool of shape [L - 1 = {rows}]"
            _check.fail(where, "positions", rule, f"{positions.dtype} {list(positions.shape)}")
        stored = positions.cpu().nonzero().flatten()
    if targets.offsets.shape[0] - 1 != stored.shape[0]:
        rule = f"L - 1 = {rows} rows" if positions is None else f"{stored.shape[0]} rows, one for each of positions"
        _check.fail(where, "targets", rule, targets.offsets.shape[0] - 1)
    _check_streams(where, targets, manifest)
    targets = _own(targets)
    _check_offsets(where, targets.offsets, targets.ids.shape[0], manifest)
    row = targets.row_of_entry()
    targets = _sorted(targets, row)
    _check_entries(where, targets, row, manifest)
    _check_rows(where, targets, row, manifest)

    def spread(values: Tensor, fill: float) -> Tensor:
        return torch.full((rows, *values.shape[1:]), fill).index_copy_(0, stored, values)

    counts = torch.zeros(rows, dtype=torch.int64).index_copy_(0, stored, targets.offsets.diff())
    following = _next_logprobs(where, tokens.cpu()[1:][stored], targets, row, next_logprobs, manifest)
    targets = dataclasses.replace(
        targets, offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        tail_logprob=None if targets.tail_logprob is None else spread(targets.tail_logprob, 0.0),
        log_z=spread(targets.log_z, math.nan) if manifest.stored_temperatures else None,
    )
    return CachedRows(targets, spread(following, math.nan))


def _own(targets: SparseTargets) -> SparseTargets:
    """A copy on the CPU, in fp32 and int64: the caller may write over its own while rows wait for a block."""

    def own(values: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return None if values is None else values.detach().to("cpu", dtype, copy=True)

    return dataclasses.replace(
        targets, offsets=own(targets.offsets, torch.int64), ids=own(targets.ids, torch.int64),
        logprobs=own(targets.logprobs), tail_logprob=own(targets.tail_logprob), importance=own(targets.importance),
        log_z=own(targets.log_z),
    )


def _check_streams(where: str, targets: SparseTargets, manifest: CacheManifest) -> None:
    """The targets carry what the manifest says that rows carry."""
    if targets.temperatures != manifest.temperatures:
        _check.fail(where, "targets.temperatures", f"{manifest.temperatures} as in the manifest", targets.temperatures)
    for name, field, wanted in (
        ("tail_logprob", "tail", manifest.tail),
        ("importance", "importance", manifest.importance),
    ):
        given = getattr(targets, name) is not None
        if given != wanted:
            _check.fail(
                where, f"targets.{name}", "given" if wanted else "None", "a tensor" if given else None,
                f"the manifest has {field}={wanted}",
            )


def _check_offsets(where: str, offsets: Tensor, entries: int, manifest: CacheManifest) -> None:
    counts = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != entries or bool((counts < 0).any()):
        found = offsets.tolist() if len(offsets) <= 8 else f"{offsets[:4].tolist()} ... {offsets[-4:].tolist()}"
        _check.fail(where, "targets.offsets", f"non-decreasing from 0 to nnz={entries}", found)
    _all(where, "targets", f"rows of at most k={manifest.k} entries", counts <= manifest.k, counts)


def _check_entries(where: str, targets: SparseTargets, row: Tensor, manifest: CacheManifest) -> None:
    ids, logprobs = targets.ids, targets.logprobs
    _all(where, "targets.ids", f"in 0..V-1={manifest.vocab - 1}", (ids >= 0) & (ids < manifest.vocab), ids, row)
    flat = (row * manifest.vocab + ids).sort().values
    twice = flat[1:][flat[1:] == flat[:-1]]
    if twice.numel():
        found = f"id {int(twice[0]) % manifest.vocab} twice in row {int(twice[0]) // manifest.vocab}"
        _check.fail(where, "targets.ids", "distinct within a row", found)
    _all(where, "targets.logprobs", "finite", logprobs.isfinite(), logprobs, row)
    if manifest.step_nats:
        least = MIN_LEVEL * manifest.step_nats
        remedy = "step_nats=0 stores any"
        _all(where, "targets.logprobs", f"at least {least} nats", logprobs >= least, logprobs, row, remedy)
    if targets.importance is not None:
        good = targets.importance.isfinite() & (targets.importance >= 0)
        _all(where, "targets.importance", "finite and not negative", good, targets.importance, row)


def _check_rows(where: str, targets: SparseTargets, row: Tensor, manifest: CacheManifest) -> None:
    """Masses and normalisers. What a row without entries says about them is not stored, and not looked at."""
    empty = targets.offsets.diff() == 0
    mass = torch.zeros(empty.shape[0], dtype=torch.float64).index_add_(0, row, targets.logprobs.double().exp())
    _all(where, "targets.logprobs", "of mass at most 1 a row", mass <= 1 + MASS_TOLERANCE, mass)
    if targets.tail_logprob is not None:
        tail = targets.tail_logprob.double().exp()
        _all(where, "targets.tail_logprob", "of mass at most 1", empty | (tail <= 1 + MASS_TOLERANCE), tail)
        good = empty | (mass + tail <= 1 + MASS_TOLERANCE)
        _all(where, "targets", "rows whose entries and tail have mass at most 1", good, mass + tail)
    if targets.log_z is not None:
        for temperature, log_z in zip(targets.temperatures, targets.log_z.unbind(1)):
            if temperature == 1.0:
                good, rule = log_z.abs() <= MASS_TOLERANCE, "0 at T = 1 (log-probabilities normalised over all of V)"
            elif manifest.step_nats:
                most = MAX_LOG_Z_STEPS * manifest.step_nats
                good, rule = log_z.abs() <= most, f"finite at T = {temperature} and in -{most}..{most} nats"
            else:
                good, rule = log_z.isfinite(), f"finite at T = {temperature}"
            _all(where, "targets.log_z", rule, empty | good, log_z)


def _sorted(targets: SparseTargets, row: Tensor) -> SparseTargets:
    """Entries of each row in descending order; of equal ones the lower id first."""
    ids, logprobs = targets.ids, targets.logprobs
    falling = (logprobs[1:] < logprobs[:-1]) | ((logprobs[1:] == logprobs[:-1]) & (ids[1:] > ids[:-1]))
    if bool((falling | (row[1:] != row[:-1])).all()):
        return targets
    order = ids.argsort(stable=True)
    order = order[logprobs[order].argsort(descending=True, stable=True)]
    order = order[row[order].argsort(stable=True)]
    importance = None if targets.importance is None else targets.importance[order]
    return dataclasses.replace(targets, ids=ids[order], logprobs=logprobs[order], importance=importance)


def _next_logprobs(
    where: str, next_tokens: Tensor, targets: SparseTargets, row: Tensor, given: Tensor | None, manifest: CacheManifest
) -> Tensor:
    """fp32, one a row: the next token's entry if there is one (so that it is stored once), else what the caller
    gave."""
    is_next = targets.ids == next_tokens[row]
    kept = torch.full(next_tokens.shape, math.nan).index_copy_(0, row[is_next], targets.logprobs[is_next])
    if given is None:
        return kept
    given = _check.floating(where, "next_logprobs", given)
    if given.shape != kept.shape:
        rule = f"of shape {list(kept.shape)}, as many as targets has rows"
        _check.fail(where, "next_logprobs", rule, list(given.shape))
    given = given.detach().to("cpu", torch.float32)
    _all(where, "next_logprobs", "at most 0, or NaN where not known", ~(given > MASS_TOLERANCE), given)
    if manifest.step_nats:
        least = MIN_LEVEL * manifest.step_nats
        good = ~(given < least) | given.isinf()
        _all(where, "next_logprobs", f"-inf or at least {least} nats", good, given, remedy="step_nats=0 stores any")
    agree = given.isnan() | kept.isnan() | ((given - kept).abs() <= NEXT_TOLERANCE_NATS)
    _all(
        where, "next_logprobs", "what targets has for the same tokens", agree, given,
        remedy="row i predicts tokens[i + 1]: is one of them shifted?",
    )
    return torch.where(kept.isnan(), given, kept)


def _all(
    where: str, argument: str, rule: str, good: Tensor, values: Tensor, row: Tensor | None = None, remedy: str = ""
) -> None:
    """Fails with the first value that breaks the rule, and the row that it is in."""
    if not bool(good.all()):
        first = int((~good).nonzero()[0])
        in_row = first if row is None else int(row[first])
        _check.fail(where, argument, rule, f"{values[first].item()} in row {in_row}", remedy)
