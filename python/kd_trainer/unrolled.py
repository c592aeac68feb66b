"""A step of gradient descent, unrolled once: what the weight of each term of a loss does for another loss after it.

With ``L(theta, a) = sum_i a_i f_i(theta)``, another loss V, and ``theta' = theta - lr dL/dtheta``,

    dV(theta')/da_i = - lr  d/de f_i(theta + e v) at e = 0,        v = dV/dtheta at theta'

No second derivative is formed: along v, a central difference takes two passes without gradient (Liu et al. 2019,
"DARTS", arXiv 1806.09055). The only approximations are its error, of the order of ``PROBE`` squared, and that theta
descends plainly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from kd_trainer.models import CausalLM
from kd_trainer.rollout.decoder import evaluating

PROBE = 0.01
"""Length of the steps of the central difference, in the space of all parameters. On a tiny Llama the gradient of shares
is off by 7e-5 of its norm, in fp32 as in fp64; at 0.001 rounding makes that 5e-4, at 0.1 curvature makes it 4e-3."""


class UnrolledStep:
    """The unrolled step of a student, anew for every step of the training.

    Costs two copies of the parameters that are trained: their values, and v.

    Args:
        others: parameters beside the student's, whose gradients from looking ahead are thrown away.
    """

    def __init__(self, student: CausalLM, lr: float, others: Iterable[nn.Parameter] = ()) -> None:
        self.lr = lr
        self._student, self._others = student, list(others)
        self._known: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # parameter, its value, v

    @torch.no_grad()
    def look(
        self, add_gradient: Callable[[], object], add_gradient_after: Callable[[], Mapping[str, float]]
    ) -> Mapping[str, float]:
        """Form v. The parameters end as they began, without gradients.

        Args:
            add_gradient: adds dL/dtheta to the gradients.
            add_gradient_after: adds dV/dtheta; called where the parameters are theta'. What it returns is returned.
        """
        parameters = [parameter for parameter in self._student.parameters() if parameter.requires_grad]
        values = [parameter.clone() for parameter in parameters]
        with torch.enable_grad():
            add_gradient()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=self.lr)
        self._clear(parameters)
        with torch.enable_grad():
            metrics = add_gradient_after()
        self._known = [(p, value, p.grad) for p, value in zip(parameters, values) if p.grad is not None]
        self._clear(parameters)
        for parameter, value in zip(parameters, values):
            parameter.copy_(value)
        return metrics

    @torch.no_grad()
    def slopes(self, terms: Callable[[], Tensor]) -> Tensor:
        """``- lr d/de f_i(theta + e v)`` for each of the terms that a pass of the student gives.

        The passes are without dropout and in the parameters' own precision: the differences are small.
        """
        length = math.sqrt(sum(float(v.double().square().sum()) for _, _, v in self._known))
        step, ends = PROBE / max(length, 1e-30), []
        for sign in (1.0, -1.0):
            for parameter, value, v in self._known:
                torch.add(value, v, alpha=sign * step, out=parameter)
            with evaluating(self._student), torch.autocast(self._student.device.type, enabled=False):
                ends.append(terms())
        for parameter, value, _ in self._known:
            parameter.copy_(value)
        return (ends[0] - ends[1]) * (-self.lr / (2.0 * step))

    def _clear(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in (*parameters, *self._others):
            parameter.grad = None
