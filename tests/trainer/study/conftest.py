"""A WikiSQL of a few tables, in its flat form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

COLUMNS = ("player", "team", "year")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 questions to learn from and 6 to be asked, short enough for a model that reads 256 bytes."""
    folder = tmp_path_factory.mktemp("wikisql")
    for part, count in (("train", 24), ("dev", 6)):
        lines = [
            {
                "table_id": f"{part}-{i % 3}", "columns": COLUMNS, "question": f"Who was in Team{i} in {1990 + i}?",
                "sql": f"SELECT player FROM t WHERE team = 'team{i}' AND year = {1990 + i}",
            }
            for i in range(count)
        ]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
