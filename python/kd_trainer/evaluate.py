"""How close students are to their teacher, and how good both are at the text.

Everything is measured on the rows that count, from fp32 logits that exist for a few rows at a time:

perplexity   exp of the mean next-token cross-entropy
KL(p||q), KL(q||p)   nats a token; p is the teacher
agreement    fraction of rows where both have the same most probable token
acceptance   1 - total variation: the chance that speculative decoding accepts a token drafted by the student
             (Leviathan et al., arXiv 2211.17192, corollary 3.6)
ECE          expected calibration error of the most probable token, 15 bins of equal width
             (Guo et al., arXiv 1706.04599)
overlap      mean share of the teacher's k most probable tokens that are among the student's k
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd_kernels import LinearLogits, kd_loss
from kd_trainer.data import Batch, Document, collate
from kd_trainer.errors import check_one_of, fail
from kd_trainer.files import progress
from kd_trainer.models import CausalLM, dense_logits, rows_of

BINS = 15
TOP_K = 10
CHUNK_BYTES = 64 * 2**20
DIVERGENCES = ("forward_kl", "reverse_kl", "total_variation")
STATS = (
    "agreement", "label_logprob", "student_top1", "student_confidence", "teacher_label_logprob", "teacher_top1",
    "teacher_confidence",
)
COLUMNS = {
    "perplexity": "perplexity", "forward_kl": "KL(p||q)", "reverse_kl": "KL(q||p)", "agreement": "agreement",
    "acceptance": "acceptance", "overlap": "overlap", "ece": "ECE",
}
RIGHT = ("label", "teacher")


class Calibration:
    """Counts of confidence and correctness by bin of confidence."""

    def __init__(self) -> None:
        self._counts = torch.zeros(3, BINS, dtype=torch.float64)  # rows, confidence, correct

    def add(self, confidence: Tensor, correct: Tensor) -> None:
        confidence, correct = confidence.double().cpu(), correct.double().cpu()
        bins = (confidence * BINS).long().clamp(0, BINS - 1)
        self._counts.index_add_(1, bins, torch.stack([torch.ones_like(confidence), confidence, correct]))

    def error(self) -> float:
        """sum over bins of (rows in it / rows) * |accuracy - mean confidence|."""
        rows, confidence, correct = self._counts
        return float((correct - confidence).abs().sum() / rows.sum())


class _Scores:
    """Sums over rows of one model."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.calibration = Calibration()

    def add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())


