"""token_stats against the float64 oracle: places exactly, the rest as well as plain torch."""

from __future__ import annotations

import functools
import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from kd_kernels import LinearLogits, kd_loss, testing, token_stats, topk_targets
from kd_kernels.products import RawRows
from kd_kernels.stats.reference import RowStats
from stats_judge import NUMBERS, PLACES, assert_stats, assert_stats_of, of_logits

VOCABS = (1, 5, 17, 511, 512, 513, 2049, 4099)  # below, at and above the blocks of either kernel


@functools.cache
def case(kind: str, vocab: int) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits, ids, truth and yardstick, once for all backends. The ids: the likeliest, the last, and any."""
    _, logits = testing.logits_pair(kind, 3, vocab)
    ids = torch.tensor([int(logits[0].argmax()), vocab - 1, 7919 % vocab])
    return logits, ids, of_logits(logits, ids, torch.float64), of_logits(logits, ids, torch.float32)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", [kind for kind in testing.LOGITS if kind not in ("equal", "near_0.1", "near_0.03")])
def test_stats_are_the_oracles(kind: str, vocab: int, backend: str) -> None:
    logits, ids, truth, plain = case(kind, vocab)
    stats = token_stats(logits, ids, backend=backend)
    assert stats.in_top_k is None
    assert_stats(stats, truth, plain)


@settings(max_examples=60)
@given(data=st.data())
def test_equal_logits_rank_by_id(backend: str, data: st.DataObject) -> None:
    """Few distinct values, zeros of both signs, masked ids; every id of the row in turn."""
    values = torch.tensor([-math.inf, -3.0, -0.0, 0.0, 0.5, 2.0])
    drawn = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=40).filter(any))
    row = values[torch.tensor(drawn)]
    ids, k = torch.arange(len(row)), data.draw(st.integers(1, 45))
    logits = row.expand(len(row), -1)
    stats = token_stats(logits, ids, k=k, backend=backend)
    assert_stats_of(stats, logits, ids)
    assert sorted(stats.rank.tolist()) == ids.tolist()
    kept = set(topk_targets(row, k, backend="reference").ids.tolist())
    finite = (row > -torch.inf).tolist()
    assert [i for i in ids.tolist() if stats.in_top_k[i] and finite[i]] == sorted(kept)


@pytest.mark.parametrize("vocab", [700, 4500])
@pytest.mark.parametrize("k", [1, 16, 600])
def test_in_top_k_is_membership_in_topk_targets(vocab: int, k: int, backend: str) -> None:
    """Of rounded logits, which are equal in places; the ids around the k-th place are the ones in doubt."""
    _, logits = testing.logits_pair("near_0.3", 1, vocab)
    logits = logits.round(decimals=1)
    places = torch.arange(max(0, k - 4), min(k + 4, vocab))
    ids = logits[0].sort(descending=True, stable=True).indices[places]
    stats = token_stats(logits.expand(len(ids), -1), ids, k=k, backend=backend)
    kept = topk_targets(logits, k, backend="reference").ids
    assert torch.equal(stats.rank, places)
    assert torch.equal(stats.in_top_k, torch.isin(ids, kept)) and stats.in_top_k.dtype == torch.bool


@pytest.mark.parametrize("softcap", [None, 4.0, 0.5])
def test_an_id_never_loses_against_itself(softcap: float | None, backend: str) -> None:
    """Ranks of all ids of a row are a permutation: after bias, scale and a softcap that makes neighbours equal, too.

    All rows have the same logits: the products are of whole numbers, and exact in any order."""
    generator = torch.Generator().manual_seed(0)
    whole = lambda *shape: torch.randint(-3, 4, shape, generator=generator).float()  # noqa: E731
    vocab = 150 if backend == "triton" else 2100  # a program a row: the interpreter takes its time
    bias = torch.randn(vocab, generator=generator)
    noun = LinearLogits(whole(1, 5).expand(vocab, 5), whole(vocab, 5), bias, 0.37, softcap)
    stats = token_stats(noun, torch.arange(vocab), backend=backend)
    assert sorted(stats.rank.tolist()) == list(range(vocab))
    assert int(stats.argmax[0]) == int(stats.rank.argmin())
    assert (stats.logprob[stats.rank.argsort()].diff() <= 0).all()
    assert float(stats.logprob[stats.argmax[0]]) == pytest.approx(float((stats.max - stats.lse)[0]), abs=1e-5)


@pytest.mark.parametrize("peak", [5, 4500, 8999])
def test_far_tails_and_far_offsets_keep_their_digits(peak: int, backend: str) -> None:
    logits = torch.zeros(2, 9000)
    logits[:, peak] = 200.0
    stats = token_stats(logits + 1e5, torch.tensor([peak, 17]), backend=backend)
    assert stats.logprob.tolist() == [0.0, -200.0]
    assert stats.max.tolist() == [100_200.0] * 2 and stats.lse.tolist() == [100_200.0] * 2
    assert stats.argmax.tolist() == [peak] * 2 and stats.rank.tolist() == [0, 1 + 17 - (peak < 17)]
    expected = 8999 * math.exp(-200.0) * 200.0  # 2e-81: nothing in fp32
    assert stats.entropy.tolist() == pytest.approx([expected] * 2, abs=1e-37)


@pytest.mark.parametrize("order", ["rising", "falling", "constant", "late"])
def test_ordered_rows(order: str, backend: str) -> None:
    """The maximum rises at every block, or never; or it comes last, from far below."""
    vocab = 5003
    steps = torch.arange(vocab, dtype=torch.float32) / 512
    row = {
        "rising": steps, "falling": -steps, "constant": torch.full((vocab,), -2.5),
        "late": torch.where(torch.arange(vocab) > vocab - 40, steps, -90.0 - steps / 64),
    }[order]
    ids = torch.tensor([0, 2047, 2048, vocab - 1])
    assert_stats_of(token_stats(row.expand(4, -1), ids, backend=backend), row.expand(4, -1), ids)


def test_masked_ids_and_masked_blocks(backend: str) -> None:
    """Whole blocks of -inf before the first logit, and between two; an id that is masked itself."""
    logits = torch.full((4, 6000), -torch.inf)
    logits[:, 2500:2503] = torch.tensor([1.0, 3.0, 2.0])
    logits[:, 5999] = 3.0
    ids = torch.tensor([2501, 5999, 0, 4000])
    stats = token_stats(logits, ids, k=2, backend=backend)
    assert_stats_of(stats, logits, ids)
    assert stats.rank.tolist() == [0, 1, 4, 4 + 3997] and stats.argmax.tolist() == [2501] * 4
    assert stats.logprob[2:].tolist() == [-math.inf] * 2 and stats.in_top_k.tolist() == [True, True, False, False]


def test_logprob_is_kd_losss(backend: str) -> None:
    pair = testing.linear_pair(6, 900, 24, 24)
    noun = LinearLogits(pair.student_hidden, pair.student_weight, None, 0.7, 9.0, valid_vocab=850)
    ids = torch.tensor([0, 849, 3, 700, 12, 511])
    options = dict(kd_weight=0, ce_weight=1.0, reduction="none", stats=("label_logprob",), backend=backend)
    loss = kd_loss(noun, None, labels=ids, **options)
    stats = token_stats(noun, ids, backend=backend)
    torch.testing.assert_close(stats.logprob, loss.stats["label_logprob"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.logprob, -loss.loss, rtol=1e-6, atol=1e-6)


def test_backends_agree() -> None:
    logits = torch.randn(9, 12_345, generator=torch.Generator().manual_seed(1)).mul(4).round(decimals=1)
    ids = logits.argsort(descending=True)[:, 400]
    cpp, reference = (token_stats(logits, ids, backend=b) for b in ("cpp", "reference"))
    for name in PLACES:
        assert torch.equal(getattr(cpp, name), getattr(reference, name))
    for name in NUMBERS:
        torch.testing.assert_close(getattr(cpp, name), getattr(reference, name), rtol=1e-6, atol=1e-6)


def test_stats_do_not_depend_on_threads() -> None:
    _, logits = testing.logits_pair("near_0.3", 11, 10_007)
    ids = torch.arange(11) * 900
    whole, threads = token_stats(logits, ids), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = token_stats(logits, ids)
    finally:
        torch.set_num_threads(threads)
    for name in (*NUMBERS, *PLACES):
        assert torch.equal(getattr(whole, name), getattr(single, name)), name


IMPLEMENTATION = {"reference": "reference", "triton": "triton_impl"}
GOOD_ROW = [0.0, 1.0, 2.0, -1.0, 0.5]
BAD = torch.tensor([
    GOOD_ROW, GOOD_ROW, [0.0, torch.nan, 2.0, 9.0, 0.5], [0.0, 1.0, torch.inf, -1.0, 0.5], [-torch.inf] * 5, GOOD_ROW,
])


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=pytest.mark.interpret)])
def test_what_is_wrong_shows_where_nobody_checks(name: str) -> None:
    """As on a GPU, where nobody looks at a row before the results are there: NaN, and -1 for a place, in that row."""
    implementation = importlib.import_module(f"kd_kernels.stats.{IMPLEMENTATION[name]}")
    ids = torch.tensor([5, -1, 3, 3, 3, 0])
    out = RowStats(*(torch.zeros(6) for _ in NUMBERS), *(torch.zeros(6, dtype=torch.int64) for _ in PLACES))
    implementation.stat_rows(RawRows(BAD), ids, out)
    good = oracles.token_stats(BAD[5:].double(), torch.tensor([0]))
    assert out.logprob[:5].isnan().all() and out.rank.tolist() == [-1] * 5 + [3]
    assert out.argmax.tolist() == [2, 2, -1, -1, -1, 2]
    for field in ("lse", "entropy", "max"):
        values = getattr(out, field)
        assert values[2:5].isnan().all()
        torch.testing.assert_close(values[[0, 1, 5]].double(), good[field].expand(3), rtol=1e-6, atol=1e-6)
