"""Text to documents to batches: nothing is lost, nothing is counted that should not be."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_trainer.config import DataConfig
from kd_trainer.data import Document, Plan, collate, data_fingerprint, deal, load_documents, read_texts
from kd_trainer.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(source=str(path))


def test_a_long_text_is_split_and_no_token_is_lost(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abcdefghij" * 5 + "!")
    documents = load_documents(DataConfig(source=str(tmp_path / "a.txt"), max_length=20), tokenizer)
    assert [len(document) for document in documents] == [20, 20, 11]
    assert tokenizer.decode(torch.cat([document.tokens for document in documents])) == "abcdefghij" * 5 + "!"
    assert all(document.counted.all() for document in documents)


def test_eos_is_appended_to_texts_and_completions(tmp_path, tokenizer):
    config = DataConfig(source=str(tmp_path / "a.jsonl"), append_eos=True)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}, {"prompt": "a", "completion": "b"}])
    decoded = sorted(tokenizer.decode(document.tokens) for document in load_documents(config, tokenizer))
    assert decoded == ["ab<end>", "abc<end>"]


def test_the_prompt_is_read_and_not_counted(tmp_path, tokenizer):
    config = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "2+2=", "completion": "4!"}])
    (document,) = load_documents(config, tokenizer)
    assert tokenizer.decode(document.tokens) == "2+2=4!"
    # rows 0..4 predict tokens 1..5; the completion is tokens 4 and 5
    assert document.counted.tolist() == [False, False, False, True, True]
    batch = collate([document], 16)
    assert batch.labels.tolist()[:3] == [-100] * 3 and tokenizer.decode(batch.labels[3:]) == "4!"
    assert batch.counted.tolist() == [3, 4]


def test_no_completion_token_left(tmp_path, tokenizer):
    config = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a long prompt", "completion": "x"}] * 2)
    with pytest.raises(ValueError, match="at least one completion token, got none in 2 texts .*raise data.max_length"):
        load_documents(DataConfig(source=config.source, max_length=8), tokenizer)
    (one,) = load_documents(DataConfig(source=config.source, max_length=14, limit=1), tokenizer)
    assert one.counted.sum() == 1


def test_selection_depends_on_content_alone(tmp_path, tokenizer):
    lines = [{"text": f"text number {i}"} for i in range(50)]
    one = write_jsonl(tmp_path / "a.jsonl", lines).source
    (tmp_path / "many").mkdir()
    write_jsonl(tmp_path / "many" / "b.jsonl", lines[25:])
    write_jsonl(tmp_path / "many" / "c.jsonl", lines[:25][::-1])

    def texts(source, **options):
        return [tokenizer.decode(d.tokens) for d in load_documents(DataConfig(source=source, **options), tokenizer)]

    assert texts(one) == texts(str(tmp_path / "many"))
    assert texts(one, limit=7) == texts(one)[:7]
    train, held_out = texts(one, holdout=0.3), texts(one, holdout=0.3, part="holdout")
    assert sorted(train + held_out) == sorted(texts(one)) and 5 < len(held_out) < 25


def test_every_kind_of_source(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.txt").write_text("hello")
    write_jsonl(tmp_path / "b.jsonl", [{"body": "hello"}])
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "hello"}\n\n')
    datasets.Dataset.from_dict({"text": ["hello"]}).save_to_disk(tmp_path / "d")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["hello"]})}).save_to_disk(tmp_path / "e")
    for config in (
        DataConfig(source=str(tmp_path / "a.txt")), DataConfig(source=str(tmp_path / "a*")),
        DataConfig(source=str(tmp_path / "b.jsonl"), text_field="body"),
        DataConfig(source=str(tmp_path / "c.jsonl.gz")),
        DataConfig(source=str(tmp_path / "d")), DataConfig(source=str(tmp_path / "e"), split="test"),
    ):
        assert [text.text for text in read_texts(config)] == ["hello"], config.source


@pytest.mark.parametrize(("name", "content", "error", "message"), [
    ("absent.txt", None, FileNotFoundError, "data.source must be an existing file or folder, got"),
    ("a.jsonl", "{}\n", ValueError, "a.jsonl:1 must be a record with a string 'text', or 'prompt' and 'completion'"),
    ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', ValueError, "a.jsonl:2 must be a record"),
    ("a.jsonl", "not json\n", ValueError, "a.jsonl:1 must be a line of JSON"),
    ("a.jsonl", "[1]\n", ValueError, "a.jsonl:1 must be a JSON object, got list"),
    ("a.bin", "x", ValueError, "data.source must be a file of kind .txt, .md"),
    ("empty.txt", " ", ValueError, "a source of at least one text, got none"),
    ("b*.txt", None, FileNotFoundError, "must match at least one file"),
])
def test_sources_that_are_wrong(tmp_path, tokenizer, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        load_documents(DataConfig(source=str(tmp_path / name)), tokenizer)


def test_a_name_that_no_hub_knows(tokenizer):
    with pytest.raises(FileNotFoundError, match="a datasets name with split 'train', got 'nobody/nothing'"):
        load_documents(DataConfig(source="nobody/nothing"), tokenizer)


def test_ids_outside_the_vocabulary(tmp_path, tokenizer):
    config = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    with pytest.raises(ValueError, match="token ids must be below the model's vocabulary of 10"):
        load_documents(config, tokenizer, vocab=10)


# ------------------------------------------------------------------------------------------------------ batches

lengths = st.lists(st.integers(2, 9), min_size=1, max_size=12)


def documents_of(sizes):
    start = 0
    documents = []
    for i, size in enumerate(sizes):
        documents.append(Document(torch.arange(start, start + size), first_target=1 + i % 2))
        start += size
    return documents


@given(lengths, st.booleans())
def test_rows_and_labels_of_a_batch_are_those_of_its_documents(sizes, packing):
    documents = documents_of(sizes)
    batch = collate(documents, 10, packing)
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.rows], torch.cat([document.tokens[:-1] for document in documents]))
    following = torch.cat([document.tokens[1:] for document in documents])
    counted = torch.cat([document.counted for document in documents])
    assert torch.equal(batch.labels, following.where(counted, torch.tensor(-100)))
    assert torch.equal(batch.counted, counted.nonzero().squeeze(1))
    expected = torch.cat([torch.arange(size - 1) for size in sizes])
    assert torch.equal(batch.position_ids.flatten()[batch.rows], expected)
    assert batch.input_ids.shape[1] <= 10
    if not packing:
        assert batch.input_ids.shape == (len(sizes), max(sizes))


def test_packing_shares_rows():
    batch = collate(documents_of([6, 4, 5, 5]), 10)
    assert batch.input_ids.shape == (2, 10)
    assert (batch.position_ids == 0).sum() == 4


@given(st.lists(st.integers(2, 9), min_size=1, max_size=30), st.integers(9, 40), st.integers(0, 5))
def test_a_plan_reads_every_document_once_an_epoch_whatever_the_order_of_questions(sizes, batch_tokens, seed):
    plan = Plan(sizes, batch_tokens, seed)
    steps = -(-3 * sum(sizes) // batch_tokens)
    stream = [i for step in range(steps) for i in plan.step(step)]
    for epoch in range(3):
        part = stream[epoch * len(sizes) : (epoch + 1) * len(sizes)]
        assert sorted(part) == list(range(len(sizes)))[: len(part)] or len(part) < len(sizes)
    assert len(stream) >= 3 * len(sizes)
    fresh = Plan(sizes, batch_tokens, seed)
    for step in reversed(range(steps)):
        assert fresh.step(step) == plan.step(step)
        assert 1 <= sum(sizes[i] for i in plan.step(step)) <= batch_tokens + max(sizes)


def test_seeds_give_other_orders():
    assert Plan([3] * 50, 30, 0).step(0) != Plan([3] * 50, 30, 1).step(0)
    assert Plan([3] * 50, 150, 0).step(0) != Plan([3] * 50, 150, 0).step(1)


def test_plans_that_cannot_be():
    with pytest.raises(ValueError, match="train.batch_tokens must be at least the longest document's 9 tokens, got 8"):
        Plan([3, 9], 8, 0)
    with pytest.raises(ValueError, match="large enough for 4 documents a step .* leaves a step with 1"):
        Plan([9, 9, 9], 9, 0).check_parts(3, 4)


@given(st.lists(st.integers(2, 9), min_size=4, max_size=12), st.integers(1, 4))
def test_dealing_gives_every_document_to_one_part(sizes, parts):
    documents = documents_of(sizes)
    dealt = deal(documents, parts)
    assert sorted(id(d) for part in dealt for d in part) == sorted(map(id, documents))
    assert all(dealt)
    loads = [sum(map(len, part)) for part in dealt]
    assert max(loads) - min(loads) <= max(sizes)


def test_the_fingerprint_of_data_sees_tokens_masks_and_order():
    base = [Document(torch.tensor([1, 2, 3])), Document(torch.tensor([4, 5]))]
    variants = [
        base[::-1], base[:1], [Document(torch.tensor([1, 2, 3]), 2), base[1]],
        [Document(torch.tensor([1, 2])), Document(torch.tensor([3, 4, 5]))],
    ]
    prints = {data_fingerprint(documents) for documents in (base, *variants)}
    assert len(prints) == 5
    assert data_fingerprint([Document(document.tokens.clone()) for document in base]) in prints
