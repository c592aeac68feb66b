"""What topk_targets takes: every noun, dtype and layout; and what it says about what it does not take."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import oracles
from kd_kernels import products, testing
from kd_kernels.logits import EnsembleLogits, LinearLogits, SparseTargets
from kd_kernels.targets import reference, topk_targets

EMPTY_HEAD = LinearLogits(torch.ones(2, 4), torch.ones(0, 4))
HALF = (torch.bfloat16, torch.float16)


def assert_same(actual: SparseTargets, expected: SparseTargets, tolerance: float = 0.0) -> None:
    assert torch.equal(actual.offsets, expected.offsets) and torch.equal(actual.ids, expected.ids)
    for field in ("logprobs", "tail_logprob", "log_z"):
        torch.testing.assert_close(getattr(actual, field), getattr(expected, field), rtol=0, atol=tolerance)


def head(rows: int = 7, vocab: int = 5003, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    pair = testing.linear_pair(rows, vocab, 24, 24, dtype)
    return pair.teacher_hidden, pair.teacher_weight


@pytest.mark.parametrize("dtype", testing.FLOORS)
def test_topk_of_every_dtype(dtype: torch.dtype, backend: str) -> None:
    _, logits = testing.logits_pair("near_0.3", 4, 4500, dtype)
    targets = topk_targets(logits, 20, backend=backend)
    assert targets.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert targets.ids.dtype == torch.int64
    assert_same(targets, topk_targets(logits.to(targets.logprobs.dtype), 20, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_of_every_layout(dtype: torch.dtype, backend: str) -> None:
    base = torch.randn(6, 2, 9000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    views = {
        "leading dimensions": base, "rows apart": base[:, 1], "columns apart": base[:, 0, ::2], "one row": base[0, 0],
        "transposed": base[:, 0].t().contiguous().t(), "one row for many": base[0, 0].expand(3, 9000),
        "offset": base[..., 7:-5],
    }
    for name, view in views.items():
        flat = view.reshape(-1, view.shape[-1]).clone()
        targets = topk_targets(view, 9, backend=backend)
        assert len(targets.offsets) == len(flat) + 1, name
        assert_same(targets, topk_targets(flat, 9, backend=backend))


@pytest.mark.parametrize("dtype", testing.FLOORS)
@pytest.mark.parametrize("extras", [
    {}, {"bias": True}, {"scale": 0.37}, {"softcap": 5.0}, {"valid_vocab": 4500}, {"valid_vocab": 3},
    {"bias": True, "scale": 2.0, "softcap": 12.0, "valid_vocab": 5000},
], ids=str)
def test_topk_of_a_linear_head(extras: dict, dtype: torch.dtype, backend: str) -> None:
    hidden, weight = head(dtype=dtype)
    if extras.get("bias"):
        extras = extras | {"bias": torch.randn(len(weight), generator=torch.Generator().manual_seed(2)).to(dtype)}
    work = torch.float64 if dtype == torch.float64 else torch.float32
    bias = extras["bias"].to(work) if "bias" in extras else None
    dense = oracles.linear(hidden.to(work), weight.to(work), bias, extras.get("scale", 1.0), extras.get("softcap"))
    dense = dense[:, : extras.get("valid_vocab")]
    targets = topk_targets(LinearLogits(hidden, weight, **extras), 30, temperatures=(1.0, 2.0), backend=backend)
    assert_same(targets, topk_targets(dense, 30, temperatures=(1.0, 2.0), backend=backend), tolerance=5e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_topk_does_not_round_the_products_of_a_half_precision_head(dtype: torch.dtype) -> None:
    hidden, weight = head(rows=16, dtype=dtype)
    truth = topk_targets(hidden.double() @ weight.double().t(), 30)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            targets = topk_targets(LinearLogits(hidden, weight), 30)
        assert torch.equal(targets.ids, truth.ids)
        torch.testing.assert_close(targets.logprobs.double(), truth.logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("space", ["logit", "prob"])
def test_topk_of_an_ensemble_is_the_topk_of_the_mixture(space: str, backend: str) -> None:
    """Members that favour different ids: no member's own top-k holds the ensemble's."""
    hidden, weight = head(vocab=4200)
    other = torch.randn(7, 4200, generator=torch.Generator().manual_seed(5)) * 3
    of_rows = torch.rand(7, 2, generator=torch.Generator().manual_seed(6)) + 0.1
    for weights in ((1.0, 3.0), of_rows):
        ensemble = EnsembleLogits((LinearLogits(hidden, weight), other), weights, space)
        dense = oracles.ensemble([(hidden @ weight.t()).double(), other.double()], weights, space)
        targets, truth = topk_targets(ensemble, 12, backend=backend), topk_targets(dense, 12, backend="reference")
        assert torch.equal(targets.ids, truth.ids)
        torch.testing.assert_close(targets.logprobs.double(), truth.logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(targets.tail_logprob.double(), truth.tail_logprob, rtol=0, atol=1e-5)


def test_topk_of_no_rows(backend: str) -> None:
    for noun in (torch.empty(0, 40), torch.empty(3, 0, 40), LinearLogits(torch.empty(0, 8), torch.randn(40, 8))):
        targets = topk_targets(noun, 5, temperatures=(1.0, 2.0), backend=backend)
        assert targets.offsets.tolist() == [0] and targets.ids.numel() == 0 and targets.log_z.shape == (0, 2)


def test_topk_has_no_gradient() -> None:
    hidden, weight = (x.requires_grad_() for x in head())
    targets = topk_targets(LinearLogits(hidden, weight), 5)
    fields = (targets.logprobs, targets.tail_logprob, targets.log_z)
    assert not any(field.requires_grad for field in fields)


def test_topk_inside_a_compiled_function(backend: str, unpoisoned: None) -> None:
    hidden, weight = head()

    @torch.compile(backend="eager")
    def doubled(hidden: Tensor) -> Tensor:
        targets = topk_targets(LinearLogits(hidden * 2.0, weight), 5, backend=backend)
        return targets.logprobs * 2.0

    expected = topk_targets(LinearLogits(hidden * 2.0, weight), 5, backend=backend).logprobs * 2.0
    assert torch.equal(doubled(hidden), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_within_any_budget_is_the_same(dtype: torch.dtype, backend: str) -> None:
    hidden, weight = head(rows=10, dtype=dtype)
    noun = LinearLogits(hidden, weight)
    whole = topk_targets(noun, 8, backend=backend)
    source = products.source(noun, None, torch.float32)
    for budget in (400_000 + source.fixed_bytes, 800_000 + source.fixed_bytes, 1 << 30):
        assert_same(topk_targets(noun, 8, max_scratch_bytes=budget, backend=backend), whole, tolerance=1e-5)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that torch's CPU allocator has handed out at once during a call, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()  # noqa: F841  the result counts
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "mapped", "tensor", "ensemble", "mixture"])
def test_topk_allocates_no_more_than_its_budget(kind: str, backend: str) -> None:
    rows = 30 if backend == "triton" else 90  # which the interpreter takes seconds for
    hidden, weight = head(rows=rows, vocab=9000, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    linear = LinearLogits(hidden, weight)
    noun = {
        "fp32": linear, "bf16": linear, "mapped": LinearLogits(hidden, weight, weight[:, 0].contiguous(), 0.5, 20.0),
        "tensor": torch.randn(rows, 9000, dtype=torch.bfloat16), "ensemble": EnsembleLogits((linear, linear)),
        "mixture": EnsembleLogits((linear, linear), space="prob"),
    }[kind]
    budget = rows * 33_000
    result_bytes = rows * (8 + 8 + 20 * 12 + 4 + 4 + 8)
    whole_bytes = rows * 9000 * 4
    options = dict(temperatures=(1.0, 2.0), max_scratch_bytes=budget, backend=backend)
    peak = peak_bytes(lambda: topk_targets(noun, 20, **options))
    assert whole_bytes > budget, "or the budget would be no constraint"
    assert peak <= budget + result_bytes + 4096  # a few scalars


@pytest.mark.parametrize(("fault", "value"), [
    ("NaN", torch.nan), (r"\+inf", torch.inf), ("-inf at every id", -torch.inf),
])
def test_topk_names_the_row_that_is_no_distribution(fault: str, value: float, backend: str) -> None:
    for vocab in (3, 4099, 9000):
        logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(0))
        if value == -torch.inf:
            logits[3] = value
        else:
            logits[3, vocab // 2] = value
        message = rf"topk_targets: logits must be free of NaN and \+inf, .* got {fault} in row 3; look for an overflow"
        for k in (1, 2, 70):
            with pytest.raises(ValueError, match=message):
                topk_targets(logits, k, backend=backend)


@pytest.mark.parametrize("row", [
    [torch.nan] * 40, [torch.nan] + [-torch.inf] * 39, [torch.inf] * 40, [0.0] * 39 + [torch.nan],
    [-torch.inf] * 39 + [torch.inf],
], ids=["all NaN", "NaN and -inf", "all inf", "last NaN", "one inf"])
def test_topk_refuses_rows_that_are_bad_throughout(row: list[float], backend: str) -> None:
    for k in (1, 39, 40):
        with pytest.raises(ValueError, match=r"got (NaN|\+inf) in row 0"):
            topk_targets(torch.tensor([row]), k, backend=backend)


@pytest.mark.parametrize(("error", "message", "arguments"), [
    (ValueError, r"k must be in 1\.\.65535, got 0", {"k": 0}),
    (ValueError, r"k must be in 1\.\.65535, got 65536", {"k": 65_536}),
    (TypeError, r"k must be an int, got float", {"k": 2.0}),
    (TypeError, r"k must be an int, got bool", {"k": True}),
    (ValueError, r"mass must be finite and greater than 0, got 0\.0; pass None", {"mass": 0.0}),
    (ValueError, r"mass must be at most 1, got 1\.5", {"mass": 1.5}),
    (TypeError, r"mass must be a number, got str", {"mass": "0.9"}),
    (ValueError, r"temperatures must be finite and greater than 0, got 0", {"temperatures": (1.0, 0)}),
    (ValueError, r"temperatures must be distinct, and at least one, got \(2\.0, 2\.0\)", {"temperatures": (2.0, 2)}),
    (ValueError, r"temperatures must be distinct, and at least one, got \(\)", {"temperatures": ()}),
    (TypeError, r"temperatures must be a sequence of numbers, got 2\.0; pass \(2\.0,\)", {"temperatures": 2.0}),
    (ValueError, r"max_scratch_bytes must be at least \d+ bytes, which one row takes", {"max_scratch_bytes": 10}),
    (ValueError, r"backend must be one of reference, cpp, triton, got 'numpy'", {"backend": "numpy"}),
    (
        RuntimeError, r'backend must be one for tensors on cpu, got "triton"; move the tensors to a GPU',
        {"backend": "triton"},
    ),
    (TypeError, r"logits must be a tensor, LinearLogits or EnsembleLogits, got list", {"logits": [1.0]}),
    (TypeError, r"logits must be of dtype float32, bfloat16, .* got torch\.int64", {"logits": torch.ones(2, 3).long()}),
    (ValueError, r"logits must be of shape \[\.\.\., V\], got \[\]", {"logits": torch.tensor(1.0)}),
    (ValueError, r"logits must be of at least one column, got 0", {"logits": torch.ones(2, 0)}),
    (ValueError, r"logits must be of at least one column, got 0", {"logits": EMPTY_HEAD}),
])
def test_topk_says_what_is_wrong(error: type[Exception], message: str, arguments: dict) -> None:
    with pytest.raises(error, match="topk_targets: " + message):
        topk_targets(**({"logits": torch.zeros(2, 50), "k": 3} | arguments))


def test_topk_refuses_targets_that_are_cut_already() -> None:
    targets = topk_targets(torch.zeros(2, 50), 3)
    with pytest.raises(TypeError, match="topk_targets: logits must be a tensor, .* got SparseTargets"):
        topk_targets(targets, 3)  # type: ignore[arg-type]


def test_reference_says_what_one_row_takes() -> None:
    with pytest.raises(ValueError, match=f"at least {reference.FLOAT64_COPIES * 8 * 50} bytes"):
        topk_targets(torch.zeros(2, 50), 3, max_scratch_bytes=10, backend="reference")
