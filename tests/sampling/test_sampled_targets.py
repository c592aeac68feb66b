"""Sampled targets: the draws of the contract, importance that is unbiased, and nothing of how the work was cut."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from kd_kernels import EnsembleLogits, LinearLogits, SparseTargets, kd_loss, sampled_targets, testing, topk_targets
from kd_kernels.sampling import philox, reference
from kd_kernels.testing import assert_as_good
from sampling_judge import far_apart
from test_distribution import g_test

DRAWS = (Path(philox.__file__).parent / "DRAWS.md").read_text()
ROW = (torch.arange(300) * 37 % 101).float() / 8
"""The row of the page's vectors."""


def signed(digits: str) -> int:
    return int(digits, 16) - (1 << 64 if int(digits, 16) >> 63 else 0)


def at(seed: int, key: int, position: int) -> dict:
    return dict(seed=seed, keys=torch.tensor([key]), positions=torch.tensor([position]))


def row_of(targets: SparseTargets, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and importance."""
    here = slice(int(targets.offsets[row]), int(targets.offsets[row + 1]))
    return targets.ids[here], targets.logprobs[here], targets.importance[here]


def assert_equal(one: SparseTargets, other: SparseTargets) -> None:
    for name in ("offsets", "ids", "logprobs", "importance"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


# ------------------------------------------------------------------------------------------------------- the contract


def test_the_pages_vectors(backend: str) -> None:
    vectors = re.findall(r"^\| (\w+) \| (\w+) \| (\d+) \| (\S+) \| (\d+) \| (\d+) \| ((?:\d+:\d+ ?)+) \|$", DRAWS, re.M)
    assert len(vectors) == 4
    for seed, key, position, temperature, certain, n, entries in vectors:
        place = oracles.Place(signed(seed), signed(key), int(position))
        times = {int(v): int(c) for v, c in (entry.split(":") for entry in entries.split())}
        drawn = oracles.sampled_targets(ROW.tolist(), place, int(n), float(temperature), int(certain))
        assert drawn.times == times
        found = sampled_targets(
            ROW[None], int(n), proposal_temperature=float(temperature), certain=int(certain),
            **at(place.seed, place.key, place.position), backend=backend,
        )
        ids, _, importance = row_of(found, 0)
        likeliest = ROW.argsort(descending=True, stable=True)[: int(certain)]
        assert importance[: int(certain)].tolist() == [1.0] * int(certain) and torch.equal(
            ids[: int(certain)], likeliest
        )
        for v, weight in zip(ids[int(certain) :].tolist(), importance[int(certain) :].tolist(), strict=True):
            assert weight == pytest.approx(times.pop(v) / (int(n) * drawn.proposal[v]), rel=1e-5)
        assert not times


def plain_importance(
    row: Tensor, times: dict[int, int], n: int, temperature: float, sure: list[int]
) -> dict[int, float]:
    """As one writes it in torch, in the dtype of the row."""
    left = row.index_fill(0, torch.tensor(sure, dtype=torch.int64), -math.inf)
    q = ((left - left.max()) / temperature).softmax(0)
    return {v: float(count / (n * q[v])) for v, count in times.items()} | dict.fromkeys(sure, 1.0)


def assert_targets(logits: Tensor, n: int, temperature: float, certain: int, seed: int, backend: str) -> int:
    """Every row is the oracle's, but for rows with a photo finish; returns how many were compared."""
    places = [oracles.Place(seed, 3 * i - 5, i) for i in range(len(logits))]
    found = sampled_targets(
        logits, n, proposal_temperature=temperature, certain=certain, seed=seed,
        keys=torch.tensor([p.key for p in places]),
        positions=torch.tensor([p.position for p in places]), backend=backend,
    )
    assert found.tail_logprob is None and found.temperatures == (1.0,)
    compared = 0
    for i, (row, place) in enumerate(zip(logits, places)):
        exact = row.double().tolist()
        drawn = oracles.sampled_targets(exact, place, n, temperature, certain)
        if drawn.lead < (1e-12 if logits.dtype == torch.float64 else 5e-7):
            continue
        compared += 1
        order = oracles.falling(exact)
        sure = [v for v in order if exact[v] > -math.inf][:certain]
        ids, logprobs, importance = row_of(found, i)
        assert ids.tolist() == [v for v in order if v in sure or v in drawn.times]
        truth = {v: c / (n * drawn.proposal[v]) for v, c in drawn.times.items()} | dict.fromkeys(sure, 1.0)
        near = plain_importance(row, drawn.times, n, temperature, sure)
        pick = lambda by_id: torch.tensor([by_id[v] for v in ids.tolist()], dtype=torch.float64)  # noqa: B023, E731
        # An importance is a weight: each is held to its own size.
        assert_as_good(
            importance[:, None], pick(near)[:, None].to(importance.dtype), pick(truth)[:, None], what="importance"
        )
        assert_as_good(logprobs, row.log_softmax(0)[ids], row.double().log_softmax(0)[ids], unit=1.0, what="logprobs")
    return compared


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 300, 1025])
@pytest.mark.parametrize("kind", ["uniform", "peaked", "near_0.3", "one_hot", "masked", "padded"])
def test_targets_are_the_oracles(kind: str, vocab: int, backend: str) -> None:
    for dtype in (torch.float32, torch.float64):
        _, logits = testing.logits_pair(kind, 4, vocab, dtype)
        compared = sum(
            assert_targets(logits, n, temperature, certain, 11, backend)
            for n, temperature, certain in ((1, 1.0, 0), (12, 1.0, 0), (12, 2.5, 3), (5, 0.6, vocab // 2))
        )
        assert compared >= 12


@pytest.mark.parametrize("backend", ["reference", "cpp"])  # in fp64, which the Triton kernels do not have
@settings(max_examples=40)
@given(data=st.data())
def test_any_targets_are_the_oracles(backend: str, data: st.DataObject) -> None:
    """Few distinct values, so that ties decide; masked ids; more certain ids than there are."""
    vocab = data.draw(st.sampled_from([1, 3, 60, 128, 200, 300]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    values = torch.tensor([-math.inf, -6.0, -3.0, -0.0, 0.0, 0.5, 2.0, 4.0], dtype=torch.float64)
    logits = values[torch.randint(0 if data.draw(st.booleans()) else 1, 8, (3, vocab), generator=generator)]
    logits[:, vocab // 2] = 1.0
    n, certain = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([0, 1, 7, vocab - 1, vocab, vocab + 5]))
    temperature = data.draw(st.sampled_from([0.3, 1.0, 3.0, 1e30]))
    assert assert_targets(
        logits, n, temperature, certain, data.draw(st.integers(-(1 << 63), (1 << 63) - 1)), backend
    ) >= 1


# ---------------------------------------------------------------------------------------------------------- unbiased


def estimates(targets: SparseTargets, f: Tensor) -> Tensor:
    """fp64 ``[N]``: the weighted sum of f ``[V]`` over the entries of each row."""
    values = targets.importance.double() * f[targets.ids]
    return torch.zeros(targets.offsets.shape[0] - 1, dtype=torch.float64).index_add_(0, targets.row_of_entry(), values)


@pytest.mark.parametrize("certain", [0, 2])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_unbiased_by_enumeration(monkeypatch: pytest.MonkeyPatch, temperature: float, certain: int) -> None:
    """4,096 uniforms in even steps in the place of Philox's, one a row: their mean is the sum over ids, to the step."""
    grid = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    monkeypatch.setattr(philox, "fine_uniform", lambda pair: grid[:, None])
    logits = torch.tensor([[0.3, -1.0, 2.0, -math.inf, 0.0, 1.1, -0.7]], dtype=torch.float64)
    targets = sampled_targets(
        logits.expand(4096, -1), 1, proposal_temperature=temperature, certain=certain, seed=0, backend="reference"
    )
    logp = logits[0].log_softmax(0)
    proposal = (logp / temperature).index_fill(0, logp.topk(certain).indices, -math.inf).softmax(0)
    for f in (logp.exp(), logp.exp() * logp.nan_to_num(neginf=0.0), torch.arange(7.0).double() * (logp > -math.inf)):
        step = float((f / proposal)[proposal > 0].abs().max()) / 4096 * len(f)
        assert float((estimates(targets, f).mean() - f.sum()).abs()) < step


def frequencies(targets: SparseTargets, n: int, proposal: Tensor) -> Tensor:
    """int64 ``[V]``: how often each id came, from its importance."""
    times = targets.importance.double() * n * proposal[targets.ids]
    assert float((times - times.round()).abs().max()) < 1e-3
    return torch.zeros(len(proposal), dtype=torch.int64).index_add_(0, targets.ids, times.round().long())


@pytest.mark.parametrize("vocab", [60, 700])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_frequencies_and_the_power_of_the_test(vocab: int, temperature: float) -> None:
    logits = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    proposal = (logits.double() / temperature).softmax(0)
    targets = sampled_targets(logits.expand(2500, -1), 16, proposal_temperature=temperature, seed=9)
    counts = frequencies(targets, 16, proposal)
    assert int(counts.sum()) == 40_000
    assert g_test(counts, proposal) > 1e-3
    half = proposal > proposal.sort().values[(proposal.sort().values.cumsum(0) < 0.5).sum() - 1]
    two = lambda x: torch.stack([x[half].sum(), x[~half].sum()])  # noqa: E731
    biased = two(proposal * torch.where(half, 1.05, 1.0))
    assert g_test(two(counts), two(proposal)) > 1e-3 > g_test(two(counts), biased / biased.sum())


def test_draws_of_a_row_are_independent() -> None:
    """Two draws of a row hit one id as often as two of different rows do, and not the id that another row's draw
    has."""
    logits = torch.zeros(4000, 16)
    both = sampled_targets(logits, 2, seed=1)
    rate = float((both.offsets.diff() == 1).double().mean())
    assert abs(rate - 1 / 16) < 4 * math.sqrt(1 / 16 / 4000)
    alone = sampled_targets(logits, 1, seed=1).ids
    assert abs(float((alone[1:] == alone[:-1]).double().mean()) - 1 / 16) < 4 * math.sqrt(1 / 16 / 4000)


@pytest.mark.parametrize("certain", [0, 4])
def test_the_loss_and_its_gradient_are_the_dense_ones_in_the_mean(certain: int) -> None:
    # No id that hardly ever comes.
    student, teacher = (z / 3 for z in testing.logits_pair("near_0.3", 1, 40, torch.float64))
    count = 3000
    leaf = student.expand(count, -1).clone().requires_grad_()
    targets = sampled_targets(teacher.expand(count, -1), 8, certain=certain, seed=2)
    losses = kd_loss(leaf, targets, "forward_kl", reduction="none").loss
    losses.sum().backward()
    dense = student.clone().requires_grad_()
    truth = kd_loss(dense, teacher, "forward_kl", reduction="sum").loss
    truth.backward()
    for found, true in ((losses.detach()[:, None], truth.detach()[None, None]), (leaf.grad, dense.grad)):
        error = found.std(0) / count**0.5
        assert bool(((found.mean(0) - true[0]).abs() < 4.5 * error + 1e-12).all())  # 0 at certain ids
        assert bool((error < 0.1).all())
    cut = kd_loss(student, topk_targets(teacher, 8), "forward_kl", tail="drop").loss  # what top-k makes of as many ids
    assert float((cut - truth.detach()).abs()) > 10 * float(losses.detach().std() / count**0.5)


def test_certain_ids_lower_the_variance() -> None:
    _, teacher = testing.logits_pair("near_0.3", 1, 300, torch.float64)
    p = teacher[0].softmax(0).square()
    spread = {
        k: float(estimates(sampled_targets(teacher.expand(500, -1), 16, certain=k, seed=4), p).std()) for k in (0, 16)
    }
    assert spread[16] < 0.5 * spread[0]


# -------------------------------------------------------------------------------------------------------- invariance

N, VOCAB = 24, 9_001
ARGUMENTS = [{}, {"certain": 40}, {"proposal_temperature": 1.6}, {"certain": 200, "proposal_temperature": 0.5}]


def eighths(seed: int = 0) -> Tensor:
    return torch.randint(-60, 60, (N, VOCAB), generator=torch.Generator().manual_seed(seed)) / 8


def places() -> dict[str, Tensor]:
    return {"seed": torch.arange(N) * 7, "keys": torch.arange(N) * -(10**12), "positions": torch.arange(N) + 5}


NATIVE = pytest.mark.parametrize("backend", ["reference", "cpp"])
"""Of so many draws that the interpreter would take minutes; ``test_sampling_triton.py`` has fewer."""


@NATIVE
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_batches_orders_chunks_and_threads(arguments: dict, backend: str) -> None:
    z, place = eighths(), places()
    whole = sampled_targets(z, 50, **place, **arguments, backend=backend)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    shuffled = sampled_targets(
        z[order], 50, **{name: x[order] for name, x in place.items()}, **arguments, backend=backend
    )
    assert_equal(whole.select(order), shuffled)
    small = sampled_targets(z, 50, **place, **arguments, max_scratch_bytes=6_000_000, backend=backend)
    assert_equal(whole, small)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 3)
        assert_equal(whole, sampled_targets(z, 50, **place, **arguments, backend=backend))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_backends_agree(arguments: dict) -> None:
    ours, theirs = (
        sampled_targets(eighths(3), 50, **places(), **arguments, backend=name) for name in ("cpp", "reference")
    )
    assert torch.equal(ours.offsets, theirs.offsets) and torch.equal(ours.ids, theirs.ids)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.importance, theirs.importance, rtol=4e-6, atol=0)


@NATIVE
def test_every_noun_and_layout(backend: str) -> None:
    z, place = eighths(5)[:, :300], places()
    expected = sampled_targets(z, 20, **place, backend=backend)
    hidden, weight = torch.eye(N), torch.cat([z.T, torch.ones(5, N)])
    wide = torch.full((N, 600), torch.nan)
    wide[:, ::2] = z
    for noun in (
        LinearLogits(hidden, weight, valid_vocab=300), wide[:, ::2], EnsembleLogits((z, z)), z.bfloat16(),
        LinearLogits(hidden, (z - 1).T, torch.ones(300)), LinearLogits(hidden, z.T / 2, scale=2.0), z.half(),
    ):
        assert_equal(sampled_targets(noun, 20, **place, backend=backend), expected)
    shaped = {name: x.view(4, 6) for name, x in place.items()}
    assert_equal(sampled_targets(z.view(4, 6, 300), 20, **shaped, backend=backend), expected)


# ------------------------------------------------------------------------------------------------------------- edges


def test_edges(backend: str) -> None:
    empty = sampled_targets(torch.zeros(0, 5), 3, seed=0, backend=backend)
    assert empty.offsets.tolist() == [0] and empty.ids.shape == (0,) and empty.importance.dtype == torch.float32
    one = sampled_targets(torch.zeros(3, 1), 7, seed=0, backend=backend)
    assert one.ids.tolist() == [0, 0, 0] and one.importance.tolist() == [1.0] * 3 and one.logprobs.tolist() == [0.0] * 3
    alone = torch.full((1, 300), -math.inf)
    alone[0, 123] = -5.0
    found = sampled_targets(alone, 20 if backend == "triton" else 4096, seed=1, backend=backend)
    assert found.ids.tolist() == [123] and found.importance.tolist() == [1.0]
    # Fewer than the certain ones, none is left.
    everything = sampled_targets(alone, 10, certain=2, seed=1, backend=backend)
    assert everything.ids.tolist() == [123] and everything.importance.tolist() == [1.0]


def test_rows_apart_by_more_than_an_int32_of_elements(backend: str) -> None:
    far = far_apart(ROW, ROW.flip(0))
    near = torch.stack([ROW, ROW.flip(0)])
    assert_equal(sampled_targets(far, 20, seed=3, backend=backend), sampled_targets(near, 20, seed=3, backend=backend))


@pytest.mark.parametrize(
    ("fault", "name"), [(torch.nan, "NaN"), (torch.inf, r"\+inf"), (-torch.inf, "-inf at every id")]
)
@pytest.mark.parametrize("column", [0, 299])
def test_rows_that_are_no_distribution(backend: str, fault: float, name: str, column: int) -> None:
    z = eighths(1)[:4, :300].clone()
    z[2] = fault if fault == -torch.inf else z[2]
    z[2, column] = fault
    with pytest.raises(ValueError, match=f"sampled_targets: logits must be free of NaN .*, got {name} in row 2"):
        sampled_targets(z, 5, seed=0, backend=backend)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"n": 0}, ValueError, r"n must be in 1..4096, got 0"),
    ({"n": 4097}, ValueError, r"n must be in 1..4096, got 4097"),
    ({"n": 3.0}, TypeError, "n must be an int, got float"),
    ({"certain": -1}, ValueError, r"certain must be in 0..61439, got -1"),
    ({"proposal_temperature": 0.0}, ValueError, "proposal_temperature must be finite and greater than 0, got 0.0"),
    ({"proposal_temperature": math.inf}, ValueError, "proposal_temperature must be finite and greater than 0, got inf"),
    ({"positions": torch.tensor([-1, 0])}, ValueError, r"positions must be in 0..4294967295, got -1 in row 0"),
    ({"keys": torch.tensor([1])}, ValueError, r"keys must be of shape \[2\] like the rows of logits, got \[1\]"),
    ({"seed": 1 << 64}, ValueError, "seed must be of 64 bits"),
    ({"max_scratch_bytes": 10}, ValueError, "max_scratch_bytes must be at least .* which one row takes, got 10"),
    ({"backend": "triton"}, RuntimeError, "backend must be one for tensors on cpu"),
])
def test_what_is_refused(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"sampled_targets: {message}"):
        sampled_targets(torch.zeros(2, 5), **{"n": 3, "seed": 0} | arguments)


