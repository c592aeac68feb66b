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
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_trainer import checkpoint, methods, registry
from kd_trainer.config import Config, OptimConfig, TeacherConfig, to_yaml
from kd_trainer.data import Batch, Document, collate, data_fingerprint, deal, load_documents
from kd_trainer.errors import fail
from kd_trainer.files import progress
from kd_trainer.methods.base import Method, Objective
from kd_trainer.models import (
    CausalLM, check_same_vocabulary, cut_layers, load_pretrained, load_tokenizer, model_fingerprint,
    tokenizer_fingerprint, vocab_of,
)
from kd_trainer.plot import plot_run
from kd_trainer.teachers import Targets

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class LossModule(nn.Module):
    """Student and objectives in one forward, so that wrappers for distribution see every parameter used inside it."""

    def __init__(
        self, student: CausalLM, objectives: Mapping[str, Objective], max_scratch_bytes: int | None = None
    ) -> None:
        super().__init__()
        self.student = student
        self.objectives = nn.ModuleDict(objectives)
        self._max_scratch_bytes = max_scratch_bytes

    def forward(self, batch: Batch, targets: Targets, normalizer: float) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss, and the sum of each statistic over the rows that count."""
        objective = self.objectives[batch.tag]
        result = objective(self.student, targets, batch, normalizer, self._max_scratch_bytes)
        return result.loss, torch.stack([result.stats[name][batch.counted].sum() for name in objective.stats])


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
    method.teacher.check(method.tokens.documents)
    if config.data.packing:
        for model in (parts.student, *parts.teachers):
            model.check_packing()
    plan = method.tokens.plan
    steps = config.train.steps or plan.steps_in(config.train.epochs)
    pieces = config.train.accumulation * accelerator.num_processes
    plan.check_parts(steps, pieces)

    identity = _identity(config, steps, parts.student, method)
    first_step = checkpoint.check_identity(resume_from, identity) if resume_from else 0
    if first_step == steps:
        accelerator.print(f"{out} holds this run, finished")
        return out / "model"

    if config.train.gradient_checkpointing:
        parts.student.model.gradient_checkpointing_enable({"use_reentrant": False})
    scratch = None if config.train.max_scratch_mib is None else config.train.max_scratch_mib * 2**20
    losses = LossModule(parts.student, method.objectives, scratch)
    module, optimizer = accelerator.prepare(losses, _optimizer(losses, config.optim))
    going_on = checkpoint.Progress(optimizer, losses.objectives, method.tokens)
    if resume_from:
        checkpoint.restore(resume_from, accelerator, going_on)
    module.train()

    is_main = accelerator.is_main_process
    log = _Log(out, config, first_step, is_main)
    bar = progress(total=steps, initial=first_step, desc=method.name, unit="step", disable=not is_main)
    with log, bar:
        for step in range(first_step, steps):
            began = time.perf_counter()
            lr = learning_rate(step, steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["pace"]
            metrics = take_step(accelerator, module, optimizer, method, config, step, step + 1 == steps)
            seconds, count = time.perf_counter() - began, metrics["tokens"]
            metrics |= {"lr": lr, "tokens_per_s": count / seconds}
            log.write(step + 1, metrics)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", tok_s=f"{count / seconds:.0f}", refresh=False)
            bar.update()
            if config.train.save_every and (step + 1) % config.train.save_every == 0 and step + 1 < steps:
                folder = out / "checkpoints" / f"step-{step + 1:08d}"
                checkpoint.save(folder, accelerator, parts.student.model, tokenizer, going_on, step + 1, identity)
                if is_main:
                    checkpoint.keep_last(out / "checkpoints", config.train.keep_checkpoints)

    checkpoint.save(out / "model", accelerator, parts.student.model, tokenizer, going_on, steps, identity, final=True)
    if is_main and config.train.plot:
        plot_run(out / "metrics.jsonl", out / "plot.png")
    return out / "model"


def take_step(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, method: Method, config: Config,
    step: int, is_last: bool,
) -> dict[str, float]:
    """One step of the optimiser, from the choice of its texts to the method's schedules.

    Args:
        module: a :class:`LossModule` of the method's objectives, as accelerate prepared it.
        is_last: no step comes after it whose rows could be read ahead.

    Returns:
        What :func:`accumulate` and the method's hooks say of it, and ``grad_norm``.

    Raises:
        ValueError: no row counts; a loss or gradient that is not finite.
    """

    def own(documents: Sequence[Document]) -> list[Document]:
        """This process's share."""
        return deal(documents, accelerator.num_processes)[accelerator.process_index]

    def add_gradient(documents: Sequence[Document], of_all: bool = False) -> dict[str, float]:
        return accumulate(accelerator, module, method, own(documents) if of_all else documents, config)

    tokens = method.tokens
    share = own(tokens.step(step))
    for objective in method.objectives.values():
        objective.begin_step(step)
    documents = tokens.produce(share, step)
    following = [] if is_last else tokens.plan.step(step + 1)
    method.teacher.expect([*documents, *own([tokens.documents[i] for i in following])])
    ahead = method.before_step(step, documents, add_gradient)
    metrics = add_gradient(documents) | ahead
    norm = float(accelerator.clip_grad_norm_(module.parameters(), config.optim.clip or math.inf))
    if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
        raise ValueError(
            f"train: loss and gradient must be finite, got {metrics['loss']} and {norm} at step {step + 1}; lower "
            "optim.lr, raise optim.warmup, or look at the data of that step"
        )
    optimizer.step()
    optimizer.zero_grad()
    return metrics | method.after_step(step, metrics) | {"grad_norm": norm}


