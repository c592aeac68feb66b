"""The divergences, each written once.

p is the teacher's probability and q the student's, everywhere; values are in nats. A divergence here is a sum over the
vocabulary of ``f(log p, log q)``, and all that a kernel needs of it are two scalars: ``f`` and ``g = df / dlog q``.
With ``G = sum_v g`` the gradient with respect to a student logit is ``(g - q G) / temperature``.

Each formula is one straight-line function below, in a tiny vocabulary: arithmetic, comparisons, ``tl.exp``, the cheaper
``tl.exp_fall`` for what is not above 0, ``tl.log``, ``tl.abs``, ``tl.where``. From that one text come the Triton device
function (:func:`triton_terms`), the torch code of the reference backend (:func:`torch_terms`) and the C++ struct in
``csrc/include/kd/terms.h`` (printed by ``kd_kernels/generate_terms.py``). A masked column has ``log p = -inf`` or
``log q = -inf``: the guards keep ``0 * inf`` out, so that a column that neither model has adds nothing.

To add one: a function and a factory here, an oracle in ``tests/oracles.py``, then
``python -m kd_kernels.generate_terms``.
"""

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_kernels import _check

# ---------------------------------------------------------------------------------------------------------------------
# The formulas. `tl` is bound when a formula is rendered; see torch_terms and triton_terms.
# ---------------------------------------------------------------------------------------------------------------------


class _TorchLanguage:
    """The formulas' vocabulary on torch tensors."""

    exp, exp_fall, log, abs = torch.exp, torch.exp, torch.log, torch.abs
    where = staticmethod(torch.where)


tl: Any = _TorchLanguage


def _forward_kl(logp, logq):
    p = tl.exp_fall(logp)
    f = tl.where(p > 0, p * (logp - logq), 0.0)
    return f, -p


def _reverse_kl(logp, logq):
    q = tl.exp_fall(logq)
    f = tl.where(q > 0, q * (logq - logp), 0.0)
    return f, f + q


# A mixture m = weight p + (1 - weight) q is taken relative to the larger of p and q. Where they are near each other,
# what is left of log p - log m is then small, and so are its errors; log m itself has those of a number as large.


def _jsd(logp, logq, beta):
    top = tl.where(logq > logp, logq, logp)
    fall_p = tl.exp_fall(logp - top)
    fall_q = tl.exp_fall(logq - top)
    larger = tl.exp_fall(top)
    log_m = tl.log(beta * fall_p + (1.0 - beta) * fall_q)
    p = larger * fall_p
    q = larger * fall_q
    from_p = tl.where(p > 0, p * ((logp - top) - log_m), 0.0)
    from_q = tl.where(q > 0, q * ((logq - top) - log_m), 0.0)
    return beta * from_p + (1.0 - beta) * from_q, (1.0 - beta) * from_q


def _skew_forward_kl(logp, logq, alpha):
    top = tl.where(logq > logp, logq, logp)
    fall_p = tl.exp_fall(logp - top)
    fall_q = tl.exp_fall(logq - top)
    m = alpha * fall_p + (1.0 - alpha) * fall_q
    p = tl.exp_fall(top) * fall_p
    f = tl.where(p > 0, p * ((logp - top) - tl.log(m)), 0.0)
    g = tl.where(p > 0, (alpha - 1.0) * p * (fall_q / m), 0.0)
    return f, g


def _skew_reverse_kl(logp, logq, alpha):
    top = tl.where(logq > logp, logq, logp)
    fall_p = tl.exp_fall(logp - top)
    fall_q = tl.exp_fall(logq - top)
    m = (1.0 - alpha) * fall_p + alpha * fall_q
    q = tl.exp_fall(top) * fall_q
    f = tl.where(q > 0, q * ((logq - top) - tl.log(m)), 0.0)
    g = tl.where(q > 0, f + q * (1.0 - alpha * (fall_q / m)), 0.0)
    return f, g


