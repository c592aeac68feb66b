"""What is particular to the Triton kernels of sample: groups cut by tiles, filters that search instead of sorting."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_kernels import LinearLogits, Sampled, SparseTargets, accept_or_resample, products, sample, sampled_targets
from kd_kernels.sampling import config
from sampling_judge import assert_samples

triton_impl = pytest.importorskip("kd_kernels.sampling.triton_impl", reason="triton is not installed")
pytestmark = pytest.mark.interpret

LEAST = torch.finfo(torch.float32).min
FIELDS = ("logprobs", "model_logprobs", "entropy", "lse")


def eighths(rows: int, vocab: int, seed: int = 0) -> Tensor:
    """What every product and cast keeps; many are equal."""
    return torch.randint(-60, 60, (rows, vocab), generator=torch.Generator().manual_seed(seed)) / 8


def place(rows: int) -> dict[str, Tensor]:
    return {"seed": torch.arange(rows) * 7, "keys": torch.arange(rows) * -(10**12), "positions": torch.arange(rows) + 5}


def assert_agrees(logits, **arguments: object) -> Sampled:
    """The ids of the reference, and its numbers."""
    ours, expected = (sample(logits, return_stats=True, **arguments, backend=name) for name in ("triton", "reference"))
    assert torch.equal(ours.ids, expected.ids)
    for field in FIELDS:
        torch.testing.assert_close(getattr(ours, field), getattr(expected, field), rtol=2e-6, atol=2e-6)
    return ours


def assert_equal(one: Sampled, other: Sampled) -> None:
    for field in dataclasses.fields(one):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


FILTERS = [
    {"top_k": 1}, {"top_k": 17}, {"top_k": 900}, {"top_p": 0.0}, {"top_p": 0.3}, {"top_p": 0.97}, {"min_p": 0.02},
    {"min_p": 1.0}, {"top_k": 300, "top_p": 0.7, "min_p": 0.001}, {"top_p": 0.999, "temperature": 4.0},
]


@pytest.mark.parametrize("arguments", FILTERS, ids=str)
def test_filters_keep_the_ids_of_the_reference(arguments: dict) -> None:
    """Among them rows without a tie, without anything but ties, and with masks."""
    rows = eighths(5, 1030)
    rows[1] = torch.arange(1030) / -64
    rows[2] = 0.0
    rows[3, ::2] = -torch.inf
    rows[4, 130:] = -torch.inf
    assert_agrees(rows, **place(5), **arguments)


@settings(max_examples=6)
@given(data=st.data())
def test_filtered_draws_are_the_oracles_by_search(data: st.DataObject) -> None:
    """Few distinct values, so that ties decide; every row with arguments of its own."""
    vocab = data.draw(st.sampled_from([1, 60, 128, 300]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    values = torch.tensor([-math.inf, -6.0, -3.0, -0.0, 0.0, 0.5, 2.0, 4.0])
    logits = values[torch.randint(0, 8, (2, vocab), generator=generator)]
    logits[:, vocab // 2] = 1.0
    draw = lambda *options: [data.draw(st.sampled_from(options)) for _ in range(2)]  # noqa: E731
    arguments = {
        "top_k": draw(1, 7, 40, 1 << 40), "top_p": draw(0.05, 0.5, 0.999, 1.0), "min_p": draw(0.0, 0.01, 0.3),
        "temperature": draw(0.0, 1e-30, 0.5, 3.0, math.inf),
    }
    assert_samples(logits, [3, -4], [5, 1 << 40], [0, 9], arguments, backend="triton")


@pytest.mark.parametrize("arguments", [{}, {"temperature": 0.6}, {"top_p": 0.6, "top_k": 500}], ids=str)
def test_tiles_chunks_and_orders_change_no_bit(arguments: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, at = eighths(4, 1500, seed=3), place(4)
    options = dict(**arguments, return_stats=True, backend="triton")
    draw = lambda z, at, **more: sample(z, **at, **options, **more)  # noqa: E731
    whole = draw(logits, at)
    assert_equal(whole, draw(logits, at, max_scratch_bytes=4000))
    order = torch.tensor([2, 0, 3, 1])
    moved = draw(logits[order], {name: x[order] for name, x in at.items()})
    assert_equal(Sampled(*(getattr(whole, f.name)[order] for f in dataclasses.fields(whole))), moved)
    monkeypatch.setattr(config, "group_launch", lambda vocab, warp_size: config.Launch(128, 1))
    for launch in ("race_launch", "draw_launch"):
        monkeypatch.setattr(config, launch, lambda n_groups, warp_size: config.Launch(8, 1))
    monkeypatch.setattr(config, "MEMBERS", 256)
    tiled = draw(logits, at)
    assert torch.equal(tiled.ids, whole.ids)
    for field in FIELDS:  # what is added across groups is no contract
        torch.testing.assert_close(getattr(tiled, field), getattr(whole, field), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_read_in_their_own_dtype_and_no_further_than_they_go(dtype: torch.dtype) -> None:
    base = torch.full((3, 700), torch.nan, dtype=dtype)
    base[:, 7:612] = eighths(3, 605).to(dtype)
    assert_agrees(base[:, 7:612], **place(3))
    assert_agrees(base[:, 7:612].t().contiguous().t(), **place(3), top_p=0.5)


def test_maps_of_a_head() -> None:
    generator = torch.Generator().manual_seed(6)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((3, 16), (600, 16), (600,)))
    noun = LinearLogits(hidden, weight, bias, scale=0.7, softcap=4.0, valid_vocab=590)
    assert_agrees(noun, **place(3), temperature=torch.tensor([0.5, 1.0, 0.0]), top_k=50)


def few_rows(rows: int, dtype: torch.dtype, vocab: int = 300, width: int = 70, **options: object) -> LinearLogits:
    """Of products that are small whole numbers, exact in any order; no tile divides anything."""
    generator = torch.Generator().manual_seed(rows)
    whole = lambda *shape: torch.randint(-1, 2, shape, generator=generator).to(dtype)  # noqa: E731
    return LinearLogits(whole(rows, width), whole(vocab, width), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 17])
def test_a_head_of_few_rows_is_one_kernel(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what the product and the pass over it give."""
    noun = few_rows(rows, dtype, bias=torch.arange(300).to(dtype) / 512, scale=0.25, softcap=8.0, valid_vocab=290)
    arguments = dict(**place(rows), return_stats=True, temperature=torch.linspace(0, 2, rows), backend="triton")
    fused, filtered = sample(noun, **arguments), sample(noun, **arguments, min_p=0.1)
    assert launched_fused(noun, rows)
    monkeypatch.setattr(config, "MAX_FUSED_ROWS", 0)
    assert not launched_fused(noun, rows)
    assert_equal(fused, sample(noun, **arguments))
    assert_equal(filtered, sample(noun, **arguments, min_p=0.1))


