"""Fifty steps by their loss and by ours, from the same student on the same batches: the loss curves side by side.

    OMP_WAIT_POLICY=passive .venv-integrations/bin/python -m bench.convergence tests/stories260k

writes bench/results/cpu_convergence.json, of which ``bench.render`` makes the README's lines. The teacher is each model
that is named (SmolLM2, or a folder of any causal language model), the student its first, middle and last layer. The
text is what the teacher itself samples, in DistillationTrainer what the student does: no tokenizer is needed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from bench import machine, tables
from bench.dense_trainer import DenseKL
from bench.integrations import PACKAGES
from kd_trainer.integrations import hf, trl
from kd_trainer.models import cut_layers, load_pretrained
from kd_trainer.tiny import byte_tokenizer, tiny_texts

RESULT = Path(__file__).resolve().parent / "results" / "cpu_convergence.json"
STEPS, SEQUENCES, LENGTH, PROMPT, BATCH = 50, 32, 32, 4, 4


@torch.no_grad()
def sampled_text(teacher: PreTrainedModel, sequences: int = SEQUENCES) -> list[dict]:
    """Rows of a data set that the trainers read: ids that the teacher drew, all of them labels but the first four."""
    torch.manual_seed(0)
    start = torch.full((sequences, 1), teacher.config.bos_token_id)
    ids = teacher.generate(start, do_sample=True, max_new_tokens=LENGTH - 1, min_new_tokens=LENGTH - 1, top_k=0)
    message = [{"role": "user", "content": ""}]
    return [{"input_ids": row, "labels": [-100] * PROMPT + row[PROMPT:], "messages": message} for row in ids.tolist()]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids, labels = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


TRAINERS = {
    "Trainer": (DenseKL, hf.KDTrainer, TrainingArguments, {}),
    "GKDTrainer": (GKDTrainer, trl.GKDTrainer, GKDConfig, dict(lmbda=0.0)),
    "GOLDTrainer": (GOLDTrainer, trl.GOLDTrainer, GOLDConfig, dict(lmbda=0.0, temperature=1.0)),
    "DistillationTrainer": (
        DistillationTrainer, trl.DistillationTrainer, DistillationConfig,
        dict(temperature=1.0, max_completion_length=LENGTH - PROMPT),
    ),
}
"""Their class, ours, its configuration, what is set there. transformers' Trainer has a dense forward KL, TRL's have
beta 0.5."""


def student_of(teacher: PreTrainedModel) -> PreTrainedModel:
    """Its first, middle and last layer."""
    last = teacher.config.num_hidden_layers - 1
    return cut_layers(teacher, (0, (last + 1) // 2, last))


def make_trainer(
    name: str, whose: str, student: PreTrainedModel, teacher: PreTrainedModel, rows: list[dict], **options: object
) -> Trainer:
    """A trainer of :data:`TRAINERS`, by ``theirs`` or by ``ours``; DistillationTrainer writes after prompts of its
    own."""
    theirs, ours, kind, given = TRAINERS[name]
    cls = theirs if whose == "theirs" else ours
    options = given | dict(report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True) | options
    if name == "Trainer":
        args = kind(tempfile.mkdtemp(), **options)
        return cls(student, args, train_dataset=rows, data_collator=collate, teacher=teacher)
    args = kind(tempfile.mkdtemp(), **({"beta": 0.5} | options), bf16=False, gradient_checkpointing=False)
    if name == "DistillationTrainer":
        prompts = [{"prompt": text[:PROMPT]} for text in tiny_texts(len(rows))]
        return cls(student, teacher, args, train_dataset=Dataset.from_list(prompts), processing_class=byte_tokenizer())
    return cls(
        student, teacher, args, train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer(),
        data_collator=lambda rows: collate(rows) | {"prompts": None, "prompt_attention_mask": None},
    )


def curves(teacher: PreTrainedModel, rows: list[dict], trainer: str, steps: int = STEPS) -> dict[str, list[float]]:
    """The losses of every step by ``theirs`` and by ``ours``. AdamW at 1e-3, constant, in fp32."""
    found = {}
    for whose in ("theirs", "ours"):
        made = make_trainer(
            trainer, whose, student_of(teacher), teacher, rows, per_device_train_batch_size=BATCH, max_steps=steps,
            learning_rate=1e-3, lr_scheduler_type="constant", optim="adamw_torch",
        )
        made.train()
        found[whose] = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return found


def largest_difference(of: dict[str, list[float]]) -> float:
    """Of two curves, relative to theirs at that step."""
    return max(abs(ours - theirs) / theirs for theirs, ours in zip(of["theirs"], of["ours"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    models = parser.parse_args().models
    content = {
        "machine": machine.describe(), "versions": {package: machine.version(package) for package in PACKAGES},
        "steps": STEPS, "tokens_a_step": BATCH * (LENGTH - PROMPT), "comparisons": {},
    }
    if RESULT.exists():
        before = json.loads(RESULT.read_text())
        if before | {"comparisons": {}} == content:  # the same machine, versions and shape: the others' curves stand
            content["comparisons"] = before["comparisons"]
    for name in models:
        teacher = load_pretrained(name)
        teacher.name_or_path = ""  # its tokenizer is not asked for
        rows = sampled_text(teacher)
        for trainer in TRAINERS:
            found = curves(teacher, rows, trainer)
            content["comparisons"][f"{Path(name).name}, {trainer}"] = found | {
                "largest_difference": largest_difference(found), "measured": machine.moment(),
            }
            RESULT.write_text(json.dumps(content, indent=1) + "\n")
    print(tables.convergence(content))


if __name__ == "__main__":
    main()
