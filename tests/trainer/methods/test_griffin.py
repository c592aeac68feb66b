"""GRIFFIN against drafting itself, one prefix after the other, from transformers alone and in float64."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from kd_trainer.caching.build import build_cache
from kd_trainer.caching.options import CacheOptions
from kd_trainer.cli import main
from kd_trainer.config import Config, DataConfig, from_tree
from kd_trainer.data import Document, collate
from kd_trainer.diagnostics.accepted import accepted_length, kept_drafts, load_fusion
from kd_trainer.drafting import sees
from kd_trainer.methods.griffin import Draft, Options
from kd_trainer.models import CausalLM, cut_layers, load_pretrained
from kd_trainer.rollout import Options as Written
from kd_trainer.trainer import train

DOCUMENTS = [
    Document(torch.randint(200, (length,), generator=torch.Generator().manual_seed(length)), first)
    for length, first in ((8, 3), (6, 1))
]
BATCH = collate(DOCUMENTS, 32)


@pytest.fixture(scope="module")
def pair(tiny) -> tuple[CausalLM, CausalLM]:
    teacher = load_pretrained(str(tiny)).double()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return CausalLM(teacher), CausalLM(cut_layers(teacher, (1, 3)))


def draft_of(pair, **options) -> tuple[Draft, CausalLM, object]:
    teacher, student = pair
    torch.manual_seed(7)
    draft = Draft(Options(**{"noise": 0.0, "align_k": 60} | options), 64, seed=1).double()
    with torch.no_grad():
        return draft, student, teacher(BATCH)


def by_hand(pair, draft: Draft, document: Document, passes: int) -> list[torch.Tensor]:
    """``[L - 1, H]`` for each pass: a prefix, a row, a call; the draft's own features at the end of each prefix."""
    teacher, student = pair
    with torch.no_grad():
        target = teacher.model.model(document.tokens[None], use_cache=False).last_hidden_state[0]
    embedded = student.model.model.embed_tokens(document.tokens).detach()
    found: list[torch.Tensor] = []
    for number in range(passes):
        rows = []
        for row in range(len(document) - 1):
            before = [torch.zeros(64, dtype=torch.float64)]
            for place in range(row):  # the feature of `place` is read with token place + 1
                own = place - (row - number)  # which pass it comes from, if it is one of the last `number`
                before.append(found[own][place].detach() if own >= 0 else target[place])
            read = draft.fuse(torch.cat([embedded[: row + 1], torch.stack(before)], -1))
            rows.append(student.model.model(inputs_embeds=read[None], use_cache=False).last_hidden_state[0, -1])
        found.append(torch.stack(rows))
    return found


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_passes_see_what_drafting_sees(pair, passes):
    draft, student, targets = draft_of(pair, passes=passes)
    found = draft.fuse.passes(student, BATCH, targets.hidden, passes)
    wanted = torch.stack(joined(pair, draft, passes))
    assert ((found - wanted).norm(dim=-1) <= 1e-12 * wanted.norm(dim=-1)).all()


def joined(pair, draft, passes):
    parts = [by_hand(pair, draft, document, passes) for document in DOCUMENTS]
    return [torch.cat([part[number] for part in parts]) for number in range(passes)]


@pytest.mark.parametrize("options", [
    {"passes": 1, "top_k_weight": 0.0}, {"passes": 2},
    {"passes": 3, "top_k": 4, "feature_weight": 0.3, "soft_weight": 0.7},
])
def test_the_loss(pair, options):
    draft, student, targets = draft_of(pair, **options)
    chosen, weight = draft.options, student.model.lm_head.weight
    parameters = [p for p in [*draft.parameters(), *student.model.model.layers.parameters()]]
    result = draft(student, targets, BATCH, 5.0)
    gradients = torch.autograd.grad(result.loss, parameters)

    passes = joined(pair, draft, chosen.passes)
    body = pair[0].model.model
    with torch.no_grad():
        h = torch.cat([body(d.tokens[None], use_cache=False).last_hidden_state[0, :-1] for d in DOCUMENTS])
    logp = (h @ weight.T).log_softmax(-1)
    labels = torch.cat([document.tokens[1:] for document in DOCUMENTS])
    counted = torch.cat([document.counted for document in DOCUMENTS])
    starts = {0, len(DOCUMENTS[0]) - 1}
    counts, total, seen = counted.clone(), 0.0, []
    for number, g in enumerate(passes):
        logq = (g @ weight.T).log_softmax(-1)
        if number:
            likeliest = (passes[number - 1] @ weight.T).topk(chosen.align_k).indices
            now = (likeliest == labels[:, None]).any(-1) & counted
            if number > 1:
                now &= torch.tensor([row not in starts and bool(counts[row - 1]) for row in range(len(labels))])
            counts = now
            seen.append(counts)
        for row in counts.nonzero()[:, 0].tolist():
            p, kl = logp[row].exp(), logp[row] - logq[row]
            total = total + chosen.soft_weight * (p * kl).sum()
            total = total + chosen.feature_weight * functional.smooth_l1_loss(g[row], h[row])
            first = p.topk(chosen.top_k).indices
            total = total + chosen.top_k_weight * (p * kl)[first].sum()
    torch.testing.assert_close(result.loss.detach(), (total / 5.0).detach(), rtol=1e-5, atol=0.0)
    for got, wanted in zip(gradients, torch.autograd.grad(total / 5.0, parameters)):
        assert (got - wanted).norm() <= 1e-6 * wanted.norm()
        assert wanted.abs().max() > 1e-4
    for mask in seen:
        assert 0 < int(mask.sum()) < int(counted.sum())  # the masks leave some rows out and not others
    if seen:
        torch.testing.assert_close(result.stats["aligned"][BATCH.counted].double(), seen[0][counted].double())
    assert all(bool(result.stats[name][BATCH.counted].isfinite().all()) for name in draft.stats)


