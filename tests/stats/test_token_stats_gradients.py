"""token_stats as a citizen of torch: gradients of the log-probability and nothing else, opcheck, compile, autocast."""

from __future__ import annotations

import importlib
import itertools
import re

import pytest
import torch
from torch import Tensor

from judge import Dense, Linear, every_product
from kd_kernels import EnsembleLogits, LinearLogits, kd_loss, token_stats
from kd_kernels.stats import api
from kd_kernels.testing import FLOORS, linear_pair, logits_pair
from stats_judge import NUMBERS, PLACES, compare

IDS = torch.tensor([2, 0, 39, 39, 17, 8, 21])
UPSTREAM = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, 1e-3, 7.0])
MAPS = {
    "plain": {}, "bias": dict(bias=True), "padded": dict(valid_vocab=40),
    "map": dict(bias=True, scale=0.7, softcap=6.0),
}


def linear(dtype: torch.dtype = torch.float32, vocab: int = 40, bias: bool = False, **options) -> Linear:
    padded = vocab + 3 if "valid_vocab" in options else vocab
    pair = linear_pair(7, padded, 16, 16, dtype)
    return Linear(
        pair.student_hidden, pair.student_weight, torch.linspace(-1, 1, padded).to(dtype) if bias else None, **options
    )


def doubles() -> tuple[Tensor, ...]:
    pair = linear_pair(3, 8, 4, 4, torch.float64)
    leaves = (pair.student_hidden, pair.student_weight, torch.linspace(-1, 1, 8).double())
    return tuple(leaf.requires_grad_() for leaf in leaves)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradcheck(backend: str) -> None:
    ids = torch.tensor([0, 6, 3])

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        noun = LinearLogits(hidden, weight, bias, scale=1.3, softcap=4.0, valid_vocab=7)
        return token_stats(noun, ids, backend=backend).logprob

    assert torch.autograd.gradcheck(run, doubles())
    logits = (doubles()[0] @ doubles()[1].T).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_stats(z, ids, backend=backend).logprob, logits)


@pytest.mark.parametrize(
    "dtype, bf16_products", [*((dtype, False) for dtype in FLOORS), (torch.bfloat16, True)], indirect=["bf16_products"]
)
@pytest.mark.parametrize("options", MAPS)
def test_gradients_are_the_oracles(options: str, dtype: torch.dtype, bf16_products: bool, backend: str) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("not a dtype of this backend")
    compare(linear(dtype, **MAPS[options]), IDS, upstream=UPSTREAM, backend=backend)


@pytest.mark.parametrize("kind", ["uniform", "peaked", "one_hot", "shifted"])
@pytest.mark.parametrize("vocab", [1, 40, 2053])
def test_gradients_of_dense_logits(kind: str, vocab: int, backend: str) -> None:
    logits, _ = logits_pair(kind, 7, vocab)
    compare(Dense(logits), IDS.clamp_max(vocab - 1), upstream=UPSTREAM, backend=backend)


LEAVES = ("hidden", "weight", "bias")


@pytest.mark.parametrize("wanted", [c for n in range(4) for c in itertools.combinations(LEAVES, n)])
def test_every_subset_of_gradients(wanted: tuple[str, ...], backend: str) -> None:
    """Exactly those, and no other; a frozen head has no dW."""
    compare(linear(bias=True), IDS, upstream=UPSTREAM, requires=wanted, backend=backend)


def test_gradient_in_chunks(backend: str) -> None:
    """Forward and backward under a budget of two rows or so."""
    model = linear(vocab=300)
    compare(model, IDS, upstream=UPSTREAM, backend=backend, max_scratch_bytes=30_000)


@pytest.mark.parametrize("kind", ["logits", "head"])
def test_a_budget_that_the_backward_cannot_keep_is_refused_before_it(kind: str, backend: str) -> None:
    noun = {"logits": torch.randn(3, 500), "head": LinearLogits(torch.randn(3, 8), torch.randn(500, 8))}[kind]
    leaf = (noun if kind == "logits" else noun.hidden).requires_grad_()
    with pytest.raises(ValueError, match=r"^token_stats: max_scratch_bytes must be at least \d+ bytes") as caught:
        token_stats(noun, torch.arange(3), max_scratch_bytes=1, backend=backend)
    for _ in range(3):  # the least for the forward, then for the backward, where that is more
        enough = int(re.search(r"at least (\d+) bytes", str(caught.value))[1])
        try:
            stats = token_stats(noun, torch.arange(3), max_scratch_bytes=enough, backend=backend)
            break
        except ValueError as error:
            caught = pytest.ExceptionInfo.from_exception(error)
    stats.logprob.sum().backward()
    assert leaf.grad.isfinite().all()
    with torch.no_grad():
        token_stats(noun, torch.arange(3), max_scratch_bytes=enough, backend=backend)


