"""Who is measured: this library, plain torch, and other libraries, each from hidden states to its result.

A contender is a function ``(inputs, divergence) -> call``, and ``call() -> Result`` is what is timed. Whoever is not
installed, cannot run on the device, or has no such loss raises :class:`Unavailable`, and the reason goes into the
results. Other libraries are in :mod:`bench.peers`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import cases, peers, truth
from bench.cases import BACKENDS, Call, Result
from bench.inputs import Inputs
from bench.peers import Unavailable, differentiated

Contender = Callable[..., Call]

SPARSE_CHUNK_ROWS = 256
"""Of the checkpointed loop: what TRL's asynchronous distillation trainer uses."""


# ---------------------------------------------------------------------------------------------------------------- ours


def _ours(case: Callable[..., Call], inputs: Inputs, divergence: str | None, **options: object) -> Call:
    named = {} if divergence is None else {"divergence": divergence}
    return case(inputs, backend=BACKENDS[inputs.device.type][0], **named, **options)


# --------------------------------------------------------------------------------------------------------- plain torch


def _head(hidden: Tensor, weight: Tensor) -> Tensor:
    """All logits in fp32, out of a product in the dtype of the model: what a trainer without a fused loss does."""
    return (hidden @ weight.t()).float()


@functools.cache
def _dense_loss(divergence: str, compiled: bool) -> Callable[..., Tensor]:
    terms = truth.terms_of(divergence)

    def loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = _head(teacher_hidden, teacher_weight)
        return truth.dense_rows(_head(hidden, weight), teacher_logits, terms).mean()

    return torch.compile(loss, dynamic=False) if compiled else loss


def torch_dense(inputs: Inputs, divergence: str, compiled: bool = False) -> Call:
    loss = _dense_loss(divergence, compiled)
    return lambda: differentiated(inputs, lambda: loss(*inputs.tensors))


def torch_sparse(inputs: Inputs, divergence: str) -> Call:
    """All logits, of which k a row are gathered."""
    hidden, weight = inputs.tensors[:2]
    terms, rows = truth.terms_of(divergence), slice(0, inputs.shape.rows)
    return lambda: differentiated(
        inputs, lambda: truth.sparse_rows(_head(hidden, weight), inputs.targets, rows, terms).mean()
    )


def checkpointed_sparse(inputs: Inputs, divergence: str) -> Call:
    """Chunks of rows whose logits are computed again in the backward pass, each from an fp32 copy of the head."""
    hidden, weight = inputs.tensors[:2]
    terms, count = truth.terms_of(divergence), inputs.shape.rows

    def chunk_sum(hidden: Tensor, weight: Tensor, rows: slice) -> Tensor:
        return truth.sparse_rows(hidden.float() @ weight.float().t(), inputs.targets, rows, terms).sum()

    def loss() -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        for begin in range(0, count, SPARSE_CHUNK_ROWS):
            rows = slice(begin, min(begin + SPARSE_CHUNK_ROWS, count))
            total = total + checkpoint(chunk_sum, hidden[rows], weight, rows, use_reentrant=False)
        return total / count

    return lambda: differentiated(inputs, loss)


@functools.cache
def _cross_entropy_loss(compiled: bool) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(_head(hidden, weight), labels)

    return torch.compile(loss, dynamic=False) if compiled else loss


def torch_cross_entropy(inputs: Inputs, divergence: None, compiled: bool = False) -> Call:
    loss = _cross_entropy_loss(compiled)
    return lambda: differentiated(inputs, lambda: loss(*inputs.tensors[:2], inputs.labels))


def torch_stats(inputs: Inputs, divergence: None) -> Call:
    hidden, weight = (x.detach() for x in inputs.tensors[:2])
    return lambda: truth.stats_of(_head(hidden, weight), inputs.labels)


def _topk_of(logits: Tensor, k: int) -> Result:
    kept, ids = logits.topk(k, dim=1)
    logprobs = kept - logits.logsumexp(1, keepdim=True)
    return {"ids": ids, "logprobs": logprobs, "tail_logprob": torch.log1p(-logprobs.exp().sum(1))}


def torch_topk(inputs: Inputs, divergence: None) -> Call:
    return lambda: _topk_of(_head(inputs.teacher_hidden, inputs.teacher_weight), inputs.shape.kept)


def torch_topk_of_ready_logits(inputs: Inputs, divergence: None) -> Call:
    """Without the product: what torch adds to it."""
    logits = _head(inputs.teacher_hidden, inputs.teacher_weight)
    return lambda: _topk_of(logits, inputs.shape.kept)


# --------------------------------------------------------------------------------------------------------------- table

OURS = "kd_kernels"
ROUNDED = "kd_kernels_rounded_logits"
"""Says nothing in fp32: there is nothing to round."""

CONTENDERS: dict[str, dict[str, Contender]] = {
    "kd_loss_dense": {
        OURS: functools.partial(_ours, cases.dense),
        ROUNDED: functools.partial(_ours, cases.dense, logits_dtype="input"),
        "torch_eager": torch_dense,
        "torch_compile": functools.partial(torch_dense, compiled=True),
        "trl": peers.trl_dense,
        "liger_jsd": peers.liger_jsd,
        "liger_chunked": peers.liger_chunked,
        "liger_chunked_compiled": functools.partial(peers.liger_chunked, compiled=True),
        "liger_kl": peers.liger_kl,
        "fla": peers.fla_kl,
    },
    "kd_loss_sparse": {
        OURS: functools.partial(_ours, cases.sparse),
        ROUNDED: functools.partial(_ours, cases.sparse, logits_dtype="input"),
        "torch_eager": torch_sparse,
        "checkpointed_chunks": checkpointed_sparse,
    },
    "cross_entropy": {
        OURS: functools.partial(_ours, cases.cross_entropy),
        "torch_eager": torch_cross_entropy,
        "torch_compile": functools.partial(torch_cross_entropy, compiled=True),
        "torch_linear_cross_entropy": peers.torch_linear_cross_entropy,
        "liger_flce": peers.liger_flce,
        "cut_cross_entropy": peers.cut_cross_entropy,
    },
    "token_stats": {
        OURS: functools.partial(_ours, cases.stats),
        "torch_eager": torch_stats,
    },
    "topk_targets": {
        OURS: functools.partial(_ours, cases.topk),
        "torch_topk": torch_topk,
        "torch_topk_of_ready_logits": torch_topk_of_ready_logits,
    },
}
"""By case, then by name."""


def prepare(
    case: str, name: str, inputs: Inputs, divergence: str | None, budget_bytes: int | None = None
) -> Call:
    """The call of a contender; ``budget_bytes`` bounds the scratch of ours.

    Raises:
        Unavailable: it cannot take part.
    """
    budget = {"max_scratch_bytes": budget_bytes} if name == OURS and budget_bytes is not None else {}
    return CONTENDERS[case][name](inputs, divergence, **budget)


__all__ = ["CONTENDERS", "OURS", "ROUNDED", "Unavailable", "prepare"]
