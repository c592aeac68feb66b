"""What a caller can get wrong is refused by name, and leaves the cache as it was."""

from __future__ import annotations

import math
import re

import pytest
import torch

from cache_builders import assert_holds, example, manifest
from kd_kernels.cache import CacheError, CacheReader, CacheWriter, content_key
from kd_kernels.logits import SparseTargets

NAN, INF = math.nan, math.inf


def targets(**fields: object) -> SparseTargets:
    """Two rows: ids 5, 6, 7 and 5; changed as told."""
    given = {
        "offsets": torch.tensor([0, 3, 4]), "ids": torch.tensor([5, 6, 7, 5]),
        "logprobs": torch.tensor([-1.0, -2.0, -3.0, -0.5]), "tail_logprob": torch.tensor([-1.0, -1.0]),
    }
    return SparseTargets(**given | fields)


REFUSED = {
    "nan logprob": (
        dict(targets=targets(logprobs=torch.tensor([-1.0, NAN, -3.0, -0.5]))),
        "targets.logprobs must be finite, got nan in row 0",
    ),
    "+inf logprob": (
        dict(targets=targets(logprobs=torch.tensor([-1.0, -2.0, -3.0, INF]))),
        "targets.logprobs must be finite, got inf in row 1",
    ),
    "-inf logprob": (
        dict(targets=targets(logprobs=torch.tensor([-1.0, -2.0, -INF, -0.5]))),
        "targets.logprobs must be finite, got -inf in row 0",
    ),
    "too low for the step": (
        dict(targets=targets(logprobs=torch.tensor([-1.0, -2.0, -1e9, -0.5]))),
        "targets.logprobs must be at least -67108864.0 nats, got -1000000000.0 in row 0; step_nats=0 stores any",
    ),
    "negative id": (
        dict(targets=targets(ids=torch.tensor([5, -1, 7, 5]))),
        "targets.ids must be in 0..V-1=999, got -1 in row 0",
    ),
    "id of the padding": (
        dict(targets=targets(ids=torch.tensor([5, 6, 7, 1000]))),
        "targets.ids must be in 0..V-1=999, got 1000 in row 1",
    ),
    "id twice": (
        dict(targets=targets(ids=torch.tensor([7, 6, 7, 5]))),
        "targets.ids must be distinct within a row, got id 7 twice in row 0",
    ),
    "kept mass above 1": (
        dict(targets=targets(logprobs=torch.tensor([-0.1, -0.2, -3.0, -0.5]), tail_logprob=torch.tensor([-INF, -INF]))),
        "targets.logprobs must be of mass at most 1 a row, got 1.77",
    ),
    "tail mass above 1": (
        dict(targets=targets(tail_logprob=torch.tensor([0.5, -1.0]))),
        "targets.tail_logprob must be of mass at most 1, got 1.64",
    ),
    "nan tail": (
        dict(targets=targets(tail_logprob=torch.tensor([-1.0, NAN]))),
        "targets.tail_logprob must be of mass at most 1, got nan in row 1",
    ),
    "entries and tail above 1": (
        dict(targets=targets(tail_logprob=torch.tensor([-1.0, -0.5]))),
        "targets must be rows whose entries and tail have mass at most 1, got 1.21",
    ),
    "offsets do not start at 0": (
        dict(targets=targets(offsets=torch.tensor([1, 3, 4]))),
        "targets.offsets must be non-decreasing from 0 to nnz=4, got [1, 3, 4]",
    ),
    "offsets do not end at nnz": (
        dict(targets=targets(offsets=torch.tensor([0, 3, 5]))),
        "targets.offsets must be non-decreasing from 0 to nnz=4, got [0, 3, 5]",
    ),
    "offsets decrease": (
        dict(targets=targets(offsets=torch.tensor([0, 5, 4]))),
        "targets.offsets must be non-decreasing from 0 to nnz=4, got [0, 5, 4]",
    ),
    "more entries than k": (
        dict(targets=targets(
            offsets=torch.tensor([0, 1, 10]), ids=torch.arange(10), logprobs=torch.full((10,), -5.0),
        )),
        "targets must be rows of at most k=8 entries, got 9 in row 1",
    ),
    "one row too few": (
        dict(tokens=torch.tensor([1, 2, 3, 4])), "targets must be L - 1 = 3 rows, got 2",
    ),
    "one row too many": (dict(tokens=torch.tensor([1, 2])), "targets must be L - 1 = 1 rows, got 2"),
    "rows unlike positions": (
        dict(tokens=torch.arange(5), positions=torch.tensor([True, False, True, True])),
        "targets must be 3 rows, one for each of positions, got 2",
    ),
    "positions of the wrong length": (
        dict(positions=torch.tensor([True, True, False])),
        "positions must be bool of shape [L - 1 = 2], got torch.bool [3]",
    ),
    "positions of integers": (
        dict(positions=torch.tensor([1, 1])), "positions must be bool of shape [L - 1 = 2], got torch.int64 [2]",
    ),
    "other temperatures": (
        dict(targets=targets(temperatures=(1.0, 2.0), log_z=torch.zeros(2, 2))),
        "targets.temperatures must be (1.0,) as in the manifest, got (1.0, 2.0)",
    ),
    "log Z not 0 at 1": (
        dict(targets=targets(log_z=torch.tensor([[0.0], [3.0]]))),
        "targets.log_z must be 0 at T = 1 (log-probabilities normalised",
    ),
    "no tail": (
        dict(targets=targets(tail_logprob=None)),
        "targets.tail_logprob must be given, got None; the manifest has tail=True",
    ),
    "weights": (
        dict(targets=targets(importance=torch.ones(4))),
        "targets.importance must be None, got a tensor; the manifest has importance=False",
    ),
    "next logprob above 0": (
        dict(next_logprobs=torch.tensor([-1.0, 0.5])),
        "next_logprobs must be at most 0, or NaN where not known, got 0.5 in row 1",
    ),
    "next logprobs of another length": (
        dict(next_logprobs=torch.zeros(3)), "next_logprobs must be of shape [2], as many as targets has rows, got [3]",
    ),
    "next logprobs off by one": (
        dict(tokens=torch.tensor([5, 6, 9]), next_logprobs=torch.tensor([-7.0, -2.0])),
        "next_logprobs must be what targets has for the same tokens, got -7.0 in row 0; row i predicts tokens[i + 1]",
    ),
    "token outside": (dict(tokens=torch.tensor([1, 1000, 3])), "tokens must be ids in 0..999, got 1000"),
    "negative token": (dict(tokens=torch.tensor([1, -100, 3])), "tokens must be ids in 0..999, got -100"),
    "no tokens": (dict(tokens=torch.zeros(0, dtype=torch.int64)), "tokens must be of shape [L], L >= 2, got [0]"),
    "one token": (dict(tokens=torch.tensor([1])), "tokens must be of shape [L], L >= 2, got [1]"),
    "a batch of tokens": (
        dict(tokens=torch.ones(1, 3, dtype=torch.int64)),
        "tokens must be of shape [L], L >= 2, got [1, 3]",
    ),
    "layout that does not add up": (
        dict(layout=[2, 2]),
        "layout must be positive lengths that add up to L=3, got [2, 2]",
    ),
    "layout with an empty segment": (
        dict(layout=[3, 0]),
        "layout must be positive lengths that add up to L=3, got [3, 0]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_add_refuses(tmp_path, case):
    arguments, message = REFUSED[case]
    arguments = {"tokens": torch.tensor([1, 2, 3]), "targets": targets()} | arguments
    cache, item = manifest(), example(4, 0, manifest())
    with CacheWriter(tmp_path, cache) as writer:
        with pytest.raises(ValueError, match=re.escape(message)):
            writer.add(arguments.pop("tokens"), arguments.pop("targets"), **arguments)
        assert len(writer) == 0
        writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
    assert_holds(tmp_path, cache, [item])


@pytest.mark.parametrize("weight", [NAN, INF, -1.0])
def test_add_refuses_weights(tmp_path, weight):
    with CacheWriter(tmp_path, manifest(importance=True)) as writer:
        bad = targets(importance=torch.tensor([1.0, 1.0, 1.0, weight]))
        message = f"targets.importance must be finite and not negative, got {weight} in row 1"
        with pytest.raises(ValueError, match=message):
            writer.add(torch.tensor([1, 2, 3]), bad)


def test_add_refuses_log_z_that_is_not_finite(tmp_path):
    with CacheWriter(tmp_path, manifest(temperatures=(2.0,))) as writer:
        bad = targets(temperatures=(2.0,), log_z=torch.tensor([[1.0], [INF]]))
        with pytest.raises(ValueError, match="targets.log_z must be finite at T = 2.0 and in .*, got inf in row 1"):
            writer.add(torch.tensor([1, 2, 3]), bad)


def test_add_refuses_types(tmp_path):
    with CacheWriter(tmp_path, manifest()) as writer:
        with pytest.raises(TypeError, match="targets must be SparseTargets, got Tensor"):
            writer.add(torch.tensor([1, 2]), torch.zeros(1, 1000))
        with pytest.raises(TypeError, match="tokens must be a torch.Tensor, got list"):
            writer.add([1, 2], targets())
        with pytest.raises(TypeError, match="tokens must be of dtype int64 or int32, got torch.float32"):
            writer.add(torch.tensor([1.0, 2.0]), targets())


def test_rounding_of_half_precision_is_no_mass_above_1(tmp_path):
    rounded = targets(logprobs=torch.tensor([-1.0, -2.0, -3.0, 0.0]), tail_logprob=torch.tensor([-1.0, -8.0]))
    with CacheWriter(tmp_path, manifest()) as writer:
        assert writer.add(torch.tensor([1, 2, 3]), rounded)


@pytest.mark.parametrize("fields, error, message", [
    ({"teacher": ""}, ValueError, "CacheManifest: teacher must be a string that is not empty, got ''"),
    ({"tokenizer": b"x"}, TypeError, "CacheManifest: tokenizer must be a string, got bytes"),
    ({"vocab": 0}, ValueError, "CacheManifest: vocab must be in 1..16777216, got 0"),
    ({"vocab": (1 << 24) + 1}, ValueError, "CacheManifest: vocab must be in 1..16777216, got 16777217"),
    ({"k": 65536, "vocab": 1 << 20}, ValueError, "CacheManifest: k must be in 1..65535, got 65536"),
    ({"k": 1001}, ValueError, "CacheManifest: k must be at most vocab=1000, got 1001"),
    ({"k": 8.0}, TypeError, "CacheManifest: k must be an int, got float"),
    ({"bos_policy": ""}, ValueError, "CacheManifest: bos_policy must be a string that is not empty, got ''"),
    ({"mass": 1.5}, ValueError, "CacheManifest: mass must be at most 1, got 1.5"),
    ({"mass": 0.0}, ValueError, "CacheManifest: mass must be finite and greater than 0, got 0.0; pass None for no cut"),
    ({"temperatures": (1.0, 0)}, ValueError, "CacheManifest: temperatures must be finite and greater than 0, got 0"),
    ({"temperatures": (1.0, 1)}, ValueError, "CacheManifest: temperatures must be distinct and at least one"),
    ({"temperatures": ()}, ValueError, "CacheManifest: temperatures must be distinct and at least one"),
    ({"step_nats": -1.0}, ValueError, "CacheManifest: step_nats must be 0 (exact) or in 1e-6..1 nats, got -1.0"),
    ({"step_nats": NAN}, ValueError, "CacheManifest: step_nats must be 0 (exact) or in 1e-6..1 nats, got nan"),
    ({"step_nats": "1/16"}, TypeError, "CacheManifest: step_nats must be a number, got str"),
    ({"tail": 1}, TypeError, "CacheManifest: tail must be a bool, got int"),
    ({"meta": {"k": 1}}, TypeError, "CacheManifest: meta must be a dict of strings, got {'k': 1}"),
])
def test_manifest_refuses(fields, error, message):
    with pytest.raises(error, match=re.escape(message)):
        manifest(**fields)


@pytest.mark.parametrize("options, message", [
    ({"writer": "a-b"}, "CacheWriter: writer must be 1 to 24 of A-Z a-z 0-9 _, got 'a-b'"),
    ({"writer": "../up"}, "CacheWriter: writer must be 1 to 24"),
    ({"writer": ""}, "CacheWriter: writer must be 1 to 24"),
    ({"writer": "w" * 25}, "CacheWriter: writer must be 1 to 24"),
    ({"rows_per_block": 0}, "CacheWriter: rows_per_block must be in 1..256, got 0"),
    ({"rows_per_block": 257}, "CacheWriter: rows_per_block must be in 1..256, got 257"),
    ({"rows_per_shard": 0}, "CacheWriter: rows_per_shard must be at least 1, got 0"),
])
def test_writer_refuses_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CacheWriter(tmp_path / "new", manifest(), **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("url", ["s3://bucket/cache", "memory://cache", "simplecache::hf://datasets/a/b"])
def test_writer_refuses_urls(url):
    message = f"CacheWriter: folder must be a local path, got '{url}'; write to a disk and copy the folder there"
    with pytest.raises(ValueError, match=re.escape(message)):
        CacheWriter(url, manifest())


def test_writer_refuses_what_is_no_manifest(tmp_path):
    with pytest.raises(TypeError, match="CacheWriter: manifest must be a CacheManifest, got dict"):
        CacheWriter(tmp_path, {"teacher": "x"})


@pytest.mark.parametrize("field, other", [
    ("teacher", "another"), ("tokenizer", "another"), ("vocab", 1001), ("k", 9), ("mass", 0.9),
    ("temperatures", (1.0, 2.0)), ("step_nats", 0.125), ("head_dtype", "bfloat16"), ("tie_rule", "any"),
    ("tail", False), ("importance", True), ("chat_template", "another"), ("bos_policy", "1 text"),
])
def test_folder_of_another_manifest(tmp_path, field, other):
    cache, item = manifest(), example(4, 0, manifest())
    with CacheWriter(tmp_path, cache) as writer:
        writer.add(item.tokens, item.targets, next_logprobs=item.next_logprobs)
    message = f"manifest.jsonl, offset 0: manifest.{field}: expected {other}, found {getattr(cache, field)}"
    with pytest.raises(CacheError, match=re.escape(message)) as caught:
        CacheWriter(tmp_path, manifest(**{field: other}))
    assert caught.value.path == tmp_path / "manifest.jsonl" and caught.value.offset == 0
    CacheWriter(tmp_path, cache).close()  # the lock was let go of
    assert_holds(tmp_path, cache, [item])


def test_reader_of_another_teacher_tokenizer_or_text(tmp_path):
    cache, item = manifest(), example(4, 0, manifest())
    with CacheWriter(tmp_path, cache) as writer:
        writer.add(item.tokens, item.targets)
    assert len(CacheReader(tmp_path, teacher=cache.teacher, tokenizer=cache.tokenizer)) == 1
    for field, found in (
        ("teacher", "7ea0c4e5"), ("tokenizer", "70ce4125"), ("chat_template", "none"), ("bos_policy", "none"),
    ):
        with pytest.raises(CacheError, match=f"manifest.{field}: expected other, found {found}"):
            CacheReader(tmp_path, **{field: "other"})
    reader = CacheReader(tmp_path)
    for tokens, layout in ((item.tokens.flip(0), None), (item.tokens[:3], None), (item.tokens, [2, 2])):
        key = content_key(tokens, cache, layout)
        assert key not in reader
        wanted = f"key {key.hex()} .*{len(tokens)} tokens.*teacher 7ea0c4e5.*bos_policy none"
        pattern = f"sequence: expected {wanted}.*found none such among 1"
        for method in (reader.lookup, reader.targets, reader.positions, reader.next_logprobs):
            with pytest.raises(CacheError, match=pattern) as caught:
                method(tokens, layout=layout)
            assert caught.value.path == tmp_path
    with pytest.raises(CacheError, match="found none such among 1"):
        reader.batch([item.tokens, item.tokens.flip(0)])


def test_required_rows(tmp_path):
    cache = manifest()
    item = example(6, 0, cache, torch.tensor([8, 0, 8, 0, 0]))
    with CacheWriter(tmp_path, cache) as writer:
        writer.add(item.tokens, item.targets)
    reader = CacheReader(tmp_path)
    reader.targets(item.tokens, required=torch.tensor([True, False, True, False, False]))
    message = "row 1 of sequence .*: expected cached, found not cached, like 1 other required rows"
    with pytest.raises(CacheError, match=message):
        reader.targets(item.tokens, required=torch.tensor([True, True, True, False, True]))
    for bad in (torch.ones(4, dtype=torch.bool), torch.ones(5)):
        message = "CacheReader.lookup: required must be bool of shape [L - 1 = 5]"
        with pytest.raises(ValueError, match=re.escape(message)):
            reader.targets(item.tokens, required=bad)
