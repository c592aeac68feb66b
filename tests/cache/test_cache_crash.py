"""Killed, out of space, started twice: nothing that was written is lost, and the next writer goes on."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache_builders import Example, assert_holds, example, manifest, write
from kd_kernels.cache import CacheError, CacheReader, CacheWriter, content_key

CACHE = manifest(k=3)
HERE = Path(__file__).resolve().parent


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing changes no byte, and takes most of the time of tests that open a folder a thousand times."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [example(length, length, CACHE) for length in (4, 2, 7, 3)]


def complete(folder: Path, examples: list[Example], writer: str = "w0") -> int:
    """Resumes as a builder of caches does, and checks all. Returns how many sequences were there already."""
    with CacheWriter(folder, CACHE, writer=writer, rows_per_block=4) as cache:
        there = [item for item in examples if cache.key(item.tokens) in cache]
        assert len(cache) == len(there)
        for item in examples:
            assert cache.add(item.tokens, item.targets, next_logprobs=item.next_logprobs) == (item not in there)
    assert_holds(folder, CACHE, examples)
    assert not list(folder.glob("*.tmp"))
    return len(there)


def unsealed(folder: Path, examples: list[Example]) -> Path:
    """A folder as a process leaves it that is killed after writing all blocks. Returns the shard in progress."""
    alive = folder / "alive"
    with CacheWriter(alive, CACHE, rows_per_block=4) as writer:
        for item in examples:
            writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
        writer.flush()
        shutil.copytree(alive, folder / "killed")
    return folder / "killed" / "w0-000000.kdc.tmp"


def test_a_shard_torn_at_every_byte(tmp_path, examples, no_sync):
    torn = unsealed(tmp_path, examples)
    data = torn.read_bytes()
    recovered, outcomes = [], set()
    for size in range(len(data) + 1):
        folder = shutil.copytree(torn.parent, tmp_path / "resumed")
        (folder / torn.name).write_bytes(data[:size])
        with CacheWriter(folder, CACHE) as writer:
            recovered.append(len(writer))
        sealed = b"".join(path.read_bytes() for path in folder.glob("*.kdc*"))
        if sealed not in outcomes:
            outcomes.add(sealed)
            assert_holds(folder, CACHE, examples[: recovered[-1]])
            assert complete(folder, examples) == recovered[-1]
        shutil.rmtree(folder)
    assert recovered == sorted(recovered) and set(recovered) == {0, 2, 3, 4}, "the first block holds two sequences"
    assert len(outcomes) == 4, "what is recovered depends on the whole sequences alone"


def test_a_shard_with_garbage_where_its_end_was(tmp_path, examples, no_sync):
    """A power cut may leave the right length with blocks of anything in it."""
    torn = unsealed(tmp_path, examples)
    data = torn.read_bytes()
    torn.write_bytes(data[:-20] + bytes(20))
    assert complete(torn.parent, examples) == 3
    with pytest.raises(CacheError, match="found none such"):
        CacheReader(torn.parent).lookup(torch.tensor([1, 2]))


def test_a_shard_whose_index_is_written_and_whose_name_is_not(tmp_path, examples, no_sync):
    write(tmp_path, CACHE, examples, rows_per_block=4)
    os.rename(tmp_path / "w0-000000.kdc", tmp_path / "w0-000000.kdc.tmp")
    os.truncate(tmp_path / "w0.journal", 0)
    assert complete(tmp_path, examples) == 4


def test_a_journal_torn_at_every_byte(tmp_path, examples, no_sync):
    examples = examples[:2]
    write(tmp_path / "whole", CACHE, examples, rows_per_block=1, rows_per_shard=1)
    data = (tmp_path / "whole" / "w0.journal").read_bytes()
    assert data.count(b"\n") == 2
    for size in range(len(data) + 1):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / "torn")
        (folder / "w0.journal").write_bytes(data[:size])
        reader = CacheReader(folder)
        assert len(reader) == data[:size].count(b"\n")
        for item in examples:
            assert (content_key(item.tokens, CACHE) in reader) == (item in examples[: len(reader)])
        with CacheWriter(folder, CACHE) as writer:
            assert len(writer) == 2
        assert (folder / "w0.journal").read_bytes() == data
        shutil.rmtree(folder)


def test_a_torn_line_longer_than_the_next(tmp_path, examples):
    write(tmp_path, CACHE, examples[:2])
    journal = tmp_path / "w0.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + bytes(1000))
    assert complete(tmp_path, examples) == 2
    assert journal.read_bytes().startswith(whole) and journal.read_bytes().count(b"\0") == 0


def test_a_lost_journal_is_rebuilt(tmp_path, examples):
    write(tmp_path, CACHE, examples, rows_per_block=1, rows_per_shard=1)
    before = (tmp_path / "w0.journal").read_bytes()
    (tmp_path / "w0.journal").unlink()
    assert len(CacheReader(tmp_path)) == 0
    assert complete(tmp_path, examples) == 4
    assert (tmp_path / "w0.journal").read_bytes() == before


def test_a_damaged_shard_is_not_journalled(tmp_path, examples):
    write(tmp_path, CACHE, examples)
    (tmp_path / "w0.journal").unlink()
    shard = tmp_path / "w0-000000.kdc"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match="w0-000000.kdc, offset 64: CRC-32 of a model"):
        CacheWriter(tmp_path, CACHE)


def test_an_unsealed_shard_of_another_cache_is_left_alone(tmp_path, examples):
    torn = unsealed(tmp_path, examples)
    data = bytearray(torn.read_bytes())
    data[20] ^= 1
    torn.write_bytes(data)
    with pytest.raises(CacheError, match="w0-000000.kdc.tmp, offset 0: CRC-32 of the shard header"):
        CacheWriter(torn.parent, CACHE)
    assert torn.read_bytes() == data


def test_an_unsealed_shard_never_replaces_a_sealed_one(tmp_path, examples):
    torn = unsealed(tmp_path, examples)
    shutil.copy(tmp_path / "alive" / "w0-000000.kdc", torn.parent)
    message = "sealed shard of the same number: expected none, found one beside w0-000000.kdc.tmp"
    with pytest.raises(CacheError, match=message):
        CacheWriter(torn.parent, CACHE)


def test_reader_says_what_is_not_sealed(tmp_path, examples):
    torn = unsealed(tmp_path, examples)
    with pytest.raises(CacheError, match="found none such among 0; not sealed: w0-000000.kdc.tmp"):
        CacheReader(torn.parent).lookup(examples[0].tokens)


KILLED = """
import sys
from pathlib import Path
from cache_builders import example
from test_cache_crash import CACHE
from kd_kernels.cache import CacheWriter
with CacheWriter(Path(sys.argv[1]), CACHE, rows_per_block=16, rows_per_shard=400) as writer:
    for seed in range(100_000):
        item = example(2 + seed % 40, seed, CACHE)
        writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
        print(seed, flush=True)