def _skew_reverse_kl_detached(logp, logq, alpha):
    top = tl.where(logq > logp, logq, logp)
    fall_q = tl.exp_fall(logq - top)
    m = (1.0 - alpha) * tl.exp_fall(logp - top) + alpha * fall_q
    q = tl.exp_fall(top) * fall_q
    f = tl.where(q > 0, q * ((logq - top) - tl.log(m)), 0.0)
    return f, tl.where(q > 0, f + q, 0.0)


def _jeffreys(logp, logq, weight):
    p = tl.exp_fall(logp)
    q = tl.exp_fall(logq)
    forward = tl.where(p > 0, p * (logp - logq), 0.0)
    reverse = tl.where(q > 0, q * (logq - logp), 0.0)
    return weight * forward + (1.0 - weight) * reverse, (1.0 - weight) * (reverse + q) - weight * p


def _total_variation(logp, logq):
    p = tl.exp_fall(logp)
    q = tl.exp_fall(logq)
    sign = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    return sign * (q - p), sign * q


def _squared_hellinger(logp, logq):
    root_p = tl.exp_fall(0.5 * logp)
    root_q = tl.exp_fall(0.5 * logq)
    gap = root_q - root_p
    return 0.5 * gap * gap, 0.5 * root_q * gap


def _alpha(logp, logq, alpha):
    p = tl.exp_fall(logp)
    q = tl.exp_fall(logq)
    mixed = tl.where(p + q > 0, tl.exp(alpha * logp + (1.0 - alpha) * logq), 0.0)
    f = (mixed - alpha * p - (1.0 - alpha) * q) / (alpha * (alpha - 1.0))
    return f, (q - mixed) / alpha


def _alpha_beta(logp, logq, alpha, beta):
    both = alpha + beta
    # Minus 1e30 stands for -inf.
    present = tl.where(logq > logp, logq, logp) > -1e30
    mixed = tl.where(present, tl.exp(alpha * logp + beta * logq), 0.0)
    only_p = tl.where(present, tl.exp(both * logp), 0.0)
    only_q = tl.where(present, tl.exp(both * logq), 0.0)
    f = (alpha / both * only_p + beta / both * only_q - mixed) / (alpha * beta)
    return f, (only_q - mixed) / alpha


def _squared_logprob(logp, logq):
    # Minus 1e30 stands for -inf: exp would drop ids below e^-87 in fp32, which count here as much as any other.
    gap = tl.where(logp > -1e30, tl.where(logq > -1e30, logq - logp, 0.0), 0.0)
    return 0.5 * gap * gap, gap


# ---------------------------------------------------------------------------------------------------------------------
# What a user holds
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Divergence:
    """One divergence with its parameters. Make one with the functions below, or from a string with :func:`parse`.

    Attributes:
        name: as in :data:`REGISTRY`.
        terms: the function ``(logp, logq, *params) -> (f, g)``.
        params: parameter names and values, in the order that ``terms`` takes them.
        options: flags that choose another ``terms`` (``detach_mixture``), for the string form.
        symmetric: D(p, q) = D(q, p).
        bound: the largest value that it can take, in nats, or None.
        paper: where it comes from.
        total_g, reverse_share: G = sum g is ``total_g + reverse_share KL(q || p)``, or None and 0 where it is no such
            number. One that is known from the normalisers' walk spares another over the row.
    """

    name: str
    terms: Callable[..., tuple[Any, Any]]
    params: tuple[tuple[str, float], ...] = ()
    options: tuple[tuple[str, bool], ...] = ()
    symmetric: bool = False
    bound: float | None = None
    paper: str = ""
    total_g: float | None = None
    reverse_share: float = 0.0

    @property
    def values(self) -> tuple[float, ...]:
        """The parameters alone, as ``terms`` takes them."""
        return tuple(value for _, value in self.params)

    @property
    def kernel(self) -> str:
        """The name under which compiled backends know the formula."""
        return self.terms.__name__.lstrip("_")

    def __str__(self) -> str:
        arguments = [f"{name}={value!r}" for name, value in (*self.params, *self.options)]
        return f"{self.name}({', '.join(arguments)})" if arguments else self.name


