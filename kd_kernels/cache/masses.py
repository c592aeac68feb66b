"""Rows whose entries and tail have mass one, after rounding has moved it."""

from __future__ import annotations

import dataclasses

import torch

from kd_kernels.logits import SparseTargets

__all__ = ["with_mass_one"]


def with_mass_one(targets: SparseTargets) -> SparseTargets:
    """``logprob_j + log((1 - tail) / sum_j exp(logprob_j))``: the entries scaled to the mass that the tail leaves them.

    Rounding log-probabilities to a step moves the kept mass of a row by a factor of up to ``exp(step / 2)`` (3 percent
    at 1/16 nats, 0.3 percent in the mean over real rows). A divergence is 0 at q = p only for masses that add up to
    one; without this the least loss is the KL of a distribution that nobody can have, and may be negative. The tail is
    not touched: it is stored more finely than the entries.

    Args:
        targets: on the CPU.

    Returns:
        The same rows, with a mass of one to the rounding of fp32; rows without entries as they were, and all rows where
        the tail is not known or entries have weights. Sums are in fp64.
    """
    if targets.tail_logprob is None or targets.importance is not None:
        return targets
    row = targets.row_of_entry()
    kept = torch.zeros(targets.offsets.shape[0] - 1, dtype=torch.float64)
    kept.index_add_(0, row, targets.logprobs.double().exp())
    left = -torch.expm1(targets.tail_logprob.double())
    shift = torch.where((kept > 0) & (left > 0), left.log() - kept.log(), 0.0)
    logprobs = (targets.logprobs + shift[row]).clamp(max=0.0).to(targets.logprobs.dtype)
    return dataclasses.replace(targets, logprobs=logprobs)
