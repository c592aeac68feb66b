"""The row pass in torch operations: any device, any dtype, any divergence. The text to read first.

Both functions take a chunk of C rows in the work dtype (fp32 or fp64) and return, per row, the loss (fp64, not weighted
by the row's weight), the statistics (fp64 ``[C, len(STATS)]``, or None) and a status (int32: 0, or bits of what is
wrong with the row). Where ``gradient`` is given they write ``weight * d loss / d raw`` there; it may be the student's
own memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels.divergences import torch_terms
from kd_kernels.loss.plan import STATS, RowJob, Rows
from kd_kernels.products import RawRows, SparseRows

BAD_STUDENT, BAD_TEACHER, BAD_LABEL, BAD_IDS, BAD_TAIL, BAD_IMPORTANCE = 1, 2, 4, 8, 16, 32
"""Bits of a row's status, as in csrc/cpu/row_loss.h."""

MASS_TOLERANCE = 0.1
"""How far above 1 a sparse row's mass may be: a cache rounds log-probabilities; unnormalised scores miss by far
more."""

COPIES = 10
"""Temporaries of the size of a chunk that the row pass holds at once, beside its inputs."""

NATIVE = False
"""Whether logits are read in any dtype (else: in the work dtype alone)."""


def scratch(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a row, and that any number of rows, takes beside the logits."""
    return COPIES * columns * dtype.itemsize, 0


def dense_rows(
    student: RawRows, teacher: RawRows, job: RowJob, labels: Tensor | None, weight: Tensor, gradient: Tensor | None,
    want_stats: bool,
) -> Rows:
    """Rows of a dense teacher."""
    z = student.logits()
    logq = torch.log_softmax(z / job.temperature, 1)
    logp = torch.log_softmax(teacher.logits() / job.temperature, 1)
    active = weight != 0
    status = BAD_STUDENT * _is_bad(logq) + BAD_TEACHER * _is_bad(logp)
    f, g = torch_terms(job.divergence)(logp, logq)
    divergence, total_g = f.sum(1, dtype=torch.float64), g.sum(1, dtype=torch.float64)

    labels, label_status = _usable_labels(labels, z.shape[1], job, want_stats)
    status = torch.where(active, status + label_status, 0).int()
    logq_label_space = logq if job.temperature == 1.0 else torch.log_softmax(z, 1)
    label_logprob = _at_labels(logq_label_space, labels)

    stats = None
    if want_stats:
        stats = _stats(
            divergence=divergence, student_entropy=_entropy(logq), teacher_entropy=_entropy(logp),
            agreement=logq.argmax(1) == logp.argmax(1), captured_mass=torch.ones_like(divergence),
            label_logprob=label_logprob, teacher_label_logprob=_at_labels(logp, labels), student_top1=logq.argmax(1),
            teacher_top1=logp.argmax(1), student_confidence=logq.amax(1).exp(), teacher_confidence=logp.amax(1).exp(),
        )
    if gradient is not None:
        slot = torch.zeros_like(g)  # 0 times an infinite divergence is nothing
        if job.kd_weight != 0:
            slot = (g - logq.exp() * total_g.to(g.dtype)[:, None]) * (job.kd_weight / job.temperature)
        _write_gradient(gradient, slot, student, z, logq_label_space, job, labels, weight)
    return _loss(divergence, label_logprob, job, active), _masked(stats, active), status


def sparse_rows(
    student: RawRows, teacher: SparseRows, job: RowJob, labels: Tensor | None, weight: Tensor, gradient: Tensor | None,
    want_stats: bool,
) -> Rows:
    """Rows of a teacher known at some ids. ``teacher.logprobs`` are at ``job.temperature`` already."""
    z = student.logits()
    logq = torch.log_softmax(z / job.temperature, 1)
    row, ids, logp, importance = _entries(teacher)
    active = weight != 0
    bucket = job.tail == "bucket" and importance is None
    renormalize = job.tail == "renormalize" and importance is None

    per_row = lambda x: torch.zeros_like(weight).index_add_(0, row, x.double())  # noqa: E731
    outside = (ids < 0) | (ids >= z.shape[1])
    ids = ids.clamp(0, z.shape[1] - 1)
    kept = torch.zeros_like(z, dtype=torch.int32).index_put_((row, ids), torch.ones_like(ids, dtype=torch.int32), True)
    captured = per_row(logp.exp())
    over_one = captured > 1 + MASS_TOLERANCE if importance is None else torch.zeros_like(active)
    status = BAD_STUDENT * _is_bad(logq) + BAD_IDS * ((kept.amax(1) > 1) | (per_row(outside) > 0))
    if importance is not None:
        usable = importance.isfinite() & (importance >= 0)
        status = status + BAD_IMPORTANCE * (per_row(~usable) > 0)
    if bucket:
        status = status + BAD_TAIL * ~(teacher.tail_logprob <= 1e-4)
        over_one = over_one | (captured + teacher.tail_logprob.double().exp() > 1 + MASS_TOLERANCE)
    status = status + BAD_TEACHER * (over_one | (per_row(~(logp <= 1e-4)) > 0))
    labels, label_status = _usable_labels(labels, z.shape[1], job, want_stats)
    status = torch.where(active, status + label_status, 0).int()

    # The events: kept ids and, with "bucket", the tail as one more.
    logq_event = logq[row, ids]
    logp_event = logp
    if renormalize:
        logp_event = logp - per_row(logp.exp()).log().to(z.dtype)[row]
        logq_event = logq_event - per_row(logq_event.exp()).log().to(z.dtype)[row]
    terms = torch_terms(job.divergence)
    f, g = terms(logp_event, logq_event)
    if importance is not None:
        f, g = f * importance, g * importance
    divergence, total_g = per_row(f), per_row(g)
    logq_tail = torch.logsumexp(logq.masked_fill(kept > 0, -torch.inf), 1)
    if bucket:
        f_tail, g_tail = terms(teacher.tail_logprob, logq_tail)
        divergence, total_g = divergence + f_tail, total_g + g_tail

    logq_label_space = logq if job.temperature == 1.0 else torch.log_softmax(z, 1)
    label_logprob = _at_labels(logq_label_space, labels)
    stats = None
    if want_stats:
        stats = _sparse_stats(teacher.tail_logprob, row, ids, logp, logq, divergence, captured, label_logprob, labels)
    if gradient is not None:
        # What an id outside the kept set gets is proportional to its q: the tail's g spread over it, less its share of
        # G.
        q, shared = logq.exp(), total_g.to(z.dtype)
        spread = torch.zeros_like(shared) if renormalize else -shared
        if bucket:
            spread = spread + torch.where(logq_tail > -torch.inf, g_tail / logq_tail.exp(), 0.0)
        slot = q * spread[:, None]
        slot[row, ids] = g - logq_event.exp() * shared[row]
        slot = slot * (job.kd_weight / job.temperature) if job.kd_weight != 0 else torch.zeros_like(slot)
        _write_gradient(gradient, slot, student, z, logq_label_space, job, labels, weight)
    return _loss(divergence, label_logprob, job, active), _masked(stats, active), status


def _entries(rows: SparseRows) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The chunk's own entries: the row of each, its id, its log-probability, its importance."""
    counts = rows.ends - rows.starts
    before = counts.cumsum(0) - counts
    row = torch.repeat_interleave(counts)
    entry = torch.arange(row.shape[0], device=row.device) + (rows.starts - before)[row]
    return row, rows.ids[entry], rows.logprobs[entry], None if rows.importance is None else rows.importance[entry]


def _sparse_stats(
    tail_logprob: Tensor | None, row: Tensor, ids: Tensor, logp: Tensor, logq: Tensor, divergence: Tensor,
    captured: Tensor, label_logprob: Tensor, labels: Tensor | None,
) -> Tensor:
    """The teacher's entropy counts the tail as one event; its top-1 is the likeliest kept id, the lowest among
    equals."""
    count = divergence.shape[0]
    p_log_p = lambda x: torch.where(x > -torch.inf, x.exp() * x, 0.0).double()  # noqa: E731
    entropy = -torch.zeros_like(divergence).index_add_(0, row, p_log_p(logp))
    if tail_logprob is not None:
        entropy = entropy - p_log_p(tail_logprob)
    best = torch.full_like(divergence, -torch.inf).scatter_reduce_(0, row, logp.double(), "amax")
    never = logq.shape[1]
    is_best = logp.double() == best[row]
    top1 = torch.full((count,), never, dtype=torch.int64, device=ids.device)
    top1 = top1.scatter_reduce_(0, row[is_best], ids[is_best], "amin")
    has_entry = top1 < never
    top1 = torch.where(has_entry, top1, -1)
    teacher_label = torch.full_like(divergence, torch.nan)
    if labels is not None:
        at_label = ids == labels[row]
        teacher_label[row[at_label]] = logp[at_label].double()
    return _stats(
        divergence=divergence, student_entropy=_entropy(logq), teacher_entropy=entropy,
        agreement=logq.argmax(1) == top1,
        captured_mass=captured, label_logprob=label_logprob, teacher_label_logprob=teacher_label,
        student_top1=logq.argmax(1), teacher_top1=top1, student_confidence=logq.amax(1).exp(),
        teacher_confidence=torch.where(has_entry, best.exp(), torch.nan),
    )


def _is_bad(logprobs: Tensor) -> Tensor:
    """Rows with NaN, +inf or nothing finite: log_softmax turns each of these into NaN."""
    return logprobs.isnan().any(1).int()


def _usable_labels(
    labels: Tensor | None, columns: int, job: RowJob, want_stats: bool
) -> tuple[Tensor | None, Tensor | int]:
    """Labels that are in range, -1 elsewhere, and the status of those that are not; None where no label is needed."""
    if labels is None or (job.ce_weight == 0 and not want_stats):
        return None, 0
    in_range = (labels >= 0) & (labels < columns)
    return torch.where(in_range, labels, -1), BAD_LABEL * ~in_range


def _at_labels(logprobs: Tensor, labels: Tensor | None) -> Tensor:
    """fp64 ``[C]``: the log-probability of each label, NaN without one."""
    if labels is None:
        return torch.full((logprobs.shape[0],), torch.nan, dtype=torch.float64, device=logprobs.device)
    picked = logprobs.gather(1, labels.clamp_min(0)[:, None])[:, 0].double()
    return torch.where(labels >= 0, picked, torch.nan)


def _entropy(logprobs: Tensor) -> Tensor:
    return -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0).sum(1, dtype=torch.float64)


