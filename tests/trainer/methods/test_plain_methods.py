"""The methods whose tokens are the data's own, as a run builds them: every setting reaches the formula."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from built_method import assert_same_gradients, built, logprobs, noisy, step_loss
from kd_kernels.cache import CacheReader
from kd_trainer.caching.build import build_cache
from kd_trainer.caching.options import CacheOptions
from kd_trainer.data import Document, collate
from kd_trainer.methods import build as built_of
from kd_trainer.trainer import load_parts

DOCUMENTS = [
    Document(torch.randint(200, (length,), generator=torch.Generator().manual_seed(length)), first)
    for length, first in ((9, 4), (6, 1), (7, 3))
]


@pytest.fixture(scope="module")
def models(tiny):
    return noisy(tiny, 1), noisy(tiny, 2)


def terms(models, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``log p``, ``log q`` at the temperature, and the sum of cross-entropies, at the rows that count."""
    p, q, ce = [], [], torch.zeros((), dtype=torch.float64)
    for document in DOCUMENTS:
        labels = document.tokens[1:][document.counted]
        of_p, of_q = (logprobs(model, document.tokens)[document.counted] for model in models)
        p.append((of_p / temperature).log_softmax(-1))
        q.append((of_q / temperature).log_softmax(-1))
        ce = ce - of_q.gather(1, labels[:, None]).sum()
    return torch.cat(p).detach(), torch.cat(q), ce


@pytest.mark.parametrize(("method", "settings", "weights"), [
    ("sft", {}, (0.0, 1.0, 1.0)),
    ("mix_distillation", {}, (0.0, 1.0, 1.0)),
    ("kd", {}, (1.0, 0.0, 1.0)),
    (
        "kd", {"objective": {"kd_weight": 0.2, "ce_weight": 0.4, "temperature": 2.0, "squared_temperature": True}},
        (0.8, 0.4, 2.0),
    ),
    ("churn", {}, (0.5, 0.5, 1.0)),
    ("churn", {"options": {"old_weight": 0.8}}, (0.8, 0.2, 1.0)),
])
def test_the_mean_over_the_rows_that_count(make_config, models, tiny, text, method, settings, weights):
    of_kl, of_ce, temperature = weights
    if of_kl:
        settings = settings | {"teacher": {"model": str(tiny)}}
    if method == "mix_distillation":
        settings = {"options": {"sources": [str(text)], "weights": [0.5, 0.5]}}
    p, q, ce = terms(models, temperature)
    expected = of_ce * ce + of_kl * (p.exp() * (p - q)).sum()
    run = built(make_config(method=method, **settings), models[1], DOCUMENTS, models[:1] if of_kl else ())
    assert_same_gradients(step_loss(run, models[1], DOCUMENTS), expected / len(q), models[1])


@pytest.mark.parametrize(("divergence", "oracle"), [
    ("reverse_kl", lambda p, q: q.exp() * (q - p)),
    ("jsd(beta=0.3)", lambda p, q: 0.3 * p.exp() * (p - mixed(p, q, 0.3)) + 0.7 * q.exp() * (q - mixed(p, q, 0.3))),
    ("skew_forward_kl(alpha=0.1)", lambda p, q: p.exp() * (p - mixed(p, q, 0.1))),
])
def test_kd_with_other_divergences(make_config, models, tiny, divergence, oracle):
    config = make_config(method="kd", teacher={"model": str(tiny)}, objective={"divergence": divergence})
    p, q, _ = terms(models)
    run = built(config, models[1], DOCUMENTS, models[:1])
    assert_same_gradients(step_loss(run, models[1], DOCUMENTS), oracle(p, q).sum() / len(q), models[1])


def labels_of(q: torch.Tensor) -> torch.Tensor:
    """``[M]``: log-probabilities of the labels."""
    return q.gather(1, torch.cat([document.tokens[1:][document.counted] for document in DOCUMENTS])[:, None])[:, 0]


def baby_llama(p, other, q):
    teacher, student = ((p + other) / 2 / 2.0).log_softmax(-1), (q / 2.0).log_softmax(-1)
    return -0.3 * labels_of(q).mean() + 3.0 * 0.7 * 4.0 * (teacher.exp() * (teacher - student)).sum() / len(q)


def baby_llama_of_probabilities(p, other, q):
    teacher = ((p.exp() + other.exp()) / 2).log()
    return -0.5 * labels_of(q).mean() + 0.5 * (teacher.exp() * (teacher - q)).sum() / len(q)


def muscle(p, other, q):
    old = (labels_of(other) < other.max(-1).values)[:, None]  # the new model errs
    teacher = torch.where(old, p, other)
    return (q.exp() * (q - teacher)).sum() / len(q)


def idk(p, other, q):
    label, unsure = labels_of(q), q[:, 0]
    weight = 0.7 * (1.0 - (label - q.max(-1).values).exp() ** 2).detach()
    known = -label - torch.log(1.0 - unsure.exp())
    return torch.where(label == q.max(-1).values, known, -(1.0 - weight) * label - weight * unsure).mean()


