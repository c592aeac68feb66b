"""TGeo-KD: the gradient of held-out loss through a step, against second derivatives by autograd; and what it learns to
prefer."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.func import functional_call

from built_method import built, noisy, step_loss
from kd_kernels import topk_targets
from kd_trainer.data import Document, collate
from kd_trainer.models import rows_of
from kd_trainer.trainer import LossModule, _optimizer

TEMPERATURE, INNER = 1.5, 0.05


def documents(lengths=(12, 9, 7), firsts=(4, 1, 3)) -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    return [Document(torch.randint(1, 257, (n,), generator=generator), k) for n, k in zip(lengths, firsts)]


@pytest.fixture
def models(tiny):
    pair = [noisy(tiny, seed) for seed in (1, 2)]
    pair[0].model.set_attn_implementation("eager")  # the one that autograd differentiates twice
    return pair


@pytest.fixture
def tgeo(models, make_config, tiny):
    def make(data=None, **options):
        config = make_config(
            method="tgeo_kd", teacher={"model": str(tiny)}, options={"inner_lr": INNER} | options,
            data={"holdout": 0.3, "limit": 6} | (data or {}), train={"batch_tokens": 160, "steps": 3},
        )
        method = built(config, models[0], documents(), models[1:])
        objective = method.objectives["main"].double()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():  # not the half-and-half of the beginning
            for parameter in objective.network.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
            objective.labels_seen.copy_(
                torch.rand(2, 257, generator=generator, dtype=torch.float64).mul(3).sort(0, True).values
            )
        return method

    return make


def adds_gradient(method, student, held: list):
    """As the trainer does it; what is asked for of all processes is noted."""

    def add(texts, of_all=False):
        if of_all:
            held.extend(texts)
        loss = step_loss(method, student, texts)
        loss.backward()
        return {"loss": float(loss.detach())}

    return add


def rows_by_hand(student, teacher, weights, texts, labels_seen):
    """``T^2 KL``, cross-entropy and features of the rows that count; differentiable in the student's weights."""
    pulls, labels, features = [], [], []
    for text in texts:
        keep, y = text.counted, text.tokens[1:, None]
        z = functional_call(
            student.model, weights, (), {"input_ids": text.tokens[None], "use_cache": False}
        ).logits[0, :-1]
        with torch.no_grad():
            t = teacher.model(input_ids=text.tokens[None], use_cache=False).logits[0, :-1]
        q, p = (z / TEMPERATURE).log_softmax(-1), (t / TEMPERATURE).log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        label = -z.log_softmax(-1).gather(1, y)[:, 0]
        py, qy = p.gather(1, y)[:, 0].exp(), (-label).exp()
        mean = (labels_seen[1][y[:, 0]] + 0.5) / (labels_seen[0][y[:, 0]] + 1)
        entropy = lambda x: -(x.exp() * x).sum(-1) / math.log(257)  # noqa: E731
        columns = [
            py, qy, mean, (mean - qy) ** 2, (1 - qy) ** 2, (py - qy) ** 2, (1 - py) ** 2, (1 - mean) ** 2,
            torch.log1p(kl), entropy(p), entropy(q), (p.argmax(-1) == q.argmax(-1)).double(),
        ]
        pulls.append(TEMPERATURE**2 * kl[keep])
        labels.append(label[keep])
        features.append(torch.stack(columns, 1).detach()[keep])
    return torch.cat(pulls), torch.cat(labels), torch.cat(features)


def test_the_network_gets_the_gradient_of_held_out_loss_after_a_step(tgeo, models):
    method, (student, teacher), held = tgeo(), models, []
    objective, texts = method.objectives["main"], documents()
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    logged = method.before_step(1, texts, adds_gradient(method, student, held))
    assert all(parameter.grad is None for parameter in (*student.parameters(), *objective.parameters()))
    loss = step_loss(method, student, texts)
    loss.backward()
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.named_parameters())

    weights = {name: parameter.detach().requires_grad_() for name, parameter in student.model.named_parameters()}
    phi = list(objective.network.parameters())
    pull, label, features = rows_by_hand(student, teacher, weights, texts, objective.labels_seen)
    share = torch.sigmoid(objective.network(features)[:, 0])
    expected = (share * pull + (1 - share) * label).mean()
    gradient = torch.autograd.grad(expected, list(weights.values()), create_graph=True)
    after = {name: w - INNER * g for (name, w), g in zip(weights.items(), gradient)}
    held_out = rows_by_hand(student, teacher, after, held, objective.labels_seen)[1].mean()
    assert logged == {"held_out_loss": pytest.approx(float(held_out.detach()), rel=1e-6)}
    assert len(held) >= 2 and not {text.key for text in held} & {text.key for text in texts}
    for parameter, wanted in zip(phi, torch.autograd.grad(held_out, phi, retain_graph=True)):
        assert float(wanted.norm()) > 1e-7
        assert float((parameter.grad - wanted).norm() / wanted.norm()) < 1e-3

    # And the student that of the loss, shares fixed. Features go by statistics, which are fp32.
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0.0)
    for parameter, wanted in zip(student.model.parameters(), gradient):
        assert (parameter.grad - wanted).norm() <= 1e-6 * wanted.norm()


def test_without_a_look_ahead_the_network_would_not_learn(tgeo, models):
    """What the authors' code does: shares without gradient."""
    method = tgeo()
    objective = method.objectives["main"]
    objective.phase = "unrolled"
    step_loss(method, models[0], documents()).backward()
    assert all(float(parameter.grad.abs().max()) == 0.0 for parameter in objective.parameters())


