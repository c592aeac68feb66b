"""KID and masked thought: which tokens change, what is minimised on them, and what it costs."""

from __future__ import annotations

import pytest
import torch

from built_method import assert_same_gradients, built, logprobs, noisy, step_loss
from kd_trainer.data import Document
from kd_trainer.rollout import choose_places, score, step_seed
from kd_trainer.tiny import byte_tokenizer

MASK = 0  # <end>, of the byte tokenizer


def documents(seed: int = 0) -> list[Document]:
    """With a prompt, without one, and a chat in which two runs of tokens count."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda length: torch.randint(1, 257, (length,), generator=generator)  # noqa: E731
    chat = draw(16)
    labels = torch.where((torch.arange(1, 16) % 7) > 2, chat[1:], -100)
    return [Document(draw(14), 5), Document(draw(9)), Document(chat, labels=labels, origin="chat")]


@pytest.fixture(scope="module")
def models(tiny):
    return noisy(tiny, 1), noisy(tiny, 2)


@pytest.fixture
def kid(models, make_config, tiny):
    def make(texts=None, objective=None, rollout=None, **options):
        config = make_config(
            method="kid", teacher={"model": str(tiny)}, options={"mask": "<end>"} | options, objective=objective or {},
            rollout=rollout or {}, train={"batch_tokens": 4096},
        )
        return built(config, models[0], texts or documents(), models[1:])

    return make


def keys(texts) -> torch.Tensor:
    return torch.tensor([text.key for text in texts])


# --------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("strategy", ["random", "uniform", "hard", "easy"])
@pytest.mark.parametrize("rewrites", [True, False])
def test_exactly_the_masked_places_change(kid, models, strategy, rewrites):
    texts = documents()
    found = kid(strategy=strategy, rewrite=rewrites, fraction=0.3).tokens.produce(texts, 7)
    entropies = [stats.entropy for stats in score(models[0], texts)]
    places = choose_places(texts, 0.3, strategy, seed=step_seed(0, 7, "kid"), keys=keys(texts), entropies=entropies)
    assert [len(there) for there in places] == [3, 2, 2]
    for text, new, there in zip(texts, found, places):
        assert new.tag == "rewritten" and torch.equal(new.counted, text.counted)
        assert bool(text.counted[there - 1].all())  # targets, of a chat its own turns' alone
        expected = text.tokens.index_fill(0, there, MASK)
        if rewrites:
            with torch.no_grad():
                expected[there] = logprobs(models[0], expected)[there - 1].argmax(-1)
        assert torch.equal(new.tokens, expected)
        assert torch.equal(new.labels, text.tokens[1:] if text.labels is None else text.labels)
    assert any(not torch.equal(new.tokens, text.tokens) for new, text in zip(found, texts))


def test_draws_are_a_function_of_seed_step_and_text(kid):
    texts = documents()
    method = kid(rollout={"temperature": 1.0})
    run = lambda texts, step: [d.tokens.tolist() for d in method.tokens.produce(texts, step)]  # noqa: E731
    assert run(texts, 3)[::-1] == run(texts[::-1], 3) and run(texts, 3)[:1] == run(texts[:1], 3)
    assert run(texts, 3) != run(texts, 4) and run(texts, 3) == run(texts, 3)


@pytest.mark.parametrize(("options", "passes"), [
    ({}, [False, True]), ({"strategy": "hard"}, [False, False, True]), ({"mle": "text"}, [False, True, True]),
    ({"rewrite": False}, [True]), ({"rewrite": False, "strategy": "easy"}, [False, True]),
])
def test_the_student_reads_once_more_without_gradient(kid, models, options, passes):
    """Passes of the student in a step, and whether each is recorded for a gradient."""
    seen = []
    hook = models[0].model.get_decoder().register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    method, texts = kid(**options), [Document(torch.arange(1, 12), 4)]
    step_loss(method, models[0], method.tokens.produce(texts, 0))
    hook.remove()
    assert seen == passes


# ------------------------------------------------------------------------------------------------------ objective


def reverse_kl(q, p):
    return (q.exp() * (q - p)).sum(-1)


def expected_loss(models, texts, new, mle: str, weight: float = 1.0):
    """The formula of the docstring."""
    student, teacher = models
    divergence = likelihood = 0.0
    count = sum(int(text.counted.sum()) for text in texts)
    for text, changed in zip(texts, new):
        q = logprobs(student, changed.tokens)
        with torch.no_grad():
            p = logprobs(teacher, changed.tokens)
        divergence = divergence + reverse_kl(q, p)[text.counted].sum()
        own = q if mle == "rewritten" else logprobs(student, text.tokens)
        likelihood = likelihood - own.gather(1, text.tokens[1:, None])[:, 0][text.counted].sum()
    return (divergence + weight * likelihood) / count


@pytest.mark.parametrize("mle", ["rewritten", "text"])
@pytest.mark.parametrize("rewrites", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_reverse_kl_on_what_was_rewritten_and_likelihood_of_the_text(kid, models, mle, rewrites, weight):
    texts = documents()
    method = kid(mle=mle, rewrite=rewrites, fraction=0.3, objective={"ce_weight": weight})
    new = method.tokens.produce(texts, 2)
    assert len(new) == len(texts) * (2 if mle == "text" and weight else 1)
    assert_same_gradients(
        step_loss(method, models[0], new), expected_loss(models, texts, new[:3], mle, weight), models[0]
    )


def test_the_readings_of_the_likelihood_term_differ(kid, models):
    texts = documents()
    new = kid(fraction=0.3).tokens.produce(texts, 2)
    with torch.no_grad():
        one, other = (float(expected_loss(models, texts, new, mle)) for mle in ("rewritten", "text"))
    assert abs(one - other) > 1e-2


def test_the_mean_over_draws_is_the_expectation_over_every_prediction(kid, models):
    """One hidden token: its 257 values, each with the probability that the student gives it behind the mask."""
    text = Document(torch.tensor([40, 50, 60, 70]), 2)  # two targets, of which the first is hidden in half of the steps
    method = kid([text], fraction=0.5, rollout={"temperature": 1.0})
    place, losses = 2, {}
    with torch.no_grad():
        masked = text.tokens.index_fill(0, torch.tensor([place]), MASK)
        probability = logprobs(models[0], masked)[place - 1].exp()
        for token in range(257):
            changed = Document(text.tokens.index_fill(0, torch.tensor([place]), token), 2)
            losses[token] = float(expected_loss(models, [text], [changed], "rewritten"))
        exact = sum(float(probability[token]) * loss for token, loss in losses.items())
        spread = sum(float(probability[token]) * (loss - exact) ** 2 for token, loss in losses.items()) ** 0.5
        drawn = []
        for step in range(600):
            if choose_places([text], 0.5, seed=step_seed(0, step, "kid"), keys=keys([text]))[0].tolist() == [place]:
                (new,) = method.tokens.produce([text], step)
                drawn.append(losses[int(new.tokens[place])])
                if len(drawn) < 20:
                    assert float(step_loss(method, models[0], [new])) == pytest.approx(drawn[-1], rel=1e-9)
    assert len(drawn) > 240 and spread > 0.05
    assert abs(sum(drawn) / len(drawn) - exact) < 4 * spread / len(drawn) ** 0.5


# -------------------------------------------------------------------------------------------------- masked thought


@pytest.fixture
def masked_thought(models, make_config):
    def make(steps=10, **options):
        config = make_config(
            method="masked_thought", options={"mask": "<end>"} | options, train={"batch_tokens": 4096, "steps": steps}
        )
        return built(config, models[0], documents())

    return make


def test_the_share_of_holes_rises_to_its_end(masked_thought):
    tokens = masked_thought(steps=10, fraction=0.4, warmup=0.5).tokens
    assert [round(tokens.fraction(step), 6) for step in range(10)] == [0.0, 0.08, 0.16, 0.24, 0.32] + 5 * [0.4]
    assert masked_thought(warmup=0.0).tokens.fraction(0) == 0.4
    texts = documents()
    assert [new.tokens.tolist() for new in tokens.produce(texts, 0)] == [text.tokens.tolist() for text in texts]
    for text, new in zip(texts, tokens.produce(texts, 9)):
        holes = (new.tokens == MASK).nonzero()[:, 0]
        assert len(holes) == round(0.4 * int(text.counted.sum())) and bool(text.counted[holes - 1].all())
        assert torch.equal(new.tokens[new.tokens != MASK], text.tokens[new.tokens != MASK])


def test_what_is_hidden_is_predicted_all_the_same(masked_thought, models):
    method, texts = masked_thought(), documents()
    new = method.tokens.produce(texts, 9)
    total, count = 0.0, 0
    for text, changed in zip(texts, new):
        rows = logprobs(models[0], changed.tokens).gather(1, text.tokens[1:, None])[:, 0]
        total, count = total - rows[text.counted].sum(), count + int(text.counted.sum())
    assert_same_gradients(step_loss(method, models[0], new), total / count, models[0])


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("method", "options", "message"), [
    ("kid", {"fraction": 0.0}, "options.fraction must be above 0, up to 1, got 0.0"),
    ("kid", {"strategy": "soft"}, "options.strategy must be one of random, uniform, hard, easy, got 'soft'"),
    ("kid", {"mle": "both"}, "options.mle must be one of rewritten, text, got 'both'"),
    ("kid", {"mask": "<mask>"}, "options.mask must be a token of the vocabulary, got '<mask>'; name one"),
    ("kid", {"mask": None}, "options.mask must be a token of the vocabulary, got None; .* no BOS token"),
    (
        "kid", {"fraction": 0.04},
        "options.fraction must be large enough to mask a token of the longest text, of 9, got 0.04",
    ),
    ("masked_thought", {"fraction": 1.5}, "options.fraction must be above 0, up to 1, got 1.5"),
    ("masked_thought", {"warmup": 2.0}, r"options.warmup must be a fraction in \[0, 1\], got 2.0"),
])
def test_settings_out_of_range(make_config, models, tiny, method, options, message):
    teacher = {"teacher": {"model": str(tiny)}} if method == "kid" else {}
    with pytest.raises(ValueError, match=message):
        config = make_config(method=method, options={"mask": "<end>"} | options, **teacher)
        built(config, models[0], documents(), models[1:])


def test_kid_wants_a_teacher_that_runs_and_something_to_learn_from_it(make_config, models, tiny):
    with pytest.raises(ValueError, match="cache must be absent for method kid, whose teacher must run"):
        make_config(method="kid", teacher={"model": str(tiny)}, cache="somewhere")
    with pytest.raises(ValueError, match="teacher.model must be given for method kid"):
        make_config(method="kid")
    config = make_config(
        method="kid", teacher={"model": str(tiny)}, objective={"kd_weight": 0.0}, options={"mask": "<end>"}
    )
    with pytest.raises(
        ValueError, match="objective.kd_weight must be above 0 for method kid, got 0.0; method: masked_thought"
    ):
        built(config, models[0], documents(), models[1:])
    assert byte_tokenizer().bos_token is None  # what the refusal of mask: None above rests on
