"""A teacher run once: what lies on disk afterwards is the teacher."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from kd_kernels import EnsembleLogits, LinearLogits, topk_targets
from kd_kernels.cache import CacheError, CacheReader
from kd_trainer.caching.build import build_cache
from kd_trainer.caching.describe import describe
from kd_trainer.caching.options import CacheOptions
from kd_trainer.caching.scoring import label_logprobs
from kd_trainer.config import DataConfig
from kd_trainer.data import load_documents
from kd_trainer.models import load_pretrained, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from kd_trainer.tiny import save_tiny_model

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
    pair = EnsembleLogits((logits, logits), weights=(1.0, 2.0))
    torch.testing.assert_close(
        label_logprobs(pair, labels, topk_targets(pair, 4)).double(), expected, rtol=0, atol=1e-5
    )


# ---------------------------------------------------------------------------------------------------- ensembles, heads


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The tiny model with other weights."""
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(7)
    save_tiny_model(folder, layers=2)
    return folder


def sharpened(folder, out, factor):
    """A copy of a model whose final norm, and so every logit, is larger by a factor: an untrained one is nearly
    flat."""
    model = load_pretrained(str(folder))
    with torch.no_grad():
        model.model.norm.weight.mul_(factor)
    model.save_pretrained(out)
    load_tokenizer(str(folder)).save_pretrained(out)
    return out


@torch.no_grad()
@pytest.mark.parametrize("space", ["logit", "prob"])
def test_an_ensemble_is_averaged_before_it_is_cut(data, tiny, other, documents, tmp_path, space):
    options = dataclasses.replace(EXACT, ensemble=space, weights=(3.0, 1.0))
    build_cache([str(tiny), str(other)], dataclasses.replace(data, limit=5), tmp_path / "c", options)
    reader = CacheReader(tmp_path / "c")
    models = [load_pretrained(str(folder)).double() for folder in (tiny, other)]
    for document in documents[:5]:
        z = torch.stack([model(document.tokens[None], use_cache=False).logits[0, :-1] for model in models])
        if space == "logit":
            logprobs = (0.75 * z[0] + 0.25 * z[1]).log_softmax(-1)
        else:
            logprobs = (0.75 * z[0].softmax(-1) + 0.25 * z[1].softmax(-1)).log()
        targets = reader.targets(document.tokens)
        values = targets.logprobs.view(-1, 20).double()
        torch.testing.assert_close(values, logprobs.topk(20).values, rtol=0, atol=1e-4)
        following = logprobs.gather(1, document.tokens[1:, None])[:, 0]
        torch.testing.assert_close(reader.next_logprobs(document.tokens).double(), following, rtol=0, atol=1e-4)


def test_ensembles_have_fingerprints_of_their_own(data, tiny, other, tmp_path):
    few = dataclasses.replace(data, limit=2)

    def fingerprint(name, teachers, **options):
        build_cache([str(teacher) for teacher in teachers], few, tmp_path / name, dataclasses.replace(EXACT, **options))
        return CacheReader(tmp_path / name).manifest.teacher

    alone, pair = fingerprint("a", [tiny]), fingerprint("b", [tiny, other])
    assert fingerprint("c", [other, tiny]) == pair  # an average has no order
    assert fingerprint("d", [tiny, other], weights=(2.0, 2.0)) == pair
    others = [
        alone, pair, fingerprint("e", [tiny, other], weights=(2.0, 1.0)),
        fingerprint("f", [tiny, other], ensemble="prob"),
    ]
    assert len(set(others)) == 4


@torch.no_grad()
def test_a_head_in_bf16_is_recorded_and_is_one(data, tiny, documents, tmp_path):
    build_cache(str(tiny), data, tmp_path / "c", dataclasses.replace(EXACT, head_dtype="bfloat16"))
    reader = CacheReader(tmp_path / "c")
    assert reader.manifest.head_dtype == "bfloat16"
    model = load_pretrained(str(tiny))
    document = documents[0]
    hidden = model.model(document.tokens[None], use_cache=False).last_hidden_state[0, :-1]
    rounded = (hidden.bfloat16().double() @ model.lm_head.weight.bfloat16().double().T).log_softmax(-1)
    values = reader.targets(document.tokens).logprobs.view(-1, 20).double()
    torch.testing.assert_close(values, rounded.topk(20).values, rtol=0, atol=1e-5)


