"""What a study trains and for how long: two sizes, any field of which can be changed on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from kd_trainer import assets
from kd_trainer.config import from_tree
from kd_trainer.errors import check_one_of, check_positive, fail


@dataclass(frozen=True)
class Size:
    """Sizes of a study: what two results must share to stand in one table.

    Args:
        base: the model that the teacher is fine-tuned from.
        layers: of the teacher, which the student is cut from.
        train_questions, dev_questions: chosen by hash, of those of at most max_length tokens with their query.
        method_questions: of the former, that the methods learn from and FIRST's cache holds.
        fidelity_questions: of the dev questions, on which students are compared with the teacher.
        teacher_steps, start_steps, steps: of fine-tuning the teacher; of fine-tuning the cut that all methods start
            with; of each method.
        databases: that a query is executed on, with other seeded rows each; it is right when it is on all of them.
        precision: that students and the fine-tuned teacher are trained in; the teacher scores in ``teacher_dtype``.
    """

    base: str = assets.SMOLLM2
    layers: tuple[int, ...] = (*range(0, 27, 3), 29)
    train_questions: int = 2400
    method_questions: int = 600
    dev_questions: int = 100
    fidelity_questions: int = 24
    max_length: int = 80
    max_new_tokens: int = 40
    teacher_steps: int = 80
    start_steps: int = 200
    steps: int = 30
    fine_tuning_tokens: int = 512  # of a step of the first two
    batch_tokens: int = 256  # of a method's step
    teacher_lr: float = 2e-4
    start_lr: float = 1e-3
    lr: float = 2e-4
    databases: int = 3
    precision: str = "fp32"
    teacher_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_one_of("study", "precision", self.precision, ("fp32", "bf16"))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                fail("study", field.name, "at least 1", value)
            if isinstance(value, float):
                check_positive("study", field.name, value)


def changed(size: Size, changes: Sequence[str]) -> Size:
    """A size with ``key=value`` applied; values are YAML.

    Raises:
        ValueError: not of that form, a key that a size does not have, or a value of another type or out of range.
    """
    tree = dataclasses.asdict(size)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            fail("study", "--set", "of the form key=value", repr(change))
        tree[key] = yaml.safe_load(text)
    return from_tree(Size, tree)


SIZES: Mapping[str, Size] = {
    "small": Size(),
    "full": Size(
        train_questions=50_000, method_questions=50_000, dev_questions=2000, fidelity_questions=500, max_length=256,
        max_new_tokens=96, teacher_steps=800, start_steps=3000, steps=1500, fine_tuning_tokens=8192, batch_tokens=4096,
        precision="bf16", teacher_dtype="bfloat16",
    ),
}
"""``small`` ends in hours on two cores; in fp32, because many processors have no bf16 products and are far slower at
emulating them. ``full`` is for a GPU and has not been run yet: two epochs of the teacher, eight of the cut, two of each
method."""
