"""A method built as a run builds it, on tiny models in fp64, and what it minimises in one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_trainer import methods
from kd_trainer.config import Config
from kd_trainer.data import Document, collate
from kd_trainer.methods.base import Method, Parts
from kd_trainer.models import CausalLM, load_pretrained
from kd_trainer.tiny import byte_tokenizer


def noisy(folder: object, seed: int, size: float = 0.1) -> CausalLM:
    """The model of a folder in fp64, its weights moved at random: sharper than a fresh one, and another for every
    seed."""
    model = load_pretrained(str(folder)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return CausalLM(model)


def built(
    config: Config, student: CausalLM, documents: Sequence[Document], teachers: Sequence[CausalLM] = ()
) -> Method:
    tokenizer = byte_tokenizer()
    return methods.build(config, Parts(
        student=student, documents=list(documents), tokenizer=tokenizer, tokenizer_fingerprint="",
        teachers=tuple(teachers), teacher_fingerprints=tuple(f"teacher {i}" for i in range(len(teachers))) or (None,),
    ))


def step_loss(method: Method, student: CausalLM, documents: Sequence[Document]) -> Tensor:
    """The loss of one step's documents, in one micro-batch a tag; differentiable."""
    total = torch.zeros((), dtype=torch.float64)
    for tag, group in method.group(documents).items():
        objective = method.objectives[tag]
        if count := sum(map(objective.count, group)):
            batch = collate(group, 64)
            targets = method.teacher.targets(batch) if objective.has_teacher else None
            total = total + objective(student, targets, batch, float(count)).loss
    return total


def logprobs(model: CausalLM, tokens: Tensor) -> Tensor:
    """``[L - 1, V]``, from transformers alone."""
    return model.model(input_ids=tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)


def assert_rows_close(got: Tensor, wanted: Tensor, relative: float) -> None:
    """Errors of a row are relative to its own L1 norm, however small that is."""
    error, size = (got - wanted).abs().sum(-1), wanted.abs().sum(-1)
    assert bool((error <= relative * size).all()), float((error / size).max())


def assert_same_gradients(got: Tensor, expected: Tensor, model: CausalLM) -> None:
    """Values, and every parameter's gradient, row by row.

    Both sides in as many passes of the model as each other: some norms are computed in fp32 whatever the weights are,
    which equal passes round equally.
    """
    torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-12, atol=0.0)
    parameters = list(model.model.parameters())
    for one, other in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters)):
        assert_rows_close(one, other, 1e-12)
        assert float(other.abs().sum(-1).min()) > 0.0  # a comparison of zeros would show nothing
