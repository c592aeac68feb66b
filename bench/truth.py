"""What the results should be, in float64 and by autograd, from the tests' oracles; and the errors of what they are."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from bench.inputs import Inputs
from kd_kernels import SparseTargets, divergences

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import oracles  # noqa: E402  (the formulas there are independent of the library)

CHUNK_ROWS = 64
"""Rows whose float64 logits exist at a time."""


Terms = Callable[[Tensor, Tensor], Tensor]
"""``(logp, logq) -> terms``: one summand an event, in plain torch."""


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
    """``losses_of(student logits, rows)`` averaged over all rows, and the gradients of that, chunk of rows by chunk."""
    hidden, weight = (x.detach().double().requires_grad_() for x in inputs.tensors[:2])
    total = 0.0
    for begin in range(0, inputs.shape.rows, CHUNK_ROWS):
        rows = slice(begin, min(begin + CHUNK_ROWS, inputs.shape.rows))
        loss = losses_of(hidden[rows] @ weight.t(), rows).sum() / inputs.shape.rows
        loss.backward()
        total = total + loss.detach()
    return {"loss": total, "student_hidden": hidden.grad, "student_weight": weight.grad}


@functools.lru_cache(maxsize=2)
def dense(inputs: Inputs, divergence: str) -> dict[str, Tensor]:
    """Loss and gradients against the teacher's head."""
    teacher_hidden, teacher_weight = (x.double() for x in inputs.tensors[2:])
    terms = terms_of(divergence)

    def losses_of(student_logits: Tensor, rows: slice) -> Tensor:
        return dense_rows(student_logits, teacher_hidden[rows] @ teacher_weight.t(), terms)

    return _mean_and_gradients(inputs, losses_of)


@functools.lru_cache(maxsize=2)
def sparse(inputs: Inputs, divergence: str) -> dict[str, Tensor]:
    """Loss and gradients against the sparse teacher."""
    terms = terms_of(divergence)
    return _mean_and_gradients(inputs, lambda logits, rows: sparse_rows(logits, inputs.targets, rows, terms))


def relative_errors(result: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """``|result - true| / |true|`` in the L2 norm, for every tensor of a result."""
    return {name: ((x.double() - true[name]).norm() / true[name].norm()).item() for name, x in result.items()}


def topk_errors(inputs: Inputs, result: dict[str, Tensor]) -> dict[str, float]:
    """Largest error in nats of a kept log-probability, of the k-th best one that was kept, and of the tail.

    ``missed`` compares sorted log-probabilities: ids may differ only where two logits differ by less than rounding.
    """
    count, errors = inputs.shape.rows, {"logprobs": 0.0, "missed": 0.0, "tail_logprob": 0.0}
    ids, logprobs = (result[name].reshape(count, -1) for name in ("ids", "logprobs"))
    for begin in range(0, count, CHUNK_ROWS):
        rows = slice(begin, begin + CHUNK_ROWS)
        true = (inputs.teacher_hidden[rows].double() @ inputs.teacher_weight.double().t()).log_softmax(1)
        at_ids, best = true.gather(1, ids[rows]), true.topk(ids.shape[1], dim=1).values
        tail = torch.log1p(-at_ids.exp().sum(1))
        gaps = {
            "logprobs": logprobs[rows] - at_ids, "missed": best - at_ids,
            "tail_logprob": result["tail_logprob"][rows] - tail,
        }
        errors = {name: max(errors[name], gap.abs().max().item()) for name, gap in gaps.items()}
    return errors
