"""liger-kernel's distillation losses by their own names, arguments and results, computed here.

``from liger_kernel.transformers import LigerFusedLinearJSD`` becomes
``from kd_trainer.integrations.liger import LigerFusedLinearJSD``: nothing else changes. They run on CPUs too, where
most of Liger's need Triton and a GPU; liger-kernel itself need not be installed.

What is deliberately different, in all of them:

* Logits are never rounded to bf16 or fp16, and the gradient of the head is summed in fp32: ``accum_dtype``,
``chunk_size``,
  ``compiled`` and ``eps`` are taken and have no effect (entries of a target that are 0 add nothing, exactly).
* Rows without one that counts give loss 0 and gradient 0; Liger's LigerTVDLoss raises ZeroDivisionError.
* Inputs that are said to be log-probabilities or probabilities are normalised again. For normalised ones nothing
changes,
  and the gradient behind the softmax that made them is the same; plain logits are welcome where log-probabilities are.
* No synchronisation with the host (Liger counts labels and compares the upstream gradient on it).
* Vocabularies of two sizes are an error. Liger's chunked JSD fills the missing *student logits* with 0, which gives
  padding ids probability; pass ``valid_vocab=`` instead, and the padding counts as -inf on both sides.

Gradients go to the student's tensors only, as in Liger.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_kernels import LinearLogits, divergences, kd_loss
from kd_trainer.errors import fail
from kd_trainer.integrations.rows import jsd_with_end_points, logprobs_of, row_losses
from kd_trainer.integrations.versions import check_versions

check_versions("kd_trainer.integrations.liger", "liger-kernel", required=False)

__all__ = [
    "LigerFusedLinearJSD", "LigerFusedLinearJSDLoss", "LigerFusedLinearKLDivLoss", "LigerJSD", "LigerKLDIVLoss",
    "LigerTVDLoss",
]


class LigerFusedLinearJSD(nn.Module):
    """``liger_kernel.transformers.LigerFusedLinearJSD``: generalised JSD of two heads, mean over the rows that count.

    Args:
        jsd_beta: 0 is the forward KL(teacher || student), 1 the reverse.
        ignore_index: of ``shift_labels``.
        temperature: of both; there is no factor T^2.
        accum_dtype: no effect.
        valid_vocab: (ours) the number of real tokens where heads are padded.
    """

    def __init__(
        self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None, *, valid_vocab: int | None = None,
    ) -> None:
        super().__init__()
        self.divergence = jsd_with_end_points("LigerFusedLinearJSD", "jsd_beta", jsd_beta)
        self.ignore_index, self.temperature, self.valid_vocab = ignore_index, temperature, valid_vocab

    def forward(
        self, student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """``[BT, Hs], [V, Hs], [BT, Ht], [V, Ht], [BT] -> scalar``, fp32."""
        return kd_loss(
            LinearLogits(student_input, student_weight, valid_vocab=self.valid_vocab),
            LinearLogits(teacher_input, teacher_weight, valid_vocab=self.valid_vocab),
            self.divergence, labels=shift_labels, ignore_index=self.ignore_index, temperature=self.temperature,
        ).loss


class LigerFusedLinearJSDLoss(nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss``: cross-entropy and generalised JSD of two heads, weighted.

    ``weight_hard_loss CE + weight_soft_loss JSD``, each a mean over the rows that count; CE at temperature 1, JSD at
    ``temperature`` without a factor T^2. ``beta`` as in :class:`LigerFusedLinearJSD`.

    Args:
        compiled, chunk_size: no effect.
        return_soft_hard_loss: return ``(loss, soft, hard)``; the last two without gradient, as in Liger.
        valid_vocab: (ours) the number of real tokens where heads are padded.
    """

    def __init__(
        self, weight_hard_loss: float = 0.5, weight_soft_loss: float = 0.5, beta: float = 0.5, ignore_index: int = -100,
        temperature: float = 1.0, compiled: bool = True, chunk_size: int = 1024, return_soft_hard_loss: bool = False,
        *, valid_vocab: int | None = None,
    ) -> None:
        super().__init__()
        self.divergence = jsd_with_end_points("LigerFusedLinearJSDLoss", "beta", beta)
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.ignore_index, self.temperature, self.valid_vocab = ignore_index, temperature, valid_vocab
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self, student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor,
        true_labels: Tensor, student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """``[BT, Hs], [V, Hs], [BT, Ht], [V, Ht], [BT], [V], [V] -> scalar``, or three."""
        result = kd_loss(
            LinearLogits(student_input, student_weight, student_bias, valid_vocab=self.valid_vocab),
            LinearLogits(teacher_input, teacher_weight, teacher_bias, valid_vocab=self.valid_vocab),
            self.divergence, labels=true_labels, ignore_index=self.ignore_index, temperature=self.temperature,
            ce_weight=self.weight_hard_loss, kd_weight=self.weight_soft_loss,
            stats=("divergence", "label_logprob") if self.return_soft_hard_loss else (),
        )
        if not self.return_soft_hard_loss:
            return result.loss
        count = (true_labels != self.ignore_index).sum().clamp_min(1)
        soft, hard = result.stats["divergence"].nansum() / count, -result.stats["label_logprob"].nansum() / count
        return result.loss, soft, hard


