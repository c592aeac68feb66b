"""torch's losses by their names, against torch in float64."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from kd_kernels import LinearLogits
from kd_trainer.integrations import torch as ours
from loss_cases import IGNORED, VOCAB, case, check


@pytest.mark.parametrize("log_target", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "batchmean", "sum", "none"))
def test_kl_div(reduction: str, log_target: bool) -> None:
    of = case()
    teacher = of.teacher_logits(torch.float64).log_softmax(-1)
    target = (teacher if log_target else teacher.exp()).float()

    def truth(hidden, weight, bias):
        logq = (hidden @ weight.T).log_softmax(-1)
        return F.kl_div(logq, teacher.to(hidden.dtype), reduction=reduction, log_target=True).sum()

    for given in (lambda z: z, lambda z: z.log_softmax(-1)):  # logits do as well as log-probabilities
        check(
            lambda hidden, weight, bias, given=given: ours.kl_div(
                given(hidden @ weight.T), target, reduction=reduction, log_target=log_target
            ).sum(),
            truth, of, "kl_div",
        )
    module = ours.KLDivLoss(reduction=reduction, log_target=log_target)
    check(lambda hidden, weight, bias: module(hidden @ weight.T, target).sum(), truth, of, "KLDivLoss")


def test_kl_div_of_heads_and_of_three_dimensions() -> None:
    of = case()
    teacher = LinearLogits(of.teacher_hidden.reshape(3, 8, -1), of.teacher_weight)

    def truth(hidden, weight, bias):
        logq = (hidden @ weight.T).log_softmax(-1).reshape(3, 8, -1)
        logp = of.teacher_logits(hidden.dtype).log_softmax(-1).reshape(3, 8, -1)
        return F.kl_div(logq, logp, reduction="batchmean", log_target=True)

    check(
        lambda hidden, weight, bias: ours.kl_div(
            LinearLogits(hidden.reshape(3, 8, -1), weight), teacher, reduction="batchmean", log_target=True
        ),
        truth, of, "kl_div of heads",
    )


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("options", ({}, {"label_smoothing": 0.2}, {"label_smoothing": 1.0}, {"weight": True}))
def test_linear_cross_entropy_of_indices(options: dict, reduction: str) -> None:
    of = case()
    weight_of_class = torch.rand(VOCAB, generator=torch.Generator().manual_seed(1)) + 0.5

    def arguments(dtype):
        extra = {"weight": weight_of_class.to(dtype)} if options.get("weight") else options
        return dict(reduction=reduction, **extra)

    check(
        lambda hidden, weight, bias: ours.linear_cross_entropy(
            hidden, weight, of.labels, linear_bias=bias, **arguments(hidden.dtype)
        ).sum(),
        lambda hidden, weight, bias: F.cross_entropy(
            hidden @ weight.T + bias, of.labels, ignore_index=IGNORED, **arguments(hidden.dtype)
        ).sum(),
        of, f"linear_cross_entropy {options}",
    )


@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_linear_cross_entropy_of_probabilities(reduction: str, label_smoothing: float) -> None:
    of = case()
    target = of.teacher_logits(torch.float64).softmax(-1)
    check(
        lambda hidden, weight, bias: ours.linear_cross_entropy(
            hidden, weight, target.float(), linear_bias=bias, reduction=reduction, label_smoothing=label_smoothing
        ).sum(),
        lambda hidden, weight, bias: F.cross_entropy(
            hidden @ weight.T + bias, target.to(hidden.dtype), reduction=reduction, label_smoothing=label_smoothing
        ).sum(),
        of, "linear_cross_entropy of probabilities",
    )


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has no linear_cross_entropy before 2.13")
def test_signatures_are_torchs() -> None:
    pairs = [(F.kl_div, ours.kl_div), (F.linear_cross_entropy, ours.linear_cross_entropy)]
    for theirs, own in pairs:
        theirs, own = (inspect.signature(function).parameters.values() for function in (theirs, own))
        assert [(p.name, p.default, p.kind) for p in own] == [(p.name, p.default, p.kind) for p in theirs]


def test_bad_arguments() -> None:
    of = case()
    hidden, weight, _ = of.leaves()
    head = LinearLogits(hidden, weight)
    for call, message in (
        (lambda: ours.kl_div(head, head, log_target=True), "kl_div: target must be without requires_grad"),
        (lambda: ours.kl_div(head, LinearLogits(of.teacher_hidden, of.teacher_weight)), "log_target must be True"),
        (
            lambda: ours.kl_div(head, of.teacher_logits(torch.float32), reduction="none", log_target=True),
            "other than none",
        ),
        (lambda: ours.kl_div(head, head, reduce=True), "size_average and reduce must be None"),
        (lambda: ours.linear_cross_entropy(hidden, weight, of.labels, reduction="max"), "reduction must be one of"),
        (
            lambda: ours.linear_cross_entropy(hidden, weight, of.labels, label_smoothing=2.0),
            "label_smoothing must be in 0..1",
        ),
        (
            lambda: ours.linear_cross_entropy(hidden, weight, of.labels, label_smoothing=0.1, weight=weight[:, 0]),
            "weight must be None with label_smoothing",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
