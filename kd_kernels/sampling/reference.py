"""Draws in torch operations: any device, any dtype. The text to read first, beside ``DRAWS.md``, which it follows.

An implementation takes a chunk of C rows of logits with a :class:`Request` and writes what :class:`RowSamples` names.
It reads nothing from the device. A row that is no distribution (NaN, +inf, or -inf throughout; or an inverse
temperature of NaN, which stands for an argument out of range) gets the id -1 and NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_kernels.products import RawRows
from kd_kernels.sampling import philox
from kd_kernels.sampling.philox import GROUP


class Request(NamedTuple):
    """What is wanted of C rows: ``[C]`` each, contiguous, on the device of the rows.

    A filter that is None is off for all rows; ``top_k >= V``, ``top_p >= 1`` and ``min_p <= 0`` are off for one.
    """

    seeds: Tensor  # int64
    keys: Tensor  # int64
    positions: Tensor  # int64, of which the low 32 bits count
    inverse: Tensor  # work dtype, 1 / temperature within 2^-126 .. largest fp32; inf: temperature 0
    top_k: Tensor | None  # int64, at least 1
    top_p: Tensor | None  # fp64
    min_p: Tensor | None  # fp64
    given: Tensor | None  # int64: score these ids, draw nothing. For judge_by; "cpp" has its own and takes none
    race: int  # the purpose of the words of the race between groups; that of the pick is one more

    def of(self, rows: slice | Tensor) -> Request:
        """Of some rows (a slice, or int64 ``[R]``)."""
        return Request(*(x[rows] if isinstance(x, Tensor) else x for x in self))


class RowSamples(NamedTuple):
    """Where the results of C rows go, ``[C]`` each, contiguous; all but the ids in the work dtype."""

    ids: Tensor
    logprobs: Tensor
    model_logprobs: Tensor
    entropy: Tensor | None
    lse: Tensor | None

    def of(self, rows: slice) -> RowSamples:
        """Of some rows."""
        return RowSamples(*(None if x is None else x[rows] for x in self))


TEACHER_FAULT, STUDENT_FAULT = 1, 2


class Verdicts(NamedTuple):
    """Where the verdicts on C drafts go, ``[C]`` each, contiguous."""

    ids: Tensor  # int64, -1: a row of either model is no distribution
    accepted: Tensor  # bool
    faults: Tensor  # uint8: whose is none, TEACHER_FAULT, STUDENT_FAULT or their sum; 0
    logprobs: Tensor  # work dtype, as model_logprobs
    model_logprobs: Tensor

    @staticmethod
    def new(count: int, dtype: torch.dtype, device: torch.device) -> Verdicts:
        """Memory for those of so many drafts."""
        dtypes = (torch.int64, torch.bool, torch.uint8, dtype, dtype)
        return Verdicts(*(torch.empty(count, dtype=each, device=device) for each in dtypes))

    def of(self, rows: slice) -> Verdicts:
        """Of some rows."""
        return Verdicts(*(x[rows] for x in self))


class TargetRequest(NamedTuple):
    """What ``sampled_targets`` wants of C rows."""

    seeds: Tensor  # int64 [C], as the next two
    keys: Tensor
    positions: Tensor
    inverse: float  # 1 / proposal temperature, a number of the work dtype
    draws: int  # in each row
    certain: int  # so many ids are taken, and not drawn


class RowTargets(NamedTuple):
    """Where the entries of C rows go: rectangles of width W >= min(draws + certain, V), each row's at the left."""

    counts: Tensor  # int64 [C]: entries of each row; -1: no distribution
    ids: Tensor  # int64 [C, W], by falling logit, the lower id first
    logprobs: Tensor  # work dtype [C, W], the model's own
    importance: Tensor  # work dtype [C, W]


COPIES = 14
"""Temporaries of 8 bytes a logit that are held at once: the sort, its indices, masses, the words of the groups."""

NATIVE = False
"""Whether logits are read in any dtype (else: in the work dtype alone)."""


def scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a row, and that any number of rows, takes beside the logits."""
    return COPIES * 8 * columns, 0


ENTRY_BYTES = 96
"""Of an id that was drawn or is certain, while entries are made: what :func:`write_entries` holds at once."""


def target_scratch(columns: int, request: TargetRequest, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a row, and that any number of rows, takes beside the logits and the rectangles."""
    of_draws = 32 * GROUP * request.draws + ENTRY_BYTES * (request.draws + request.certain)
    return 8 * COPIES * columns + of_draws, 0