"""


def test_kill_9(tmp_path):
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE), *sys.path])
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    added = 0
    for line in child.stdout:
        added = int(line) + 1
        if added == 60:
            message = f"lock of writer w0: expected free, found held by process {child.pid}"
            with pytest.raises(CacheError, match=message):
                CacheWriter(tmp_path, CACHE)
            child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and added >= 60
    examples = [example(2 + seed % 40, seed, CACHE) for seed in range(added + 1)]
    with CacheWriter(tmp_path, CACHE) as writer:
        there = [writer.key(item.tokens) in writer for item in examples]
        lost = there[:added].count(False)
        assert there[: added - lost] == [True] * (added - lost), "what is lost is the last"
        assert sum(len(item.next_logprobs) for item in examples[added - lost : added]) <= 16, "and at most a block"
        for item in examples:
            writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
    assert_holds(tmp_path, CACHE, examples)


def test_one_process_a_name(tmp_path, examples):
    with CacheWriter(tmp_path, CACHE) as writer:
        message = f"w0.lock: lock of writer w0: expected free, found held by process {os.getpid()} on .*; one process"
        with pytest.raises(CacheError, match=message):
            CacheWriter(tmp_path, CACHE)
        for item in examples:
            writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
    assert_holds(tmp_path, CACHE, examples)


def test_two_writers_at_once(tmp_path, examples):
    with CacheWriter(tmp_path, CACHE, writer="w0") as first, CacheWriter(tmp_path, CACHE, writer="w1") as second:
        for writer, items in ((first, examples[:3]), (second, examples[2:])):
            for item in items:
                writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
    assert {path.name for path in tmp_path.glob("*.kdc")} == {"w0-000000.kdc", "w1-000000.kdc"}
    assert_holds(tmp_path, CACHE, examples)  # examples[2] is in both shards, and counts once


@pytest.mark.parametrize("writer", ["w0", "other"])
def test_resume(tmp_path, examples, writer):
    write(tmp_path, CACHE, examples[:2])
    assert complete(tmp_path, examples, writer=writer) == 2


def test_another_name_leaves_an_unsealed_shard_to_its_owner(tmp_path, examples):
    torn = unsealed(tmp_path, examples)
    with CacheWriter(torn.parent, CACHE, writer="w1") as writer:
        assert len(writer) == 0
    assert torn.exists()
    assert complete(torn.parent, examples) == 4


class Disk:
    """Stands for os.pwrite on a disk that has room for so many bytes more."""

    def __init__(self, room: int) -> None:
        self.room, self.real = room, os.pwrite

    def __call__(self, file: int, data: memoryview, offset: int) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.real(file, data[: self.room], offset)
        self.room -= written
        return written


def test_disk_full_after_any_number_of_bytes(tmp_path, examples, monkeypatch, no_sync):
    disk = Disk(1 << 20)
    monkeypatch.setattr(os, "pwrite", disk)
    write(tmp_path / "whole", CACHE, examples, rows_per_block=4, rows_per_shard=4)
    total = (1 << 20) - disk.room
    kept = []
    for room in range(0, total, 21):
        folder = tmp_path / "full"
        monkeypatch.setattr(os, "pwrite", Disk(room))
        message = "expected success, found No space left on device; .*(make room|the shard is safe)"
        with pytest.raises(CacheError, match=message) as caught:
            write(folder, CACHE, examples, rows_per_block=4, rows_per_shard=4)
        assert caught.value.path.parent == folder
        monkeypatch.setattr(os, "pwrite", disk)
        kept.append(complete(folder, examples))
        shutil.rmtree(folder)
    assert kept == sorted(kept) and set(kept) == {0, 2, 3, 4}


def test_writes_that_do_a_part_only(tmp_path, examples, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:7], offset))
    write(tmp_path, CACHE, examples)
    assert_holds(tmp_path, CACHE, examples)


@pytest.mark.parametrize("call, message", [
    ("fsync", "found Input/output error"), ("rename", "sealing the shard: expected success, found Input/output error"),
])
def test_a_disk_that_fails(tmp_path, examples, monkeypatch, call, message):
    with CacheWriter(tmp_path, CACHE) as writer:
        for item in examples:
            writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
        with monkeypatch.context() as broken:
            def fail(*arguments: object) -> None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            broken.setattr(os, call, fail)
            with pytest.raises(CacheError, match=message):
                writer.close()
        for use in (writer.flush, lambda: writer.add(examples[0].tokens, examples[0].targets)):
            with pytest.raises(CacheError, match="writer w0: expected open, found closed; open the folder again"):
                use()
    assert complete(tmp_path, examples) == 4


def test_folder_that_cannot_be_made_or_written(tmp_path, examples):
    (tmp_path / "file").write_text("")
    nested = tmp_path / "file" / "cache"
    message = re.escape(f"{nested}: making the folder: expected success, found Not a directory")
    with pytest.raises(CacheError, match=message):
        CacheWriter(nested, CACHE)
    with pytest.raises(CacheError, match="making the folder: expected success, found File exists"):
        CacheWriter(tmp_path / "file", CACHE)
    (tmp_path / "w0.lock").mkdir()
    message = "w0.lock: locking the name of the writer: expected success, found Is a directory"
    with pytest.raises(CacheError, match=message):
        CacheWriter(tmp_path, CACHE)


def test_disk_full_while_the_manifest_is_made(tmp_path, examples, monkeypatch):
    with monkeypatch.context() as full:
        def link(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full.setattr(os, "link", link)
        message = "manifest.jsonl: creating the manifest: expected success, found No space left"
        with pytest.raises(CacheError, match=message):
            CacheWriter(tmp_path, CACHE)
    assert complete(tmp_path, examples) == 0


def test_the_slower_of_two_processes_that_make_the_folder(tmp_path, examples, monkeypatch):
    """Both saw no manifest: the second one's link fails, and it takes the first one's."""
    real = os.link

    def slower(source: Path, target: Path) -> None:
        with monkeypatch.context() as undone:
            undone.setattr(os, "link", real)
            CacheWriter(tmp_path, CACHE, writer="faster").close()
        real(source, target)

    monkeypatch.setattr(os, "link", slower)
    assert complete(tmp_path, examples) == 0


def test_an_error_of_the_caller_seals_what_was_added(tmp_path, examples):
    with pytest.raises(ZeroDivisionError):
        with CacheWriter(tmp_path, CACHE) as writer:
            for item in examples:
                writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
            raise ZeroDivisionError
    assert_holds(tmp_path, CACHE, examples)
