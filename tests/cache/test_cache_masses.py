"""Rows to train from have a mass of one, however their log-probabilities were rounded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cache_builders import Example, cut, example, manifest, write
from kd_kernels import kd_loss
from kd_kernels.cache import CacheReader
from kd_kernels.cache.masses import with_mass_one
from kd_kernels.logits import SparseTargets

STEPS = [1 / 32, 1 / 16, 1 / 8, 1 / 2]


def masses(targets: SparseTargets) -> Tensor:
    mass = targets.tail_logprob.double().exp()
    return mass.index_add(0, targets.row_of_entry(), targets.logprobs.double().exp())


def cached(tmp_path, item: Example, cache) -> CacheReader:
    write(tmp_path, cache, [item])
    return CacheReader(tmp_path)


@pytest.mark.parametrize("step", STEPS)
def test_rounded_rows_have_mass_one_again(tmp_path, step):
    cache = manifest(step_nats=step)
    item = example(300, 0, cache, torch.arange(299) % 9)
    reader = cached(tmp_path, item, cache)
    stored, given = reader.lookup(item.tokens).targets, reader.targets(item.tokens)
    off = (masses(stored) - 1).abs()
    assert off.max() > step / 40, "else there was nothing to mend"
    assert (masses(given) - 1).abs().max() < 1e-6
    assert (given.logprobs - item.targets.logprobs).abs().max() <= step + 1e-6
    assert torch.equal(given.ids, stored.ids) and torch.equal(given.tail_logprob, stored.tail_logprob)
    shift = given.logprobs - stored.logprobs
    assert shift.abs().max() <= step / 2 + 1e-6
    for row in range(299):
        entries = slice(int(given.offsets[row]), int(given.offsets[row + 1]))
        assert shift[entries].numel() == 0 or (
            shift[entries] - shift[entries][0]
        ).abs().max() < 1e-5, "one factor a row"


def test_a_student_that_is_the_rounded_teacher_has_no_loss(tmp_path):
    """With the masses as they are stored, the least forward KL is not 0: it can be below, and the loss refuses that."""
    cache = manifest(vocab=50, k=50, step_nats=1 / 2)
    item = example(200, 1, cache)
    reader = cached(tmp_path, item, cache)
    targets = reader.targets(item.tokens)
    student = torch.empty(199, 50).scatter_(1, targets.ids.view(199, 50), targets.logprobs.view(199, 50))
    assert kd_loss(student, targets, "forward_kl", reduction="none").loss.abs().max() < 1e-5
    with pytest.raises(ValueError, match="those of masses up to 1"):
        kd_loss(student, reader.lookup(item.tokens).targets, "forward_kl")


@pytest.mark.parametrize("fields", [{"step_nats": 0.0}, {"tail": False}, {"importance": True}])
def test_what_was_not_rounded_or_says_nothing_of_its_mass_stays_as_it_is(tmp_path, fields):
    cache = manifest(**fields)
    item = example(20, 2, cache)
    reader = cached(tmp_path, item, cache)
    assert torch.equal(reader.targets(item.tokens).logprobs, reader.lookup(item.tokens).targets.logprobs)


def test_a_batch_is_what_its_sequences_are(tmp_path):
    cache = manifest()
    item = example(9, 3, cache)
    reader = cached(tmp_path, item, cache)
    one, twice = reader.targets(item.tokens), reader.batch([item.tokens, item.tokens])
    assert torch.equal(twice.logprobs, torch.cat([one.logprobs, one.logprobs]))


def test_extreme_rows():
    """All mass on one id, none left in the tail; nearly all mass in the tail; not cached; more than one after
    rounding."""
    log = math.log
    targets = SparseTargets(
        torch.tensor([0, 1, 2, 2, 4]), torch.tensor([3, 3, 1, 2]),
        torch.tensor([-0.01, log(1e-6), log(0.52), log(0.51)]),
        torch.tensor([-math.inf, log(1 - 1e-6), 0.0, log(1e-3)]),
    )
    found = with_mass_one(targets)
    assert found.logprobs[0] == 0.0
    assert (masses(found) - 1).abs().max() < 1e-6
    assert (found.logprobs[2:].exp() - torch.tensor([0.52, 0.51]) * (0.999 / 1.03)).abs().max() < 1e-7


def test_cut_rows_keep_what_the_tail_says(tmp_path):
    """The tail is stored to a quarter of the entries' step in log-odds, so it is the entries that move."""
    cache = manifest(vocab=100, k=3, step_nats=1 / 4)
    logprobs = (4 * torch.randn(64, 100, generator=torch.Generator().manual_seed(0))).log_softmax(1)
    item = Example(torch.arange(65), cut(logprobs, cache), torch.full((64,), math.nan))
    reader = cached(tmp_path, item, cache)
    kept = 1 - reader.targets(item.tokens).tail_logprob.double().exp()
    exact = 1 - item.targets.tail_logprob.double().exp()
    assert ((kept - exact).abs() <= 1.05 * exact * (1 - exact) * cache.step_nats / 8 + 1e-6).all()
