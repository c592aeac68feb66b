"""Draws have the distribution that they claim: G-tests with a power check, the far tail, forbidden ids,
independence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd_kernels import sample
from kd_kernels.sampling import philox

DRAWS = 40_000


def g_test(counts: Tensor, p: Tensor) -> float:
    """p-value that counts ``[V]`` were drawn from ``p [V]``: cells of fewer than 8 expected are pooled into one."""
    expected = p.double() * counts.sum()
    small = expected < 8
    pooled = [torch.cat([x[~small], x[small].sum()[None]]) for x in (counts.double(), expected)]
    observed, expected = (x[pooled[1] > 0] for x in pooled)
    g = 2 * torch.where(observed > 0, observed * (observed / expected).log(), 0.0).sum()
    return float(torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2.0, dtype=torch.float64), g / 2))


def drawn(logits: Tensor, count: int = DRAWS, seed: int = 5, **options) -> Tensor:
    """Ids of ``count`` positions of one row."""
    rows = logits.expand(count, -1)
    return sample(
        rows, seed=seed, keys=torch.zeros(count, dtype=torch.int64), positions=torch.arange(count), **options
    ).ids


def row(vocab: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocab", [130, 700])
@pytest.mark.parametrize(("options", "change"), [
    ({}, lambda z: z), ({"temperature": 0.5}, lambda z: z / 0.5), ({"temperature": 3.0}, lambda z: z / 3),
    ({"top_k": 20}, lambda z: z.masked_fill(z < z.topk(min(20, len(z))).values[-1], -math.inf)),
])
def test_frequencies_and_the_power_of_the_test(vocab: int, options: dict, change) -> None:
    logits = row(vocab)
    p = change(logits).double().softmax(0)
    counts = drawn(logits, **options).bincount(minlength=vocab)
    assert g_test(counts, p) > 1e-3
    assert not bool(counts[p == 0].any())
    if "top_k" in options or options.get("temperature") == 0.5:
        return  # too few ids have nearly all of the mass for two even halves
    # A sampler that drew half of the mass five percent too often would be found out: the likelier half, in two cells.
    half = p > p.sort().values[(p.sort().values.cumsum(0) < 0.5).sum() - 1]
    two = lambda x: torch.stack([x[half].sum(), x[~half].sum()])  # noqa: E731
    biased = two(p * torch.where(half, 1.05, 1.0))
    assert g_test(two(counts), two(p)) > 1e-3 > g_test(two(counts), biased / biased.sum())


def test_nucleus() -> None:
    logits = row(700)
    p = logits.double().softmax(0)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.8).sum()) + 1]
    left = torch.zeros_like(p).index_copy(0, kept, p[kept])
    counts = drawn(logits, top_p=0.8).bincount(minlength=700)
    assert g_test(counts, left / left.sum()) > 1e-3 and not bool(counts[left == 0].any())


def test_the_far_tail_is_drawn_as_often_as_it_should_be() -> None:
    """One id far above 65,535 others: together they have 3.3e-4 of the mass, each 5e-9. Uniforms of 24 bits, one an id,
    draw a thirtieth of that."""
    vocab, gap, draws = 65_536, 19.1, 60_000
    logits = torch.zeros(vocab)
    logits[7_777] = gap
    tail = (vocab - 1) / (vocab - 1 + math.exp(gap))
    hits = 0
    for begin in range(0, draws, 2_000):
        positions = torch.arange(begin, begin + 2_000)
        ids = sample(logits.expand(2_000, -1), seed=3, keys=torch.zeros_like(positions), positions=positions).ids
        hits += int((ids != 7_777).sum())
    expected = draws * tail
    assert abs(hits - expected) < 4 * math.sqrt(expected), (hits, expected)


FINE = [(105_715, 768), (182_433, 460), (214_911, 1571)]
"""Positions of seed 3 and key 0 where the word of a group, of the 2,048 that 262,144 ids have, is below 30."""


def test_the_tail_race_needs_more_than_24_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of the tail wins with a word that has no bit among its upper 24. A uniform of those bits alone, though it
    is never 0, gives the race to the one likely id."""
    positions, groups = torch.tensor(FINE).T
    logits = torch.zeros(len(FINE), 262_144)
    logits[:, 77_777] = 23.0
    race = lambda backend: sample(  # noqa: E731
        logits, seed=3, keys=torch.zeros_like(positions), positions=positions, backend=backend
    ).ids
    for backend in ("reference", "cpp"):
        assert torch.equal(race(backend) // 128, groups)
    monkeypatch.setattr(philox, "uniform", lambda word: ((word >> 8).double() + 0.5) * 2.0**-24)
    assert race("reference").tolist() == [77_777] * len(FINE)


def test_forbidden_ids_never_come_and_certain_ones_always_do() -> None:
    logits = row(300)
    logits[::2] = -math.inf
    assert bool((drawn(logits) % 2 == 1).all())
    alone = torch.full((300,), -math.inf)
    alone[123] = -5.0
    found = sample(alone[None], seed=1)
    assert found.ids.tolist() == [123] and found.logprobs.tolist() == [0.0]


@pytest.mark.parametrize("vary", ["seed", "keys", "positions"])
def test_draws_of_neighbours_are_independent(vary: str) -> None:
    """Pairs of draws whose seed, key or position differ by one hit the same id as often as chance has it."""
    count, logits = 20_000, row(40, scale=1.0)
    numbers, zero = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    names = {"seed": zero, "keys": zero, "positions": zero} | {vary: numbers}
    ids = sample(logits.expand(count, -1), **names).ids
    chance = float(logits.double().softmax(0).square().sum())
    for lag in (1, 4, 128):
        rate = float((ids[lag:] == ids[:-lag]).double().mean())
        assert abs(rate - chance) < 4 * math.sqrt(chance * (1 - chance) / count), (lag, rate, chance)