@pytest.mark.parametrize("reliable", ["teacher", "labels"])
def test_shares_move_to_whom_held_out_text_bears_out(tgeo, models, monkeypatch, reliable):
    """The text is by one model. Training has that model as teacher and wrong labels, or another teacher and right
    ones."""
    writer = models[1]
    generator = torch.Generator().manual_seed(8)

    def written(count):
        tokens = torch.randint(1, 257, (count, 13), generator=generator)
        with torch.no_grad():
            best = writer.model(input_ids=tokens, use_cache=False).logits.argmax(-1)
        return [Document(row, labels=labels) for row, labels in zip(tokens, best[:, :-1])]

    texts, held = written(6), written(6)
    if reliable == "teacher":
        texts = [dataclasses.replace(text, labels=torch.randint(1, 257, (12,), generator=generator)) for text in texts]
    method = tgeo()
    if reliable == "labels":
        flipped = lambda noun: dataclasses.replace(noun, weight=noun.weight.flip(0))  # noqa: E731
        targets = method.teacher.targets
        monkeypatch.setattr(method.teacher, "targets", lambda batch: flipped(targets(batch)))
    objective = method.objectives["main"]
    torch.nn.init.zeros_(objective.network[-1].weight)
    torch.nn.init.zeros_(objective.network[-1].bias)
    optimizer = torch.optim.Adam(objective.network.parameters(), lr=0.03)

    def add(documents, of_all=False):
        loss = step_loss(method, models[0], held if of_all else documents)
        loss.backward()
        return {"loss": float(loss.detach())}

    for step in range(8):
        method.before_step(step, texts, add)
        optimizer.zero_grad()
        step_loss(method, models[0], texts).backward()
        optimizer.step()
    batch = collate(texts, 64)
    objective.phase = "unrolled"
    shares = objective(models[0], method.teacher.targets(batch), batch, 1.0).stats["teacher_share"]
    assert float(shares.mean()) > 0.6 if reliable == "teacher" else float(shares.mean()) < 0.4


# --------------------------------------------------------------------------------------------------- the small print


def test_labels_that_were_seen_count_from_the_next_step_on(tgeo, models):
    method, texts = tgeo(), documents()
    objective, before = method.objectives["main"], method.objectives["main"].labels_seen.clone()
    method.before_step(0, texts, adds_gradient(method, models[0], []))
    step_loss(method, models[0], texts)
    assert torch.equal(objective.labels_seen, before)
    assert method.after_step(0, {}) == {}
    expected = before.clone()
    for text in texts:
        with torch.no_grad():
            logits = models[1].model(input_ids=text.tokens[None], use_cache=False).logits[0, :-1]
        p = (logits / TEMPERATURE).softmax(-1).gather(1, text.tokens[1:, None])[:, 0]
        for label, mass in zip(text.tokens[1:][text.counted], p[text.counted]):
            expected[0, label] += 1
            expected[1, label] += mass
    torch.testing.assert_close(objective.labels_seen, expected, rtol=1e-6, atol=0.0)
    method.after_step(1, {})
    torch.testing.assert_close(objective.labels_seen, expected, rtol=1e-6, atol=0.0)


def test_a_cached_teacher_finds_a_label_that_it_does_not_hold_unlikely(tgeo, models):
    method = tgeo()
    objective, batch = method.objectives["main"], collate(documents(), 64)
    dense = method.teacher.targets(batch)
    sparse = topk_targets(dense, 100, temperatures=(1.0, TEMPERATURE))
    objective.phase = "unrolled"
    found = []
    features = objective.features
    objective.features = lambda seen, labels: found.append(features(seen, labels)) or found[-1]
    for targets in (dense, sparse):
        assert bool(objective(models[0], targets, batch, 1.0).loss.isfinite())
    labels = batch.labels[batch.counted]
    head = dense_rows(dense, batch).topk(100).indices
    is_kept = (head == labels[:, None]).any(1)
    assert bool(is_kept.any()) and not bool(is_kept.all())
    assert float(found[1][~is_kept, 0].abs().max()) == 0.0
    torch.testing.assert_close(found[1][is_kept, 0], found[0][is_kept, 0], rtol=1e-5, atol=0.0)


def dense_rows(noun, batch):
    rows = rows_of(noun, batch.counted)
    return rows.hidden @ rows.weight.T


def test_the_networks_learning_rate_has_its_pace(tgeo, models, make_config):
    method = tgeo(pace=7.0)
    losses = LossModule(models[0], method.objectives)
    groups = _optimizer(losses, make_config().optim).param_groups
    paces = {id(parameter): group["pace"] for group in groups for parameter in group["params"]}
    assert {paces[id(p)] for p in models[0].parameters()} == {1.0}
    assert {paces[id(p)] for p in method.objectives["main"].parameters()} == {7.0}
    assert len(paces) == len(list(losses.parameters()))


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": {"holdout": 0.0}}, "data.holdout must be above 0 for method tgeo_kd, got 0.0; its shares are learnt"),
    ({"inner_lr": 0.0}, "options.inner_lr must be finite and greater than 0, got 0.0"),
    ({"pace": -1.0}, "options.pace must be finite and greater than 0, got -1.0"),
])
def test_settings_that_do_not_fit(tgeo, changes, message):
    with pytest.raises(ValueError, match=message):
        tgeo(**changes)


def test_a_student_in_half_precision_is_refused(tgeo, models):
    models[0].bfloat16()
    with pytest.raises(
        ValueError, match="student.dtype must be float32 for method tgeo_kd, which takes differences, got"
    ):
        tgeo()
