"""What is written comes back, to the precision that the manifest declares."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_builders import Example, assert_holds, assert_rows, cut, example, in_id_order, manifest, write
from kd_kernels.cache import CachedRows, CacheManifest, CacheReader, CacheWriter
from kd_kernels.logits import SparseTargets

SETTINGS = settings(
    derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SETTINGS
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6), seed=st.integers(0, 1000),
    rows_per_block=st.integers(1, 20), rows_per_shard=st.integers(1, 60),
    step=st.sampled_from([0.0, 1 / 16, 1 / 4, 0.1]), temperatures=st.sampled_from([(1.0,), (1.0, 2.0), (0.5, 4.0)]),
    tail=st.booleans(), importance=st.booleans(), k=st.integers(1, 12), vocab=st.sampled_from([12, 256, 257, 1000]),
)
def test_round_trip(
    tmp_path_factory, lengths, seed, rows_per_block, rows_per_shard, step, temperatures, tail, importance, k, vocab
):
    cache = manifest(
        vocab=vocab, k=k, step_nats=step, temperatures=temperatures, tail=tail, importance=importance,
    )
    folder = tmp_path_factory.mktemp("cache")
    random = torch.Generator().manual_seed(seed)
    examples = [
        example(length, 100 * seed + i, cache, torch.randint(k + 1, (length - 1,), generator=random))
        for i, length in enumerate(lengths)
    ]
    examples = list({tuple(item.tokens.tolist()): item for item in examples}.values())
    write(folder, cache, examples, rows_per_block=rows_per_block, rows_per_shard=rows_per_shard)
    assert_holds(folder, cache, examples)


def test_a_row_has_any_number_of_entries(tmp_path):
    cache = manifest(vocab=1 << 17, k=65535)
    counts = torch.tensor([0, 1, 2, 65535, 0, 300])
    item = example(7, 0, cache, counts)
    write(tmp_path, cache, [item])
    assert_holds(tmp_path, cache, [item])


@pytest.mark.parametrize("vocab", [255, 256, 257, 1 << 16, (1 << 16) + 1, 1 << 17, 1 << 18, 1 << 24])
def test_ids_at_the_edges_of_their_bytes(tmp_path, vocab):
    cache = manifest(vocab=vocab, k=7)
    edges = [0, vocab - 1] + [id for bits in (8, 16, 17, 18, 24) for id in ((1 << bits) - 1, 1 << bits)]
    ids = torch.tensor(sorted({i for i in edges if i < vocab})[-7:])
    logprobs = torch.full((len(ids),), -math.log(len(ids) + 1))
    targets = SparseTargets(torch.tensor([0, len(ids)]), ids, logprobs, logprobs[:1])
    tokens = torch.tensor([0, vocab - 1])
    with CacheWriter(tmp_path, cache) as writer:
        writer.add(tokens, targets)
    found = CacheReader(tmp_path).lookup(tokens)
    assert found.targets.ids.tolist() == ids.tolist()
    assert found.next_logprobs.item() == found.targets.logprobs[-1]


def test_certain_row_and_empty_tail(tmp_path):
    cache = manifest()
    targets = SparseTargets(torch.tensor([0, 1]), torch.tensor([5]), torch.tensor([0.0]), torch.tensor([-math.inf]))
    with CacheWriter(tmp_path, cache) as writer:
        writer.add(torch.tensor([3, 5]), targets)
    found = CacheReader(tmp_path).lookup(torch.tensor([3, 5]))
    assert found.targets.logprobs.tolist() == [0.0]
    assert found.targets.tail_logprob.tolist() == [-math.inf]
    assert found.next_logprobs.tolist() == [0.0]


def test_far_apart_logprobs_escape_the_byte(tmp_path):
    cache = manifest(k=6)
    logprobs = torch.tensor([-1e-3, -15.9, -15.95, -31.9, -500.0, -3e5])
    gaps_around_escape = torch.tensor([-8.0, -8.0 - 254 / 16, -8.0 - 509 / 16, -8.0 - 765 / 16])
    targets = SparseTargets(
        torch.tensor([0, 6, 10]), torch.arange(10), torch.cat([logprobs, gaps_around_escape]),
        torch.tensor([-7.0, -0.001]),
    )
    with CacheWriter(tmp_path, cache) as writer:
        writer.add(torch.tensor([1, 2, 3]), targets)
    found = CacheReader(tmp_path).lookup(torch.tensor([1, 2, 3])).targets.logprobs
    assert bool(((found - targets.logprobs).abs() <= 1 / 32).all())
    assert torch.equal(found[6:], gaps_around_escape)


def test_entries_come_back_in_descending_order_with_the_lower_id_first(tmp_path):
    cache = manifest(k=4, importance=True)
    logprobs = torch.tensor([-2.0, -1.0, -2.0, -4.0, -1.0])
    ids, weights = torch.tensor([7, 9, 3, 1, 4]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    targets = SparseTargets(torch.tensor([0, 4, 5]), ids, logprobs, torch.tensor([-2.0, -1.0]), weights)
    with CacheWriter(tmp_path, cache) as writer:
        writer.add(torch.tensor([1, 2, 3]), targets)
    found = CacheReader(tmp_path).targets(torch.tensor([1, 2, 3]))
    assert found.ids.tolist() == [9, 3, 7, 1, 4]
    assert found.importance.tolist() == [2.0, 3.0, 1.0, 4.0, 5.0]


@pytest.mark.parametrize("step", [1 / 16, 1 / 8, 1 / 4])
def test_quantisation_is_below_the_noise_of_a_bf16_head(tmp_path, step):
    """KL(exact || decoded), on rows whose mean entropy is that of a small model (about 2.4 nats)."""
    cache = manifest(vocab=8192, k=64, step_nats=step)
    random = torch.Generator().manual_seed(0)
    sharpness = torch.rand(600, 1, generator=random) * 5 + 2.5
    logprobs = (sharpness * torch.randn(600, 8192, generator=random)).log_softmax(1)
    entropy = -(logprobs.exp() * logprobs).sum(1).mean()
    assert 1.5 < entropy < 3.5
    item = Example(torch.arange(601), cut(logprobs, cache), logprobs.gather(1, torch.arange(1, 601)[:, None])[:, 0])
    write(tmp_path, cache, [item])
    found = CacheReader(tmp_path).lookup(item.tokens).targets
    exact, decoded = (x.logprobs.double()[in_id_order(x)].view(600, 64) for x in (item.targets, found))
    assert (exact - decoded).abs().max() <= step / 2 + 1e-6

    def kl(p, q):
        return (p.log_softmax(1).exp() * (p.log_softmax(1) - q.log_softmax(1))).sum(1)

    scale = (16 * step) ** 2
    tail = item.targets.tail_logprob.double()[:, None]
    loss = kl(torch.cat([exact, tail], 1), torch.cat([decoded, found.tail_logprob.double()[:, None]], 1))
    for off in (kl(exact, decoded), loss):
        assert off.mean() <= 1e-4 * scale and off.max() <= 5e-4 * scale
    mass = torch.cat([decoded, tail], 1).logsumexp(1)
    assert mass.abs().max() <= step / 2
    assert mass.mean().abs() <= step / 100, "entries and tail must not be too heavy or too light on the whole"


def test_positions(tmp_path):
    cache = manifest(temperatures=(1.0, 2.0))
    item = example(30, 1, cache)
    positions = torch.rand(29, generator=torch.Generator().manual_seed(2)) < 0.3
    rows = positions.nonzero().flatten()
    chosen = item.targets.select(rows)
    with CacheWriter(tmp_path, cache) as writer:
        writer.add(item.tokens, chosen, next_logprobs=item.next_logprobs[rows], positions=positions)
    reader = CacheReader(tmp_path)
    assert (reader.rows, reader.cached_rows) == (29, int(positions.sum()))
    assert torch.equal(reader.positions(item.tokens), positions)
    found = reader.lookup(item.tokens, required=positions)
    assert torch.equal(found.targets.offsets.diff() > 0, positions)
    again = found.targets.select(rows)
    expected = Example(torch.arange(len(rows) + 1), chosen, item.next_logprobs[rows])
    assert_rows(CachedRows(again, found.next_logprobs[rows]), expected, cache)
    assert bool(found.targets.log_z[~positions, 1].isnan().all())


def test_next_logprobs_are_taken_from_the_entries_where_not_given(tmp_path):
    cache = manifest(vocab=16, k=8, step_nats=0)
    item = example(20, 3, cache)
    given = item.next_logprobs.clone()
    given[::2] = math.nan
    with CacheWriter(tmp_path / "none", cache) as writer:
        writer.add(item.tokens, item.targets)
    with CacheWriter(tmp_path / "some", cache) as writer:
        writer.add(item.tokens, item.targets, next_logprobs=given)
    kept = (item.targets.ids.view(19, 8) == item.tokens[1:, None]).any(1)
    assert 0 < kept.sum() < 19
    derived = torch.where(kept, item.next_logprobs, math.nan)
    assert torch.equal(CacheReader(tmp_path / "none").next_logprobs(item.tokens).nan_to_num(1), derived.nan_to_num(1))
    mixed = torch.where(given.isnan(), derived, given)
    assert torch.equal(CacheReader(tmp_path / "some").next_logprobs(item.tokens).nan_to_num(1), mixed.nan_to_num(1))


def test_next_logprobs_are_taken_from_the_entries_of_the_chosen_positions(tmp_path):
    cache = manifest(vocab=16, k=8, step_nats=0)
    item = example(40, 5, cache)
    positions = torch.arange(39) % 3 == 1
    with CacheWriter(tmp_path, cache) as writer:
        writer.add(item.tokens, item.targets.select(positions.nonzero().flatten()), positions=positions)
    kept = (item.targets.ids.view(39, 8) == item.tokens[1:, None]).any(1) & positions
    assert 0 < kept.sum() < positions.sum()
    found = CacheReader(tmp_path).next_logprobs(item.tokens)
    assert torch.equal(found.isnan(), ~kept)
    assert torch.equal(found[kept], item.next_logprobs[kept])


def test_batch_is_the_sequences_one_after_the_other(tmp_path):
    cache = manifest()
    examples = [example(length, length, cache) for length in (5, 2, 30)]
    write(tmp_path, cache, examples, rows_per_block=10)
    reader = CacheReader(tmp_path)
    order = [examples[i] for i in (2, 0, 1, 0)]
    batch = reader.batch([item.tokens for item in order])
    expected = SparseTargets.cat([reader.targets(item.tokens) for item in order])
    assert torch.equal(batch.offsets, expected.offsets) and torch.equal(batch.logprobs, expected.logprobs)
    again = reader.batch([examples[0].tokens, examples[1].tokens], layouts=[None, [2]])
    assert again.offsets.shape[0] - 1 == 5


def test_duplicates_are_stored_once(tmp_path):
    cache = manifest()
    item, other = example(9, 0, cache), example(9, 1, cache)
    with CacheWriter(tmp_path, cache) as writer:
        assert writer.key(item.tokens) not in writer
        assert writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs) is True
        assert writer.key(item.tokens) in writer
        assert writer.add(item.tokens, other.targets) is False
        assert len(writer) == 1
    with CacheWriter(tmp_path, cache, writer="w1") as writer:
        assert writer.key(item.tokens) in writer and len(writer) == 1
        assert writer.add(item.tokens.int(), other.targets) is False
    assert_holds(tmp_path, cache, [item])


def test_what_was_given_may_be_written_over_afterwards(tmp_path):
    cache = manifest()
    item = example(9, 0, cache)
    given = Example(item.tokens.clone(), item.targets.select(torch.arange(8)), item.next_logprobs.clone())
    with CacheWriter(tmp_path, cache) as writer:
        writer.add(given.tokens, given.targets, next_logprobs=given.next_logprobs)
        rows = given.targets
        for values in (given.tokens, rows.ids, rows.logprobs, rows.tail_logprob, given.next_logprobs):
            values.zero_()
    assert_holds(tmp_path, cache, [item])


def test_float64_targets_and_int32_ids(tmp_path):
    cache = manifest(step_nats=0)
    item = example(9, 0, cache)
    wide = SparseTargets(
        item.targets.offsets, item.targets.ids.int(), item.targets.logprobs.double(),
        item.targets.tail_logprob.double(),
    )
    with CacheWriter(tmp_path, cache) as writer:
        writer.add(item.tokens.int(), wide, next_logprobs=item.next_logprobs.double())
    assert_holds(tmp_path, cache, [item])


def test_layout_is_part_of_what_is_looked_up(tmp_path):
    cache = manifest(step_nats=0)
    item, packed = example(9, 0, cache), example(9, 1, cache)
    with CacheWriter(tmp_path, cache) as writer:
        writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
        writer.add(item.tokens, packed.targets, layout=[4, 5])
    reader = CacheReader(tmp_path)
    assert_rows(reader.lookup(item.tokens, layout=[9]), item, cache)
    assert torch.equal(reader.targets(item.tokens, layout=(4, 5)).ids, packed.targets.ids)


def test_reader_travels_to_other_processes(tmp_path):
    cache = manifest()
    examples = [example(6, seed, cache) for seed in range(4)]
    write(tmp_path, cache, examples, rows_per_block=5, rows_per_shard=10)
    assert len(list(tmp_path.glob("*.kdc"))) == 2
    reader = CacheReader(tmp_path)
    reader.lookup(examples[0].tokens)
    copy = pickle.loads(pickle.dumps(reader))
    for item in examples:
        assert_rows(copy.lookup(item.tokens), item, cache)


class _Rows(torch.utils.data.Dataset):
    def __init__(self, reader: CacheReader, sequences: list[torch.Tensor]) -> None:
        self.reader, self.sequences = reader, sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.reader.targets(self.sequences[i]).ids


def test_reader_in_workers_of_a_data_loader(tmp_path):
    cache = manifest(step_nats=0)
    examples = [example(6, seed, cache) for seed in range(8)]
    write(tmp_path, cache, examples)
    data = _Rows(CacheReader(tmp_path), [item.tokens for item in examples])
    for found, item in zip(torch.utils.data.DataLoader(data, batch_size=None, num_workers=2), examples):
        assert torch.equal(found, item.targets.ids)
    data.sequences = [torch.tensor([1, 2, 3])]
    with pytest.raises(Exception, match="sequence: expected key .* found none such among 8"):
        list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=1))


def test_empty_cache(tmp_path):
    cache = manifest()
    with CacheWriter(tmp_path, cache):
        pass
    reader = CacheReader(tmp_path)
    reader.verify()
    assert (len(reader), reader.rows, reader.cached_rows, reader.bytes, reader.keys()) == (0, 0, 0, 0, [])
    assert not list(tmp_path.glob("*.kdc*"))


def test_meta_is_kept_and_not_compared(tmp_path):
    CacheWriter(tmp_path, manifest(meta={"teacher name": "big"})).close()
    CacheWriter(tmp_path, manifest(meta={"host": "other"})).close()
    found = CacheReader(tmp_path).manifest
    assert found == manifest() and found.meta == {"teacher name": "big"}
    assert isinstance(found, CacheManifest)
