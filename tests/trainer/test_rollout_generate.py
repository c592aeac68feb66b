"""Generation: every token what a model without a cache would have drawn, whoever shares the batch."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kd_kernels import kd_loss
from kd_trainer.data import Document, collate
from kd_trainer.models import CausalLM
from kd_trainer.rollout import Options, Sampling, generate, pad, prompts_of, score, sequence_keys, step_seed, unpad
from kd_trainer.rollout.decoder import Decoder, evaluating
from rollout_oracles import LENGTHS, VOCAB, prompts, tiny_model, write_alone

SAMPLINGS = {
    "plain": Sampling(), "greedy": Sampling(temperature=0), "top_p": Sampling(0.7, top_p=0.8),
    "top_k, min_p": Sampling(1.5, top_k=9, min_p=0.1),
}
STOP = (5, 9, 30)
MODELS = {kind: tiny_model(kind) for kind in ("llama", "gemma3_text", "gpt2")}


def assert_same(rollouts, others, tolerance: float | None = None) -> None:
    assert rollouts.finish_reasons == others.finish_reasons
    for ours, theirs in zip(rollouts.completions, others.completions, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(rollouts.logprobs, others.logprobs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance or 1e-12)


# ------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "cohere", "phi"])
def test_every_token_is_the_one_drawn_without_a_cache(kind, sampling):
    lm, texts = tiny_model(kind), prompts()
    options = Options(max_new_tokens=9, min_new_tokens=2, stop_ids=STOP, sampling=sampling)
    rollouts = generate(lm, texts, options, seed=7)
    for i, (text, key) in enumerate(zip(texts, sequence_keys(texts).tolist())):
        alone = write_alone(lm, text, key, 9, sampling, 7, stop=STOP, least=2)
        assert rollouts.completions[i].tolist() == alone.tokens
        assert rollouts.finish_reasons[i] == alone.reason
        torch.testing.assert_close(rollouts.logprobs[i].tolist(), alone.logprobs, rtol=0, atol=1e-9)
        torch.testing.assert_close(rollouts.model_logprobs[i].tolist(), alone.model_logprobs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["gemma2", "opt"])  # soft-capped; positions out of the mask
def test_every_token_in_fp32(kind):
    lm, texts = tiny_model(
        kind, torch.float32, **(dict(ffn_dim=48, word_embed_proj_dim=32) if kind == "opt" else {})
    ), prompts()
    rollouts = generate(lm, texts, Options(max_new_tokens=9), seed=7)
    assert rollouts.logprobs[0].dtype == torch.float32
    for i, (text, key) in enumerate(zip(texts, sequence_keys(texts).tolist())):
        alone = write_alone(lm, text, key, 9, Sampling(), 7)
        assert rollouts.completions[i].tolist() == alone.tokens
        torch.testing.assert_close(rollouts.model_logprobs[i].tolist(), alone.model_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sequence_does_not_depend_on_its_batch(dtype):
    lm, texts = tiny_model(dtype=dtype), prompts((4, 4, 9, 2, 6, 1, 4, 3, 8))
    texts[1] = texts[0]
    run = lambda batch, size=None, keys=None: generate(  # noqa: E731
        lm, batch, Options(max_length=14, stop_ids=STOP, batch_size=size), seed=1, keys=keys
    )
    together, tolerance = run(texts), None if dtype == torch.float64 else 1e-5
    for size in (1, 2, 4):
        assert_same(run(texts, size), together, tolerance)
    order = torch.tensor([8, 0, 3, 1, 7, 2, 5, 6, 4])
    shuffled = run([texts[i] for i in order], keys=sequence_keys(texts)[order])
    for place, i in enumerate(order):
        assert torch.equal(shuffled.completions[place], together.completions[i])


def test_equal_prompts_and_other_steps_draw_differently():
    lm, (text, *_) = tiny_model(), prompts()
    options = Options(max_new_tokens=8)
    first, second = generate(lm, [text, text], options, seed=1).completions
    assert not torch.equal(first, second)
    assert torch.equal(generate(lm, [text], options, seed=1).completions[0], first)
    assert not torch.equal(generate(lm, [text], options, seed=2).completions[0], first)
    chosen = torch.tensor([3, 3])
    assert torch.equal(*generate(lm, [text, text], options, seed=1, keys=chosen).completions)
    assert len({step_seed(seed, step) for seed in range(20) for step in range(20)}) == 400


def test_padding_on_either_side_is_the_same_prompt():
    texts = prompts()
    for side in ("left", "right"):
        ids, mask = pad(texts, side, pad_id=60)
        assert ids.shape == mask.shape == (5, 12)
        assert all(map(torch.equal, unpad(ids, mask), texts)) and all(map(torch.equal, unpad(ids, mask.bool()), texts))
    rollouts = generate(tiny_model(), texts, Options(max_new_tokens=3), seed=0)
    ids, mask = rollouts.padded("left", pad_id=60)
    assert ids[3].tolist() == [60] * 7 + texts[3].tolist() + rollouts.completions[3].tolist()
    assert mask.sum(1).tolist() == [n + 3 for n in LENGTHS]
    documents = rollouts.documents()
    assert all(map(torch.equal, prompts_of(documents), texts))
    assert all(torch.equal(d.tokens[d.first_target :], c) for d, c in zip(documents, rollouts.completions))


def test_greedy_is_what_transformers_generates():
    lm, texts = tiny_model(dtype=torch.float32), prompts()
    ids, mask = pad(texts, "left")
    theirs = lm.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=11, min_new_tokens=11, do_sample=False, pad_token_id=0
    )
    allowed = Options(max_new_tokens=11, min_new_tokens=11, stop_ids=(2,), sampling=Sampling(temperature=0))
    ours = generate(lm, texts, allowed, seed=0)
    assert torch.equal(torch.stack(ours.completions), theirs[:, ids.shape[1] :])
    assert all(bool((logprobs == 0).all()) for logprobs in ours.logprobs)


# ------------------------------------------------------------------------------------------------- when they end


def test_lengths_and_stop_ids():
    lm, texts = tiny_model(), prompts()
    free = generate(lm, texts, Options(max_length=20), seed=3)
    assert free.lengths == [20 - n for n in LENGTHS] and set(free.finish_reasons) == {"length"}
    stopped = generate(lm, texts, Options(max_length=20, stop_ids=STOP), seed=3)
    seen = set()
    for full, part, reason in zip(free.completions, stopped.completions, stopped.finish_reasons):
        end = next((i + 1 for i, token in enumerate(full.tolist()) if token in STOP), len(full))
        assert torch.equal(part, full[:end])
        assert reason == ("stop" if full[end - 1] in STOP else "length")
        seen.add(reason)
    assert seen == {"stop", "length"}
    late = generate(lm, texts, Options(max_length=20, stop_ids=STOP, min_new_tokens=6), seed=3)
    assert all(not set(c[:6].tolist()) & set(STOP) for c in late.completions) and min(late.lengths) >= 6
    both = generate(lm, texts, Options(max_length=14, max_new_tokens=4), seed=3)
    assert both.lengths == [4, 4, 4, 4, 2]


def test_positions_stay_inside_of_a_models_table():
    """Rows that have ended are fed on until it pays to drop them; gpt2 here has 64 positions."""
    texts = prompts((60, *[55] * 20))
    assert generate(tiny_model("gpt2"), texts, Options(max_length=64), seed=0).lengths == [4] + [9] * 20


# ---------------------------------------------------------------------------------------------- what is returned


def test_rescoring_agrees_with_what_generation_returned():
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        lm = tiny_model("gemma3_text", dtype)
        options = Options(
            max_new_tokens=10, min_new_tokens=3, stop_ids=STOP, sampling=Sampling(0.8, top_p=0.9), entropy=True
        )
        rollouts = generate(lm, prompts(), options, seed=5)
        for batch_tokens in (20, 4096):
            for i, stats in enumerate(score(lm, rollouts.documents(), batch_tokens=batch_tokens)):
                torch.testing.assert_close(rollouts.model_logprobs[i], stats.logprob, rtol=0, atol=tolerance)
                torch.testing.assert_close(rollouts.entropies[i], stats.entropy, rtol=0, atol=tolerance)
    assert generate(lm, prompts(), Options(max_new_tokens=2), seed=5).entropies is None


def test_scores_are_those_of_the_models_own_logits():
    lm = tiny_model()
    documents = [Document(text, max(1, len(text) // 2)) for text in prompts((9, 4, 12))]
    for document, stats in zip(documents, score(lm, documents, batch_tokens=1), strict=True):
        own = lm.model(input_ids=document.tokens[None]).logits[0, document.first_target - 1 : -1].log_softmax(-1)
        expected = own.gather(1, document.tokens[document.first_target :, None])[:, 0]
        torch.testing.assert_close(stats.logprob, expected, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------ the model is left alone


def test_modes_dropout_and_checkpointing_are_put_back():
    lm = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = generate(lm.eval(), prompts(), Options(max_new_tokens=6), seed=0)
    lm.train()
    lm.model.transformer.h[1].eval()  # someone keeps a layer frozen
    lm.model.gradient_checkpointing_enable()
    modes = [module.training for module in lm.modules()]
    assert_same(generate(lm, prompts(), Options(max_new_tokens=6), seed=0), expected)
    score(lm, expected.documents())
    assert [module.training for module in lm.modules()] == modes
    assert torch.is_grad_enabled() and lm.model.is_gradient_checkpointing


def test_modes_are_put_back_after_an_error():
    lm = tiny_model().train()
    with pytest.raises(ZeroDivisionError), evaluating(lm):
        assert not lm.training and not torch.is_grad_enabled()
        1 / 0  # noqa: B018
    assert lm.training and torch.is_grad_enabled()


def test_the_next_step_under_autocast_keeps_its_gradient():
    """autocast remembers rounded weights; those made without gradients would cut the training step off from them."""
    lm = tiny_model(dtype=torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = generate(lm, prompts(), Options(max_new_tokens=4), seed=0)
        batch = collate(rollouts.documents(), 16)
        kd_loss(lm(batch), None, labels=batch.labels, kd_weight=0.0, ce_weight=1.0).loss.backward()
    assert all(parameter.grad is not None for parameter in lm.parameters())
    exact = generate(lm, prompts(), Options(max_new_tokens=4), seed=0)
    assert not torch.equal(exact.logprobs[0], rollouts.logprobs[0])  # it did compute in bf16


def test_the_head_sees_one_row_a_sequence(monkeypatch):
    lm, seen, original = tiny_model(), [], CausalLM.logits_of
    monkeypatch.setattr(nn.Linear, "forward", counting(nn.Linear.forward, lm.head))
    monkeypatch.setattr(
        CausalLM, "logits_of", lambda self, hidden: seen.append(tuple(hidden.shape)) or original(self, hidden)
    )
    generate(lm, prompts(), Options(max_new_tokens=3), seed=0)
    assert seen == [(5, 32)] * 3


def counting(forward, head):
    def applied(self, *args):
        assert self is not head, "the head was applied to all positions"
        return forward(self, *args)

    return applied


# ----------------------------------------------------------------------------------------------------- the cache


@given(data=st.data())
def test_a_decoder_sees_what_the_whole_text_shows(data):
    """Any sequence of feeding, forgetting and leaving: hidden states as without a cache."""
    kind = data.draw(st.sampled_from(["llama", "gemma3_text", "gpt2"]))
    lm, rows = MODELS[kind], data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    draw_tokens = lambda *shape: torch.randint(0, VOCAB, shape, generator=generator)  # noqa: E731
    texts = [draw_tokens(data.draw(st.integers(1, 6))) for _ in range(rows)]
    with evaluating(lm):
        decoder = Decoder("test", lm, rows, limit=60)
        hidden = decoder.feed_prompts(texts)
        for _ in range(data.draw(st.integers(1, 6))):
            for text, found in zip(texts, hidden[:, -1]):
                expected = lm.model.get_decoder()(input_ids=text[None], use_cache=False).last_hidden_state[0, -1]
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
            kept = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, unique=True))
            decoder.keep(kept)
            new = draw_tokens(len(kept), data.draw(st.integers(1, 3)))
            decoder.feed(new)
            forgotten = [data.draw(st.integers(0, new.shape[1])) for _ in kept]
            decoder.drop_last(torch.tensor(forgotten))
            last = draw_tokens(len(kept), 1)
            texts = [
                torch.cat([texts[i], tokens[: len(tokens) - gone], token])
                for i, tokens, gone, token in zip(kept, new, forgotten, last)
            ]
            hidden = decoder.feed(last)
            assert decoder.lengths.tolist() == [len(text) for text in texts]


def test_rows_that_leave_and_holes_are_squeezed_out():
    decoder = Decoder("test", MODELS["llama"], 3, limit=60)
    width = lambda: decoder._cache.layers[0].keys.shape[2]  # noqa: E731
    with evaluating(MODELS["llama"]):
        decoder.feed_prompts(prompts((20, 5, 4)))
        decoder.keep([1, 2])
        assert width() == 5
        decoder.feed(torch.ones(2, 4, dtype=torch.int64))
        decoder.drop_last(torch.tensor([3, 3]))
        assert width() == 6
        decoder.feed(torch.ones(2, 6, dtype=torch.int64))
        decoder.drop_last(torch.tensor([0, 6]))
        assert width() == 12 and decoder.lengths.tolist() == [12, 5]
        decoder.keep([1])
        assert width() == 5


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", ["mamba", "recurrent_gemma", "rwkv"])
def test_models_without_a_cache_of_keys_and_values(kind):
    lm = tiny_model(kind, torch.float32)
    name = type(lm.model).__name__
    with pytest.raises(ValueError, match=f"generate: {name} must be a model with a cache of keys and values"):
        generate(lm, prompts(), Options(max_new_tokens=2), seed=0)


def test_a_cache_that_changes_what_is_computed(monkeypatch):
    lm = tiny_model()
    forward = type(lm.model.model).forward

    @functools.wraps(forward)
    def blind(self, attention_mask=None, **rest):  # an architecture that does not look at padding
        return forward(self, **rest)

    monkeypatch.setattr(type(lm.model.model), "forward", blind)
    with pytest.raises(ValueError, match="the cache of LlamaForCausalLM must be without effect .*a relative change of"):
        generate(lm, prompts(), Options(max_new_tokens=2), seed=0)


def test_logits_that_cannot_be_drawn_from():
    lm = tiny_model()
    generate(lm, prompts(), Options(max_new_tokens=1), seed=0)
    with torch.no_grad():
        lm.model.model.embed_tokens.weight[7] = math.nan
    text = torch.tensor([1, 7, 2])
    with pytest.raises(ValueError, match="generate: logits must be free of NaN .*for sequence 1 at position 3"):
        generate(lm, [prompts()[0].clamp(max=6), text], Options(max_new_tokens=2), seed=0)


@pytest.mark.parametrize(
    "texts, options, message",
    [
        ([], {}, "prompts must be at least one, got none"),
        (
            [torch.tensor([], dtype=torch.int64)], {},
            r"prompts\[0\] must be of at least one token, got 0; begin with the model's BOS",
        ),
        ([torch.ones(3)], {}, r"prompts\[0\] must be token ids of shape \[L\], got torch.float32 \[3\]"),
        ([torch.tensor([3, 61])], {}, r"token ids of prompts\[0\] must be below the model's vocabulary of 61, got 61"),
        ([torch.tensor([3, -1])], {}, r"token ids of prompts\[0\] must be below the model's vocabulary of 61, got -1"),
        (prompts(), {"stop_ids": (2, 61)}, "stop_ids must be below the model's vocabulary of 61, got 61"),
        (prompts(), {"max_length": 12}, "max_length must be at least 13 for prompt 4 of 12 tokens, got 12; raise it"),
        (
            prompts(), {"max_length": 14, "min_new_tokens": 3},
            "max_length must be at least 15 for prompt 4 of 12 tokens"
        ),
    ],
)
def test_prompts_and_options_that_do_not_fit(texts, options, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        generate(MODELS["llama"], texts, Options(**{"max_new_tokens": 8} | options), seed=0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "max_new_tokens or max_length must be given"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 4, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, r"min_new_tokens must be in 0..4, the largest length, got 5"),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ValueError, match=f"Options: {message}"):
        Options(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be at least 0, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0; None keeps all"),
        ({"top_p": 1.5}, "top_p must be in 0..1, got 1.5"),
        ({"min_p": -0.1}, "min_p must be in 0..1, got -0.1"),
    ],
)
def test_sampling_out_of_range(fields, message):
    with pytest.raises(ValueError, match=f"Sampling: {message}"):
        Sampling(**fields)


def test_keys_masks_and_documents_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"generate: keys must be int64 of shape \[B=5\], one a prompt, got torch.int64 \[2\]"
    ):
        generate(MODELS["llama"], prompts(), Options(max_new_tokens=2), seed=0, keys=torch.arange(2))
    with pytest.raises(ValueError, match=r"attention_mask\[1\] must be ones in one run, with padding before or after"):
        unpad(torch.zeros(2, 3), torch.tensor([[0, 1, 1], [1, 0, 1]]))
    with pytest.raises(
        ValueError, match=r"input_ids and attention_mask must be of one shape \[B, L\], got \[2, 3\] and \[3\]"
    ):
        unpad(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"score: documents\[0\] must be of at least one target token, got none"):
        score(MODELS["llama"], [Document(torch.arange(3), 3)])
    with pytest.raises(ValueError, match="score: documents must be at least one, got none"):
        score(MODELS["llama"], [])
    with pytest.raises(ValueError, match="pad: side must be one of left, right, got 'top'"):
        pad(prompts(), "top")
