"""The registry, the strings, and what every divergence must be: properties, limits, bounds."""

from __future__ import annotations

import inspect
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from judge import CASES, sparse_targets
from kd_kernels import divergences, generate_terms, kd_loss
from kd_kernels.testing import logits_pair

every_divergence = pytest.mark.parametrize("divergence", list(CASES))


def distance(student: torch.Tensor, teacher: torch.Tensor, divergence, backend: str) -> torch.Tensor:
    return kd_loss(student, teacher, divergence, reduction="none", backend=backend).loss


# ------------------------------------------------------------------------------------------------------------- registry


def test_every_divergence_has_an_oracle_and_a_case() -> None:
    for what, known in (
        ("oracle in tests/oracles.py", oracles.TERMS),
        ("case in tests/judge.py", dict(CASES.values())),
    ):
        missing = [name for name in divergences.REGISTRY if name not in known]
        assert not missing, f"no {what} for: {', '.join(missing)}"


def test_oracles_take_the_parameters_that_the_library_takes() -> None:
    for name, factory in divergences.REGISTRY.items():
        parameters = list(inspect.signature(oracles.TERMS[name]).parameters)
        assert parameters == ["logp", "logq", *inspect.signature(factory).parameters], name


@every_divergence
def test_string_form_round_trips(divergence: str) -> None:
    parsed = divergences.parse(divergence)
    name, params = CASES[divergence]
    assert parsed.name == name
    assert parsed == divergences.REGISTRY[name](**params)
    assert divergences.parse(str(parsed)) == parsed
    assert divergences.parse(parsed) is parsed
    assert pickle.loads(pickle.dumps(parsed)) == parsed and hash(parsed) == hash(divergences.parse(str(parsed)))


@every_divergence
def test_divergence_is_frozen(divergence: str) -> None:
    with pytest.raises(AttributeError):
        divergences.parse(divergence).name = "other"


def test_every_divergence_says_where_it_comes_from() -> None:
    for divergence in CASES:
        parsed = divergences.parse(divergence)
        assert parsed.paper and parsed.name in str(parsed)
        assert divergences.REGISTRY[parsed.name].__doc__


@pytest.mark.parametrize("text", ["jsd( beta = 0.5 )", "jsd(0.5)", " jsd(beta=.5) "])
def test_strings_are_read_as_python_calls(text: str) -> None:
    assert divergences.parse(text) == divergences.jsd(0.5)


def test_generated_header_is_up_to_date() -> None:
    assert generate_terms.HEADER.read_text() == generate_terms.render(), "run: python -m kd_kernels.generate_terms"


@every_divergence
def test_what_is_known_of_the_sum_of_g_is_so(divergence: str) -> None:
    """Kernels that know it spare a walk over the row."""
    parsed = divergences.parse(divergence)
    generator = torch.Generator().manual_seed(0)
    logp, logq = (3 * torch.randn(2, 50, 200, generator=generator, dtype=torch.float64)).log_softmax(2)
    _, g = divergences.torch_terms(parsed)(logp, logq)
    known = (parsed.total_g or 0.0) + parsed.reverse_share * (logq.exp() * (logq - logp)).sum(1)
    assert parsed.reverse_share == 0 or parsed.total_g is not None
    assert torch.allclose(g.sum(1), known, rtol=1e-9) == (parsed.total_g is not None)


# -------------------------------------------------------------------------------------------------------- refused input


