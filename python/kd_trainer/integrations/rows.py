"""What the integrations with the losses of other libraries share: their conventions put into ours."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels import Divergence, LinearLogits, divergences, kd_loss
from kd_trainer.errors import check_one_of, fail

REDUCTIONS = ("batchmean", "mean", "sum", "none")
"""Of ``nn.KLDivLoss``. ``mean`` divides by the number of *entries* there, ``batchmean`` by the number of rows."""


def jsd_with_end_points(where: str, argument: str, beta: float) -> Divergence:
    """The generalised JSD as TRL and Liger parametrise it: forward KL at 0, reverse KL at 1, between them ours.

    Theirs is ``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``, as ours. Their end points
    are not its limits, which are 0, but the KLs without the factor beta or 1 - beta: the loss jumps there (by 1/beta),
    in their trainers and so here.
    """
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0.0 <= beta <= 1.0:
        fail(where, argument, "a number in 0..1", beta)
    if beta == 0.0:
        return divergences.forward_kl()
    return divergences.reverse_kl() if beta == 1.0 else divergences.jsd(float(beta))


def logprobs_of(probabilities: Tensor) -> Tensor:
    """Logits of a distribution that is given as probabilities; 0 becomes the smallest number that has a finite
    gradient."""
    if probabilities.requires_grad:
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return probabilities.log()


def without_gradient(where: str, argument: str, target: Tensor | LinearLogits) -> None:
    """Raise where a gradient with respect to a teacher is asked for: there is none here, and silence would be a
    change."""
    tensors = (target.hidden, target.weight) if isinstance(target, LinearLogits) else (target,)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        fail(where, argument, "without requires_grad", "a tensor that requires grad", f"pass {argument}.detach()")


def row_losses(
    where: str, student: Tensor | LinearLogits, teacher: Tensor | LinearLogits, divergence: Divergence, reduction: str,
    labels: Tensor | None = None, ignore_index: int = -100, temperature: float = 1.0,
) -> Tensor:
    """A divergence under the reductions of ``nn.KLDivLoss``; rows whose label is ``ignore_index`` do not count."""
    check_one_of(where, "reduction", reduction, REDUCTIONS)
    vocab = student.vocab if isinstance(student, LinearLogits) else student.shape[-1]
    if reduction == "none":
        if isinstance(student, LinearLogits) or isinstance(teacher, LinearLogits):
            fail(
                where, "reduction", "other than none for a LinearLogits", '"none"',
                'the entries of [N, V] are what it never holds; kd_loss(..., reduction="none") gives one loss a row',
            )
        logq, logp = (logits.float().div(temperature).log_softmax(-1) for logits in (student, teacher.detach()))
        entries, _ = divergences.torch_terms(divergence)(logp, logq)
        return entries if labels is None else entries.masked_fill((labels == ignore_index)[..., None], 0.0)
    options = dict(labels=labels, ignore_index=ignore_index, temperature=temperature)
    if reduction == "sum":
        return kd_loss(student, teacher, divergence, reduction="sum", **options).loss
    loss = kd_loss(student, teacher, divergence, **options).loss
    return loss / vocab if reduction == "mean" else loss
