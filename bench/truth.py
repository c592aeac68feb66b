"""What the results should be, in float64 and by autograd, from the tests' oracles; and the errors of what they are.

The loss is that of all rows, and so are the gradients of the logits; of dH and dW the rows in ``Inputs.judged`` are
formed, which spares a shape of a real model two products in float64.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.inputs import Inputs
from kd_kernels import SparseTargets, divergences

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import oracles  # noqa: E402  (the formulas there are independent of the library)

Terms = Callable[[Tensor, Tensor], Tensor]
"""``(logp, logq) -> terms``: one summand an event, in plain torch."""


@dataclass(frozen=True)
class Verdict:
    """How far a result is from the truth, by name.

    Attributes:
        errors: ``|result - true| / |true|`` in the L2 norm; of sparse targets the largest error in nats.
        cosines: between a gradient and the true one.
    """

    errors: dict[str, float]
    cosines: dict[str, float] = field(default_factory=dict)


def terms_of(divergence: str) -> Terms:
    """The oracle of a divergence in its string form."""
    parsed = divergences.parse(divergence)
    return functools.partial(oracles.TERMS[parsed.name], **dict(parsed.params), **dict(parsed.options))


def dense_rows(student_logits: Tensor, teacher_logits: Tensor, terms: Terms) -> Tensor:
    """The divergence of every row, as one writes it in torch, in the dtype of the logits."""
    return terms(teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)).sum(-1)


def sparse_rows(student_logits: Tensor, targets: SparseTargets, rows: slice, terms: Terms) -> Tensor:
    """The same against k ids a row and one event for the tail, in the dtype of the logits."""
    count = targets.offsets.shape[0] - 1
    ids, logprobs = (x.reshape(count, -1)[rows] for x in (targets.ids, targets.logprobs))
    kept = student_logits.log_softmax(-1).gather(1, ids)
    logq = torch.cat([kept, torch.log1p(-kept.exp().sum(1, keepdim=True))], 1)
    logp = torch.cat([logprobs, targets.tail_logprob[rows, None]], 1).to(logq.dtype)
    return terms(logp, logq).sum(-1)


def _mean_and_gradients(inputs: Inputs, losses_of: Callable[[Tensor, slice], Tensor]) -> dict[str, Tensor]:
    """``losses_of(student logits, rows)`` averaged over all rows, and the judged rows of its gradients."""
    hidden, weight = (x.detach().double() for x in inputs.tensors[:2])
    judged_rows, judged_ids = inputs.judged
    total, of_hidden, of_weight = 0.0, [], torch.zeros_like(weight[judged_ids])
    for rows in inputs.chunks():
        logits = (hidden[rows] @ weight.t()).requires_grad_()
        loss = losses_of(logits, rows).sum() / inputs.shape.rows
        (gradient,) = torch.autograd.grad(loss, logits)
        here = judged_rows[(judged_rows >= rows.start) & (judged_rows < rows.stop)] - rows.start
        of_hidden.append(gradient[here] @ weight)
        of_weight += gradient[:, judged_ids].t() @ hidden[rows]
        total = total + loss.detach()
    return {"loss": total, "student_hidden": torch.cat(of_hidden), "student_weight": of_weight}


def dense(inputs: Inputs, divergence: str) -> dict[str, Tensor]:
    """Loss and gradients against the teacher's head."""
    teacher_hidden, teacher_weight = (x.double() for x in inputs.tensors[2:])
    terms = terms_of(divergence)

    def losses_of(student_logits: Tensor, rows: slice) -> Tensor:
        return dense_rows(student_logits, teacher_hidden[rows] @ teacher_weight.t(), terms)

    return _mean_and_gradients(inputs, losses_of)


def sparse(inputs: Inputs, divergence: str) -> dict[str, Tensor]:
    """Loss and gradients against the sparse teacher."""
    terms = terms_of(divergence)
    return _mean_and_gradients(inputs, lambda logits, rows: sparse_rows(logits, inputs.targets, rows, terms))


def ensemble(inputs: Inputs, divergence: str) -> dict[str, Tensor]:
    """Loss and gradients against the mean probability of the teacher and of the student, which is held fixed there."""
    teacher_hidden, teacher_weight = (x.double() for x in inputs.tensors[2:])
    terms = terms_of(divergence)

    def losses_of(student_logits: Tensor, rows: slice) -> Tensor:
        teacher = (teacher_hidden[rows] @ teacher_weight.t()).softmax(1)
        return dense_rows(student_logits, ((teacher + student_logits.detach().softmax(1)) / 2).log(), terms)

    return _mean_and_gradients(inputs, losses_of)


def cross_entropy(inputs: Inputs) -> dict[str, Tensor]:
    """Loss and gradients against the labels."""
    return _mean_and_gradients(
        inputs, lambda logits, rows: F.cross_entropy(logits, inputs.labels[rows], reduction="none")
    )


def judge_loss(inputs: Inputs, result: dict[str, Tensor], true_of: Callable[..., dict], **options: str) -> Verdict:
    """Errors and cosines of a loss and its gradients; ``true_of(inputs, **options)`` is worked out once."""
    key = f"{true_of.__name__} {options}"
    if key not in inputs.truths:
        inputs.truths[key] = true_of(inputs, **options)
    true = inputs.truths[key]
    rows, ids = inputs.judged
    chosen = {"loss": ..., "student_hidden": rows, "student_weight": ids}
    found = {name: x[chosen[name]].double() for name, x in result.items()}
    errors = {name: ((x - true[name]).norm() / true[name].norm()).item() for name, x in found.items()}
    cosines = {name: F.cosine_similarity(x.flatten(), true[name].flatten(), dim=0).item() for name, x in found.items()}
    return Verdict(errors, {name: cosine for name, cosine in cosines.items() if name != "loss"})


