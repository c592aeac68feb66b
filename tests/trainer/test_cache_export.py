"""Exported files hold what the cache holds, and other libraries read them."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open

from kd_kernels.cache import CacheReader, content_key
from kd_trainer.caching.build import build_cache
from kd_trainer.caching.exporting import export_cache
from kd_trainer.caching.options import CacheOptions
from kd_trainer.cli import main
from kd_trainer.config import DataConfig
from kd_trainer.data import load_documents
from kd_trainer.models import load_tokenizer


@pytest.fixture(scope="module")
def data(text):
    return DataConfig(source=str(text), max_length=48, limit=20)


@pytest.fixture(scope="module")
def cache(tiny, data, tmp_path_factory):
    """With positions left out and a second temperature, so that every column has something to show."""
    folder = tmp_path_factory.mktemp("cache") / "c"
    build_cache(str(tiny), data, folder, CacheOptions(k=6, temperatures=(1.0, 2.0), fraction=0.7))
    return folder


@pytest.fixture(scope="module")
def tokens(cache, tiny, data):
    manifest = CacheReader(cache).manifest
    documents = load_documents(data, load_tokenizer(str(tiny)))
    return {content_key(document.tokens, manifest): document.tokens for document in documents}


def assert_equal(found, expected) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=0, equal_nan=True, check_dtype=False)


def test_safetensors(cache, tokens, tmp_path):
    reader = CacheReader(cache)
    assert export_cache(cache, tmp_path / "out", "safetensors", rows_per_file=200, tokens=tokens) == len(reader)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    seen = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            columns = {name: opened.get_tensor(name) for name in opened.keys()}
            assert json.loads(opened.metadata()["manifest"])["teacher"] == reader.manifest.teacher
        for i, key in enumerate(columns["keys"]):
            rows = reader.read(bytes(key.tolist()))
            start, stop = columns["rows"][i : i + 2].tolist()
            first, last = columns["offsets"][[start, stop]].tolist()
            assert_equal(columns["offsets"][start : stop + 1] - first, rows.targets.offsets)
            assert_equal(columns["ids"][first:last], rows.targets.ids.int())
            assert_equal(columns["logprobs"][first:last], rows.targets.logprobs)
            for name, expected in (("tail_logprob", rows.targets.tail_logprob), ("log_z", rows.targets.log_z)):
                assert_equal(columns[name][start:stop], expected)
            assert_equal(columns["next_logprobs"][start:stop], rows.next_logprobs)
            begin, end = columns["token_offsets"][i : i + 2].tolist()
            assert_equal(columns["tokens"][begin:end], tokens[bytes(key.tolist())].int())
            seen += 1
    assert seen == len(reader)


def test_parquet(cache, tokens, tmp_path):
    reader = CacheReader(cache)
    export_cache(cache, tmp_path / "out", "parquet", tokens=tokens)
    table = pyarrow.parquet.read_table(tmp_path / "out")
    assert table.num_rows == len(reader)
    for line in table.to_pylist():
        rows = reader.read(line["key"])
        assert_equal(line["counts"], rows.targets.offsets.diff())
        assert line["ids"] == rows.targets.ids.tolist() and line["tokens"] == tokens[line["key"]].tolist()
        for name, expected in (
            ("logprobs", rows.targets.logprobs), ("tail_logprob", rows.targets.tail_logprob),
            ("log_z", rows.targets.log_z.flatten()), ("next_logprobs", rows.next_logprobs),
        ):
            assert_equal(torch.tensor(line[name], dtype=torch.float32), expected)


def test_only_the_sequences_that_are_asked_for(cache, tokens, tmp_path):
    two = dict(list(tokens.items())[:2])
    assert export_cache(cache, tmp_path / "out", "safetensors", tokens=two) == 2


def test_what_cannot_be_exported_leaves_nothing_behind(cache, tmp_path):
    with pytest.raises(ValueError, match="--format must be one of safetensors, parquet, got 'csv'"):
        export_cache(cache, tmp_path / "out", "csv")
    with pytest.raises(ValueError, match="--rows-per-file must be at least 1"):
        export_cache(cache, tmp_path / "out", "parquet", rows_per_file=0)
    with pytest.raises(ValueError, match="the cache must be of at least one of the sequences"):
        export_cache(cache, tmp_path / "out", "parquet", tokens={b"0" * 16: torch.arange(3)})
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="--out must be a folder that does not exist yet"):
        export_cache(cache, tmp_path / "out", "parquet")


def test_the_command(cache, tiny, text, tmp_path, capsys):
    arguments = ["cache", "export", str(cache), "--out", str(tmp_path / "out"), "--tokenizer", str(tiny)]
    assert main([*arguments, "--data", str(text), "--max-length", "48", "--limit", "20", "--format", "parquet"]) == 0
    assert f"{len(CacheReader(cache)):,} sequences" in capsys.readouterr().out
    assert main(arguments) == 2 and "--tokenizer and --data must be given together" in capsys.readouterr().err