def _number(
    where: str, argument: str, value: object, requirement: str, holds: Callable[[float], bool], remedy: str = ""
) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _check.fail_type(where, argument, "a number", type(value).__name__)
    if not (abs(value) < float("inf") and holds(value)):
        _check.fail(where, argument, requirement, value, remedy)
    return float(value)


def forward_kl() -> Divergence:
    """``KL(p || q) = sum p log(p / q)``. Mass-covering. Hinton et al. 2015, arXiv 1503.02531."""
    return Divergence("forward_kl", _forward_kl, paper="Hinton et al. 2015, arXiv 1503.02531", total_g=-1.0)


def reverse_kl() -> Divergence:
    """``KL(q || p) = sum q log(q / p)``. Mode-seeking. Infinite where the student has mass and the teacher none.

    Gu et al. 2023 (MiniLLM), arXiv 2306.08543.
    """
    paper = "Gu et al. 2023, arXiv 2306.08543"
    return Divergence("reverse_kl", _reverse_kl, paper=paper, total_g=1.0, reverse_share=1.0)


def jsd(beta: float = 0.5) -> Divergence:
    """Generalised Jensen-Shannon: ``beta KL(p || m) + (1 - beta) KL(q || m)``, ``m = beta p + (1 - beta) q``, 0 < beta
    < 1.

    At the end points it vanishes (``jsd / beta -> forward KL`` as beta -> 0, ``jsd / (1 - beta) -> reverse KL`` as
    beta -> 1), so they are refused. Agarwal et al. 2023 (GKD), arXiv 2306.13649.
    """
    beta = _number("jsd", "beta", beta, "in (0, 1)", lambda b: 0 < b < 1, "for the limits use forward_kl or reverse_kl")
    entropy = -beta * _log(beta) - (1 - beta) * _log(1 - beta)
    return Divergence(
        "jsd", _jsd, (("beta", beta),), symmetric=beta == 0.5, bound=entropy,
        paper="Agarwal et al. 2023, arXiv 2306.13649"
    )


def skew_forward_kl(alpha: float = 0.1) -> Divergence:
    """``KL(p || alpha p + (1 - alpha) q)``, 0 < alpha < 1. Ko et al. 2024 (DistiLLM), arXiv 2402.03898."""
    alpha = _number("skew_forward_kl", "alpha", alpha, "in (0, 1)", lambda a: 0 < a < 1, "for 0 use forward_kl")
    return Divergence(
        "skew_forward_kl", _skew_forward_kl, (("alpha", alpha),), bound=-_log(alpha),
        paper="Ko et al. 2024, arXiv 2402.03898",
    )


def skew_reverse_kl(alpha: float = 0.1, detach_mixture: bool = False) -> Divergence:
    """``KL(q || (1 - alpha) p + alpha q)``, 0 < alpha < 1.

    ``detach_mixture=False`` differentiates through the mixture (DistiLLM, arXiv 2402.03898); True takes it as a
    constant (DistiLLM-2, arXiv 2503.07067): the same value, another gradient.
    """
    alpha = _number("skew_reverse_kl", "alpha", alpha, "in (0, 1)", lambda a: 0 < a < 1, "for 0 use reverse_kl")
    if not isinstance(detach_mixture, bool):
        _check.fail_type("skew_reverse_kl", "detach_mixture", "a bool", type(detach_mixture).__name__)
    return Divergence(
        "skew_reverse_kl", _skew_reverse_kl_detached if detach_mixture else _skew_reverse_kl, (("alpha", alpha),),
        options=(("detach_mixture", True),) if detach_mixture else (), bound=-_log(alpha),
        paper="Ko et al. 2024, arXiv 2402.03898; 2025, arXiv 2503.07067",
    )


