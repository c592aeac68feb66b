"""Folders become one folder without a row being read; what is not of one cache, or not whole, is refused."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from cache_builders import Example, assert_holds, assert_rows, example, manifest, write
from kd_kernels.cache import CacheError, CacheReader, CacheWriter, merge

CACHE = manifest()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [example(length, length, CACHE) for length in (2, 40, 9, 17, 5, 12)]


@pytest.fixture
def folders(tmp_path, examples) -> list[Path]:
    """Three folders of two shards each, all by writers called w0."""
    made = []
    for i in range(3):
        made.append(tmp_path / f"part{i}")
        write(made[-1], CACHE, examples[2 * i : 2 * i + 2], rows_per_block=1, rows_per_shard=1)
    return made


def test_other_names_are_linked_as_they_are(tmp_path, examples):
    write(tmp_path / "a", CACHE, examples[:2], writer="host1", rows_per_block=1, rows_per_shard=1)
    write(tmp_path / "b", CACHE, examples[2:], writer="host2")
    done = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert done == (3, 3, 0, {})
    assert_holds(tmp_path / "out", CACHE, examples)
    for folder, name in (("a", "host1-000000"), ("a", "host1-000001"), ("b", "host2-000000")):
        assert os.path.samefile(tmp_path / folder / f"{name}.kdc", tmp_path / "out" / f"{name}.kdc")
    for folder, name in (("a", "host1"), ("b", "host2")):
        lines = (tmp_path / folder / f"{name}.journal").read_bytes()
        assert (tmp_path / "out" / f"{name}.journal").read_bytes() == lines
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".kdc", ".journal", ".lock", ".jsonl"}


def test_equal_names_are_told_apart(tmp_path, folders, examples):
    done = merge(folders, tmp_path / "out")
    assert done.shards == done.added == 6
    assert done.renamed == {
        (folders[i], f"w0-00000{n}.kdc"): f"w0_{i + 1}-00000{n}.kdc" for i in (1, 2) for n in (0, 1)
    }
    assert_holds(tmp_path / "out", CACHE, examples)


def test_what_was_merged_can_be_merged_and_written_to_again(tmp_path, folders, examples):
    merge(folders[:2], tmp_path / "two")
    done = merge([folders[2], tmp_path / "two"], tmp_path / "three")
    assert done.shards == 6
    assert set(done.renamed.values()) == {f"w0_{i}-00000{n}.kdc" for i in (2, 3) for n in (0, 1)}
    assert_holds(tmp_path / "three", CACHE, examples)
    for seed, writer in enumerate(("w0", "w0_2", "new")):
        item = example(7, seed, CACHE)
        with CacheWriter(tmp_path / "three", CACHE, writer=writer) as more:
            assert len(more) == len(examples)
            more.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
        examples = [*examples, item]
        assert_holds(tmp_path / "three", CACHE, examples)


def test_merging_again_adds_what_is_new(tmp_path, folders, examples):
    assert merge(folders[:1], tmp_path / "out").added == 2
    assert merge(folders[:2], tmp_path / "out")[:2] == (4, 2)
    assert merge(folders, tmp_path / "out")[:2] == (6, 2)
    assert merge(folders, tmp_path / "out")[:2] == (6, 0)
    assert_holds(tmp_path / "out", CACHE, examples)


def test_a_sequence_in_several_folders_counts_once(tmp_path, examples):
    write(tmp_path / "a", CACHE, examples[:4], writer="a")
    write(tmp_path / "b", CACHE, examples[2:], writer="b")
    shutil.copytree(tmp_path / "a", tmp_path / "a2")
    assert merge([tmp_path / "a", tmp_path / "a2", tmp_path / "b"], tmp_path / "out").shards == 2
    assert_holds(tmp_path / "out", CACHE, examples)


def test_other_file_systems_get_checked_copies(tmp_path, folders, examples, monkeypatch):
    def link(source: Path, target: Path) -> None:
        if Path(target).suffix == ".kdc":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target)

    real = os.link
    monkeypatch.setattr(os, "link", link)
    done = merge(folders, tmp_path / "out")
    assert done.copied_bytes == sum(CacheReader(folder).bytes for folder in folders)
    shutil.rmtree(folders[0])
    assert_holds(tmp_path / "out", CACHE, examples)


@pytest.mark.parametrize("copies", [False, True])
def test_stopped_anywhere_and_merged_again(tmp_path, folders, examples, monkeypatch, copies):
    """At every call that changes the folder, before and after it."""

    class Stop(BaseException):
        pass

    calls = {name: getattr(os, name) for name in ("link", "fsync", "rename", "pwrite", "open")}
    counted, stop_at, after = 0, -1, False

    def counting(name: str):
        def call(*arguments: object, **options: object):
            nonlocal counted
            if copies and name == "link" and Path(arguments[1]).suffix == ".kdc":
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            counted += 1
            if counted == stop_at and not after:
                raise Stop
            result = calls[name](*arguments, **options)
            if counted == stop_at:
                raise Stop
            return result

        return call

    for name in calls:
        monkeypatch.setattr(os, name, counting(name))
    merge(folders[:2], tmp_path / "whole")
    total = counted
    for stop in range(1, total + 1, 3):
        for late in (False, True):
            counted, stop_at, after = 0, stop, late
            with pytest.raises(Stop):
                merge(folders[:2], tmp_path / "out")
            stop_at = -1
            if (tmp_path / "out" / "manifest.jsonl").exists():
                assert len(CacheReader(tmp_path / "out")) <= 4
            assert merge(folders[:2], tmp_path / "out").shards == 4
            assert_holds(tmp_path / "out", CACHE, examples[:4])
            assert len(list((tmp_path / "out").glob("*.kdc"))) == 4
            shutil.rmtree(tmp_path / "out")
    assert total > 20


@pytest.mark.parametrize("field, other", [
    ("teacher", "another"), ("tokenizer", "another"), ("chat_template", "another"), ("bos_policy", "1 text"), ("k", 4),
    ("step_nats", 0.125), ("head_dtype", "bfloat16"),
])
def test_refuses_other_manifests(tmp_path, folders, field, other):
    cache = manifest(**{field: other})
    write(tmp_path / "other", cache, [example(3, 0, cache)])
    found = f"expected {getattr(CACHE, field)}, found {other}; like {folders[0]}: caches of one identity"
    message = f"manifest.{field}: {found}"
    with pytest.raises(CacheError, match=re.escape(message)) as caught:
        merge([*folders, tmp_path / "other"], tmp_path / "out")
    assert caught.value.path == tmp_path / "other" / "manifest.jsonl"
    assert not (tmp_path / "out").exists()
    message = f"manifest.{field}: expected {getattr(CACHE, field)}, found {other}; a folder holds one cache"
    with pytest.raises(CacheError, match=re.escape(message)):
        merge(folders, tmp_path / "other")


def test_meta_is_the_first_folders(tmp_path, examples):
    for name, item in zip("ab", examples):
        write(tmp_path / name, manifest(meta={"made": name}), [item], writer=name)
    merge([tmp_path / "b", tmp_path / "a"], tmp_path / "out")
    assert CacheReader(tmp_path / "out").manifest.meta == {"made": "b"}


def test_refuses_what_is_not_sealed(tmp_path, folders, examples):
    with CacheWriter(folders[1], CACHE, writer="alive") as writer:
        for item in examples:
            writer.add(item.tokens, item.targets)
        writer.flush()
        found = "expected none, found alive-000000.kdc.tmp; close their writers"
        message = f"{folders[1]}: shards that are not sealed: {found}"
        with pytest.raises(CacheError, match=re.escape(message)):
            merge(folders, tmp_path / "out")
        with pytest.raises(CacheError, match=re.escape(message)):
            merge(folders[:1], folders[1])
    assert not (tmp_path / "out").exists()
    assert merge(folders, tmp_path / "out").shards == 7
    (folders[2] / "w0.journal").unlink()
    with pytest.raises(CacheError, match="not sealed: expected none, found w0-000000.kdc, w0-000001.kdc"):
        merge(folders, tmp_path / "again")


def test_refuses_damage_before_it_makes_anything(tmp_path, folders):
    path = folders[1] / "w0-000001.kdc"
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=re.escape(str(path))):
        merge(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_a_name_that_is_being_written_under(tmp_path, folders):
    with CacheWriter(tmp_path / "out", CACHE), pytest.raises(CacheError, match="lock of writer w0: expected free"):
        merge(folders, tmp_path / "out")


@pytest.mark.parametrize("folders, out, message", [
    ([], "out", "merge: folders must be at least one, all different from each other and from out, got []"),
    (
        ["a", "b", "a"], "out",
        "merge: folders must be at least one, all different from each other and from out, got ['a', 'b', 'a']",
    ),
    (["a", "out"], "out", "merge: folders must be at least one, all different"),
    (["a", "s3://bucket/b"], "out", "merge: folders must be local paths, got 's3://bucket/b'; copy the folder first"),
    (["a"], "s3://bucket/out", "merge: out must be local paths, got 's3://bucket/out'"),
])
def test_refuses_arguments(folders, out, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        merge(folders, out)


def test_a_renamed_shard_is_still_held_to_its_name(tmp_path, folders, examples):
    """Its journal says what it was called when it was written; another shard in its place is found out."""
    merge(folders, tmp_path / "out")
    reader = CacheReader(tmp_path / "out")
    shutil.copy(folders[2] / "w0-000001.kdc", tmp_path / "swapped")
    os.replace(tmp_path / "swapped", tmp_path / "out" / "w0_2-000000.kdc")
    with pytest.raises(CacheError, match="w0_2-000000.kdc, offset 0: number of the shard: expected 0, found 1"):
        CacheReader(tmp_path / "out")
    with pytest.raises(CacheError, match="w0_2-000000.kdc, offset 0: number of the shard: expected 0, found 1"):
        reader.lookup(examples[2].tokens)
    shutil.copy(folders[2] / "w0-000000.kdc", tmp_path / "swapped")
    os.replace(tmp_path / "swapped", tmp_path / "out" / "w0_2-000000.kdc")
    with pytest.raises(CacheError, match="w0_2-000000.kdc, offset .*by w0_2.journal at 0: expected"):
        CacheReader(tmp_path / "out")


@pytest.mark.parametrize("origin", ["w0", "w0-x", "w 0-1", "../w0-1", 7])
def test_an_origin_that_is_none(tmp_path, folders, origin):
    from kd_kernels.cache.journal import encode_line, read_lines

    merge(folders, tmp_path / "out")
    path = tmp_path / "out" / "w0_2.journal"
    path.write_bytes(b"".join(encode_line(record | {"origin": origin}) for _, _, record in read_lines(path)))
    with pytest.raises(CacheError, match="w0_2.journal, offset 0: origin: expected WRITER-NUMBER, found"):
        CacheReader(tmp_path / "out")


def test_long_names(tmp_path, examples):
    for i, item in enumerate(examples[:3]):
        write(tmp_path / f"{i}", CACHE, [item], writer="w" * 24)
    assert set(merge([tmp_path / "0", tmp_path / "1", tmp_path / "2"], tmp_path / "out").renamed.values()) == {
        "w" * 22 + "_2-000000.kdc", "w" * 22 + "_3-000000.kdc",
    }
    assert_holds(tmp_path / "out", CACHE, examples[:3])


def test_a_reader_finds_them_in_any_order(tmp_path, folders, examples):
    merge(folders, tmp_path / "out")
    reader = CacheReader(tmp_path / "out")
    for i in torch.randperm(6, generator=torch.Generator().manual_seed(0)).tolist():
        assert_rows(reader.lookup(examples[i].tokens), examples[i], CACHE)
