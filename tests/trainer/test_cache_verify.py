"""``verify`` passes what the teacher said and fails everything else."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from kd_kernels.cache import CacheError, CacheReader, CacheWriter, with_mass_one
from kd_trainer.caching.build import build_cache
from kd_trainer.caching.options import CacheOptions
from kd_trainer.caching.scoring import Scorer
from kd_trainer.caching.verify import Spread, verify
from kd_trainer.cli import main
from kd_trainer.config import DataConfig
from kd_trainer.data import load_documents
from kd_trainer.models import load_pretrained, load_tokenizer
from kd_trainer.tiny import byte_tokenizer, save_tiny_model

OPTIONS = CacheOptions(k=20, batch_tokens=200, temperatures=(1.0, 2.0))


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    """The tiny model made less flat: an untrained one says nearly the same everywhere."""
    folder = tmp_path_factory.mktemp("teacher")
    model = load_pretrained(str(tiny))
    with torch.no_grad():
        model.model.norm.weight.mul_(12.0)
    model.save_pretrained(folder)
    load_tokenizer(str(tiny)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(text):
    return DataConfig(source=str(text), max_length=40, limit=25)


@pytest.fixture(scope="module")
def cache(teacher, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "c"
    build_cache(str(teacher), data, folder, OPTIONS)
    return folder


def verdict_of(folder, teacher, data, **options):
    scorer = Scorer([str(teacher)], **options)
    return verify(CacheReader(folder), scorer, load_documents(data, scorer.tokenizer), batch_tokens=200)


def failed(verdict) -> set[str]:
    return {check.name for check in verdict.checks if not check.passed}


def test_what_the_teacher_said_passes(cache, teacher, data):
    verdict = verdict_of(cache, teacher, data)
    assert verdict.passed, verdict.table()
    by_name = {check.name: check for check in verdict.checks}
    assert set(by_name) == {
        "max |d logprob|", "p99 |d logprob|", "max |d next logprob|", "max |d log Z|", "mean KL", "max KL",
        "max shortfall of an entry",
    }
    assert 1 / 64 < by_name["max |d logprob|"].cache < 1 / 16  # it was rounded to sixteenths
    assert by_name["max |d logprob|"].control < 1e-4
    assert 0 < by_name["mean KL"].cache < by_name["max KL"].cache < 1 / 16**2 / 8
    assert verdict.agreement > 0.999 and verdict.control_agreement > 0.999
    assert verdict.rows == CacheReader(cache).cached_rows


@pytest.mark.parametrize("options", [
    {"step_nats": 0.0}, {"step_nats": 0.5}, {"mass": 0.9}, {"dtype": "bfloat16"}, {"head_dtype": "bfloat16"}, {"k": 1},
    {"min_entropy": 2.0},
], ids=str)
def test_every_kind_of_cache_passes(teacher, data, tmp_path, options):
    options = dataclasses.replace(OPTIONS, **options)
    build_cache(str(teacher), data, tmp_path / "c", options)
    verdict = verdict_of(tmp_path / "c", teacher, data, dtype=options.dtype, head_dtype=options.head_dtype)
    assert verdict.passed, verdict.table()


def test_the_noise_of_half_precision_is_no_error(teacher, data, tmp_path):
    """In bf16 another batch changes log-probabilities by far more than an exact cache's rounding does."""
    options = dataclasses.replace(OPTIONS, dtype="bfloat16", step_nats=0.0)
    build_cache(str(teacher), data, tmp_path / "c", options)
    verdict = verdict_of(tmp_path / "c", teacher, data, dtype="bfloat16")
    (check,) = [check for check in verdict.checks if check.name == "max |d logprob|"]
    assert verdict.passed, verdict.table()
    assert check.control > 100 * 2e-4  # else there was no noise to forgive


def forge(cache, data, folder, change, **fields):
    """Writes what ``change(targets, document, rows_of_all)`` makes of every document's rows into a cache that is
    whole."""
    reader = CacheReader(cache)
    documents = load_documents(data, byte_tokenizer())
    found = {document: reader.lookup(document.tokens) for document in documents}
    with CacheWriter(folder, dataclasses.replace(reader.manifest, **fields)) as writer:
        for document, rows in found.items():
            targets = change(with_mass_one(rows.targets), document, found)
            writer.add(document.tokens, targets)
    return folder


def swapped(targets, document, found):
    """The rows of another document of the same length, where there is one."""
    twins = [rows for other, rows in found.items() if len(other) == len(document) and other is not document]
    return with_mass_one(twins[0].targets) if twins else targets


def shifted(targets, document, found):
    """Row i holds what row i + 1 should."""
    return targets.select(torch.arange(1, len(document)).clamp_max(len(document) - 2))


def one_off(targets, document, found):
    """One entry in the middle of a row is too unlikely by a quarter of a nat."""
    logprobs = targets.logprobs.clone()
    logprobs[9] -= 0.25
    return dataclasses.replace(targets, logprobs=logprobs)


