"""What token_stats takes: every noun, dtype and layout; and what it says about what it does not take."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from judge import Dense, Ensemble, Linear
from kd_kernels import EnsembleLogits, LinearLogits, SparseTargets, token_stats
from kd_kernels.testing import FLOORS, linear_pair, logits_pair
from stats_judge import NUMBERS, PLACES, assert_stats_of, compare

HALF = (torch.bfloat16, torch.float16)


def refuses(error: type[Exception], match: str):
    return pytest.raises(error, match="^token_stats: " + match)


def head(rows: int = 7, vocab: int = 1100, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    pair = linear_pair(rows, vocab, 24, 24, dtype)
    return pair.student_hidden, pair.student_weight


def ids_for(rows: int, vocab: int) -> Tensor:
    return torch.arange(rows) * 7919 % vocab


@pytest.fixture
def dtypes(backend: str) -> list[torch.dtype]:
    return [dtype for dtype in FLOORS if not (backend == "triton" and dtype == torch.float64)]


def test_every_dtype(dtypes: list[torch.dtype], backend: str) -> None:
    for dtype in dtypes:
        logits, _ = logits_pair("near_0.3", 4, 1500, dtype)
        for kind in (torch.int64, torch.int32):
            ids = ids_for(4, 1500).to(kind)
            stats = token_stats(logits, ids, k=5, backend=backend)
            assert stats.logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_stats_of(stats, logits, ids)


def test_every_layout(backend: str) -> None:
    base = torch.randn(6, 2, 1500, generator=torch.Generator().manual_seed(0))
    views = {
        "leading dimensions": base, "rows apart": base[:, 1], "columns apart": base[:, 0, ::2], "one row": base[0, 0],
        "transposed": base[:, 0].t().contiguous().t(), "one row for many": base[0, 0].expand(3, 1500),
        "offset": base[..., 7:-5], "columns first": base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    for name, view in views.items():
        ids = ids_for(view.shape[:-1].numel() * 2, view.shape[-1])[::2].reshape(view.shape[:-1])
        before = view.clone()
        stats = token_stats(view, ids, backend=backend)
        assert stats.logprob.shape == stats.rank.shape == view.shape[:-1], name
        assert_stats_of(stats, view.reshape(-1, view.shape[-1]), ids)
        assert torch.equal(view, before), name


def test_ids_that_are_not_contiguous(backend: str) -> None:
    logits, _ = logits_pair("near_0.3", 6, 90)
    ids = ids_for(12, 90).reshape(6, 2)
    for view in (ids[:, 1], ids.t()[0], ids[:1, 0].expand(6)):
        assert_stats_of(token_stats(logits, view, backend=backend), logits, view)


@pytest.mark.parametrize("options", [
    {}, {"bias": True}, {"scale": 0.37}, {"softcap": 5.0}, {"valid_vocab": 900}, {"valid_vocab": 3},
    {"bias": True, "scale": 2.0, "softcap": 12.0, "valid_vocab": 1000},
], ids=str)
def test_linear_heads(options: dict, dtypes: list[torch.dtype], backend: str) -> None:
    for dtype in dtypes:
        hidden, weight = head(dtype=dtype)
        extras = dict(options)
        if extras.pop("bias", False):
            extras["bias"] = torch.randn(len(weight), generator=torch.Generator().manual_seed(2)).to(dtype)
        model = Linear(hidden, weight, **extras)
        compare(model, ids_for(7, extras.get("valid_vocab", 1100)), backend=backend)


@pytest.mark.parametrize("dtype", HALF)
def test_products_of_a_half_precision_head_are_not_rounded(dtype: torch.dtype, backend: str) -> None:
    hidden, weight = head(rows=16, dtype=dtype)
    ids = ids_for(16, 1100)
    truth = token_stats(LinearLogits(hidden.double(), weight.double()), ids, backend="reference")
    stats = token_stats(LinearLogits(hidden, weight), ids, backend=backend)
    assert torch.equal(stats.rank, truth.rank)
    torch.testing.assert_close(stats.logprob.double(), truth.logprob, rtol=0, atol=2e-5)


@pytest.mark.parametrize("space", ["logit", "prob"])
def test_ensembles(space: str, backend: str) -> None:
    pair = linear_pair(7, 1100, 24, 16)
    members = [
        Linear(pair.student_hidden, pair.student_weight), Linear(pair.teacher_hidden, pair.teacher_weight, softcap=7.0),
        Dense(torch.randn(7, 1100, generator=torch.Generator().manual_seed(1))),
    ]
    compare(Ensemble(members, (1.0, 3.0, 0.5), space), ids_for(7, 1100), backend=backend)
    of_rows = torch.rand(7, 3, generator=torch.Generator().manual_seed(2)) + 0.1
    compare(Ensemble(members, of_rows, space), ids_for(7, 1100), backend=backend)


def test_no_rows(backend: str) -> None:
    for noun in (torch.empty(0, 40), torch.empty(3, 0, 40), LinearLogits(torch.empty(0, 8), torch.randn(40, 8))):
        shape = noun.shape[:-1] if isinstance(noun, Tensor) else noun.leading_shape
        stats = token_stats(noun, torch.empty(shape, dtype=torch.int64), k=3, backend=backend)
        assert all(getattr(stats, name).shape == shape for name in (*NUMBERS, *PLACES, "in_top_k"))
    weight, nothing = torch.randn(40, 8, requires_grad=True), torch.empty(0, dtype=torch.int64)
    token_stats(LinearLogits(torch.empty(0, 8), weight), nothing, backend=backend).logprob.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("kind", ["dense", "linear", "bf16 head", "mixture"])
def test_any_budget_gives_the_same(kind: str, backend: str) -> None:
    hidden, weight = head(rows=9, dtype=torch.bfloat16 if kind == "bf16 head" else torch.float32)
    linear = LinearLogits(hidden, weight, softcap=9.0)
    noun = {
        "dense": hidden.float() @ weight.float().T, "linear": linear, "bf16 head": linear,
        "mixture": EnsembleLogits((linear, hidden.float() @ weight.float().T), space="prob"),
    }[kind]
    ids = ids_for(9, 1100)
    whole = token_stats(noun, ids, backend=backend)
    with refuses(ValueError, "max_scratch_bytes must be at least .*, which one row takes") as caught:
        token_stats(noun, ids, max_scratch_bytes=-1, backend=backend)
    one_row = int(re.search(r"at least (\d+) bytes", str(caught.value))[1])
    for budget in (one_row, 3 * one_row + 4096):
        stats = token_stats(noun, ids, max_scratch_bytes=budget, backend=backend)
        for name in PLACES:
            assert torch.equal(getattr(stats, name), getattr(whole, name)), name
        for name in NUMBERS:
            torch.testing.assert_close(getattr(stats, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- refusals


LOGITS = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([0, 11, 5, 5])


@pytest.mark.parametrize("error, match, arguments", [
    (TypeError, r"logits must be a tensor, LinearLogits or EnsembleLogits, got list", dict(logits=[[0.0]])),
    (
        TypeError, r"logits must be a tensor, LinearLogits or EnsembleLogits, got SparseTargets",
        dict(logits=SparseTargets(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1))),
    ),
    (TypeError, r"logits must be of dtype float32, .*, got torch.int64", dict(logits=LOGITS.long())),
    (ValueError, r"logits must be of shape \[\.\.\., V\], got \[\]", dict(logits=torch.tensor(0.0))),
    (ValueError, r"logits must be of at least one column, got 0", dict(logits=LOGITS[:, :0])),
    (TypeError, r"ids must be a torch.Tensor, got list", dict(ids=[0, 1, 2, 3])),
    (TypeError, r"ids must be of dtype int64 or int32, got torch.float32", dict(ids=IDS.float())),
    (TypeError, r"ids must be of dtype int64 or int32, got torch.bool", dict(ids=IDS > 0)),
    (ValueError, r"ids must be of shape \[4\] like the rows of logits, got \[3\]", dict(ids=IDS[:3])),
    (ValueError, r"ids must be of shape \[4\] like the rows of logits, got \[4, 1\]", dict(ids=IDS[:, None])),
    (ValueError, r"ids must be on cpu, like the rest, got meta", dict(ids=IDS.to("meta"))),
    (ValueError, r"ids must be in 0\.\.V-1=11, got 12 in row 2", dict(ids=torch.tensor([0, 1, 12, 3]))),
    (ValueError, r"ids must be in 0\.\.V-1=11, got -100 in row 1", dict(ids=torch.tensor([0, -100, 12, 3]))),
    (
        ValueError, r"ids must be in 0\.\.V-1=9, got 11 in row 1",
        dict(logits=LinearLogits(LOGITS, torch.eye(12), valid_vocab=10)),
    ),
    (ValueError, r"k must be at least 1, got 0", dict(k=0)),
    (TypeError, r"k must be an int, got float", dict(k=2.0)),
    (TypeError, r"k must be an int, got bool", dict(k=True)),
    (TypeError, r"max_scratch_bytes must be a number of bytes \(int\), got float", dict(max_scratch_bytes=1e6)),
    (ValueError, r"backend must be one of reference, .*, got 'numpy'", dict(backend="numpy")),
])
def test_says_what_is_wrong(error: type[Exception], match: str, arguments: dict) -> None:
    with refuses(error, match):
        token_stats(**{"logits": LOGITS, "ids": IDS, **arguments})


@pytest.mark.parametrize(("fault", "value"), [
    ("NaN", torch.nan), (r"\+inf", torch.inf), ("-inf at every id", -torch.inf),
])
def test_names_the_row_that_is_no_distribution(fault: str, value: float, backend: str) -> None:
    for vocab in (3, 4099):
        logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(0))
        if value == -torch.inf:
            logits[3] = value
        else:
            logits[3, vocab // 2] = value
        for budget in (None, 4 * 4 * 4099 * 8):
            with refuses(ValueError, rf"logits must be free of NaN and \+inf, .*, got {fault} in row 3; look for"):
                token_stats(logits, torch.arange(5) % vocab, max_scratch_bytes=budget, backend=backend)


@pytest.mark.parametrize("row", [
    [torch.nan] * 40, [torch.nan] + [-torch.inf] * 39, [torch.inf] * 40, [0.0] * 39 + [torch.nan],
    [-torch.inf] * 39 + [torch.inf],
], ids=["all NaN", "NaN and -inf", "all inf", "last NaN", "one inf"])
@pytest.mark.parametrize("token", [0, 39])
def test_refuses_rows_that_are_bad_throughout(row: list[float], token: int, backend: str) -> None:
    with refuses(ValueError, r"logits must be .*, got (NaN|\+inf) in row 0"):
        token_stats(torch.tensor([row]), torch.tensor([token]), backend=backend)


@pytest.mark.interpret
def test_triton_refuses_what_it_does_not_do() -> None:
    with refuses(TypeError, 'tensors must be of dtype .* for backend="triton", got torch.float64'):
        token_stats(LOGITS.double(), IDS, backend="triton")
    with refuses(ValueError, 'the vocabulary must be at most 16777216 for backend="triton", got 16777217'):
        token_stats(torch.zeros(1).expand(4, (1 << 24) + 1), IDS, backend="triton")
