"""The queries of WikiSQL as SQL, both ways: one column, at most one aggregate, conditions joined by AND.

Zhong, Xiong and Socher, "Seq2SQL: Generating Structured Queries from Natural Language using Reinforcement Learning",
arXiv 1709.00103. Every query is over one table, which is called ``t`` here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
"""In the order in which WikiSQL numbers them."""
OPERATORS = ("=", ">", "<")
"""Likewise; its fourth, OP, is used by no query."""

_HEAD = re.compile(r"SELECT (?:(MAX|MIN|COUNT|SUM|AVG)\((\w+)\)|(\w+)) FROM t(?: WHERE (.+))?", re.DOTALL)
_CONDITION = re.compile(r"(\w+) ([=<>]) (?:'((?:[^']|'')*)'|(-?\d+(?:\.\d+)?))(?: AND |$)", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    column: str
    operator: str
    value: str | int | float

    def __str__(self) -> str:
        text = "'" + self.value.replace("'", "''") + "'" if isinstance(self.value, str) else str(self.value)
        return f"{self.column} {self.operator} {text}"


@dataclass(frozen=True)
class Query:
    column: str
    aggregate: str = ""
    conditions: tuple[Condition, ...] = ()

    def __str__(self) -> str:
        """The query as SQL."""
        selected = f"{self.aggregate}({self.column})" if self.aggregate else self.column
        where = f" WHERE {' AND '.join(map(str, self.conditions))}" if self.conditions else ""
        return f"SELECT {selected} FROM t{where}"


def parse(sql: str) -> Query | None:
    """The query that a text is, or None where it is not written as :meth:`Query.__str__` writes."""
    head = _HEAD.fullmatch(sql.strip())
    if head is None:
        return None
    aggregate, inside, plain, where = head.groups()
    conditions, end = [], 0
    while where is not None and end < len(where):
        found = _CONDITION.match(where, end)
        if found is None:
            return None
        column, operator, text, digits = found.groups()
        conditions.append(Condition(column, operator, number(digits) if text is None else text.replace("''", "'")))
        end = found.end()
    return Query(inside or plain, aggregate or "", tuple(conditions))


def number(digits: str) -> int | float:
    """The number that digits name; an integer where there is no fraction."""
    value = float(digits)
    return int(value) if value.is_integer() else value


def normalized(sql: str) -> str:
    """A text by which queries are compared: in lower case, with single spaces, conditions in one order, no semicolon.

    Case does not count inside of literals either, as in WikiSQL's own scorer.
    """
    text = " ".join(sql.strip().rstrip(";").split())
    query = parse(text)
    if query is not None:
        text = str(Query(query.column, query.aggregate, tuple(sorted(query.conditions, key=lambda c: str(c).lower()))))
    return text.lower()