@pytest.mark.parametrize(
    "text, match",
    [
        ("jsd(beta=0)", r"jsd: beta must be in \(0, 1\), got 0; .*forward_kl"),
        ("jsd(beta=1.0)", r"jsd: beta must be in \(0, 1\), got 1.0; .*reverse_kl"),
        ("jsd(beta=1e999)", r"jsd: beta must be in \(0, 1\), got inf"),
        ("skew_forward_kl(alpha=1)", r"skew_forward_kl: alpha must be .*, got 1"),
        ("skew_forward_kl(alpha=-0.1)", r"skew_forward_kl: alpha must be .*, got -0.1"),
        ("skew_reverse_kl(alpha=1)", r"skew_reverse_kl: alpha must be .*, got 1"),
        ("jeffreys(weight=1.5)", r"jeffreys: weight must be .*, got 1.5"),
        ("alpha(alpha=0)", r"alpha: alpha must be other than 0 and 1, got 0; .*reverse_kl"),
        ("alpha(alpha=1)", r"alpha: alpha must be other than 0 and 1, got 1; .*forward_kl"),
        ("alpha_beta(alpha=0, beta=1)", r"alpha_beta: alpha must be other than 0, got 0"),
        ("alpha_beta(alpha=1, beta=-1)", r"alpha_beta: beta must be other than 0 and -alpha, got -1"),
        ("alpha_beta(alpha=1, beta=0)", r"alpha_beta: beta must be other than 0 and -alpha, got 0"),
        ("kullback", r"divergence must be one of forward_kl, reverse_kl, .*squared_logprob.*, got 'kullback'"),
        ("kullback(beta=1)", r"divergence must be one of forward_kl, .*, got 'kullback\(beta=1\)'"),
        ("jsd(beta=", r"must be of the form name or name\(parameter=value\).*got 'jsd\(beta='"),
        ("jsd(beta=x)", r"must be of the form name or name\(parameter=value\).*got 'jsd\(beta=x\)'"),
        ("jsd(gamma=0.5)", r"must be a call of jsd with its parameters, got 'jsd\(gamma=0.5\)'; .*gamma"),
        ("alpha_beta(0.5)", r"must be a call of alpha_beta with its parameters, got 'alpha_beta\(0.5\)'; .*beta"),
        ("forward_kl(1)", r"must be a call of forward_kl with its parameters, got 'forward_kl\(1\)'"),
        ("jsd(**{'beta': 0.5})", r"must be of the form name or name\(parameter=value\)"),
        ("", r"must be of the form name or name\(parameter=value\)"),
    ],
)
def test_bad_strings_are_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        divergences.parse(text)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: divergences.parse(3), r"divergence must be a string or a Divergence, got int"),
        (lambda: divergences.parse("jsd(beta='a')"), r"jsd: beta must be a number, got str"),
        (lambda: divergences.jsd(True), r"jsd: beta must be a number, got bool"),
        (lambda: divergences.skew_reverse_kl(0.1, detach_mixture=1), r"detach_mixture must be a bool, got int"),
        (lambda: divergences.custom("mine", 3), r"custom: terms must be a function .*, got int"),
    ],
)
def test_wrong_types_are_refused(make, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        make()


@pytest.mark.parametrize("name", ["forward_kl", "two words", "", "jsd(0.5)"])
def test_custom_names_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match="custom: name must be an identifier that is no built-in divergence"):
        divergences.custom(name, lambda logp, logq: (logp, logq))


# ----------------------------------------------------------------------------------------------------------- properties