def kept(z: Tensor, inverse: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> Tensor:
    """bool ``[C, V]``: the ids that the filters leave, of logits ``[C, V]``. Masses in fp64, relative to the
    largest."""
    order = z.double().sort(dim=1, descending=True, stable=True)
    place = torch.arange(z.shape[1], device=z.device)
    tempered = (order.values - order.values[:, :1]) * inverse.double()[:, None]
    keep = torch.ones_like(place, dtype=torch.bool).expand(z.shape)
    if top_k is not None:
        keep = keep & (place < top_k[:, None])
    if top_p is not None:
        mass = torch.where(keep, tempered.exp(), 0.0)
        running = F.pad(mass.cumsum(1), (1, 0))
        reached = (running[:, :-1] >= top_p[:, None] * running[:, -1:]) & (top_p < 1)[:, None]
        keep = keep & (~reached | (place == 0))
    if min_p is not None:
        keep = keep & ~(tempered < min_p.log()[:, None])
    return torch.empty_like(keep).scatter_(1, order.indices, keep)


def grouped(z: Tensor) -> Tensor:
    """``[C, G, 128]``: columns that do not exist are -inf."""
    return F.pad(z, (0, -z.shape[1] % GROUP), value=-torch.inf).unflatten(1, (-1, GROUP))


def group_sums(z: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits ``[C, G, 128]``: the maximum m of each group, and the sum of exp((z - m) / T) in the contract's
    order."""
    top = z.amax(2)
    share = ((z - torch.where(top > -torch.inf, top, 0.0)[..., None]) * inverse[:, None, None]).exp()
    while share.shape[2] > 1:
        half = share.shape[2] // 2
        share = share[..., :half] + share[..., half:]
    return top, share[..., 0]


def log_sum(top: Tensor, total: Tensor, inverse: Tensor) -> Tensor:
    """fp64 ``[C]``: log of the sum over groups, relative to the row's maximum."""
    fall = (top.double() - top.amax(1, keepdim=True).double()) * inverse.double()[:, None]
    return (fall.exp() * total.double()).sum(1).log()


def drawn(z: Tensor, top: Tensor, total: Tensor, request: Request) -> Tensor:
    """int64 ``[C]``: a race between the groups, and a pick inside the one that wins. ``z`` is ``[C, G, 128]``."""
    source, inverse = (request.seeds, request.keys, request.positions), request.inverse.double()
    race = philox.uniform(philox.group_words(*source, request.race, z.shape[1]))
    fall = (top.double() - top.amax(1, keepdim=True).double()) * inverse[:, None]
    score = fall + (total.double() / -torch.log1p(-race)).log()
    winner = score.argmax(1)
    rows = torch.arange(z.shape[0], device=z.device)
    z, top = z[rows, winner].double(), top[rows, winner].double()
    running = ((z - top[:, None]) * inverse[:, None]).exp().cumsum(1)
    word = philox.words(*source, request.race + 1, winner // 4).gather(1, (winner % 4)[:, None])
    passed = running > philox.uniform(word) * running[:, -1:]
    return winner * GROUP + passed.int().argmax(1)


def sample_rows(rows: RawRows, request: Request, out: RowSamples) -> None:
    """Draws and scores a chunk."""
    z = rows.logits()
    peak = z.amax(1)  # NaN where there is one
    is_whole = (peak.abs() < torch.inf) & ~request.inverse.isnan()
    z = torch.where(is_whole[:, None], z, 0.0)
    peak, best = z.max(1)
    is_greedy = request.inverse == torch.inf
    request = request._replace(inverse=torch.where(is_whole & ~is_greedy, request.inverse, 1.0))

    masked = z
    if any(filter is not None for filter in (request.top_k, request.top_p, request.min_p)):
        keep = kept(z, request.inverse, request.top_k, request.top_p, request.min_p)
        masked = z.masked_fill(~keep, -torch.inf)
    top, total = group_sums(grouped(masked), request.inverse)
    ids = request.given
    if ids is None:
        ids = torch.where(is_greedy, best, drawn(grouped(masked), top, total, request))
    at = ids.clamp(0, z.shape[1] - 1)[:, None]
    fall = (masked.gather(1, at)[:, 0].double() - peak.double()) * request.inverse.double()
    greedy_logprob = torch.where(ids == best, 0.0, -torch.inf).double()
    logprobs = torch.where(is_greedy, greedy_logprob, fall - log_sum(top, total, request.inverse))

    one = torch.ones_like(request.inverse)
    model_log_sum = log_sum(*group_sums(grouped(z), one), one)
    model_logprobs = z.gather(1, at)[:, 0].double() - peak.double() - model_log_sum
    is_there = is_whole & (ids == at[:, 0])
    out.ids.copy_(torch.where(is_there, ids, -1))
    out.logprobs.copy_(torch.where(is_there, logprobs, torch.nan))
    out.model_logprobs.copy_(torch.where(is_there, model_logprobs, torch.nan))
    if out.entropy is not None and out.lse is not None:
        logq = (z - peak[:, None]).double() - model_log_sum[:, None]
        entropy = -torch.where(logq > -torch.inf, logq.exp() * logq, 0.0).sum(1)
        out.entropy.copy_(torch.where(is_whole, entropy, torch.nan))
        out.lse.copy_(torch.where(is_whole, peak.double() + model_log_sum, torch.nan))


def picked_scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """As :func:`scratch`, with the copies of :func:`sample_picked`."""
    return scratch(columns, dtype)[0] + dtype.itemsize * columns, 0


def sample_picked(rows: RawRows, picked: Tensor, request: Request, out: RowSamples) -> None:
    """Draws and scores those ``picked`` (int64 ``[R]``) of a chunk alone."""
    sample_rows(rows.picked(picked), request, out)


def warped(z: Tensor, inverse: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> Tensor:
    """fp64 ``[C, V]``: log-probabilities of rows, tempered and cut."""
    peak, best = z.max(1)
    is_greedy = inverse == torch.inf
    inverse = torch.where(is_greedy, 1.0, inverse)
    logits = (z.double() - peak.double()[:, None]) * inverse.double()[:, None]
    if any(filter is not None for filter in (top_k, top_p, min_p)):
        logits = logits.masked_fill(~kept(z, inverse, top_k, top_p, min_p), -torch.inf)
    greedy = torch.full_like(logits, -torch.inf).scatter_(1, best[:, None], 0.0)
    return torch.where(is_greedy[:, None], greedy, logits.log_softmax(1))


def judge_scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """As :func:`scratch`: both models' rows as :func:`warped` makes them, and the draw out of what is left."""
    return 3 * 8 * COPIES * columns, 0


def residual(teacher: RawRows, student: RawRows, teacher_request: Request, student_request: Request) -> Tensor:
    """Logits ``[R, V]`` of what is left of the teacher, ``log(max(p - q, 0))`` formed in fp64; of p where nothing
    is."""
    p, q = (
        warped(rows.logits(), each.inverse, each.top_k, each.top_p, each.min_p)
        for rows, each in ((teacher, teacher_request), (student, student_request))
    )
    left = (p.exp() - q.exp()).clamp_min_(0.0).log_()
    return torch.where(left.amax(1, keepdim=True) > -torch.inf, left, p).to(teacher.raw.dtype)


def judge_by(
    draw: Callable[[RawRows, Request, RowSamples], None],
    residual: Callable[[RawRows, RawRows, Request, Request], Tensor],
    teacher: RawRows, student: RawRows, drafts: Tensor, teacher_request: Request, student_request: Request,
    out: Verdicts,
) -> None:
    """Speculative sampling of a chunk: tests drafts (int64 ``[C]``) and replaces those that are refused, with a
    backend's ``sample_rows`` and its logits of what is left. Waits for a GPU once: how many rows are refused."""
    dtype, device = out.logprobs.dtype, drafts.device

    def run(rows: RawRows, request: Request) -> RowSamples:
        new = lambda kind: torch.empty(len(request.seeds), dtype=kind, device=device)  # noqa: E731
        found = RowSamples(new(torch.int64), new(dtype), new(dtype), None, None)
        draw(rows, request, found)
        return found

    p, q = (
        run(rows, request._replace(given=drafts))
        for rows, request in ((teacher, teacher_request), (student, student_request))
    )
    out.faults.copy_((p.ids < 0) * TEACHER_FAULT + (q.ids < 0) * STUDENT_FAULT)
    is_whole, log_p = out.faults == 0, p.logprobs.double()
    words = philox.words(teacher_request.seeds, teacher_request.keys, teacher_request.positions, philox.ACCEPT)
    passes = philox.fine_uniform(words[..., :2]).log() <= log_p - q.logprobs.double()
    out.accepted.copy_(is_whole & (log_p > -torch.inf) & passes)
    out.ids.copy_(torch.where(is_whole, drafts, -1))
    out.logprobs.copy_(torch.where(is_whole, p.logprobs, torch.nan))
    out.model_logprobs.copy_(torch.where(is_whole, p.model_logprobs, torch.nan))

    refused = (is_whole & ~out.accepted).nonzero()[:, 0]
    if len(refused) == 0:
        return
    teacher, student = teacher.picked(refused), student.picked(refused)
    teacher_request, student_request = teacher_request.of(refused), student_request.of(refused)
    left = RawRows(residual(teacher, student, teacher_request, student_request))
    plain = teacher_request._replace(
        inverse=torch.ones_like(teacher_request.inverse), top_k=None, top_p=None, min_p=None
    )
    ids = run(left, plain).ids
    found = run(teacher, teacher_request._replace(given=ids))
    for field, values in (("ids", ids), ("logprobs", found.logprobs), ("model_logprobs", found.model_logprobs)):
        getattr(out, field).index_copy_(0, refused, values)


judge_rows = functools.partial(judge_by, sample_rows, residual)


def _drawn_with_replacement(z: Tensor, request: TargetRequest, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids ``[C, draws]`` of logits ``[C, G, 128]``; each row's maximum and mass relative to it, fp64 ``[C, 1]``."""
    top, total = group_sums(z, inverse)
    peak = top.amax(1, keepdim=True).double()
    mass = ((top.double() - peak) * request.inverse).exp() * total.double()
    upto = mass.cumsum(1)
    number = torch.arange(request.draws, device=z.device)
    places = (x[:, None] for x in (request.seeds, request.keys, request.positions))
    u = philox.fine_uniform(philox.words(*places, philox.TARGETS, 0, number)[..., :2])
    target = u * upto[:, -1:]
    group = torch.searchsorted(upto, target, right=True).clamp(max=z.shape[1] - 1)
    before = F.pad(upto, (1, 0)).gather(1, group)
    row = torch.arange(z.shape[0], device=z.device)[:, None]
    weight = ((z[row, group].double() - top.gather(1, group).double()[..., None]) * request.inverse).exp()
    running = weight.cumsum(2)
    passed = running > ((target - before) / mass.gather(1, group))[..., None] * running[..., -1:]
    last = GROUP - 1 - (weight > 0).int().flip(2).argmax(2)
    return group * GROUP + torch.where(passed.any(2), passed.int().argmax(2), last), peak, upto[:, -1:]


def target_rows(rows: RawRows, request: TargetRequest, out: RowTargets) -> None:
    """Draws and counts for a chunk."""
    z = rows.logits()
    peak = z.amax(1)
    is_whole = peak.abs() < torch.inf
    z = torch.where(is_whole[:, None], z, 0.0)
    one, inverse = torch.ones_like(peak), torch.full_like(peak, request.inverse)
    sure = z.double().sort(dim=1, descending=True, stable=True).indices[:, : request.certain]
    left = z.scatter(1, sure, -torch.inf)
    has_left = left.amax(1, keepdim=True) > -torch.inf
    drawn, top, mass = _drawn_with_replacement(grouped(torch.where(has_left, left, 0.0)), request, inverse)
    drawn = drawn.clamp(max=z.shape[1] - 1)
    logits = torch.cat([z.gather(1, sure), torch.where(has_left, z.gather(1, drawn), -torch.inf)], 1)
    own_sum = log_sum(*group_sums(grouped(z), one), one)[:, None]
    write_entries(
        torch.cat([sure, drawn], 1), logits, top, mass, z.amax(1, keepdim=True), own_sum, is_whole, request, out
    )


def write_entries(
    ids: Tensor, logits: Tensor, top: Tensor, mass: Tensor, peak: Tensor, own_sum: Tensor, is_whole: Tensor,
    request: TargetRequest, out: RowTargets,
) -> None:
    """Entries out of draws: equal ones counted, weighed, and put in their order.

    Args:
        ids: int64 ``[C, certain + draws]``: the certain ones, then what was drawn.
        logits: of those, in the work dtype; -inf where there is none.
        top, mass: fp64 ``[C, 1]``: the largest logit that was drawn from, and the mass relative to it, at the proposal.
        peak, own_sum: ``[C, 1]``: the largest logit of all, and fp64 log of the mass relative to it, at temperature 1.
        is_whole: bool ``[C]``: rows that are distributions.
    """
    (sure, drawn), (sure_logits, drawn_logits) = (x.split([request.certain, request.draws], 1) for x in (ids, logits))
    # Equal draws are neighbours once they are sorted: the first of each has the count of all.
    drawn, order = drawn.sort(1)
    drawn_logits = drawn_logits.gather(1, order)
    is_first = F.pad(drawn.diff(dim=1) != 0, (1, 0), value=True)
    slot = is_first.cumsum(1) - 1
    times = torch.zeros_like(drawn).scatter_add_(1, slot, torch.ones_like(drawn)).gather(1, slot)
    proposal = ((drawn_logits.double() - top) * request.inverse).exp() / mass
    importance = times / (request.draws * proposal)

    ids, logits = torch.cat([sure, drawn], 1), torch.cat([sure_logits, drawn_logits], 1)
    importance = torch.cat([torch.ones_like(sure, dtype=torch.float64), importance], 1)
    is_entry = torch.cat([torch.ones_like(sure, dtype=torch.bool), is_first], 1) & (logits > -torch.inf)
    by_id = ids.argsort(1)
    falling = logits.masked_fill(~is_entry, -torch.inf).gather(1, by_id).sort(dim=1, descending=True, stable=True)
    order = by_id.gather(1, falling.indices)[:, : out.ids.shape[1]]
    out.counts.copy_(torch.where(is_whole, is_entry.sum(1), -1))
    out.ids.copy_(ids.gather(1, order))
    out.logprobs.copy_((logits.gather(1, order) - peak).double() - own_sum)
    out.importance.copy_(importance.gather(1, order))
