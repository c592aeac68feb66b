"""Draws in torch operations: any device, any dtype. The text to read first, beside ``DRAWS.md``, which it follows.

An implementation takes a chunk of C rows of logits with a :class:`Request` and writes what :class:`RowSamples` names. It
reads nothing from the device. A row that is no distribution (NaN, +inf, or -inf throughout; or an inverse temperature of
NaN, which stands for an argument out of range) gets the id -1 and NaN.
"""

from __future__ import annotations

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
    given: Tensor | None  # int64: score these ids, draw nothing
    race: int  # the purpose of the words of the race between groups; that of the pick is one more


class RowSamples(NamedTuple):
    """Where the results of C rows go, ``[C]`` each, contiguous; all but the ids in the work dtype."""

    ids: Tensor
    logprobs: Tensor
    model_logprobs: Tensor
    entropy: Tensor | None
    lse: Tensor | None


COPIES = 14
"""Temporaries of 8 bytes a logit that are held at once: the sort, its indices, masses, the words of the groups."""

NATIVE = False
"""Whether logits are read in any dtype (else: in the work dtype alone)."""


def scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a row, and that any number of rows, takes beside the logits."""
    return COPIES * 8 * columns, 0


def kept(z: Tensor, inverse: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> Tensor:
    """bool ``[C, V]``: the ids that the filters leave, of logits ``[C, V]``. Masses in fp64, relative to the largest."""
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
    """Of logits ``[C, G, 128]``: the maximum m of each group, and the sum of exp((z - m) / T) in the contract's order."""
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
