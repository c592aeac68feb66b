"""TRL's distillation trainers with our loss behind their own arguments.

``from trl import DistillationTrainer`` becomes ``from kd_trainer.integrations.trl import DistillationTrainer``,
likewise ``GKDTrainer`` and ``GOLDTrainer``; what is left out keeps its meaning. Or, for a script that is not to be
touched, ``with kd_losses(): main()``: TRL's own classes are patched inside and put back afterwards.

==================  ================================================================================================
TRL's argument      what it does here
==================  ================================================================================================
``beta``            the same generalised JSD; 0 and 1 are the forward and the reverse KL, exactly
``temperature``     DistillationTrainer and GOLDTrainer: of sampling and of the loss. GKDTrainer: of sampling alone
``lmbda, seq_kd``   unchanged; a cache needs ``lmbda=0`` and ``seq_kd=False``, as new tokens are in no cache
``use_uld_loss``    refused: two tokenizers have no common vocabulary to compare
==================  ================================================================================================

Further arguments: ``kd=KDOptions(...)`` (any divergence, cross-entropy, top-k, ``valid_vocab``), ``cache=folder`` in
place of ``teacher_model`` (GKDTrainer and GOLDTrainer). Deliberately different from TRL 1.16: over several processes
GKDTrainer and GOLDTrainer divide by the global token count but forget that DDP averages, so their gradient is too small
by the number of processes; here it is not. GOLDTrainer collates the batches of an optimiser's step at once and counts
their tokens once for every one of them, so with ``gradient_accumulation_steps=n`` its gradient is n times too small;
here it is not. A GOLDTrainer's teacher with a larger vocabulary is cut by TRL without a word; here that needs
``valid_vocab``. The number of tokens that GKDTrainer divides by is TRL's: of the data set's completions, also in steps
whose completions the student wrote.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from trl import DistillationConfig
from trl import DistillationTrainer as TRLDistillationTrainer
from trl.experimental.gkd import GKDTrainer as TRLGKDTrainer
from trl.experimental.gold import GOLDTrainer as TRLGOLDTrainer
from trl.trainer import distillation_trainer

from kd_kernels import LinearLogits
from kd_trainer.errors import fail
from kd_trainer.integrations.attach import attach, check_vocabularies, inspected, objective, with_a_head
from kd_trainer.integrations.hf import check_arguments, compare_tokenizers, own_tokenizer, targets_of
from kd_trainer.integrations.options import KDOptions
from kd_trainer.integrations.rows import jsd_with_end_points
from kd_trainer.integrations.targets import gathered, reduced
from kd_trainer.integrations.versions import check_versions
from kd_trainer.models import tokenizer_fingerprint

check_versions("kd_trainer.integrations.trl", "trl", "transformers", "accelerate")

__all__ = ["DistillationTrainer", "GKDTrainer", "GOLDTrainer", "KDLossMixin", "KDOptions", "kd_losses"]


class KDLossMixin:
    """For a subclass of one of TRL's three trainers: ``class Mine(KDLossMixin, MyGKDTrainer)``.

    Args:
        kd: the objective. A divergence or temperature that it leaves out is TRL's ``beta`` and ``temperature``.
        cache: a folder of cached targets in place of ``teacher_model``.
    """

    def __init__(self, *args: object, kd: KDOptions = KDOptions(), cache: str | None = None, **kwargs: object) -> None:
        _initialise(super().__init__, self, kd, cache, args, kwargs)


class DistillationTrainer(KDLossMixin, TRLDistillationTrainer):
    """``trl.DistillationTrainer`` by our loss."""


class GKDTrainer(KDLossMixin, TRLGKDTrainer):
    """``trl.experimental.gkd.GKDTrainer`` by our loss."""


class GOLDTrainer(KDLossMixin, TRLGOLDTrainer):
    """``trl.experimental.gold.GOLDTrainer`` by our loss, for student and teacher of one tokenizer."""


@contextlib.contextmanager
def kd_losses(kd: KDOptions = KDOptions(), cache: str | None = None) -> Iterator[None]:
    """Trainers of TRL's own three classes that are made inside have our loss, for as long as they live."""
    classes = (TRLDistillationTrainer, TRLGKDTrainer, TRLGOLDTrainer)
    originals = {cls: cls.__init__ for cls in classes}

    def patched(original):
        @functools.wraps(original)
        def init(self: object, *args: object, **kwargs: object) -> None:
            if type(self) not in classes:  # ours, or a subclass, which says for itself what it wants
                return original(self, *args, **kwargs)
            _initialise(functools.partial(original, self), self, kd, cache, args, kwargs)

        return init

    try:
        for cls, original in originals.items():
            cls.__init__ = patched(original)
        yield
    finally:
        for cls, original in originals.items():
            cls.__init__ = original