def test_what_a_pass_sees():
    found = sees(torch.tensor([[0, 1, 2, 0]]), 3)[0].view(3, 4, 3, 4)

    def listed(number: int, column: int) -> list[tuple[int, int]]:
        return [(k, c) for k in range(3) for c in range(4) if found[number, column, k, c]]

    assert listed(0, 2) == [(0, 0), (0, 1), (0, 2)]
    assert listed(1, 2) == [(0, 0), (0, 1), (1, 2)]
    assert listed(2, 2) == [(0, 0), (1, 1), (2, 2)]
    assert listed(2, 1) == [(1, 0), (2, 1)]
    assert listed(1, 3) == [(1, 3)]  # another document


def test_noise_belongs_to_the_document(pair):
    draft, _, targets = draft_of(pair, noise=0.2)
    whole = draft.noise(BATCH, targets.hidden)
    parts = [draft.noise(collate([document], 32), targets.hidden) for document in DOCUMENTS]
    assert torch.equal(whole, torch.cat(parts))
    for part, document in zip(parts, DOCUMENTS):
        width = 0.2 * 512 / len(document)
        assert 0.45 * width < float(part.abs().max()) <= 0.5 * width
    draft.begin_step(1)
    assert not torch.equal(whole, draft.noise(BATCH, targets.hidden))


def griffin(make_config, tiny, **changes) -> Config:
    settings = {"teacher": {"model": str(tiny)}, "student": {"model": None, "layers": [3]}} | changes
    return make_config(method="griffin", **settings)


def test_a_run_keeps_the_targets_head_and_saves_the_fusion(make_config, tiny, text, tmp_path, capsys):
    model = train(griffin(make_config, tiny, options={"align_k": 50}))
    saved, target = load_file(model / "model.safetensors"), load_pretrained(str(tiny))
    assert torch.equal(saved["model.embed_tokens.weight"], target.model.embed_tokens.weight)
    assert not torch.equal(saved["model.layers.0.mlp.up_proj.weight"], target.model.layers[3].mlp.up_proj.weight)
    told = tmp_path / "accepted.json"
    asked = f"--prompt-tokens 6 --max-new-tokens 5 --gamma 2 --data {text} --limit 4 --json {told}".split()
    assert main(["diagnose", "accepted", "--target", str(tiny), "--draft", str(model), *asked]) == 0
    assert "accepted length" in capsys.readouterr().out and 1.0 <= json.loads(told.read_text())["length"] <= 3.0
    fusion = load_file(model / "objectives.safetensors")
    assert torch.equal(load_fusion(model).weight, fusion["main.fuse.weight"]) and load_fusion(tiny) is None
    assert {name: list(tensor.shape) for name, tensor in fusion.items()} == {
        "main.fuse.weight": [64, 128], "main.fuse.bias": [64],
    }


# ------------------------------------------------------------------------------------------------- accepted length


