"""BASH and RAC: whose words the contexts hold, for how long, and that the loss is of the reference alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from built_method import assert_same_gradients, built, logprobs, noisy, step_loss
from kd_trainer.config import to_yaml
from kd_trainer.data import Document
from kd_trainer.methods.bash import Mixer, Options
from kd_trainer.rollout import Options as Written
from kd_trainer.rollout import generate, mix, step_seed
from kd_trainer.tiny import byte_tokenizer
from kd_trainer.trainer import train
from processes import launch_kdk

END = 0  # <end>, of the byte tokenizer


def documents(seed: int = 0) -> list[Document]:
    """With prompts; the last is a chat, of which two runs of tokens count."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda length: torch.randint(1, 257, (length,), generator=generator)  # noqa: E731
    chat = draw(16)
    labels = torch.where((torch.arange(1, 16) % 7) > 2, chat[1:], -100)
    return [Document(draw(14), 5), Document(draw(9), 2), Document(chat, labels=labels, origin="chat")]


@pytest.fixture
def student(tiny):
    return noisy(tiny, 1)


@pytest.fixture
def method(student, make_config):
    def make(name, texts=None, rollout=None, steps=12, data=None, **options):
        config = make_config(
            method=name, options=options, rollout={"max_new_tokens": 7} | (rollout or {}),
            data={"max_length": 48} | (data or {}), train={"batch_tokens": 60, "steps": steps},
        )
        return built(config, student, texts or documents())

    return make


def keys(texts) -> torch.Tensor:
    return torch.tensor([text.key for text in texts])


def tokens_of(texts) -> list[list[int]]:
    return [text.tokens.tolist() for text in texts]


def likelihood(student, made) -> torch.Tensor:
    """Cross-entropy of the labels of the rows that count, from transformers alone."""
    total, count = 0.0, 0
    for text in made:
        labels = text.tokens[1:] if text.labels is None else text.labels
        rows = logprobs(student, text.tokens)[text.counted]
        total = total - rows.gather(1, labels[text.counted][:, None]).sum()
        count += len(rows)
    return total / count


# --------------------------------------------------------------------------------------------------------- rounds


def test_texts_are_made_once_a_round_by_the_weights_of_its_beginning(method, student):
    bash, texts = method("bash", fraction=0.6, round_steps=4), documents()
    first = tokens_of(bash.tokens.produce(texts, 4))
    assert first == tokens_of(mix(
        student, texts, fraction=0.6, seed=step_seed(0, 4, "contexts"), keys=keys(texts)
    ).documents) != tokens_of(texts)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.3)
    assert tokens_of(bash.tokens.produce(texts[::-1], 7))[::-1] == first
    assert tokens_of(bash.tokens.produce(texts, 8)) != first

    again = method("bash", fraction=0.6, round_steps=4).tokens
    again.load_state(bash.tokens.state())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    kept = again.produce(texts, 10)
    assert tokens_of(kept) == tokens_of(bash.tokens.produce(texts, 10))
    assert [text.labels.tolist() for text in kept] == [text.labels.tolist() for text in bash.tokens.produce(texts, 10)]


def test_a_round_is_an_epoch_where_nothing_else_is_said(method):
    texts = [Document(torch.arange(1 + i, 21 + i), 3) for i in range(9)]  # 180 tokens, in steps of 60
    source = method("bash", texts).tokens
    made = source.produce(source.step(0), 0)
    assert len(source.state()["made"]) == 9 and len(made) == 3
    source.produce(source.step(2), 2)
    assert source.state()["begin"] == 0
    source.produce(source.step(3), 3)
    assert source.state()["begin"] == 3


def test_the_last_round_ends_with_the_run(method):
    texts = [Document(torch.arange(1 + i, 21 + i), 3) for i in range(9)]
    source = method("bash", texts, steps=4, round_steps=3).tokens
    source.produce(source.step(3), 3)
    assert len(source.state()["made"]) == 3


def test_two_processes_make_what_one_makes(make_config, tmp_path):
    case = dict(
        method="bash", options={"round_steps": 2}, data={"max_length": 32, "limit": 12},
        train={"steps": 2, "batch_tokens": 200},
    )
    one = train(make_config(**case))
    two = make_config(out=str(tmp_path / "two"), **case)
    (tmp_path / "two.yaml").write_text(to_yaml(two))
    launch_kdk(["train", str(tmp_path / "two.yaml")], timeout=300)
    lines = [(Path(run) / "metrics.jsonl").read_text().splitlines() for run in (one.parent, two.out)]
    for a, b in zip(*(map(json.loads, part) for part in lines), strict=True):
        assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- bash


def test_labels_are_the_texts(method, student):
    bash, texts = method("bash", fraction=0.6), documents()
    made = bash.tokens.produce(texts, 0)
    for text, new in zip(texts, made):
        assert torch.equal(new.labels, text.tokens[1:] if text.labels is None else text.labels)
        assert torch.equal(new.counted, text.counted)
        free = torch.cat([torch.zeros(1, dtype=torch.bool), text.counted])
        assert torch.equal(new.tokens[~free], text.tokens[~free])  # prompts, and turns of others
    assert_same_gradients(step_loss(bash, student, made), likelihood(student, made), student)


