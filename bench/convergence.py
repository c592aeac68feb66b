"""Fifty steps by their loss and by ours, from the same student on the same batches: the loss curves side by side.

    OMP_WAIT_POLICY=passive .venv-integrations/bin/python -m bench.convergence FOLDER smollm2-135m-instruct

writes bench/results/cpu_convergence.json. The teacher is each model that is named (SmolLM2, or a folder of any causal
language model), the student its first, middle and last layer, the text what the teacher itself samples, so no tokenizer
is needed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl.experimental.gkd import GKDConfig, GKDTrainer

from bench import machine
from bench.dense_trainer import DenseKL
from bench.integrations import PACKAGES
from kd_trainer.integrations import hf, trl
from kd_trainer.models import cut_layers, load_pretrained
from kd_trainer.tiny import byte_tokenizer

RESULT = Path(__file__).resolve().parent / "results" / "cpu_convergence.json"
STEPS, SEQUENCES, LENGTH, BATCH = 50, 32, 32, 4


@torch.no_grad()
def sampled_text(teacher: PreTrainedModel) -> list[dict]:
    """Rows of a data set that both trainers read: ids that the teacher drew, all of them labels but the first four."""
    torch.manual_seed(0)
    start = torch.full((SEQUENCES, 1), teacher.config.bos_token_id)
    ids = teacher.generate(start, do_sample=True, max_new_tokens=LENGTH - 1, min_new_tokens=LENGTH - 1, top_k=0)
    message = [{"role": "user", "content": ""}]
    return [{"input_ids": row, "labels": [-100] * 4 + row[4:], "messages": message} for row in ids.tolist()]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids, labels = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def _curve(trainer: Trainer) -> list[float]:
    """The loss of every step."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def curves(teacher: PreTrainedModel, trainer: str, steps: int = STEPS) -> dict[str, list[float]]:
    """Curves of ``theirs`` and ``ours``: ``transformers``, its Trainer with a dense forward KL, or ``trl``, its
    GKDTrainer at beta 0.5. AdamW at 1e-3, constant, in fp32."""
    last = teacher.config.num_hidden_layers - 1
    rows = sampled_text(teacher)
    options = dict(
        per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=1e-3, lr_scheduler_type="constant",
        optim="adamw_torch", report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
    )

    def student() -> PreTrainedModel:
        return cut_layers(teacher, (0, (last + 1) // 2, last))

    def of_transformers(cls: Callable[..., Trainer]) -> list[float]:
        args = TrainingArguments(tempfile.mkdtemp(), **options)
        return _curve(cls(student(), args, train_dataset=rows, data_collator=collate, teacher=teacher))

    def of_trl(cls: Callable[..., Trainer]) -> list[float]:
        args = GKDConfig(tempfile.mkdtemp(), **options, lmbda=0.0, beta=0.5, bf16=False, gradient_checkpointing=False)
        return _curve(cls(
            student(), teacher, args, train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer(),
            data_collator=lambda rows: collate(rows) | {"prompts": None, "prompt_attention_mask": None},
        ))

    run, theirs, ours = {
        "transformers": (of_transformers, DenseKL, hf.KDTrainer), "trl": (of_trl, GKDTrainer, trl.GKDTrainer),
    }[trainer]
    return {"theirs": run(theirs), "ours": run(ours)}


def largest_difference(of: dict[str, list[float]]) -> float:
    """Of two curves, relative to theirs at that step."""
    return max(abs(ours - theirs) / theirs for theirs, ours in zip(of["theirs"], of["ours"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    content = {
        "machine": machine.describe(), "versions": {package: machine.version(package) for package in PACKAGES},
        "measured": machine.moment(), "steps": STEPS, "tokens_a_step": BATCH * (LENGTH - 4), "models": {},
    }
    for name in parser.parse_args().models:
        teacher = load_pretrained(name)
        teacher.name_or_path = ""  # its tokenizer is not asked for
        content["models"][Path(name).name] = {
            trainer: (found := curves(teacher, trainer)) | {"largest_difference": largest_difference(found)}
            for trainer in ("transformers", "trl")
        }
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
    for name, trainers in content["models"].items():
        for trainer, found in trainers.items():
            first, last = (sum(found["ours"][part]) / 5 for part in (slice(5), slice(-5, None)))
            print(f"{name}, {trainer}: {first:.4f} to {last:.4f}, apart by {found['largest_difference']:.1e} at most")


if __name__ == "__main__":
    main()
