"""One method with one seed: trained, measured, and written down where the next call finds it."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from kd_trainer.data import Document, tokenize
from kd_trainer.diagnostics.exposure import excess_error, oracle_texts
from kd_trainer.errors import fail
from kd_trainer.evaluate import evaluate
from kd_trainer.files import new_file
from kd_trainer.models import CausalLM, load_pretrained, load_tokenizer, vocab_of
from kd_trainer.plot import read_metrics
from kd_trainer.records import Text
from kd_trainer.rollout import Options
from kd_trainer.study.lineup import ENTRIES, config_of
from kd_trainer.study.peak import peak_memory
from kd_trainer.study.scoring import Judge, answers
from kd_trainer.study.stages import Stages
from kd_trainer.trainer import train

BATCH = 50
"""Answers that are written together."""


class Measure:
    """What all students of a study are measured with: the teacher, the dev questions, and a judge of answers."""

    def __init__(self, stages: Stages, judge: Judge) -> None:
        self._size, self._judge = stages.size, judge
        self._tokenizer = load_tokenizer(str(stages.teacher_model))
        self._vocab = vocab_of(self._tokenizer)
        self._teacher = self._load(stages.teacher_model, stages.size.teacher_dtype)
        texts = [Text(question.completion, question.prompt) for question in judge.questions]
        self._documents = tokenize(texts, self._tokenizer, stages.data("dev"))
        self._few = self._documents[: stages.size.fidelity_questions]
        self._options = Options(
            max_new_tokens=stages.size.max_new_tokens, stop_ids=(self._tokenizer.eos_token_id,), batch_size=BATCH
        )

    def of_teacher(self) -> dict[str, float]:
        """Its accuracy."""
        return self._accuracy(self._teacher)

    def of_student(self, folder: Path) -> dict[str, float]:
        """Accuracy; divergences from the teacher on the gold texts; the error that the student's own texts add."""
        student = self._load(folder)
        fidelity = evaluate(self._teacher, {"student": student}, self._few)["models"]["student"]
        exposure = excess_error(
            self._teacher, student, self._few, self._options, seed=0, by_teacher=self._texts_of_teacher
        )
        return self._accuracy(student) | fidelity | {
            "excess_error": exposure.excess, "excess_error_per_token": exposure.per_token,
            "excess_error_standard_error": exposure.standard_error,
        }

    @functools.cached_property
    def _texts_of_teacher(self) -> list[Document]:
        return oracle_texts(self._teacher, self._few, self._options, seed=0)

    def _load(self, folder: Path, dtype: str = "float32") -> CausalLM:
        return CausalLM(load_pretrained(str(folder), dtype), self._vocab)

    def _accuracy(self, model: CausalLM) -> dict[str, float]:
        written = answers(model, self._tokenizer, self._documents, self._size.max_new_tokens, BATCH)
        return dataclasses.asdict(self._judge.score(written))


def run(stages: Stages, name: str, seed: int, measure: Callable[[], Measure]) -> dict[str, object]:
    """The result of one method with one seed. The student is thrown away once it is measured."""

    def trained_and_measured() -> dict[str, object]:
        config = config_of(stages, name, seed)
        began = time.process_time()
        with peak_memory() as peak:
            model = train(config)
        seconds = time.process_time() - began
        found = {"label": ENTRIES[name].label, "tokens_per_s": _speed(Path(config.out)), "cpu_seconds": seconds}
        found |= {"peak_bytes": peak.bytes} | measure().of_student(model)
        shutil.rmtree(model)
        return found

    return kept(stages, f"{name}-{seed}", {"method": name, "seed": seed}, trained_and_measured)


def kept(
    stages: Stages, name: str, identity: dict[str, object], make: Callable[[], dict[str, object]]
) -> dict[str, object]:
    """A result that is read where an earlier call left it, or made and written.

    Raises:
        ValueError: it is there, of a study of another size.
    """
    file = stages.out / "results" / f"{name}.json"
    size = json.loads(json.dumps(dataclasses.asdict(stages.size)))  # tuples become lists, as in the file
    if file.is_file():
        found = json.loads(file.read_text())
        for key, value in size.items():
            if (there := found["size"].get(key)) != value:
                fail("study", key, f"{there} as in {file}", value, "choose another --out")
        return found
    file.parent.mkdir(parents=True, exist_ok=True)
    found = identity | make() | {"size": size}
    with new_file(file) as handle:
        json.dump(found, handle, indent=1)
    return found


def _speed(out: Path) -> float:
    """Trained tokens (those of queries) a second, over all steps but the first."""
    metrics = read_metrics(out / "metrics.jsonl")
    tokens, rates = metrics["tokens"], metrics["tokens_per_s"]
    skipped = 1 if len(tokens) > 1 else 0
    return sum(tokens[skipped:]) / sum(n / rate for n, rate in list(zip(tokens, rates))[skipped:])
