"""torch's own losses of a vocabulary by their names, arguments and results, computed here.

``F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="batchmean", log_target=True)`` becomes
``kl_div(student, teacher, reduction="batchmean", log_target=True)`` with logits, or with
:class:`~kd_kernels.LinearLogits` in their place, and log-probabilities work as before. What is deliberately different:

* ``input`` is normalised (log-probabilities are unchanged by that), and so is a target; torch takes unnormalised ones.
* No gradient for the target: one that requires grad is refused.
* :func:`linear_cross_entropy` never holds logits, whatever ``options`` says, and does the same under ``torch.compile``.

The signatures are those of torch 2.13. They need nothing of its own losses, so torch may be as old as the library takes
(2.11, which has no ``F.linear_cross_entropy``); an older one is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_kernels import LinearLogits, divergences, kd_loss
from kd_trainer.errors import check_one_of, fail
from kd_trainer.integrations.rows import row_losses, without_gradient
from kd_trainer.integrations.versions import check_torch

check_torch("kd_trainer.integrations.torch")

__all__ = ["KLDivLoss", "kl_div", "linear_cross_entropy"]


def kl_div(
    input: Tensor | LinearLogits, target: Tensor | LinearLogits, size_average: None = None, reduce: None = None,
    reduction: str = "mean", log_target: bool = False,
) -> Tensor:
    """``F.kl_div``: ``KL(target || input)`` of logits or log-probabilities ``[..., V]``.

    Args:
        input: the student's logits (or log-probabilities), or what stands for them.
        target: the teacher's probabilities; with ``log_target`` its logits or log-probabilities.
        size_average, reduce: torch's deprecated arguments; leave them None.
        reduction: "mean" divides by the number of *entries* (torch's default, V times too small), "batchmean" by
            ``input.shape[0]``, "sum", or "none": the entries, for tensors only.

    Returns:
        fp32 (fp64 for fp64 input), nats.
    """
    if size_average is not None or reduce is not None:
        fail("kl_div", "size_average and reduce", "None", f"{size_average} and {reduce}", "use reduction")
    if isinstance(target, LinearLogits) and not log_target:
        fail("kl_div", "log_target", "True for a target of LinearLogits", False)
    without_gradient("kl_div", "target", target)
    teacher = target if log_target else target.log()
    leading = input.leading_shape if isinstance(input, LinearLogits) else input.shape[:-1]
    if reduction == "batchmean" and len(leading) > 1:  # torch divides by the first dimension, not by the rows
        return row_losses("kl_div", input, teacher, divergences.forward_kl(), "sum") / leading[0]
    return row_losses("kl_div", input, teacher, divergences.forward_kl(), reduction)


class KLDivLoss(nn.KLDivLoss):
    """``nn.KLDivLoss`` by :func:`kl_div`."""

    def forward(self, input: Tensor | LinearLogits, target: Tensor | LinearLogits) -> Tensor:
        """``[..., V], [..., V] -> scalar``, or the entries."""
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: str = "mean", ignore_index: int | None = None,
    label_smoothing: float = 0.0, options: object = None,
) -> Tensor:
    """``F.linear_cross_entropy``: cross-entropy of ``input @ linear_weight.T + linear_bias`` with class indices or
    probabilities.

    Args:
        input: ``[N, H]`` or ``[H]``.
        linear_weight: ``[V, H]``; torch's K-dimensional weights are refused.
        target: int64 ``[N]``, or probabilities ``[N, V]`` (the loss is then the cross-entropy, not the KL).
        weight: fp ``[V]``, of the classes; the mean divides by the weights of the rows' targets. Class indices only,
            and without ``label_smoothing``.
        reduction: "mean", "sum" or "none" (one loss a row).
        ignore_index: None: -100. Class indices only.
        label_smoothing: in 0..1; the target becomes ``(1 - s) target + s / V``.
        options: no effect; see above.

    Returns:
        fp32 (fp64 for fp64 input), nats.
    """
    where = "linear_cross_entropy"
    check_one_of(where, "reduction", reduction, ("mean", "sum", "none"))
    if not 0.0 <= label_smoothing <= 1.0:
        fail(where, "label_smoothing", "in 0..1", label_smoothing)
    student = LinearLogits(input, linear_weight, linear_bias)
    if target.is_floating_point():
        if weight is not None or ignore_index is not None:
            fail(where, "weight and ignore_index", "None with a target of probabilities", "one of them")
        return _from_probabilities(student, target, reduction, label_smoothing)
    if weight is not None and label_smoothing:
        fail(where, "weight", "None with label_smoothing", "both", "scale the rows' losses of reduction none")
    ignore_index = -100 if ignore_index is None else ignore_index
    options_ = dict(labels=target, ignore_index=ignore_index, reduction=reduction)
    if weight is not None:
        options_["token_weight"] = weight.detach()[target.clamp_min(0)]
    if not label_smoothing:
        return kd_loss(student, None, kd_weight=0.0, ce_weight=1.0, **options_).loss
    # KL(u || q) = -log V - mean log q for the uniform u, a head of width 1 that costs nothing
    vocab = linear_weight.shape[0]
    uniform = LinearLogits(input.new_zeros(*input.shape[:-1], 1), linear_weight.new_zeros(vocab, 1))
    result = kd_loss(
        student, uniform, "forward_kl", kd_weight=label_smoothing, ce_weight=1.0 - label_smoothing, **options_
    )
    counted = (target != ignore_index).to(result.loss.dtype)
    constant = label_smoothing * torch.log(torch.tensor(float(vocab), dtype=torch.float64)).item() * counted
    return result.loss + _reduced(constant, reduction, counted.sum().clamp_min(1))


def _from_probabilities(student: LinearLogits, target: Tensor, reduction: str, label_smoothing: float) -> Tensor:
    if label_smoothing:
        target = (1.0 - label_smoothing) * target + label_smoothing / target.shape[-1]
    without_gradient("linear_cross_entropy", "target", target)
    entropy = torch.special.entr(target).sum(-1)
    loss = kd_loss(student, target.log(), "forward_kl", reduction=reduction).loss
    return loss + _reduced(entropy.to(loss.dtype), reduction, max(1, entropy.numel()))


def _reduced(rows: Tensor, reduction: str, count: Tensor | int) -> Tensor:
    if reduction == "none":
        return rows
    return rows.sum() / count if reduction == "mean" else rows.sum()
