"""Rows ahead of whoever trains: by threads, and by the workers of a DataLoader."""

from __future__ import annotations

import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from cache_builders import Example, example, manifest, write
from torch.utils.data import DataLoader

from kd_kernels import kd_loss
from kd_kernels.cache import (
    CachedBatch, CachedCollator, CachedDataset, CachedItem, CacheError, CacheReader, CacheWriter,
)
from kd_kernels.cache.prefetch import ahead_of
from kd_kernels.logits import SparseTargets

CACHE = manifest(temperatures=(1.0, 2.0))


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Sequences of 2 to 40 tokens; every third row of the last one is cached."""
    lengths = (2, 40, 9, 17, 5, 12, 30, 31)
    return [
        example(length, length, CACHE, (torch.arange(length - 1) % 3 == 0) * 8 if length == 31 else None)
        for length in lengths
    ]


@pytest.fixture(scope="module")
def reader(tmp_path_factory, examples) -> CacheReader:
    folder = tmp_path_factory.mktemp("cache")
    write(folder, CACHE, examples, rows_per_block=16, rows_per_shard=40)
    return CacheReader(folder)


@pytest.fixture(scope="module")
def dataset(reader, examples) -> CachedDataset:
    return CachedDataset(reader, [item.tokens for item in examples])


def assert_equal_targets(one: SparseTargets, other: SparseTargets) -> None:
    assert one.temperatures == other.temperatures
    for name in ("offsets", "ids", "logprobs", "tail_logprob", "log_z"):
        assert torch.equal(getattr(one, name).nan_to_num(), getattr(other, name).nan_to_num()), name


# --------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("threads, depth", [(1, 1), (2, 3), (4, 100)])
def test_ahead_keeps_the_order(reader, examples, threads, depth):
    order = torch.randint(len(examples), (50,), generator=torch.Generator().manual_seed(0)).tolist()
    found = list(reader.ahead((examples[i].tokens for i in order), threads=threads, depth=depth))
    assert len(found) == 50
    for i, targets in zip(order, found):
        assert_equal_targets(targets, reader.targets(examples[i].tokens))


def test_ahead_takes_no_more_than_it_may():
    taken, done = 0, threading.Semaphore(0)

    def items():
        nonlocal taken
        for item in range(1, 1000):
            taken = item
            yield item

    results = ahead_of(lambda item: (done.release(), item)[1], items(), threads=2, depth=5)
    assert next(results) == 1 and taken == 5
    for _ in range(5):
        assert done.acquire(timeout=10), "what was taken is worked on, though nobody has asked for it yet"
    assert next(results) == 2 and taken == 6
    results.close()
    assert taken == 6


def test_an_error_is_raised_in_its_place(reader, examples):
    results = reader.ahead([examples[0].tokens, torch.tensor([1, 2, 3]), examples[1].tokens], depth=3)
    assert_equal_targets(next(results), reader.targets(examples[0].tokens))
    with pytest.raises(CacheError, match="found none such among 8"):
        next(results)


@pytest.mark.parametrize("option", ["threads", "depth"])
def test_ahead_refuses(reader, option):
    with pytest.raises(ValueError, match=f"CacheReader.ahead: {option} must be at least 1, got 0"):
        reader.ahead([], **{option: 0})


def test_threads_share_a_reader(reader, examples):
    """Many threads, few open shards: each opens and lets go of files while others read."""
    failures = []

    def work(seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        for i in torch.randint(len(examples), (40,), generator=random).tolist():
            try:
                assert_equal_targets(reader.targets(examples[i].tokens), expected[i])
            except BaseException as error:  # noqa: BLE001  reported below
                failures.append(error)

    expected = [reader.targets(item.tokens) for item in examples]
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --------------------------------------------------------------------------------------------------------- dataset


def test_items(dataset, reader, examples):
    assert len(dataset) == len(examples)
    for i, item in enumerate(examples):
        found = dataset[i]
        assert isinstance(found, CachedItem) and torch.equal(found.tokens, item.tokens)
        assert_equal_targets(found.targets, reader.targets(item.tokens))
        assert torch.equal(found.counted, item.targets.offsets.diff() > 0)


@pytest.mark.parametrize("multiple, width", [(1, 40), (16, 48)])
def test_a_batch_lines_up_with_its_tokens(dataset, examples, multiple, width):
    order = [3, 1, 7, 0]
    batch = CachedCollator(pad_id=999, multiple=multiple)([dataset[i] for i in order])
    assert batch.tokens.shape == (4, width) and batch.lengths.tolist() == [17, 40, 31, 2]
    assert_equal_targets(batch.targets, SparseTargets.cat([dataset[i].targets for i in order]))
    row = 0
    for b, i in enumerate(order):
        tokens, length = examples[i].tokens, len(examples[i].tokens)
        assert torch.equal(batch.tokens[b, :length], tokens) and bool((batch.tokens[b, length:] == 999).all())
        counted = examples[i].targets.offsets.diff() > 0
        for j in range(length - 1):
            assert int(batch.tokens.flatten()[batch.rows[row]]) == int(tokens[j])
            assert int(batch.labels[row]) == (int(tokens[j + 1]) if counted[j] else -100)
            row += 1
    assert row == len(batch.rows) == len(batch.labels)


def test_rows_that_are_not_cached_do_not_count(dataset, examples):
    """The loss of a batch is that of its cached rows, whatever the student says in the others."""
    batch = CachedCollator()([dataset[7]])
    student = torch.randn(30, CACHE.vocab, generator=torch.Generator().manual_seed(0))
    cached = (batch.labels != -100).nonzero().flatten()
    assert len(cached) == 10
    loss = kd_loss(student, batch.targets, labels=batch.labels).loss
    alone = kd_loss(student[cached], batch.targets.select(cached)).loss
    assert torch.allclose(loss, alone)


def test_required_rows(reader, examples):
    tokens = [examples[7].tokens]
    some = torch.zeros(30, dtype=torch.bool)
    some[[3, 9]] = True
    batch = CachedCollator()([CachedDataset(reader, tokens, required=[some])[0]])
    assert (batch.labels != -100).nonzero().flatten().tolist() == [3, 9]
    with pytest.raises(CacheError, match="row 1 of sequence .*: expected cached, found not cached"):
        CachedDataset(reader, tokens, required=[torch.ones(30, dtype=torch.bool)])[0]


def test_layouts(tmp_path):
    item = example(9, 0, CACHE)
    with CacheWriter(tmp_path, CACHE) as writer:
        writer.add(item.tokens, item.targets, layout=(4, 5))
    reader = CacheReader(tmp_path)
    assert len(CachedDataset(reader, [item.tokens], layouts=[(4, 5)])[0].counted) == 8
    with pytest.raises(CacheError, match="found 1 that it lacks, the first of them sequence 0"):
        CachedDataset(reader, [item.tokens])


def test_what_is_missing_is_missed_before_training(reader, examples):
    sequences = [examples[0].tokens, torch.tensor([1, 2, 3]), examples[1].tokens, torch.tensor([4, 5])]
    message = "sequences in the cache: expected all 4, found 2 that it lacks, the first of them sequence 1; score them"
    with pytest.raises(CacheError, match=message):
        CachedDataset(reader, sequences)
    unchecked = CachedDataset(reader, sequences, check=False)
    assert len(unchecked[2].tokens) == 40
    with pytest.raises(CacheError, match="found none such among 8"):
        unchecked[1]


@pytest.mark.parametrize("field", ["layouts", "required"])
def test_dataset_refuses_columns_of_another_length(reader, examples, field):
    message = f"CachedDataset: {field} must be one for each of 2 sequences, or None, got 1"
    with pytest.raises(ValueError, match=message):
        CachedDataset(reader, [item.tokens for item in examples[:2]], **{field: [None]})


def test_collator_refuses():
    with pytest.raises(ValueError, match="CachedCollator: multiple must be at least 1, got 0"):
        CachedCollator(multiple=0)
    with pytest.raises(ValueError, match="CachedCollator: items must be at least one, got none"):
        CachedCollator()([])


# --------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("workers, start", [(0, None), (2, "fork"), (2, "spawn")])
def test_a_data_loader(dataset, reader, examples, workers, start):
    """Reshuffled, over two epochs: the same tokens get the same rows, in whatever process and batch they are read."""
    reader.targets(examples[0].tokens)  # a file is open when the workers are made
    loader = DataLoader(
        dataset, batch_size=3, shuffle=True, num_workers=workers, multiprocessing_context=start,
        collate_fn=CachedCollator(), generator=torch.Generator().manual_seed(0), persistent_workers=workers > 0,
    )
    by_tokens = {tuple(item.tokens.tolist()): reader.targets(item.tokens) for item in examples}
    orders = []
    for _ in range(2):
        seen = []
        for batch in loader:
            assert isinstance(batch, CachedBatch)
            sequences = [tuple(tokens[:n].tolist()) for tokens, n in zip(batch.tokens, batch.lengths)]
            assert_equal_targets(batch.targets, SparseTargets.cat([by_tokens[tokens] for tokens in sequences]))
            seen += sequences
        assert sorted(seen) == sorted(by_tokens)
        orders.append(seen)
    assert orders[0] != orders[1]


def test_damage_found_by_a_worker_is_an_error_here(tmp_path, examples):
    write(tmp_path, CACHE, examples[:4])
    dataset = CachedDataset(CacheReader(tmp_path), [item.tokens for item in examples[:4]])
    path = tmp_path / "w0-000000.kdc"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(CacheError, match=re.escape(f"{path}, offset 64: CRC-32 of a model")):
        list(loader)


def test_a_dataset_pickles_as_what_it_was_made_of(dataset, examples):
    """Nothing that is open goes along, and no row."""
    dataset[1]
    data = pickle.dumps(dataset)
    assert len(data) < 20_000 + 48 * len(examples)
    assert_equal_targets(pickle.loads(data)[1].targets, dataset[1].targets)


def test_batches_move(dataset):
    batch = CachedCollator()([dataset[1], dataset[2]])
    moved = batch.to("meta")
    assert {moved.tokens.device.type, moved.labels.device.type, moved.targets.device.type} == {"meta"}
    assert batch.to("cpu").targets.ids is batch.targets.ids


def test_a_folder_that_moves_between_processes(tmp_path, examples):
    """Pickled here, read where the folder is mounted at the same place: nothing but the path is carried."""
    write(tmp_path / "a", CACHE, examples[:2])
    pickled = pickle.dumps(CacheReader(tmp_path / "a"))
    Path(tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(CacheError, match="opening the shard: expected success, found No such file"):
        pickle.loads(pickled).targets(examples[0].tokens)
