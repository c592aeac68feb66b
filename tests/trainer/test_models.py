"""Models as backbone and head: the same logits as their own forward, whatever the architecture does to them."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kd_trainer.data import Document, collate
from kd_trainer.models import (
    CausalLM, bos_policy, chat_template_fingerprint, cut_layers, dense_logits, load_pretrained, load_tokenizer,
    model_fingerprint, tokenizer_fingerprint, vocab_of,
)
from kd_trainer.tiny import byte_tokenizer

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
ARCHITECTURES = {
    "llama": {},
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "gemma2": dict(final_logit_softcapping=2.0, query_pre_attn_scalar=8, sliding_window=4),
    "gemma3_text": dict(final_logit_softcapping=3.0),
    "cohere": dict(logit_scale=0.25),
    "granite": dict(logits_scaling=4.0),
    "phi": {},  # a head with a bias
}


def make(kind: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | ARCHITECTURES.get(kind, {}) | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # initial weights are so small that a wrong scale would hide
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def documents():
    generator = torch.Generator().manual_seed(1)
    return [Document(torch.randint(0, 61, (length,), generator=generator)) for length in (7, 12, 2, 9, 5)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_documents_have_the_logits_that_they_have_alone(kind):
    model = make(kind)
    lm = CausalLM(model)
    lm.check_packing()
    ours = dense_logits(lm(collate(documents(), 16)))
    own = torch.cat([model(document.tokens[None], use_cache=False).logits[0, :-1] for document in documents()])
    assert collate(documents(), 16).input_ids.shape[0] < len(documents())
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mamba"])
def test_padded_documents_have_the_logits_that_they_have_alone(kind):
    model = make(kind)
    ours = dense_logits(CausalLM(model)(collate(documents(), 16, packing=False)))
    own = torch.cat([model(document.tokens[None], use_cache=False).logits[0, :-1] for document in documents()])
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mamba", "opt"])
def test_models_that_carry_a_state_across_documents_refuse_packing(kind):
    lm = CausalLM(make(kind, **(dict(ffn_dim=48, word_embed_proj_dim=32) if kind == "opt" else {})))
    with pytest.raises(ValueError, match="must be without effect .*set data.packing=false"):
        lm.check_packing()


def test_a_scale_that_is_overlooked_is_found():
    model = make("granite")
    del model.config.logits_scaling
    object.__setattr__(model.config, "logits_scaling", None)  # as if the architecture kept it under an unknown name
    scaled = lambda ids: 0.25 * model.lm_head(model.model(ids)[0])  # noqa: E731
    model.forward = lambda input_ids, use_cache: types.SimpleNamespace(logits=scaled(input_ids))
    with pytest.raises(ValueError, match="the model's own logits to 0.001 with scale=1 .*got a relative error"):
        CausalLM(model)


def test_a_head_that_cannot_be_found():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    backbone = AutoModel.from_config(model.config)
    message = r"get_output_embeddings\(\) of LlamaModel must be a linear head .*such as lm_head, got none"
    with pytest.raises(ValueError, match=message):
        CausalLM(backbone)


def test_a_configuration_without_a_language_model_head(tmp_path):
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of a class with a language-model head \(lm_head\), got .*vit"):
        load_pretrained(str(tmp_path))


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="model must be a name or an existing folder, got"):
        load_pretrained(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="a name or a folder that transformers finds a configuration in, got"):
        load_pretrained(str(tmp_path))


def test_padding_columns_of_the_head_do_not_exist():
    lm = CausalLM(make("llama"), vocab=50)
    batch = collate([Document(torch.arange(9))], 16)
    assert lm.vocab == 50 and dense_logits(lm(batch)).shape == (8, 50)
    assert CausalLM(make("llama"), vocab=70).vocab == 61  # ids that a tokenizer has and the head has not


def test_a_cut_student_is_the_chosen_layers():
    model = make("gemma2", num_hidden_layers=4)
    student = cut_layers(model, (0, 1, 3))
    assert student.config.num_hidden_layers == 3
    assert student.config.layer_types == [model.config.layer_types[i] for i in (0, 1, 3)]
    for new, old in enumerate((0, 1, 3)):
        ours, theirs = student.model.layers[new].state_dict(), model.model.layers[old].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    everything = cut_layers(model, (0, 1, 2, 3))
    ids = torch.arange(6)[None]
    assert torch.equal(everything(ids).logits, model(ids).logits)
    assert student.model.norm.weight.data_ptr() != model.model.norm.weight.data_ptr()


def test_layers_that_the_teacher_does_not_have():
    with pytest.raises(ValueError, match=r"student.layers must be layers of the teacher in 0..2, got \[0, 3\]"):
        cut_layers(make("llama"), (0, 3))


def test_the_fingerprint_of_a_model_sees_weights_configuration_and_dtype(tmp_path):
    model = make("llama")
    original = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(load_pretrained(str(tmp_path))) == original
    assert model_fingerprint(load_pretrained(str(tmp_path), "bfloat16")) != original
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    nudged = model_fingerprint(model)
    model.config.rms_norm_eps = 1e-3
    assert len({original, nudged, model_fingerprint(model)}) == 3


def test_the_fingerprint_of_a_tokenizer_sees_what_it_does(tmp_path):
    tokenizer = byte_tokenizer()
    prints = [tokenizer_fingerprint(tokenizer)]
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == prints[0]
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)  # padding and truncation are no part of it
    assert tokenizer_fingerprint(tokenizer) == prints[0]
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(tokenizer) == prints[0], "a text that is no messages does not go through it"
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    prints.append(tokenizer_fingerprint(tokenizer))
    assert len(set(prints)) == 2 and vocab_of(tokenizer) == 258


def test_the_fingerprint_of_a_chat_template(tmp_path):
    tokenizer = byte_tokenizer()
    assert chat_template_fingerprint(tokenizer) == "none"
    prints = set()
    for template in ("{{ messages }}", "{{ messages }} ", {"default": "{{ messages }}", "tools": "{{ tools }}"}):
        tokenizer.chat_template = template
        prints.add(chat_template_fingerprint(tokenizer))
        tokenizer.save_pretrained(tmp_path)
        assert chat_template_fingerprint(load_tokenizer(str(tmp_path))) in prints
    assert len(prints) == 3


@pytest.mark.parametrize(
    "single, policy", [("$A", "none"), ("<begin> $A", "257 text"), ("<begin> $A <end>", "257 text 0")]
)
def test_what_a_tokenizer_puts_around_a_text(single, policy):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    before = tokenizer_fingerprint(tokenizer)
    special = [("<begin>", 257), ("<end>", 0)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    assert bos_policy(tokenizer) == policy
    assert tokenizer_fingerprint(tokenizer) != before


@pytest.mark.parametrize("seed", ["0", "1"])
def test_fingerprints_are_the_same_in_every_process(tiny, seed):
    program = (
        "import sys; from kd_trainer.models import *; name = sys.argv[1]; model = load_pretrained(name);"
        "model.config.sets = {'a', 'b', 'c', 'd'};"
        "print(model_fingerprint(model), tokenizer_fingerprint(load_tokenizer(name)))"
    )
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(
        [sys.executable, "-c", program, str(tiny)], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    model = load_pretrained(str(tiny))
    model.config.sets = {"d", "c", "b", "a"}
    assert printed == [model_fingerprint(model), tokenizer_fingerprint(load_tokenizer(str(tiny)))]


def test_batches_have_the_gradient_of_the_models_own_loss():
    model = make("llama").double()
    lm = CausalLM(model)
    batch = collate(documents(), 16)
    logits = lm(batch)
    z = logits.hidden @ logits.weight.T
    torch.nn.functional.cross_entropy(z, batch.labels, reduction="sum").backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for document in documents():
        own = model(document.tokens[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(own, document.tokens[1:], reduction="sum").backward()
    for ours, parameter in zip(gradients, model.parameters()):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-9, atol=1e-9)


def test_moving_a_batch_keeps_its_documents():
    batch = collate(documents(), 16)
    moved = batch.to("cpu")
    assert moved.documents is batch.documents
    for name in ("input_ids", "position_ids", "rows", "labels", "counted"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
