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
    """What came back is what went in: values to half a step, all else exactly."""
    expected = item.targets
    assert torch.equal(found.targets.offsets, expected.offsets)
    assert torch.equal(found.targets.ids, expected.ids)
    error = (found.targets.logprobs.double() - expected.logprobs.double()).abs()
    bound = cache.step_nats / 2 + 1e-6 * expected.logprobs.double().abs() * (cache.step_nats > 0)
    assert bool((error <= bound).all()), f"worst {error.max()} nats"
    cached = expected.offsets.diff() > 0
    assert torch.equal(found.positions, cached)
    assert torch.equal(found.next_logprobs[cached], item.next_logprobs[cached])
    assert bool(found.next_logprobs[~cached].isnan().all())
    if cache.tail:
        assert torch.equal(found.targets.tail_logprob[cached], expected.tail_logprob[cached])
        assert bool((found.targets.tail_logprob[~cached] == 0).all())
    else:
        assert found.targets.tail_logprob is None
    if cache.importance:
        assert torch.equal(found.targets.importance, expected.importance)
    else:
        assert found.targets.importance is None
    assert found.targets.temperatures == cache.temperatures
    assert torch.equal(found.targets.log_z[cached], expected.log_z[cached])


def assert_holds(folder: Path, cache: CacheManifest, examples: list[Example]) -> None:
    """The folder is sound, holds these sequences, and no others."""
    reader = CacheReader(folder)
    reader.verify()
    assert len(reader) == len(examples)
    for item in examples:
        assert_rows(reader.lookup(item.tokens), item, cache)
