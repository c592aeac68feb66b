"""One text, three renderings: the C++ header is the one that the generator prints, and Triton's says what torch's
says."""

from __future__ import annotations

import ast

import pytest
import torch

from kd_kernels import divergences, generate_terms, launches

triton = pytest.importorskip("triton", reason="triton is not installed")

CASES = {formula: divergences.parse(text) for formula, text in launches.FORMULA_CASES.items()}


def test_every_formula_has_a_case():
    assert sorted(CASES) == sorted(formula.__name__.lstrip("_") for formula in divergences.FORMULAS)


def test_header_is_what_the_generator_prints():
    assert generate_terms.HEADER.read_text() == generate_terms.render(), "run python -m kd_kernels.generate_terms"


def test_generator_refuses_what_is_outside_the_vocabulary():
    with pytest.raises(SyntaxError, match="outside the vocabulary: logp \\*\\* 2"):
        generate_terms._expression(ast.parse("logp ** 2", mode="eval").body)


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 200, generator=generator) * 4
    z[0, 3] = z[1, 5] = -torch.inf  # one column that each model alone masks, and one that both do
    z[:, 7] = -torch.inf
    return z.log_softmax(1).unbind(0)


def _triton_terms(name: str, logp: torch.Tensor, logq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from tests.triton_terms_kernel import terms_kernel

    f, g = torch.full_like(logp, torch.nan), torch.full_like(logp, torch.nan)
    terms, values, n = divergences.triton_terms(name), CASES[name].values, logp.numel()
    params = (*values, 0.0, 0.0)[:2]
    terms_kernel[(-(-n // 128),)](logp, logq, f, g, n, *params, TERMS=terms, PARAMS=len(values), BLOCK=128)
    return f, g


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy on the masked columns
@pytest.mark.parametrize("name", CASES)
def test_triton_agrees_with_torch_in_float64(name):
    divergence = CASES[name]
    logp, logq = _inputs()
    f, g = _triton_terms(name, logp, logq)
    expected_f, expected_g = divergences.torch_terms(divergence)(logp.double(), logq.double())
    torch.testing.assert_close(f.double(), expected_f, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(g.double(), expected_g, rtol=2e-5, atol=1e-7)


def _applied(function, x: torch.Tensor) -> torch.Tensor:
    from tests.triton_terms_kernel import vocabulary_kernel

    y = torch.full_like(x, torch.nan)
    vocabulary_kernel[(-(-x.numel() // 1024),)](x, y, x.numel(), FUNCTION=function, BLOCK=1024)
    return y.double()


@pytest.mark.interpret
def test_logarithms_are_good_to_the_last_digit():
    from kd_kernels import triton_formulas

    below_one = 1 - torch.logspace(-7, -0.1, 4000)
    x = torch.cat([torch.logspace(-37, 38, 4000), below_one, 1 / below_one, torch.tensor([1.0])]).float()
    truth = x.double().log()
    unit = torch.frexp(truth.float()).exponent.double().exp2() * 2.0**-24
    assert ((_applied(triton_formulas.log, x) - truth).abs() <= 1.3 * unit).all()
    assert _applied(triton_formulas.log, torch.ones(1)).item() == 0


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy beyond the end of fp32
def test_exponentials_hold_what_they_promise():
    from kd_kernels import triton_formulas

    x = torch.linspace(-87, 88.6, 8001)
    truth = x.double().exp()
    assert ((_applied(triton_formulas.exp, x) / truth - 1).abs() <= 2 * 2.0**-23).all()
    fallen = x[x <= 0]
    assert ((_applied(triton_formulas.exp_fall, fallen) - fallen.double().exp()).abs() <= 2.0**-23).all()
    ends = torch.tensor([-torch.inf, -200.0, 0.0, 89.0, torch.inf])
    assert _applied(triton_formulas.exp, ends).tolist() == [0.0, 0.0, 1.0, torch.inf, torch.inf]
    assert _applied(triton_formulas.exp_fall, ends[:3]).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("rendering", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl", "skew_reverse_kl_detached"])
def test_mixtures_are_exact_where_the_models_agree(name, rendering):
    """With the rounding of a number near 0. The logarithm of the mixture itself, of the size of log p, has ten times as
    much, and the divergence is smaller than that."""
    generator = torch.Generator().manual_seed(1)
    logp = -1 - 29 * torch.rand(5000, generator=generator)
    gap = 10 ** (-1 - 3 * torch.rand(5000, generator=generator)) * torch.randn(5000, generator=generator).sign()
    logq = logp + gap
    divergence, size = CASES[name], torch.maximum(logp, logq).double().exp()
    expected, _ = divergences.torch_terms(divergence)(logp.double(), logq.double())
    if rendering == "torch":
        f, _ = divergences.torch_terms(divergence)(logp, logq)
    else:
        f, _ = _triton_terms(name, logp, logq)
    assert ((f.double() - expected).abs() <= 1.5e-7 * size + 1e-5 * expected.abs()).all()
