"""What every run of a study stands on: the questions as files, the fine-tuned teacher, the student's start, the cache.

Each is made once, in its folder, and found there by whoever calls again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kd_trainer.caching.build import build_cache
from kd_trainer.caching.options import CacheOptions
from kd_trainer.config import Config, DataConfig, OptimConfig, StudentConfig, TeacherConfig, TrainConfig
from kd_trainer.errors import fail
from kd_trainer.models import load_tokenizer
from kd_trainer.study.options import Size
from kd_trainer.study.wikisql import Question, read_questions, write_pairs
from kd_trainer.trainer import train

FIRST_K = 5
"""What FIRST keeps of a row."""


@dataclass(frozen=True)
class Stages:
    """Where things are: ``source`` is WikiSQL, ``out`` the study's folder."""

    source: str
    out: Path
    size: Size

    @property
    def teacher_model(self) -> Path:
        return self.out / "teacher" / "model"

    @property
    def start_model(self) -> Path:
        return self.out / "start" / "model"

    def data(self, part: str, limit: int | None = None) -> DataConfig:
        """The questions of one part as the trainer reads them; a prompt is not learned."""
        file = str(self.out / f"{part}.jsonl")
        return DataConfig(file, max_length=self.size.max_length, append_eos=True, limit=limit)

    def write_questions(self) -> list[Question]:
        """Write both files. Returns the questions of the dev part."""
        read = {part: read_questions(self.source, part) for part in ("train", "dev")}
        tokenizer = load_tokenizer(self.size.base)
        chosen: list[Question] = []
        for part, count in (("train", self.size.train_questions), ("dev", self.size.dev_questions)):
            chosen = []
            for question in read[part]:
                ids = tokenizer(question.prompt + question.completion)["input_ids"]
                if len(ids) < self.size.max_length:  # one place is the end's
                    chosen.append(question)
                if len(chosen) == count:
                    break
            if not chosen:
                fail("study", "max_length", "above the length of the questions", self.size.max_length)
            write_pairs(chosen, self.out / f"{part}.jsonl")
        return chosen

    def teacher(self) -> Path:
        """The base model, fine-tuned on the questions."""
        size = self.size
        return train(self._fine_tuning("teacher", StudentConfig(model=size.base), size.teacher_steps, size.teacher_lr))

    def start(self) -> Path:
        """Some layers of the teacher, fine-tuned on the questions: what every method starts from."""
        size = self.size
        return train(self._fine_tuning("start", StudentConfig(layers=size.layers), size.start_steps, size.start_lr))

    def cache(self) -> Path:
        """The teacher's five likeliest tokens at every row of the training questions."""
        options = CacheOptions(k=FIRST_K, dtype=self.size.teacher_dtype)
        data = self.data("train", self.size.method_questions)
        build_cache(str(self.teacher_model), data, self.out / "cache", options)
        return self.out / "cache"

    def _fine_tuning(self, name: str, student: StudentConfig, steps: int, lr: float) -> Config:
        cut = student.layers is not None
        return Config(
            out=str(self.out / name), method="sft", student=student, data=self.data("train"), optim=OptimConfig(lr=lr),
            teacher=TeacherConfig(model=str(self.teacher_model) if cut else None),
            train=TrainConfig(
                steps=steps, batch_tokens=self.size.fine_tuning_tokens, precision=self.size.precision, save_every=50,
                keep_checkpoints=1, tensorboard=False,
            ),
        )
