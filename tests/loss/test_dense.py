"""kd_loss on logits that the caller has: every divergence, every kind of input, every size, layout and dtype."""

from __future__ import annotations

import math

import pytest
import torch

from judge import CASES, SOME, Dense, Linear, compare, run_library
from kd_kernels import kd_loss
from kd_kernels.testing import LOGITS, linear_pair, logits_pair

# One id; below, at and above a vector of 8 or 16 lanes; below, at and above a power of two; an odd remainder.
VOCABULARIES = (1, 2, 7, 8, 9, 15, 16, 17, 33, 2047, 2048, 2053)

every_divergence = pytest.mark.parametrize("divergence", list(CASES))
some_divergences = pytest.mark.parametrize("divergence", SOME)


def pair(name: str, rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Dense, Dense]:
    student, teacher = logits_pair(name, rows, vocab, dtype)
    return Dense(student), Dense(teacher)


@every_divergence
@pytest.mark.parametrize("kind", list(LOGITS))
def test_kinds_of_input(backend: str, divergence: str, kind: str) -> None:
    compare(*pair(kind, 7, 517), divergence, backend=backend, reduction="none")


@every_divergence
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("rows", [1, 7])
def test_sizes(backend: str, divergence: str, rows: int, vocab: int) -> None:
    compare(*pair("near_0.3", rows, vocab), divergence, backend=backend)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["near_0.1", "peaked", "masked"])
def test_dtypes(backend: str, divergence: str, dtype: torch.dtype, kind: str) -> None:
    compare(*pair(kind, 7, 517, dtype), divergence, backend=backend, reduction="sum")


@some_divergences
@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float64])
def test_teacher_of_another_dtype(backend: str, divergence: str, teacher_dtype: torch.dtype) -> None:
    student, teacher = logits_pair("near_0.3", 5, 100)
    compare(Dense(student), Dense(teacher.to(teacher_dtype)), divergence, backend=backend)


@every_divergence
@pytest.mark.parametrize("vocab", [1, 17])
def test_no_rows(backend: str, divergence: str, vocab: int) -> None:
    for reduction in ("mean", "sum"):
        outcome = run_library(*pair("near_0.3", 0, vocab), divergence, backend=backend, reduction=reduction)
        assert outcome.loss.item() == 0.0 and outcome.gradients["logits"].shape == (0, vocab)
    outcome = run_library(*pair("near_0.3", 0, vocab), divergence, backend=backend, reduction="none")
    assert outcome.loss.shape == (0,)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "row strided": lambda x: torch.full((2 * len(x), x.shape[1]), math.nan, dtype=x.dtype)[::2].copy_(x),
    "columns of a wider tensor": lambda x: torch.full((len(x), x.shape[1] + 5), math.nan, dtype=x.dtype)[:, 3:-2].copy_(
        x
    ),
    "every other column": lambda x: torch.full((len(x), 2 * x.shape[1]), math.nan, dtype=x.dtype)[:, ::2].copy_(x),
    "misaligned": lambda x: torch.full((x.numel() + 1,), math.nan, dtype=x.dtype)[1:].view(x.shape).copy_(x),
    "one row for all": lambda x: x[:1].expand(x.shape),
    "reshaped": lambda x: x.view(2, 3, -1),
    "permuted leading": lambda x: x.view(2, 3, -1).transpose(0, 1).contiguous().transpose(0, 1),
}
"""Whatever lies around a view is NaN, so that a read outside of it shows."""


@some_divergences
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend: str, divergence: str, layout: str, dtype: torch.dtype) -> None:
    student, teacher = (LAYOUTS[layout](x) for x in logits_pair("near_0.3", 6, 45, dtype))
    outcome = compare(Dense(student), Dense(teacher), divergence, backend=backend, reduction="none")
    assert outcome.loss.shape == student.shape[:-1]


@some_divergences
def test_one_row_without_leading_dimensions(backend: str, divergence: str) -> None:
    student, teacher = logits_pair("near_0.3", 1, 45)
    outcome = compare(Dense(student), Dense(teacher), divergence, backend=backend, reduction="none")
    flat = run_library(Dense(student[0]), Dense(teacher[0]), divergence, backend=backend, reduction="none")
    assert flat.loss.shape == () and flat.gradients["logits"].shape == (45,)
    assert torch.equal(flat.loss, outcome.loss[0]) and torch.equal(
        flat.gradients["logits"], outcome.gradients["logits"][0]
    )


@some_divergences
def test_linear_teacher_of_dense_student(backend: str, divergence: str) -> None:
    heads = linear_pair(6, 45, 8, 12)
    student = Dense(heads.student_hidden @ heads.student_weight.T)
    compare(student, Linear(heads.teacher_hidden, heads.teacher_weight), divergence, backend=backend)


def test_padded_head_against_cut_logits(backend: str) -> None:
    """valid_vocab makes the padded teacher's vocabulary the student's."""
    heads = linear_pair(6, 48, 8, 12)
    student = Dense((heads.student_hidden @ heads.student_weight.T)[:, :45])
    teacher = Linear(heads.teacher_hidden, heads.teacher_weight, valid_vocab=45)
    compare(student, teacher, "jsd(beta=0.5)", backend=backend)


# -------------------------------------------------------------------------------------- where only one of them has mass

UNBOUNDED_WITHOUT_STUDENT = {"forward_kl", "jeffreys"}  # p > 0 and q = 0
UNBOUNDED_WITHOUT_TEACHER = {"reverse_kl", "jeffreys"}  # q > 0 and p = 0


@every_divergence
@pytest.mark.parametrize("missing", ["student", "teacher"])
def test_mass_that_one_model_lacks(backend: str, divergence: str, missing: str) -> None:
    """Infinite where the formula is, and elsewhere the oracle's value and gradient: never NaN."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 40, generator=generator) for _ in range(2))
    (student if missing == "student" else teacher)[:, 3::7] = -math.inf
    name, params = CASES[divergence]
    infinite = name in (UNBOUNDED_WITHOUT_STUDENT if missing == "student" else UNBOUNDED_WITHOUT_TEACHER)
    exponent_of_q = {"alpha": 1 - params.get("alpha", 0), "alpha_beta": params.get("beta", 0)}.get(name, 1)
    exponent_of_p = {"alpha": params.get("alpha", 0), "alpha_beta": params.get("alpha", 0)}.get(name, 1)
    infinite |= (exponent_of_q if missing == "student" else exponent_of_p) < 0
    if infinite:
        loss = kd_loss(student, teacher, divergence, reduction="none", backend=backend).loss
        assert (loss == math.inf).all()
    else:
        compare(Dense(student), Dense(teacher), divergence, backend=backend, reduction="none")