def without_the_first(targets, document, found):
    """The most likely token of every row is missing, and its mass is in the tail."""
    counts = targets.offsets.diff()
    kept = torch.ones(len(targets.ids), dtype=torch.bool).index_fill_(0, targets.offsets[:-1], False)
    missing = targets.logprobs[targets.offsets[:-1]].double().exp()
    tail = (targets.tail_logprob.double().exp() + missing).log().float()
    return dataclasses.replace(
        targets, offsets=torch.nn.functional.pad((counts - 1).cumsum(0), (1, 0)), ids=targets.ids[kept],
        logprobs=targets.logprobs[kept], tail_logprob=tail,
    )


def other_temperature(targets, document, found):
    return dataclasses.replace(targets, log_z=targets.log_z + torch.tensor([0.0, 0.1]))


@pytest.mark.parametrize(("change", "checks"), [
    (swapped, {"max |d logprob|", "max KL"}), (shifted, {"max |d logprob|", "p99 |d logprob|", "mean KL", "max KL"}),
    (one_off, {"max |d logprob|"}), (without_the_first, {"max shortfall of an entry"}),
    (other_temperature, {"max |d log Z|"}),
])
def test_forged_rows_fail(cache, teacher, data, tmp_path, change, checks):
    folder = forge(cache, data, tmp_path / "forged", change)
    CacheReader(folder).verify()  # every byte is in order
    verdict = verdict_of(folder, teacher, data)
    assert not verdict.passed and checks <= failed(verdict), verdict.table()
    assert "NOT this teacher's" in verdict.table()


def test_the_forger_alone_changes_nothing(cache, teacher, data, tmp_path):
    folder = forge(cache, data, tmp_path / "forged", lambda targets, document, found: targets)
    assert verdict_of(folder, teacher, data).passed


def test_another_teacher_is_refused_by_name_and_found_out_under_a_false_one(teacher, data, tmp_path):
    torch.manual_seed(5)
    save_tiny_model(tmp_path / "other")
    build_cache(str(tmp_path / "other"), data, tmp_path / "honest", OPTIONS)
    with pytest.raises(
        CacheError, match=r"teacher: expected [0-9a-f]+ \(.*\), found [0-9a-f]+; the cache was built with .*other"
    ):
        verdict_of(tmp_path / "honest", teacher, data)
    name = Scorer([str(teacher)]).fingerprint
    folder = forge(tmp_path / "honest", data, tmp_path / "false", lambda targets, *rest: targets, teacher=name)
    verdict = verdict_of(folder, teacher, data)
    assert {"max |d logprob|", "p99 |d logprob|", "mean KL", "max KL"} <= failed(verdict)


def test_another_head_dtype_is_refused_by_name(cache, teacher, data):
    with pytest.raises(CacheError, match="head dtype: expected bfloat16"):
        verdict_of(cache, teacher, data, head_dtype="bfloat16")


def test_a_document_that_is_not_there(cache, teacher, data):
    with pytest.raises(CacheError, match="none such"):
        verdict_of(cache, teacher, dataclasses.replace(data, limit=40))


def arguments(folder, teacher, text, *more):
    return [
        "cache", "verify", str(folder), "--teacher", str(teacher), "--data", str(text), "--max-length", "40", "--limit",
        "25", "--batch-tokens", "200", *map(str, more),
    ]


def test_the_command_ends_with_1_on_failure(capsys, cache, teacher, data, text, tmp_path):
    assert main(arguments(cache, teacher, text, "--json", tmp_path / "v.json")) == 0
    out = capsys.readouterr().out
    assert "is whole" in out and "live again" in out and "the cache is this teacher's" in out
    written = json.loads((tmp_path / "v.json").read_text())
    assert written["passed"] and written["documents"] == len(CacheReader(cache)) and set(
        written["checks"]["mean KL"]
    ) >= {"cache", "control"}
    folder = forge(cache, data, tmp_path / "forged", swapped)
    assert main(arguments(folder, teacher, text)) == 1
    assert "FAILED" in capsys.readouterr().out
    assert main(["cache", "verify", str(cache), "--teacher", str(teacher)]) == 2
    assert "--teacher and --data must be given together" in capsys.readouterr().err


def test_percentiles_without_keeping_the_numbers():
    torch.manual_seed(0)
    values = torch.rand(5000).double() ** 3
    spread = Spread()
    for part in values.split(700):
        spread.add(part)
    assert spread.largest == float(values.max())
    for share in (0.01, 0.005):
        assert spread.above(share) == pytest.approx(float(values.quantile(1 - share)), rel=0.02)
    empty = Spread()
    empty.add(torch.zeros(0))
    assert empty.above(0.01) == 0.0 and not math.isnan(empty.largest)
