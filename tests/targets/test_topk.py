"""topk_targets against the float64 oracle: ids exactly, log-probabilities and tails as well as plain torch."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from kd_kernels import products, testing
from kd_kernels.logits import SparseTargets
from kd_kernels.targets import config, topk_targets

VOCABS = (1, 5, 16, 17, 1000, 4099)  # below, at and above a vector, and above a panel


def expected(logits: Tensor, k: int, mass: float | None = None) -> list[oracles.Row]:
    """The oracle's rows, without the ids that are masked: it keeps those where there are fewer than k others."""
    rows = []
    for row in logits:
        finite = int((row > -torch.inf).sum())
        (kept,) = oracles.topk(row[None], min(k, finite), mass)
        if len(kept.ids) == finite:
            kept.tail_logprob = torch.tensor(-torch.inf, dtype=logits.dtype)
        rows.append(kept)
    return rows


def assert_targets(targets: SparseTargets, logits: Tensor, k: int, mass: float | None = None) -> None:
    """``logits`` ``[N, V]`` are those that the targets were made of."""
    truth, plain = expected(logits.double(), k, mass), expected(logits, k, mass)
    assert_rows(targets, logits, truth, plain)


def assert_rows(targets: SparseTargets, logits: Tensor, truth: list[oracles.Row], plain: list[oracles.Row]) -> None:
    assert targets.offsets.diff().tolist() == [len(row.ids) for row in truth]
    assert targets.ids.tolist() == [i for row in truth for i in row.ids.tolist()]
    for i, (row, yardstick) in enumerate(zip(truth, plain)):
        entries = slice(targets.offsets[i], targets.offsets[i + 1])
        unit = logits[i][logits[i] > -torch.inf].double().abs().amax()  # what a difference of two logits is exact to
        for name, actual, near, true in (
            ("logprobs", targets.logprobs[entries], yardstick.logprobs, row.logprobs),
            ("tail", targets.tail_logprob[i, None], yardstick.tail_logprob[None], row.tail_logprob[None]),
        ):
            testing.assert_as_good(actual, near, true, unit=unit, what=f"{name} of row {i}")


@functools.cache
def case(kind: str, vocab: int, k: int) -> tuple[Tensor, list[oracles.Row], list[oracles.Row]]:
    """Logits, truth and yardstick, once for all backends."""
    _, logits = testing.logits_pair(kind, 2, vocab)
    return logits, expected(logits.double(), k), expected(logits, k)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", ["uniform", "peaked", "near_0.3", "masked", "shifted", "one_hot", "padded"])
def test_topk_is_the_oracles(kind: str, vocab: int, backend: str) -> None:
    for k in (1, 7, 64, 65_535):
        logits, truth, plain = case(kind, vocab, k)
        assert_rows(topk_targets(logits, k, backend=backend), logits, truth, plain)


@pytest.mark.parametrize("k", [600, 3000])
def test_topk_with_more_entries_than_the_first_bound_sees(k: int, backend: str) -> None:
    _, logits = testing.logits_pair("near_0.3", 1, 20_011)
    assert_targets(topk_targets(logits, k, backend=backend), logits, k)


@pytest.mark.parametrize("order", ["rising", "falling", "constant", "late"])
def test_topk_of_ordered_rows(order: str, backend: str) -> None:
    """Every column is a candidate, or none after the first; or the best come last."""
    vocab = 9001
    steps = torch.arange(vocab, dtype=torch.float32) / 512
    logits = {
        "rising": steps, "falling": -steps, "constant": torch.full((vocab,), -2.5),
        "late": torch.where(torch.arange(vocab) > vocab - 40, steps, -30.0 - steps / 64),
    }[order][None]
    for k in (1, 50, 700):
        assert_targets(topk_targets(logits, k, backend=backend), logits, k)


@settings(max_examples=60)
@given(data=st.data())
def test_topk_breaks_ties_to_the_lower_id(backend: str, data: st.DataObject) -> None:
    """Few distinct values, zeros of both signs, masked ids."""
    values = torch.tensor([-math.inf, -3.0, -0.0, 0.0, 0.5, 2.0])
    row = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=300).filter(any))
    logits = values[torch.tensor(row)][None]
    k = data.draw(st.integers(1, 40))
    mass = data.draw(st.sampled_from([None, 0.3, 0.77]))
    targets = topk_targets(logits, k, mass=mass, backend=backend)
    order = sorted((v for v in range(len(row)) if row[v] > 0), key=lambda v: (-float(logits[0, v]), v))[:k]
    assert targets.ids.tolist() == order[: len(targets.ids)]
    if mass is None:
        assert len(targets.ids) == len(order)


