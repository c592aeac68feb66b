"""kd_loss on heads that are never multiplied out: loss, dH, dW and db, in every dtype, shape and chunking."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from judge import CASES, SOME, Dense, Linear, Teacher, compare, every_product, run_library, smallest_budget
from kd_kernels.testing import linear_pair

every_divergence = pytest.mark.parametrize("divergence", list(CASES))
some_divergences = pytest.mark.parametrize("divergence", SOME)


def heads(
    rows: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    student: dict | None = None,
    teacher: dict | None = None,
    **kind,
) -> tuple[Linear, Linear]:
    pair = linear_pair(rows, vocab, 24, 40, dtype, **kind)
    return (
        Linear(pair.student_hidden, pair.student_weight, **(student or {})),
        Linear(pair.teacher_hidden, pair.teacher_weight, **(teacher or {})),
    )


@every_divergence
@pytest.mark.parametrize("rows, vocab", [(1, 1), (7, 17), (7, 2053)])
def test_every_divergence(backend: str, divergence: str, rows: int, vocab: int) -> None:
    compare(*heads(rows, vocab), divergence, backend=backend)


@some_divergences
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("total_variation", [0.3, 0.03])
def test_dtypes(backend: str, divergence: str, dtype: torch.dtype, total_variation: float, bf16_products: bool) -> None:
    compare(*heads(33, 1031, dtype, total_variation=total_variation), divergence, backend=backend)


@some_divergences
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_head_of_another_dtype_than_its_input(
    backend: str, divergence: str, hidden_dtype: torch.dtype, bf16_products: bool
) -> None:
    """fp32 master weights under bf16 hidden states, and the other way round."""
    student, teacher = heads(7, 130, torch.bfloat16)
    weight_dtype = torch.bfloat16 if hidden_dtype == torch.float32 else torch.float32
    student = dataclasses.replace(
        student, hidden=student.hidden.to(hidden_dtype), weight=student.weight.to(weight_dtype)
    )
    outcome = compare(student, teacher, divergence, backend=backend)
    assert outcome.gradients["hidden"].dtype == hidden_dtype and outcome.gradients["weight"].dtype == weight_dtype


HEADS = {
    "bias": dict(bias=True),
    "scale": dict(scale=0.25),
    "softcap": dict(softcap=5.0),
    "padded": dict(valid_vocab=121),
    "all": dict(bias=True, scale=1.5, softcap=5.0, valid_vocab=121),
}


def dressed(head: Linear, options: dict, dtype: torch.dtype) -> Linear:
    """The head with those options; padding columns hold large rubbish that must not be seen."""
    options = dict(options)
    weight = head.weight.clone()
    if "valid_vocab" in options:
        weight[options["valid_vocab"] :] = 1e4
    if options.pop("bias", False):
        options["bias"] = torch.randn(len(weight), generator=torch.Generator().manual_seed(1)).to(dtype)
    return dataclasses.replace(head, weight=weight, **options)


@some_divergences
@pytest.mark.parametrize("options", list(HEADS))
@every_product
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_heads(
    backend: str, divergence: str, options: str, dtype: torch.dtype, bf16_products: bool, reduction: str
) -> None:
    student, teacher = heads(7, 130, dtype, logit_std=4.0)
    student = dressed(student, HEADS[options], dtype)
    cut = {"valid_vocab": 121} if "valid_vocab" in HEADS[options] else {}
    outcome = compare(student, dressed(teacher, cut, dtype), divergence, backend=backend, reduction=reduction)
    assert not outcome.gradients["weight"][student.valid_vocab or 130 :].any()  # padding gets exactly no gradient


@pytest.mark.parametrize("options", list(HEADS))
def test_heads_of_teachers(backend: str, options: str) -> None:
    student, teacher = heads(7, 130)
    cut = {"valid_vocab": 121} if "valid_vocab" in HEADS[options] else {}
    teacher = dressed(teacher, HEADS[options], torch.float32)
    compare(dressed(student, cut, torch.float32), teacher, "jsd(beta=0.5)", backend=backend)


def test_unequal_padding_on_both_sides(backend: str) -> None:
    """V=130 and V=150, 121 of them real: what two checkpoints with different padding look like."""
    student, _ = heads(7, 130, student=dict(valid_vocab=121))
    _, teacher = heads(7, 150, teacher=dict(valid_vocab=121))
    compare(student, teacher, "reverse_kl", backend=backend)


@some_divergences
def test_dense_teacher_of_linear_student(backend: str, divergence: str) -> None:
    student, teacher = heads(7, 130)
    logits = Dense(teacher.hidden @ teacher.weight.T)
    compare(student, logits, divergence, backend=backend)


@some_divergences
@pytest.mark.parametrize("times", [1, 2, 3.5, 100])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_product
def test_every_chunking_is_right(
    backend: str, divergence: str, times: float, reduction: str, dtype: torch.dtype, bf16_products: bool
) -> None:
    """From the budget that one row takes, exactly, to one that holds everything."""
    student, teacher = heads(7, 130, dtype)
    one = smallest_budget(student.noun(student.leaves), teacher.noun(teacher.leaves), divergence, backend=backend)
    labels = torch.arange(7) * 11
    compare(
        student,
        teacher,
        divergence,
        backend=backend,
        reduction=reduction,
        labels=labels,
        ce_weight=0.5,
        library_only=dict(max_scratch_bytes=int(one * times)),
    )


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "row strided": lambda x: torch.full((2 * len(x), x.shape[1]), torch.nan, dtype=x.dtype)[::2].copy_(x),
    "columns of a wider tensor": lambda x: torch.full((len(x), x.shape[1] + 5), torch.nan, dtype=x.dtype)[
        :, 3:-2
    ].copy_(x),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@every_product
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layouts(backend: str, layout: str, dtype: torch.dtype, bf16_products: bool, reduction: str) -> None:
    view = LAYOUTS[layout]
    student, teacher = (Linear(view(h.hidden), view(h.weight)) for h in heads(6, 45, dtype))
    compare(student, teacher, "forward_kl", backend=backend, reduction=reduction)


def test_leading_dimensions(backend: str) -> None:
    student, teacher = heads(6, 45)
    shaped = [dataclasses.replace(h, hidden=h.hidden.view(2, 3, -1)) for h in (student, teacher)]
    outcome = compare(*shaped, "forward_kl", backend=backend, reduction="none")
    assert outcome.loss.shape == (2, 3) and outcome.gradients["hidden"].shape == student.hidden.view(2, 3, -1).shape


def teacher_kinds() -> dict[str, Teacher]:
    _, teacher = heads(7, 130)
    return {"linear": teacher, "dense": Dense(teacher.hidden @ teacher.weight.T)}


@pytest.mark.parametrize("kind", ["linear", "dense"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(backend: str, kind: str, reduction: str) -> None:
    student, _ = heads(7, 130)
    student = dataclasses.replace(student, hidden=student.hidden[:0], bias=torch.zeros(130))
    teacher = teacher_kinds()[kind]
    teacher = (
        Dense(teacher.logits[:0])
        if isinstance(teacher, Dense)
        else dataclasses.replace(teacher, hidden=teacher.hidden[:0])
    )
    outcome = run_library(student, teacher, "forward_kl", backend=backend, reduction=reduction)
    assert outcome.loss.shape == ((0,) if reduction == "none" else ()) and not outcome.loss.any()
    for name, gradient in outcome.gradients.items():
        assert gradient.shape == student.leaves[name].shape and not gradient.any()
