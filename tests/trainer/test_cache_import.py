"""What servers answer becomes the same rows in every form; what servers do to rows is put right or refused, by name."""

from __future__ import annotations

import copy
import gzip
import json
import math
import random

import pytest
import torch

from kd_kernels.cache import CacheReader
from kd_trainer.caching.importing import ImportOptions, import_cache
from kd_trainer.caching.refused import Refused
from kd_trainer.caching.served import Reader, Row
from kd_trainer.caching.token_names import TokenNames
from kd_trainer.cli import main
from kd_trainer.tiny import byte_tokenizer

K = 4
TOKENIZER = byte_tokenizer()
TEXT = "the small cat"
TOKENS = TOKENIZER(TEXT)["input_ids"]
LETTERS = TOKENIZER("abcdefghijklmnopqrstuvwxyz ")["input_ids"]


def made_up_rows(seed: int = 0) -> list[dict[int, float]]:
    """The K likeliest ids of every row, likeliest first; the token that follows is among them in every other row."""
    draw = random.Random(seed)
    rows = []
    for i, following in enumerate(TOKENS[1:]):
        others = draw.sample([token for token in LETTERS if token != following], K)
        ids = [following, *others[1:]] if i % 2 else others
        draw.shuffle(ids)
        rows.append({token: math.log(p) for token, p in zip(ids, (0.5, 0.25, 0.125, 0.0625))})
    return rows


ROWS = made_up_rows()
FOLLOWING = [row.get(token, math.log(0.01)) for row, token in zip(ROWS, TOKENS[1:])]


def char(token: int) -> str:
    return TOKENIZER.decode([token])


def own() -> dict:
    return {
        "input_ids": TOKENS, "top_ids": [list(row) for row in ROWS],
        "top_logprobs": [list(row.values()) for row in ROWS], "next_logprobs": FOLLOWING,
    }


def vllm() -> dict:
    """Keys are strings, as JSON has them; the prompt's own token is there whether it is among the K or not."""
    listed = [
        {str(t): {"logprob": value, "decoded_token": char(t)} for t, value in ({following: given} | row).items()}
        for row, following, given in zip(ROWS, TOKENS[1:], FOLLOWING)
    ]
    return {"prompt_token_ids": TOKENS, "prompt_logprobs": [None, *listed]}


def content(skip: int) -> list[dict]:
    def top(row: dict[int, float]) -> list[dict]:
        return [{"token": char(t), "bytes": list(char(t).encode()), "logprob": value} for t, value in row.items()]

    said = list(zip(TOKENS[1:], FOLLOWING, ROWS))[skip:]
    return [{"token": char(t), "bytes": None, "logprob": value, "top_logprobs": top(row)} for t, value, row in said]


def chat() -> dict:
    response = {"choices": [{"logprobs": {"content": content(0)}}]}
    return {"request": {"prompt_token_ids": TOKENS[:1]}, "response": response}


def batch_api() -> dict:
    """As the batch API files it."""
    answer = {"status_code": 200, "body": chat()["response"]}
    return {"custom_id": "7", "request": chat()["request"], "response": answer}


def echoed(named=char) -> dict:
    logprobs = {
        "tokens": [named(token) for token in TOKENS], "token_logprobs": [None, *FOLLOWING],
        "top_logprobs": [None, *({named(token): value for token, value in row.items()} for row in ROWS)],
    }
    return {"choices": [{"logprobs": logprobs}]}


def by_token_id() -> dict:
    return echoed(lambda token: f"token_id:{token}")


FORMS = {form.__name__: form for form in (own, vllm, chat, batch_api, echoed, by_token_id)}


def read(record: dict, k: int = K):
    reader = Reader(TOKENIZER, len(TOKENIZER), k)
    (scored,) = reader.read(record)
    return scored, reader.notes


def assert_is_the_truth(scored) -> None:
    assert scored.tokens == TOKENS and len(scored.rows) == len(ROWS)
    for found, row, following in zip(scored.rows, ROWS, FOLLOWING):
        assert dict(zip(found.ids, found.logprobs)) == pytest.approx(row)
        assert found.tail_logprob == pytest.approx(math.log(0.0625)) and found.next_logprob == pytest.approx(following)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_the_same_rows(form):
    assert_is_the_truth(read(FORMS[form]())[0])


# -------------------------------------------------------------------------------------------------------- put right


def changed(record: dict, change) -> dict:
    """A copy of a record, with something done to it."""
    record = copy.deepcopy(record)
    change(record)
    return record


def unfilled(record):
    for listed in record["prompt_logprobs"][1:]:
        listed["-1"] = {"logprob": None}
        listed["200"] = {"logprob": -9999.0}


def without_the_first_position(record):
    del record["prompt_logprobs"][0]


def with_a_row_after_the_last_token(record):
    record["prompt_logprobs"].append(record["prompt_logprobs"][1])


