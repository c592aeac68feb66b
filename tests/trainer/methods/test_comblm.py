"""CombLM's mixture: weights that are found, positions that have their own, and the loss against the formula."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from built_method import assert_same_gradients, built, logprobs, noisy, step_loss
from kd_trainer.data import Document, collate, load_documents
from kd_trainer.methods.comblm import Weights
from kd_trainer.models import rows_of
from kd_trainer.tiny import byte_tokenizer

VOCAB = 40


def rows(count: int, seed: int) -> torch.Tensor:
    """Log-probabilities ``[count, VOCAB]`` of a model, of any sharpness."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = 4 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return (sharpness * torch.randn(count, VOCAB, generator=generator, dtype=torch.float64)).log_softmax(-1)


def text_of(weights: torch.Tensor, members: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels drawn from the mixture; what the members say of them, and the members' entropies, ``[count, members]``."""
    mixture = sum(w[:, None] * m.exp() for w, m in zip(weights.T, members))
    labels = torch.multinomial(mixture, 1, generator=torch.Generator().manual_seed(9))
    said = torch.cat([member.gather(1, labels) for member in members], 1)
    return said, torch.stack([-(member.exp() * member).sum(-1) for member in members], 1)


@pytest.mark.parametrize("truth", [(0.7, 0.3), (0.2, 0.3, 0.5)])
def test_numbers_that_made_a_text_are_found(truth):
    members = [rows(8000, seed) for seed in range(len(truth))]
    said, entropies = text_of(torch.tensor(truth, dtype=torch.float64).expand(8000, -1), members)
    weights = Weights("scalar", len(truth), VOCAB, 16)
    torch.testing.assert_close(
        weights(entropies[:1])[0], torch.full((len(truth),), 1 / len(truth), dtype=torch.float64)
    )
    weights.fit(said, entropies)
    found = weights(entropies)
    assert torch.equal(found[0], found[-1])
    torch.testing.assert_close(found[0], torch.tensor(truth, dtype=torch.float64), rtol=0, atol=0.03)
    found, best = found.detach(), float(weights.loss(said, entropies).detach())
    for shift in (-0.02, 0.02):  # a minimum: moved either way, the loss is higher
        moved = found[:1] + torch.tensor([shift] + [-shift] + [0.0] * (len(truth) - 2))
        assert float(-torch.logsumexp(moved.log() + said, -1).mean()) > best


def test_weights_that_follow_the_entropies_are_found():
    """The text is by the model that is surer, with the odds 19 : 1."""
    members = [rows(8000, seed) for seed in range(2)]
    entropies = torch.stack([-(member.exp() * member).sum(-1) for member in members], 1)
    surer = (entropies[:, 0] < entropies[:, 1]).double()
    truth = torch.stack([0.05 + 0.9 * surer, 0.95 - 0.9 * surer], 1)
    said, entropies = text_of(truth, members)
    losses = {}
    for kind in ("scalar", "entropy"):
        weights = Weights(kind, 2, VOCAB, 16)
        weights.fit(said, entropies)
        losses[kind] = float(weights.loss(said, entropies).detach())
    ideal = float(-torch.logsumexp(truth.log() + said, -1).mean())
    assert losses["entropy"] < ideal + 0.25 * (losses["scalar"] - ideal) and losses["scalar"] > ideal + 0.05
    clear = (entropies[:, 0] - entropies[:, 1]).abs() > 1.0
    assert float((weights(entropies)[clear] - truth[clear]).abs().mean()) < 0.08


def test_one_model_that_is_better_throughout_has_it_all():
    said = torch.tensor([[-1.0, -900.0]], dtype=torch.float64).expand(50, 2)
    weights = Weights("entropy", 2, VOCAB, 16)
    weights.fit(said, torch.rand(50, 2, generator=torch.Generator().manual_seed(0)))
    found = weights(torch.rand(5, 2)).detach()
    assert bool(found.isfinite().all()) and float(found[:, 1].max()) < 0.01


# -------------------------------------------------------------------------------------------------------- the teacher


@pytest.fixture(scope="module")
def models(tiny):
    return [noisy(tiny, seed) for seed in (1, 2, 3)]


def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    return [
        Document(torch.randint(1, 257, (length,), generator=generator), k) for length, k in ((12, 4), (9, 1), (7, 3))
    ]


@pytest.fixture
def comblm(models, make_config, tiny):
    def make(objective=None, data=None, **options):
        config = make_config(
            method="comblm", teacher={"model": str(tiny)}, more_teachers=[{"model": str(tiny)}], options=options,
            objective=objective or {}, data=data or {}, train={"batch_tokens": 4096},
        )
        return config, built(config, models[0], documents(), models[1:])

    return make


@pytest.mark.parametrize("kind", ["mean", "scalar", "entropy"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_student_learns_from_the_mixture(comblm, models, kind, divergence):
    _, method = comblm(weights=kind, objective={"divergence": divergence})
    texts, total, count = documents(), 0.0, 0
    loss = step_loss(method, models[0], texts)  # the weights are fitted by now
    for text in texts:
        q = logprobs(models[0], text.tokens)[text.counted]
        with torch.no_grad():
            said = [logprobs(model, text.tokens)[text.counted] for model in models[1:]]
            entropies = torch.stack([-(p.exp() * p).sum(-1) for p in said], 1)
            weights = torch.full_like(entropies, 0.5) if kind == "mean" else method.teacher.weights(entropies)
            p = sum(w[:, None] * one.exp() for w, one in zip(weights.T, said)).log()
        a, b = (p, q) if divergence == "forward_kl" else (q, p)
        total, count = total + (a.exp() * (a - b)).sum(), count + int(text.counted.sum())
    if kind == "entropy":
        assert float(weights.std(0)[0]) > 1e-3
    assert_same_gradients(loss, total / count, models[0])


def test_weights_are_fitted_on_held_out_text(comblm):
    config, method = comblm(data={"holdout": 0.3, "limit": 30}, texts=4)
    held = load_documents(dataclasses.replace(config.data, part="holdout"), byte_tokenizer())
    trained = {document.key for document in load_documents(config.data, byte_tokenizer())}
    assert [text.key for text in method.teacher._texts] == [document.key for document in held[:4]]
    assert not {document.key for document in held} & trained
    _, method = comblm(texts=2)
    assert [text.key for text in method.teacher._texts] == [text.key for text in documents()[:2]]


def test_weights_go_with_rows_that_are_selected(comblm):
    _, method = comblm()
    mixture = method.teacher.targets(collate(documents(), 64))
    rows = torch.tensor([3, 0, 7])
    torch.testing.assert_close(rows_of(mixture, rows).weights, mixture.weights[rows])


@pytest.mark.parametrize(("changes", "message"), [
    ({"options": {"weights": "vector"}}, "options.weights must be one of mean, scalar, entropy, got 'vector'"),
    ({"options": {"texts": 0}}, "options.texts must be at least 1, got 0"),
    ({"options": {"width": 0}}, "options.width must be at least 1, got 0"),
    ({"more_teachers": []}, "more_teachers must be at least one for method comblm, got none"),
    ({"cache": "somewhere"}, "cache must be absent for method comblm"),
])
def test_settings_that_do_not_fit(make_config, tiny, changes, message):
    tree = {"teacher": {"model": str(tiny)}, "more_teachers": [{"model": str(tiny)}]} | changes
    with pytest.raises(ValueError, match=message):
        make_config(method="comblm", **tree)
