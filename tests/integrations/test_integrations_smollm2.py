"""SmolLM2 through transformers' Trainer: a cut student of a real teacher, against dense logits in float64, and its
memory."""

from __future__ import annotations

import pytest
from transformers import TrainingArguments

from kd_trainer import assets
from kd_trainer.integrations.hf import KDOptions, KDTrainer
from kd_trainer.models import cut_layers, load_pretrained, load_tokenizer
from trainers import ARGUMENTS, IGNORED, assert_same, collate, gradient_of, truth
from transformers_fixtures import NEEDS_SMOLLM2

pytestmark = NEEDS_SMOLLM2
TEXTS = (
    "Photosynthesis is the process by which green plants transform light energy into chemical energy.",
    "The Danube is the second-longest river in Europe. It flows through ten countries.",
)


@pytest.mark.parametrize("accumulation", (1, 2))
def test_gradient_of_a_cut_student(tmp_path, accumulation: int) -> None:
    teacher = load_pretrained(assets.SMOLLM2)
    student = cut_layers(teacher, (0, 15, 29))
    tokenizer = load_tokenizer(assets.SMOLLM2)
    rows = [{"input_ids": (ids := tokenizer(text)["input_ids"]), "labels": [IGNORED] * 4 + ids[4:]} for text in TEXTS]
    loss, want = truth(student, teacher, rows, "jsd(beta=0.5)", ce_weight=0.5)
    args = TrainingArguments(
        str(tmp_path),
        **(ARGUMENTS | dict(per_device_train_batch_size=2 // accumulation, gradient_accumulation_steps=accumulation)),
    )
    make = lambda: KDTrainer(  # noqa: E731
        student, args, train_dataset=rows, data_collator=collate, processing_class=tokenizer, teacher=teacher,
        kd=KDOptions("jsd(beta=0.5)", ce_weight=0.5),
    )
    got_loss, got = gradient_of(make, student)
    assert got_loss == pytest.approx(loss, rel=1e-4)
    assert_same(got, want, rtol=1e-3)
