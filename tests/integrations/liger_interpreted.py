"""liger-kernel's losses that are Triton kernels, in Triton's interpreter: ``python liger_interpreted.py CASES FILE``
saves loss and gradients of each at each case. A process of its own, because TRITON_INTERPRET is read when Triton is
imported. Run by test_liger.py."""

from __future__ import annotations

import os
import sys
import types

import torch
from torch import Tensor

from loss_cases import IGNORED, Case


def convert_floats() -> None:
    """Kernels call ``eps.to(tl.float32)``: compiled, a float argument is a scalar with that method, interpreted it is a
    float."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda arg: (
        tl.tensor(interpreter.TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
        if type(arg) is float else convert(arg)
    )


def losses(module) -> dict:
    """By name, a function of the case and its leaves; ``module`` has classes of these names."""
    teacher = lambda of: of.teacher_logits(torch.float32)  # noqa: E731
    heads = lambda of: (of.teacher_hidden, of.teacher_weight)  # noqa: E731
    found: dict = {}
    for beta in (0.0, 0.3, 1.0):
        found[f"LigerFusedLinearJSD {beta}"] = lambda of, h, w, beta=beta: module.LigerFusedLinearJSD(
            beta, temperature=2.0
        )(h, w, *heads(of), of.labels)
        found[f"LigerJSD {beta}"] = lambda of, h, w, beta=beta: module.LigerJSD(beta)(
            (h @ w.T).log_softmax(-1), teacher(of).log_softmax(-1), of.labels
        )
    for reduction in ("batchmean", "mean", "sum"):
        of_head = module.LigerFusedLinearKLDivLoss(reduction, temperature=2.0)
        found[f"LigerFusedLinearKLDivLoss {reduction}"] = lambda of, h, w, loss=of_head: loss(
            h, w, teacher(of).softmax(-1), of.labels
        )
        found[f"LigerKLDIVLoss {reduction}"] = lambda of, h, w, r=reduction: module.LigerKLDIVLoss(reduction=r)(
            (h @ w.T).log_softmax(-1), teacher(of).softmax(-1)
        )
        found[f"LigerTVDLoss {reduction}"] = lambda of, h, w, r=reduction: module.LigerTVDLoss(r)(
            (h @ w.T).softmax(-1), teacher(of).softmax(-1), of.labels
        )
    ramp = lambda z: torch.linspace(-1.0, 1.0, z.numel()).reshape(z.shape)  # noqa: E731  (another for every entry)
    found["LigerKLDIVLoss none"] = lambda of, h, w: (
        ramp(teacher(of))
        * module.LigerKLDIVLoss(reduction="none")((h @ w.T).log_softmax(-1), teacher(of).softmax(-1))
    ).sum()
    return found


def taken(loss, of: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients, under an upstream gradient other than 1."""
    hidden, weight, _ = of.leaves()
    value = loss(of, hidden, weight)
    (0.5 * value).backward()
    return value.detach(), hidden.grad, weight.grad


def jsd_of_a_masked_column(module) -> Tensor:
    """LigerJSD where an id has no probability in either model."""
    logprobs = torch.tensor([[0.0, -torch.inf]])
    return module.LigerJSD(0.5)(logprobs.clone().requires_grad_(), logprobs).detach()


def total_variation_of_no_row(module) -> Tensor | str:
    """LigerTVDLoss where no row counts, or what it raises."""
    probabilities = torch.full((3, 4), 0.25)
    try:
        return module.LigerTVDLoss()(probabilities, probabilities, torch.full((3,), IGNORED))
    except ZeroDivisionError as error:
        return repr(error)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter as repairs

    repairs.install()
    convert_floats()
    from test_liger import originals

    theirs = types.SimpleNamespace(**originals())
    results: dict[object, object] = {
        (key, name): taken(loss, of)
        for key, of in torch.load(sys.argv[1], weights_only=False).items() for name, loss in losses(theirs).items()
    }
    results |= {function.__name__: function(theirs) for function in (jsd_of_a_masked_column, total_variation_of_no_row)}
    torch.save(results, sys.argv[2])
