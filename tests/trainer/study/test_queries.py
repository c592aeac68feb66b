"""WikiSQL's queries as text and back, in all three forms that its records come in."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_trainer.study.sql import AGGREGATES, OPERATORS, Condition, Query, normalized, parse
from kd_trainer.study.wikisql import Question, column_names, question_of, read_questions

NAMES = st.from_regex(r"[a-z_]\w{0,8}", fullmatch=True)
VALUES = st.text() | st.integers(-(10**9), 10**9) | st.integers(-(10**6), 10**6).map(lambda n: n + 0.5)
CONDITIONS = st.builds(Condition, NAMES, st.sampled_from(OPERATORS), VALUES)
QUERIES = st.builds(Query, NAMES, st.sampled_from(AGGREGATES), st.lists(CONDITIONS, max_size=4).map(tuple))

STRUCTURED = {"sel": 1, "agg": 3, "conds": [[0, 0, "O'Neil AND Sons"], [2, 2, "1995"]]}
HEADER, TYPES = ["Player", "No.", "Year"], ["text", "text", "real"]
GOLD = "SELECT COUNT(c_no) FROM t WHERE player = 'O''Neil AND Sons' AND year < 1995"


@given(QUERIES)
def test_what_is_written_is_read_back(query):
    assert parse(str(query)) == query


@pytest.mark.parametrize("text", [
    "", "SELECT", "SELECT a FROM s", "SELECT a, b FROM t", "SELECT MEDIAN(a) FROM t", "SELECT a FROM t WHERE ",
    "SELECT a FROM t WHERE b = 'c", 'SELECT a FROM t WHERE b = "var1"', "SELECT a FROM t WHERE b = 'c' = 21",
    "SELECT a FROM t WHERE b = 1 OR c = 2", "SELECT a FROM t WHERE b LIKE 'c'", "SELECT a FROM t WHERE b = 'c' AND",
])
def test_what_wikisql_never_writes_is_no_query(text):
    assert parse(text) is None


@pytest.mark.parametrize(("one", "other", "equal"), [
    ("SELECT a FROM t WHERE b = 'X y' AND c > 2", " select  a from t\nwhere B = 'x Y' and c > 2;", True),
    ("SELECT a FROM t WHERE b = 'X' AND c > 2", "SELECT a FROM t WHERE C > 2 AND b = 'x' ;", True),
    ("SELECT a FROM t WHERE b = 'X'", "select a from t where b = 'x'", True),
    ("SELECT a FROM t WHERE b = 2", "SELECT a FROM t WHERE b = 2.0", True),
    ("SELECT a FROM t WHERE b = 2", "SELECT a FROM t WHERE b = '2'", False),
    ("SELECT MAX(a) FROM t", "SELECT a FROM t", False),
    ("SELECT a FROM t WHERE b > 2", "SELECT a FROM t WHERE b < 2", False),
])
def test_normalised_texts(one, other, equal):
    assert (normalized(one) == normalized(other)) is equal


@pytest.mark.parametrize("conditions", [
    STRUCTURED["conds"],
    {"column_index": [0, 2], "operator_index": [0, 2], "condition": ["O'Neil AND Sons", "1995"]},
])
def test_structured_records(conditions):
    table = {"id": "1-2", "header": HEADER, "types": TYPES, "rows": [["a", "1", 1990]]}
    found = question_of({"question": " How  many? ", "table": table, "sql": STRUCTURED | {"conds": conditions}}, "here")
    assert found.table == "1-2" and found.words == "How many?" and found.rows == (("a", "1", 1990),)
    assert str(found.query) == GOLD and found.columns == ("player", "c_no", "year")


def test_a_release_with_its_tables_beside_it(tmp_path):
    record = {"phase": 1, "table_id": "1-2", "question": "How many?", "sql": STRUCTURED}
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps(record) + "\n")
    with gzip.open(tmp_path / "train.tables.jsonl.gz", "wt") as file:
        file.write(json.dumps({"id": "1-2", "header": HEADER, "types": TYPES, "rows": []}) + "\n")
    (found,) = read_questions(str(tmp_path), "train")
    assert str(found.query) == GOLD and found.rows is None


def test_a_datasets_folder(tmp_path):
    import datasets

    record = {"table_id": "1-2", "columns": ["a", "b"], "question": "Which?", "sql": "SELECT a FROM t WHERE b = 2"}
    parts = {name: datasets.Dataset.from_list([record]) for name in ("train", "validation")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    for part in ("train", "dev"):
        (found,) = read_questions(str(tmp_path / "saved"), part)
        assert str(found.query) == record["sql"]


def test_damaged_queries_are_left_out_and_damaged_records_refused(tmp_path):
    good = {"table_id": "1", "columns": ["a"], "question": "Which?", "sql": "SELECT a FROM t"}
    lines = [good, good | {"sql": 'SELECT a FROM t WHERE a = "var1"'}]
    file = tmp_path / "dev.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(read_questions(str(tmp_path), "dev")) == 1
    file.write_text(json.dumps(lines[1]))
    with pytest.raises(ValueError, match="study: --data must be a source of WikiSQL's questions, got none in .*dev"):
        read_questions(str(tmp_path), "dev")
    file.write_text(json.dumps({"question": "Which?", "sql": "SELECT a FROM t"}))
    with pytest.raises(ValueError, match=r"study: .*dev.jsonl:1 must be a question of WikiSQL .*'table_id'"):
        read_questions(str(tmp_path), "dev")
    file.write_text(json.dumps(good) + "\n{")
    with pytest.raises(ValueError, match=r"study: .*dev.jsonl:2 must be a line of JSON"):
        read_questions(str(tmp_path), "dev")


def test_column_names_are_sql_and_differ():
    names = column_names(["Text/background colour", "No.", "1995", "Points", "Points", "2", "", "", "Group", "№"])
    assert names[:5] == ("text_background_colour", "c_no", "c_1995", "points", "points_1")
    assert names[8] == "c_group" and len(set(names)) == len(names)


def test_a_completion_spells_values_as_the_question_does():
    values = Condition("b", "=", "south (australia)"), Condition("c", "=", "Absent"), Condition("d", ">", 2)
    query = Query("a", "", values)
    question = Question("1", ("a", "b", "c", "d"), "Notes for South (Australia) above 2?", query)
    assert question.completion == " SELECT a FROM t WHERE b = 'South (Australia)' AND c = 'Absent' AND d > 2"
    assert question.prompt == "table: a, b, c, d\nquestion: Notes for South (Australia) above 2?\nsql:"
    assert normalized(question.completion) == normalized(str(query))
