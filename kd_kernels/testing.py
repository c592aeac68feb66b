"""What tests and benchmarks share: inputs by name, the error metric, and the one table of tolerances.

A gradient of a distillation loss is a difference of two probabilities, and most of its entries are near 1/V. An
absolute tolerance therefore accepts a gradient of zeros. Here an error is measured row by row against that row's own
size, and compared with the error that plain torch makes on the same inputs (:func:`assert_as_good`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "FLOORS",
    "LOGITS",
    "Floor",
    "LinearPair",
    "assert_as_good",
    "linear_pair",
    "logits_pair",
    "mean_total_variation",
    "row_errors",
]


# ----------------------------------------------------------------------------------------------------------- tolerances


@dataclass(frozen=True)
class Floor:
    """What is forgiven whatever plain torch achieves.

    relative: of the row's own norm. absolute: of the row's ``unit``, the size that its terms have before they cancel.
    """

    relative: float
    absolute: float


FLOORS = {
    torch.float64: Floor(relative=1e-10, absolute=1e-13),  # exp and log to the last bit or two, then sums over V
    torch.float32: Floor(relative=2e-5, absolute=1e-6),  # a logit of 10 carries 1e-6, and so does its probability
    # Half a unit in the last place: of the result, and of the fp16 tile that a product of the gradient may be fed.
    torch.float16: Floor(relative=2.0**-11, absolute=1e-6),
    torch.bfloat16: Floor(relative=2.0**-8, absolute=1e-6),
}
"""By the dtype of the result. The only tolerances of the test suite: whoever loosens one says why in the commit."""


def row_errors(actual: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum |actual - truth|, max |actual - truth|)`` of every row of ``[..., V]``, float64; infinities must agree."""
    actual, truth = actual.detach().double(), truth.detach().double()
    # Equal infinities differ by NaN; everything else that is not finite stays and counts as an infinite error.
    gap = torch.where(actual == truth, 0.0, (actual - truth).abs()).nan_to_num(nan=math.inf)
    gap = gap.reshape(-1, gap.shape[-1]) if gap.dim() else gap.reshape(1, 1)
    return gap.sum(-1), gap.amax(-1)


def assert_as_good(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    unit: Tensor | float = 0.0,
    what: str = "result",
) -> None:
    """The error of ``actual`` is at most twice that of ``plain``, plus the floor of its dtype, in every row.

    Args:
        actual: ``[..., C]``, what is judged; its dtype selects the floor.
        plain: the same shape, from plain torch: inputs as given, arithmetic in fp32 (fp64 for fp64), rounded to the
            dtype of ``actual``.
        truth: the same shape, in float64.
        unit: number or ``[..., 1]``: the L1 norm that the row's terms have before they cancel, for rows whose truth is
            near 0 (a teacher that equals the student). 0: the row's own size is all that counts.
        what: named in the message.

    Both the L1 error against the row's L1 norm and the largest error against the row's largest entry must hold.
    """
    assert actual.shape == truth.shape == plain.shape, f"{what}: shapes {actual.shape}, {plain.shape}, {truth.shape}"
    if truth.numel() == 0:
        return
    floor = FLOORS[actual.dtype]
    width = truth.shape[-1] if truth.dim() else 1
    finite = torch.where(truth.isfinite(), truth.detach().double().abs(), 0.0).reshape(-1, width)
    unit = torch.as_tensor(unit, dtype=torch.float64).reshape(-1)
    sizes = {"sum": finite.sum(-1), "max": finite.amax(-1)}
    for kind, ours, yardstick in zip(sizes, row_errors(actual, truth), row_errors(plain, truth)):
        allowed = 2.0 * yardstick + floor.relative * sizes[kind] + floor.absolute * unit
        excess = ours - allowed
        excess = torch.where(ours == 0, -torch.inf, excess.nan_to_num(nan=math.inf))
        row = int(excess.argmax())
        if excess[row] > 0:
            got, near, true = (x.detach().double().reshape(-1, width)[row] for x in (actual, plain, truth))
            column = int((got - true).abs().nan_to_num(nan=math.inf).argmax())
            raise AssertionError(
                f"{what}: {kind} of |error| in row {row} of {len(ours)} is {ours[row]:.3g}, allowed {allowed[row]:.3g} "
                f"(row's {kind} {sizes[kind][row]:.3g}, plain torch's error {yardstick[row]:.3g}); "
                f"{int((excess > 0).sum())} rows fail; worst at column {column}: "
                f"got {got[column]:.9g}, plain {near[column]:.9g}, true {true[column]:.9g}"
            )


# --------------------------------------------------------------------------------------------------------------- inputs


def mean_total_variation(student: Tensor, teacher: Tensor) -> float:
    """Mean over rows of ``1/2 sum |p - q|``, computed in float64."""
    return 0.5 * (student.double().softmax(-1) - teacher.double().softmax(-1)).abs().sum(-1).mean().item()


