"""``token_stats``: the public function, its checks, and its registration with torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kd_kernels.loss  # noqa: F401  (registers loss_per_token_backward, which is the gradient of a log-probability)
from kd_kernels import _backend, _check, products
from kd_kernels.logits import EnsembleLogits, Logits, check_dense, leading_shape, vocab
from kd_kernels.loss import driver as loss_driver
from kd_kernels.loss.plan import Plan, pack, read, unpack
from kd_kernels.stats import driver
from kd_kernels.stats.driver import IMPLEMENTATIONS
from kd_kernels.stats.reference import RowStats

WHERE = "token_stats"

NO_ID = torch.iinfo(torch.int64).min
"""Stands where ``kd_loss`` has its ``ignore_index``: here no row is ignored."""


@dataclass(frozen=True)
class TokenStats:
    """What :func:`token_stats` returns, of the rows' shape: fp32 (fp64 if an input is) and nats, or int64, or bool.

    Attributes:
        logprob: log-probability of the id. Differentiable; the others are not.
        lse: log-sum-exp of the logits.
        entropy: of the softmax of the logits.
        max: the largest logit.
        argmax: its id, the lowest among equals.
        rank: how many ids come before this one: those of a larger logit, and those of the same logit and a lower id.
        in_top_k: ``rank < k``; None if no ``k`` was given.
    """

    logprob: Tensor
    lse: Tensor
    entropy: Tensor
    max: Tensor
    argmax: Tensor
    rank: Tensor
    in_top_k: Tensor | None = None


def token_stats(
    logits: Logits, ids: Tensor, *, k: int | None = None, max_scratch_bytes: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """What a model says about given tokens: log-probability and rank of each, and entropy, lse and argmax of its row.

    Equivalent to, but without the ``[N, V]`` matrix where ``logits`` is a :class:`LinearLogits`::

        lse = logits.logsumexp(-1)
        logprobs = logits - lse[..., None]
        logprob = logprobs.gather(-1, ids[..., None])[..., 0]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        max, argmax = logits.max(-1)
        order = logits.sort(-1, descending=True, stable=True).indices
        rank = (order == ids[..., None]).int().argmax(-1)

    The logits are those of the noun: after bias, scale and softcap. The gradient of ``logprob`` with respect to them is
    ``onehot(id) - softmax``. Nobody has to sort: whether a teacher has a drafted token among its k likeliest, as
    speculative distillation asks, is ``rank < k``, and ties fall as in :func:`topk_targets`.

    Args:
        logits: ``[..., V]`` or what stands for it; fp32, bf16, fp16 or fp64 ("triton": no fp64). A logit of -inf is a
            masked id. An ensemble is not differentiated: one that requires grad is refused unless grad is disabled.
        ids: int64 or int32, the rows' shape, in 0..V-1; V counts ``valid_vocab`` columns where that is given.
        k: at least 1, or None. Asks for ``in_top_k``.
        max_scratch_bytes: bound on temporary memory, beside gradients. None: 256 MiB on a CPU, 1.4 GiB elsewhere.
            Enough for the forward is enough for the backward, which may take more: it is asked for beforehand.
        backend: "cpp" (CPU), "triton" (GPU), "reference" (torch operations, any device), or None: by device.

    Returns:
        :class:`TokenStats`, on the device of ``logits``. N = 0 gives empty ones. An id whose logit is -inf has a
        ``logprob`` of -inf, and its rank counts every finite logit.

    Raises:
        TypeError, ValueError: an argument is not as above; on a CPU also for ids out of range, NaN or +inf logits, and
            rows of -inf alone. On a GPU nothing waits for the device: there a wrong id has a ``logprob`` of NaN, a rank
            of -1 and ``in_top_k`` False; a row without a normaliser has NaN, -1 and False throughout.
        RuntimeError: the backend does not exist here; or a derivative of the gradient is asked for.

    Numerics: products, logits and sums in fp32 (fp64 for fp64 inputs); under autocast, inputs of products are rounded
    to its dtype, their results are not. ``logprob`` is ``(z - max) - log(sum)``, which keeps its digits under any
    offset; ``lse`` is rounded once, at its own size. The id's logit is the very number that stands among the others, so
    an id never loses against itself. Deterministic.

    Cost: 2 N H V operations for a head, and each logit is read once: 4 N V bytes of products in fp32, or N V elements
    of a tensor's own dtype (widened first by "cpp" and "reference"). The backward forms the logits again, chunk by
    chunk (6 N H V operations); nothing of size ``[N, V]`` is kept but the gradient of logits that were given.

    Source: the rank test of Xu et al. 2024, "Speculative Knowledge Distillation", arXiv 2410.11325, algorithm 1.
    """
    _check_arguments(logits, k, max_scratch_bytes)
    shape, device, columns = leading_shape(logits), logits.device, vocab(logits)
    ids = _check.integral(WHERE, "ids", ids)
    if ids.shape != shape:
        _check.fail(WHERE, "ids", f"of shape {list(shape)} like the rows of logits", list(ids.shape))
    _check.same_device(WHERE, "ids", ids, device)
    chosen = _backend.choose(WHERE, backend, device, tuple(IMPLEMENTATIONS))
    tensors, description = pack(logits)
    if chosen == "triton":
        _backend.check_triton_takes(WHERE, columns, *tensors)
    needs_grad = tuple(t.requires_grad and torch.is_grad_enabled() for t in tensors)
    if isinstance(logits, EnsembleLogits) and any(needs_grad):
        _check.fail(
            WHERE, "logits", "without requires_grad where it is an ensemble", "members that require grad",
            "call it under torch.no_grad()",
        )
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    # Minus the cross-entropy of the ids: the plan of the pass that gives the gradient.
    plan = Plan(
        where=WHERE, student=description, teacher=("none",), columns=columns, needs_grad=needs_grad,
        row_inputs=("labels",),
        divergence="forward_kl", temperature=1.0, kd_weight=0.0, ce_weight=1.0, tail="drop", reduction="none",
        ignore_index=NO_ID, stats=(), compact=device.type == "cpu", precision="float32",
        autocast="" if autocast is None else str(autocast).removeprefix("torch."), max_scratch_bytes=max_scratch_bytes,
        backend=chosen,
    )
    logprob, *rest = _token_stats(tensors, ids.reshape(-1).long(), plan.text())
    lse, entropy, largest, argmax, rank = (value.detach().reshape(shape) for value in rest)
    in_top_k = None if k is None else (rank >= 0) & (rank < k)
    return TokenStats(logprob.reshape(shape), lse, entropy, largest, argmax, rank, in_top_k)


def _check_arguments(logits: object, k: object, max_scratch_bytes: object) -> None:
    check_dense(WHERE, logits)
    for name, value, kind in (("k", k, "an int"), ("max_scratch_bytes", max_scratch_bytes, "a number of bytes (int)")):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            _check.fail_type(WHERE, name, kind, type(value).__name__)
    if k is not None and k < 1:
        _check.fail(WHERE, "k", "at least 1", k)


@torch.library.custom_op("kd_kernels::token_stats", mutates_args=())
def _token_stats(logits: list[Tensor], ids: Tensor, plan_text: str) -> list[Tensor]:
    """The fields of :class:`RowStats`, ``[N]`` each."""
    plan = read(plan_text)
    noun = products.flattened(unpack(logits, plan.student))  # type: ignore[arg-type]
    is_cpu = ids.device.type == "cpu"
    if is_cpu:
        _check_ids(ids, plan.columns)

    def check_source(rows: products.Source) -> None:
        if any(plan.needs_grad):
            loss_driver.check_gradient_fits(plan, noun, rows)  # now, not after the model's own backward has begun

    return list(
        driver.walk(
            WHERE, noun, ids, autocast=plan.autocast_dtype, max_scratch_bytes=plan.max_scratch_bytes,
            backend=plan.backend, check_source=check_source, each_chunk=_check_rows if is_cpu else None,
        )
    )


@_token_stats.register_fake
def _(logits: list[Tensor], ids: Tensor, plan_text: str) -> list[Tensor]:
    return list(driver.empty(logits, ids.shape[0]))


def _check_ids(ids: Tensor, columns: int) -> None:
    outside = (ids < 0) | (ids >= columns)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        _check.fail(WHERE, "ids", f"in 0..V-1={columns - 1}", f"{int(ids[row])} in row {row}")


def _check_rows(found: RowStats, begin: int, chunk: products.RawRows) -> None:
    """Raise for the first row that has no normaliser, and say why."""
    if bool((found.argmax < 0).any()):
        row = int((found.argmax < 0).nonzero()[0])
        z = replace(chunk, raw=chunk.raw[row : row + 1]).logits()
        fault = "NaN" if bool(z.isnan().any()) else "+inf" if bool((z == torch.inf).any()) else "-inf at every id"
        _check.fail(
            WHERE, "logits", "free of NaN and +inf, with a finite logit in every row", f"{fault} in row {begin + row}",
            "look for an overflow in the model, and leave out rows that are padding",
        )


def _keep_inputs(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    logits, ids, ctx.plan_text = inputs
    ctx.save_for_backward(ids, *logits)


def _differentiate(ctx, upstream):
    if torch.is_grad_enabled():  # autograd records a backward pass only for create_graph=True
        raise RuntimeError(_check.complaint(WHERE, "create_graph", "False: the gradient is not differentiable", True))
    ids, *logits = ctx.saved_tensors
    if upstream[0] is None:
        return [None] * len(logits), None, None
    backward = torch.ops.kd_kernels.loss_per_token_backward
    gradients = iter(backward(-upstream[0], logits, [], [ids], ctx.plan_text))
    needs_grad = read(ctx.plan_text).needs_grad
    return [next(gradients).to(t.dtype) if needed else None for t, needed in zip(logits, needs_grad)], None, None


_token_stats.register_autograd(_differentiate, setup_context=_keep_inputs)
