"""Whatever happens to the files, a reader returns what was written or raises CacheError. Never anything else."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from cache_builders import Example, assert_holds, assert_rows, example, manifest, write
from kd_kernels.cache import CacheError, CacheReader, CacheWriter, content_key
from kd_kernels.cache.codec import RowModel, learn_model
from kd_kernels.cache.format import IndexEntry, Piece, ShardHeader, encode_block, encode_index, encode_model
from kd_kernels.cache.index import MergedIndex
from kd_kernels.cache.journal import encode_line
from kd_kernels.cache.rows import canonical_rows
from kd_kernels.cache.shard import Shard

CACHE = manifest(k=3, temperatures=(1.0, 2.0))


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [example(length, length, CACHE) for length in (2, 4, 9)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory, examples) -> Path:
    """One small shard: a block that two sequences share, and a sequence of two blocks."""
    folder = tmp_path_factory.mktemp("sound")
    write(folder, CACHE, examples, rows_per_block=5)
    return folder


@pytest.fixture
def folder(tmp_path, sound) -> Path:
    """A copy of the sound one, to be damaged."""
    return shutil.copytree(sound, tmp_path / "damaged")


def survivors(reader: CacheReader, examples: list[Example]) -> int:
    """How many sequences can be read. Each gives what was written, or a CacheError."""
    alive = 0
    for item in examples:
        try:
            found = reader.lookup(item.tokens)
        except CacheError:
            continue
        assert_rows(found, item, CACHE)
        alive += 1
    return alive


def test_the_copy_is_sound(folder, examples):
    assert_holds(folder, CACHE, examples)


def test_every_flipped_byte_of_a_shard(folder, examples):
    path = folder / "w0-000000.kdc"
    original = path.read_bytes()
    alive = []
    for at in range(len(original)):
        data = bytearray(original)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises(CacheError, match="w0-000000.kdc, offset [0-9]+: .*expected .*, found") as caught:
            alive.append(0)
            reader = CacheReader(folder)
            alive[-1] = survivors(reader, examples)
            reader.verify()
        assert caught.value.path == path and 0 <= caught.value.offset <= at
    assert set(alive) == {0, 1, 2}, "damage hits the sequences whose blocks it is in, or all"


def test_every_flipped_byte_of_the_manifest(folder):
    path = folder / "manifest.jsonl"
    original = path.read_bytes()
    for at in range(len(original)):
        data = bytearray(original)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises(CacheError, match="manifest.jsonl"):
            CacheReader(folder)
        with pytest.raises(CacheError, match="manifest.jsonl"):
            CacheWriter(folder, CACHE)


def test_every_flipped_byte_of_a_journal(tmp_path, examples):
    write(tmp_path, CACHE, examples, rows_per_block=1, rows_per_shard=1)
    path = tmp_path / "w0.journal"
    original = path.read_bytes()
    assert original.count(b"\n") == 3
    for at in range(len(original)):
        data = bytearray(original)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        if at == len(original) - 1:  # without its newline the last line is a torn tail, and its sequence is missing
            assert survivors(CacheReader(tmp_path), examples) == 2
        else:
            with pytest.raises(CacheError, match="w0.journal, offset .* line: expected"):
                CacheReader(tmp_path)


def test_every_truncation_of_a_shard(folder, examples):
    path = folder / "w0-000000.kdc"
    original = path.read_bytes()
    for size in range(len(original)):
        path.write_bytes(original[:size])
        with pytest.raises(CacheError, match="w0-000000.kdc, offset"):
            CacheReader(folder)
    path.write_bytes(original + b"\0")
    message = f"bytes of the shard, by w0.journal at 0: expected {len(original)}, found {len(original) + 1}"
    with pytest.raises(CacheError, match=message):
        CacheReader(folder)


def test_truncation_and_flip_under_an_open_reader(folder, examples):
    path = folder / "w0-000000.kdc"
    original = path.read_bytes()
    reader = CacheReader(folder)
    assert_rows(reader.lookup(examples[2].tokens), examples[2], CACHE)
    with open(path, "r+b") as file:
        file.truncate(len(original) // 2)
    with pytest.raises(CacheError, match="bytes to the end of the file: expected at least"):
        reader.lookup(examples[2].tokens)


def test_swapped_shards(tmp_path, examples):
    write(tmp_path, CACHE, examples, rows_per_block=1, rows_per_shard=1)
    first, second = tmp_path / "w0-000000.kdc", tmp_path / "w0-000001.kdc"
    reader = CacheReader(tmp_path)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with pytest.raises(CacheError, match="w0-000000.kdc, offset 0: number of the shard: expected 0, found 1"):
        CacheReader(tmp_path)
    with pytest.raises(CacheError, match="number of the shard: expected 0, found 1"):
        reader.lookup(examples[0].tokens)


def test_shard_of_another_writer_or_cache(tmp_path, examples):
    write(tmp_path / "a", CACHE, examples[:1])
    write(tmp_path / "a", CACHE, examples[1:], writer="w1")
    write(tmp_path / "b", manifest(k=3, temperatures=(1.0, 2.0), teacher="other"), examples[:1])
    assert_holds(tmp_path / "a", CACHE, examples)
    shutil.copy(tmp_path / "a" / "w1-000000.kdc", tmp_path / "a" / "w0-000000.kdc")
    with pytest.raises(CacheError, match="writer of the shard: expected w0, found w1"):
        CacheReader(tmp_path / "a")
    shutil.copy(tmp_path / "b" / "w0-000000.kdc", tmp_path / "a" / "w0-000000.kdc")
    with pytest.raises(CacheError, match="manifest of the shard: expected"):
        CacheReader(tmp_path / "a")


def test_another_version_of_a_shard_replaced_in_place(folder, examples):
    """Same writer, number and manifest, other content: the journal knows better."""
    others = [example(2, 2, CACHE), example(4, 99, CACHE), example(9, 9, CACHE)]
    write(folder.parent / "again", CACHE, others, rows_per_block=5)
    shutil.copy(folder.parent / "again" / "w0-000000.kdc", folder)
    with pytest.raises(CacheError, match="by w0.journal at 0: expected"):
        CacheReader(folder)


def test_missing_files(folder):
    (folder / "w0-000000.kdc").unlink()
    with pytest.raises(CacheError, match="w0-000000.kdc: opening the shard: expected success, found No such file"):
        CacheReader(folder)
    (folder / "manifest.jsonl").unlink()
    with pytest.raises(CacheError, match="manifest.jsonl: reading: expected success, found No such file"):
        CacheReader(folder)
    with pytest.raises(CacheError, match="found No such file"):
        CacheReader(folder / "nowhere")


def test_another_version_of_the_same_size(folder, examples):
    path = folder / "w0.journal"
    record = json.loads(path.read_bytes())["record"] | {"index_crc32": "00000000"}
    path.write_bytes(encode_line(record))
    message = "w0-000000.kdc, offset [0-9]+: CRC-32 of the index, by w0.journal at 0: expected 00000000, found"
    with pytest.raises(CacheError, match=message):
        CacheReader(folder)


def test_a_line_that_was_appended_twice(folder, examples):
    path = folder / "w0.journal"
    path.write_bytes(path.read_bytes() * 2)
    assert_holds(folder, CACHE, examples)


@pytest.mark.parametrize("version", [2, 4])
def test_another_version_of_the_format_is_refused(folder, version):
    path = folder / "manifest.jsonl"
    identity, meta = path.read_bytes().splitlines(keepends=True)
    body = identity[len('{"crc32":"01234567","record":') : -2].replace(b'"version":3', b'"version":%d' % version)
    path.write_bytes(b'{"crc32":"%08x","record":%s}\n' % (zlib.crc32(body), body) + meta)
    with pytest.raises(CacheError, match=f"format version: expected 3, found {version}; build the cache again"):
        CacheReader(folder)


class Forged:
    """A shard with checksums that are right and content that is not, as a broken writer would make it."""

    def __init__(self, folder: Path, item: Example) -> None:
        self.header = ShardHeader("w0", 0, bytes(16))
        self.path, self.key = folder / self.header.name, content_key(item.tokens, CACHE)
        self.rows = canonical_rows("", item.tokens, item.targets, item.next_logprobs, None, CACHE)
        self.model = RowModel(learn_model([self.rows], None, CACHE), CACHE)
        self.data = self.header.encode()
        self.data += encode_model(self.header.crc, len(self.data), learn_model([self.rows], None, CACHE))
        self.begin = len(self.data)

    def block(
        self, start: int, stop: int, payload: bytes | None = None, entries: int | None = None, model: int = 64,
        **piece: object,
    ) -> None:
        part = self.rows.slice(start, stop)
        right = dict(
            key=self.key, sequence_rows=len(self.rows), first_row=start, rows=len(part),
            cached_rows=int(part.positions.sum()),
        )
        self.data += encode_block(
            self.header.crc, len(self.data), model, [Piece(**right | piece)], payload or self.model.encode(part),
            part.targets.ids.shape[0] if entries is None else entries,
        )

    def read(self) -> None:
        size = len(self.data) - self.begin
        entry = IndexEntry(self.key, self.begin, size, len(self.rows), int(self.rows.positions.sum()))
        self.path.write_bytes(self.data + encode_index(self.header.crc, len(self.data), [entry]))
        shard = Shard(self.path, self.header)
        try:
            shard.rows(entry, CACHE)
        finally:
            with pytest.raises(CacheError):
                shard.check(CACHE)


@pytest.fixture
def forged(tmp_path, examples) -> Forged:
    return Forged(tmp_path, examples[2])


def test_missing_rows(forged):
    forged.block(0, 5)
    with pytest.raises(CacheError, match="rows of sequence .*: expected 8, found 5"):
        forged.read()


def test_rows_out_of_order(forged):
    forged.block(5, 8)
    forged.block(0, 5)
    with pytest.raises(CacheError, match="rows of sequence .*: expected 8, found 5"):
        forged.read()


def test_rows_of_another_sequence(forged):
    forged.block(0, 5)
    forged.block(5, 8, key=bytes(16))
    with pytest.raises(CacheError, match="rows of sequence .*: expected 8, found 5"):
        forged.read()


def test_block_that_was_moved(forged):
    forged.block(0, 5)
    at = len(forged.data)
    forged.block(5, 8)
    payload = forged.model.encode(forged.rows.slice(5, 8))
    forged.data = forged.data[:at] + encode_block(
        forged.header.crc, at + 8, 64, [Piece(forged.key, 8, 5, 3, 3)], payload, 9
    )
    with pytest.raises(CacheError, match=f"own offset of a block: expected {at}, found {at + 8}"):
        forged.read()


def test_too_many_rows_in_a_block(forged):
    forged.block(0, 8, rows=257)
    with pytest.raises(CacheError, match="rows of a block: expected 1..256, found 257"):
        forged.read()


def test_rows_that_the_piece_counts_otherwise(forged):
    forged.block(0, 8, cached_rows=7)
    with pytest.raises(CacheError, match="cached rows of a block: expected 7, found 8"):
        forged.read()


def test_payload_that_is_too_short(forged):
    forged.block(0, 8, payload=b"too short")
    with pytest.raises(CacheError, match=f"offset {forged.begin}: bytes of a payload: expected 68, found 9"):
        forged.read()


@pytest.mark.parametrize("entries", [23, 25])
def test_another_number_of_entries_than_the_block_says(forged, entries):
    forged.block(0, 8, entries=entries)
    with pytest.raises(CacheError, match=f"offset {forged.begin}: entries of a block: expected"):
        forged.read()


def test_entries_that_would_fill_the_memory(forged):
    forged.block(0, 8, entries=(1 << 32) - 1)
    with pytest.raises(CacheError, match=f"entries of a block: expected 0..24, found {(1 << 32) - 1}"):
        forged.read()


def test_payload_that_goes_on_after_its_end(forged):
    forged.block(0, 8, payload=forged.model.encode(forged.rows) + b"x")
    with pytest.raises(CacheError, match="end of a payload"):
        forged.read()


def test_more_rows_than_the_payload_has(forged):
    forged.block(0, 8, payload=forged.model.encode(forged.rows.slice(0, 5)))
    with pytest.raises(CacheError, match=f"offset {forged.begin}: "):
        forged.read()


def _of_another_cache(forged: Forged, item: Example, **fields: object) -> bytes:
    """A payload under the same model, of rows that this cache cannot hold."""
    other = manifest(**{"k": 3, "temperatures": (1.0, 2.0)} | fields)
    rows = canonical_rows("", item.tokens, item.targets, item.next_logprobs, None, other)
    return RowModel(learn_model([forged.rows], None, CACHE), other).encode(rows)


def test_rows_that_lack_more_than_k_entries(forged):
    wide = manifest(k=8, temperatures=(1.0, 2.0))
    forged.block(0, 8, payload=_of_another_cache(forged, example(9, 9, wide, torch.ones(8, dtype=torch.int64)), k=8))
    with pytest.raises(CacheError, match="entries that a row lacks, below k: expected 3, found 7"):
        forged.read()


def test_ids_outside_of_the_vocabulary(forged, examples):
    item = examples[2]
    targets = dataclasses.replace(item.targets, ids=item.targets.ids + 1000)
    payload = _of_another_cache(forged, Example(item.tokens, targets, item.next_logprobs), vocab=2000)
    forged.block(0, 8, payload=payload)
    with pytest.raises(CacheError, match=re.escape("ids, below: expected 1000, found 1")):
        forged.read()


def test_model_of_another_place(forged):
    for model in (0, 65, forged.begin, 1 << 40):
        other = copy.copy(forged)
        other.block(0, 8, model=model)
        with pytest.raises(CacheError, match="offset of a block's model|magic of a model|head of a model"):
            other.read()


@pytest.mark.parametrize("payload", [b"", bytes(20), bytes(200), b"\xff" * 200])
def test_model_that_is_none(forged, payload):
    forged.data = forged.header.encode() + encode_model(forged.header.crc, 64, payload)
    forged.begin = len(forged.data)
    forged.block(0, 8)
    with pytest.raises(
        CacheError, match="offset 64: (bytes of a model|symbols of a context|end of a model|frequencies)"
    ):
        forged.read()


def test_index_that_is_not_what_stands_in_the_blocks(tmp_path, examples):
    forged = Forged(tmp_path, examples[2])
    forged.block(0, 8)
    begin, size = forged.begin, len(forged.data) - forged.begin
    for wrong in ([], [IndexEntry(bytes(16), begin, size, 8, 8)], [IndexEntry(forged.key, begin, size, 7, 8)]):
        forged.path.write_bytes(forged.data + encode_index(forged.header.crc, len(forged.data), wrong))
        with pytest.raises(CacheError, match="index entry: expected"):
            Shard(forged.path, forged.header).check()


def test_verify_reports_progress(folder):
    reader, steps = CacheReader(folder), []
    reader.verify(steps.append)
    assert len(steps) == 2 and 0.5 * reader.bytes < sum(steps) <= reader.bytes


def test_keys_that_agree_in_half():
    """The index is sorted by half a key; the other half decides."""
    entries = [IndexEntry(b"a" * 8 + bytes([i]) * 8, 64 + i, 100, 2, 1) for i in range(5)]
    packed = [encode_index(0, 0, part)[: 40 * len(part)] for part in (entries[3:], entries[:3], entries[1:2])]
    index = MergedIndex(packed)
    assert len(index) == 5 and index.rows == 10 and index.cached_rows == 5
    assert sorted(index.keys()) == sorted(entry.key for entry in entries)
    for i, entry in enumerate(entries):
        assert index.find(entry.key) == (0 if i >= 3 else 1, entry)
    for absent in (b"a" * 8 + b"\x09" * 8, bytes(16), b"\xff" * 16):
        assert index.find(absent) is None


def test_shard_that_ends_inside_of_a_sequence(tmp_path, examples):
    forged = Forged(tmp_path, examples[2])
    forged.block(0, 5)
    forged.path.write_bytes(forged.data + encode_index(forged.header.crc, len(forged.data), []))
    with pytest.raises(CacheError, match="rows of sequence .*: expected 8, found 5"):
        Shard(forged.path, forged.header).check()
