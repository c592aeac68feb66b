"""torchtune's losses by their names: against float64, and against torchtune where it can be imported."""

from __future__ import annotations

import inspect

import pytest
import torch

from kd_kernels import LinearLogits
from kd_trainer.integrations import torchtune as ours
from loss_cases import IGNORED, ROWS, case, check
from real_cases import CASES

PLAIN = ("ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss")
CHUNKED = ("ForwardKLWithChunkedOutputLoss", "ReverseKLWithChunkedOutputLoss", "SymmetricKLWithChunkedOutputLoss")
RATIOS = {"Forward": 1.0, "Reverse": 0.0, "Symmetric": 0.3}


def make(module, name: str):
    return getattr(module, name)(**({"sym_kd_ratio": 0.3} if name.startswith("Symmetric") else {}))


def truth_of(name: str, of, divisor: float):
    ratio = next(value for prefix, value in RATIOS.items() if name.startswith(prefix))

    def truth(hidden, weight, bias):
        logq = (hidden @ weight.T).log_softmax(-1)
        logp = of.teacher_logits(hidden.dtype).log_softmax(-1)
        rows = -ratio * (logp.exp() * logq).sum(-1) + (1 - ratio) * (logq.exp() * (logq - logp)).sum(-1)
        return rows[of.labels != IGNORED].sum() / divisor

    return truth


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("name", PLAIN)
def test_plain(name: str, normalize: bool) -> None:
    of = case()
    loss = make(ours, name)
    divisor = int((of.labels != IGNORED).sum()) if normalize else 1
    check(
        lambda hidden, weight, bias: loss(hidden @ weight.T, of.teacher_logits(torch.float32), of.labels, normalize),
        truth_of(name, of, divisor), of, name,
    )
    check(
        lambda hidden, weight, bias: loss(
            LinearLogits(hidden, weight), LinearLogits(of.teacher_hidden, of.teacher_weight), of.labels, normalize
        ),
        truth_of(name, of, divisor), of, f"{name} of heads",
    )


@pytest.mark.parametrize("name", CHUNKED)
def test_chunked(name: str) -> None:
    of, batch, chunks = case(), 2, 6
    loss = getattr(ours, name)(chunks, **({"sym_kd_ratio": 0.3} if name.startswith("Symmetric") else {}))
    split = lambda logits: logits.reshape(batch, ROWS // batch, -1).chunk(chunks, dim=1)  # noqa: E731
    teacher, labels = split(of.teacher_logits(torch.float32)), of.labels.reshape(batch, -1)
    check(
        lambda hidden, weight, bias: loss(split(hidden @ weight.T), teacher, labels),
        truth_of(name, of, int((of.labels != IGNORED).sum())), of, name,
    )
    of_head = lambda hidden, weight: [  # noqa: E731
        LinearLogits(chunk, weight) for chunk in hidden.reshape(batch, ROWS // batch, -1).chunk(chunks, dim=1)
    ]
    check(
        lambda hidden, weight, bias: loss(
            of_head(hidden, weight), of_head(of.teacher_hidden, of.teacher_weight), labels
        ),
        truth_of(name, of, int((of.labels != IGNORED).sum())), of, f"{name} of a head",
    )
    with pytest.raises(ValueError, match="student_logits and teacher_logits must be lists of 6 chunks like the labels"):
        loss(teacher[:-1], teacher, labels)


@pytest.mark.parametrize("name", PLAIN)
def test_no_row_that_counts(name: str) -> None:
    of = case()
    hidden, weight, _ = of.leaves()
    labels = torch.full_like(of.labels, IGNORED)
    value = make(ours, name)(hidden @ weight.T, of.teacher_logits(torch.float32), labels)
    value.backward()
    assert value == 0 and not hidden.grad.any()


def test_bad_arguments() -> None:
    of = case()
    hidden, weight, _ = of.leaves()
    with pytest.raises(ValueError, match="sym_kd_ratio must be in 0..1, got 1.5"):
        ours.SymmetricKLLoss(1.5)
    with pytest.raises(ValueError, match="teacher_logits must be without requires_grad"):
        ours.ForwardKLLoss()(hidden @ weight.T, hidden @ weight.T, of.labels)


# -------------------------------------------------------------------------------------------------- against torchtune


def original():
    return pytest.importorskip(
        "torchtune.modules.loss", reason="torchtune 0.6 needs torchao below 0.16", exc_type=ImportError
    )


@pytest.mark.parametrize("name", ours.__all__)
@pytest.mark.parametrize("method", ("__init__", "forward"))
def test_signature_is_torchtunes(name: str, method: str) -> None:
    theirs, own = (inspect.signature(getattr(getattr(m, name), method)).parameters for m in (original(), ours))
    assert [(p.name, p.default) for p in own.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("at", CASES)
def test_same_numbers_as_torchtune(at, name: str) -> None:
    of, results = at(), []
    for module in (original(), ours):
        hidden, weight, _ = of.leaves()
        loss = make(module, name)(hidden @ weight.T, of.teacher_logits(torch.float32), of.labels)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("at", CASES)
def test_same_numbers_as_torchtune_in_chunks(at, name: str) -> None:
    of, results = at(), []
    split = lambda logits: logits.reshape(2, ROWS // 2, -1).chunk(4, dim=1)  # noqa: E731
    for module in (original(), ours):
        hidden, weight, _ = of.leaves()
        loss = getattr(module, name)(4)(
            split(hidden @ weight.T), split(of.teacher_logits(torch.float32)), of.labels.reshape(2, -1)
        )
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


# What the module's text says that torchtune does and we do not. Were torchtune to mend one, the text must follow.


def test_torchtune_without_a_row_that_counts() -> None:
    labels, logits = torch.full((1, 4), IGNORED), torch.randn(1, 4, 5, requires_grad=True)
    for name in PLAIN:
        assert not make(original(), name)(logits[0], logits[0].detach(), labels[0]).requires_grad
    for name in CHUNKED:
        loss = getattr(original(), name)(2)(logits.chunk(2, 1), logits.detach().chunk(2, 1), labels)
        assert loss.isnan() != name.startswith("Forward")


def test_torchtune_lets_the_student_keep_mass_where_the_teacher_has_none() -> None:
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, -torch.inf]])
    theirs, mine = (module.ReverseKLLoss()(student, teacher, torch.tensor([0])) for module in (original(), ours))
    assert theirs.isfinite() and mine == torch.inf


def test_torchtune_leaves_surplus_chunks_out() -> None:
    logits = [torch.randn(1, 2, 5) for _ in range(3)]
    labels = torch.zeros(1, 4, dtype=torch.int64)
    assert original().ForwardKLWithChunkedOutputLoss(2)(logits, logits, labels).isfinite()
    with pytest.raises(ValueError, match="must be lists of 2 chunks like the labels, got 3 and 3"):
        ours.ForwardKLWithChunkedOutputLoss(2)(logits, logits, labels)
