"""A teacher run once: what lies on disk afterwards is the teacher."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kd_kernels import LinearLogits, topk_targets
from kd_kernels.cache import CacheError, CacheReader
from kd_trainer.caching.build import build_cache
from kd_trainer.caching.describe import describe
from kd_trainer.caching.options import CacheOptions
from kd_trainer.caching.scoring import label_logprobs
from kd_trainer.config import DataConfig
from kd_trainer.data import load_documents
from kd_trainer.models import load_pretrained, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from kd_trainer.teachers import normalised

EXACT = CacheOptions(k=20, step_nats=0.0, temperatures=(1.0, 2.0), batch_tokens=200)


@pytest.fixture(scope="module")
def data(text):
    return DataConfig(source=str(text), max_length=40, limit=25)


@pytest.fixture
def documents(data, tiny):
    return load_documents(data, load_tokenizer(str(tiny)))


@torch.no_grad()
def test_rows_are_the_teachers(data, tiny, documents, tmp_path):
    numbers = build_cache(str(tiny), data, tmp_path / "c", EXACT)
    reader = CacheReader(tmp_path / "c")
    reader.verify()
    model = load_pretrained(str(tiny)).double()
    assert numbers["documents"] == len({tuple(document.tokens.tolist()) for document in documents}) == len(reader)
    assert numbers["rows"] == reader.rows and numbers["bytes"] > 0
    for document in documents:
        logprobs = model(document.tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        targets = reader.targets(document.tokens)
        assert (targets.offsets.diff() == 20).all()
        ids = targets.ids.view(-1, 20)
        torch.testing.assert_close(targets.logprobs.view(-1, 20).double(), logprobs.gather(1, ids), rtol=0, atol=1e-4)
        torch.testing.assert_close(targets.logprobs.view(-1, 20).double(), logprobs.topk(20).values, rtol=0, atol=1e-4)
        tail = logprobs.scatter(1, ids, -torch.inf).logsumexp(1)
        torch.testing.assert_close(targets.tail_logprob.double(), tail, rtol=0, atol=1e-4)
        torch.testing.assert_close(targets.log_z[:, 1].double(), (logprobs / 2).logsumexp(1), rtol=0, atol=1e-4)
        following = logprobs.gather(1, document.tokens[1:, None])[:, 0]
        torch.testing.assert_close(reader.next_logprobs(document.tokens).double(), following, rtol=0, atol=1e-4)


def test_the_manifest_names_teacher_and_tokenizer(data, tiny, tmp_path):
    build_cache(str(tiny), data, tmp_path / "c", EXACT)
    reader = CacheReader(tmp_path / "c")
    assert reader.manifest.teacher == model_fingerprint(load_pretrained(str(tiny)))
    assert reader.manifest.tokenizer == tokenizer_fingerprint(load_tokenizer(str(tiny)))
    text = describe(reader)
    for part in (reader.manifest.teacher, reader.manifest.tokenizer, "top 20", "1, 2", "exact", data.source):
        assert part in text


def test_a_build_goes_on_where_it_stopped(data, tiny, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    calls = []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return topk_targets(*arguments, **options)

    monkeypatch.setattr("kd_trainer.caching.scoring.topk_targets", dies)
    with pytest.raises(Killed):
        build_cache(str(tiny), data, tmp_path / "c", EXACT)
    before = len(CacheReader(tmp_path / "c"))
    build_cache(str(tiny), data, tmp_path / "c", EXACT)
    first = len(calls)
    build_cache(str(tiny), data, tmp_path / "whole", EXACT)
    interrupted, whole = CacheReader(tmp_path / "c"), CacheReader(tmp_path / "whole")
    assert 0 < before < len(whole) and sorted(interrupted.keys()) == sorted(whole.keys())
    assert first - 2 < len(calls) - first + 1  # the scored batches were not scored again


@pytest.mark.parametrize("changes", [{"k": 8}, {"dtype": "bfloat16"}, {"temperatures": (1.0,)}])
def test_a_folder_holds_one_cache(data, tiny, tmp_path, changes):
    build_cache(str(tiny), dataclasses.replace(data, limit=3), tmp_path / "c", EXACT)
    with pytest.raises(CacheError, match="manifest"):
        build_cache(str(tiny), data, tmp_path / "c", dataclasses.replace(EXACT, **changes))


def test_mass_keeps_fewer(data, tiny, tmp_path):
    numbers = build_cache(str(tiny), data, tmp_path / "c", dataclasses.replace(EXACT, mass=0.01))
    reader = CacheReader(tmp_path / "c")
    kept = sum(reader.read(key).targets.ids.shape[0] for key in reader.keys())
    assert numbers["rows"] <= kept < 20 * numbers["rows"]


@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"softcap": 3.0}, {"bias": True}, {"valid_vocab": 40}])
def test_label_logprobs_agree_with_a_full_softmax(options):
    torch.manual_seed(0)
    bias = torch.randn(50) if options.pop("bias", False) else None
    logits = LinearLogits(torch.randn(30, 16), torch.randn(50, 16), bias, **options)
    labels = torch.randint(0, 40, (30,))
    z = logits.hidden.double() @ logits.weight.double().T + (0.0 if bias is None else bias.double())
    z = z * logits.scale
    z = z if logits.softcap is None else logits.softcap * (z / logits.softcap).tanh()
    expected = z[:, : logits.vocab].log_softmax(-1)[torch.arange(30), labels]
    ours = label_logprobs(logits, labels, topk_targets(logits, 4))
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)


def test_rounded_rows_have_mass_one_again(data, tiny, tmp_path):
    build_cache(str(tiny), data, tmp_path / "c", CacheOptions(k=20, step_nats=0.5))
    reader = CacheReader(tmp_path / "c")
    off = 0.0
    for key in reader.keys():
        rounded = reader.read(key).targets
        for targets in (rounded, normalised(rounded)):
            mass = targets.tail_logprob.double().exp()
            mass.index_add_(0, targets.row_of_entry(), targets.logprobs.double().exp())
            if targets is rounded:
                off = max(off, float((mass - 1).abs().max()))
            else:
                torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)
    assert off > 1e-3  # else there was nothing to normalise