def dco(p, other, q):
    total = 0.0
    for log_pi in labels_of(q).split([int(document.counted.sum()) for document in DOCUMENTS]):
        pi = log_pi.sum().detach().exp()
        cover = -torch.expm1(8 * torch.log1p(-pi))
        factor = 8 * pi * (1 - pi) ** 7 / cover / len(log_pi)
        total = total - torch.log(cover) - factor * (log_pi.sum() - log_pi.sum().detach())
    return total / len(DOCUMENTS)


@pytest.mark.parametrize(("method", "teachers", "settings", "oracle"), [
    ("baby_llama", 2, {"options": {"alpha": 0.3, "temperature": 2.0, "kd_scale": 3.0}}, baby_llama),
    ("baby_llama", 2, {"options": {"temperature": 1.0, "space": "prob"}}, baby_llama_of_probabilities),
    ("muscle", 2, {"options": {"judge": "new"}, "objective": {"divergence": "reverse_kl"}}, muscle),
    (
        "sel", 1, {"options": {"labels": "text"}},
        lambda p, other, q: 0.5 * (labels_of(q) - labels_of(p)).square().mean(),
    ),
    (
        "mixce", 0, {"options": {"eta": 0.3}},
        lambda p, other, q: -((0.3 + 0.7 * labels_of(q).detach().exp()) * labels_of(q)).mean(),
    ),
    ("idk", 0, {"options": {"token": "<end>", "ceiling": 0.7, "power": 2.0}}, idk),
    ("dco", 0, {"options": {"samples": 8}}, dco),
])
def test_formulas_of_their_own(make_config, models, tiny, method, teachers, settings, oracle):
    sources = [models[0], noisy(tiny, 3)]
    given = {"teacher": {"model": str(tiny)}} if teachers else {}
    given |= {"more_teachers": [{"model": str(tiny)}]} if teachers > 1 else {}
    run = built(make_config(method=method, **given, **settings), models[1], DOCUMENTS, sources[:teachers])
    found = []
    for model in (*sources, models[1]):
        found.append(torch.cat([logprobs(model, document.tokens)[document.counted] for document in DOCUMENTS]))
    p, other, q = found[0].detach(), found[1].detach(), found[2]
    assert_same_gradients(step_loss(run, models[1], DOCUMENTS), oracle(p, other, q), models[1])


def test_first_learns_from_the_recalibrated_head_of_its_cache(make_config, models, tiny, tmp_path):
    """The cache is what it is; from its entries on, by the formula."""
    config = make_config(
        method="first", cache=str(tmp_path / "cache"), data={"limit": 4}, options={"k": 4, "temperature": 1.7},
        objective={"divergence": "reverse_kl"},
    )
    build_cache(str(tiny), config.data, tmp_path / "cache", CacheOptions(k=6))
    parts = load_parts(config)[0]
    run = built_of(config, dataclasses.replace(parts, student=models[1]))
    reader, total, count = CacheReader(tmp_path / "cache"), 0.0, 0
    for document in parts.documents:
        targets, q = reader.targets(document.tokens), logprobs(models[1], document.tokens)
        for row in document.counted.nonzero()[:, 0].tolist():
            span = slice(int(targets.offsets[row]), int(targets.offsets[row]) + 4)
            p = (targets.logprobs[span].double() / 1.7).log_softmax(0)
            own = q[row, targets.ids[span]].log_softmax(0)
            total, count = total + (own.exp() * (own - p)).sum(), count + 1
    loss = step_loss(run, models[1], parts.documents)
    torch.testing.assert_close(loss, total / count, rtol=1e-6, atol=0.0)  # targets are fp32
    ours, theirs = (torch.autograd.grad(x, models[1].model.lm_head.weight)[0] for x in (loss, total / count))
    assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm()) and float(theirs.norm()) > 1e-3


def mixed(p: torch.Tensor, q: torch.Tensor, share: float) -> torch.Tensor:
    return (share * p.exp() + (1.0 - share) * q.exp()).log()


def test_churn_is_the_share_of_rows_whose_first_token_differs(make_config, tiny):
    models = noisy(tiny, 1), noisy(tiny, 1)
    with torch.no_grad():
        models[1].model.model.norm.weight.add_(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    p, q, _ = terms(models)
    differ = float((p.argmax(-1) != q.argmax(-1)).double().mean())
    assert 0.0 < differ < 1.0
    method = built(make_config(method="churn", teacher={"model": str(tiny)}), models[1], DOCUMENTS, models[:1])
    batch = collate(DOCUMENTS, 64)
    stats = method.objectives["main"](models[1], method.teacher.targets(batch), batch, 1.0).stats
    agreement = float(stats["agreement"][batch.counted].double().mean())
    assert method.after_step(0, {"agreement": agreement}) == {"churn": pytest.approx(differ)}