def accumulate(
    accelerator: Accelerator, module: nn.Module, method: Method, documents: Sequence[Document], config: Config
) -> dict[str, float]:
    """Add the gradient of one step's loss to the parameters, micro-batch by micro-batch.

    Args:
        documents: what this process trains on in the step; ``train.accumulation`` micro-batches for each tag.

    Returns:
        ``loss``, the sum over tags of the means over all processes' rows; ``tokens``, the rows that count; and the mean
        of each statistic, of a method with several tags under ``<tag>/<name>``.

    Raises:
        ValueError: no process has a row that counts.
    """
    groups = method.group(documents)
    own = [
        (sum(map(method.objectives[tag].count, group)), sum(int(document.counted.sum()) for document in group))
        for tag, group in groups.items()
    ]
    counts = accelerator.reduce(torch.tensor(own, dtype=torch.float64, device=accelerator.device), "sum").tolist()
    tokens = int(sum(rows for _, rows in counts))
    if not tokens:
        fail(
            "train", "a step", "left with tokens that count", "none",
            "were all roll-outs empty? see rollout.* and data.*",
        )
    micro_batches = [
        (tag, part, count)
        for (tag, group), (count, _) in zip(groups.items(), counts)
        for part in deal(group, config.train.accumulation)
        if any(bool(document.counted.any()) for document in part)
    ]
    sums = {tag: torch.zeros(1 + len(method.objectives[tag].stats), device=accelerator.device) for tag in groups}
    for i, (tag, part, count) in enumerate(micro_batches):
        batch = collate(part, config.data.max_length, config.data.packing).to(accelerator.device)
        # data-parallel wrappers average over processes: dividing by the mean count makes the average the global mean
        normalizer = count / accelerator.num_processes
        with contextlib.nullcontext() if i + 1 == len(micro_batches) else accelerator.no_sync(module):
            targets = method.teacher.targets(batch) if method.objectives[tag].has_teacher else None
            loss, stats = module(batch, targets, normalizer)
            accelerator.backward(loss)
        sums[tag] = sums[tag] + torch.cat([loss.detach()[None] * normalizer, stats])
    metrics = {"loss": 0.0, "tokens": tokens}
    for (tag, total), (count, rows) in zip(sums.items(), counts):
        loss, *stats = accelerator.reduce(total, "sum").tolist()
        metrics["loss"] += loss / max(count, 1.0)
        prefix = f"{tag}/" if len(groups) > 1 else ""
        for name, value in zip(method.objectives[tag].stats, stats):
            name, value = ("next_token_loss", -value) if name == "label_logprob" else (name, value)
            metrics[prefix + name] = value / max(rows, 1.0)
    return metrics


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
    teachers = [(teacher.model, "the teacher") for teacher in (config.teacher, *config.more_teachers)]
    for model, whose in (*teachers, (config.student.model, "the student")):
        if model not in (None, tokenizer_name):
            check_same_vocabulary(tokenizer, model, whose)
    vocab = vocab_of(tokenizer)
    method = registry.spec(config.method)
    runs_teacher = method.has_teacher and config.cache is None
    loaded = [
        _load_teacher(teacher) for teacher in (config.teacher, *config.more_teachers)
        if teacher.model is not None and (method.has_teacher or config.student.layers is not None)
    ] or [(None, config.teacher.fingerprint)]
    if student_folder is not None:
        student = load_pretrained(str(student_folder), config.student.dtype)
    elif config.student.model is not None:
        student = load_pretrained(config.student.model, config.student.dtype)
    else:
        student = cut_layers(loaded[0][0], config.student.layers).to(getattr(torch, config.student.dtype))
    student = CausalLM(student, vocab)
    documents = load_documents(config.data, tokenizer, student.vocab)
    parts = methods.Parts(
        student=student,
        documents=documents,
        tokenizer=tokenizer,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        teachers=tuple(CausalLM(model, vocab) for model, _ in loaded if model is not None) if runs_teacher else (),
        teacher_fingerprints=tuple(fingerprint for _, fingerprint in loaded),
    )
    return parts, tokenizer


