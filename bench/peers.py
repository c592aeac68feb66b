"""Other libraries' losses from hidden states, called as their users call them.

Each is a function ``(inputs, divergence) -> call`` (see :mod:`bench.contenders`). Defaults are the library's own.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Call, Result
from bench.inputs import Inputs
from kd_kernels import divergences

INSTALLED_AS = (
    "trl", "liger-kernel", "cut-cross-entropy", "flash-linear-attention", "fla-core", "transformers", "triton",
)
"""Distributions whose versions go into the results."""


class Unavailable(Exception):
    """Why a contender cannot take part."""


def differentiated(inputs: Inputs, loss_of: Callable[[], Tensor]) -> Result:
    """Loss and gradients of one call."""
    inputs.clear_gradients()
    loss = loss_of()
    loss.backward()
    return inputs.result(loss)


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer's import may fail in any way that its own dependencies find
        raise Unavailable(f"cannot be imported: {' '.join(str(error).split())}") from error


def _needs_triton(inputs: Inputs) -> None:
    """Triton kernels: a GPU, or Triton's interpreter, in which the tests run them."""
    if inputs.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable("needs a GPU")


def _beta(divergence: str) -> float:
    """The number by which TRL and Liger name a divergence: 0 forward KL, 1 reverse KL, between them the JSD."""
    parsed = divergences.parse(divergence)
    betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": dict(parsed.params).get("beta")}
    if parsed.name not in betas:
        raise Unavailable(f"has no {parsed.name}")
    return betas[parsed.name]


def _forward_kl_only(divergence: str) -> None:
    if divergence != "forward_kl":
        raise Unavailable(f"has no {divergences.parse(divergence).name}")


# --------------------------------------------------------------------------------------------------- a teacher's head


def trl_dense(inputs: Inputs, divergence: str) -> Call:
    """TRL's chunked divergence: Triton on a GPU, its torch tiles on a CPU."""
    beta = _beta(divergence)
    function = _module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    hidden, weight, teacher_hidden, teacher_weight = inputs.tensors

    def loss() -> Tensor:
        per_token, _ = function.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, beta)
        return per_token.mean()

    return lambda: differentiated(inputs, loss)


def liger_jsd(inputs: Inputs, divergence: str) -> Call:
    """Liger's fused JSD in Triton."""
    _needs_triton(inputs)
    module = _module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(jsd_beta=_beta(divergence))
    return lambda: differentiated(inputs, lambda: module(*inputs.tensors, None))


def liger_chunked(inputs: Inputs, divergence: str, compiled: bool = False) -> Call:
    """Liger's chunked JSD, which is plain torch; ``compiled``: each call wraps a new function in ``torch.compile``."""
    module = _module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_beta(divergence), compiled=compiled
    )
    labels = torch.zeros(inputs.shape.rows, dtype=torch.int64, device=inputs.device)
    return lambda: differentiated(inputs, lambda: module(*inputs.tensors, labels))


def liger_kl(inputs: Inputs, divergence: str) -> Call:
    """Liger's fused KL, which wants all of the teacher's probabilities: they are part of what it costs."""
    _needs_triton(inputs)
    _forward_kl_only(divergence)
    module = _module("liger_kernel.transformers.fused_linear_kl_div").LigerFusedLinearKLDivLoss()
    hidden, weight, teacher_hidden, teacher_weight = inputs.tensors

    def loss() -> Tensor:
        with torch.no_grad():
            target = (teacher_hidden @ teacher_weight.t()).softmax(1, dtype=torch.float32).to(hidden.dtype)
        return module(hidden, weight, target)

    return lambda: differentiated(inputs, loss)


def fla_kl(inputs: Inputs, divergence: str) -> Call:
    """flash-linear-attention's fused KL in Triton."""
    _needs_triton(inputs)
    _forward_kl_only(divergence)
    module = _module("fla.modules.fused_kl_div").FusedKLDivLoss()
    hidden, weight, teacher_hidden, teacher_weight = inputs.tensors
    return lambda: differentiated(inputs, lambda: module(hidden, teacher_hidden, weight, teacher_weight))


# -------------------------------------------------------------------------------------------------------------- labels


def torch_linear_cross_entropy(inputs: Inputs, divergence: None) -> Call:
    """Torch's own, in chunks; without ``options`` it would form all logits."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"needs torch 2.13, this is {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions()
    hidden, weight = inputs.tensors[:2]
    return lambda: differentiated(
        inputs, lambda: F.linear_cross_entropy(hidden, weight, inputs.labels, options=options)
    )


def liger_flce(inputs: Inputs, divergence: None) -> Call:
    """Liger's fused cross-entropy in Triton."""
    _needs_triton(inputs)
    module = _module("liger_kernel.transformers.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyLoss()
    hidden, weight = inputs.tensors[:2]
    return lambda: differentiated(inputs, lambda: module(weight, hidden, inputs.labels))


def cut_cross_entropy(inputs: Inputs, divergence: None) -> Call:
    """Apple's cut cross-entropy: its Triton kernels, which skip small gradients; on a CPU its ``torch_compile``."""
    function = _module("cut_cross_entropy").linear_cross_entropy
    implementation = "torch_compile" if inputs.device.type == "cpu" else "cce"
    hidden, weight = inputs.tensors[:2]
    return lambda: differentiated(inputs, lambda: function(hidden, weight, inputs.labels, impl=implementation))
