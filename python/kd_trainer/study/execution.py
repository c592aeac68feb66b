"""Whether two queries say the same of a table: both are run by SQLite on rows that tell queries apart.

A comparison of texts calls a number in quotes wrong, or ``>= 3`` for ``> 2``; a run on the table's rows does not, but
calls right what agrees by chance. A table that comes without rows (the flat form of WikiSQL) gets several databases,
made of its gold queries by a seed, so that chance must strike in all of them (Zhong, Yu and Klein, "Semantic Evaluation
for Text-to-SQL with Distilled Test Suites", arXiv 2010.02840). Each query has rows in them that fulfil its conditions,
and for every condition a row that breaks this one alone.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterable, Sequence

from kd_trainer.study.sql import Condition, Query

STEPS = 100_000
"""Of SQLite's machine that a query may take; a model can write a join of the table with itself."""
READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
Value = str | int | float
Row = tuple[Value | None, ...]


class Table:
    """Databases of one table ``t``, in memory.

    Args:
        columns: names of the columns.
        queries: whose literals say which columns are numbers: those that are compared with numbers alone, and those
            that are summed or averaged and compared with nothing.
        databases: the rows of each.
    """

    def __init__(self, columns: Sequence[str], queries: Sequence[Query], databases: Iterable[Sequence[Row]]) -> None:
        numeric = numeric_columns(queries)
        kinds = ", ".join(f'"{name}" {"NUMERIC" if name in numeric else "TEXT COLLATE ANY_CASE"}' for name in columns)
        self._connections = []
        for rows in databases:
            connection = sqlite3.connect(":memory:")
            connection.create_collation("ANY_CASE", _compare)  # SQLite's own NOCASE knows ASCII alone
            connection.execute(f"CREATE TABLE t ({kinds})")
            connection.executemany(f"INSERT INTO t VALUES ({', '.join('?' * len(columns))})", rows)
            connection.set_authorizer(_permission)
            self._connections.append(connection)

    @classmethod
    def seeded(cls, name: str, columns: Sequence[str], queries: Sequence[Query], count: int) -> Table:
        """``count`` databases of made-up rows, a function of the table's name and queries."""
        made = (seeded_rows(random.Random(f"{name}/{i}"), columns, queries) for i in range(count))
        return cls(columns, queries, made)

    def results(self, sql: str) -> list[list[tuple]] | None:
        """What a query returns on each database, as :func:`execute` does; None where it is refused on one."""
        found = [execute(connection, sql) for connection in self._connections]
        return None if None in found else found

    def agree(self, gold: Query, sql: str) -> bool:
        """Whether a text returns on every database what the gold query does."""
        expected = self.results(str(gold))
        return expected is not None and expected == self.results(sql)


def execute(connection: sqlite3.Connection, sql: str) -> list[tuple] | None:
    """The rows that a query returns, sorted and with text in lower case; None where SQLite refuses it."""
    connection.set_progress_handler(lambda: 1, STEPS)
    try:
        rows = connection.execute(sql).fetchall()
    except (sqlite3.Error, sqlite3.Warning, ValueError):  # the last: a NUL, or half of a surrogate pair
        return None
    finally:
        connection.set_progress_handler(None, 0)
    plain = [tuple(value.lower() if isinstance(value, str) else value for value in row) for row in rows]
    return sorted(plain, key=repr)


def _permission(action: int, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in READING else sqlite3.SQLITE_DENY


def _compare(one: str, other: str) -> int:
    one, other = one.lower(), other.lower()
    return (one > other) - (one < other)


# ------------------------------------------------------------------------------------------------------ seeded rows


def numeric_columns(queries: Sequence[Query]) -> set[str]:
    """Columns that hold numbers, as far as queries say."""
    compared: dict[str, bool] = {}
    for condition in (condition for query in queries for condition in query.conditions):
        compared[condition.column] = compared.get(condition.column, True) and not isinstance(condition.value, str)
    counted = {query.column for query in queries if query.aggregate in ("MAX", "MIN", "SUM", "AVG")}
    return {column for column, numeric in compared.items() if numeric} | (counted - compared.keys())


def seeded_rows(draw: random.Random, columns: Sequence[str], queries: Sequence[Query]) -> list[Row]:
    """Rows on which the queries of a table return something, and other queries something else.

    For each query, 2 to 4 rows that fulfil its conditions and one for each condition that breaks it alone. All other
    values are drawn: numbers from 1 to 999, texts no two of which are equal.
    """
    numeric = numeric_columns(queries)
    texts = iter(range(10**9))

    def fresh(column: str) -> Value:
        return draw.randint(1, 999) if column in numeric else f"{column} {next(texts)}"

    rows = []
    for query in queries:
        broken = [None] * draw.randint(2, 4) + list(query.conditions)
        for one in broken:
            row = {column: fresh(column) for column in columns}
            for column in {condition.column for condition in query.conditions}:
                if one is None or one.column != column:
                    row[column] = fulfilling(draw, [c for c in query.conditions if c.column == column])
                else:
                    row[column] = breaking(draw, one, row[column])
            rows.append(tuple(row[column] for column in columns))
    draw.shuffle(rows)
    return rows


def fulfilling(draw: random.Random, conditions: Sequence[Condition]) -> Value:
    """A value for which all conditions on its column hold, where there is one."""
    bounds: dict[str, Value] = {condition.operator: condition.value for condition in conditions}
    if "=" in bounds:
        return bounds["="]
    if any(isinstance(value, str) for value in bounds.values()):
        return f"{bounds['>']}{draw.choice('abc')}" if ">" in bounds else ""
    if len(bounds) == 2:
        return bounds[">"] + (bounds["<"] - bounds[">"]) * draw.choice((0.25, 0.5, 0.75))
    distance = draw.randint(1, 50)
    return bounds[">"] + distance if ">" in bounds else bounds["<"] - distance


def breaking(draw: random.Random, condition: Condition, other: Value) -> Value:
    """A value for which a condition does not hold; ``other`` where it asks for equality."""
    if condition.operator == "=":
        return other if other != condition.value else f"{other}'"
    if isinstance(condition.value, str):
        return "" if condition.operator == ">" else f"{condition.value}{draw.choice('abc')}"
    distance = draw.randint(0, 50)
    return condition.value - distance if condition.operator == ">" else condition.value + distance
