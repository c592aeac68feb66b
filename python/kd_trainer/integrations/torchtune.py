"""torchtune's KL losses by their own names, arguments and results, computed here.

In a recipe's configuration ``kd_loss: {_component_: torchtune.modules.loss.ForwardKLWithChunkedOutputLoss}`` becomes
``_component_: kd_trainer.integrations.torchtune.ForwardKLWithChunkedOutputLoss``. Logits may also be given as
:class:`~kd_kernels.LinearLogits`: then they never exist.

The forward KL here is torchtune's: the cross-entropy *of the teacher's distribution*, that is KL + entropy of the
teacher, so that curves go on where they were. Gradients are those of the KL. What is deliberately different:

* No row that counts: loss 0 with gradient 0. torchtune returns a constant that ``backward`` refuses (forward KL, and
all
  unchunked ones) or NaN (chunked reverse and symmetric KL).
* Where the teacher has -inf and the student has mass, the reverse KL is inf. torchtune leaves such ids out of the sum,
and so
  lets the student keep mass there. Padding columns: slice them, or give ``LinearLogits(valid_vocab=...)``.
* NaN and +inf in logits are an error on a CPU and NaN on a GPU; torchtune masks infinities.
* More or fewer chunks of logits than of labels are an error; torchtune leaves the surplus out.
* A teacher that requires grad is refused: there is no gradient for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_kernels import Divergence, LinearLogits, divergences, kd_loss
from kd_trainer.errors import fail
from kd_trainer.integrations.rows import without_gradient
from kd_trainer.integrations.versions import check_versions

check_versions("kd_trainer.integrations.torchtune", "torchtune", required=False)

__all__ = [
    "ForwardKLLoss", "ForwardKLWithChunkedOutputLoss", "ReverseKLLoss", "ReverseKLWithChunkedOutputLoss",
    "SymmetricKLLoss", "SymmetricKLWithChunkedOutputLoss",
]

Logits = Tensor | LinearLogits


class _KLLoss(nn.Module):
    """A divergence plus a share of the teacher's entropy; the mean is over the labels that are not ``ignore_index``."""

    divergence: Divergence
    entropy_share: float

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(
        self, student_logits: Logits, teacher_logits: Logits, labels: Tensor, normalize: bool = True
    ) -> Tensor:
        """``[N, V], [N, V]``, labels of N elements ``-> scalar``, fp32; ``normalize=False`` sums over the rows."""
        return self._sum(student_logits, teacher_logits, labels.reshape(-1), self._count(labels) if normalize else 1)

    def _count(self, labels: Tensor) -> Tensor:
        return (labels != self.ignore_index).sum().clamp_min(1)

    def _sum(self, student: Logits, teacher: Logits, labels: Tensor, count: Tensor | int) -> Tensor:
        """Sum over the rows that count, over ``count``."""
        without_gradient(type(self).__name__, "teacher_logits", teacher)
        result = kd_loss(
            student, teacher, self.divergence, labels=labels, ignore_index=self.ignore_index, normalizer=count,
            stats=("teacher_entropy",) if self.entropy_share else (),
        )
        if not self.entropy_share:
            return result.loss
        return result.loss + self.entropy_share * result.stats["teacher_entropy"].nansum() / count


class ForwardKLLoss(_KLLoss):
    """``-sum p log q``: forward KL plus the teacher's entropy, as torchtune computes it."""

    divergence, entropy_share = divergences.forward_kl(), 1.0


class ReverseKLLoss(_KLLoss):
    """``KL(q || p)``."""

    divergence, entropy_share = divergences.reverse_kl(), 0.0


class SymmetricKLLoss(_KLLoss):
    """``sym_kd_ratio`` times :class:`ForwardKLLoss` plus ``1 - sym_kd_ratio`` times :class:`ReverseKLLoss`, in one
    pass."""

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(ignore_index)
        if not 0.0 <= sym_kd_ratio <= 1.0:
            fail("SymmetricKLLoss", "sym_kd_ratio", "in 0..1", sym_kd_ratio)
        self.sym_kd_ratio = self.entropy_share = float(sym_kd_ratio)
        ends = {0.0: divergences.reverse_kl, 1.0: divergences.forward_kl}
        make = ends.get(self.sym_kd_ratio, lambda: divergences.jeffreys(self.sym_kd_ratio))
        self.divergence = make()


class _ChunkedKLLoss(nn.Module):
    """The loss over lists of chunks ``[B, T / chunks, V]`` of logits, labels ``[B, T]``, and one mean over all of
    them."""

    def __init__(self, loss: _KLLoss, num_output_chunks: int) -> None:
        super().__init__()
        self.loss, self.num_output_chunks, self.ignore_index = loss, num_output_chunks, loss.ignore_index

    def forward(self, student_logits: Sequence[Logits], teacher_logits: Sequence[Logits], labels: Tensor) -> Tensor:
        """Lists of ``num_output_chunks`` chunks ``-> scalar``, fp32."""
        pieces = labels.chunk(self.num_output_chunks, dim=1)
        if not len(student_logits) == len(teacher_logits) == len(pieces):
            fail(
                type(self).__name__, "student_logits and teacher_logits",
                f"lists of {len(pieces)} chunks like the labels", f"{len(student_logits)} and {len(teacher_logits)}",
            )
        count = self.loss._count(labels)
        student, teacher = ([_rows(chunk) for chunk in chunks] for chunks in (student_logits, teacher_logits))
        targets = [piece.reshape(-1) for piece in pieces]
        if _of_one_head(student) and _of_one_head(teacher):  # one gradient of the head in place of one a chunk
            student, teacher, targets = [_joined(student)], [_joined(teacher)], [torch.cat(targets)]
        return torch.stack([self.loss._sum(*part, count) for part in zip(student, teacher, targets)]).sum()


def _rows(logits: Logits) -> Logits:
    """Leading dimensions as one."""
    if isinstance(logits, Tensor):
        return logits.reshape(-1, logits.shape[-1])
    return dataclasses.replace(logits, hidden=logits.hidden.reshape(-1, logits.hidden.shape[-1]))


def _of_one_head(chunks: Sequence[Logits]) -> bool:
    """Whether chunks differ in their hidden states alone."""
    first = chunks[0]
    return all(
        isinstance(chunk, LinearLogits) and chunk.weight is first.weight and chunk.bias is first.bias
        and (chunk.scale, chunk.softcap, chunk.valid_vocab) == (first.scale, first.softcap, first.valid_vocab)
        for chunk in chunks
    )


def _joined(chunks: Sequence[LinearLogits]) -> LinearLogits:
    return dataclasses.replace(chunks[0], hidden=torch.cat([chunk.hidden for chunk in chunks]))


class ForwardKLWithChunkedOutputLoss(_ChunkedKLLoss):
    """:class:`ForwardKLLoss` over chunks."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(ForwardKLLoss(ignore_index), num_output_chunks)


class ReverseKLWithChunkedOutputLoss(_ChunkedKLLoss):
    """:class:`ReverseKLLoss` over chunks."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(ReverseKLLoss(ignore_index), num_output_chunks)


class SymmetricKLWithChunkedOutputLoss(_ChunkedKLLoss):
    """:class:`SymmetricKLLoss` over chunks."""

    def __init__(self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(SymmetricKLLoss(sym_kd_ratio, ignore_index), num_output_chunks)
        self.sym_kd_ratio = sym_kd_ratio
