"""A cache that holds all of the teacher is the teacher: the same run, however the data are cut, ordered and resumed."""

from __future__ import annotations

import json

import pytest
import torch

from kd_kernels import divergences, sampled_targets
from kd_kernels.cache import CacheError, CacheReader
from kd_trainer.caching.build import build_cache
from kd_trainer.caching.options import CacheOptions
from kd_trainer.caching.scoring import Scorer
from kd_trainer.config import DataConfig
from kd_trainer.data import collate, load_documents
from kd_trainer.models import load_tokenizer, vocab_of
from kd_trainer.teachers import CachedTeacher
from kd_trainer.trainer import train


@pytest.fixture(scope="module")
def vocab(tiny) -> int:
    return vocab_of(load_tokenizer(str(tiny)))


def build(tiny, text, folder, **options):
    build_cache(str(tiny), DataConfig(source=str(text), max_length=48), folder, CacheOptions(**options))
    return folder


@pytest.fixture(scope="module")
def whole(tiny, text, vocab, tmp_path_factory):
    """Every token of the vocabulary, as fp32."""
    folder = tmp_path_factory.mktemp("whole") / "c"
    return build(tiny, text, folder, k=vocab, step_nats=0, temperatures=(1.0, 2.0))


@pytest.fixture
def kd(make_config, tiny, tmp_path):
    """Runs a distillation by a name, and returns its metrics and the folder of its model."""

    def run(name, cache=None, **changes):
        tree = {
            "out": str(tmp_path / name), "method": "kd", "student": {"model": None, "layers": [0, 2]},
            "teacher": {"model": str(tiny)}, "cache": None if cache is None else str(cache),
        }
        for key, value in changes.items():
            tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
        model = train(make_config(**tree))
        return [json.loads(line) for line in (model.parent / "metrics.jsonl").read_text().splitlines()]

    return run