NAMES = ("model", "teacher_model", "args")
"""The first parameters of all three constructors, which may come by position."""


def _initialise(init, trainer, kd: KDOptions, cache: str | None, args: tuple, kwargs: dict) -> None:
    """Check, let TRL build the trainer, then put our loss in the place of its own."""
    given = dict(zip(NAMES, args)) | kwargs
    rest = args[len(NAMES) :]
    where = type(trainer).__name__
    is_distillation = isinstance(trainer, TRLDistillationTrainer)
    for name in ("model",) if is_distillation else ("model", "args"):
        if given.get(name) is None:
            fail(where, name, "given", None)
    if given.get("args") is None:
        given["args"] = _default_config(given["model"])
    config, tokenizer = given["args"], given.get("processing_class")
    check_arguments(where, config)
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        if given.get(name) is not None:
            fail(where, name, "None", "given", "there are no logits to give to it; the loss is eval_loss")
    if getattr(config, "use_uld_loss", False):
        fail(where, "use_uld_loss", "False", True, "a divergence needs student and teacher to share a tokenizer")
    loss_temperature = 1.0 if isinstance(trainer, TRLGKDTrainer) else config.temperature
    options = kd.filled(jsd_with_end_points(where, "beta", config.beta), loss_temperature)
    teacher = given.get("teacher_model")
    for model in (given["model"], teacher):
        if isinstance(model, nn.Module):  # a name is loaded with a head, or not at all
            with_a_head(model)
    fingerprint = None
    if cache is not None:
        if is_distillation:
            fail(
                where, "cache", "None", cache, "it writes its completions anew; use GKDTrainer(lmbda=0) or hf.KDTrainer"
            )
        if teacher is not None:
            fail(where, "teacher_model", "None with a cache", type(teacher).__name__)
        for name, required in (("lmbda", 0.0), ("seq_kd", False)):
            if getattr(config, name) != required:
                fail(where, name, f"{required} with a cache, which holds the data set's tokens", getattr(config, name))
        if tokenizer is None:
            fail(where, "processing_class", "given with a cache, whose tokenizer it must be", None)
        fingerprint = tokenizer_fingerprint(tokenizer)
    elif teacher is None:
        fail(where, "teacher_model", "given" if is_distillation else "given, or cache", None)
    else:
        compare_tokenizers(tokenizer or own_tokenizer(given["model"]), teacher)

    student = given["model"]
    if cache is not None:
        if isinstance(student, str):
            student = given["model"] = AutoModelForCausalLM.from_pretrained(student, **(config.model_init_kwargs or {}))
        given["teacher_model"] = _NoModel(student.config)
    with _one_vocabulary(student, given["teacher_model"], options, where):
        init(*[given.pop(name, None) for name in NAMES] if rest else [], *rest, **given)

    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    inspected_student = inspected(unwrapped, options.valid_vocab)
    trainer.kd_options = options
    if is_distillation:
        live = inspected(trainer.accelerator.unwrap_model(trainer.teacher_model), options.valid_vocab)
        check_vocabularies(inspected_student.vocab, live.vocab, options.valid_vocab)
        trainer._compute_loss = types.MethodType(_distillation_loss, trainer)
        return
    live_teacher = None if cache is not None else trainer.accelerator.unwrap_model(trainer.teacher_model)
    targets = targets_of(inspected_student, unwrapped, live_teacher, cache, options, None, fingerprint)
    trainer.kd_detach = attach(inspected_student, targets, options)
    if targets.needs_dataset_check:
        targets.check(trainer.get_train_dataloader())
    trainer.compute_loss = types.MethodType(_padded_loss, trainer)


