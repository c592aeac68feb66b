"""What is particular to the Triton kernels of topk_targets: groups, selections in pieces, sums that never see one minus
the rest."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracles
from kd_kernels.logits import LinearLogits, SparseTargets
from kd_kernels.targets import config, topk_targets

pytestmark = pytest.mark.interpret

LEAST = torch.finfo(torch.float32).min


def noise(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return 3.0 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def assert_agrees(logits: Tensor, k: int, **options: object) -> SparseTargets:
    """The entries of the reference, tie by tie, and its numbers."""
    actual = topk_targets(logits, k, backend="triton", **options)  # type: ignore[arg-type]
    expected = topk_targets(logits, k, backend="reference", **options)  # type: ignore[arg-type]
    assert torch.equal(actual.offsets, expected.offsets) and torch.equal(actual.ids, expected.ids)
    for field in ("logprobs", "tail_logprob", "log_z"):
        torch.testing.assert_close(getattr(actual, field), getattr(expected, field), rtol=1e-6, atol=2e-6)
    return actual


@pytest.mark.parametrize("vocab", [1, 2, 37, 1031, 3001])
def test_entries_are_the_references(vocab: int) -> None:
    """Rounded to quarters, most logits have an equal somewhere: inside their group, and in others."""
    plain = noise(2, vocab)
    rounded = (plain * 4).round() / 4
    masked = rounded.masked_fill(torch.arange(vocab) % 3 == 1, -torch.inf)
    rows = torch.cat([plain, rounded, masked, torch.zeros(1, vocab), torch.arange(vocab)[None] / -64.0])
    for k in (1, 5, 40, 1000):
        assert_agrees(rows, k, temperatures=(1.0, 0.25, 2.0))


@pytest.mark.parametrize("k", [1, 15, 16, 17, 33, 100])
def test_ties_between_groups_go_to_the_lower_id(k: int) -> None:
    """The same number in every group of 16, and twice in some: the groups themselves are tied at the k-th place."""
    row = torch.full((1000,), -1.0)
    row[7::16] = 2.0
    row[500::37] = 2.0
    targets = assert_agrees(row[None], k)
    largest = (row == 2.0).nonzero()[:, 0]
    assert targets.ids.tolist() == [*largest.tolist(), *(row < 2.0).nonzero()[:, 0].tolist()][:k]


@pytest.mark.parametrize("kept", [1, 3, 70])
def test_row_of_few_finite_logits(kept: int) -> None:
    row = torch.full((2, 2000), -torch.inf)
    places = torch.randperm(2000, generator=torch.Generator().manual_seed(1))[:kept]
    row[0, places], row[1, 1999 - places] = noise(1, kept)[0], -0.0
    for k in (1, 64, 1999):
        targets = assert_agrees(row, k)
        assert targets.offsets.diff().tolist() == [min(k, kept)] * 2


def test_masks_that_are_the_least_number_are_logits() -> None:
    """Models mask with finfo.min: it ranks below all others and above -inf, and alone it is a uniform row."""
    row = noise(1, 300)
    row[:, ::2], row[:, ::5] = LEAST, -torch.inf
    assert_agrees(row, 20)
    uniform = topk_targets(torch.full((1, 300), LEAST), 20, backend="triton")
    assert uniform.ids.tolist() == list(range(20))
    torch.testing.assert_close(uniform.logprobs, torch.full((20,), -math.log(300)))
    assert uniform.tail_logprob.item() == pytest.approx(math.log(280 / 300), rel=1e-5)


@pytest.mark.parametrize(("vocab", "k"), [(5003, 200), (9000, 1), (4099, 4099)])
@pytest.mark.parametrize("kind", ["noise", "ties", "rising"])
def test_selection_beyond_the_registers(kind: str, vocab: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most keys are read anew at every step, as where V k is beyond 2^27."""
    row = {"noise": noise(1, vocab), "ties": noise(1, vocab).round(), "rising": torch.arange(vocab)[None] / 256.0}[kind]
    whole = topk_targets(row, k, backend="triton")
    monkeypatch.setattr(config, "MAX_TILE", 512)
    monkeypatch.setattr(config, "group_columns", lambda vocab, k: 16)
    assert torch.equal(assert_agrees(row, k).ids, whole.ids)


