"""Top-k targets in plain torch: whole rows, a stable sort, float64 throughout. Any device."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels import products
from kd_kernels.logits import Logits, leading_shape, vocab
from kd_kernels.targets.truncated import INFINITE, NOT_A_NUMBER, Truncated

FLOAT64_COPIES = 8
"""Matrices of 8-byte numbers that a chunk holds at a time: logits, sorted, indices, the temporaries of the sums."""


def _truncate(
    logits: Tensor, k: int, mass: float | None, temperatures: tuple[float, ...], dtype: torch.dtype,
) -> Truncated:
    # A stable sort keeps equal logits in the order of their ids.
    ordered, ids = logits.double().sort(dim=1, descending=True, stable=True)
    logprobs = ordered - ordered.logsumexp(1, keepdim=True)
    counts = (ordered[:, :k] > -torch.inf).sum(1)
    if mass is not None:
        probs = logprobs[:, :k].exp()
        counts = torch.minimum(counts, (probs.cumsum(1) - probs < mass).sum(1))
    kept = torch.arange(logits.shape[1], device=logits.device) < counts[:, None]
    tail = logprobs.masked_fill(kept, -torch.inf).logsumexp(1)
    log_z = [(logprobs / temperature).logsumexp(1) for temperature in temperatures]
    counts[ordered[:, 0] == torch.inf] = INFINITE
    counts[ordered.isnan().any(1)] = NOT_A_NUMBER
    # Copies: a view would keep whole rows alive for as long as the result.
    return Truncated(
        counts, ids[:, :k].clone(), logprobs[:, :k].to(dtype, copy=True), tail.to(dtype),
        torch.stack(log_z, 1).to(dtype) if log_z else tail.new_empty(len(tail), 0, dtype=dtype),
    )


def topk(
    logits: Logits, dtype: torch.dtype, k: int, mass: float | None, temperatures: tuple[float, ...],
    max_scratch_bytes: int | None,
) -> Truncated:
    """See :class:`Truncated`."""
    (rows,), columns = leading_shape(logits), vocab(logits)
    source = products.source(logits, None, dtype)
    bytes_per_row = source.bytes_per_row + FLOAT64_COPIES * 8 * columns
    step = products.rows_per_chunk(
        "topk_targets", rows, bytes_per_row, source.fixed_bytes, max_scratch_bytes, logits.device
    )
    source.open(step)
    parts = [
        _truncate(source.chunk(begin, min(begin + step, rows)).logits(), k, mass, temperatures, dtype)
        for begin in range(0, max(rows, 1), step)
    ]
    return Truncated(*(torch.cat(field) for field in zip(*parts)))
