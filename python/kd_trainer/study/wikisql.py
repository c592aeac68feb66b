"""WikiSQL: questions about a table, with the queries that answer them, as prompts and completions.

Three forms are read. A flat one (``{"table_id", "columns", "question", "sql": text}``), that of the ``datasets``
library (``{"question", "table": {"id", "header", "types", "rows"}, "sql": {"sel", "agg", "conds"}}``), and that of the
release (``{"table_id", "question", "sql": {"sel", "agg", "conds"}}`` beside ``*.tables.jsonl``). Where tables come with
rows, queries are executed on them; :mod:`.execution` makes rows for the others.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kd_trainer.data import datasets_records, is_saved_dataset
from kd_trainer.errors import fail
from kd_trainer.files import new_file
from kd_trainer.study.sql import AGGREGATES, OPERATORS, Condition, Query, number, parse

WHERE = "study"
SPLITS = {"train": ("train",), "dev": ("dev", "validation")}
"""What files and splits of either part are called."""
KEYWORDS = frozenset(
    "all and as between by case check default distinct else end except exists for from group having in index into is "
    "join limit no not null of on or order primary references select set table then to union unique using values when "
    "where".split()
)


@dataclass(frozen=True)
class Question:
    """One question: the table's name and columns, the words, the query, and the table's rows where they are known."""

    table: str
    columns: tuple[str, ...]
    words: str
    query: Query
    rows: tuple[tuple[object, ...], ...] | None = None

    @property
    def prompt(self) -> str:
        return f"table: {', '.join(self.columns)}\nquestion: {self.words}\nsql:"

    @property
    def completion(self) -> str:
        """The query, its values spelled as in the question: WikiSQL changes their case as nobody could know."""
        conditions = (replace(c, value=as_asked(c.value, self.words)) for c in self.query.conditions)
        return f" {replace(self.query, conditions=tuple(conditions))}"

    @property
    def hash(self) -> str:
        content = json.dumps([self.table, self.words, str(self.query)])
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def as_asked(value: str | int | float, words: str) -> str | int | float:
    """A text as it is spelled in the question; anything else as it is."""
    found = re.search(re.escape(value), words, re.IGNORECASE) if isinstance(value, str) and value else None
    return found[0] if found else value


def read_questions(source: str, part: str) -> list[Question]:
    """Every question of one part ("train" or "dev") whose query is well formed, in the order of their hashes.

    Args:
        source: a folder with ``train.jsonl`` and ``dev.jsonl`` (or ``.jsonl.gz``), or a name or folder of ``datasets``.

    Raises:
        FileNotFoundError: no such source, or no such part in it.
        ValueError: a record without its fields, or no usable question.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and not is_saved_dataset(folder):
        records, where = _of_folder(folder, part)
    else:
        records, where = datasets_records(source, SPLITS[part][-1]), source
    questions = [question for i, record in enumerate(records) if (question := question_of(record, f"{where}:{i + 1}"))]
    if not questions:
        fail(WHERE, "--data", "a source of WikiSQL's questions", f"none in {where}")
    return sorted(questions, key=lambda question: question.hash)


def _of_folder(folder: Path, part: str) -> tuple[list[dict], Path]:
    for name in SPLITS[part]:
        for suffix in (".jsonl", ".jsonl.gz"):
            if (file := folder / f"{name}{suffix}").is_file():
                records = list(_lines(file))
                if (tables := folder / f"{name}.tables{suffix}").is_file():
                    by_name = {table["id"]: table for table in _lines(tables)}
                    records = [record | {"table": by_name[record["table_id"]]} for record in records]
                return records, file
    names = " or ".join(SPLITS[part])
    raise FileNotFoundError(f"study: --data must hold {names}.jsonl or .jsonl.gz, got {str(folder)!r}")


def _lines(file: Path) -> Iterable[dict]:
    opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8")
    with opened as lines:
        for place, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"study: {file}:{place} must be a line of JSON, got {error}") from error


def question_of(record: Mapping, where: str) -> Question | None:
    """One record in any of the three forms; None where its query is not one of WikiSQL's (a few are damaged)."""
    try:
        words, sql = " ".join(record["question"].split()), record["sql"]
        if isinstance(sql, str):
            query = parse(sql)
            return Question(record["table_id"], tuple(record["columns"]), words, query) if query else None
        table = record["table"]
        columns = column_names(table["header"])
        rows = tuple(map(tuple, table["rows"])) if table.get("rows") else None
        return Question(table["id"], columns, words, _structured(sql, columns, table["types"]), rows)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        what = "a question of WikiSQL (question, sql, and columns or a table)"
        fail(WHERE, where, what, f"{type(error).__name__}: {error}")


def _structured(sql: Mapping, columns: tuple[str, ...], types: list[str]) -> Query:
    conditions = sql["conds"]
    if isinstance(conditions, Mapping):  # datasets turns a list of records into a record of lists
        conditions = zip(conditions["column_index"], conditions["operator_index"], conditions["condition"])
    made = []
    for column, operator, value in conditions:
        numeric = types[column] == "real" and re.fullmatch(r"-?\d+(\.\d+)?", str(value))
        made.append(Condition(columns[column], OPERATORS[operator], number(str(value)) if numeric else str(value)))
    return Query(columns[sql["sel"]], AGGREGATES[sql["agg"]], tuple(made))


def column_names(header: list[str]) -> tuple[str, ...]:
    """Names that SQL takes without quotes: ``Text/background colour`` is ``text_background_colour``, ``No.`` is
    ``c_no``."""
    names: list[str] = []
    for title in header:
        name = re.sub(r"\W+", "_", title.lower()).strip("_") or "c"
        name = f"c_{name}" if name in KEYWORDS or name[0].isdigit() else name
        free = (f"{name}_{i}" if i else name for i in range(len(header)))
        names.append(next(candidate for candidate in free if candidate not in names))
    return tuple(names)


def write_pairs(questions: Iterable[Question], file: Path) -> None:
    """Prompts and completions as the trainer reads them."""
    lines = [json.dumps({"prompt": q.prompt, "completion": q.completion}) + "\n" for q in questions]
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as handle:
        handle.writelines(lines)