def jeffreys(weight: float = 0.5) -> Divergence:
    """``weight KL(p || q) + (1 - weight) KL(q || p)``, 0 < weight < 1; symmetric at 0.5. Jeffreys 1946."""
    weight = _number(
        "jeffreys", "weight", weight, "in (0, 1)", lambda w: 0 < w < 1,
        "for the end points use reverse_kl or forward_kl"
    )
    return Divergence(
        "jeffreys", _jeffreys, (("weight", weight),), symmetric=weight == 0.5, paper="Jeffreys 1946",
        total_g=1 - 2 * weight, reverse_share=1 - weight,
    )


def total_variation() -> Divergence:
    """``1/2 sum |p - q|``; one minus it is the acceptance rate of speculative decoding. Wen et al. 2023, arXiv
    2307.15190."""
    return Divergence(
        "total_variation", _total_variation, symmetric=True, bound=1.0, paper="Wen et al. 2023, arXiv 2307.15190"
    )


def squared_hellinger() -> Divergence:
    """``1/2 sum (sqrt p - sqrt q)^2``. Hellinger 1909."""
    return Divergence("squared_hellinger", _squared_hellinger, symmetric=True, bound=1.0, paper="Hellinger 1909")


def alpha(alpha: float = 0.5) -> Divergence:
    """Amari's alpha: ``(sum p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1))``; alpha not 0 or 1.

    alpha -> 1 is the forward KL, alpha -> 0 the reverse. Summed as ``(p^a q^(1-a) - a p - (1-a) q) / (a (a - 1))``,
    which has the same sum and no negative term. Amari 1985; Wang et al. 2025 (ABKD), arXiv 2505.04560.
    """
    alpha = _number(
        "alpha", "alpha", alpha, "other than 0 and 1", lambda a: a not in (0, 1), "use reverse_kl or forward_kl"
    )
    bound = 1 / (alpha * (1 - alpha)) if 0 < alpha < 1 else None
    return Divergence("alpha", _alpha, (("alpha", alpha),), symmetric=alpha == 0.5, bound=bound, paper="Amari 1985")


def alpha_beta(alpha: float, beta: float) -> Divergence:
    """``-1/(a b) sum (p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b))``; a, b and a + b not 0.

    Cichocki et al. 2011; Wang et al. 2025 (ABKD), arXiv 2505.04560.
    """
    a = _number("alpha_beta", "alpha", alpha, "other than 0", lambda x: x != 0)
    b = _number("alpha_beta", "beta", beta, "other than 0 and -alpha", lambda x: x not in (0, -a))
    return Divergence(
        "alpha_beta", _alpha_beta, (("alpha", a), ("beta", b)), symmetric=a == b,
        paper="Cichocki et al. 2011; Wang et al. 2025, arXiv 2505.04560",
    )


def squared_logprob() -> Divergence:
    """``1/2 sum (log q - log p)^2`` over the ids that both models have. Ba & Caruana 2014, on normalised logits.

    On the sampled id alone (importance-weighted targets) it is the SEL loss of Zhao & Zhu 2023, arXiv 2310.07838.
    """
    return Divergence("squared_logprob", _squared_logprob, symmetric=True, paper="Ba & Caruana 2014, arXiv 1312.6184")


def _log(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).log().item()


REGISTRY: dict[str, Callable[..., Divergence]] = {
    factory.__name__: factory
    for factory in (
        forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, jeffreys, total_variation, squared_hellinger,
        alpha, alpha_beta, squared_logprob,
    )
}
"""Every divergence by name. Configurations, tests, benchmarks and the README's table are driven by it."""

FORMULAS: tuple[Callable[..., tuple[Any, Any]], ...] = (
    _forward_kl, _reverse_kl, _jsd, _skew_forward_kl, _skew_reverse_kl, _skew_reverse_kl_detached, _jeffreys,
    _total_variation, _squared_hellinger, _alpha, _alpha_beta, _squared_logprob,
)
"""Every formula that compiled backends carry, in the order of their numbers there."""

_CUSTOM: dict[str, Divergence] = {}


