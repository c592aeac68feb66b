"""SKD: whose words are written and when, the loss on all of them, the schedules of K and gamma."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import oracles
from built_method import assert_same_gradients, built, logprobs, noisy, step_loss
from kd_trainer import registry, rollout
from kd_trainer.config import Config, from_tree
from kd_trainer.data import Document
from kd_trainer.methods.skd import Options
from kd_trainer.tiny import save_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return noisy(folder, 1), noisy(folder, 2)


def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    return [Document(torch.randint(3, 200, (length,), generator=generator), 4) for length in (12, 9, 15)]


def skd(models, **options):
    student, teacher = models
    tree = {
        "out": "o", "method": "skd", "student": {"model": "m"}, "teacher": {"model": "t"}, "data": {"source": "d"},
        "rollout": {"max_new_tokens": 10}, "train": {"steps": 5}, "options": options,
    }
    return built(from_tree(Config, tree), student, documents(), [teacher])


def test_defaults_are_the_papers():
    spec, options = registry.spec("skd"), Options()
    assert (options.k, options.gamma, options.teacher_temperature, options.teacher_top_p) == (25, 5, 0.2, 0.5)
    assert spec.defaults["rollout"] == {"temperature": 0.5, "top_p": 0.5} and spec.has_teacher
    config = from_tree(Config, {
        "out": "o", "method": "skd", "student": {"model": "m"}, "teacher": {"model": "t"}, "data": {"source": "d"},
    })
    assert (config.rollout.temperature, config.rollout.top_p, config.objective.divergence) == (0.5, 0.5, "forward_kl")


def test_a_step_is_the_interleaved_roll_out_of_its_prompts(models):
    method, student, teacher = skd(models, k=40), *models
    produced = method.tokens.produce(documents(), 3)
    expected = rollout.interleave(
        student, teacher, [document.tokens[:4] for document in documents()], method.tokens.writer.options,
        teacher_sampling=rollout.Sampling(0.2, top_p=0.5), k=40, gamma=5,
        seed=rollout.step_seed(0, 3, "skd"), keys=torch.tensor([d.key for d in documents()]),
    )
    assert 0 < expected.acceptance < 1
    for ours, theirs in zip(produced, expected.documents(), strict=True):
        assert torch.equal(ours.tokens, theirs.tokens) and ours.first_target == 4
    logged = method.after_step(3, {})
    assert logged == {
        "k": 40.0, "gamma": 5.0, "acceptance": expected.acceptance, "tokens_per_round": expected.tokens_per_round,
    }
    alone = method.tokens.produce(documents()[1:2], 3)[0]  # whatever else is in the step, or on other processes
    assert torch.equal(alone.tokens, produced[1].tokens)
    assert not torch.equal(method.tokens.produce(documents(), 4)[0].tokens, produced[0].tokens)


def test_the_loss_is_the_mean_over_every_token_that_was_written(models):
    """The first token after the prompt counts, and so does the last: not one before, not one after."""
    method, student, teacher = skd(models, k=40), *models
    produced = method.tokens.produce(documents(), 0)
    terms = []
    for document in produced:
        p, q = logprobs(teacher, document.tokens).detach(), logprobs(student, document.tokens)
        terms.append(oracles.forward_kl(p, q).sum(-1)[document.first_target - 1 :])
    assert [len(term) for term in terms] == [len(document) - 4 for document in produced]
    assert_same_gradients(step_loss(method, student, produced), torch.cat(terms).mean(), student)


def test_a_k_of_the_vocabulary_is_on_policy_and_of_0_the_teachers_own(models):
    student, teacher = models
    options = skd(models).tokens.writer.options
    prompts = [document.tokens[:4] for document in documents()]
    seed = rollout.step_seed(0, 0, "skd")
    where = dict(seed=seed, keys=torch.tensor([d.key for d in documents()]))
    everything = skd(models, k=student.vocab)
    on_policy = rollout.generate(student, prompts, options, **where)
    for ours, theirs in zip(everything.tokens.produce(documents(), 0), on_policy.documents(), strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
    assert everything.after_step(0, {})["acceptance"] == 1.0
    nothing = skd(models, k=0, teacher_temperature=0.0, teacher_top_p=None)  # at 0 nothing is drawn: as generate()
    greedy = rollout.generate(teacher, prompts, dataclasses.replace(options, sampling=rollout.Sampling(0.0)), **where)
    for ours, theirs in zip(nothing.tokens.produce(documents(), 0), greedy.documents(), strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
    assert nothing.after_step(0, {})["acceptance"] == 0.0


@pytest.mark.parametrize(("options", "expected"), [
    ({}, [(25, 5)] * 5),
    ({"last_k": 5}, [(25, 5), (20, 5), (15, 5), (10, 5), (5, 5)]),
    ({"k": 0, "last_k": 8, "gamma": 1, "last_gamma": 5}, [(0, 1), (2, 2), (4, 3), (6, 4), (8, 5)]),
])
def test_schedules(models, options: dict, expected: list):
    method = skd(models, **options)
    for step, (k, gamma) in enumerate(expected):
        assert method.tokens.options.at(step, 5) == (k, gamma)
        logged = method.after_step(step, {})
        assert (logged["k"], logged["gamma"]) == (k, gamma)
    assert Options(**options).at(0, 1) == expected[0]


@pytest.mark.parametrize(("options", "message"), [
    ({"k": -1}, "options.k must be at least 0, got -1"),
    ({"last_gamma": 0}, "options.last_gamma must be at least 1, got 0"),
    ({"k": 100_000}, "options.k must be at most V="),
    ({"teacher_temperature": -0.5}, "options.teacher_temperature must be finite and at least 0, got -0.5"),
    ({"teacher_top_p": 0.0}, r"options.teacher_top_p must be in \(0, 1\], got 0.0"),
])
def test_options_out_of_range(models, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        skd(models, **options)


def test_what_cannot_be_trained_is_refused(models):
    student, teacher = models
    tree = {
        "out": "o", "method": "skd", "student": {"model": "m"}, "teacher": {"model": "t"}, "data": {"source": "d"},
    }
    without_prompt = [Document(document.tokens) for document in documents()]
    with pytest.raises(ValueError, match="rollout.prompt_tokens must be given for texts without a prompt"):
        built(from_tree(Config, tree), student, without_prompt, [teacher])
    with pytest.raises(ValueError, match="objective.kd_weight must be above 0 for method skd, got 0.0"):
        labels = {"objective": {"kd_weight": 0.0, "ce_weight": 1.0}}
        built(from_tree(Config, tree | labels), student, documents(), [teacher])
