"""Runs the library and the oracle on the same inputs and compares loss and gradients.

A student or teacher is written down once, as one of the small classes below, and gives both the library's noun and the
oracle's logits. Three runs per comparison: the library; the oracle in float64 (truth); the oracle in float32, rounded
to the inputs' dtype (yardstick), and with a bf16 gradient of the logits where the library multiplies that. The library
passes if its error is at most twice the yardstick's, plus the floor of ``kd_kernels.testing``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import oracles
from kd_kernels import EnsembleLogits, LinearLogits, SparseTargets, heads, kd_loss
from kd_kernels.testing import assert_as_good

CASES: dict[str, tuple[str, dict]] = {
    "forward_kl": ("forward_kl", {}),
    "reverse_kl": ("reverse_kl", {}),
    "jsd(beta=0.5)": ("jsd", {"beta": 0.5}),
    "jsd(beta=0.1)": ("jsd", {"beta": 0.1}),
    "skew_forward_kl(alpha=0.1)": ("skew_forward_kl", {"alpha": 0.1}),
    "skew_reverse_kl(alpha=0.1)": ("skew_reverse_kl", {"alpha": 0.1}),
    "skew_reverse_kl(alpha=0.3, detach_mixture=True)": ("skew_reverse_kl", {"alpha": 0.3, "detach_mixture": True}),
    "jeffreys(weight=0.3)": ("jeffreys", {"weight": 0.3}),
    "total_variation": ("total_variation", {}),
    "squared_hellinger": ("squared_hellinger", {}),
    "alpha(alpha=0.5)": ("alpha", {"alpha": 0.5}),
    "alpha(alpha=-0.5)": ("alpha", {"alpha": -0.5}),
    "alpha(alpha=1.5)": ("alpha", {"alpha": 1.5}),
    "alpha_beta(alpha=0.5, beta=0.7)": ("alpha_beta", {"alpha": 0.5, "beta": 0.7}),
    "alpha_beta(alpha=1.2, beta=-0.4)": ("alpha_beta", {"alpha": 1.2, "beta": -0.4}),
    "squared_logprob": ("squared_logprob", {}),
}
"""String form -> the oracle's name and parameters. Every registered divergence is here with at least one setting."""

SOME = ("forward_kl", "reverse_kl", "jsd(beta=0.5)", "skew_reverse_kl(alpha=0.1)")
"""The ones in most use, where every divergence would cost time and show nothing further."""


every_product = pytest.mark.parametrize(
    "dtype, bf16_products", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    indirect=["bf16_products"],
)
"""What a CPU may multiply: see the fixture."""


@dataclass(frozen=True)
class Dense:
    """Logits [..., V] that the caller has."""

    logits: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"logits": self.logits}

    def noun(self, leaves: dict[str, Tensor]) -> Tensor:
        return leaves["logits"]

    def oracle(self, leaves: dict[str, Tensor]) -> Tensor:
        return leaves["logits"].flatten(0, -2)