def _load_teacher(teacher: TeacherConfig) -> tuple[PreTrainedModel, str]:
    """A teacher and its fingerprint, which is the one that was asked for."""
    model = load_pretrained(teacher.model, teacher.dtype)
    fingerprint = model_fingerprint(model)
    if teacher.fingerprint not in (None, fingerprint):
        fail("train", f"the fingerprint of teacher {teacher.model}", teacher.fingerprint, fingerprint)
    return model, fingerprint


def _resume_point(out: Path, config: Config) -> Path | None:
    """The folder to go on from: a finished run's model, else its last checkpoint."""
    finished = out / "model"
    found = finished if finished.is_dir() else checkpoint.latest(out / "checkpoints")
    if found is not None and not config.train.resume:
        fail("train", "out", "a folder without a run, with train.resume=false", str(found), "choose another")
    return found


def _identity(config: Config, steps: int, student: CausalLM, method: Method) -> dict[str, object]:
    """What makes two runs the same one, apart from rounding."""
    sections = {
        "student": config.student, "objective": config.objective, "rollout": config.rollout, "options": config.options,
        "optim": config.optim,
    }
    parameters = sum(p.numel() for p in student.model.parameters())
    return {
        "method": config.method, "seed": config.seed, "steps": steps, "batch_tokens": config.train.batch_tokens,
        "precision": config.train.precision, "data": data_fingerprint(method.tokens.documents),
        "teacher": method.teacher.name, "student": f"{type(student.model).__name__} of {parameters} parameters",
    } | {f"{name}.{key}": value for name, part in sections.items() for key, value in dataclasses.asdict(part).items()}


def _optimizer(module: LossModule, optim: OptimConfig) -> torch.optim.AdamW:
    groups = []
    for pace, part in (
        (1.0, module.student), *((objective.pace, objective) for objective in module.objectives.children())
    ):
        parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
        groups += [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay, "pace": pace},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "pace": pace},
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