@pytest.mark.parametrize("group", [16, 128, 512])
def test_any_size_of_group_gives_the_same_entries(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.cat([noise(1, 3001), noise(1, 3001).round()])
    monkeypatch.setattr(config, "group_columns", lambda vocab, k: group)
    for k in (1, 9, 150):
        assert_agrees(rows, k, temperatures=(1.0, 3.0))


@pytest.mark.parametrize("mass", [None, 0.999])
@pytest.mark.parametrize("depth", [30.0, 80.0, 200.0])
def test_tail_keeps_its_digits_far_below_the_mass(depth: float, mass: float | None) -> None:
    """What is left out: most columns of the groups that are kept, and all other groups; with ``mass`` kept entries as
    well."""
    logits = noise(1, 2000, seed=2) / 3.0 - depth
    logits[0, [3, 4, 900, 1999]] = torch.tensor([1.0, 1.5, -0.5, 0.0])
    k = 4 if mass is None else 20
    targets = topk_targets(logits, k, mass=mass, backend="triton")
    (truth,) = oracles.truncate(logits.double(), [targets.ids])
    assert len(targets.ids) == 4
    assert -depth < truth.tail_logprob.item() < 10 - depth
    # In nats: a logit is known to 6e-8 of its size, and so is all that follows from it.
    assert targets.tail_logprob.item() == pytest.approx(truth.tail_logprob.item(), abs=1e-7 * depth + 5e-7)


@pytest.mark.parametrize("mass", [1e-6, 0.4, 0.9])
def test_mass_over_more_entries_than_are_written_at_a_time(mass: float) -> None:
    assert_agrees(noise(2, 3001, seed=4), 2500, mass=mass)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_read_in_their_own_dtype_and_no_further_than_they_go(dtype: torch.dtype) -> None:
    """Around the rows there is NaN: in the columns past V, and before the first."""
    base = torch.full((4, 1100), torch.nan, dtype=dtype)
    base[:, 7:1038] = noise(4, 1031).to(dtype)
    view = base[:, 7:1038]
    assert_agrees(view, 30, temperatures=(1.0, 2.0))
    assert_agrees(view.t().contiguous().t(), 30)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_chunks_and_maps_change_no_entry(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(6)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((7, 16), (600, 16), (600,)))
    noun = LinearLogits(hidden, weight, bias, scale=0.7, softcap=softcap, valid_vocab=590)
    dense = oracles.linear(hidden, weight, bias, 0.7, softcap, 590)
    whole = topk_targets(noun, 12, temperatures=(2.0,), backend="triton")
    pieces = topk_targets(noun, 12, temperatures=(2.0,), max_scratch_bytes=9000, backend="triton")
    for field in ("offsets", "ids", "logprobs", "tail_logprob", "log_z"):
        torch.testing.assert_close(getattr(pieces, field), getattr(whole, field), rtol=1e-6, atol=1e-6)
    for row, kept in zip(oracles.topk(dense.double(), 12), whole.ids.reshape(7, 12)):
        assert torch.equal(kept, row.ids)


@pytest.mark.parametrize(("logits", "error", "message"), [
    (
        torch.zeros(2, 9, dtype=torch.float64), TypeError,
        r'of dtype float32, .* for backend="triton", got torch.float64'
    ),
    (
        torch.zeros(1, 1).expand(1, (1 << 24) + 1), ValueError,
        r'the vocabulary must be at most 16777216 for backend="triton"'
    ),
])
def test_what_the_kernels_do_not_take(logits: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="topk_targets: .*" + message):
        topk_targets(logits, 2, backend="triton")
