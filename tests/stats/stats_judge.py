"""Compares token_stats with the oracle: places exactly, numbers as well as plain torch, gradients of every leaf."""

from __future__ import annotations

import torch
from torch import Tensor

import judge
import oracles
from kd_kernels import TokenStats, token_stats
from kd_kernels.testing import assert_as_good

NUMBERS, PLACES = ("logprob", "lse", "entropy", "max"), ("argmax", "rank")


def assert_stats(stats: TokenStats, truth: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """``truth`` and ``plain`` are the oracle's, in float64 and in the work dtype, ``[N]`` each."""
    for name in PLACES:
        assert getattr(stats, name).dtype == torch.int64
        assert torch.equal(getattr(stats, name).flatten().cpu(), truth[name]), name
    for name in NUMBERS:
        actual = getattr(stats, name).detach().cpu()
        assert actual.dtype == plain[name].dtype
        # A log-probability is a difference of logits, so an offset that all have is no excuse: the unit is a nat.
        assert_as_good(actual.reshape(-1, 1), plain[name][:, None], truth[name][:, None], unit=1.0, what=name)


def of_logits(logits: Tensor, ids: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return oracles.token_stats(logits.flatten(0, -2).to(dtype), ids.flatten().long())


def assert_stats_of(stats: TokenStats, logits: Tensor, ids: Tensor) -> None:
    """Of logits that exist, ``[..., V]``."""
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert stats.logprob.shape == ids.shape
    assert_stats(stats, of_logits(logits, ids, torch.float64), of_logits(logits, ids, work))


def compare(
    model: judge.Student | judge.Ensemble, ids: Tensor, *, upstream: Tensor | None = None, backend: str | None = None,
    requires: tuple[str, ...] | None = None, device: str = "cpu", **options,
) -> TokenStats:
    """The library against the oracle, in all statistics and, with ``upstream`` (the rows' shape), in the gradients of
    ``sum upstream logprob`` with respect to the leaves in ``requires`` (None: all)."""
    wanted = () if upstream is None else tuple(model.leaves) if requires is None else requires
    copied = {name: leaf.detach().to(device, copy=True) for name, leaf in model.leaves.items()}
    leaves = {name: leaf.requires_grad_(name in wanted) for name, leaf in copied.items()}
    stats = token_stats(model.noun(leaves), ids.to(device), backend=backend, **options)
    assert all(getattr(stats, name).device == leaves[next(iter(leaves))].device for name in (*NUMBERS, *PLACES))
    work = torch.float64 if any(leaf.dtype == torch.float64 for leaf in leaves.values()) else torch.float32
    truths = []
    for dtype, logits_of in ((torch.float64, type(model).oracle), (work, judge.plain_logits)):
        cast = {name: leaf.to(dtype).requires_grad_(name in wanted) for name, leaf in model.leaves.items()}
        truths.append((cast, oracles.token_stats(logits_of(model, cast), ids.flatten().long())))
    (true_leaves, truth), (plain_leaves, plain) = truths
    assert_stats(stats, {k: v.detach() for k, v in truth.items()}, {k: v.detach() for k, v in plain.items()})
    assert stats.logprob.requires_grad == bool(wanted)
    assert not any(getattr(stats, name).requires_grad for name in (*NUMBERS[1:], *PLACES))
    if wanted:
        stats.logprob.backward(upstream.to(stats.logprob))
        exact, near = (
            oracles.gradients(values["logprob"], [own[name] for name in wanted], upstream.flatten())
            for own, values in ((true_leaves, truth), (plain_leaves, plain))
        )
        sizes = judge.units(model, model, "forward_kl", upstream.double().abs().flatten(), 1.0)
        rowwise = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
        for name, true, yardstick in zip(wanted, exact, near):
            got = leaves[name].grad.cpu()
            assert got.dtype == leaves[name].dtype and got.shape == leaves[name].shape
            near = yardstick.to(got.dtype)
            what = f"d logprob / d {name}"
            assert_as_good(rowwise(got), rowwise(near), rowwise(true), unit=sizes[name], what=what)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted), f"gradient of {name}"
        assert torch.equal(leaf.detach().cpu(), model.leaves[name]), f"{name} was written to"
    return stats