@pytest.mark.parametrize("mass", [1e-6, 0.5, 0.9, 1.0])
def test_topk_stops_at_the_mass(mass: float, backend: str) -> None:
    _, logits = testing.logits_pair("near_0.3", 4, 300)
    for k in (1, 20, 300):
        targets = topk_targets(logits, k, mass=mass, backend=backend)
        if mass < 1.0:
            assert_targets(targets, logits, k, mass)
        total = targets.tail_logprob.double().exp()
        total.index_add_(0, targets.row_of_entry(), targets.logprobs.double().exp())
        torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64))
        assert targets.offsets.diff().min() >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_knows_the_normaliser_at_every_temperature(dtype: torch.dtype, backend: str) -> None:
    temperatures = (0.25, 1.0, 2.0, 7.5)
    for kind in ("peaked", "near_0.3", "masked", "shifted"):
        _, logits = testing.logits_pair(kind, 3, 4099, dtype)
        targets = topk_targets(logits, 16, temperatures=temperatures, backend=backend)
        assert targets.temperatures == temperatures
        assert (targets.log_z[:, 1] == 0).all()
        truth, plain = oracles.log_z(logits.double(), temperatures), oracles.log_z(logits, temperatures)
        testing.assert_as_good(targets.log_z, plain, truth, unit=logits.nan_to_num(neginf=0).abs().amax(), what=kind)
        # Which makes the tail of the truncated row as good at another temperature as that of the full row.
        tempered = targets.at_temperature(2.0)
        dense = torch.log_softmax(logits.double() / 2.0, -1)
        kept = dense.gather(1, tempered.ids.reshape(3, 16))
        torch.testing.assert_close(tempered.logprobs.double().reshape(3, 16), kept, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("peak", [5, 4500, 8999])
def test_topk_tail_is_exact_far_below_the_smallest_float(peak: int, backend: str) -> None:
    """A tail of e^-190 has no fp32 probability, but it has a logarithm; wherever in the row the peak is."""
    logits = torch.zeros(1, 9000)
    logits[0, peak] = 200.0
    targets = topk_targets(logits, 1, temperatures=(1.0, 10.0), backend=backend)
    assert targets.ids.tolist() == [peak]
    assert targets.tail_logprob.item() == pytest.approx(math.log(8999) - 200.0, rel=1e-6)
    rounding = 2.5e-7 if backend == "triton" else 0.0  # its sums are fp32: of 1.00002, the digits past 1e-7 are gone
    assert targets.log_z[0, 1].item() == pytest.approx(math.log1p(8999 * math.exp(-20.0)), rel=1e-4, abs=rounding)
    two = topk_targets(logits, 2, backend=backend)
    assert two.ids.tolist() == [peak, 0]
    assert two.tail_logprob.item() == pytest.approx(math.log(8998) - 200.0, rel=1e-6)


def test_topk_with_nothing_left_has_no_tail(backend: str) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf], [0.0, 1.0, 2.0, 3.0]])
    targets = topk_targets(logits, 4, backend=backend)
    assert targets.offsets.tolist() == [0, 2, 6]
    assert targets.ids.tolist() == [2, 0, 3, 2, 1, 0]
    assert targets.tail_logprob.tolist() == [-math.inf, -math.inf]
    assert topk_targets(logits, 2, backend=backend).tail_logprob[1] > -math.inf


@pytest.mark.parametrize("k", [1, 64, 5000])
def test_backends_agree_on_the_ids(k: int) -> None:
    logits = torch.randn(9, 12_345, generator=torch.Generator().manual_seed(1)).mul(4).round(decimals=1)
    cpp, reference = (topk_targets(logits, k, backend=b) for b in ("cpp", "reference"))
    assert torch.equal(cpp.offsets, reference.offsets) and torch.equal(cpp.ids, reference.ids)
    torch.testing.assert_close(cpp.logprobs, reference.logprobs, rtol=0, atol=2e-6)


def test_topk_does_not_depend_on_threads_or_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    _, logits = testing.logits_pair("near_0.3", 11, 10_007)
    whole = topk_targets(logits, 33, temperatures=(1.0, 3.0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = topk_targets(logits, 33, temperatures=(1.0, 3.0))
    finally:
        torch.set_num_threads(threads)
    for field in ("ids", "logprobs", "tail_logprob", "log_z"):
        assert torch.equal(getattr(whole, field), getattr(single, field))
    for columns in (97, 1030, 10_007):
        monkeypatch.setattr(products, "panel_columns", lambda rows, vocab, columns=columns: min(vocab, columns))
        monkeypatch.setattr(products, "panel_rows", lambda rows, fitting: 4)
        panels = topk_targets(logits, 33, temperatures=(1.0, 3.0))
        assert torch.equal(panels.ids, whole.ids)
        for field in ("logprobs", "tail_logprob", "log_z"):
            torch.testing.assert_close(getattr(panels, field), getattr(whole, field), rtol=1e-6, atol=1e-6)


def test_panels_hold_a_million_logits_and_cover_the_rows_evenly() -> None:
    columns = {0: 16_384, 1: 16_384, 64: 16_384, 256: 4096, 512: 2048, 10**6: 2048}
    assert {rows: products.panel_columns(rows, 151_936) for rows in columns} == columns
    assert products.panel_columns(256, 1000) == 1000
    assert [products.panel_rows(rows, 10**9) for rows in (0, 1, 1024, 1025, 3000)] == [1, 1, 1024, 513, 1000]
    assert products.panel_rows(1000, 300) == 250


def test_groups_and_launches_of_the_triton_kernels() -> None:
    columns = {
        (1, 1): 16, (128_256, 1): 256, (128_256, 64): 32, (151_936, 1024): 16, (1 << 24, 1): 512, (1 << 24, 65_535): 16
    }
    assert {case: config.group_columns(*case) for case in columns} == columns
    for warp_size in (32, 64):
        for n in (1, 512, 513, 4008, 16_384, 16_385, 1 << 20):
            launches = [
                launch(n, warp_size) for launch in (config.group_launch, config.select_launch, config.write_launch)
            ]
            assert all(1 <= launch.num_warps * warp_size <= 512 for launch in launches)
            assert min(
                n,
                config.MAX_TILE,
            ) <= launches[1].tile <= config.MAX_TILE and launches[1].tile >= launches[1].block
            assert launches[0].block >= max(config.group_columns(1 << 24, 1), min(n, 4096))


def test_topk_is_bit_for_bit_repeatable() -> None:
    _, logits = testing.logits_pair("peaked", 5, 6000)
    first, second = topk_targets(logits, 40), topk_targets(logits, 40)
    assert torch.equal(first.logprobs, second.logprobs) and torch.equal(first.tail_logprob, second.tail_logprob)
