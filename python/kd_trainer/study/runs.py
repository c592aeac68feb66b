"""One method with one seed: trained, measured, and written down where the next call finds it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kd_trainer.data import load_documents
from kd_trainer.diagnostics.exposure import excess_error
from kd_trainer.errors import fail
from kd_trainer.evaluate import evaluate
from kd_trainer.files import new_file
from kd_trainer.models import CausalLM, load_pretrained, load_tokenizer, vocab_of
from kd_trainer.plot import read_metrics
from kd_trainer.rollout import Options, Sampling
from kd_trainer.study.lineup import config_of
from kd_trainer.study.peak import peak_memory
from kd_trainer.study.scoring import Judge, answers
from kd_trainer.study.stages import Stages
from kd_trainer.trainer import train


class Bench:
    """What all students of a study are measured with: the teacher, the dev questions, and a judge of answers."""

    def __init__(self, stages: Stages, judge: Judge) -> None:
        self._size = size = stages.size
        self._tokenizer = load_tokenizer(str(stages.teacher_model))
        self._vocab = vocab_of(self._tokenizer)
        self.teacher = CausalLM(load_pretrained(str(stages.teacher_model), size.teacher_dtype), self._vocab)
        self._documents = load_documents(stages.data("dev"), self._tokenizer, self._vocab)
        self._judge = judge

    def of_teacher(self) -> dict[str, float]:
        return dataclasses.asdict(self._judge.score(self._answers(self.teacher)))

    def of_student(self, folder: Path) -> dict[str, float]:
        """Accuracy; the teacher's divergences on the gold texts; ExAccErr on the student's own against the teacher's."""
        student = CausalLM(load_pretrained(str(folder)), self._vocab)
        fidelity = evaluate(self.teacher, {"student": student}, self._documents)["models"]["student"]
        return dataclasses.asdict(self._judge.score(self._answers(student))) | fidelity | self._exposure(student)

    def _answers(self, model: CausalLM) -> list[str]:
        return answers(model, self._tokenizer, self._documents, self._size.max_new_tokens)
