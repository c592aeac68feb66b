"""A cache is read from local files, and from whatever fsspec opens, with the same checks."""

from __future__ import annotations

import pickle
import re
import sys
import uuid
from pathlib import Path

import pytest
import torch

from cache_builders import Example, assert_rows, example, manifest, write
from kd_kernels.cache import CacheError, CacheReader

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")

CACHE = manifest(temperatures=(1.0, 2.0))


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [example(length, length, CACHE) for length in (2, 40, 9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, examples) -> Path:
    """Two writers, five shards."""
    folder = tmp_path_factory.mktemp("cache")
    write(folder, CACHE, examples, rows_per_block=8, rows_per_shard=8)
    write(folder, CACHE, [example(5, 99, CACHE)], writer="w1")
    return folder


@pytest.fixture
def in_memory(folder) -> str:
    """The URL of a copy."""
    url = f"memory://{uuid.uuid4().hex}/cache"
    system, root = fsspec.core.url_to_fs(url)
    system.put(f"{folder}/", root, recursive=True)
    yield url
    system.rm(root, recursive=True)


@pytest.mark.parametrize("scheme", ["local path", "file", "memory", "chained"])
def test_every_source_gives_the_same_rows(folder, in_memory, examples, scheme):
    url = {
        "local path": folder, "file": f"file://{folder}", "memory": in_memory,
        "chained": f"simplecache::file://{folder}",
    }[scheme]
    reader = CacheReader(url, teacher=CACHE.teacher)
    assert len(reader) == 4 and reader.bytes == sum(path.stat().st_size for path in folder.glob("*.kdc"))
    for item in examples:
        assert_rows(reader.lookup(item.tokens), item, CACHE)
    reader.verify()
    again = pickle.loads(pickle.dumps(reader))
    assert_rows(again.lookup(examples[1].tokens), examples[1], CACHE)
    assert str(reader.folder) == str(url)


def test_a_url_fails_as_closed_as_a_path(in_memory, examples):
    system, root = fsspec.core.url_to_fs(in_memory)
    reader = CacheReader(in_memory)
    name = next(path for path in system.glob(f"{root}/w0-*.kdc") if path.endswith("w0-000000.kdc"))
    original = system.cat_file(name)
    with pytest.raises(CacheError, match=re.escape(f"{in_memory}: sequence: expected key")) as caught:
        reader.lookup(torch.tensor([1, 2, 3]))
    assert caught.value.path == in_memory
    flipped = bytearray(original)
    flipped[90] ^= 1
    system.pipe_file(name, bytes(flipped))
    with pytest.raises(CacheError, match=re.escape(f"{in_memory}/w0-000000.kdc, offset 64: ")) as caught:
        reader.lookup(examples[0].tokens)
    assert caught.value.path == f"{in_memory}/w0-000000.kdc" and caught.value.offset == 64
    system.pipe_file(name, original[:70])
    with pytest.raises(CacheError, match="offset [0-9]+: bytes to the end of the file: expected at least"):
        reader.lookup(examples[0].tokens)
    with pytest.raises(CacheError, match="w0-000000.kdc, offset 70: bytes of the shard, by w0.journal at 0: expected"):
        CacheReader(in_memory)
    system.rm(name)
    with pytest.raises(CacheError, match="w0-000000.kdc: opening the shard: expected success, found FileNotFoundError"):
        CacheReader(in_memory)


@pytest.mark.parametrize("url, message", [
    (
        "memory://absent/cache",
        "memory://absent/cache/manifest.jsonl: reading: expected success, found FileNotFoundError",
    ),
    ("file:///absent/cache", "file:///absent/cache/manifest.jsonl: reading: expected success, found FileNotFoundError"),
    ("nowhere://x", "nowhere://x: opening the file system: expected success, found ValueError: Protocol not known"),
])
def test_urls_that_lead_nowhere(url, message):
    with pytest.raises(CacheError, match=re.escape(message)):
        CacheReader(url)


class Guarded(fsspec.get_filesystem_class("memory")):
    """A file system that asks for a key."""

    protocol, cachable = "guarded", False

    def __init__(self, key: str = "", **options: object) -> None:
        super().__init__(**options)
        if key != "secret":
            raise PermissionError(f"no access with key {key!r}")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("guarded://", "memory://"))


def test_options_are_the_file_systems(folder, in_memory, examples):
    fsspec.register_implementation("guarded", Guarded, clobber=True)
    url = in_memory.replace("memory://", "guarded://")
    with pytest.raises(CacheError, match="opening the file system: .* PermissionError: no access with key ''"):
        CacheReader(url)
    reader = pickle.loads(pickle.dumps(CacheReader(url, storage_options={"key": "secret"})))
    assert_rows(reader.lookup(examples[0].tokens), examples[0], CACHE)
    with pytest.raises(ValueError, match="CacheReader: storage_options must be None for the local path"):
        CacheReader(folder, storage_options={"key": "secret"})


def test_without_fsspec_a_url_says_what_to_install_and_a_path_works(folder, examples, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    message = "CacheReader: folder must be a local path without fsspec, got 's3://bucket/cache'; pip install fsspec"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        CacheReader("s3://bucket/cache")
    assert_rows(CacheReader(folder).lookup(examples[0].tokens), examples[0], CACHE)