def custom(name: str, terms: Callable[..., tuple[Tensor, Tensor]], **params: float) -> Divergence:
    """A divergence of the user's own: ``terms(logp, logq, **params) -> (f, g)`` on torch tensors, ``g = df / dlog q``.

    It runs on every device through torch operations (the reference backend). ``logp`` and ``logq`` may hold ``-inf``.
    The name then works as a string too. Registering a name again replaces it.

    Raises:
        ValueError: ``name`` is a built-in one or no identifier.
    """
    if not isinstance(name, str):
        _check.fail_type("custom", "name", "a str", type(name).__name__)
    if not name.isidentifier() or name in REGISTRY:
        _check.fail("custom", "name", "an identifier that is no built-in divergence", repr(name))
    if not callable(terms):
        _check.fail_type("custom", "terms", "a function (logp, logq, ...) -> (f, g)", type(terms).__name__)
    made = Divergence(name, terms, tuple((k, _number(name, k, v, "finite", lambda _: True)) for k, v in params.items()))
    _CUSTOM[name] = _CUSTOM[str(made)] = made
    return made


@functools.cache
def _parse_builtin(text: str) -> Divergence | None:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(func=tree, args=[], keywords=[])
        name = call.func.id  # type: ignore[attr-defined]
        args = [ast.literal_eval(arg) for arg in call.args]
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if None in kwargs:
            raise ValueError("** is not for configurations")
    except (SyntaxError, ValueError, AttributeError):
        _check.fail(
            "divergence", "the string", 'of the form name or name(parameter=value), as "jsd(beta=0.5)"', repr(text)
        )
    if name not in REGISTRY:
        return None
    try:
        return REGISTRY[name](*args, **kwargs)
    except TypeError as error:
        if "argument" in str(error) and "must be" not in str(error):
            _check.fail("divergence", "the string", f"a call of {name} with its parameters", repr(text), str(error))
        raise


def parse(divergence: str | Divergence) -> Divergence:
    """A :class:`Divergence` from its string form: ``"forward_kl"``, ``"jsd(beta=0.5)"``. A Divergence passes through.

    Raises:
        ValueError: unknown name (the known ones are listed) or a parameter out of range.
        TypeError: neither a string nor a Divergence.
    """
    if isinstance(divergence, Divergence):
        if divergence.terms not in FORMULAS and _CUSTOM.get(str(divergence)) != divergence:
            _check.fail("kd_loss", "divergence", "registered", str(divergence), "make it with divergences.custom")
        return divergence
    if not isinstance(divergence, str):
        _check.fail_type("kd_loss", "divergence", "a string or a Divergence", type(divergence).__name__)
    if divergence in _CUSTOM:
        return _CUSTOM[divergence]
    found = _parse_builtin(divergence)
    if found is None:
        _check.fail("kd_loss", "divergence", "one of " + ", ".join((*REGISTRY, *_CUSTOM)), repr(divergence))
    return found


def is_builtin(text: str) -> bool:
    """Whether compiled backends carry the divergence of this string form."""
    return text.partition("(")[0].strip() in REGISTRY


# ---------------------------------------------------------------------------------------------------------------------
# Renderings
# ---------------------------------------------------------------------------------------------------------------------


def torch_terms(divergence: Divergence) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The formula as torch code: ``(logp, logq) -> (f, g)`` on tensors of any float dtype and shape."""
    return lambda logp, logq: divergence.terms(logp, logq, *divergence.values)


@functools.cache
def triton_terms(kernel: str) -> Any:
    """The formula named ``kernel`` as a Triton device function ``(logp, logq, *params) -> (f, g)``.

    The code object is the one above; only the name ``tl`` in it is bound anew.
    """
    import triton
    import triton.language

    from kd_kernels import triton_formulas

    formula = next(f for f in FORMULAS if f.__name__ == f"_{kernel}")
    # Triton's interpreter looks for its own language among a function's globals.
    names = {"__name__": __name__, "tl": triton_formulas, "language": triton.language}
    return triton.jit(types.FunctionType(formula.__code__, names, formula.__name__))
