"""The softmax bottleneck: is a student wide enough for what its teacher says?

Godey et al. 2024, "Why do small language models underperform? Studying Language Model Saturation via the Softmax
Bottleneck", arXiv 2404.07647; Yang et al. 2018, "Breaking the Softmax Bottleneck", arXiv 1711.03953. The
log-probabilities of a head of width d, over any number of contexts, are a matrix of rank d, plus a constant a row. So
the d largest singular values of the teacher's centred log-probabilities bound what a student of width d can match:

effective rank   exp of the entropy of the normalised singular values (Roy and Vetterli 2007)
KL floor         mean KL(p || softmax(A_d)), A_d the best rank-d approximation of the teacher's centred
                 log-probabilities in the least-squares sense: what a head of width d reaches without further training.
                 (The best in KL may be a little lower.)
anisotropy       mean cosine of the last hidden states of two contexts; near 1 the head sees nearly one direction
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kd_trainer.data import Document
from kd_trainer.errors import fail
from kd_trainer.evaluate import batches_by_length
from kd_trainer.models import CausalLM, dense_logits


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the normalised singular values: their number if they are equal, 1 if one rules."""
    share = singular_values.double() / singular_values.double().sum()
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


def head_spectrum(weight: Tensor) -> Tensor:
    """fp64 ``[min(V, H)]``: singular values of a head ``[V, H]``, falling, from its Gram matrix: 8 H^2 bytes, 2 V H^2
    operations."""
    wide = weight.shape[0] < weight.shape[1]
    gram = torch.zeros(min(weight.shape), min(weight.shape), dtype=torch.float64, device=weight.device)
    for part in (weight.t() if wide else weight).split(4096):
        gram += part.double().t() @ part.double()
    return torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt().flip(0)


def anisotropy(hidden: Tensor) -> float:
    """Mean cosine between two different rows of ``[N, H]``, over all pairs."""
    if len(hidden) < 2:
        fail("anisotropy", "hidden", "of at least two rows", len(hidden))
    unit = torch.nn.functional.normalize(hidden.double(), dim=1)
    count = len(hidden)
    return float((unit.sum(0).square().sum() - count) / (count * (count - 1)))


@dataclass(frozen=True)
class Floor:
    """The centred log-probabilities of a teacher over M contexts.

    Attributes:
        singular_values: fp64 ``[M]``, falling.
        kl: nats, by width: mean KL(p || softmax of the best approximation of that rank).
    """

    singular_values: Tensor
    kl: dict[int, float]

    @property
    def effective_rank(self) -> float:
        return effective_rank(self.singular_values)


def rank_floor(logits: Tensor, widths: Sequence[int]) -> Floor:
    """What heads of these widths can reach of a teacher's rows.

    Args:
        logits: floats ``[M, V]``: a few thousand contexts. All finite.
        widths: at least 0 each; 0 is one distribution for all contexts... of a constant: the uniform one.

    Memory: 8 M V bytes twice, and 8 M^2.
    """
    if not bool(logits.isfinite().all()):
        fail("rank_floor", "logits", "finite", "infinite or NaN entries", "leave masked columns out")
    centred = logits.double() - logits.double().mean(1, keepdim=True)
    values, left = torch.linalg.eigh(centred @ centred.t())
    values, left = values.flip(0).clamp_min(0.0), left.flip(1)
    logp = centred.log_softmax(1)
    floor = {}
    for width in widths:
        basis = left[:, :width]
        q = (basis @ (basis.t() @ centred)).log_softmax(1)
        floor[width] = float((logp.exp() * (logp - q)).sum(1).mean())
    return Floor(values.sqrt(), floor)


@dataclass(frozen=True)
class BottleneckReport:
    """Of one teacher and one student on the same contexts; KL in nats."""

    contexts: int
    teacher_width: int
    student_width: int
    teacher_head_rank: float
    student_head_rank: float
    teacher_anisotropy: float
    student_anisotropy: float
    logprob_rank: float
    floor_at_student_width: float
    floor_at_half_of_it: float

    def table(self) -> str:
        names = {
            "contexts": "contexts", "teacher_width": "teacher's width", "student_width": "student's width",
            "teacher_head_rank": "effective rank of the teacher's head",
            "student_head_rank": "effective rank of the student's head",
            "teacher_anisotropy": "teacher's anisotropy", "student_anisotropy": "student's anisotropy",
            "logprob_rank": "effective rank of the teacher's log-probabilities",
            "floor_at_student_width": "KL floor at the student's width, nats",
            "floor_at_half_of_it": "KL floor at half of it, nats",
        }
        width = max(map(len, names.values()))
        lines = [f"{names[key].ljust(width)}  {value:.4g}" for key, value in asdict(self).items()]
        return "\n".join(lines)


@torch.no_grad()
def bottleneck_report(
    teacher: CausalLM, student: CausalLM, documents: Sequence[Document], *, contexts: int = 2048,
    batch_tokens: int = 2048
) -> BottleneckReport:
    """Heads, hidden states and the KL floor of two models on the rows that count of some documents.

    Args:
        contexts: of so many rows at most, spread evenly: memory is 24 V bytes each.

    Raises:
        ValueError: other vocabularies; fewer than two rows.
    """
    if teacher.vocab != student.vocab:
        fail("bottleneck_report", "the student's vocabulary", f"the teacher's {teacher.vocab}", student.vocab)
    hidden: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    for batch in batches_by_length(documents, batch_tokens):
        for name, model in (("teacher", teacher), ("student", student)):
            rows = batch.to(model.device)
            hidden[name].append(model.hidden(rows)[rows.counted].float())
    states = {name: torch.cat(parts) for name, parts in hidden.items()}
    picked = torch.linspace(0, len(states["teacher"]) - 1, min(contexts, len(states["teacher"]))).long().unique()
    states = {name: rows[picked.to(rows.device)] for name, rows in states.items()}
    width = states["student"].shape[1]
    floor = rank_floor(dense_logits(teacher.logits_of(states["teacher"])), (width, width // 2))
    return BottleneckReport(
        contexts=len(picked), teacher_width=states["teacher"].shape[1], student_width=width,
        teacher_head_rank=effective_rank(head_spectrum(teacher.head.weight[: teacher.vocab].detach())),
        student_head_rank=effective_rank(head_spectrum(student.head.weight[: student.vocab].detach())),
        teacher_anisotropy=anisotropy(states["teacher"]), student_anisotropy=anisotropy(states["student"]),
        logprob_rank=floor.effective_rank, floor_at_student_width=floor.kl[width],
        floor_at_half_of_it=floor.kl[width // 2],
    )
