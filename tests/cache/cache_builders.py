"""Small caches and realistic rows for the tests of the cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kd_kernels.cache import CachedRows, CacheManifest, CacheReader, CacheWriter
from kd_kernels.logits import SparseTargets


def manifest(**fields: object) -> CacheManifest:
    """A manifest for V = 1000, k = 8, changed as told."""
    return CacheManifest(**{"teacher": "7ea0c4e5", "tokenizer": "70ce4125", "vocab": 1000, "k": 8} | fields)


@dataclass(eq=False)
class Example:
    """A sequence and its teacher, as a caller has them."""

    tokens: Tensor
    targets: SparseTargets
    next_logprobs: Tensor


def example(length: int, seed: int, cache: CacheManifest, counts: Tensor | None = None) -> Example:
    """Random tokens with a teacher between certain and flat; rows are cut to ``counts`` entries (None: k)."""
    random = torch.Generator().manual_seed(seed)
    rows, vocab = length - 1, cache.vocab
    tokens = torch.randint(vocab, (length,), generator=random)
    sharpness = torch.rand(rows, 1, generator=random) * 6 + 1
    logprobs = (sharpness * torch.randn(rows, vocab, generator=random)).log_softmax(1)
    return Example(tokens, cut(logprobs, cache, counts), logprobs.gather(1, tokens[1:, None])[:, 0])


def cut(logprobs: Tensor, cache: CacheManifest, counts: Tensor | None = None) -> SparseTargets:
    """The first ``counts`` (None: k) entries of each row of ``logprobs [N, V]``, with exact tail and log Z."""
    rows = logprobs.shape[0]
    counts = torch.full((rows,), cache.k) if counts is None else counts
    values, ids = logprobs.sort(dim=1, descending=True, stable=True)
    kept = torch.arange(logprobs.shape[1]) < counts[:, None]
    tail = values.double().masked_fill(kept, -math.inf).logsumexp(1).float()
    return SparseTargets(
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)), ids[kept], values[kept],
        tail if cache.tail else None,
        torch.rand(int(counts.sum())) if cache.importance else None,
        cache.temperatures,
        torch.stack([(logprobs / t).logsumexp(1) * (t != 1.0) for t in cache.temperatures], 1),
    )


def write(folder: Path, cache: CacheManifest, examples: list[Example], **options: object) -> None:
    with CacheWriter(folder, cache, **options) as writer:
        for item in examples:
            assert writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)


def assert_rows(found: CachedRows, item: Example, cache: CacheManifest) -> None:
    """What came back is what went in: values to the precision of the format, all else exactly."""
    expected, step = item.targets, cache.step_nats
    assert torch.equal(found.targets.offsets, expected.offsets)
    row = expected.row_of_entry()
    order, found_order = in_id_order(expected), in_id_order(found.targets)
    assert torch.equal(found.targets.ids[found_order], expected.ids[order])
    exact, logprobs = expected.logprobs.double()[order], found.targets.logprobs.double()[found_order]
    assert_within(logprobs, exact, step / 2)
    first = expected.offsets[:-1][expected.offsets.diff() > 0]
    assert torch.equal(found.targets.ids[first], expected.ids[first]), "the teacher's first choice"
    rising = found.targets.logprobs[1:] - found.targets.logprobs[:-1]
    ordered = (rising < 0) | ((rising == 0) & (found.targets.ids[1:] > found.targets.ids[:-1])) | (row[1:] != row[:-1])
    ordered[first[first < len(ordered)]] |= rising[first[first < len(ordered)]] == 0
    assert bool(ordered.all()), "falling, and of equal ones the lower id first"
    cached = expected.offsets.diff() > 0
    assert torch.equal(found.positions, cached)
    assert_within(found.next_logprobs[cached], item.next_logprobs[cached], step / 2)
    assert bool(found.next_logprobs[~cached].isnan().all())
    if cache.tail:
        assert_within(log_odds(found.targets.tail_logprob[cached]), log_odds(expected.tail_logprob[cached]), step / 8)
        assert bool((found.targets.tail_logprob[~cached] == 0).all())
    else:
        assert found.targets.tail_logprob is None
    if cache.importance:
        assert torch.equal(found.targets.importance[found_order], expected.importance[order])
    else:
        assert found.targets.importance is None
    assert found.targets.temperatures == cache.temperatures
    assert_within(found.targets.log_z[cached], expected.log_z[cached], step / 32)


def in_id_order(targets: SparseTargets) -> Tensor:
    """Places of the entries, row by row, by rising id."""
    return (targets.row_of_entry() * (1 << 24) + targets.ids).argsort()


def log_odds(log_mass: Tensor) -> Tensor:
    return log_mass.double() - (-torch.expm1(log_mass.double())).log()


def assert_within(found: Tensor, expected: Tensor, bound: float) -> None:
    """Equal where they are not finite, and elsewhere to the bound; exactly where it is 0."""
    found, expected = found.double(), expected.double()
    finite = expected.isfinite()
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isfinite(), finite)
    error = (found - expected)[finite].abs()
    assert bool((error <= bound + 1e-6 * expected[finite].abs() * (bound > 0)).all()), f"worst {error.max()} nats"


def assert_holds(folder: Path, cache: CacheManifest, examples: list[Example]) -> None:
    """The folder is sound, holds these sequences, and no others."""
    reader = CacheReader(folder)
    reader.verify()
    assert len(reader) == len(examples)
    for item in examples:
        assert_rows(reader.lookup(item.tokens), item, cache)
