"""A model whose forward, given labels, returns the distillation loss in place of its own.

The loss is computed *inside* the model's forward, so whatever is wrapped around it sees an ordinary forward with an
ordinary loss: DDP and FSDP run their hooks (FSDP2 has gathered the head by then), autocast, ``torch.compile``, PEFT and
gradient checkpointing apply, and transformers' own counting of tokens stays in charge of the normalisation.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from kd_kernels import KDLoss, LinearLogits, SparseTargets, kd_loss
from kd_trainer.errors import fail
from kd_trainer.integrations.options import KDOptions
from kd_trainer.integrations.targets import BatchTargets, head_logits, last_hidden
from kd_trainer.integrations.versions import check_versions
from kd_trainer.models import CausalLM, check_head
from kd_trainer.records import IGNORED


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model; any other model itself.

    Raises:
        ValueError: a PEFT model whose loss would not see all that is trained.
    """
    if not hasattr(model, "peft_config"):
        return model
    check_versions("attach", "peft")
    if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):
        fail("attach", "the PEFT method", "one that changes weights, such as LoRA", "prompt learning")
    base = model.get_base_model()
    if hasattr(base.get_output_embeddings(), "base_layer"):
        fail(
            "attach", "the head", "free of an adapter", "lm_head with a LoRA layer",
            "leave lm_head out of target_modules, or name it in modules_to_save",
        )
    return base


def with_a_head(model: nn.Module) -> nn.Module:
    """:func:`base_of` a model, whose head and backbone are where they are looked for.

    Raises:
        ValueError: they are not; the message says which attributes were looked for.
    """
    base = base_of(model)
    if not hasattr(base, "get_output_embeddings") or not hasattr(base, "get_decoder"):
        fail(
            "attach", type(base).__name__,
            "a transformers causal language model with get_output_embeddings() (lm_head) and get_decoder()",
            "a module without them",
        )
    check_head(base)
    return base


def inspected(model: nn.Module, valid_vocab: int | None) -> CausalLM:
    """Head, scale and softcap of a student or a teacher, compared once with its own logits, in the dtype of its
    weights.

    Raises:
        ValueError: no head is found, or not one that gives the model's logits.
    """
    base = with_a_head(model)
    training, wrapped = base.training, base.__dict__.get("forward")
    if hasattr(base, "_original_forward"):  # what accelerate has wrapped in autocast
        base.forward = base._original_forward
    try:
        return CausalLM(base, valid_vocab)
    finally:
        base.train(training)
        if wrapped is not None:
            base.forward = wrapped


def check_vocabularies(student: int, teacher: int, valid_vocab: int | None) -> None:
    """Raise where two heads have different numbers of columns and nobody said how many of them are tokens."""
    if student != teacher:
        fail(
            "attach", "the vocabularies of student and teacher", "of one size", f"{student} and {teacher}",
            "give KDOptions(valid_vocab=<number of real tokens>)",
        )
    if valid_vocab is not None and valid_vocab > student:
        fail("attach", "valid_vocab", f"at most the heads' {student}", valid_vocab)


def attach(student: CausalLM, targets: BatchTargets, options: KDOptions) -> Callable[[], None]:
    """Make the model of ``student`` return the loss of ``options`` against ``targets`` when it is called with labels.

    Without labels the model does what it did, so generation is as before; in training that is an error, because then
    something else has taken the labels away.

    Args:
        options: with divergence and temperature filled in.

    Returns:
        A function that puts the model's own forward back.
    """
    check_vocabularies(student.vocab, targets.vocab, options.valid_vocab)
    model = student.model
    before = model.__dict__.get("forward")
    original = model.forward

    # Trainer reads its signature to choose a data set's columns.
    @functools.wraps(getattr(original, "__func__", original))
    def forward(self: nn.Module, *args: object, **inputs: object) -> CausalLMOutputWithPast:
        labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
        if labels is None and shifted is None:
            if self.training and torch.is_grad_enabled():
                fail("kd_trainer.integrations", "labels", "given to the model in training", None)
            return _call(original, self, args, inputs)
        if args:
            fail("kd_trainer.integrations", "the model's inputs", "given by name", f"{len(args)} by position")
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if shifted is None else shifted
        following = following.flatten()
        rows = (following != IGNORED).nonzero()[:, 0]
        teacher = targets(inputs, rows)
        logits = head_logits(self, student, last_hidden(self, inputs, rows))
        loss = objective(logits, teacher, options, following[rows], inputs.get("num_items_in_batch")).loss
        return CausalLMOutputWithPast(loss=loss)

    model.forward = types.MethodType(forward, model)

    def detach() -> None:
        if before is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = before

    return detach


def objective(
    student: LinearLogits, teacher: LinearLogits | SparseTargets, options: KDOptions, labels: Tensor,
    count: Tensor | float | None, stats: tuple[str, ...] = (),
) -> KDLoss:
    """The loss of the given rows, over the global number of tokens where the trainer has counted them."""
    if isinstance(count, Tensor):
        count = count.to(labels.device)
    return kd_loss(
        student, teacher, options.divergence, labels=labels, ce_weight=options.ce_weight, kd_weight=options.kd_weight,
        temperature=options.temperature, squared_temperature=options.squared_temperature, normalizer=count,
        tail=options.tail, stats=stats, max_scratch_bytes=options.max_scratch_bytes,
    )


def _call(original: Callable, model: nn.Module, args: tuple, inputs: dict) -> object:
    """The forward that was there; bound to ``model``, which may be a copy of the one that it was taken from."""
    function = getattr(original, "__func__", None)
    return original(*args, **inputs) if function is None else function(model, *args, **inputs)
