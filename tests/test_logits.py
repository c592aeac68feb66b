"""The nouns: what each holds, what each refuses, in words."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracles
from judge import sparse_targets
from kd_kernels import EnsembleLogits, LinearLogits, SparseTargets
from kd_kernels.testing import logits_pair

H, V = 4, 9
HIDDEN, WEIGHT = torch.randn(3, H), torch.randn(V, H)


def refuses(error: type[Exception], match: str):
    return pytest.raises(error, match="^" + match)


# --------------------------------------------------------------------------------------------------------- LinearLogits


def test_linear_logits_know_rows_and_vocabulary() -> None:
    logits = LinearLogits(torch.randn(2, 3, H), WEIGHT, valid_vocab=7)
    assert logits.leading_shape == (2, 3) and logits.vocab == 7 and logits.device.type == "cpu"
    assert LinearLogits(HIDDEN, WEIGHT).vocab == V
    assert LinearLogits(HIDDEN, WEIGHT, valid_vocab=V).vocab == V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_linear_logits_take_every_float_and_mixtures(dtype: torch.dtype) -> None:
    assert LinearLogits(HIDDEN.to(dtype), WEIGHT).hidden.dtype == dtype


@pytest.mark.parametrize(
    "error, match, arguments",
    [
        (TypeError, r"LinearLogits: hidden must be a torch.Tensor, got list", dict(hidden=[1.0])),
        (TypeError, r"LinearLogits: weight must be a torch.Tensor, got NoneType", dict(weight=None)),
        (TypeError, r"LinearLogits: hidden must be of dtype float32, .*, got torch.int64", dict(hidden=HIDDEN.long())),
        (TypeError, r"LinearLogits: weight must be of dtype .*, got torch.complex64", dict(weight=WEIGHT.cfloat())),
        (ValueError, r"LinearLogits: weight must be of shape \[V, H\], got \[9\]", dict(weight=WEIGHT[:, 0])),
        (
            ValueError,
            r"LinearLogits: hidden must be of shape \[\.\.\., H=4\] to match weight, got \[3, 3\]",
            dict(hidden=HIDDEN[:, :3]),
        ),
        (
            ValueError,
            r"LinearLogits: hidden must be of shape \[\.\.\., H=4\] to match weight, got \[\]",
            dict(hidden=torch.tensor(1.0)),
        ),
        (ValueError, r"LinearLogits: weight must be on cpu, like the rest, got meta", dict(weight=WEIGHT.to("meta"))),
        (TypeError, r"LinearLogits: bias must be a torch.Tensor, got float", dict(bias=1.0)),
        (TypeError, r"LinearLogits: bias must be of dtype .*, got torch.int64", dict(bias=torch.zeros(V).long())),
        (ValueError, r"LinearLogits: bias must be of shape \[V=9\], got \[4\]", dict(bias=torch.zeros(H))),
        (
            ValueError,
            r"LinearLogits: bias must be on cpu, like the rest, got meta",
            dict(bias=torch.zeros(V, device="meta")),
        ),
        (ValueError, r"LinearLogits: scale must be finite and greater than 0, got 0", dict(scale=0)),
        (ValueError, r"LinearLogits: scale must be finite and greater than 0, got nan", dict(scale=math.nan)),
        (TypeError, r"LinearLogits: scale must be a number, got Tensor", dict(scale=torch.tensor(1.0))),
        (
            ValueError,
            r"LinearLogits: softcap must be .* greater than 0, got 0.0; pass None for no soft-capping",
            dict(softcap=0.0),
        ),
        (ValueError, r"LinearLogits: softcap must be finite .*, got inf", dict(softcap=math.inf)),
        (ValueError, r"LinearLogits: valid_vocab must be in 1\.\.V=9, got 0", dict(valid_vocab=0)),
        (ValueError, r"LinearLogits: valid_vocab must be in 1\.\.V=9, got 10", dict(valid_vocab=10)),
        (TypeError, r"LinearLogits: valid_vocab must be .*int", dict(valid_vocab=2.5)),
    ],
)
def test_linear_logits_refuse(error: type[Exception], match: str, arguments: dict) -> None:
    with refuses(error, match):
        LinearLogits(**{"hidden": HIDDEN, "weight": WEIGHT, **arguments})


# -------------------------------------------------------------------------------------------------------- SparseTargets


def fields(**changed) -> dict:
    """Three rows of 2, 0 and 3 entries."""
    good = dict(
        offsets=torch.tensor([0, 2, 2, 5]),
        ids=torch.tensor([1, 7, 0, 3, 8]),
        logprobs=torch.tensor([0.5, 0.25, 0.125, 0.25, 0.5]).log(),
        tail_logprob=torch.tensor([0.25, 1.0, 0.125]).log(),
    )
    return {**good, **changed}


@pytest.mark.parametrize(
    "error, match, changed",
    [
        (TypeError, r"SparseTargets: offsets must be a torch.Tensor, got list", dict(offsets=[0, 2])),
        (
            TypeError,
            r"SparseTargets: offsets must be of dtype int64, got torch.int32",
            dict(offsets=torch.tensor([0, 2, 2, 5]).int()),
        ),
        (
            ValueError,
            r"SparseTargets: offsets must be of shape \[N \+ 1\], got \[0\]",
            dict(offsets=torch.zeros(0).long()),
        ),
        (
            ValueError,
            r"SparseTargets: offsets must be of shape \[N \+ 1\], got \[1, 4\]",
            dict(offsets=torch.tensor([[0, 2, 2, 5]])),
        ),
        (TypeError, r"SparseTargets: ids must be of dtype int64 or int32, got torch.float32", dict(ids=torch.zeros(5))),
        (ValueError, r"SparseTargets: ids must be of shape \[nnz\], got \[5, 1\]", dict(ids=torch.zeros(5, 1).long())),
        (TypeError, r"SparseTargets: logprobs must be a torch.Tensor, got NoneType", dict(logprobs=None)),
        (
            TypeError,
            r"SparseTargets: logprobs must be of dtype float32 or float64, got torch.bfloat16",
            dict(logprobs=torch.zeros(5).bfloat16()),
        ),
        (ValueError, r"SparseTargets: logprobs must be of shape \[5\], got \[4\]", dict(logprobs=torch.zeros(4))),
        (
            ValueError,
            r"SparseTargets: tail_logprob must be of shape \[3\], got \[5\]",
            dict(tail_logprob=torch.zeros(5)),
        ),
        (
            TypeError,
            r"SparseTargets: tail_logprob must be of dtype float32 or float64, got torch.int64",
            dict(tail_logprob=torch.zeros(3).long()),
        ),
        (ValueError, r"SparseTargets: importance must be of shape \[5\], got \[3\]", dict(importance=torch.zeros(3))),
        (
            ValueError,
            r"SparseTargets: logprobs must be on cpu, like the rest, got meta",
            dict(logprobs=torch.zeros(5, device="meta")),
        ),
        (
            ValueError,
            r"SparseTargets: offsets must be on cpu, like the rest, got meta",
            dict(offsets=torch.tensor([0, 2, 2, 5], device="meta")),
        ),
        (
            ValueError,
            r"SparseTargets: temperatures must be finite and greater than 0, got 0.0",
            dict(temperatures=(1.0, 0.0)),
        ),
        (
            ValueError,
            r"SparseTargets: log_z must be given when temperatures are \(1.0, 2.0\), got None",
            dict(temperatures=(1.0, 2.0)),
        ),
        (
            ValueError,
            r"SparseTargets: log_z must be of shape \[3, 2\], got \[3, 1\]",
            dict(temperatures=(1.0, 2.0), log_z=torch.zeros(3, 1)),
        ),
    ],
)
def test_sparse_targets_refuse(error: type[Exception], match: str, changed: dict) -> None:
    with refuses(error, match):
        SparseTargets(**fields(**changed))


def test_sparse_targets_know_their_rows() -> None:
    targets = SparseTargets(**fields())
    assert targets.leading_shape == (3,) and targets.row_of_entry().tolist() == [0, 0, 2, 2, 2]


def test_select_takes_rows_in_any_order_and_again() -> None:
    targets = SparseTargets(
        **fields(importance=torch.arange(5.0), temperatures=(1.0, 2.0), log_z=torch.arange(6.0).view(3, 2))
    )
    picked = targets.select(torch.tensor([2, 1, 0, 2]))
    assert picked.offsets.tolist() == [0, 3, 3, 5, 8]
    assert picked.ids.tolist() == [0, 3, 8, 1, 7, 0, 3, 8]
    assert picked.importance.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert torch.equal(picked.logprobs, targets.logprobs[[2, 3, 4, 0, 1, 2, 3, 4]])
    assert torch.equal(picked.tail_logprob, targets.tail_logprob[[2, 1, 0, 2]])
    assert picked.log_z.tolist() == [[4, 5], [2, 3], [0, 1], [4, 5]] and picked.temperatures == (1.0, 2.0)
    nothing = targets.select(torch.tensor([], dtype=torch.int64))
    assert nothing.offsets.tolist() == [0] and nothing.ids.shape == (0,)


def test_cat_undoes_select() -> None:
    targets = SparseTargets(**fields())
    joined = SparseTargets.cat([targets.select(torch.tensor([0])), targets.select(torch.tensor([1, 2]))])
    for name in ("offsets", "ids", "logprobs", "tail_logprob"):
        assert torch.equal(getattr(joined, name), getattr(targets, name)), name


def test_cat_refuses() -> None:
    with refuses(ValueError, "SparseTargets.cat: parts must be at least one SparseTargets, got none"):
        SparseTargets.cat([])
    with refuses(ValueError, "SparseTargets.cat: parts must be alike in temperatures and in which fields they have"):
        SparseTargets.cat([SparseTargets(**fields()), SparseTargets(**fields(tail_logprob=None))])


def test_from_topk_finds_the_tail() -> None:
    _, teacher = logits_pair("near_0.3", 4, 30, torch.float64)
    rows = oracles.topk(teacher, 5)
    ids, logprobs = (torch.stack([getattr(r, name) for r in rows]) for name in ("ids", "logprobs"))
    targets = SparseTargets.from_topk(ids, logprobs)
    want = sparse_targets(rows, torch.float64)
    for name in ("offsets", "ids", "logprobs"):
        assert torch.equal(getattr(targets, name), getattr(want, name)), name
    torch.testing.assert_close(targets.tail_logprob, want.tail_logprob)
    given = torch.full((4,), -2.5)
    assert torch.equal(SparseTargets.from_topk(ids, logprobs.float(), given).tail_logprob, given)


def test_from_topk_of_a_whole_vocabulary_has_no_tail() -> None:
    """But for what rounding the log-probabilities leaves: the tail is one minus their sum."""
    logprobs = torch.full((2, 4), 0.25).log()
    ids = torch.arange(4).expand(2, 4)
    assert (SparseTargets.from_topk(ids, logprobs).tail_logprob.exp() < 1e-7).all()
    assert SparseTargets.from_topk(ids, torch.full((2, 4), 0.26).log()).tail_logprob.tolist() == [-math.inf] * 2


@pytest.mark.parametrize(
    "error, match, ids, logprobs",
    [
        (
            ValueError,
            r"SparseTargets.from_topk: ids and logprobs must be of one shape \[N, k\], got \[4\] and \[4\]",
            torch.zeros(4).long(),
            torch.zeros(4),
        ),
        (
            ValueError,
            r"SparseTargets.from_topk: ids and logprobs must be of one shape \[N, k\], got \[2, 3\] and \[2, 4\]",
            torch.zeros(2, 3).long(),
            torch.zeros(2, 4),
        ),
        (
            TypeError,
            r"SparseTargets.from_topk: ids must be of dtype int64 or int32, got torch.float32",
            torch.zeros(2, 3),
            torch.zeros(2, 3),
        ),
        (
            TypeError,
            r"SparseTargets.from_topk: logprobs must be a torch.Tensor, got list",
            torch.zeros(2, 3).long(),
            [[0.0]],
        ),
    ],
)
def test_from_topk_refuses(error: type[Exception], match: str, ids: Tensor, logprobs: Tensor) -> None:
    with refuses(error, match):
        SparseTargets.from_topk(ids, logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_temperature_is_the_tempered_distribution(dtype: torch.dtype) -> None:
    _, teacher = logits_pair("near_0.3", 4, 30, torch.float64)
    temperatures = (1.0, 2.0, 0.5)
    targets = sparse_targets(
        oracles.topk(teacher, 6), dtype, temperatures=temperatures, log_z=oracles.log_z(teacher, temperatures).to(dtype)
    )
    assert targets.at_temperature(1.0) is targets
    for temperature in temperatures[1:]:
        got = targets.at_temperature(temperature)
        want = sparse_targets(oracles.truncate(teacher, [r.ids for r in oracles.topk(teacher, 6)], temperature), dtype)
        tolerance = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(got.logprobs, want.logprobs, **tolerance)
        # One minus a sum: fp32 entries leave an error of 1e-7 in the mass itself.
        torch.testing.assert_close(got.tail_logprob.exp(), want.tail_logprob.exp(), **tolerance)


def test_at_temperature_keeps_an_empty_tail_empty() -> None:
    """In rows enough that one minus the sum of what is kept rounds to more than nothing in some of them."""
    _, teacher = logits_pair("near_0.3", 64, 257, torch.float64)
    targets = sparse_targets(
        oracles.topk(teacher, 257),
        torch.float32,
        temperatures=(1.0, 2.0),
        log_z=oracles.log_z(teacher, (1.0, 2.0)).float(),
    )
    assert targets.at_temperature(2.0).tail_logprob.tolist() == [-math.inf] * 64


def test_at_temperature_refuses() -> None:
    with refuses(
        ValueError,
        r"kd_loss: temperature must be one that the sparse targets declare \(1.0\), got 2.0; log Z of a truncated row",
    ):
        SparseTargets(**fields()).at_temperature(2.0)
    declared = SparseTargets(**fields(temperatures=(1.0, 2.0), log_z=torch.zeros(3, 2)))
    with refuses(ValueError, r"kd_loss: temperature must be one that the sparse targets declare \(1.0, 2.0\), got 3.0"):
        declared.at_temperature(3.0)
    with refuses(ValueError, r"kd_loss: temperature must be 1.0 with importance-weighted targets, got 2.0"):
        SparseTargets(**fields(importance=torch.ones(5))).at_temperature(2.0)


# ------------------------------------------------------------------------------------------------------- EnsembleLogits


def test_ensemble_normalises_its_weights() -> None:
    members = (torch.zeros(2, 3, V), LinearLogits(torch.zeros(2, 3, H), WEIGHT))
    ensemble = EnsembleLogits(members, (1.0, 3.0), "prob")
    assert ensemble.weights == (0.25, 0.75) and ensemble.leading_shape == (2, 3) and ensemble.vocab == V
    assert EnsembleLogits(members).weights == (0.5, 0.5)
    of_rows = EnsembleLogits(members, torch.tensor([2.0, 6.0]).expand(2, 3, 2), "prob").weights
    assert torch.equal(of_rows, torch.tensor([0.25, 0.75]).expand(2, 3, 2))


@pytest.mark.parametrize(
    "error, match, arguments",
    [
        (ValueError, r"EnsembleLogits: members must be at least one, got none", dict(members=())),
        (ValueError, r"EnsembleLogits: space must be one of logit, prob, got 'log'", dict(space="log")),
        (
            TypeError,
            r"EnsembleLogits: members\[1\] must be a tensor or LinearLogits, got list",
            dict(members=(torch.zeros(2, V), [1.0])),
        ),
        (
            TypeError,
            r"EnsembleLogits: members\[0\] must be a tensor or LinearLogits, got SparseTargets",
            dict(members=(SparseTargets(**fields()),)),
        ),
        (
            ValueError,
            r"EnsembleLogits: members\[1\] must be of \[2\] rows like members\[0\], got \[3\]",
            dict(members=(torch.zeros(2, V), torch.zeros(3, V))),
        ),
        (
            ValueError,
            r"EnsembleLogits: members\[1\] must be of V=9 like members\[0\], got 8; give the padded ones valid_vocab",
            dict(members=(torch.zeros(2, V), torch.zeros(2, 8))),
        ),
        (
            ValueError,
            r"EnsembleLogits: members\[1\] must be on cpu, like the rest, got meta",
            dict(members=(torch.zeros(2, V), torch.zeros(2, V, device="meta"))),
        ),
        (
            TypeError,
            r"EnsembleLogits: members\[0\] must be of dtype .*, got torch.int64",
            dict(members=(torch.zeros(2, V).long(),)),
        ),
        (
            ValueError,
            r"EnsembleLogits: weights must be one number for each of 1 members, got 2",
            dict(weights=(1.0, 2.0)),
        ),
        (ValueError, r"EnsembleLogits: weights must be finite and greater than 0, got 0.0", dict(weights=(0.0,))),
        (TypeError, r"EnsembleLogits: weights must be a number, got str", dict(weights=("1",))),
        (
            ValueError, r"EnsembleLogits: weights must be of shape \[2, 1\], got \[2, 3\]",
            dict(weights=torch.ones(2, 3)),
        ),
        (
            TypeError, r"EnsembleLogits: weights must be of dtype .*, got torch.int64",
            dict(weights=torch.ones(2, 1).long()),
        ),
        (
            ValueError, r"EnsembleLogits: weights must be on cpu, like the rest, got meta",
            dict(weights=torch.ones(2, 1, device="meta")),
        ),
    ],
)
def test_ensemble_refuses(error: type[Exception], match: str, arguments: dict) -> None:
    with refuses(error, match):
        EnsembleLogits(**{"members": (torch.zeros(2, V),), **arguments})
