"""Several processes fill one cache: each its share, any number after any other, nothing twice."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter

import pytest
import torch

from kd_kernels import topk_targets
from kd_kernels.cache import CacheManifest, CacheReader, CacheWriter
from kd_trainer.caching.build import build_cache
from kd_trainer.caching.options import CacheOptions
from kd_trainer.caching.team import Team
from kd_trainer.config import DataConfig
from kd_trainer.data import load_documents
from kd_trainer.models import load_tokenizer
from processes import launch_kdk

OPTIONS = CacheOptions(k=20, step_nats=0.0, batch_tokens=200, writer="w")


@pytest.fixture
def data(text):
    return DataConfig(source=str(text), max_length=48)


def launched(arguments: list[str]) -> None:
    """Runs ``kdk`` in two processes, of which one tells what was done."""
    first, second = launch_kdk(arguments, timeout=300)
    assert first and not second


def command(tiny, text, out) -> list[str]:
    return [
        "cache", "build", "--teacher", str(tiny), "--data", str(text), "--out", str(out), "--max-length", "48", "--k",
        "20", "--step-nats", "0", "--batch-tokens", "200", "--writer", "w",
    ]


def unsealed_writers(folder) -> set[str]:
    """Names of the writers that have a file under construction."""
    return {path.name.rsplit("-", 1)[0] for path in folder.glob("*.kdc.tmp")}


def sequences_of(folder) -> Counter:
    """How many shards each writer has."""
    return Counter(path.name.split("-")[0] for path in folder.glob("*.kdc"))


def test_two_processes_write_what_one_writes(tiny, text, data, tmp_path):
    """One process begins and stops, two go on, one more finds nothing left to do: the same rows as of one alone."""
    build_cache(str(tiny), data, tmp_path / "one", OPTIONS)
    build_cache(str(tiny), dataclasses.replace(data, limit=15), tmp_path / "many", OPTIONS)
    before = set(CacheReader(tmp_path / "many").keys())
    launched(command(tiny, text, tmp_path / "many"))
    assert set(sequences_of(tmp_path / "many")) == {"w0", "w1"}
    numbers = build_cache(str(tiny), data, tmp_path / "many", OPTIONS)
    one, many = CacheReader(tmp_path / "one"), CacheReader(tmp_path / "many")
    assert before < set(many.keys()) == set(one.keys()) and numbers["rows"] == one.rows
    for document in load_documents(data, load_tokenizer(str(tiny))):
        ours, theirs = one.targets(document.tokens), many.targets(document.tokens)
        assert torch.equal(ours.offsets, theirs.offsets)
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)  # other batches, other rounding


def test_every_document_is_one_processs_and_shares_are_even():
    keys = [i.to_bytes(16, "big") for i in range(4000)]
    for size in (1, 2, 3, 8):
        team = [Team(rank, size, torch.device("cpu"), None) for rank in range(size)]
        owners = [[member.rank for member in team if member.owns(key)] for key in keys]
        assert all(len(owner) == 1 for owner in owners)
        counts = Counter(owner[0] for owner in owners)
        assert all(abs(counts[rank] - 4000 / size) < 5 * (4000 / size) ** 0.5 for rank in range(size))


def test_what_one_of_four_left_is_shared_out_among_two():
    keys = [i.to_bytes(16, "big") for i in range(4000)]
    left = [key for key in keys if Team(3, 4, torch.device("cpu"), None).owns(key)]
    first = sum(Team(0, 2, torch.device("cpu"), None).owns(key) for key in left)
    assert abs(first - len(left) / 2) < 5 * (len(left) / 4) ** 0.5


def test_shares_without_a_launcher_add_up(tiny, data, tmp_path):
    sizes = []
    for share in ("0/3", "2/3", "1/3"):
        build_cache(str(tiny), data, tmp_path / "c", dataclasses.replace(OPTIONS, share=share))
        sizes.append(len(CacheReader(tmp_path / "c")))
    documents = load_documents(data, load_tokenizer(str(tiny)))
    assert 0 < sizes[0] < sizes[1] < sizes[2] == len({tuple(document.tokens.tolist()) for document in documents})
    assert set(sequences_of(tmp_path / "c")) == {"w0", "w1", "w2"}


def test_rows_of_a_killed_writer_of_another_world_size_are_not_scored_again(tiny, text, data, tmp_path, monkeypatch):
    """A process of four is killed with a shard open; a single one then seals it and scores only the rest."""
    program = textwrap.dedent(f"""
        import os, signal
        from kd_kernels.cache import CacheWriter
        from kd_trainer.caching.build import build_cache
        from kd_trainer.caching.options import CacheOptions
        from kd_trainer.config import DataConfig

        added = []
        add = CacheWriter.add

        def dies(self, *arguments, **options):
            if len(added) == 5:
                self.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            added.append(1)
            return add(self, *arguments, **options)

        CacheWriter.add = dies
        options = CacheOptions(k=20, step_nats=0.0, batch_tokens=200, share="3/4", writer="w")
        build_cache({str(tiny)!r}, DataConfig(source={str(text)!r}, max_length=48), {str(tmp_path / "c")!r}, options)
    """)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert unsealed_writers(tmp_path / "c") == {"w3"} and len(CacheReader(tmp_path / "c")) == 0

    scored = []

    def counting(logits, *arguments, **options):
        scored.append(logits.hidden.shape[0])
        return topk_targets(logits, *arguments, **options)

    monkeypatch.setattr("kd_trainer.caching.scoring.topk_targets", counting)
    numbers = build_cache(str(tiny), data, tmp_path / "c", OPTIONS)
    assert not unsealed_writers(tmp_path / "c")
    recovered = sum(1 for path in (tmp_path / "c").glob("w3-*.kdc"))
    assert recovered == 1 and 0 < sum(scored) < numbers["rows"]


def test_a_writer_that_lives_is_left_alone(tiny, data, tmp_path):
    build_cache(str(tiny), dataclasses.replace(data, limit=3), tmp_path / "c", OPTIONS)
    manifest: CacheManifest = CacheReader(tmp_path / "c").manifest
    document = load_documents(data, load_tokenizer(str(tiny)))[-1]
    targets = topk_targets(torch.randn(len(document) - 1, manifest.vocab), 20)
    with CacheWriter(tmp_path / "c", manifest, writer="alive") as alive:
        alive.add(document.tokens, targets)
        alive.flush()
        build_cache(str(tiny), dataclasses.replace(data, limit=5), tmp_path / "c", OPTIONS)
        assert unsealed_writers(tmp_path / "c") == {"alive"}
    assert document.tokens.shape[0] - 1 <= CacheReader(tmp_path / "c").rows