class LigerFusedLinearKLDivLoss(nn.Module):
    """``liger_kernel.transformers.LigerFusedLinearKLDivLoss``: forward KL of a head from given probabilities
    ``[BT, V]``.

    ``temperature`` divides the student's logits only: the target is taken as it is. ``batchmean`` divides by the rows
    that count, ``mean`` by those times V. A target whose rows do not sum to 1 is normalised first (Liger scales the
    row's term).
    """

    def __init__(
        self, reduction: str = "batchmean", ignore_index: int = -100, temperature: float = 1.0, eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("batchmean", "mean", "sum"):
            fail("LigerFusedLinearKLDivLoss", "reduction", "one of batchmean, mean, sum", repr(reduction))
        self.reduction, self.ignore_index, self.temperature = reduction, ignore_index, temperature

    def forward(
        self, student_input: Tensor, student_weight: Tensor, target: Tensor, shift_labels: Tensor | None = None
    ) -> Tensor:
        """``[BT, H], [V, H], [BT, V], [BT] -> scalar``, fp32."""
        student = LinearLogits(student_input, student_weight, scale=1.0 / self.temperature)
        return row_losses(
            "LigerFusedLinearKLDivLoss", student, target.detach().log(), divergences.forward_kl(), self.reduction,
            shift_labels, self.ignore_index,
        )


class LigerKLDIVLoss(nn.KLDivLoss):
    """``liger_kernel.transformers.LigerKLDIVLoss``: forward KL from log-probabilities ``[BT, V]`` (or logits).

    ``log_target`` and ``reduction`` as in ``nn.KLDivLoss``, whose default ``mean`` divides by BT times V; ``none``
    returns ``[BT, V]``.
    """

    def __init__(self, eps: float = 1e-10, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """``[BT, V], [BT, V] -> scalar`` or ``[BT, V]``, fp32."""
        teacher = y_true.detach() if self.log_target else y_true.detach().log()
        return row_losses("LigerKLDIVLoss", y_pred, teacher, divergences.forward_kl(), self.reduction)


class LigerJSD(nn.Module):
    """``liger_kernel.transformers.LigerJSD``: generalised JSD of log-probabilities ``[BT, V]`` (or logits), student
    first.

    Mean over the rows that count; ``beta`` as in :class:`LigerFusedLinearJSD`. A column that both models mask with
    -inf makes Liger's loss NaN; here it adds nothing.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.divergence = jsd_with_end_points("LigerJSD", "beta", beta)
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """``[BT, V], [BT, V], [BT] -> scalar``, fp32."""
        return kd_loss(
            log_q, log_p.detach(), self.divergence, labels=shift_labels, ignore_index=self.ignore_index
        ).loss


class LigerTVDLoss(nn.Module):
    """``liger_kernel.transformers.LigerTVDLoss``: total variation of *probabilities* ``[BT, V]``, student (``p``)
    first.

    ``batchmean`` divides by the rows that count, ``mean`` by those times V; ``none`` returns ``[BT, V]``.
    """

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        self.reduction, self.ignore_index = reduction, ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """``[BT, V], [BT, V], [BT] -> scalar`` or ``[BT, V]``, fp32."""
        return row_losses(
            "LigerTVDLoss", logprobs_of(p), q.detach().log(), divergences.total_variation(), self.reduction,
            shift_labels, self.ignore_index,
        )