@torch.no_grad()
def test_columns_that_no_token_stands_for_are_left_out(data, tiny, tmp_path):
    folder = tmp_path / "padded"
    model = load_pretrained(str(tiny))
    vocab = model.config.vocab_size
    model.resize_token_embeddings(vocab + 7, mean_resizing=False)
    model.lm_head.weight[vocab:] = model.lm_head.weight[:7] * 4
    model.save_pretrained(folder)
    load_tokenizer(str(tiny)).save_pretrained(folder)
    build_cache(str(folder), dataclasses.replace(data, limit=3), tmp_path / "c", dataclasses.replace(EXACT, k=300))
    reader = CacheReader(tmp_path / "c")
    assert reader.manifest.vocab == vocab and reader.manifest.k == vocab
    assert reader.manifest.meta["padding"] == "7 columns of the head"
    for key in reader.keys():
        targets = reader.read(key).targets
        assert (targets.offsets.diff() == vocab).all() and (targets.tail_logprob == -math.inf).all()


# ------------------------------------------------------------------------------------------------- rows that are kept


@torch.no_grad()
def test_rows_below_an_entropy_are_left_out(data, tiny, documents, tmp_path):
    teacher = sharpened(tiny, tmp_path / "teacher", 12.0)
    model = load_pretrained(str(teacher)).double()

    def entropies(document):
        logprobs = model(document.tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)

    threshold = float(torch.cat([entropies(document) for document in documents]).median())
    build_cache(str(teacher), data, tmp_path / "c", dataclasses.replace(EXACT, min_entropy=threshold))
    reader = CacheReader(tmp_path / "c")
    assert 0.4 < reader.cached_rows / reader.rows < 0.6
    assert reader.manifest.meta["positions"] == f"entropy >= {threshold:g} nats by the teacher"
    for document in documents:
        entropy, kept = entropies(document), reader.positions(document.tokens)
        assert (entropy[kept] > threshold - 1e-4).all() and (entropy[~kept] < threshold + 1e-4).all()
        logprobs = model(document.tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        rows = reader.targets(document.tokens).select(kept.nonzero().squeeze(1))
        torch.testing.assert_close(
            rows.logprobs.view(-1, 20).double(), logprobs[kept].topk(20).values, rtol=0, atol=1e-4
        )
        following = logprobs.gather(1, document.tokens[1:, None])[:, 0][kept]
        torch.testing.assert_close(reader.next_logprobs(document.tokens)[kept].double(), following, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_fraction_of_each_document_is_chosen_by_another_model(data, tiny, documents, tmp_path):
    student = sharpened(tiny, tmp_path / "student", 20.0)
    model = load_pretrained(str(student)).double()
    options = dataclasses.replace(EXACT, select=str(student), fraction=0.2)
    build_cache(str(tiny), data, tmp_path / "c", options)
    reader = CacheReader(tmp_path / "c")
    for document in documents:
        logprobs = model(document.tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        entropy, kept = -(logprobs.exp() * logprobs).sum(-1), reader.positions(document.tokens)
        assert int(kept.sum()) == math.ceil(0.2 * len(entropy))
        assert kept.all() or entropy[kept].min() > entropy[~kept].max() - 1e-4


def test_a_document_without_a_row_to_keep_is_in_the_cache(data, tiny, documents, tmp_path):
    build_cache(str(tiny), data, tmp_path / "c", dataclasses.replace(EXACT, min_entropy=50.0))
    reader = CacheReader(tmp_path / "c")
    assert reader.cached_rows == 0 and not reader.positions(documents[0].tokens).any()
    assert build_cache(str(tiny), data, tmp_path / "c", dataclasses.replace(EXACT, min_entropy=50.0))["rows"] == 0


@torch.no_grad()
def test_packed_sequences_have_keys_of_their_own_and_rows_of_their_documents(tiny, documents, tmp_path):
    parts = [document.tokens.tolist() for document in documents[:4]]
    packs = [
        {"input_ids": parts[0] + parts[1], "seq_lengths": [len(parts[0]), len(parts[1])]},
        {"input_ids": parts[2] + parts[3]},
    ]
    (tmp_path / "packs.jsonl").write_text("".join(json.dumps(pack) + "\n" for pack in packs))
    build_cache(str(tiny), DataConfig(source=str(tmp_path / "packs.jsonl"), max_length=200), tmp_path / "c", EXACT)
    build_cache(str(tiny), DataConfig(source=str(tmp_path / "packs.jsonl"), max_length=200), tmp_path / "c", EXACT)
    reader = CacheReader(tmp_path / "c")
    model = load_pretrained(str(tiny)).double()
    tokens, layout = torch.tensor(parts[0] + parts[1]), (len(parts[0]), len(parts[1]))
    targets = reader.targets(tokens, layout=layout)
    alone = [model(torch.tensor([part]), use_cache=False).logits[0, :-1].log_softmax(-1) for part in parts[:2]]
    kept = reader.positions(tokens, layout=layout)
    assert kept.tolist() == [True] * (layout[0] - 1) + [False] + [True] * (layout[1] - 1)
    torch.testing.assert_close(
        targets.logprobs.view(-1, 20).double(), torch.cat(alone).topk(20).values, rtol=0, atol=1e-4
    )
    with pytest.raises(CacheError, match="none such"):
        reader.targets(tokens)
    whole = reader.targets(torch.tensor(parts[2] + parts[3]))  # one segment: the second document sees the first
    assert whole.offsets.shape[0] - 1 == len(parts[2]) + len(parts[3]) - 1


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_teacher_that_is_not_finite_is_refused_by_document(data, tiny, tmp_path):
    model = load_pretrained(str(tiny))
    with torch.no_grad():
        model.model.embed_tokens.weight[20] = math.nan  # "3" in the alphabet of bytes
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(str(tiny)).save_pretrained(tmp_path / "broken")
    token = load_tokenizer(str(tiny)).convert_ids_to_tokens(20)
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "abcdef"}) + "\n" + json.dumps({"text": f"ghi{token}kl"}) + "\n"
    )
    with pytest.raises(
        ValueError,
        match="hidden states of LlamaForCausalLM must be finite, got NaN .*row . of the document that begins 'ghi",
    ):
        build_cache(str(tmp_path / "broken"), DataConfig(source=str(tmp_path / "a.jsonl")), tmp_path / "c", EXACT)


