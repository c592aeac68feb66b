"""Where tokens come from: writers, mixtures in frequency, two sources side by side, replay with its targets."""

from __future__ import annotations

import gc
import io
import math
from collections import Counter

import pytest
import torch

from kd_kernels import topk_targets
from kd_trainer import rollout
from kd_trainer.data import Document, Plan, collate
from kd_trainer.methods.base import DatasetTokens
from kd_trainer.models import CausalLM, dense_logits, load_pretrained
from kd_trainer.teachers import LiveTeacher
from kd_trainer.tokens import (
    KeptWriter, MixedTokens, RememberingTeacher, ReplayBuffer, SideBySide, Writer, check_prompts, prompt_length,
    uniform,
)

OPTIONS = rollout.Options(max_new_tokens=6, stop_ids=(0,), batch_size=3)


@pytest.fixture(scope="module")
def model(tiny) -> CausalLM:
    return CausalLM(load_pretrained(str(tiny)))


def documents(count: int, seed: int = 0) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 12, (count,), generator=generator).tolist()
    return [Document(torch.randint(1, 200, (length,), generator=generator), 3) for length in lengths]


def dataset(texts: list[Document]) -> DatasetTokens:
    return DatasetTokens(texts, Plan([len(text) for text in texts], 64, seed=0))


def same(one: Document, other: Document) -> bool:
    return torch.equal(one.tokens, other.tokens) and one.first_target == other.first_target


# ------------------------------------------------------------------------------------------------------ writers


def test_prompts_of_texts_chats_and_texts_without_one():
    tokens = torch.arange(8)
    assert prompt_length(Document(tokens, 5), 2) == 5
    assert prompt_length(Document(tokens, labels=torch.tensor([-100, -100, 3, 4, -100, 6, 7])), None) == 3
    assert prompt_length(Document(tokens), 2) == 2
    assert prompt_length(Document(tokens), 30) == 7  # something is left to be written
    check_prompts([Document(tokens, 5)], None)
    check_prompts([Document(tokens)], 2)
    message = "rollout.prompt_tokens must be given for texts without a prompt, got None, with 1 of 2 such"
    with pytest.raises(ValueError, match=message):
        check_prompts([Document(tokens, 5), Document(tokens)], None)
    with pytest.raises(ValueError, match="of one segment each, got packed sequences"):
        check_prompts([Document(tokens, 5, layout=(4, 4))], None)


def test_what_is_written_depends_on_the_text_the_step_and_the_seed_alone(model):
    texts = documents(5)
    writer = Writer(model, OPTIONS, seed=7, purpose="student")
    whole = writer.write(texts, 4)
    for text, written in zip(texts, whole):
        assert torch.equal(written.tokens[:3], text.tokens[:3]) and written.first_target == 3
        assert 1 <= int(written.counted.sum()) <= 6
    one_by_one = [writer.write([text], 4)[0] for text in reversed(texts)]
    assert all(map(same, whole, reversed(one_by_one)))
    for other in (
        writer.write(texts, 5), Writer(model, OPTIONS, seed=8, purpose="student").write(texts, 4),
        Writer(model, OPTIONS, seed=7, purpose="teacher").write(texts, 4),
    ):
        assert not any(map(same, whole, other))
    assert writer.write([], 4) == []


def test_a_kept_text_is_written_once_and_saved(model):
    class Counting(Writer):
        asked = 0

        def write(self, documents, step):
            self.asked += len(documents)
            return super().write(documents, step)

    texts = documents(4)
    inner = Counting(model, OPTIONS, seed=1, purpose="teacher")
    kept = KeptWriter(inner)
    first = kept.write([texts[0], texts[1], texts[0]], 0)
    again = kept.write(texts, 9)
    assert inner.asked == 4
    assert first[0] is first[2] is again[0] and first[1] is again[1]
    resumed = KeptWriter(Counting(model, OPTIONS, seed=99, purpose="another"))
    resumed.load_state(saved(kept.state()))
    assert all(map(same, resumed.write(texts, 0), again)) and resumed._writer.asked == 0


