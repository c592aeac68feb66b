"""The training loop: one for every method.

A step's documents are fixed by the plan; ``accumulation`` and the number of processes only say how they are dealt
out. Each micro-batch is divided by the step's global count of target tokens, so that the sum of the micro-batches'
gradients is the gradient of the step's mean however it was split.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kd_trainer import checkpoint, methods
from kd_trainer.config import Config, DataConfig, OptimConfig, to_yaml
from kd_trainer.data import Batch, Document, collate, data_fingerprint, deal, load_documents
from kd_trainer.errors import fail
from kd_trainer.files import progress
from kd_trainer.methods.base import Objective
from kd_trainer.models import (
    CausalLM, check_same_vocabulary, cut_layers, load_pretrained, load_tokenizer, model_fingerprint,
    tokenizer_fingerprint, vocab_of,
)
from kd_trainer.plot import plot_run
from kd_trainer.teachers import Targets, Teacher

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class LossModule(nn.Module):
    """Student and objective in one forward, so that wrappers for distribution see every parameter used inside it."""

    def __init__(self, student: CausalLM, objective: Objective, max_scratch_bytes: int | None) -> None:
        super().__init__()
        self.student = student
        self._objective = objective
        self._max_scratch_bytes = max_scratch_bytes

    def forward(self, batch: Batch, targets: Targets, normalizer: float) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss, and the sum of each statistic over the rows that count."""
        result = self._objective.loss(self.student(batch), targets, batch, normalizer, self._max_scratch_bytes)
        return result.loss, torch.stack([result.stats[name][batch.counted].sum() for name in self._objective.stats])