def test_gradient_of_masked_logits(backend: str) -> None:
    """onehot - softmax holds where the softmax is 0."""
    logits, _ = logits_pair("masked", 4, 40)
    ids = logits.argmin(1)
    assert (logits.gather(1, ids[:, None]) == -torch.inf).all()
    leaf = logits.clone().requires_grad_()
    stats = token_stats(leaf, ids, backend=backend)
    assert (stats.logprob == -torch.inf).all()
    stats.logprob.sum().backward()
    onehot = torch.nn.functional.one_hot(ids, 40)
    torch.testing.assert_close(leaf.grad, onehot - logits.softmax(1), rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_the_cross_entropy(backend: str) -> None:
    model = linear()
    hidden = model.hidden.clone().requires_grad_()
    token_stats(LinearLogits(hidden, model.weight), IDS, backend=backend).logprob.mean().backward()
    own, hidden.grad = hidden.grad, None
    loss = kd_loss(LinearLogits(hidden, model.weight), None, kd_weight=0, ce_weight=1, labels=IDS, backend=backend).loss
    loss.backward()
    torch.testing.assert_close(own, -hidden.grad)


MODULES = {"reference": "reference", "cpp": "cpp_impl", "triton": "triton_impl"}


@pytest.mark.parametrize("factor", [1.01, 0.99, -1.0])
@every_product
def test_a_changed_gradient_fails(
    factor: float, dtype: torch.dtype, bf16_products: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is tested: what the row pass writes is changed before the products with it."""
    rows = importlib.import_module(f"kd_kernels.loss.{MODULES[backend]}")
    real = rows.sparse_rows

    def changed(student, teacher, job, labels, weight, gradient, want_stats):
        result = real(student, teacher, job, labels, weight, gradient, want_stats)
        if gradient is not None:
            gradient.mul_(factor)
        return result

    monkeypatch.setattr(rows, "sparse_rows", changed)
    for model in (linear(dtype), Dense(logits_pair("near_0.3", 7, 40, dtype)[0])):
        with pytest.raises(AssertionError, match=r"d logprob / d \w+: "):
            compare(model, IDS, upstream=UPSTREAM, backend=backend)


@pytest.mark.parametrize("field", [*NUMBERS, *PLACES])
def test_a_changed_statistic_fails(field: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = importlib.import_module(f"kd_kernels.stats.{MODULES[backend]}")
    real = rows.stat_rows

    def changed(chunk, ids, out):
        real(chunk, ids, out)
        value = getattr(out, field)
        value[4] += 1 if field in PLACES else 1e-3 * value[4].abs()

    monkeypatch.setattr(rows, "stat_rows", changed)
    with pytest.raises(AssertionError, match=field):
        compare(linear(), IDS, backend=backend)


# ---------------------------------------------------------------------------------------------------------- autograd


def test_nothing_is_kept_of_the_logits(backend: str) -> None:
    """Between forward and backward there are the inputs, and no matrix."""
    model = linear()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        token_stats(model.noun({**model.leaves, "hidden": model.hidden.clone().requires_grad_()}), IDS, backend=backend)
    assert sorted(tuple(x.shape) for x in kept) == [(7,), (7, 16), (40, 16)]


def test_only_the_logprob_has_a_gradient(backend: str) -> None:
    leaf = logits_pair("near_0.3", 7, 40)[0].requires_grad_()
    stats = token_stats(leaf, IDS, k=3, backend=backend)
    assert stats.logprob.requires_grad
    assert not any(getattr(stats, name).requires_grad for name in (*NUMBERS[1:], *PLACES, "in_top_k"))
    with torch.no_grad():
        assert not token_stats(leaf, IDS, backend=backend).logprob.requires_grad


def test_backward_twice_and_checkpointed(backend: str) -> None:
    model = linear()
    hidden = model.hidden.clone().requires_grad_()
    run = lambda h: token_stats(LinearLogits(h, model.weight), IDS, backend=backend).logprob.sum()  # noqa: E731
    once = torch.autograd.grad(run(hidden), hidden)[0]
    total = run(hidden)
    total.backward(retain_graph=True)
    total.backward()
    torch.testing.assert_close(hidden.grad, 2 * once)
    hidden.grad = None
    torch.utils.checkpoint.checkpoint(run, hidden, use_reentrant=False).backward()
    assert torch.equal(hidden.grad, once)


def test_second_derivatives_are_refused(backend: str) -> None:
    leaf = logits_pair("near_0.3", 7, 40)[0].requires_grad_()
    total = token_stats(leaf, IDS, backend=backend).logprob.sum()
    with pytest.raises(RuntimeError, match="^token_stats: create_graph must be False: the gradient is not "):
        torch.autograd.grad(total, leaf, create_graph=True)


def test_ensembles_are_not_differentiated(backend: str) -> None:
    leaf, other = (x.requires_grad_(i == 0) for i, x in enumerate(logits_pair("near_0.3", 7, 40)))
    ensemble = EnsembleLogits((leaf, other), space="prob")
    message = "^token_stats: logits must be without requires_grad where it is an ensemble, .*; call it under torch"
    with pytest.raises(ValueError, match=message):
        token_stats(ensemble, IDS, backend=backend)
    with torch.no_grad():
        assert not token_stats(ensemble, IDS, backend=backend).logprob.requires_grad


# ------------------------------------------------------------------------------------------------ registration, compile


def calls() -> dict[str, tuple]:
    model, (logits, other) = linear(bias=True), logits_pair("near_0.3", 7, 40)
    hidden, weight, bias = (x.clone().requires_grad_() for x in (model.hidden, model.weight, model.bias))
    return {
        "dense": (logits.requires_grad_(),), "linear": (LinearLogits(hidden, weight, bias, softcap=6.0),),
        "frozen head": (LinearLogits(hidden, weight.detach(), valid_vocab=40),),
        "ensemble": (EnsembleLogits((LinearLogits(hidden.detach(), weight.detach()), other)),),
    }


@pytest.mark.parametrize("call", ["dense", "linear", "frozen head", "ensemble"])
def test_opcheck(call: str, backend: str, monkeypatch: pytest.MonkeyPatch, unpoisoned: None) -> None:
    caught: list[tuple] = []
    real = api._token_stats
    monkeypatch.setattr(api, "_token_stats", lambda *args: (caught.append(args), real(*args))[1])
    token_stats(*calls()[call], IDS, k=3, backend=backend)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(real, caught[0], test_utils=tests)


@pytest.mark.parametrize("call", ["dense", "linear", "frozen head", "ensemble"])
def test_compiles_without_a_graph_break(call: str, backend: str, unpoisoned: None) -> None:
    torch.compiler.reset()

    def step(noun, ids: Tensor):
        stats = token_stats(noun, ids, k=3, backend=backend)
        rest = stats.lse, stats.entropy, stats.max, stats.argmax, stats.rank, stats.in_top_k
        return ((stats.logprob * 2.0).exp().sum(), *rest)

    outcomes = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        (noun,) = calls()[call]
        total, *rest = run(noun, IDS)
        leaf = noun if isinstance(noun, Tensor) else noun.hidden if isinstance(noun, LinearLogits) else None
        if leaf is not None:
            total.backward()
        outcomes.append((total.detach(), *rest, None if leaf is None else leaf.grad))
    eager, compiled = outcomes
    for got, want in zip(compiled, eager):
        torch.testing.assert_close(got, want)


def test_compiled_graph_serves_other_row_counts(unpoisoned: None) -> None:
    """Dynamic rows: right for every N, and not compiled anew for each."""
    torch.compiler.reset()
    model, graphs = linear(), []
    step = lambda hidden, ids: token_stats(LinearLogits(hidden, model.weight), ids).rank  # noqa: E731
    run = torch.compile(
        step, backend=lambda graph, inputs: (graphs.append(graph), graph.forward)[1], fullgraph=True, dynamic=True
    )
    for rows in (5, 7, 3, 2):
        assert torch.equal(run(model.hidden[:rows], IDS[:rows]), step(model.hidden[:rows], IDS[:rows]))
    assert len(graphs) <= 2


def test_autocast_is_honoured_as_in_kd_loss(backend: str) -> None:
    """Inputs of the products are rounded, what comes out is not; backward outside of autocast is the same."""
    model = linear()
    rounded = [x.bfloat16().float() for x in (model.hidden, model.weight)]
    want = token_stats(LinearLogits(*rounded), IDS, backend=backend)
    hidden = model.hidden.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        stats = token_stats(LinearLogits(hidden, model.weight), IDS, backend=backend)
    torch.testing.assert_close(stats.logprob.detach(), want.logprob, rtol=1e-6, atol=1e-6)
    assert torch.equal(stats.rank, want.rank) and stats.logprob.dtype == torch.float32
    stats.logprob.sum().backward()
    onehot = torch.nn.functional.one_hot(IDS, 40)
    slope = onehot - (rounded[0] @ rounded[1].T).softmax(1)
    torch.testing.assert_close(hidden.grad, slope @ rounded[1], rtol=2e-2, atol=2e-2)