@torch.no_grad()
def evaluate(
    teacher: CausalLM, students: Mapping[str, CausalLM], documents: Sequence[Document],
    *, batch_tokens: int = 2048, device: torch.device | None = None, top_k: int = TOP_K, right: str = "label",
) -> dict[str, object]:
    """Compare students with a teacher on documents.

    Args:
        top_k: k of the overlap.
        right: what a model's confidence is held against for the ECE: "label", whether its first token is the text's
            next one; or "teacher", the teacher's probability of that token, for text that has no truth in it.

    Returns:
        ``{"tokens": n, "top_k": k, "models": {"teacher": {...}, name: {...}, ...}}`` with the quantities of the
        module's docstring; what a model is to itself (KL 0, agreement 1) is included for the teacher.

    Raises:
        ValueError: a student with another vocabulary than the teacher's; top_k out of range.
    """
    check_one_of("evaluate", "right", right, RIGHT)
    if not 1 <= top_k <= teacher.vocab:
        fail("evaluate", "top_k", f"in 1..{teacher.vocab}, the vocabulary", top_k)
    for name, student in students.items():
        if student.vocab != teacher.vocab:
            fail(
                "evaluate", f"the vocabulary of {name}", f"the teacher's {teacher.vocab}", student.vocab,
                "teacher and student must share a tokenizer",
            )
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in (teacher, *students.values()):
        model.eval().to(device)
    chunk = max(1, CHUNK_BYTES // (4 * teacher.vocab))
    scores = {name: _Scores() for name in ("teacher", *students)}
    rows = 0
    with progress(total=sum(int(document.counted.sum()) for document in documents), desc="evaluate", unit="tok") as bar:
        for batch in batches_by_length(documents, batch_tokens):
            batch = batch.to(device)
            p_logits = teacher(batch)
            q_logits = {name: student(batch) for name, student in students.items()}
            for index in batch.counted.split(chunk):
                labels, p = batch.labels[index], _rows(p_logits, index)
                of_teacher: _Scores | None = scores["teacher"]
                for name, logits in q_logits.items():
                    _compare(scores[name], of_teacher, _rows(logits, index), p, labels, top_k, right)
                    of_teacher = None  # once a row is enough
                rows += len(index)
                bar.update(len(index))
    models = {name: _summary(score, rows) for name, score in scores.items()}
    models["teacher"] |= {"forward_kl": 0.0, "reverse_kl": 0.0, "agreement": 1.0, "acceptance": 1.0, "overlap": 1.0}
    return {"tokens": rows, "top_k": top_k, "models": models}


def batches_by_length(documents: Sequence[Document], batch_tokens: int) -> list[Batch]:
    """Batches of documents of nearly one length, a row each: no mask, little padding. Longest first, so that what
    does not fit into memory fails at once."""
    ordered = sorted(documents, key=lambda document: -len(document))
    batches, begin = [], 0
    while begin < len(ordered):
        count = max(1, batch_tokens // len(ordered[begin]))
        batches.append(collate(ordered[begin : begin + count], len(ordered[begin]), packing=False))
        begin += count
    return batches


def _rows(logits: LinearLogits, index: Tensor) -> Tensor:
    return dense_logits(rows_of(logits, index))


def _compare(
    student: _Scores, teacher: _Scores | None, q: Tensor, p: Tensor, labels: Tensor, top_k: int, right: str
) -> None:
    """Add the rows of one chunk to a student's sums, and to the teacher's where it is given."""
    for divergence in DIVERGENCES:
        first = divergence == DIVERGENCES[0]
        wanted = ("divergence", *STATS) if first else ("divergence",)
        stats = kd_loss(q, p, divergence, labels=labels, stats=wanted).stats
        student.add(divergence, stats["divergence"])
        if first:
            student.add("agreement", stats["agreement"])
            student.add("label_logprob", stats["label_logprob"])
            is_right = lambda top: top == labels if right == "label" else _probability(p, top)  # noqa: E731
            student.calibration.add(stats["student_confidence"], is_right(stats["student_top1"]))
            if teacher is not None:
                teacher.add("label_logprob", stats["teacher_label_logprob"])
                teacher.calibration.add(stats["teacher_confidence"], is_right(stats["teacher_top1"]))
    shared = q.topk(top_k).indices[:, :, None] == p.topk(top_k).indices[:, None, :]
    student.add("overlap", shared.sum((1, 2)) / top_k)


def _probability(logits: Tensor, ids: Tensor) -> Tensor:
    """``[N]``: of an id a row."""
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0].exp()


def _summary(score: _Scores, rows: int) -> dict[str, float]:
    means = {name: total / rows for name, total in score.sums.items()}
    summary = {"perplexity": math.exp(-means.pop("label_logprob")), "ece": score.calibration.error()}
    if "total_variation" in means:
        means["acceptance"] = 1.0 - means.pop("total_variation")
    return summary | means


def table(result: Mapping[str, object]) -> str:
    """The result of :func:`evaluate` for people."""
    header = ["", *COLUMNS.values()]
    body = [
        [name, *(_number(key, values[key]) for key in COLUMNS)] for name, values in result["models"].items()
    ]
    widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]
    lines = []
    for name, *cells in (header, *body):
        lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    lines.insert(1, "-" * len(lines[0]))
    about = f"p is the teacher, KL in nats a token; overlap of the first {result['top_k']}"
    return "\n".join([*lines, f"{result['tokens']:,} tokens; {about}"])


def _number(key: str, value: float) -> str:
    if key == "perplexity":
        return f"{value:,.1f}" if value >= 100.0 else f"{value:.3g}"
    return f"{100 * value:.1f}%" if key in ("agreement", "acceptance", "overlap") else f"{value:.3f}"