STATS = ("logprob", "lse", "entropy", "max", "argmax", "rank")


def stats_of(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """What ``token_stats`` says of rows of logits, as one writes it in torch, in the dtype of the logits."""
    lse, at_ids = logits.logsumexp(1), logits.gather(1, ids[:, None])
    logprobs = logits - lse[:, None]
    top, argmax = logits.max(1)
    return {
        "logprob": at_ids[:, 0] - lse, "lse": lse, "entropy": -(logprobs.exp() * logprobs).sum(1), "max": top,
        "argmax": argmax, "rank": (logits > at_ids).sum(1),
    }


def judge_stats(inputs: Inputs, result: dict[str, Tensor]) -> Verdict:
    """Largest errors: in nats, of ``argmax`` by how much less likely it is than the best, of ``rank`` in parts of V."""
    weight, errors = inputs.student_weight.detach().double().t(), dict.fromkeys(STATS, 0.0)
    for rows in inputs.chunks():
        logits = inputs.student_hidden[rows].detach().double() @ weight
        true = stats_of(logits, inputs.labels[rows])
        found = {name: result[name][rows] for name in STATS}
        gaps = {name: found[name] - true[name] for name in ("logprob", "lse", "entropy", "max")}
        gaps["argmax"] = true["max"] - logits.gather(1, found["argmax"][:, None])[:, 0]
        gaps["rank"] = (found["rank"] - true["rank"]) / inputs.shape.vocab
        worst = {name: gap.abs().nan_to_num(nan=torch.inf).max().item() for name, gap in gaps.items()}
        errors = {name: max(errors[name], worst[name]) for name in errors}
    return Verdict(errors)


def judge_topk(inputs: Inputs, result: dict[str, Tensor]) -> Verdict:
    """Largest error in nats of a kept log-probability, of the k-th best one that was kept, and of the tail.

    ``missed`` compares sorted log-probabilities: ids may differ only where two logits differ by less than rounding.
    """
    count, errors = inputs.shape.rows, {"logprobs": 0.0, "missed": 0.0, "tail_logprob": 0.0}
    ids, logprobs = (result[name].reshape(count, -1) for name in ("ids", "logprobs"))
    weight = inputs.teacher_weight.double().t()
    for rows in inputs.chunks():
        true = (inputs.teacher_hidden[rows].double() @ weight).log_softmax(1)
        at_ids, best = true.gather(1, ids[rows]), true.topk(ids.shape[1], dim=1).values
        tail = torch.log1p(-at_ids.exp().sum(1))
        gaps = {
            "logprobs": logprobs[rows] - at_ids, "missed": best - at_ids,
            "tail_logprob": result["tail_logprob"][rows] - tail,
        }
        worst = {name: gap.abs().nan_to_num(nan=torch.inf).max().item() for name, gap in gaps.items()}
        errors = {name: max(errors[name], worst[name]) for name in errors}
    return Verdict(errors)


def _teacher_logprobs(inputs: Inputs, rows: slice) -> Tensor:
    return (inputs.teacher_hidden[rows].double() @ inputs.teacher_weight.double().t()).log_softmax(1)


def judge_draws(inputs: Inputs, result: dict[str, Tensor], accepted_ranks: int | None = None) -> Verdict:
    """Largest error in nats of the log-probability of a drawn id.

    With ``accepted_ranks`` also that of a label's rank, in parts of V, and whether any label was accepted or refused
    against its rank, or accepted and changed.
    """
    errors = {"logprobs": 0.0} if accepted_ranks is None else {"logprobs": 0.0, "rank": 0.0, "accepted": 0.0}
    for rows in inputs.chunks():
        true, ids = _teacher_logprobs(inputs, rows), result["ids"][rows]
        worst = {"logprobs": (result["logprobs"][rows] - true.gather(1, ids[:, None])[:, 0]).abs()}
        if accepted_ranks is not None:
            labels, rank, accepted = inputs.labels[rows], result["rank"][rows], result["accepted"][rows]
            true_rank = (true > true.gather(1, labels[:, None])).sum(1)
            is_wrong = (accepted != (rank < accepted_ranks)) | (accepted & (ids != labels))
            worst |= {"rank": (rank - true_rank).abs() / inputs.shape.vocab, "accepted": is_wrong.double()}
        errors = {n: max(errors[n], gap.double().nan_to_num(nan=torch.inf).max().item()) for n, gap in worst.items()}
    return Verdict(errors)


def judge_sampled_targets(inputs: Inputs, result: dict[str, Tensor]) -> Verdict:
    """Largest error in nats of an entry's log-probability, and of a row's estimate of ``sum p``, which is always 1."""
    errors = {"logprobs": 0.0, "mass": 0.0}
    row_of = torch.repeat_interleave(torch.arange(inputs.shape.rows, device=inputs.device), result["offsets"].diff())
    for rows in inputs.chunks():
        here = (row_of >= rows.start) & (row_of < rows.stop)
        true = _teacher_logprobs(inputs, rows)[row_of[here] - rows.start, result["ids"][here]]
        mass = torch.zeros(rows.stop - rows.start, dtype=torch.float64, device=inputs.device)
        mass.index_add_(0, row_of[here] - rows.start, result["importance"][here] * true.exp())
        gaps = {"logprobs": result["logprobs"][here] - true, "mass": mass - 1.0}
        worst = {name: gap.abs().nan_to_num(nan=torch.inf).max().item() for name, gap in gaps.items()}
        errors = {name: max(errors[name], worst[name]) for name in errors}
    return Verdict(errors)
