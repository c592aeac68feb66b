"""Records other than plain texts: chats by the tokenizer's template, token ids with labels, packed sequences."""

from __future__ import annotations

import json

import pytest
import torch

from kd_trainer.config import DataConfig
from kd_trainer.data import collate, data_fingerprint, load_documents
from kd_trainer.models import CausalLM, load_pretrained
from kd_trainer.tiny import byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% if loop.last or message.role == 'user' %}{{ message.content }}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EXCHANGE = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def load(path, tokenizer, *records, **options):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_documents(DataConfig(source=str(path), **options), tokenizer)


def learned(tokenizer, document) -> str:
    return tokenizer.decode(document.tokens[1:][document.counted])


def test_a_chat_is_written_by_the_template_and_the_assistant_is_learned(tmp_path, tokenizer):
    chat = EXCHANGE + [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "two"}]
    (document,) = load(tmp_path / "a.jsonl", tokenizer, {"messages": chat})
    whole = "<user>2+2?<end><assistant>4<end><user>1+1?<end><assistant>two<end>"
    assert tokenizer.decode(document.tokens) == whole
    assert learned(tokenizer, document) == "4<end>two<end>"
    batch = collate([document], 128)
    assert tokenizer.decode(batch.labels[batch.counted]) == "4<end>two<end>"


def test_prompt_and_completion_can_be_messages(tmp_path, tokenizer):
    (one,) = load(tmp_path / "a.jsonl", tokenizer, {"prompt": EXCHANGE[:1], "completion": EXCHANGE[1:]})
    (other,) = load(tmp_path / "b.jsonl", tokenizer, {"messages": EXCHANGE})
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.counted, other.counted)
    assert data_fingerprint([one]) == data_fingerprint([other])


def test_a_chat_is_cut_and_left_out_where_no_token_counts(tmp_path, tokenizer):
    records = [{"messages": EXCHANGE}, {"messages": [{"role": "user", "content": "x" * 90}, EXCHANGE[1]]}]
    (document,) = load(tmp_path / "a.jsonl", tokenizer, *records, max_length=30)
    assert learned(tokenizer, document) == "4<end>"


def test_masks_are_part_of_the_fingerprint(tmp_path, tokenizer):
    (masked,) = load(tmp_path / "a.jsonl", tokenizer, {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]})
    (whole,) = load(tmp_path / "b.jsonl", tokenizer, {"input_ids": [1, 2, 3]})
    assert torch.equal(masked.tokens, whole.tokens) and data_fingerprint([masked]) != data_fingerprint([whole])


@pytest.mark.parametrize(("template", "messages", "message"), [
    (None, EXCHANGE, "the tokenizer's chat template must be there for records of messages, got none"),
    (FORGETFUL, EXCHANGE + EXCHANGE, "must be one that writes a message the same whatever follows"),
    ("{{ raise_exception('roles must alternate') }}", EXCHANGE, "messages must fit the chat template, got roles must"),
])
def test_templates_that_cannot_be_used(tmp_path, tokenizer, template, messages, message):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"tokenize: .*{message}"):
        load(tmp_path / "a.jsonl", tokenizer, {"messages": messages})


@pytest.mark.parametrize(("record", "message"), [
    ({"messages": "hello"}, "messages must be a list of messages, each with a role, got 'hello'"),
    ({"messages": EXCHANGE[:1]}, "must be messages with at least one of role assistant, got \\['user'\\]"),
    ({"input_ids": [1, 2.5]}, "input_ids must be a list of integers"),
    ({"input_ids": [1]}, "input_ids must be at least two ids"),
    ({"input_ids": [1, -4]}, "input_ids must be at least two ids, none below 0"),
    (
        {"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
        "labels must be 3 ids, each that of input_ids .*not shifted here",
    ),
    ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "labels must be 3 ids"),
    ({"input_ids": [1, 2, 3], "seq_lengths": [1, 1]}, "seq_lengths must be positive lengths that add up to 3"),
    ({"input_ids": [1] * 9}, "data.max_length must be at least the 9 ids of a record, got 8"),
    ({"other": 1}, "must be a record with a string 'text', .* got keys other"),
])
def test_records_that_are_refused(tmp_path, tokenizer, record, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.jsonl", tokenizer, record, max_length=8)


def test_a_packed_sequence_is_read_as_its_documents_are(tmp_path, tiny, tokenizer):
    """Every counted row of the pack is the row of the document alone; what follows a boundary does not count."""
    parts = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15]]
    (pack,) = load(tmp_path / "a.jsonl", tokenizer, {"input_ids": sum(parts, []), "seq_lengths": [4, 2, 5]})
    assert pack.layout == (4, 2, 5)
    assert pack.counted.tolist() == [True] * 3 + [False] + [True] + [False] + [True] * 4
    model = CausalLM(load_pretrained(str(tiny)).double())
    packed = model.hidden(collate([pack], 16))[pack.counted]
    alone = [model.hidden(collate(load(tmp_path / "b.jsonl", tokenizer, {"input_ids": part}), 16)) for part in parts]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-9)


def test_one_segment_is_no_layout(tmp_path, tokenizer):
    (document,) = load(tmp_path / "a.jsonl", tokenizer, {"input_ids": [1, 2, 3], "seq_lengths": [3]})
    assert document.layout is None and document.labels is None