def random_rows(vocab: int, spread: float, correlation: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher logits [8, vocab] in float64."""
    generator = torch.Generator().manual_seed(seed)
    teacher, noise = (spread * torch.randn(8, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    return correlation * teacher + (1 - correlation) * noise, teacher


logit_rows = st.builds(
    random_rows,
    st.integers(2, 40),
    st.sampled_from([0.01, 1.0, 5.0]),
    st.sampled_from([0.0, 0.9]),
    st.integers(0, 2**16),
)


@every_divergence
@given(pair=logit_rows)
def test_never_negative_and_within_its_bound(backend: str, divergence: str, pair) -> None:
    value = distance(*pair, divergence, backend)
    name, params = CASES[divergence]
    bound = oracles.UPPER_BOUND.get(name, lambda **_: math.inf)(**params)
    assert (-1e-12 <= value).all() and (value <= bound * (1 + 1e-12)).all()
    declared = divergences.parse(divergence).bound
    assert declared is None if bound == math.inf else declared == pytest.approx(bound, rel=1e-14)


@every_divergence
@given(pair=logit_rows)
def test_zero_exactly_where_the_distributions_agree(backend: str, divergence: str, pair) -> None:
    student, teacher = pair
    assert (distance(student, student.clone(), divergence, backend).abs() < 1e-12).all()
    apart = 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
    assert (distance(student, teacher, divergence, backend)[apart > 1e-3] > 1e-9).all()


@every_divergence
@given(pair=logit_rows, shift=st.floats(-100, 100), seed=st.integers(0, 2**16))
def test_shifts_and_permutations_change_nothing(backend: str, divergence: str, pair, shift: float, seed: int) -> None:
    student, teacher = pair
    order = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(seed))
    moved = distance(student[:, order] + shift, teacher[:, order] - shift, divergence, backend)
    torch.testing.assert_close(moved, distance(student, teacher, divergence, backend), rtol=1e-9, atol=1e-12)


@every_divergence
def test_symmetry_is_as_declared(backend: str, divergence: str) -> None:
    name, params = CASES[divergence]
    symmetric = name in oracles.SYMMETRIC or any((name, value) in oracles.SYMMETRIC for value in params.values())
    assert divergences.parse(divergence).symmetric == symmetric
    a, b = logits_pair("near_0.3", 4, 50, torch.float64)
    forth, back = distance(a, b, divergence, backend), distance(b, a, divergence, backend)
    assert torch.allclose(forth, back, rtol=1e-10, atol=0) == symmetric


@every_divergence
def test_bound_is_attained_by_disjoint_distributions(backend: str, divergence: str) -> None:
    bound = divergences.parse(divergence).bound
    if bound is None:
        return
    disjoint = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]], dtype=torch.float64)
    assert distance(disjoint, disjoint.flip(1), divergence, backend).item() == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize(
    "divergence, factor, limit",
    [
        ("jsd(beta=1e-7)", 1e-7, "forward_kl"),
        ("jsd(beta=0.9999999)", 1e-7, "reverse_kl"),
        ("alpha(alpha=0.9999999)", 1.0, "forward_kl"),
        ("alpha(alpha=1e-7)", 1.0, "reverse_kl"),
        ("skew_forward_kl(alpha=1e-8)", 1.0, "forward_kl"),
        ("skew_reverse_kl(alpha=1e-8)", 1.0, "reverse_kl"),
        ("jeffreys(weight=0.99999999)", 1.0, "forward_kl"),
        ("jeffreys(weight=1e-8)", 1.0, "reverse_kl"),
        ("alpha_beta(alpha=0.5, beta=0.5)", 1.0, "alpha(alpha=0.5)"),
    ],
)
def test_limits(backend: str, divergence: str, factor: float, limit: str) -> None:
    student, teacher = logits_pair("near_0.3", 4, 50, torch.float64)
    got = distance(student, teacher, divergence, backend) / factor
    torch.testing.assert_close(got, distance(student, teacher, limit, backend), rtol=1e-5, atol=0)


@pytest.mark.parametrize("divergence", [d for d in CASES if CASES[d][0] not in ("squared_logprob", "alpha_beta")])
@given(pair=logit_rows, kept=st.integers(0, 39), seed=st.integers(0, 2**16))
def test_bucket_is_a_lower_bound(backend: str, divergence: str, pair, kept: int, seed: int) -> None:
    """Coarsening cannot tell distributions further apart; true of the f-divergences, which all but two here are."""
    student, teacher = pair
    ids = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(seed))[:kept]
    targets = sparse_targets(oracles.truncate(teacher, [ids] * len(teacher)), torch.float64)
    bucket = kd_loss(student, targets, divergence, reduction="none", tail="bucket", backend=backend).loss
    assert (bucket <= distance(student, teacher, divergence, backend) * (1 + 1e-9) + 1e-12).all()


@every_divergence
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
def test_sparse_with_every_id_is_dense(backend: str, divergence: str, tail: str) -> None:
    student, teacher = logits_pair("near_0.3", 3, 40, torch.float64)
    ids = [torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    targets = sparse_targets(oracles.truncate(teacher, ids), torch.float64)
    sparse = kd_loss(student, targets, divergence, reduction="none", tail=tail, backend=backend).loss
    torch.testing.assert_close(sparse, distance(student, teacher, divergence, backend), rtol=1e-10, atol=1e-13)


# --------------------------------------------------------------------------------------------------------------- custom


def smoothed_reverse_kl(logp: torch.Tensor, logq: torch.Tensor, floor: float):
    """KL(q || p + floor): finite wherever the teacher has no mass."""
    q = logq.exp()
    f = torch.where(q > 0, q * (logq - (logp.exp() + floor).log()), 0.0)
    return f, f + q


@pytest.mark.parametrize("as_string", [False, True])
def test_custom_divergence(as_string: bool) -> None:
    mine = divergences.custom("smoothed_reverse_kl", smoothed_reverse_kl, floor=1e-3)
    student, teacher = logits_pair("near_0.3", 5, 33, torch.float64)
    leaf = student.clone().requires_grad_()
    result = kd_loss(leaf, teacher, "smoothed_reverse_kl" if as_string else mine, reduction="sum")
    result.loss.backward()
    truth = student.clone().requires_grad_()
    q = truth.softmax(-1)
    want = (q * (q.log() - (teacher.softmax(-1) + 1e-3).log())).sum()
    want.backward()
    torch.testing.assert_close(result.loss.detach(), want.detach())
    torch.testing.assert_close(leaf.grad, truth.grad)


def test_custom_divergence_on_compiled_backend_is_refused() -> None:
    mine = divergences.custom("smoothed_reverse_kl", smoothed_reverse_kl, floor=1e-3)
    student, teacher = logits_pair("near_0.3", 2, 9)
    with pytest.raises(
        RuntimeError, match=r'^kd_loss: divergence must be built in for backend="cpp", got smoothed_reverse_kl'
    ):
        kd_loss(student, teacher, mine, backend="cpp")


def test_custom_divergence_for_truncated_teachers() -> None:
    """Given the formula of a built-in, it is the built-in, tail included."""

    def terms(logp, logq):
        p = logp.exp()
        return torch.where(p > 0, p * (logp - logq), 0.0), -p

    mine = divergences.custom("my_forward_kl", terms)
    student, teacher = logits_pair("near_0.3", 3, 20, torch.float64)
    targets = sparse_targets(oracles.topk(teacher, 4), torch.float64)
    for tail in ("bucket", "renormalize", "drop"):
        ours = kd_loss(student, targets, mine, tail=tail).loss
        torch.testing.assert_close(ours, kd_loss(student, targets, "forward_kl", tail=tail, backend="reference").loss)