def train(config: Config) -> Path:
    """Run, or go on with, the training that a configuration describes.

    The run's folder gets ``config.yaml`` (complete), ``metrics.jsonl`` (one object a step), ``tensorboard/``,
    ``checkpoints/``, ``plot.png`` and, at the end, ``model/``: a folder for ``from_pretrained``.

    Returns:
        The path of ``model/``.

    Raises:
        ValueError: whatever does not fit together, before the first step; a loss that is not finite, at its step.
        CacheError: a cache of another teacher, tokenizer or text, before the first step.
        FileNotFoundError: a model, text or file that is not there.
    """
    accelerator = Accelerator(mixed_precision="bf16" if config.train.precision == "bf16" else "no")
    if accelerator.distributed_type not in SUPPORTED:
        fail(
            "train", "the kind of distribution", "one process or data parallel (DDP)",
            accelerator.distributed_type.value, "choose multi-CPU or multi-GPU in accelerate config",
        )
    out = Path(config.out)
    resume_from = _resume_point(out, config)
    set_seed(config.seed, device_specific=True)

    parts, tokenizer = load_parts(config, resume_from)
    method = methods.build(config, parts)
    method.teacher.check(parts.documents)
    if config.data.packing:
        for model in filter(None, (parts.student, parts.teacher_model)):
            model.check_packing()
    plan = method.tokens.plan
    steps = config.train.steps or plan.steps_in(config.train.epochs)
    pieces = config.train.accumulation * accelerator.num_processes
    plan.check_parts(steps, pieces)

    identity = _identity(config, steps, parts, method.teacher.name)
    first_step = checkpoint.check_identity(resume_from, identity) if resume_from else 0
    if first_step == steps:
        accelerator.print(f"{out} holds this run, finished")
        return out / "model"

    optimizer = _optimizer(parts.student, config.optim)
    if config.train.gradient_checkpointing:
        parts.student.model.gradient_checkpointing_enable({"use_reentrant": False})
    scratch = None if config.train.max_scratch_mib is None else config.train.max_scratch_mib * 2**20
    module, optimizer = accelerator.prepare(LossModule(parts.student, method.objective, scratch), optimizer)
    if resume_from:
        checkpoint.restore(resume_from, accelerator, optimizer)
    module.train()

    is_main = accelerator.is_main_process
    log = _Log(out, config, first_step, is_main)
    bar = progress(total=steps, initial=first_step, desc=method.name, unit="step", disable=not is_main)
    with log, bar:
        for step in range(first_step, steps):
            began = time.perf_counter()
            lr = learning_rate(step, steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            dealt = deal(method.tokens.step(step), pieces)
            count = sum(int(document.counted.sum()) for part in dealt for document in part)
            sums = accumulate(accelerator, module, method.teacher, dealt, count, config.data)
            norm = accelerator.clip_grad_norm_(module.parameters(), config.optim.clip or math.inf)
            means = (sums / count).tolist()
            metrics = dict(zip(("loss", *method.objective.stats), means))
            if not (math.isfinite(metrics["loss"]) and math.isfinite(float(norm))):
                raise ValueError(
                    f"train: loss and gradient must be finite, got {metrics['loss']} and {float(norm)} at step "
                    f"{step + 1}; lower optim.lr, raise optim.warmup, or look at the data of that step"
                )
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - began
            metrics["next_token_loss"] = -metrics.pop("label_logprob")
            metrics |= {"grad_norm": float(norm), "lr": lr, "tokens": count, "tokens_per_s": count / seconds}
            log.write(step + 1, metrics)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", tok_s=f"{count / seconds:.0f}", refresh=False)
            bar.update()
            if config.train.save_every and (step + 1) % config.train.save_every == 0 and step + 1 < steps:
                folder = out / "checkpoints" / f"step-{step + 1:08d}"
                checkpoint.save(folder, accelerator, parts.student.model, tokenizer, optimizer, step + 1, identity)
                if is_main:
                    checkpoint.keep_last(out / "checkpoints", config.train.keep_checkpoints)

    checkpoint.save(out / "model", accelerator, parts.student.model, tokenizer, None, steps, identity)
    if is_main:
        plot_run(out / "metrics.jsonl", out / "plot.png")
    return out / "model"


def accumulate(
    accelerator: Accelerator, module: nn.Module, teacher: Teacher, dealt: Sequence[Sequence[Document]], count: int,
    data: DataConfig,
) -> Tensor:
    """Add the gradient of one step's mean loss to the parameters, micro-batch by micro-batch.

    Args:
        dealt: the step's documents in accumulation x processes parts, the same on every process, which takes its own.
        count: rows that count in all of them.

    Returns:
        Over all processes, the sum of the rows' losses, then the sum of each statistic of the objective.
    """
    mine = dealt[accelerator.process_index :: accelerator.num_processes]
    # data-parallel wrappers average over processes: dividing by the mean count makes the average the global mean
    normalizer = count / accelerator.num_processes
    sums: Tensor | float = 0.0
    for i, documents in enumerate(mine):
        batch = collate(documents, data.max_length, data.packing).to(accelerator.device)
        with contextlib.nullcontext() if i + 1 == len(mine) else accelerator.no_sync(module):
            loss, stats = module(batch, teacher.targets(batch), normalizer)
            accelerator.backward(loss)
        sums = sums + torch.cat([loss.detach()[None] * normalizer, stats])
    return accelerator.reduce(sums, "sum")


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Linear warm-up, then a cosine from ``lr`` down to ``final_lr * lr``; a function of the step alone."""
    warmup = round(optim.warmup * steps)
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return optim.lr * (optim.final_lr + (1.0 - optim.final_lr) * 0.5 * (1.0 + math.cos(math.pi * done)))


def load_parts(config: Config, student_folder: Path | None = None) -> tuple[methods.Parts, PreTrainedTokenizerBase]:
    """Everything that a method is built from; the student from ``student_folder`` when a run is resumed.

    Raises:
        ValueError: tokenizers or vocabularies that differ, a teacher with another fingerprint than was asked for.
    """
    tokenizer_name = config.tokenizer or config.teacher.model or config.student.model
    tokenizer = load_tokenizer(tokenizer_name)
    for model, whose in ((config.teacher.model, "the teacher"), (config.student.model, "the student")):
        if model not in (None, tokenizer_name):
            check_same_vocabulary(tokenizer, model, whose)
    vocab = vocab_of(tokenizer)
    teacher = fingerprint = None
    runs_teacher = config.method != "sft" and config.cache is None
    if config.teacher.model is not None and (config.method != "sft" or config.student.layers is not None):
        teacher = load_pretrained(config.teacher.model, config.teacher.dtype)
        fingerprint = model_fingerprint(teacher)
        if config.teacher.fingerprint not in (None, fingerprint):
            fail("train", "the teacher's fingerprint", config.teacher.fingerprint, fingerprint)
    if student_folder is not None:
        student = load_pretrained(str(student_folder), config.student.dtype)
    elif config.student.model is not None:
        student = load_pretrained(config.student.model, config.student.dtype)
    else:
        student = cut_layers(teacher, config.student.layers).to(getattr(torch, config.student.dtype))
    student = CausalLM(student, vocab)
    documents = load_documents(config.data, tokenizer, student.vocab)
    parts = methods.Parts(
        student=student,
        documents=documents,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        teacher_model=CausalLM(teacher, vocab) if runs_teacher else None,
        teacher_fingerprint=fingerprint or config.teacher.fingerprint,
    )
    return parts, tokenizer


def _resume_point(out: Path, config: Config) -> Path | None:
    """The folder to go on from: a finished run's model, else its last checkpoint."""
    finished = out / "model"
    found = finished if finished.is_dir() else checkpoint.latest(out / "checkpoints")
    if found is not None and not config.train.resume:
        fail("train", "out", "a folder without a run, with train.resume=false", str(found), "choose another")
    return found


def _identity(config: Config, steps: int, parts: methods.Parts, teacher: str) -> dict[str, object]:
    """What makes two runs the same one, apart from rounding."""
    student = parts.student.model
    sections = {"student": config.student, "objective": config.objective, "optim": config.optim}
    return {
        "method": config.method, "seed": config.seed, "steps": steps, "batch_tokens": config.train.batch_tokens,
        "precision": config.train.precision, "data": data_fingerprint(parts.documents), "teacher": teacher,
        "student": f"{type(student).__name__} of {sum(p.numel() for p in student.parameters())} parameters",
    } | {f"{name}.{key}": value for name, part in sections.items() for key, value in dataclasses.asdict(part).items()}


def _optimizer(student: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


class _Log:
    """``config.yaml``, ``metrics.jsonl`` and TensorBoard; lines after the step that is resumed from are dropped."""

    def __init__(self, out: Path, config: Config, first_step: int, main: bool) -> None:
        self._file = self._board = None
        if not main:
            return
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(to_yaml(config))
        path = out / "metrics.jsonl"
        kept = path.read_text().splitlines()[:first_step] if path.exists() else []
        path.write_text("".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")
        if config.train.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(out / "tensorboard", purge_step=first_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": step} | metrics) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *error: object) -> None:
        for sink in filter(None, (self._file, self._board)):
            sink.close()
