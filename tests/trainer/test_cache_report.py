"""What ``kdk cache report`` says is what the rows and files are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kd_kernels.cache import CacheReader
from kd_kernels.cache.shard import Shard
from kd_trainer.caching.build import build_cache
from kd_trainer.caching.options import CacheOptions
from kd_trainer.caching.report import TITLES, report
from kd_trainer.cli import main
from kd_trainer.config import DataConfig


@pytest.fixture(scope="module")
def data(text):
    return DataConfig(source=str(text), max_length=40, limit=25)


@pytest.fixture(scope="module")
def cache(tiny, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "c"
    build_cache(str(tiny), data, folder, CacheOptions(k=20, mass=0.5, temperatures=(1.0, 2.0)))
    return folder


def test_the_bytes_add_up_to_the_shards(cache):
    found = report(CacheReader(cache)).streams
    assert sum(found.values()) == sum(path.stat().st_size for path in Path(cache).glob("*.kdc"))
    assert {"ids", "logprobs", "tail", "next", "log Z", "models", "heads of blocks", "index"} <= found.keys()
    assert all(count > 0 for count in found.values())


def test_the_numbers_are_the_rows(cache):
    reader = CacheReader(cache)
    found = report(reader).statistics()
    masses, entries, losses, entropies = [], [], [], []
    for key in reader.keys():
        rows = reader.read(key)
        for i in range(len(rows)):
            one = rows.slice(i, i + 1)
            p, tail = one.targets.logprobs.double().exp(), one.targets.tail_logprob.double().exp()
            entries.append(len(p))
            masses.append(float(tail))
            losses.append(-float(one.next_logprobs))
            every = torch.cat([p, tail])
            entropies.append(float(-(every * every.log()).sum()))
    for name, values in (("entries", entries), ("tail_mass", masses), ("next_loss", losses), ("entropy", entropies)):
        assert found[name]["mean"] == pytest.approx(sum(values) / len(values), rel=1e-5), name
        assert found[name]["p50"] == pytest.approx(sorted(values)[round(0.5 * (len(values) - 1))], rel=1e-5), name


def test_a_part_of_the_documents_has_all_of_the_bytes(cache):
    few, all_of_them = (report(CacheReader(cache), documents=count) for count in (3, 0))
    assert few.streams == all_of_them.streams and few.looked_at == 3 and "chosen by hash" in few.table()
    assert len(few.rows["entries"]) < len(all_of_them.rows["entries"])


def test_every_block_is_decoded_once(cache, monkeypatch):
    decode, calls = Shard._decode, []
    monkeypatch.setattr(Shard, "_decode", lambda *a: (calls.append(1), decode(*a))[1])
    CacheReader(cache).stream_bytes()
    blocks = len(calls)
    report(CacheReader(cache), documents=0)
    assert len(calls) == 2 * blocks > 0


def test_the_command_with_the_teacher_at_hand(cache, tiny, text, tmp_path, capsys):
    out, png = tmp_path / "report.json", tmp_path / "report.png"
    arguments = ["cache", "report", str(cache), "--json", str(out), "--plot", str(png)]
    assert main([*arguments, "--teacher", str(tiny), "--data", str(text), "--max-length", "40", "--limit", "25"]) == 0
    table = capsys.readouterr().out
    assert all(title in table for title in TITLES.values()) and "the cache is this teacher's" in table
    written = json.loads(out.read_text())
    assert written["against_the_teacher"]["passed"] and 0 < written["against_the_teacher"]["agreement"] <= 1
    assert written["against_the_teacher"]["checks"]["mean KL"]["cache"] < 1e-4
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_what_is_refused(cache, tiny):
    with pytest.raises(ValueError, match="documents must be at least 1, or 0 for all, got -1"):
        report(CacheReader(cache), documents=-1)
    assert main(["cache", "report", str(cache), "--teacher", str(tiny)]) == 2
