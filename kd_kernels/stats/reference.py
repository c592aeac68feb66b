"""Statistics of rows in torch operations: any device, any dtype. The text to read first.

An implementation takes a chunk of C rows with the id of each, and writes what :class:`RowStats` names. It reads nothing
from the device. A row without a normaliser (NaN, +inf, or -inf throughout) gets NaN and -1; a row whose id does not
exist gets NaN for its log-probability and -1 for its rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kd_kernels.products import RawRows


class RowStats(NamedTuple):
    """Where the statistics of C rows go, ``[C]`` each, contiguous: four in the work dtype, two in int64."""

    logprob: Tensor
    lse: Tensor
    entropy: Tensor
    max: Tensor
    argmax: Tensor
    rank: Tensor


COPIES = 6
"""Temporaries of the size of a chunk that are held at once."""

NATIVE = False
"""Whether logits are read in any dtype (else: in the work dtype alone)."""


def scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a row, and that any number of rows, takes beside the logits."""
    return COPIES * columns * dtype.itemsize, 0


def stat_rows(rows: RawRows, ids: Tensor, out: RowStats) -> None:
    """Statistics of a chunk; ``ids`` is int64 ``[C]``."""
    z = rows.logits()
    logq = torch.log_softmax(z, 1)
    columns = torch.arange(z.shape[1], device=z.device)
    exists = (ids >= 0) & (ids < z.shape[1])
    at = ids.clamp(0, z.shape[1] - 1)[:, None]
    z_id = z.gather(1, at)
    comes_before = (z > z_id) | ((z == z_id) & (columns < at))
    is_whole = ~logq.isnan().any(1)  # log_softmax turns NaN, +inf and a row of -inf into NaN
    both = is_whole & exists
    p_log_p = torch.where(logq > -torch.inf, logq.exp() * logq, 0.0)
    out.logprob.copy_(torch.where(both, logq.gather(1, at)[:, 0], torch.nan))
    out.lse.copy_(torch.where(is_whole, torch.logsumexp(z, 1), torch.nan))
    out.entropy.copy_(torch.where(is_whole, -p_log_p.sum(1), torch.nan))
    out.max.copy_(torch.where(is_whole, z.amax(1), torch.nan))
    out.argmax.copy_(torch.where(is_whole, z.argmax(1), -1))
    out.rank.copy_(torch.where(both, comes_before.sum(1), -1))