def launched_fused(noun: LinearLogits, rows: int) -> bool:
    return triton_impl.fuses(products.source(noun, None, torch.float32), rows)


def test_what_is_not_one_kernel() -> None:
    assert not launched_fused(few_rows(4, torch.float32), 4)
    assert not launched_fused(few_rows(65, torch.bfloat16), 65)
    turned = few_rows(4, torch.bfloat16)
    assert not launched_fused(dataclasses.replace(turned, weight=turned.weight.t().contiguous().t()), 4)
    assert not triton_impl.fuses(products.source(eighths(4, 300), None, torch.float32), 4)


def test_a_chunk_of_picked_rows_of_a_head() -> None:
    """Rows that were refused, as accept_or_resample draws them: the fused kernel sees those alone."""
    noun = few_rows(9, torch.bfloat16)
    drafts = torch.arange(9)
    ours, theirs = (
        accept_or_resample(drafts, noun, k=100, **place(9), backend=name) for name in ("triton", "reference")
    )
    assert torch.equal(ours.ids, theirs.ids) and 0 < int(ours.accepted.sum()) < 9


@pytest.mark.parametrize("arguments", [{}, {"certain": 40, "proposal_temperature": 1.6}], ids=str)
def test_targets_are_those_of_the_reference_in_any_tile_chunk_and_order(
    arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with masks, with ties alone, and with fewer ids than are certain."""
    rows, at = eighths(4, 400).bfloat16(), place(4)
    rows[1, ::2], rows[2], rows[3, 30:] = -torch.inf, 0.0, -torch.inf

    def draw(z, at, backend="triton", **more):
        return sampled_targets(z, 6, **at, **arguments, backend=backend, **more)

    whole, expected = draw(rows, at), draw(rows, at, "reference")
    assert torch.equal(whole.offsets, expected.offsets) and torch.equal(whole.ids, expected.ids)
    torch.testing.assert_close(whole.logprobs, expected.logprobs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(whole.importance, expected.importance, rtol=4e-6, atol=0)
    order = torch.tensor([2, 0, 3, 1])
    moved = draw(rows[order], {name: x[order] for name, x in at.items()}, max_scratch_bytes=10_000)
    assert_same_targets(whole.select(order), moved)
    monkeypatch.setattr(config, "DRAWS", 16)
    monkeypatch.setattr(config, "MEMBERS", 256)
    monkeypatch.setattr(config, "race_launch", lambda n_groups, warp_size: config.Launch(8, 1))
    assert torch.equal(draw(rows, at).ids, whole.ids)


def assert_same_targets(one: SparseTargets, other: SparseTargets) -> None:
    for name in ("offsets", "ids", "logprobs", "importance"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_masks_that_are_the_least_number_are_logits() -> None:
    row = torch.full((1, 300), LEAST)
    found = assert_agrees(row, seed=1)
    torch.testing.assert_close(found.logprobs, torch.full((1,), -math.log(300)))
    row[0, 77] = 3.0
    assert assert_agrees(row, seed=1, top_p=0.9).ids.item() == 77


@pytest.mark.parametrize(("logits", "error", "message"), [
    (torch.zeros(2, 9).double(), TypeError, r'of dtype float32, .* for backend="triton", got torch.float64'),
    (torch.zeros(1, 1).expand(1, (1 << 24) + 1), ValueError, r'at most 16777216 for backend="triton"'),
])
def test_what_the_kernels_of_sample_do_not_take(logits: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="sample: .*" + message):
        sample(logits, seed=0, backend="triton")