@torch.no_grad()
def decoded(pair, fuse, prompt: list[int], new: int, gamma: int, vocab: int) -> list[int]:
    """Drafts that were kept in each round of speculative decoding, done as such: draft, verify, add a token."""
    target, student = (model.model for model in pair)
    says = lambda hidden: int((hidden @ target.lm_head.weight.T)[:vocab].argmax())  # noqa: E731
    states = lambda model, **inputs: model.model(**inputs, use_cache=False).last_hidden_state[0]  # noqa: E731
    text, kept = list(prompt), []
    while len(text) < len(prompt) + new:
        features = list(states(target, input_ids=torch.tensor([text]))[:-1])  # the last token has not been verified
        draft = list(text)
        for _ in range(gamma):
            embedded = student.model.embed_tokens(torch.tensor(draft))
            if fuse is not None:
                embedded = fuse(torch.cat([embedded, torch.stack([torch.zeros_like(embedded[0]), *features])], -1))
            hidden = states(student, inputs_embeds=embedded[None])[-1]
            features.append(hidden)
            draft.append(says(hidden))
        verified = [says(hidden) for hidden in states(target, input_ids=torch.tensor([draft]))[len(text) - 1 :]]
        drafts, count = draft[len(text) :], 0
        while count < min(gamma, len(prompt) + new - len(text)) and drafts[count] == verified[count]:
            count += 1
        text += verified[: count + 1]
        kept.append(count)
    return kept


@pytest.mark.parametrize("fused", [True, False])
def test_the_accepted_length_is_that_of_speculative_decoding(pair, fused):
    """Over four tokens, of which a draft that has learnt nothing is right now and then."""
    vocab, gamma, new = 4, 3, 9
    models = [CausalLM(model.model, vocab=vocab) for model in pair]
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(vocab, (length,), generator=generator) for length in (3, 5, 4, 6)]
    fuse = draft_of(pair)[0].fuse if fused else None
    documents = [Document(torch.cat([prompt, prompt[:1]]), len(prompt)) for prompt in prompts]
    found = accepted_length(*models, documents, Written(max_new_tokens=new), gamma=gamma, fusion=fuse, batch_tokens=30)
    kept = [count for prompt in prompts for count in decoded(pair, fuse, prompt.tolist(), new, gamma, vocab)]
    assert (found.rounds, found.tokens, found.texts) == (len(kept), 4 * new, 4)
    assert found.length == 4 * new / len(kept) and max(kept) >= 2 and 0 in kept
    assert found.kept[0] == pytest.approx(sum(count > 0 for count in kept) / len(kept), abs=0.1)  # but for texts' ends
    if not fused:
        itself = accepted_length(models[0], models[0], documents, Written(max_new_tokens=8), gamma=3)
        assert itself.kept == (1.0, 1.0, 1.0)


def test_rounds_by_hand():
    first, second = [True, False, True, True, True, False], [False, True, False, False, True, True]
    # keeps 0 and misses 1; keeps 2 and misses 3; keeps 4 and, as a second draft, 5, where the text ends
    assert kept_drafts([first, second]) == [(0, 2), (3, 2)]
    assert kept_drafts([first]) == [(0, 1), (2, 1), (4, 1)]
    assert kept_drafts([[False, False]]) == [(0, 0), (1, 0)]


@pytest.mark.parametrize(("change", "message"), [
    ({"gamma": 0}, "accepted_length: gamma must be at least 1, got 0"),
    ({"documents": []}, "accepted_length: documents must be at least one, got none"),
])
def test_what_no_accepted_length_can_be_had_of(pair, change, message):
    with pytest.raises(ValueError, match=message):
        accepted_length(*pair, change.pop("documents", DOCUMENTS), Written(max_new_tokens=2), **change)


def test_a_student_with_another_head(make_config, tiny, tmp_path):
    other = load_pretrained(str(tiny))
    with torch.no_grad():
        other.lm_head.weight.add_(0.1)
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other.save_pretrained(tmp_path)
    config = griffin(make_config, tiny, student={"model": str(tmp_path)})
    with pytest.raises(ValueError, match=r"the student must be a draft with the head of its target.*student.layers"):
        train(config)


def test_a_cache_is_refused(make_config, tiny, text, tmp_path):
    build_cache(str(tiny), DataConfig(source=str(text), max_length=48, limit=3), tmp_path / "cache", CacheOptions(k=4))
    with pytest.raises(ValueError, match="cache must be absent for method griffin"):
        griffin(make_config, tiny, cache=str(tmp_path / "cache"))


@pytest.mark.parametrize(("options", "message"), [
    ({"passes": 0}, "options.passes must be at least 1, got 0"),
    ({"align_k": 0}, "options.align_k must be at least 1, got 0"),
    ({"soft_weight": 0.0}, "options.soft_weight must be finite and greater than 0, got 0.0"),
    ({"noise": -0.1}, "options.noise must be finite and at least 0, got -0.1"),
])
def test_settings_out_of_range(options, message):
    tree = {
        "out": "o", "method": "griffin", "student": {"model": "m"}, "teacher": {"model": "t"}, "data": {"source": "d"},
        "options": options,
    }
    with pytest.raises(ValueError, match=message):
        from_tree(Config, tree)
