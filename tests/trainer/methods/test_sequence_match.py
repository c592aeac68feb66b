"""SequenceMatch from its definition: states one text after another, from transformers alone, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from built_method import built, noisy
from kd_trainer.data import Document, collate
from kd_trainer.methods.sequence_match import Options, SequenceMatch
from kd_trainer.tiny import byte_tokenizer

END, BACK = 0, byte_tokenizer().convert_tokens_to_ids("Ā")


def document(actions: list[int], first: int, **fields) -> Document:
    return Document(torch.tensor(actions), first, **fields)


DOCUMENTS = [
    document([7, 50, 60, BACK, 61, 62, END], 2),
    document([9, 8, 70, 71, BACK, BACK, BACK, 72], 2),
    document([30, 31, 32], 1),
    document([7, 50, 90, BACK, 60, END], 1, labels=torch.tensor([50, -100, BACK, 60, END])),  # a mistake
]


@pytest.fixture(scope="module")
def student(tiny):
    return noisy(tiny, 3)


def state(student, actions: list[int], first: int) -> torch.Tensor:
    """Logits after some actions."""
    text = actions[:first]
    for action in actions[first:]:
        if action != BACK:
            text = [*text, action]
        elif len(text) > first:
            text = text[:-1]
    return student.model(torch.tensor([text]), use_cache=False).logits[0, -1]


def terms(student, documents: list[Document], alpha: float, gamma: float) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Sums over rows of phi(z - gamma V') and of V - gamma V', and the number of rows."""
    phi = difference = torch.zeros((), dtype=torch.float64)
    rows = 0

    def add(z, value, next_value):
        nonlocal phi, difference, rows
        x = z - gamma * next_value
        phi, difference, rows = phi + x - x**2 / (4 * alpha), difference + value - gamma * next_value, rows + 1

    for text in documents:
        actions, first = text.tokens.tolist(), text.first_target
        for row in text.counted.nonzero()[:, 0].tolist():
            z, z_next = (state(student, actions[:end], first) for end in (row + 1, row + 2))
            add(z[actions[row + 1]], z.logsumexp(0), z_next.logsumexp(0))
        if actions[-1] == END:
            value = state(student, actions, first).logsumexp(0)
            add(value, value, value)
    return phi, difference, rows


def next_token_loss(student, documents: list[Document]) -> torch.Tensor:
    """Sum over the rows that count."""
    total = torch.zeros((), dtype=torch.float64)
    for text in documents:
        actions = text.tokens.tolist()
        for row in text.counted.nonzero()[:, 0].tolist():
            total = total - state(student, actions[: row + 1], text.first_target).log_softmax(0)[actions[row + 1]]
    return total


@pytest.mark.parametrize(("alpha", "gamma", "share"), [(1.0, 0.99, 0.0), (0.3, 0.5, 0.4), (7.0, 0.0, 0.0)])
@pytest.mark.parametrize("of_text", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_the_two_expectations(student, alpha, gamma, share, of_text, packing):
    objective = SequenceMatch(of_text, Options(alpha=alpha, gamma=gamma, likelihood=share), BACK, END)
    batch = collate(DOCUMENTS, 32, packing)
    result = objective(student, None, batch, 5.0)
    phi, difference, rows = terms(student, DOCUMENTS, alpha, gamma)
    assert rows == sum(map(objective.count, DOCUMENTS))
    expected = 0.5 * difference - phi if of_text else 0.5 * difference
    expected = ((1.0 - share) * expected + (share * next_token_loss(student, DOCUMENTS) if of_text else 0.0)) / 5.0
    torch.testing.assert_close(result.loss.detach(), expected.detach(), rtol=1e-9, atol=1e-11)
    parameters = list(student.model.parameters())
    gradients = torch.autograd.grad(result.loss, parameters)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, parameters)):
        # a parameter's whole gradient, because some norms are computed in fp32 whatever the weights are
        assert float((got - wanted).norm()) <= 1e-6 * float(wanted.norm()) and float(wanted.norm()) > 1e-3
    assert bool(result.stats["label_logprob"][batch.counted].isfinite().all())


