"""Any number of writers, on any number of machines, with names of their own; and what is done for those that died."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch

from cache_builders import Example, assert_holds, example, manifest, write
from kd_kernels.cache import CacheError, CacheReader, CacheWriter, recover, writer_name
from kd_kernels.cache import lock as lock_module

CACHE = manifest(k=3)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [example(length, length, CACHE) for length in (4, 2, 7, 3, 9, 5, 6, 8)]


def killed(folder: Path, examples: list[Example], writer: str) -> None:
    """Leaves in the folder what a writer leaves there that is killed after it has written all blocks."""
    alive = folder.with_name(folder.name + "_alive")
    with CacheWriter(alive, CACHE, writer=writer, rows_per_block=1) as cache:
        for item in examples:
            cache.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
        cache.flush()
        shutil.copytree(alive, folder, dirs_exist_ok=True)
    shutil.rmtree(alive)


def deal(examples: list[Example], world: int, rank: int) -> list[Example]:
    """By content, so that what a rank gets depends on nothing but the world's size."""
    return [item for item in examples if int(item.tokens.sum()) % world == rank]


# ----------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("host, rank, name", [
    ("node17", 3, "node17_3"), ("n", 0, "n_0"), ("a_B_9", 12345, "a_B_9_12345"), ("node-17.cluster", 3, None),
    ("x" * 22, 0, "x" * 22 + "_0"), ("x" * 23, 0, None), ("x" * 22, 10, None), ("ünïcode", 1, None), ("", 0, "host_0"),
])
def test_names_of_writers(monkeypatch, tmp_path, host, rank, name):
    monkeypatch.setattr(platform, "node", lambda: host)
    made = writer_name(rank)
    assert re.fullmatch(r"[A-Za-z0-9_]{1,24}", made) and made.endswith(f"_{rank}")
    assert name is None or made == name
    CacheWriter(tmp_path, CACHE, writer=made).close()


def test_names_differ_where_what_fits_of_them_does_not(monkeypatch):
    names = set()
    hosts = ["node-1", "node.1", "node_1", "x" * 30 + "1", "x" * 30 + "2"]
    for host in hosts:
        monkeypatch.setattr(platform, "node", lambda host=host: host)
        names |= {writer_name(rank) for rank in (0, 1, 10, 99999999)}
    assert len(names) == 4 * len(hosts)


@pytest.mark.parametrize("rank", [-1, 10**8])
def test_ranks_that_are_none(rank):
    with pytest.raises(ValueError, match=f"writer_name: rank must be in 0..99999999, got {rank}"):
        writer_name(rank)


# ----------------------------------------------------------------------------------------------------------- locks


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str, boot: str) -> None:
    """From now on this is another machine."""
    (tmp_path / "boot").write_text(boot + "\n")
    monkeypatch.setattr(platform, "node", lambda: host)
    monkeypatch.setattr(lock_module, "_BOOT", tmp_path / "boot")


def test_a_name_that_another_machine_did_not_let_go_of(tmp_path, examples, monkeypatch):
    """Where locks are local to a machine, its lock looks free from here."""
    folder = tmp_path / "cache"
    writer = CacheWriter(folder, CACHE)
    with monkeypatch.context() as other:
        elsewhere(other, tmp_path, "other", "another boot")
        other.setattr(fcntl, "flock", lambda file, how: None)
        here = platform.node()
        message = f"w0.lock: lock of writer w0: expected free, found not let go of by process {os.getpid()} on "
        with pytest.raises(CacheError, match=re.escape(message) + ".*; if that process is dead, remove the file; else"):
            CacheWriter(folder, CACHE)
        assert here == "other"
    writer.add(examples[0].tokens, examples[0].targets, next_logprobs=examples[0].next_logprobs)
    writer.close()
    assert (folder / "w0.lock").read_bytes() == b""
    elsewhere(monkeypatch, tmp_path, "other", "another boot")
    CacheWriter(folder, CACHE).close()
    assert_holds(folder, CACHE, examples[:1])


@pytest.mark.parametrize("host, boot", [("same", "same"), ("same", "after a restart"), ("another container", "same")])
def test_a_name_that_died_on_this_machine_is_free(tmp_path, monkeypatch, host, boot):
    elsewhere(monkeypatch, tmp_path, "same", "same")
    CacheWriter(tmp_path / "cache", CACHE).close()
    (tmp_path / "cache" / "w0.lock").write_text("4711 same same")
    elsewhere(monkeypatch, tmp_path, host, boot)
    CacheWriter(tmp_path / "cache", CACHE).close()