def test_a_head_that_is_not_finite_is_refused(data, tiny, tmp_path, monkeypatch):
    def spoiled(logits, *arguments, **options):
        return topk_targets(dataclasses.replace(logits, hidden=logits.hidden * 3e38), *arguments, **options)

    monkeypatch.setattr("kd_trainer.caching.scoring.topk_targets", spoiled)
    with pytest.raises(ValueError, match="logits must be free of NaN and .inf"):
        build_cache(str(tiny), data, tmp_path / "c", EXACT)


def test_out_of_memory_names_what_to_lower(data, tiny, tmp_path, monkeypatch):
    def exhausted(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("kd_trainer.caching.scoring.topk_targets", exhausted)
    with pytest.raises(
        ValueError, match="--batch-tokens must be small enough for the memory of cpu, got 200 tokens .5 doc.*lower"
    ):
        build_cache(str(tiny), data, tmp_path / "c", EXACT)


def test_a_folder_with_rows_is_refused_without_resume(data, tiny, tmp_path):
    fresh = dataclasses.replace(EXACT, resume=False)
    build_cache(str(tiny), dataclasses.replace(data, limit=2), tmp_path / "c", fresh)
    with pytest.raises(ValueError, match="--out must be a folder without rows with --no-resume, got 1 shards"):
        build_cache(str(tiny), data, tmp_path / "c", fresh)


def test_documents_longer_than_the_model(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 300)
    with pytest.raises(ValueError, match="--max-length must be at most the 256 positions of LlamaForCausalLM, got 300"):
        build_cache(str(tiny), DataConfig(source=str(tmp_path / "a.txt")), tmp_path / "c", EXACT)


@pytest.mark.parametrize(("options", "message"), [
    ({"dtype": "int8"}, "--dtype must be one of float32"),
    ({"head_dtype": "int8"}, "--head-dtype must be one of float32"),
    ({"ensemble": "vote"}, "--ensemble must be one of logit, prob"),
    ({"min_entropy": -1.0}, "--min-entropy must be finite and at least 0 nats, got -1"),
    ({"fraction": 0.0}, "--fraction must be in \\(0, 1\\], got 0"),
    ({"select": "x"}, "--min-entropy or --fraction must be given with --select"),
    ({"batch_tokens": 1}, "--batch-tokens must be at least 2, got 1"),
    ({"share": "4/4"}, "--share must be i/n with 0 <= i < n, such as 0/4, got '4/4'"),
])
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"build_cache: {message}"):
        CacheOptions(**options)


def test_weights_are_one_a_teacher(data, tiny, tmp_path):
    with pytest.raises(ValueError, match="--weights must be one number for each of 1 teachers, got \\[1.0, 2.0\\]"):
        build_cache(str(tiny), data, tmp_path / "c", dataclasses.replace(EXACT, weights=(1.0, 2.0)))
