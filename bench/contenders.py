"""Who is measured: this library, plain torch, and other libraries, each from hidden states to loss and gradient.

A contender is a function ``(inputs, divergence) -> run``, and ``run() -> Result`` is what is timed. Whoever is not
installed, or has no such loss, raises :class:`Unavailable`, and the reason goes into the results.
"""

from __future__ import annotations

import functools
from typing import Callable

import torch
from torch import Tensor

from bench import cases, truth
from bench.cases import Result
from bench.inputs import Inputs
from kd_kernels import divergences

Run = Callable[[], Result]
Contender = Callable[[Inputs, str], Run]


class Unavailable(Exception):
    """Why a contender cannot take part."""


def _differentiated(inputs: Inputs, loss_of: Callable[[], Tensor]) -> Result:
    inputs.clear_gradients()
    loss = loss_of()
    loss.backward()
    return inputs.result(loss)


# ---------------------------------------------------------------------------------------------------------------- ours


def ours_dense(inputs: Inputs, divergence: str, **options: object) -> Run:
    return lambda: cases.dense(inputs, "gradient", divergence, backend="cpp", **options)


def ours_sparse(inputs: Inputs, divergence: str, **options: object) -> Run:
    return lambda: cases.sparse(inputs, "gradient", divergence, backend="cpp", **options)


def ours_topk(inputs: Inputs, divergence: str) -> Run:
    return lambda: cases.topk(inputs, backend="cpp")


# --------------------------------------------------------------------------------------------------------- plain torch


def _head(hidden: Tensor, weight: Tensor) -> Tensor:
    """All logits in fp32, out of a product in the dtype of the model: what a trainer without a fused loss does."""
    return (hidden @ weight.t()).float()


def _dense_loss(divergence: str) -> Callable[..., Tensor]:
    terms = truth.terms_of(divergence)

    def loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = _head(teacher_hidden, teacher_weight)
        return truth.dense_rows(_head(hidden, weight), teacher_logits, terms).mean()

    return loss


@functools.lru_cache(maxsize=None)
def _compiled_dense_loss(divergence: str) -> Callable[..., Tensor]:
    return torch.compile(_dense_loss(divergence), dynamic=False)


def torch_dense(inputs: Inputs, divergence: str) -> Run:
    loss = _dense_loss(divergence)
    return lambda: _differentiated(inputs, lambda: loss(*inputs.tensors))


def compiled_dense(inputs: Inputs, divergence: str) -> Run:
    loss = _compiled_dense_loss(divergence)
    return lambda: _differentiated(inputs, lambda: loss(*inputs.tensors))


def torch_sparse(inputs: Inputs, divergence: str) -> Run:
    hidden, weight = inputs.tensors[:2]
    terms, rows = truth.terms_of(divergence), slice(0, inputs.shape.rows)
    return lambda: _differentiated(
        inputs, lambda: truth.sparse_rows(_head(hidden, weight), inputs.targets, rows, terms).mean()
    )


def _topk_of(logits: Tensor, k: int) -> Result:
    kept, ids = logits.topk(k, dim=1)
    logprobs = kept - logits.logsumexp(1, keepdim=True)
    return {"ids": ids, "logprobs": logprobs, "tail_logprob": torch.log1p(-logprobs.exp().sum(1))}


def torch_topk(inputs: Inputs, divergence: str) -> Run:
    return lambda: _topk_of(_head(inputs.teacher_hidden, inputs.teacher_weight), inputs.shape.kept)


def torch_topk_of_ready_logits(inputs: Inputs, divergence: str) -> Run:
    """Without the product: what torch adds to it."""
    logits = _head(inputs.teacher_hidden, inputs.teacher_weight)
    return lambda: _topk_of(logits, inputs.shape.kept)


# ----------------------------------------------------------------------------------------------------- other libraries


def _beta(divergence: str) -> float:
    """The number by which TRL and Liger name a divergence: 0 forward KL, 1 reverse KL, between them the JSD."""
    parsed = divergences.parse(divergence)
    betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": dict(parsed.params).get("beta")}
    if parsed.name not in betas:
        raise Unavailable(f"has no {parsed.name}")
    return betas[parsed.name]


def trl_dense(inputs: Inputs, divergence: str) -> Run:
    """TRL's chunked divergence; on a CPU its torch tiles."""
    beta = _beta(divergence)
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        raise Unavailable(f"cannot be imported: {error}") from error
    hidden, weight, teacher_hidden, teacher_weight = inputs.tensors

    def loss() -> Tensor:
        per_token, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, beta)
        return per_token.mean()

    return lambda: _differentiated(inputs, loss)


def liger_dense(inputs: Inputs, divergence: str) -> Run:
    """Liger's chunked JSD, which is plain torch; ``compiled=False``, for it compiles anew in every call."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise Unavailable(f"cannot be imported: {error}") from error
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_beta(divergence), compiled=False)
    labels = torch.zeros(inputs.shape.rows, dtype=torch.int64)
    return lambda: _differentiated(inputs, lambda: module(*inputs.tensors, labels))


DENSE: dict[str, Contender] = {
    "kd_kernels": ours_dense,
    "kd_kernels_rounded_logits": functools.partial(ours_dense, logits_dtype="input"),
    "torch_eager": torch_dense,
    "torch_compile": compiled_dense,
    "trl": trl_dense,
    "liger_chunked": liger_dense,
}
SPARSE: dict[str, Contender] = {
    "kd_kernels": ours_sparse,
    "kd_kernels_rounded_logits": functools.partial(ours_sparse, logits_dtype="input"),
    "torch_eager": torch_sparse,
}
TOPK: dict[str, Contender] = {
    "kd_kernels": ours_topk,
    "torch_topk": torch_topk,
    "torch_topk_of_ready_logits": torch_topk_of_ready_logits,
}