@NATIVE
def test_autocast_rounds_the_products(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    noun = LinearLogits(torch.randn(3, 64, generator=generator), torch.randn(200, 64, generator=generator))
    with torch.autocast("cpu", torch.bfloat16):
        found = sampled_targets(noun, 30, seed=0, backend=backend)
    rounded = dataclasses.replace(noun, hidden=noun.hidden.bfloat16().float(), weight=noun.weight.bfloat16().float())
    assert_equal(found, sampled_targets(rounded, 30, seed=0, backend=backend))
    assert not torch.equal(found.logprobs, sampled_targets(noun, 30, seed=0, backend=backend).logprobs)


def test_under_compile_the_graph_breaks_and_the_result_is_the_same(unpoisoned: None) -> None:
    z = eighths(2)[:3, :300]
    compiled = torch.compile(lambda x: sampled_targets(x, 9, seed=1).importance.sum(), backend="eager")
    assert torch.equal(compiled(z), sampled_targets(z, 9, seed=1).importance.sum())


# --------------------------------------------------------------------------------------------------------- mutations


@pytest.mark.parametrize("mutation", ["counts once", "of the model", "uniform reused", "first group"])
def test_mutations_of_the_reference_are_found(monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    """Each is a mistake that is easily made; the comparison with the oracle must see it."""
    original = reference.target_rows

    def mutated(rows, request, out) -> None:
        if mutation == "uniform reused":
            words = philox.words
            monkeypatch.setattr(philox, "words", lambda *args: words(*args[:4], 0, torch.zeros_like(args[5])))
        if mutation == "first group":
            monkeypatch.setattr(torch, "searchsorted", lambda a, b, right: torch.zeros_like(b, dtype=torch.int64))
        original(rows, request, out)
        if mutation == "counts once":
            out.importance.copy_(out.importance.clamp(max=float(out.importance[out.importance > 0].min())))
        if mutation == "of the model":
            out.importance.mul_(1.05)

    _, logits = testing.logits_pair("near_0.3", 4, 300)
    assert assert_targets(logits, 12, 1.0, 0, 11, "reference") == 4
    monkeypatch.setattr(reference, "target_rows", mutated)
    with pytest.raises((AssertionError, KeyError)):
        assert_targets(logits, 12, 1.0, 0, 11, "reference")