def test_without_discount_and_regulariser_on_the_same_texts_it_is_the_likelihood(student):
    """gamma 0 and alpha infinite leave -z(a) + V: both halves of V are taken at the same states here."""
    texts = [text for text in DOCUMENTS if int(text.tokens[-1]) != END]  # the end's own row is no row of the likelihood
    batch = collate(texts, 32)
    halves = [SequenceMatch(of_text, Options(alpha=1e12, gamma=0.0), BACK, END) for of_text in (True, False)]
    loss = sum(half(student, None, batch, 1.0).loss for half in halves)
    torch.testing.assert_close(loss.detach(), next_token_loss(student, texts).detach(), rtol=1e-7, atol=1e-9)


def test_occupancy_weights_would_make_the_written_texts_irrelevant(student):
    """Why E is over rows all alike: weighted by gamma^t, the end's state for ever, V - gamma V' sums to V(prompt)."""
    gamma = 0.8
    for text in DOCUMENTS[:1]:
        actions, total = text.tokens.tolist(), 0.0
        values = [float(state(student, actions[:end], 2).logsumexp(0)) for end in range(2, len(actions) + 1)]
        for t in range(len(values) - 1):
            total += gamma**t * (values[t] - gamma * values[t + 1])
        total += gamma ** (len(values) - 1) * (values[-1] - gamma * values[-1]) / (1 - gamma)
        assert total == pytest.approx(values[0])


# ----------------------------------------------------------------------------------------------------- its texts


def prompted(count: int = 6) -> list[Document]:
    generator = torch.Generator().manual_seed(8)
    return [Document(torch.randint(100, 200, (14,), generator=generator), 5) for _ in range(count)]


@pytest.fixture
def method(make_config, student):
    def make(documents=None, **options):
        settings = {"backspace": "Ā", "refresh": 3, "mistakes": 0.2, "buffer": 20} | options
        config = make_config(
            method="sequence_match", options=settings, rollout={"max_new_tokens": 6}, train={"batch_tokens": 84},
        )
        return built(config, student, documents or prompted())

    return make


def test_texts_with_mistakes_and_replayed_ones(method):
    tokens = method().tokens
    texts = tokens.step(0)
    first = tokens.produce(texts, 0)
    assert [d.tag for d in first] == ["text"] * len(texts) + ["written"] * len(texts)
    for written in first[len(texts):]:
        assert written.first_target == 5
        assert sum(torch.equal(written.tokens[:5], other.tokens[:5]) for other in texts) == 1
    assert any(bool((d.tokens == BACK).any()) for d in first[: len(texts)])
    same = {d.tokens.numpy().tobytes() for d in first[len(texts):]}
    later = tokens.produce(tokens.step(1), 1)
    assert {d.tokens.numpy().tobytes() for d in later if d.tag == "written"} <= same  # nothing new is written
    fresh = tokens.produce(tokens.step(3), 3)
    assert not {d.tokens.numpy().tobytes() for d in fresh if d.tag == "written"} <= same


def test_the_buffer_goes_with_a_checkpoint(method):
    one, other = method().tokens, method().tokens
    one.produce(one.step(0), 0)
    other.load_state(one.state())
    ours, theirs = (source.produce(source.step(1), 1) for source in (one, other))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.tokens, b.tokens) and (a.tag, a.first_target) == (b.tag, b.first_target)


@pytest.mark.parametrize(("options", "message"), [
    ({"backspace": "<gone>"}, "options.backspace must be a token of the vocabulary, got '<gone>'; name one that texts"),
    ({"alpha": 0.0}, "options.alpha must be finite and greater than 0, got 0.0"),
    ({"gamma": 1.0}, r"options.gamma must be in \[0, 1\), got 1.0"),
    ({"mistakes": -0.1}, r"options.mistakes must be in \[0, 1\), got -0.1"),
    ({"likelihood": 1.0}, r"options.likelihood must be in \[0, 1\), got 1.0"),
    ({"refresh": 0}, "options.refresh must be at least 1, got 0"),
    ({"buffer": 0}, "options.buffer must be at least 1, got 0"),
])
def test_settings_out_of_range(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_texts_that_do_not_do(method):
    first, *others = prompted()
    used = dataclasses.replace(first, tokens=first.tokens.index_fill(0, torch.tensor([9]), BACK))
    with pytest.raises(ValueError, match="options.backspace must be a token that no text has, got 'Ā', .* in 1 of 6"):
        method([used, *others])
    with pytest.raises(ValueError, match="rollout.prompt_tokens must be given for texts without a prompt"):
        method([Document(first.tokens), *others])