def test_a_process_that_has_not_yet_said_who_it_is(tmp_path):
    CacheWriter(tmp_path, CACHE).close()
    with open(tmp_path / "w0.lock", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CacheError, match="found held by a process that has only just started"):
            CacheWriter(tmp_path, CACHE)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    message = "w0.lock: locking the name of the writer: .*found No locks available; .*write elsewhere and merge"
    with pytest.raises(CacheError, match=message):
        CacheWriter(tmp_path, CACHE)


# -------------------------------------------------------------------------------------------------------- recovery


def test_recover_seals_what_the_dead_left(tmp_path, examples):
    folder = tmp_path / "cache"
    write(folder, CACHE, examples[:1], writer="done")
    killed(folder, examples[1:3], "a")
    killed(folder, examples[3:5], "b")
    killed(folder, [], "c")
    with CacheWriter(folder, CACHE, writer="alive") as writer:
        writer.add(examples[5].tokens, examples[5].targets, next_logprobs=examples[5].next_logprobs)
        writer.flush()
        assert len(CacheReader(folder)) == 1
        assert recover(folder) == ["a-000000.kdc", "b-000000.kdc"]
        assert recover(folder) == []
        assert_holds(folder, CACHE, examples[:5])
    assert_holds(folder, CACHE, examples[:6])
    assert not list(folder.glob("*.tmp"))


def test_recover_journals_what_was_sealed_last(tmp_path, examples):
    write(tmp_path, CACHE, examples, rows_per_block=1, rows_per_shard=8)
    lines = (tmp_path / "w0.journal").read_bytes().splitlines(keepends=True)
    (tmp_path / "w0.journal").write_bytes(b"".join(lines[:-1]))
    assert recover(tmp_path) == [f"w0-{len(lines) - 1:06d}.kdc"]
    assert_holds(tmp_path, CACHE, examples)


def test_recover_does_not_decide_about_other_machines(tmp_path, examples, monkeypatch):
    folder = tmp_path / "cache"
    killed(folder, examples[:2], "a")
    killed(folder, examples[2:4], "b")
    (folder / "a.lock").write_text("4711 other another-boot")
    with pytest.raises(
        CacheError, match="lock of writer a: .*not let go of by process 4711 on other; if that process is dead"
    ):
        recover(folder)
    assert_holds(folder, CACHE, examples[2:4])
    (folder / "a.lock").unlink()
    assert recover(folder) == ["a-000000.kdc"]
    assert_holds(folder, CACHE, examples[:4])


def test_recover_refuses_what_is_no_cache(tmp_path):
    with pytest.raises(CacheError, match="manifest.jsonl: reading: expected success, found No such file"):
        recover(tmp_path)


@pytest.mark.parametrize("before, after", [(4, 1), (4, 3), (1, 4), (3, 8)])
def test_resume_with_another_world_size(tmp_path, examples, before, after):
    """A job of so many processes dies; one of another size goes on. Nothing is computed twice."""
    folder = tmp_path / "cache"
    for rank in range(before):
        killed(folder, deal(examples, before, rank)[:1], f"r{rank}")
    there = sum(bool(deal(examples, before, rank)) for rank in range(before))
    recover(folder)
    computed = 0
    for rank in range(after):
        with CacheWriter(folder, CACHE, writer=f"r{rank}") as writer:
            for item in deal(examples, after, rank):
                computed += writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
    assert computed == len(examples) - there
    assert_holds(folder, CACHE, examples)


def test_writers_at_once_of_every_kind_of_overlap(tmp_path, examples):
    """Four writers, each of which adds what it likes: every sequence is there, and each is found once."""
    generator = torch.Generator().manual_seed(0)
    writers = [CacheWriter(tmp_path, CACHE, writer=writer_name(rank), rows_per_shard=6) for rank in range(4)]
    for item in examples:
        for writer in (writers[i] for i in torch.randperm(4, generator=generator)[:2].tolist()):
            assert writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
    for writer in writers:
        writer.close()
    assert_holds(tmp_path, CACHE, examples)