def saved(state: dict) -> dict:
    """Through a file, as a checkpoint does it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ----------------------------------------------------------------------------------------------------- mixtures


class Named:
    """Writes nothing but its own name, as a tag."""

    def __init__(self, name: str) -> None:
        self.name = name

    def write(self, documents, step):
        return [Document(document.tokens, document.first_target, tag=self.name) for document in documents]

    def state(self):
        return {"by": self.name}

    def load_state(self, state):
        assert state == {"by": self.name}


@pytest.mark.parametrize("each", ["step", "text"])
def test_the_mixture_has_its_shares(each):
    texts = documents(8)
    mixed = MixedTokens(
        dataset(texts), {"student": (Named("student"), 0.5), "teacher": (Named("teacher"), 0.2)}, seed=3, each=each
    )
    counts, kinds, steps = Counter(), Counter(), 3000
    for step in range(steps):
        origins = [mixed.origin(text, step) for text in texts]
        assert [document.tag for document in mixed.produce(texts, step)] == [origin or "main" for origin in origins]
        assert mixed.produce(texts[4:], step)[0].tag == (origins[4] or "main")  # whatever the split
        counts.update(origins[:1] if each == "step" else origins)
        kinds[len(set(origins))] += 1
    draws = sum(counts.values())
    for origin, share in (("student", 0.5), ("teacher", 0.2), (None, 0.3)):
        deviations = (counts[origin] - share * draws) / math.sqrt(draws * share * (1 - share))
        assert abs(deviations) < 4, (origin, counts)
    assert set(kinds) == {1} if each == "step" else kinds[3] > kinds[1]
    assert mixed.state() == {"student": {"by": "student"}, "teacher": {"by": "teacher"}}
    mixed.load_state(mixed.state())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_ends_of_the_mixture_are_pure(share):
    texts = documents(3)
    mixed = MixedTokens(dataset(texts), {"student": (Named("student"), share)}, seed=0)
    tags = {document.tag for step in range(300) for document in mixed.produce(texts, step)}
    assert tags == {"student" if share else "main"}


def test_uniform_numbers_are_uniform_and_independent():
    drawn = torch.tensor(
        [[uniform(5, step, "a"), uniform(5, step, "b"), uniform(5, step, "a", 17)] for step in range(4000)]
    )
    assert float(drawn.min()) >= 0.0 and float(drawn.max()) < 1.0
    for column in drawn.T:
        counts = torch.histc(column, 20, 0.0, 1.0)
        assert float(((counts - 200) ** 2 / 200).sum()) < 43.8  # chi-square, 19 degrees of freedom, 0.1 percent
    correlation = torch.corrcoef(drawn.T) - torch.eye(3)
    assert float(correlation.abs().max()) < 4 / math.sqrt(4000)


def test_another_data_set_beside_the_first():
    texts, others = documents(6), documents(9, seed=1)
    source = SideBySide(dataset(texts), others, "lm", batch_tokens=64, seed=0)
    seen = Counter()
    for step in range(40):
        chosen = source.step(step)
        seen.update(document.tag for document in chosen)
        assert [document.tag for document in source.produce(chosen, step)] == [document.tag for document in chosen]
        assert [d for d in chosen if d.tag == "main"] == dataset(texts).step(step)
        lm = sum(len(document) for document in chosen if document.tag == "lm")
        assert abs(lm - 64) <= 12  # a document more or less
    assert source.documents is texts and set(seen) == {"main", "lm"} and source.state() == {}
    assert source.produce([], 0) == []


# ------------------------------------------------------------------------------------------------------- replay


def test_the_buffer_keeps_the_newest_and_draws_evenly():
    texts, buffer = documents(9), ReplayBuffer(6)
    buffer.add(texts[:4])
    assert not buffer.is_full and len(buffer.draw(10, seed=0)) == 4
    buffer.add(texts[4:])
    assert buffer.is_full and list(buffer.documents) == texts[3:]
    counts = Counter()
    for seed in range(3000):
        drawn = buffer.draw(2, seed)
        assert len(set(map(id, drawn))) == 2
        counts.update(texts.index(document) for document in drawn)
    assert sorted(counts) == list(range(3, 9))
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 20.5  # chi-square, 5 degrees of freedom, 0.1 percent
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        ReplayBuffer(0)


class CountingTeacher(LiveTeacher):
    passes = 0

    def targets(self, batch):
        self.passes += 1
        return super().targets(batch)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_sequence_is_read_once_by_the_teacher(model, temperature):
    live, buffer, texts = CountingTeacher(model, "t"), ReplayBuffer(4), documents(5)
    teacher = RememberingTeacher(live, buffer, k=7, temperature=temperature)
    buffer.add(texts[:4])
    fresh = teacher.targets(collate(texts[:4], 32))
    assert live.passes == 1 and torch.is_tensor(fresh.hidden)  # what it has just read is exact
    assert len(buffer.targets) == 4

    batch = collate([texts[2], texts[0]], 32)
    replayed = teacher.targets(batch)
    assert live.passes == 1
    temperatures = (1.0, temperature) if temperature > 1 else (1.0,)
    truth = topk_targets(dense_logits(live.targets(batch)), 7, temperatures=temperatures)
    for row, counted in enumerate(batch.labels != -100):
        begin, end = replayed.offsets[row : row + 2].tolist()
        assert end - begin == (7 if counted else 0)
        if counted:
            assert torch.equal(replayed.ids[begin:end], truth.ids[7 * row : 7 * row + 7])
            torch.testing.assert_close(replayed.logprobs[begin:end], truth.logprobs[7 * row : 7 * row + 7])
            torch.testing.assert_close(replayed.tail_logprob[row], truth.tail_logprob[row])
            torch.testing.assert_close(replayed.log_z[row], truth.log_z[row])
    assert replayed.at_temperature(temperature).leading_shape == replayed.leading_shape

    before = live.passes
    teacher.targets(collate([texts[1], texts[4]], 32))  # one of them is no sequence of the buffer
    assert live.passes == before + 1 and texts[4] not in buffer.targets

    resumed = ReplayBuffer(4)
    resumed.load_state(saved(buffer.state()))
    for old, new in zip(buffer.documents, resumed.documents, strict=True):
        assert same(old, new) and old is not new
        one, other = buffer.targets[old], resumed.targets[new]
        assert one.temperatures == other.temperatures
        for name in ("ids", "logprobs", "offsets", "tail_logprob", "log_z"):
            assert torch.equal(getattr(one, name), getattr(other, name))

    buffer.add([texts[4]])
    del texts, batch, truth, fresh
    gc.collect()
    assert len(buffer.targets) == 3  # the targets of what made room are gone with it
