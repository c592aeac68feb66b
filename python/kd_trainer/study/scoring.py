"""What a model's answers are worth: written as the gold query, or doing what it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kd_trainer.data import Document
from kd_trainer.models import CausalLM
from kd_trainer.rollout import Options, Sampling, generate, prompts_of
from kd_trainer.study.execution import Table
from kd_trainer.study.sql import normalized
from kd_trainer.study.wikisql import Question


@dataclass(frozen=True)
class Score:
    """Of n answers, as fractions.

    Attributes:
        exact: the gold query's text, but for case, spaces and the order of conditions.
        execution: the gold query's result on every database.
        valid: SQLite runs it.
    """

    exact: float
    execution: float
    valid: float


class Judge:
    """Scores answers to questions.

    Args:
        questions: those that are asked.
        others: all questions that are known, from whose queries the rows of their tables are made.
        databases: of a table without rows of its own.
    """

    def __init__(self, questions: Sequence[Question], others: Sequence[Question], databases: int) -> None:
        self.questions = questions
        asked: dict[str, list[Question]] = {question.table: [] for question in questions}
        for question in others:
            if question.table in asked:
                asked[question.table].append(question)
        self._tables = {name: _table(name, members, databases) for name, members in asked.items()}

    def score(self, answers: Sequence[str]) -> Score:
        """Of one answer a question, in their order."""
        pairs = list(zip(self.questions, answers, strict=True))
        tables = [self._tables[question.table] for question in self.questions]
        exact = sum(normalized(answer) == normalized(str(question.query)) for question, answer in pairs)
        same = sum(table.agree(question.query, answer) for table, (question, answer) in zip(tables, pairs))
        valid = sum(table.results(answer) is not None for table, answer in zip(tables, answers))
        return Score(*(count / len(pairs) for count in (exact, same, valid)))


def _table(name: str, questions: Sequence[Question], databases: int) -> Table:
    columns, queries = questions[0].columns, [question.query for question in questions]
    if questions[0].rows is not None:
        return Table(columns, queries, [questions[0].rows])
    return Table.seeded(name, columns, queries, databases)


def answers(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """What a model answers to the prompts of documents, its likeliest token at every step, until the end token."""
    end = tokenizer.eos_token_id
    options = Options(
        max_new_tokens=max_new_tokens, stop_ids=(end,), sampling=Sampling(temperature=0.0), batch_size=batch_size
    )
    written = generate(model, prompts_of(documents), options, seed=0).completions
    return [tokenizer.decode(ids[:-1] if int(ids[-1]) == end else ids).strip() for ids in written]
