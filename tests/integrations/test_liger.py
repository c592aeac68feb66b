"""liger-kernel's losses by their names: against float64, and against liger-kernel where it is installed."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import liger_interpreted
from kd_trainer.integrations import liger
from loss_cases import IGNORED, ROWS, VOCAB, Case, case, check, divergence_rows
from processes import launch
from real_cases import CASES, SMOLLM2, real_case
from transformers_fixtures import STORIES260K

BETAS = (0.0, 0.3, 0.5, 1.0)


def counted_mean(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return rows[labels != IGNORED].mean()


@pytest.mark.parametrize("temperature", (1.0, 2.5))
@pytest.mark.parametrize("beta", BETAS)
def test_fused_linear_jsd(beta: float, temperature: float) -> None:
    of = case()
    ours = liger.LigerFusedLinearJSD(beta, temperature=temperature)

    def truth(hidden, weight, bias):
        rows = divergence_rows(hidden @ weight.T / temperature, of.teacher_logits(hidden.dtype) / temperature, beta)
        return counted_mean(rows, of.labels)

    check(
        lambda hidden, weight, bias: ours(hidden, weight, of.teacher_hidden, of.teacher_weight, of.labels),
        truth, of, "LigerFusedLinearJSD",
    )


def test_without_labels_every_row_counts() -> None:
    of = case()
    ours = liger.LigerFusedLinearJSD(0.5)
    check(
        lambda hidden, weight, bias: ours(hidden, weight, of.teacher_hidden, of.teacher_weight, None),
        lambda hidden, weight, bias: divergence_rows(hidden @ weight.T, of.teacher_logits(hidden.dtype), 0.5).mean(),
        of, "LigerFusedLinearJSD without labels",
    )


def chunked_truth(of: Case, beta: float, hard: float, soft: float, temperature: float):
    def truth(hidden, weight, bias):
        logits = hidden @ weight.T + bias
        teacher = of.teacher_logits(hidden.dtype, bias=True)
        rows = divergence_rows(logits / temperature, teacher / temperature, beta)
        ce = torch.nn.functional.cross_entropy(logits, of.labels, ignore_index=IGNORED)
        return hard * ce + soft * counted_mean(rows, of.labels)

    return truth


@pytest.mark.parametrize("beta", BETAS)
def test_chunked_jsd_with_cross_entropy_and_bias(beta: float) -> None:
    of = case()
    ours = liger.LigerFusedLinearJSDLoss(0.3, 0.7, beta, temperature=2.0, return_soft_hard_loss=True)

    def call(hidden, weight, bias):
        return ours(hidden, weight, of.teacher_hidden, of.teacher_weight, of.labels, bias, of.teacher_bias)

    check(lambda *leaves: call(*leaves)[0], chunked_truth(of, beta, 0.3, 0.7, 2.0), of, "LigerFusedLinearJSDLoss")
    loss, soft, hard = call(*of.leaves())
    torch.testing.assert_close(loss, 0.3 * hard + 0.7 * soft)
    assert not soft.requires_grad and not hard.requires_grad


@pytest.mark.parametrize("reduction", ("batchmean", "mean", "sum"))
def test_fused_linear_kl_div_takes_probabilities(reduction: str) -> None:
    of = case()
    probabilities = of.teacher_logits(torch.float64).softmax(-1).float()
    ours = liger.LigerFusedLinearKLDivLoss(reduction, temperature=2.0)
    count = int((of.labels != IGNORED).sum())
    divisor = {"batchmean": count, "mean": count * VOCAB, "sum": 1}[reduction]

    def truth(hidden, weight, bias):
        rows = divergence_rows(hidden @ weight.T / 2.0, probabilities.to(hidden.dtype).log(), 0.0)
        return rows[of.labels != IGNORED].sum() / divisor

    check(
        lambda hidden, weight, bias: ours(hidden, weight, probabilities, of.labels), truth, of,
        "LigerFusedLinearKLDivLoss",
    )


@pytest.mark.parametrize("log_target", (False, True))
@pytest.mark.parametrize("reduction", ("batchmean", "mean", "sum"))
def test_kl_div(reduction: str, log_target: bool) -> None:
    of = case()
    teacher = of.teacher_logits(torch.float64).log_softmax(-1)
    target = (teacher if log_target else teacher.exp()).float()
    ours = liger.LigerKLDIVLoss(reduction=reduction, log_target=log_target)

    def truth(hidden, weight, bias):
        logq = (hidden @ weight.T).log_softmax(-1)
        return torch.nn.functional.kl_div(logq, teacher.to(hidden.dtype), reduction=reduction, log_target=True)

    check(lambda hidden, weight, bias: ours((hidden @ weight.T).log_softmax(-1), target), truth, of, "LigerKLDIVLoss")


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_of_logprobs(beta: float) -> None:
    of = case()
    ours = liger.LigerJSD(beta)
    check(
        lambda hidden, weight, bias: ours(
            (hidden @ weight.T).log_softmax(-1), of.teacher_logits(torch.float32).log_softmax(-1), of.labels
        ),
        lambda hidden, weight, bias: counted_mean(
            divergence_rows(hidden @ weight.T, of.teacher_logits(hidden.dtype), beta), of.labels
        ),
        of, "LigerJSD",
    )


@pytest.mark.parametrize("reduction", ("batchmean", "mean", "sum", "none"))
def test_total_variation_of_probabilities(reduction: str) -> None:
    of = case()
    ours = liger.LigerTVDLoss(reduction)
    count = int((of.labels != IGNORED).sum())
    divisor = {"batchmean": count, "mean": count * VOCAB, "sum": 1, "none": 1}[reduction]

    def truth(hidden, weight, bias):
        entries = 0.5 * ((hidden @ weight.T).softmax(-1) - of.teacher_logits(hidden.dtype).softmax(-1)).abs()
        return entries[of.labels != IGNORED].sum() / divisor

    def call(hidden, weight, bias):
        loss = ours((hidden @ weight.T).softmax(-1), of.teacher_logits(torch.float32).softmax(-1), of.labels)
        assert loss.shape == ((ROWS, VOCAB) if reduction == "none" else ())
        return loss.sum()

    check(call, truth, of, "LigerTVDLoss")


def test_probability_that_underflowed_keeps_the_gradient_finite() -> None:
    probabilities = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    liger.LigerTVDLoss()(probabilities, torch.tensor([[0.5, 0.5, 0.0]])).backward()
    assert probabilities.grad.isfinite().all()


def test_no_row_that_counts_gives_zero_and_zero_gradient() -> None:
    of = case()
    hidden, weight, _ = of.leaves()
    labels = torch.full_like(of.labels, IGNORED)
    loss = liger.LigerFusedLinearJSD()(hidden, weight, of.teacher_hidden, of.teacher_weight, labels)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_vocabularies_of_two_sizes_need_valid_vocab() -> None:
    of = case()
    hidden, weight, _ = of.leaves()
    padded = torch.cat([of.teacher_weight, of.teacher_weight[:3]])
    with pytest.raises(ValueError, match="student and teacher must be of one vocabulary size"):
        liger.LigerFusedLinearJSDLoss()(hidden, weight, of.teacher_hidden, padded, of.labels)
    known = liger.LigerFusedLinearJSDLoss(valid_vocab=VOCAB)
    loss = known(hidden, weight, of.teacher_hidden, padded, of.labels)
    plain = liger.LigerFusedLinearJSDLoss()(hidden, weight, of.teacher_hidden, of.teacher_weight, of.labels)
    torch.testing.assert_close(loss, plain)


@pytest.mark.parametrize(
    "make, message",
    (
        (
            lambda: liger.LigerFusedLinearJSD(jsd_beta=1.5),
            "LigerFusedLinearJSD: jsd_beta must be a number in 0..1, got 1.5",
        ),
        (lambda: liger.LigerJSD(beta=-0.1), "LigerJSD: beta must be a number in 0..1"),
        (lambda: liger.LigerFusedLinearKLDivLoss("none"), "reduction must be one of batchmean, mean, sum"),
    ),
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ----------------------------------------------------------------------------------------------- against liger-kernel


def originals() -> dict[str, type]:
    transformers = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss
    from liger_kernel.transformers.tvd import LigerTVDLoss

    return {
        "LigerFusedLinearJSD": transformers.LigerFusedLinearJSD, "LigerFusedLinearJSDLoss": LigerFusedLinearJSDLoss,
        "LigerFusedLinearKLDivLoss": LigerFusedLinearKLDivLoss, "LigerJSD": transformers.LigerJSD,
        "LigerKLDIVLoss": transformers.LigerKLDIVLoss, "LigerTVDLoss": LigerTVDLoss,
    }


@pytest.mark.parametrize("name", liger.__all__)
@pytest.mark.parametrize("method", ("__init__", "forward"))
def test_signature_is_ligers(name: str, method: str) -> None:
    theirs, ours = (
        inspect.signature(getattr(cls, method)).parameters for cls in (originals()[name], getattr(liger, name))
    )
    own = [p.name for p in ours.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert own == list(theirs)
    for parameter in theirs.values():
        if parameter.default is not inspect.Parameter.empty:
            assert ours[parameter.name].default == parameter.default, parameter


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("at", (*CASES, SMOLLM2))
def test_same_numbers_as_ligers_chunked_jsd(at, beta: float) -> None:
    """The only one of Liger's that is no Triton kernel: loss and gradients, each as near to float64 as the other."""
    of = at()
    theirs = originals()["LigerFusedLinearJSDLoss"](0.3, 0.7, beta, temperature=2.0, compiled=False)
    ours = liger.LigerFusedLinearJSDLoss(0.3, 0.7, beta, temperature=2.0)
    results = []
    for loss_function in (theirs, ours):
        hidden, weight, bias = of.leaves()
        loss = loss_function(hidden, weight, of.teacher_hidden, of.teacher_weight, of.labels, bias, of.teacher_bias)
        (loss / 4).backward()
        results.append((loss.detach(), hidden.grad, weight.grad, bias.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


INTERPRETED = {"random": case, "stories260k": lambda: real_case(STORIES260K)}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Liger's Triton kernels, in the interpreter."""
    originals()
    here = Path(__file__).resolve().parent
    folder = tmp_path_factory.mktemp("liger")
    cases, file = folder / "cases.pt", folder / "results.pt"
    torch.save({name: make() for name, make in INTERPRETED.items()}, cases)
    launch(
        [str(here / "liger_interpreted.py"), str(cases), str(file)], processes=1, folders=[str(here), str(here.parent)],
        timeout=300,
    )
    return torch.load(file)


@pytest.mark.parametrize("name", liger_interpreted.losses(liger))
@pytest.mark.parametrize("key", INTERPRETED)
def test_same_numbers_as_ligers_kernels(interpreted, key: str, name: str) -> None:
    ours = liger_interpreted.taken(liger_interpreted.losses(liger)[name], INTERPRETED[key]())
    torch.testing.assert_close(interpreted[key, name], ours, rtol=1e-4, atol=1e-6)


# What the module's text says that Liger does and we do not. Were Liger to mend one, the text must follow.


def test_what_ligers_kernels_do_with_masked_columns_and_without_rows(interpreted) -> None:
    assert interpreted["jsd_of_a_masked_column"].isnan() and liger_interpreted.jsd_of_a_masked_column(liger) == 0
    assert "division by zero" in interpreted["total_variation_of_no_row"]
    assert liger_interpreted.total_variation_of_no_row(liger) == 0


def test_ligers_chunked_jsd_gives_padding_probability() -> None:
    of = case()
    theirs, ours = originals()[
        "LigerFusedLinearJSDLoss"
    ](compiled=False), liger.LigerFusedLinearJSDLoss(valid_vocab=VOCAB)
    heads = (of.student_hidden.float(), of.student_weight.float(), of.teacher_hidden.float(), of.teacher_weight.float())
    padded = torch.cat([heads[3], torch.zeros(61, heads[3].shape[1])])
    bias = torch.cat([torch.zeros(VOCAB), torch.full((61,), -1e4)])  # the teacher gives its padding nothing
    exact = liger.LigerFusedLinearJSDLoss()(*heads, of.labels)
    torch.testing.assert_close(ours(*heads[:3], padded, of.labels, None, bias), exact)
    assert theirs(*heads[:3], padded, of.labels, None, bias) > exact + 1e-3  # the student's has: its logits there are 0