def _noise_scale(student_at: Callable[[float], Tensor], teacher: Tensor, target: float) -> float:
    """The scale at which ``student_at(scale)`` is ``target`` away: bisection in log(scale), to 0.3 percent."""
    low, high = 1e-3, 16.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean_total_variation(student_at(middle), teacher) < target else (low, middle)
    return high


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _uniform(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Every probability near 1/V: the case in which an absolute tolerance sees nothing."""
    return 0.1 * _normal(generator, rows, vocab), 0.1 * _normal(generator, rows, vocab)


def _peaked(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """One id in 64 stands out by a factor of 20, in the student by a factor between 16 and 24."""
    outlier = torch.rand(rows, vocab, generator=generator) < 1 / 64
    teacher = _normal(generator, rows, vocab) * torch.where(outlier, 20.0, 1.0)
    student = teacher * (0.8 + 0.4 * torch.rand(rows, vocab, generator=generator, dtype=torch.float64))
    return student + 0.1 * _normal(generator, rows, vocab), teacher


def _near(total_variation: float) -> Callable[[torch.Generator, int, int], tuple[Tensor, Tensor]]:
    def build(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
        teacher, noise = 3.0 * _normal(generator, rows, vocab), _normal(generator, rows, vocab)
        if rows == 0 or vocab == 1:
            return teacher + noise, teacher
        return teacher + _noise_scale(lambda s: teacher + s * noise, teacher, total_variation) * noise, teacher

    build.__doc__ = f"Student and teacher {total_variation} apart in total variation, logits of standard deviation 3."
    return build


def _one_hot(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """All of the teacher's mass at one id, to the last bit of fp32."""
    teacher = torch.zeros(rows, vocab, dtype=torch.float64)
    hot = torch.randint(vocab, (rows, 1), generator=generator)
    return 2.0 * _normal(generator, rows, vocab), teacher.scatter(1, hot, 60.0)


def _masked(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """A quarter of the ids is -inf in both, other ids in every row; id 0 never is."""
    student, teacher = _near(0.3)(generator, rows, vocab)
    mask = torch.rand(rows, vocab, generator=generator) < 0.25
    mask[:, :1] = False
    return student.masked_fill(mask, -torch.inf), teacher.masked_fill(mask, -torch.inf)


def _shifted(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Offsets of +1e4 and -1e4, which no probability depends on."""
    student, teacher = _near(0.3)(generator, rows, vocab)
    return student + 1e4, teacher - 1e4


def _padded(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """The last eighth of the columns is padding: -inf in both."""
    student, teacher = _near(0.3)(generator, rows, vocab)
    real = vocab - vocab // 8
    student[:, real:] = teacher[:, real:] = -torch.inf
    return student, teacher


def _equal(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Student and teacher agree to the bit."""
    teacher = 3.0 * _normal(generator, rows, vocab)
    return teacher.clone(), teacher


LOGITS: dict[str, Callable[[torch.Generator, int, int], tuple[Tensor, Tensor]]] = {
    "uniform": _uniform,
    "peaked": _peaked,
    "near_0.3": _near(0.3),
    "near_0.1": _near(0.1),
    "near_0.03": _near(0.03),
    "one_hot": _one_hot,
    "masked": _masked,
    "shifted": _shifted,
    "padded": _padded,
    "equal": _equal,
}
"""Name -> ``build(generator, rows, vocab)``: student and teacher logits ``[rows, vocab]`` in float64."""


def logits_pair(
    name: str,
    rows: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Student and teacher logits ``[rows, vocab]``, in that order, of the named kind and rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = LOGITS[name](generator, rows, vocab)
    return student.to(dtype), teacher.to(dtype)


@dataclass(frozen=True)
class LinearPair:
    """Two linear heads over the same rows: hidden states ``[N, H]`` and weights ``[V, H]`` of student and teacher."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor


def linear_pair(
    rows: int,
    vocab: int,
    student_hidden: int,
    teacher_hidden: int,
    dtype: torch.dtype = torch.float32,
    *,
    logit_std: float = 3.0,
    total_variation: float = 0.3,
    seed: int = 0,
) -> LinearPair:
    """Two heads whose logits have standard deviation ``logit_std`` and are ``total_variation`` apart on average.

    Hidden states are N(0, 1) and weights N(0, 1/H), times ``logit_std``. Both models see the same latent state in their
    first ``min(Hs, Ht)`` dimensions; the student's head is the teacher's plus noise, whose size is found by bisection
    before anything is rounded to ``dtype``.
    """
    generator = torch.Generator().manual_seed(seed)
    shared = min(student_hidden, teacher_hidden)
    latent = _normal(generator, rows, shared)
    head = _normal(generator, vocab, shared) * (logit_std / math.sqrt(shared))
    noise = _normal(generator, vocab, shared) / math.sqrt(shared)

    def widen(width: int) -> tuple[Tensor, Tensor]:
        """Further dimensions that the other model lacks: they carry a percent of the logits' spread."""
        extra = width - shared
        return _normal(generator, rows, extra), _normal(generator, vocab, extra) * 0.01 * logit_std / math.sqrt(
            extra or 1
        )

    own, theirs = widen(student_hidden), widen(teacher_hidden)
    teacher = latent @ head.T + theirs[0] @ theirs[1].T
    student, difference = latent @ head.T + own[0] @ own[1].T, latent @ noise.T
    scale = 0.0
    if rows and vocab > 1:
        scale = _noise_scale(lambda s: student + s * difference, teacher, total_variation)
    parts = (
        torch.cat([latent, own[0]], 1),
        torch.cat([head + scale * noise, own[1]], 1),
        torch.cat([latent, theirs[0]], 1),
        torch.cat([head, theirs[1]], 1),
    )
    return LinearPair(*(part.to(dtype) for part in parts))