def test_the_probability_rises_by_the_step(method, make_config, student):
    config = make_config(method="bash", options={"first_fraction": 0.1, "fraction": 0.5})
    mixer = Mixer(config, student, 9)
    assert [round(mixer.fraction(step), 9) for step in (0, 2, 4, 8)] == [0.1, 0.2, 0.3, 0.5]
    assert Mixer(make_config(method="bash"), student, 9).fraction(5) == Options().fraction
    texts = documents()
    begun = method("bash", texts, first_fraction=0.0, fraction=1.0, round_steps=1)
    assert tokens_of(begun.tokens.produce(texts, 0)) == tokens_of(texts)
    assert tokens_of(begun.tokens.produce(texts, 11)) != tokens_of(texts)


def test_the_mean_over_rounds_is_the_expectation_over_every_context(method, student):
    """One token of context: with 1 - beta the text's, else each of 257 with the student's probability."""
    text, beta = Document(torch.tensor([40, 50, 60, 70]), 2), 0.7
    with torch.no_grad():
        probability = beta * logprobs(student, text.tokens)[1].exp()
        probability[60] += 1 - beta
        losses = []
        for token in range(257):
            tokens = torch.tensor([40, 50, token, 70])
            losses.append(float(likelihood(student, [Document(tokens, 2, labels=text.tokens[1:])])))
        losses = torch.tensor(losses, dtype=torch.float64)
        exact = float((probability * losses).sum())
        spread = float((probability * (losses - exact).square()).sum().sqrt())
        source = method("bash", [text], fraction=beta, round_steps=1, steps=300).tokens
        drawn = torch.stack([losses[int(source.produce([text], step)[0].tokens[2])] for step in range(300)])
    assert spread > 0.05
    assert abs(float(drawn.mean()) - exact) < 4 * spread / 300**0.5


# ------------------------------------------------------------------------------------------------------------ rac

TEMPLATE = " so:"


def test_a_correction_is_prompt_answer_template_and_reference(method, student):
    texts = documents()
    rac = method("rac", texts, share=1.0, template=TEMPLATE)
    made = rac.tokens.produce(texts, 0)
    template = byte_tokenizer()(TEMPLATE, add_special_tokens=False)["input_ids"]
    for text, new in zip(texts, made):
        prompt = int(text.counted.nonzero()[0]) + 1
        options = Written(max_new_tokens=7, stop_ids=(END,))
        seed = step_seed(0, 0, "student's text")
        answer = generate(
            student, [text.tokens[:prompt]], options, seed=seed, keys=keys([text])
        ).completions[0].tolist()
        answer = answer[:-1] if answer[-1] == END else answer
        expected = text.tokens[:prompt].tolist() + answer + template + text.tokens[prompt:].tolist()
        assert new.tokens.tolist() == expected
        labels = torch.where(new.counted, new.tokens[1:] if new.labels is None else new.labels, -100)
        reference = torch.where(text.counted, text.tokens[1:], -100)[prompt - 1 :]
        assert torch.equal(labels[-len(reference) :], reference) and bool((labels[: -len(reference)] == -100).all())
    assert_same_gradients(step_loss(rac, student, made), likelihood(student, made), student)


def test_an_answer_is_cut_to_what_is_left_and_a_full_text_stays(method):
    generator = torch.Generator().manual_seed(3)
    texts = [Document(torch.randint(1, 257, (length,), generator=generator), 3) for length in (10, 17, 20)]
    made = method("rac", texts, data={"max_length": 24}, share=1.0, template=TEMPLATE).tokens.produce(texts, 0)
    assert [len(new) for new in made] == [10 + 4 + 7, 24, 20]
    assert made[2] is texts[2]


def test_an_end_of_sequence_does_not_stay_in_the_answer(method):
    texts = [Document(torch.randint(1, 257, (12,), generator=torch.Generator().manual_seed(i)), 4) for i in range(300)]
    source = method("rac", texts, share=1.0, template=TEMPLATE, rollout={"temperature": 50.0}).tokens
    made = source._make(texts, 0)
    assert all(END not in new.tokens.tolist() for new in made)
    # An answer that had ended, of some eight.
    assert any(len(new) < len(text) + 4 + 7 for new, text in zip(made, texts))


def test_the_share_of_corrections_in_frequency(method):
    texts = [Document(torch.arange(1 + i, 13 + i), 3) for i in range(200)]
    source = method("rac", texts, share=0.3, template=TEMPLATE, rollout={"max_new_tokens": 1}, steps=40).tokens
    kinds = {}
    for begin in (0, 40):
        made = source._make(texts, begin)
        kinds[begin] = [len(new) > len(text) for new, text in zip(made, texts)]
        assert abs(sum(kinds[begin]) / 200 - 0.3) < 0.11
    assert kinds[0] != kinds[40]


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("bash", {"fraction": 0.0}, "options.fraction must be above 0, up to 1, got 0.0"),
    ("bash", {"first_fraction": -0.1}, "options.first_fraction must be at least 0, up to 1, got -0.1"),
    ("bash", {"round_steps": 0}, "options.round_steps must be at least 1, got 0"),
    ("rac", {"share": 0.0}, "options.share must be above 0, up to 1, got 0.0"),
    ("rac", {"round_steps": 0}, "options.round_steps must be at least 1, got 0"),
    (
        "rac", {"data": {"max_length": 17}},
        "data.max_length must be above 61, the tokens of the shortest text and the template, "
        "got 17; an answer of the student must fit as well",
    ),
    (
        "rac", {"texts": [Document(torch.arange(1, 9))]},
        "rollout.prompt_tokens must be given for texts without a prompt"
    ),
    (
        "bash", {"texts": [Document(torch.arange(1, 9), layout=(4, 4))]},
        "texts for method bash must be of one segment each, got packed"
    ),
])
def test_what_does_not_fit_is_refused(method, name, changes, message):
    with pytest.raises(ValueError, match=message):
        method(name, **changes)