class _NoModel(nn.Module):
    """Where TRL wants a teacher and a cache has taken its place."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config

    def resize_token_embeddings(self, size: int) -> None:
        """GOLDTrainer calls it; there is nothing to resize."""


def _default_config(model: object) -> DistillationConfig:
    """What TRL's DistillationTrainer takes where it is given no ``args``."""
    name = model if isinstance(model, str) else model.config.name_or_path
    return DistillationConfig(f"{name.split('/')[-1]}-Distillation")


@contextlib.contextmanager
def _one_vocabulary(student: object, teacher: object, options: KDOptions, where: str) -> Iterator[None]:
    """TRL refuses (or cuts) a teacher of another vocabulary size: with ``valid_vocab`` it is shown the student's for a
    moment."""
    own, theirs = (
        (AutoConfig.from_pretrained(model) if isinstance(model, str) else model.config).get_text_config()
        for model in (student, teacher)
    )
    if own.vocab_size == theirs.vocab_size:
        yield
        return
    if options.valid_vocab is None:
        check_vocabularies(own.vocab_size, theirs.vocab_size, None)
    if isinstance(teacher, str):
        fail(where, "teacher_model", "a model where heads are padded to two sizes", f"the name {teacher!r}", "load it")
    size = theirs.vocab_size
    theirs.vocab_size, teacher.resize_token_embeddings = own.vocab_size, lambda size: None
    try:
        yield
    finally:
        theirs.vocab_size = size
        del teacher.resize_token_embeddings


def _padded_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
    """``compute_loss`` of GKDTrainer and GOLDTrainer: the model returns the loss, see
    :mod:`kd_trainer.integrations.attach`."""
    extra = {}
    if isinstance(self, TRLGOLDTrainer):
        extra = self._get_model_forward_kwargs(inputs)
        if num_items_in_batch is not None:  # counted once for every micro-batch, of all of them together
            num_items_in_batch = num_items_in_batch / self.current_gradient_accumulation_steps
    outputs = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"],
        num_items_in_batch=num_items_in_batch, **extra,
    )
    loss = outputs.loss
    if num_items_in_batch is not None and self.args.average_tokens_across_devices:
        loss = loss * self.accelerator.num_processes  # DDP averages gradients; the count is that of all processes
    return (loss, outputs) if return_outputs else loss


def _distillation_loss(self, unwrapped_student, inputs, num_items_in_batch):
    """``_compute_loss`` of DistillationTrainer: all of it TRL's but the divergence of hidden states."""
    divergence = functools.partial(_chunked_divergence, self.kd_options, inputs["completion_ids"])
    original = distillation_trainer._chunked_divergence_loss
    distillation_trainer._chunked_divergence_loss = divergence
    try:
        return type(self)._compute_loss(self, unwrapped_student, inputs, num_items_in_batch)
    finally:
        distillation_trainer._chunked_divergence_loss = original


def _chunked_divergence(
    options: KDOptions, labels: Tensor, student_hidden_states: Tensor, teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor, teacher_lm_head_weight: Tensor, completion_mask: Tensor, beta: float,
    num_items_in_batch: Tensor | float | None = None, student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None, student_logit_scale: float = 1.0, teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None, teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """In the place of TRL's function of that name: loss, sum of the student's entropy, number of rows that count."""
    rows = completion_mask.flatten().nonzero()[:, 0]

    def noun(hidden, weight, bias, scale, softcap):
        bias = None if bias is None else gathered(bias)
        return LinearLogits(hidden.flatten(0, 1)[rows], gathered(weight), bias, scale, softcap, options.valid_vocab)

    student = noun(
        student_hidden_states, student_lm_head_weight, student_lm_head_bias, student_logit_scale,
        student_final_logit_softcapping,
    )
    teacher = noun(
        teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias, teacher_logit_scale,
        teacher_final_logit_softcapping,
    )
    with torch.no_grad():
        teacher = reduced(teacher, options)
    result = objective(student, teacher, options, labels.flatten()[rows], num_items_in_batch, ("student_entropy",))
    return result.loss, result.stats["student_entropy"].sum(), completion_mask.sum()
