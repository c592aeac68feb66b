"""Methods without a teacher: what they minimise, against formulas in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from built_method import built
from kd_trainer.config import Config, from_tree
from kd_trainer.data import Document
from kd_trainer.methods.dco import DirectCoverage, coverage
from kd_trainer.methods.idk import IDontKnow
from kd_trainer.methods.mixce import MixCE
from objective_judge import VOCAB, check, toy


def rows(case):
    """Log-probabilities and labels of the rows that count."""
    return case.logprobs()[case.batch.counted], case.batch.labels[case.batch.counted]


@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
def test_mixce(eta):
    def loss(case, stop):
        logq, y = rows(case)
        q = logq.gather(1, y[:, None])[:, 0]
        weight = eta + (1 - eta) * (q.exp().detach() if stop else q.exp())
        return -(weight * q).sum()

    check(MixCE(eta), toy(), lambda case: loss(case, True))
    if eta < 1.0:  # the stop matters
        with pytest.raises(AssertionError):
            check(MixCE(eta), toy(), lambda case: loss(case, True), surrogate=lambda case: loss(case, False))


def test_mixce_is_maximum_likelihood_at_one_and_the_reverse_term_has_the_papers_gradient():
    """By enumeration: the expectation over y ~ q of q(y) grad log q(y) is the gradient of CE(q, q's own squares)."""
    case = toy()
    logq = case.logprobs()[:1]
    by_hand = torch.autograd.grad((logq.exp().detach() ** 2 * logq).sum(), case.hidden)[0]
    summed = torch.zeros_like(case.hidden)
    for y in range(VOCAB):
        one = toy()
        row = one.logprobs()[0, y]
        p = float(row.detach().exp())
        summed += p * torch.autograd.grad(p * row, one.hidden)[0]
    torch.testing.assert_close(summed, by_hand)


@pytest.mark.parametrize("samples", [1, 2, 256])
@pytest.mark.parametrize("normalized", [False, True])
def test_dco(samples, normalized):
    # One document is almost certain, so that its F is small.
    case = toy(sharpness=4.0)

    def per_document(case):
        logq, y = rows(case)
        lengths = [int(d.counted.sum()) for d in case.batch.documents]
        return lengths, [part.sum() for part in logq.gather(1, y[:, None])[:, 0].split(lengths)]

    def value(case):
        return sum(
            -torch.log(1 - (1 - s.exp()) ** samples) if s > -25 else -s - math.log(samples)
            for s in per_document(case)[1]
        )

    def surrogate(case):
        total = 0.0
        for length, s in zip(*per_document(case)):
            pi = s.detach().exp()
            factor = samples * pi * (1 - pi) ** (samples - 1) / (1 - (1 - pi) ** samples) if s > -25 else 1.0
            total = total - factor / (length if normalized else 1) * s
        return total

    check(DirectCoverage(samples, normalized), case, value, normalizer=3.0, surrogate=surrogate)


def test_dco_is_the_likelihood_for_one_sample_and_at_both_ends():
    log_pi = torch.tensor([-1e4, -300.0, -30.0, -5.0, -0.5, -1e-3, 0.0], dtype=torch.float64)
    value, factor = coverage(log_pi, 1)
    torch.testing.assert_close(value, -log_pi, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(factor, torch.ones_like(factor), rtol=1e-9, atol=1e-12)
    value, factor = coverage(log_pi, 256)
    assert bool(value.isfinite().all() and factor.isfinite().all()) and bool((factor.diff() <= 1e-12).all())
    assert float(factor[0]) == 1.0 and float(factor[-1]) < 1e-6 and abs(float(value[-1])) < 1e-6
    # F is the derivative of L: central differences, away from the switch to the series
    x = torch.linspace(-28, -0.05, 200, dtype=torch.float64)
    slope = (coverage(x + 1e-6, 256)[0] - coverage(x - 1e-6, 256)[0]) / 2e-6
    torch.testing.assert_close(-slope, coverage(x, 256)[1], rtol=1e-5, atol=1e-7)


def test_dco_counts_completions():
    objective = DirectCoverage(4, True)
    assert objective.count(Document(torch.arange(5))) == 1
    assert objective.count(Document(torch.arange(5), labels=torch.full((4,), -100))) == 0


@pytest.mark.parametrize(("ceiling", "power"), [(0.5, 1.0), (1.0, 2.0)], ids=["paper", "mistral"])
def test_idk(ceiling, power):
    token, case = 4, toy()

    def loss(case):
        total = torch.zeros((), dtype=torch.float64)
        for row, label in zip(*rows(case)):
            q = row.exp()
            if int(q.argmax()) == int(label):
                total = total - row[label] - torch.log(1 - q[token])
            else:
                w = (ceiling * (1 - (q[label] / q.max()) ** power)).detach()
                total = total - (1 - w) * row[label] - w * row[token]
        return total

    check(IDontKnow(token, ceiling, power), case, loss)
    assert {int(logq.argmax()) == int(y) for logq, y in zip(*rows(case))} == {True, False}  # either branch was taken


def test_a_token_that_is_not_there(make_config):
    message = r"options.token must be a token of the vocabulary, got '\[IDK\]'; name one that texts never use, or add"
    with pytest.raises(ValueError, match=message):
        built(make_config(method="idk"), SimpleNamespace(vocab=257), [Document(torch.arange(5))])


@pytest.mark.parametrize(("method", "options", "message"), [
    ("mixce", {"eta": 1.5}, r"options.eta must be in \[0, 1\], got 1.5"),
    ("dco", {"samples": 0}, "options.samples must be at least 1, got 0"),
    ("idk", {"ceiling": 0.0}, r"options.ceiling must be in \(0, 1\], got 0.0"),
    ("idk", {"power": 0.0}, "options.power must be above 0, got 0.0"),
])
def test_settings_out_of_range(method, options, message):
    tree = {"out": "o", "method": method, "student": {"model": "m"}, "data": {"source": "d"}, "options": options}
    with pytest.raises(ValueError, match=message):
        from_tree(Config, tree)
