"""``kdk study text2sql``: what methods of distillation make of one student, on one task.

KID (Zhong et al. 2024, arXiv 2410.11371) compares them on text-to-SQL. Here: WikiSQL, one table a question. A teacher
is fine-tuned on it; the student is some layers of that teacher, fine-tuned likewise, because a cut alone says nothing
sensible and on-policy methods are meant for a student that does (GKD and DistiLLM begin so too). From there each method
trains it for as many steps on as many tokens of the data, with several seeds, and each student is asked the same
questions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from kd_trainer import registry
from kd_trainer.errors import check_one_of, fail
from kd_trainer.study.latency import BASELINE, latency
from kd_trainer.study.lineup import ENTRIES
from kd_trainer.study.report import collect, table, write
from kd_trainer.study.runs import Measure, kept, run
from kd_trainer.study.scoring import Judge
from kd_trainer.study.stages import Stages
from kd_trainer.study.wikisql import Question, read_questions


def study(
    stages: Stages, names: Sequence[str], seeds: int, rounds: int, phases: Sequence[str], json_file: Path | None = None
) -> str:
    """Do what of the phases ("runs", "latency", "report") is not done yet.

    Returns:
        The table of all results in the study's folder, those of earlier calls included.

    Raises:
        ValueError: an unknown name, a number below 1, results of another size in the folder.
    """
    for name in names:
        check_one_of("study", "--methods", name, tuple(ENTRIES))
    for option, value in (("--seeds", seeds), ("--rounds", rounds)):
        if value < 1:
            fail("study", option, "at least 1", value)
    if "runs" in phases or "latency" in phases:
        asked = prepare(stages, names)
    if "runs" in phases:
        run_all(stages, names, seeds, asked)
    if "latency" in phases:
        timed = [BASELINE, *(name for name in names if name != BASELINE)]
        kept(stages, "latency", {}, lambda: latency(stages, timed, rounds))
    result = collect(stages.out)
    write(result, json_file or stages.out / "study.json")
    return table(result)


def prepare(stages: Stages, names: Sequence[str]) -> list[Question]:
    """Questions, teacher, student, and the cache where a method needs one. Returns the questions that are asked."""
    asked = stages.write_questions()
    stages.teacher()
    stages.start()
    if any("cache" in registry.spec(ENTRIES[name].method).needs for name in names):
        stages.cache()
    return asked


def run_all(stages: Stages, names: Sequence[str], seeds: int, asked: Sequence[Question]) -> None:
    """Train and measure. Seed by seed, so that what is there when it is stopped compares all methods."""

    @functools.cache
    def measure() -> Measure:
        return Measure(stages, Judge(asked, read_questions(stages.source, "dev"), stages.size.databases))

    kept(stages, "teacher", {}, lambda: measure().of_teacher())
    kept(stages, "start", {}, lambda: measure().of_student(stages.start_model))
    for seed in range(seeds):
        for name in names:
            run(stages, name, seed, measure)
