"""FIRST: heads of rows, their recalibration against formulas, and the choice of the temperature."""

from __future__ import annotations

import math

import pytest
import torch

from kd_kernels import SparseTargets, divergences, topk_targets
from kd_trainer.data import Document
from kd_trainer.methods.base import DivergenceObjective
from kd_trainer.methods.first import TEMPERATURES, best_temperature, heads, smoothed, tempered
from objective_judge import check, toy


def rows(counts: list[int], vocab: int = 40, seed: int = 0) -> SparseTargets:
    """Rows of these numbers of entries, falling."""
    logits = 3 * torch.randn(len(counts), vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = topk_targets(logits, max(counts))
    keep = torch.cat([torch.arange(max(counts)) < count for count in counts])
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    return SparseTargets(offsets, whole.ids[keep], whole.logprobs[keep], whole.tail_logprob)


def dense(targets: SparseTargets) -> list[torch.Tensor]:
    return [targets.logprobs[a:b].exp() for a, b in zip(targets.offsets[:-1], targets.offsets[1:])]


def test_heads_are_the_first_entries_renormalised():
    targets = rows([8, 3, 1, 5])
    head = heads(targets, 5)
    assert head.offsets.diff().tolist() == [5, 3, 1, 5] and head.tail_logprob is None
    for whole, kept in zip(dense(targets), dense(head)):
        torch.testing.assert_close(kept, whole[:5] / whole[:5].sum())


def test_recalibration_by_temperature_and_by_smoothing():
    head = heads(rows([8, 5, 1, 5]), 5)
    for before, after in zip(dense(head), dense(tempered(head, 1.7))):
        torch.testing.assert_close(after, before ** (1 / 1.7) / (before ** (1 / 1.7)).sum())
    for before, after in zip(dense(head), dense(smoothed(head, 0.1))):
        assert float(after.sum()) == pytest.approx(1.0)
        if len(before) > 1:
            moved = min(0.1, float(before[0]))
            torch.testing.assert_close(after[1:], before[1:] + moved / (len(before) - 1))


def test_the_loss_is_renormalised_over_the_head():
    case = toy()
    p = case.teacher_logprobs().detach()
    targets = tempered(heads(topk_targets(p, 8), 5), 2.0)

    def oracle(case):
        total = 0.0
        for row in case.batch.counted.tolist():
            ids = p[row].topk(5).indices
            target = (p[row, ids] / 2).softmax(0)
            q = case.logprobs()[row, ids]
            total = total + (target * (target.log() - (q - q.logsumexp(0)))).sum()
        return total

    check(DivergenceObjective(divergences.parse("forward_kl"), tail="renormalize"), case, oracle, targets)


class Rows:
    """Stands for a cache of one document a row of logits: labels are drawn from softmax(logits / truth)."""

    def __init__(self, truth: float) -> None:
        generator = torch.Generator().manual_seed(5)
        logits = 4 * torch.randn(6000, 5, generator=generator, dtype=torch.float64)
        labels = torch.multinomial((logits / truth).softmax(-1), 1, generator=generator)[:, 0]
        self.document = Document(torch.cat([labels[:1], labels]))
        self.targets = topk_targets(logits, 5)

    def check(self, documents):
        assert documents == [self.document]

    def document_targets(self, document):
        return self.targets


@pytest.mark.parametrize("truth", [0.7, 1.0, 2.0])
def test_the_temperature_that_calibrates_is_found(truth):
    cache = Rows(truth)
    found = best_temperature(cache, [cache.document], 5)
    assert abs(math.log(found / truth)) < 0.16, found
    assert found in TEMPERATURES
