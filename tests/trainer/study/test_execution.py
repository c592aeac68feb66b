"""Execution: rows that tell queries apart, what counts as the same, and what a model may not do to the machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_trainer.study.execution import Table
from kd_trainer.study.scoring import Judge, Score
from kd_trainer.study.sql import OPERATORS, Condition, Query
from kd_trainer.study.wikisql import Question

COLUMNS = ("name", "team", "year")
GOLD = Query("name", "", (Condition("team", "=", "Reds"), Condition("year", ">", 1990)))
ROWS = [("Ann", "Reds", 1991), ("Bob", "Reds", 1989), ("Cid", "Blues", 1995), ("Émile", "Reds", 2000)]


@pytest.fixture
def by_hand() -> Table:
    return Table(COLUMNS, [GOLD], [ROWS])


def test_rows_by_hand(by_hand):
    assert by_hand.results(str(GOLD)) == [[("ann",), ("émile",)]]
    assert by_hand.results("SELECT AVG(year) FROM t WHERE team = 'reds'") == [[((1991 + 1989 + 2000) / 3,)]]


@pytest.mark.parametrize(("sql", "same"), [
    ("SELECT name FROM t WHERE year > 1990 AND team = 'Reds'", True),
    ("SELECT name FROM t WHERE team = 'rEDS' AND year > '1990';", True),
    ("SELECT name FROM t WHERE team = 'Reds' AND year >= 1991 ORDER BY year DESC", True),
    ("SELECT name FROM t WHERE team = 'Reds'", False),
    ("SELECT name FROM t WHERE year > 1990", False),
    ("SELECT team FROM t WHERE team = 'Reds' AND year > 1990", False),
    ("SELECT MAX(name) FROM t WHERE team = 'Reds' AND year > 1990", False),
    ("SELECT name, team FROM t WHERE team = 'Reds' AND year > 1990", False),
    ("SELECT nme FROM t", False),
    ("", False),
])
def test_agreement_by_hand(by_hand, sql, same):
    assert by_hand.agree(GOLD, sql) is same


def test_case_does_not_count_outside_ascii_either(by_hand):
    assert by_hand.results("SELECT year FROM t WHERE name = 'éMILE'") == [[(2000,)]]


@pytest.mark.parametrize("sql", [
    "DROP TABLE t", "DELETE FROM t", "INSERT INTO t VALUES (1, 2, 3)", "PRAGMA writable_schema = 1",
    "ATTACH 'x.db' AS x", "SELECT 1; SELECT 2", "SELECT '\x00", "SELECT '\ud800'",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT MAX(i) FROM n",
    f"SELECT COUNT(*) FROM {', '.join(f't t{i}' for i in range(30))}",
])
def test_a_query_only_reads_and_ends_soon(by_hand, sql):
    assert by_hand.results(sql) is None
    assert by_hand.results("SELECT COUNT(*) FROM t") == [[(4,)]]


VALUES = st.integers(-50, 2050) | st.sampled_from(["x", "Reds", "O'N"])
CONDITIONS = st.builds(Condition, st.sampled_from(COLUMNS), st.sampled_from(OPERATORS), VALUES)


def _one_a_column(conditions: list[Condition]) -> tuple[Condition, ...]:
    return tuple({condition.column: condition for condition in conditions}.values())


SOME = st.lists(CONDITIONS, min_size=1, max_size=3).map(_one_a_column)
QUERIES = st.builds(Query, st.sampled_from(COLUMNS), st.sampled_from(("", "COUNT")), SOME)


@given(QUERIES)
def test_seeded_rows_fulfil_a_query_and_tell_it_from_one_with_a_condition_less(query):
    table = Table.seeded("t1", COLUMNS, [query], 3)
    for rows in table.results(f"SELECT * {str(query)[str(query).index(' FROM'):]}"):
        assert 2 <= len(rows) <= 4
    for left_out in range(len(query.conditions)):
        fewer = Query(query.column, query.aggregate, query.conditions[:left_out] + query.conditions[left_out + 1 :])
        assert not table.agree(query, str(fewer)), fewer


def test_two_bounds_on_a_column_are_met():
    query = Query("name", "", (Condition("year", ">", 1990), Condition("year", "<", 1991)))
    assert all(Table.seeded("t1", COLUMNS, [query], 3).results(str(query)))


def test_seeded_rows_are_a_function_of_the_name():
    everything = "SELECT * FROM t"
    first, again, other = (Table.seeded(name, COLUMNS, [GOLD], 2).results(everything) for name in ("a", "a", "b"))
    assert first == again != other and first[0] != first[1]


def test_scores_are_fractions_of_the_answers():
    questions = [Question("a", COLUMNS, f"Question {i}?", GOLD) for i in range(4)]
    judge = Judge(questions, questions, databases=2)
    gold = str(GOLD)
    answers = [gold, gold.replace("1990", "'1990'"), "SELECT team FROM t", "no idea"]
    assert judge.score(answers) == Score(exact=0.25, execution=0.5, valid=0.75)
    with pytest.raises(ValueError):
        judge.score([gold])


def test_a_table_with_rows_of_its_own_is_asked_itself():
    question = Question("a", COLUMNS, "Who?", GOLD, tuple(ROWS[:2]))
    assert Judge([question], [question], databases=3).score(["SELECT name FROM t WHERE name = 'Ann'"]).execution == 1.0