def with_rows_of_one_token_twice(record):
    for ids, values in zip(record["top_ids"], record["top_logprobs"]):
        ids.append(ids[0])
        values.append(values[0] + 1e-4)


def with_a_null_row_first(record):
    for name in ("top_ids", "top_logprobs"):
        record[name].insert(0, None)


@pytest.mark.parametrize("form, change, note, times", [
    (vllm, lambda record: None, "rows of k + 1 entries", (len(ROWS) + 1) // 2),
    (vllm, unfilled, "unfilled slots dropped", 2 * len(ROWS)),
    (vllm, without_the_first_position, "lists without their first position", 1),
    (vllm, with_a_row_after_the_last_token, "a row after the last token dropped", 1),
    (own, with_rows_of_one_token_twice, "duplicated tokens dropped", len(ROWS)),
    (own, with_a_null_row_first, None, 0),
])
def test_what_servers_are_known_to_do_is_undone_and_counted(form, change, note, times):
    scored, notes = read(changed(form(), change))
    assert_is_the_truth(scored)
    assert note is None or {name: count for name, count in notes.items() if name.startswith(note)}.popitem()[1] == times


def test_rows_that_a_server_left_out_are_left_out():
    record = own()
    record["top_ids"][3] = record["top_logprobs"][5] = None
    record["top_logprobs"][3] = None
    record["top_ids"][5] = None
    scored, notes = read(record)
    assert [i for i, row in enumerate(scored.rows) if row is None] == [3, 5]
    assert notes["rows without log-probabilities left out"] == 2


def test_a_prompt_without_log_probabilities_has_no_rows_and_the_answer_has():
    record = {"prompt_token_ids": TOKENS[:5], "choices": [{"logprobs": {"content": content(4)}}]}
    scored, _ = read(record)
    assert scored.tokens == TOKENS and scored.rows[:4] == [None] * 4
    assert all(isinstance(row, Row) for row in scored.rows[4:])


def test_a_row_of_mass_one_has_no_tail():
    record = {"input_ids": TOKENS[:2], "top_ids": [[1, 2]], "top_logprobs": [[math.log(0.75), math.log(0.2501)]]}
    assert read(record)[0].rows[0].tail_logprob == -math.inf


# ---------------------------------------------------------------------------------------------------------- refused


def shifted(record):
    for name in ("top_ids", "top_logprobs"):
        record[name] = record[name][1:] + record[name][:1]


def shifted_by_one(record):
    record["prompt_logprobs"] = [None, *record["prompt_logprobs"][2:], record["prompt_logprobs"][1]]


def set_first(name, value):
    def change(record):
        record[name][0] = value

    return change


def set_item(value):
    def change(record):
        record["top_logprobs"][0][0] = value

    return change


def said_first(text):
    def change(record):
        record["choices"][0]["logprobs"]["tokens"][0] = text

    return change


def keep(*names):
    return lambda record: [record.pop(name) for name in list(record) if name not in names]


REFUSED = [
    (own, shifted, "rows that contradict the log-probability of the token that follows"),
    (own, lambda r: r["top_ids"].pop(), "top_ids and top_logprobs that are no lists of one length"),
    (own, lambda r: (r["top_ids"].pop(), r["top_logprobs"].pop()), "rows shifted or missing"),
    (own, lambda r: r["next_logprobs"].pop(), "next_logprobs that are not one a row"),
    (own, set_first("top_ids", [1, 2]), "a row with other than one log-probability an id"),
    (own, set_first("input_ids", 257), "input_ids that are no list of ids below 257"),
    (own, set_first("top_ids", [257, 1, 2, 3]), "an id that is not below the vocabulary of 257"),
    (own, set_item(0.5), "a log-probability that is no number up to 0"),
    (own, set_item(math.nan), "a log-probability that is no number up to 0"),
    (own, set_item(-0.1), "rows whose probabilities add up to more than 1"),
    (own, lambda r: (r["top_ids"][0].append(r["top_ids"][0][0]), r["top_logprobs"][0].append(-3.0)),
     "one id with two log-probabilities"),
    (own, lambda r: (r["top_ids"][0].append(3), r["top_logprobs"][0].append(-9.0)), "rows of more entries than --k"),
    (vllm, shifted_by_one, "prompt_logprobs shifted, missing or of another text"),
    (vllm, lambda r: r["prompt_logprobs"].pop(4), "prompt_logprobs shifted, missing or of another text"),
    (vllm, lambda r: r["prompt_logprobs"][1].update(the={"logprob": -1.0}), "prompt_logprobs by text, not by id"),
    (vllm, keep("prompt_token_ids"), "a record without log-probabilities"),
    (echoed, lambda r: r["choices"][0]["logprobs"].pop("top_logprobs"), "an answer without top_logprobs"),
    (echoed, said_first("\ufffd"), "a token whose text is no UTF-8"),
    (echoed, said_first("cat"), "a token that the tokenizer does not have"),
    (batch_api, lambda r: r["response"].update(status_code=429), "an answer that is an error"),
    (batch_api, lambda r: r.update(error={"message": "no"}), "an answer that is an error"),
    (chat, lambda r: r["response"].update(choices=3), "a record of an unknown form"),
    (chat, lambda r: r.update(response=[]), "a request or answer that is no JSON object"),
]


@pytest.mark.parametrize("form, change, reason", REFUSED)
def test_what_cannot_be_put_right_is_refused_by_name(form, change, reason):
    with pytest.raises(Refused) as refused:
        read(changed(form(), change))
    assert refused.value.reason.startswith(reason), refused.value


def test_a_record_that_is_no_object_is_refused():
    with pytest.raises(Refused, match="no JSON object: list"):
        read([])


def test_names_of_tokens():
    names = TokenNames(TOKENIZER)
    (space,) = TOKENIZER(" ")["input_ids"]
    assert names.id_of(" ") == names.id_of(None, [0x20]) == space and names.id_of("<end>") == 0
    assert names.id_of("bytes:\\xe2") == names.id_of(None, [0xE2]) and names.id_of("token_id:17") == 17
    with pytest.raises(Refused, match="a token without text, bytes or id"):
        names.id_of(None)


def test_a_name_that_several_ids_have_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([" "])  # beside the piece that a byte-level vocabulary writes as another character
    for name in ({"text": " "}, {"text": None, "data": [0x20]}):
        with pytest.raises(Refused, match="a token whose name several ids have"):
            TokenNames(tokenizer).id_of(**name)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def tokenizer(tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def write(path, records):
    data = "".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_rows_are_in_the_cache_as_they_were_served(tmp_path, tokenizer, suffix):
    file = write(tmp_path / f"served{suffix}", [vllm(), "\n", own()])
    found = import_cache([file], tokenizer, "model@1", tmp_path / "c", ImportOptions(k=K, step_nats=0))
    assert found.counts["sequences added"] == 1 and found.counts["sequences that were there already"] == 1
    reader = CacheReader(tmp_path / "c")
    assert reader.manifest.teacher == "model@1" and len(reader) == 1
    rows = reader.lookup(torch.tensor(TOKENS))
    for i, row in enumerate(ROWS):
        one = rows.slice(i, i + 1)
        assert dict(zip(one.targets.ids.tolist(), one.targets.logprobs.tolist())) == pytest.approx(row)
        assert float(one.next_logprobs) == pytest.approx(FOLLOWING[i])


def test_a_refused_record_stops_the_import_with_its_place_or_is_counted(tmp_path, tokenizer):
    file = write(tmp_path / "served.jsonl", [own(), '{"torn', "\n"])
    with pytest.raises(ValueError, match=r"served.jsonl:2 must be a record .*, got a line that is no JSON"):
        import_cache([file], tokenizer, "model@1", tmp_path / "c", ImportOptions(k=K))
    found = import_cache([file], tokenizer, "model@1", tmp_path / "c", ImportOptions(k=K, skip_refused=True))
    assert found.refused == {"a line that is no JSON": 1} and found.counts["sequences that were there already"] == 1
    assert "served.jsonl:2" in found.table()


def test_a_row_that_the_cache_does_not_take_is_refused(tmp_path, tokenizer):
    nothing = {"input_ids": TOKENS[:2], "top_ids": [None], "top_logprobs": [None]}
    file = write(tmp_path / "served.jsonl", [nothing])
    with pytest.raises(ValueError, match="a sequence without a single row"):
        import_cache([file], tokenizer, "model@1", tmp_path / "c", ImportOptions(k=K))


def test_arguments_that_do_not_fit(tmp_path, tokenizer):
    file = write(tmp_path / "served.jsonl", [own()])
    with pytest.raises(FileNotFoundError, match="import_cache: files must exist, got .*nowhere"):
        import_cache([tmp_path / "nowhere"], tokenizer, "m", tmp_path / "c", ImportOptions(k=K))
    with pytest.raises(ValueError, match="--teacher must be a name that is not empty"):
        import_cache([file], tokenizer, " ", tmp_path / "c", ImportOptions(k=K))


def test_the_command_and_the_data_that_it_writes(tmp_path, tokenizer, capsys):
    """The file of tokens is what ``kdk train`` reads: its labels leave out the rows that were not served."""
    record = own()
    record["top_ids"][2] = record["top_logprobs"][2] = None
    file = write(tmp_path / "served.jsonl", [record])
    data = tmp_path / "data.jsonl"
    assert main([
        "cache", "import", str(file), "--out", str(tmp_path / "c"), "--tokenizer", tokenizer, "--teacher", "model@1",
        "--k", str(K), "--write-data", str(data),
    ]) == 0
    assert "sequences added" in capsys.readouterr().out
    (line,) = map(json.loads, data.read_text().splitlines())
    assert line["input_ids"] == TOKENS
    assert line["labels"] == [-100, *TOKENS[1:3], -100, *TOKENS[4:]]
