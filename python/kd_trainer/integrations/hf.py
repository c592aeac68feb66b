"""Distillation with transformers' own ``Trainer``.

``Trainer(model, args, train_dataset=...)`` becomes ``KDTrainer(model, args, train_dataset=..., teacher="name")``, or
keeps its class and gets ``callbacks=[KDCallback(teacher="name")]``. The data set needs what language-model training
needs: ``input_ids``, ``labels`` with -100 where a token does not count, and ``attention_mask`` where rows are padded.

The trainer's own ``num_items_in_batch`` is the divisor, so gradient accumulation and the number of processes change no
gradient beyond rounding. DDP and FSDP2 wrap the student as ever; a live teacher is held whole by every process.
"""

from __future__ import annotations

import inspect

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from kd_kernels import divergences
from kd_trainer.errors import fail
from kd_trainer.integrations.attach import attach, inspected
from kd_trainer.integrations.options import KDOptions
from kd_trainer.integrations.targets import AdapterOffTargets, BatchTargets, CachedTargets, LiveTargets
from kd_trainer.integrations.versions import check_versions
from kd_trainer.models import check_same_vocabulary, load_pretrained, load_tokenizer, tokenizer_fingerprint
from kd_trainer.teachers import open_cache

ADAPTER_OFF = "adapter-off"
"""``teacher=ADAPTER_OFF``: the PEFT student's own base model."""

__all__ = ["ADAPTER_OFF", "KDCallback", "KDOptions", "KDTrainer"]


class KDCallback(TrainerCallback):
    """For a ``Trainer`` that stays as it is: its model's loss becomes the distillation loss.

    Args:
        teacher: a model, its name or folder, or :data:`ADAPTER_OFF`.
        options: the objective; the divergence is the forward KL unless it says otherwise.
        cache: a folder of cached targets in place of the teacher. Then the Trainer needs ``processing_class``, whose
            fingerprint must be the cache's.

    Raises, when the Trainer is made or before its first step:
        ValueError: an option of the trainer that cannot work (it is named), tokenizers or vocabularies that differ, a
            head that is not found.
        CacheError: a cache of another tokenizer, or that lacks sequences of the data set.
        RuntimeError: transformers, accelerate or peft of a version that this was not tested with.

    The model keeps the loss after training; :meth:`detach` gives it its own back. What is saved is the plain model.
    """

    def __init__(
        self, teacher: str | PreTrainedModel | None = None, options: KDOptions = KDOptions(), *,
        cache: str | None = None
    ) -> None:
        check_versions("KDCallback", "transformers", "accelerate")
        if (teacher is None) == (cache is None):
            fail("KDCallback", "teacher and cache", "one given, not both", "neither" if cache is None else "both")
        self.teacher, self.cache, self.options = teacher, cache, options.filled(divergences.forward_kl())
        self._trainer_counts = False  # whether the Trainer gives num_items_in_batch to any forward
        self._targets: BatchTargets | None = None
        self._detach = lambda: None

    def on_init_end(self, args, state, control, model=None, processing_class=None, **_: object) -> None:
        check_arguments("KDCallback", args)
        student = inspected(model, self.options.valid_vocab)
        parameters = inspect.signature(student.model.forward).parameters.values()
        if not self._trainer_counts and not any(
            parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters
        ):
            fail("KDCallback", f"forward of {type(model).__name__}", "one that takes **kwargs", "none", "use KDTrainer")
        tokenizer = own_tokenizer(model) if processing_class is None and self.cache is None else processing_class
        self._targets = targets_of(student, model, self.teacher, self.cache, self.options, tokenizer)
        self._detach = attach(student, self._targets, self.options)

    def on_train_begin(self, args, state, control, train_dataloader=None, **_: object) -> None:
        if self._targets is not None and self._targets.needs_dataset_check:
            self._targets.check(train_dataloader)

    def detach(self) -> None:
        """Give the model its own loss back."""
        self._detach()


class KDTrainer(Trainer):
    """``Trainer`` with a teacher; takes everything that ``Trainer`` takes, and :class:`KDCallback`'s arguments.

    Args:
        teacher, cache: as in :class:`KDCallback`.
        kd: the objective.
    """

    def __init__(
        self, *args: object, teacher: str | PreTrainedModel | None = None, cache: str | None = None,
        kd: KDOptions = KDOptions(), callbacks: list | None = None, **kwargs: object,
    ) -> None:
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                fail("KDTrainer", name, "None", "given", "there are no logits to give to it; the loss is eval_loss")
        callback = KDCallback(teacher, kd, cache=cache)
        callback._trainer_counts = True
        super().__init__(*args, callbacks=[*(callbacks or []), callback], **kwargs)
        self.model_accepts_loss_kwargs = True  # the model's forward takes num_items_in_batch, whatever it was before


def check_arguments(where: str, args: object) -> None:
    """Raise where an option of ``TrainingArguments`` cannot work with a loss inside of the model's forward."""
    if args.label_smoothing_factor:
        fail(where, "label_smoothing_factor", "0", args.label_smoothing_factor, "use ce_weight with smoothed data")
    if args.n_gpu > 1:
        fail(where, "n_gpu", "1 a process", args.n_gpu, "start with accelerate launch or torchrun, or show one GPU")
    if getattr(args, "deepspeed", None):
        fail(where, "deepspeed", "None", "a configuration", "use DDP or FSDP2")
    parallel = getattr(args, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled or parallel.tp_enabled):
        fail(where, "parallelism_config", "data parallel", "cp, sp or tp above 1")


def targets_of(
    student, model, teacher: str | PreTrainedModel | None, cache: str | None, options: KDOptions, tokenizer: object,
    fingerprint: str | None = None,
) -> BatchTargets:
    """The source of targets that was asked for, checked against student and tokenizer."""
    if cache is not None:
        if fingerprint is None and tokenizer is None:
            fail("KDCallback", "processing_class", "given with a cache, whose tokenizer it must be", None)
        if options.top_k is not None:
            fail("KDCallback", "top_k", "None with a cache, which has its own", options.top_k)
        reader = open_cache(
            cache, teacher=None, tokenizer=fingerprint or tokenizer_fingerprint(tokenizer), vocab=student.vocab,
            temperature=options.temperature,
        )
        return CachedTargets(reader)
    if isinstance(teacher, str) and teacher == ADAPTER_OFF:
        if not hasattr(model, "peft_config"):
            fail("KDCallback", "the student", "a PEFT model with teacher=ADAPTER_OFF", type(model).__name__)
        return AdapterOffTargets(model, student, options)
    compare_tokenizers(tokenizer, teacher)
    loaded = load_pretrained(teacher) if isinstance(teacher, str) else teacher
    return LiveTargets(inspected(loaded, options.valid_vocab), options)


def own_tokenizer(model: str | PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model's weights, for a trainer that was given none; None where there is none."""
    name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    try:
        return load_tokenizer(name) if name else None
    except FileNotFoundError:
        return None


def compare_tokenizers(tokenizer: PreTrainedTokenizerBase | None, teacher: str | PreTrainedModel) -> None:
    """Raise where a teacher's tokenizer means other tokens by the same ids, as far as both are known: a model made in
    memory has neither a name nor files."""
    name = teacher if isinstance(teacher, str) else getattr(teacher, "name_or_path", "")
    if tokenizer is None or not name:
        return
    try:
        check_same_vocabulary(tokenizer, name, "the teacher")
    except FileNotFoundError:
        if isinstance(teacher, str):
            raise