@dataclass(frozen=True)
class Linear:
    """Hidden states [..., H] and a head [V, H]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        found = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: leaf for name, leaf in found.items() if leaf is not None}

    def noun(self, leaves: dict[str, Tensor]) -> LinearLogits:
        return LinearLogits(**leaves, scale=self.scale, softcap=self.softcap, valid_vocab=self.valid_vocab)

    def oracle(self, leaves: dict[str, Tensor], gradient_dtype: torch.dtype | None = None) -> Tensor:
        options = dict(scale=self.scale, softcap=self.softcap, valid_vocab=self.valid_vocab)
        return oracles.linear(**leaves, **options, gradient_dtype=gradient_dtype).flatten(0, -2)


@dataclass(frozen=True)
class Ensemble:
    """Several dense or linear teachers."""

    members: Sequence[Dense | Linear]
    weights: tuple[float, ...] | Tensor
    space: str

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": leaf for i, m in enumerate(self.members) for name, leaf in m.leaves.items()}

    def _split(self, leaves: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return [{name: leaves[f"{i}.{name}"] for name in m.leaves} for i, m in enumerate(self.members)]

    def noun(self, leaves: dict[str, Tensor]) -> EnsembleLogits:
        members = tuple(m.noun(own) for m, own in zip(self.members, self._split(leaves)))
        return EnsembleLogits(members, self.weights, self.space)

    def oracle(self, leaves: dict[str, Tensor]) -> Tensor:
        logits = [m.oracle(own) for m, own in zip(self.members, self._split(leaves))]
        weights = self.weights if isinstance(self.weights, Tensor) else list(self.weights)
        return oracles.ensemble(logits, weights, self.space)


@dataclass(frozen=True)
class Sparse:
    """A truncated teacher: entries as given to the library, which are the truth whatever they were rounded to."""

    rows: list[oracles.Row]
    dtype: torch.dtype = torch.float32

    @staticmethod
    def of(logits: Tensor, ids: list[Tensor], temperature: float = 1.0, dtype: torch.dtype = torch.float32) -> Sparse:
        """From dense logits [N, V] and the ids that each row keeps; values are those that ``dtype`` can hold."""
        rows = oracles.truncate(logits.double(), ids, temperature)
        held = lambda x: x.to(dtype).double()  # noqa: E731
        return Sparse([oracles.Row(r.ids, held(r.logprobs), held(r.tail_logprob)) for r in rows], dtype)

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {}

    def noun(self, leaves: dict[str, Tensor]) -> SparseTargets:
        return sparse_targets(self.rows, self.dtype)

    def oracle(self, leaves: dict[str, Tensor]) -> list[oracles.Row]:
        return self.rows


Student = Dense | Linear
Teacher = Dense | Linear | Ensemble | Sparse


def sparse_targets(rows: list[oracles.Row], dtype: torch.dtype = torch.float32, **fields) -> SparseTargets:
    """The library's noun for the oracle's rows."""
    join = lambda parts, kind: torch.cat([*parts, torch.empty(0, dtype=kind)]).to(kind)  # noqa: E731
    counts = torch.tensor([0] + [len(r.ids) for r in rows])
    tails = join([r.tail_logprob[None] for r in rows], dtype)
    return SparseTargets(
        counts.cumsum(0),
        join([r.ids for r in rows], torch.int64),
        join([r.logprobs for r in rows], dtype),
        torch.where(tails <= -oracles.NEVER / 2, -torch.inf, tails),
        join([r.importance for r in rows], dtype) if rows and rows[0].importance is not None else None,
        **fields,
    )


@dataclass
class Outcome:
    """Loss and gradients of one run, by the name of the leaf."""

    loss: Tensor
    gradients: dict[str, Tensor]
    stats: dict[str, Tensor]


def run_library(
    student: Student,
    teacher: Teacher,
    divergence: str,
    *,
    requires: Sequence[str] | None = None,
    upstream: Tensor | None = None,
    device: str = "cpu",
    **options,
) -> Outcome:
    """kd_loss and its backward pass, with gradients of the leaves in ``requires`` (None: all); inputs stay as is.

    On another ``device`` than the CPU the inputs are moved there and the outcome is moved back.
    """
    move = lambda x: x.to(device) if isinstance(x, (Tensor, SparseTargets)) else x  # noqa: E731
    wanted = list(student.leaves) if requires is None else list(requires)
    leaves = {name: move(leaf.detach()).requires_grad_(name in wanted) for name, leaf in student.leaves.items()}
    fixed = {name: move(leaf) for name, leaf in teacher.leaves.items()}
    given = {**{k: v.detach() for k, v in leaves.items()}, **{f"teacher.{k}": v for k, v in fixed.items()}}
    before = {name: leaf.clone() for name, leaf in given.items()}
    options = {name: move(value) for name, value in options.items()}
    result = kd_loss(student.noun(leaves), move(teacher.noun(fixed)), divergence, **options)
    if wanted:
        result.loss.backward(torch.ones_like(result.loss) if upstream is None else move(upstream))
    for name, leaf in given.items():
        assert torch.equal(leaf.nan_to_num(), before[name].nan_to_num()), f"{name} was written to"
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted), f"gradient of {name}: {leaf.grad is not None}"
    if device == "cpu":
        return Outcome(result.loss.detach(), {name: leaves[name].grad for name in wanted}, result.stats)
    stats = {name: value.cpu() for name, value in result.stats.items()}
    return Outcome(result.loss.detach().cpu(), {name: leaves[name].grad.cpu() for name in wanted}, stats)


def smallest_budget(*args, **options) -> int:
    """The scratch that one row takes, as the complaint about too small a budget says it."""
    with pytest.raises(
        ValueError, match="^kd_loss: max_scratch_bytes must be at least .* bytes, which one row takes"
    ) as caught:
        kd_loss(*args, max_scratch_bytes=1, **options)
    return int(re.search(r"at least (\d+) bytes", str(caught.value))[1])


def plain_logits(student: Student | Ensemble, leaves: dict[str, Tensor]) -> Tensor:
    """The oracle's logits as plain torch differentiates them: autograd hands the products of a bf16 head a bf16
    gradient.

    So does the library on some devices (test_native_bf16.py holds on which); where it does not, neither does the
    yardstick, which keeps fp32 there. An fp16 tile is scaled first, and so costs less than plain torch's.
    """
    if not isinstance(student, Linear):
        return student.oracle(leaves)
    noun, work = student.noun(student.leaves), next(iter(leaves.values())).dtype
    is_bf16 = heads.head(noun, work, noun.vocab).tile_dtype == torch.bfloat16
    return student.oracle(leaves, torch.bfloat16 if is_bf16 else None)


def run_oracle(
    student: Student,
    teacher: Teacher,
    divergence: str,
    dtype: torch.dtype,
    *,
    requires: Sequence[str] | None = None,
    upstream: Tensor | None = None,
    rows: Tensor | None = None,
    labels: Tensor | None = None,
    token_weight: Tensor | None = None,
    is_plain_torch: bool = False,
    **options,
) -> Outcome:
    """The same in one dtype throughout, but for what :func:`plain_logits` says of plain torch."""
    name, params = CASES[divergence]
    cast = lambda parts: {k: v.detach().to(dtype) for k, v in parts.items()}  # noqa: E731
    leaves = {k: v.requires_grad_() for k, v in cast(student.leaves).items()}
    target = teacher.oracle(cast(teacher.leaves))
    if not isinstance(target, Tensor):
        held = lambda x: None if x is None else x.to(dtype)  # noqa: E731
        target = [oracles.Row(r.ids, held(r.logprobs), held(r.tail_logprob), held(r.importance)) for r in target]
    logits = plain_logits(student, leaves) if is_plain_torch else student.oracle(leaves)
    labels = None if labels is None else labels.flatten().long()
    token_weight = None if token_weight is None else token_weight.flatten()
    if rows is not None:  # the rows that are not listed have weight 0
        listed = torch.zeros(len(logits), dtype=dtype).index_fill(0, rows, 1.0)
        token_weight = listed if token_weight is None else listed * token_weight
    loss = oracles.kd_loss(logits, target, name, params, labels=labels, token_weight=token_weight, **options)
    wanted = list(leaves) if requires is None else list(requires)
    upstream = None if upstream is None else upstream.reshape(loss.shape)
    grads = oracles.gradients(loss, [leaves[k] for k in wanted], upstream)
    return Outcome(loss.detach(), dict(zip(wanted, grads)), {})


def units(student: Student, teacher: Teacher, name: str, rows: Tensor, temperature: float) -> dict[str, Tensor]:
    """What a row's terms add up to before they cancel, by leaf: those of the logits' gradient, through the chain rule.

    The terms are probabilities, except that those of ``squared_logprob`` are log-probabilities: a tenth of them,
    because the floor is that of a logit of 10. ``rows`` [N] is the factor that each row's loss has in the result.
    """
    leaves = {k: v.detach().double() for k, v in student.leaves.items()}
    target = teacher.oracle({k: v.detach().double() for k, v in teacher.leaves.items()})
    both = [x for x in (student.oracle(leaves), target) if isinstance(x, Tensor)]
    both = [oracles.log_probs(x, temperature) for x in both]
    if name == "squared_logprob":
        mass = sum(torch.where(x > -oracles.NEVER / 2, x.abs() / 10, 0.0) for x in both)
    else:
        mass = sum(x.exp() for x in both)
    mass = mass * rows[:, None] / temperature
    if isinstance(student, Dense):
        return {"logits": mass.sum(-1, keepdim=True)}
    weight, hidden = leaves["weight"].abs() * student.scale, leaves["hidden"].abs().flatten(0, -2) * student.scale
    padded = torch.zeros(mass.shape[0], weight.shape[0], dtype=torch.float64)
    padded[:, : mass.shape[1]] = mass
    return {
        "hidden": (padded @ weight).sum(-1, keepdim=True),
        "weight": (padded.T @ hidden).sum(-1, keepdim=True),
        "bias": padded.sum() * student.scale,
    }


def compare(
    student: Student,
    teacher: Teacher,
    divergence: str,
    *,
    backend: str | None = None,
    requires: Sequence[str] | None = None,
    upstream: Tensor | None = None,
    library_only: dict | None = None,
    **options,
) -> Outcome:
    """The library against truth and yardstick, in loss and every gradient. Returns the library's outcome.

    ``library_only``: options that the oracle has no notion of, because they must change nothing (max_scratch_bytes).
    """
    both = dict(requires=requires, upstream=upstream, **options)
    ours = run_library(student, teacher, divergence, backend=backend, **both, **(library_only or {}))
    truth = run_oracle(student, teacher, divergence, torch.float64, **both)
    dtypes = {leaf.dtype for leaf in (*student.leaves.values(), *teacher.leaves.values())}
    dtypes |= {teacher.dtype} if isinstance(teacher, Sparse) else set()
    lowest = torch.float64 if torch.float64 in dtypes else torch.float32
    plain = run_oracle(student, teacher, divergence, lowest, is_plain_torch=True, **both)

    rows = next(iter(student.leaves.values())).shape[:-1].numel()
    factor = oracles.row_weights(
        rows,
        None if options.get("labels") is None else options["labels"].flatten(),
        None if options.get("token_weight") is None else options["token_weight"].flatten(),
        options.get("ignore_index", -100),
        torch.float64,
    )
    if options.get("reduction", "mean") == "mean":
        total = options.get("normalizer")
        total = float(factor.sum()) if total is None else float(total)
        factor = factor / total if total else factor
    temperature = options.get("temperature", 1.0)
    scale = options.get("kd_weight", 1.0) * (temperature**2 if options.get("squared_temperature") else 1.0)
    factor = factor * (scale + options.get("ce_weight", 0.0))

    assert ours.loss.dtype == lowest
    flat = lambda x: x.reshape(-1, 1)  # noqa: E731
    unit = factor if options.get("reduction") == "none" else factor.sum()
    assert_as_good(flat(ours.loss), flat(plain.loss), flat(truth.loss), unit=unit, what=f"loss of {divergence}")
    if upstream is not None:
        factor = factor * upstream.abs().flatten()
    sizes = units(student, teacher, CASES[divergence][0], factor, temperature)
    for name, gradient in ours.gradients.items():
        leaf = student.leaves[name]
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        rowwise = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
        assert_as_good(
            rowwise(gradient),
            rowwise(plain.gradients[name].to(leaf.dtype)),
            rowwise(truth.gradients[name]),
            unit=sizes[name],
            what=f"d {divergence} / d {name}",
        )
    return ours


HALF_PRECISION_ERROR = {torch.bfloat16: 5e-3, torch.float16: 6e-4}
"""Relative L2 error of a gradient: what rounding the gradient of the logits, and the result, to half precision
costs."""


def compare_on_matrix_units(
    student: Linear, teacher: Teacher, divergence: str, *, reduction: str, backend: str, device: str = "cpu", **options
) -> None:
    """As :func:`compare`; of a half-precision head, the gradients over all rows: their terms are rounded before they
    cancel."""
    dtype, rows = student.weight.dtype, student.hidden.shape[0]
    if dtype == torch.float32:
        compare(
            student, teacher, divergence, reduction=reduction, backend=backend, library_only={"device": device},
            **options
        )
        return
    upstream = torch.linspace(0.5, 1.5, rows) if reduction == "none" else None
    given = dict(reduction=reduction, upstream=upstream, **options)
    ours = run_library(student, teacher, divergence, backend=backend, device=device, **given)
    truth = run_oracle(student, teacher, divergence, torch.float64, **given)
    assert_as_good(
        ours.loss.reshape(-1, 1), truth.loss.float().reshape(-1, 1), truth.loss.reshape(-1, 1), unit=1.0, what="loss"
    )
    for name, gradient in ours.gradients.items():
        error = (gradient.double() - truth.gradients[name]).norm() / truth.gradients[name].norm()
        assert error < HALF_PRECISION_ERROR[dtype], f"{name}: {error}"
