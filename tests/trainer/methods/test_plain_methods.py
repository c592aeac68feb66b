"""The methods that are a divergence and a cross-entropy on the data's own tokens, as a run builds them."""

from __future__ import annotations

import pytest
import torch

from built_method import assert_same_gradients, built, logprobs, noisy, step_loss
from kd_trainer.data import Document, collate

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