def assert_the_same_run(one, other, rel: float) -> None:
    for a, b in zip(one, other, strict=True):
        assert a["tokens"] == b["tokens"]
        for name in ("loss", "divergence", "next_token_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=rel, abs=rel * 1e-2), name


DIVERGENCES = [{"alpha_beta": "alpha_beta(alpha=0.5, beta=0.7)"}.get(name, name) for name in divergences.REGISTRY]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_trains_from_the_cache_as_from_the_model(kd, whole, divergence):
    options = {"objective": {"divergence": divergence, "temperature": 2.0, "ce_weight": 0.3}, "train": {"steps": 2}}
    assert_the_same_run(kd("live", **options), kd("cached", whole, **options), rel=1e-4)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
def test_without_a_tail_all_treatments_of_it_agree(kd, whole, tail):
    assert_the_same_run(kd("live"), kd("cached", whole, objective={"tail": tail}), rel=1e-4)


@pytest.mark.parametrize("changes", [
    pytest.param({"data": {"packing": False}}, id="padded"),
    pytest.param({"train": {"accumulation": 2}}, id="micro-batches"),
    pytest.param({"train": {"batch_tokens": 400}}, id="another batch size"),
    pytest.param({"seed": 5}, id="another order"),
    pytest.param({"data": {"limit": 30}}, id="a part of the text"),
    pytest.param({"train": {"steps": 16}}, id="three epochs"),
])
def test_the_same_rows_are_found_however_the_data_are_cut(kd, whole, changes):
    """A cache knows sequences, not batches: built once, in an order of its own, it serves every plan."""
    assert_the_same_run(kd("live", **changes), kd("cached", whole, **changes), rel=1e-3)


def test_resumed_in_the_middle_of_an_epoch(kd, whole, killed_at):
    options = {"train": {"steps": 6, "save_every": 2}}
    live = kd("live", **options)

    with killed_at(3):
        kd("cached", whole, **options)
    assert_the_same_run(live, kd("cached", whole, **options), rel=1e-4)


def test_a_fine_step_is_nearly_the_teacher(kd, tiny, text, vocab, tmp_path):
    """Rounded to 1/256 nat, a row is off by a KL of at most (1/256)^2 / 8 = 2e-6: a thousandth of the loss here."""
    cache = build(tiny, text, tmp_path / "fine", k=vocab, step_nats=1 / 256)
    assert_the_same_run(kd("live"), kd("cached", cache), rel=3e-3)


# -------------------------------------------------------------------------------------------------------- reading ahead


def test_rows_that_were_expected_are_not_read_twice(tiny, text, whole, monkeypatch):
    documents = load_documents(DataConfig(source=str(text), max_length=48), load_tokenizer(str(tiny)))[:6]
    teacher = CachedTeacher(CacheReader(whole))
    batch = collate(documents[:3], 48, False)
    plain = teacher.targets(batch)
    read = []
    monkeypatch.setattr(teacher, "document_targets", lambda d, ask=teacher.document_targets: read.append(d) or ask(d))
    teacher.expect(documents[:4])
    ahead = teacher.targets(batch)
    assert torch.equal(plain.ids, ahead.ids) and torch.equal(plain.logprobs, ahead.logprobs)
    teacher.expect(documents[2:6])  # two of these are begun already, two are forgotten
    teacher.targets(collate(documents[2:6], 48, False))
    assert sorted(map(id, read)) == sorted(map(id, documents[:6]))
    teacher.targets(batch)  # what was forgotten is read when it is asked for
    assert len(read) == 8


def test_an_error_of_reading_ahead_is_raised_where_the_rows_are_asked_for(tiny, text, whole):
    (known, *_) = load_documents(DataConfig(source=str(text), max_length=48), load_tokenizer(str(tiny)))
    teacher = CachedTeacher(CacheReader(whole))
    (strange, *_) = load_documents(DataConfig(source=str(text), max_length=32), load_tokenizer(str(tiny)))
    teacher.expect([known, strange])
    teacher.targets(collate([known], 48, False))
    with pytest.raises(CacheError, match="sequence: expected key .* found none such"):
        teacher.targets(collate([strange], 48, False))


# -------------------------------------------------------------------------------------------------------- sampled rows


def test_sampled_rows_are_the_draws_of_their_documents_whatever_the_batch(tiny, text, vocab, tmp_path):
    options = {"k": 3, "sampled": 40, "proposal_temperature": 1.5, "step_nats": 0}
    one, other = (build(tiny, text, tmp_path / str(n), batch_tokens=n, **options) for n in (100, 2048))
    scorer = Scorer([str(tiny)])
    documents = load_documents(DataConfig(source=str(text), max_length=48), scorer.tokenizer)[:5]
    for document in documents:
        found, again = (CacheReader(folder).targets(document.tokens) for folder in (one, other))
        batch = collate([document], 48, False)
        rows = torch.arange(len(document) - 1)
        truth = sampled_targets(
            scorer.logits(batch, rows), 40, proposal_temperature=1.5, certain=3, seed=0,
            keys=torch.full(rows.shape, document.key), positions=rows,
        )
        assert torch.equal(found.ids, again.ids) and torch.equal(found.ids, truth.ids)
        torch.testing.assert_close(found.importance, truth.importance, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.logprobs, truth.logprobs, rtol=1e-5, atol=1e-5)
        assert found.tail_logprob is None


def test_training_from_sampled_rows_nears_the_teacher_on_average(kd, tiny, text, tmp_path):
    """The loss of many draws is the live loss up to their noise, which top-k rows of as many entries are not near."""
    objective = {"divergence": "forward_kl"}
    live = kd("live", objective=objective)
    sampled = kd("sampled", build(tiny, text, tmp_path / "s", k=8, sampled=2000, step_nats=0), objective=objective)
    for a, b in zip(live, sampled, strict=True):
        assert a["next_token_loss"] == pytest.approx(b["next_token_loss"], rel=0.01)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.15)


@pytest.mark.parametrize("options, message", [
    ({"sampled": 0}, "--sampled must be at least 1 draw a row, got 0"),
    ({"sampled": 5, "mass": 0.9}, "--mass must be absent with --sampled"),
    ({"sampled": 5, "temperatures": (1.0, 2.0)}, "--temperatures must be 1 with --sampled"),
    ({"proposal_temperature": 2.0}, "--sampled must be given with --proposal-temperature"),
    ({"sampled": 5, "proposal_temperature": 0.0}, "--proposal-temperature must be"),
])
def test_sampling_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        CacheOptions(**options)