def _stats(**columns: Tensor) -> Tensor:
    return torch.stack([columns[name].double() for name in STATS], 1)


def _masked(stats: Tensor | None, active: Tensor) -> Tensor | None:
    return None if stats is None else torch.where(active[:, None], stats, torch.nan)


def _loss(divergence: Tensor, label_logprob: Tensor, job: RowJob, active: Tensor) -> Tensor:
    loss = job.kd_weight * divergence if job.kd_weight != 0 else torch.zeros_like(divergence)
    if job.ce_weight != 0:
        loss = loss - job.ce_weight * label_logprob
    return torch.where(active, loss, 0.0)


def _write_gradient(
    gradient: Tensor, slot: Tensor, student: RawRows, z: Tensor, logq: Tensor, job: RowJob, labels: Tensor | None,
    weight: Tensor,
) -> None:
    """Add the cross-entropy's part to ``slot`` (d loss / d logit), take it back through softcap and scale, weigh it."""
    if job.ce_weight != 0 and labels is not None:
        slot = slot + job.ce_weight * logq.exp()
        slot.scatter_add_(1, labels.clamp_min(0)[:, None], -job.ce_weight * (labels >= 0).to(slot.dtype)[:, None])
    slope = student.scale
    if student.softcap is not None:
        slope = slope * (1.0 - (z / student.softcap) ** 2)
    gradient.copy_(torch.where(weight[:, None] != 0, slot * slope * weight[:, None].to(slot.dtype), 0.0))
