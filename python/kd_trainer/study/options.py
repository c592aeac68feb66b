"""What a study trains and for how long: three sizes, any field of which can be changed on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from kd_trainer import assets
from kd_trainer.errors import check_one_of, check_positive, fail


@dataclass(frozen=True)
class Size:
    """Sizes of a study; every one is printed with its result.

    Args:
        base: the model that the teacher is fine-tuned from.
        layers: of the teacher, which the student is cut from.
        train_questions, dev_questions: chosen by hash, of those of at most max_length tokens with their query.
        teacher_steps, start_steps, steps: of fine-tuning the teacher; of fine-tuning the cut before any method, with which all
            methods start; of each method.
        databases: that a query is executed on, with other seeded rows each; it is right when its result is on all of them.
        precision: that students and the fine-tuned teacher are trained in; the teacher scores in ``teacher_dtype``.
    """

    base: str = assets.SMOLLM2
    layers: tuple[int, ...] = (*range(0, 27, 3), 29)
    train_questions: int = 2400
    dev_questions: int = 150
    max_length: int = 80
    max_new_tokens: int = 40
    teacher_steps: int = 80
    start_steps: int = 200
    steps: int = 40
    fine_tuning_tokens: int = 512  # of a step of the first two
    batch_tokens: int = 384  # of a method's step
    teacher_lr: float = 2e-4
    start_lr: float = 5e-4
    lr: float = 2e-4
    seeds: int = 3
    databases: int = 3
    precision: str = "bf16"
    teacher_dtype: str = "bfloat16"
    latency_rounds: int = 12
    latency_warm_up: int = 2

    def __post_init__(self) -> None:
        check_one_of("study", "--precision", self.precision, ("fp32", "bf16"))
        for name in ("teacher_lr", "start_lr", "lr"):
            check_positive("study", option(name), getattr(self, name))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < (0 if field.name == "latency_warm_up" else 1):
                fail("study", option(field.name), "at least 1", value)


def option(field: str) -> str:
    """A field as it is called on the command line."""
    return "--" + field.replace("_", "-")


SIZES: Mapping[str, Size] = {
    "small": Size(),
    "full": Size(
        train_questions=55_000, dev_questions=2000, max_length=256, max_new_tokens=96, teacher_steps=3000, start_steps=1500,
        steps=1500, fine_tuning_tokens=8192, batch_tokens=4096, latency_rounds=40, latency_warm_up=5,
    ),
}
"""``small`` ends in hours on two cores; ``full`` is for a GPU: about an epoch for each of the three phases' own lengths."""
