"""What the tests of the trainers share: models, texts, one step of plain gradient descent, and its truth in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import oracles
from kd_kernels import divergences, topk_targets
from kd_kernels.cache import CacheManifest, CacheWriter
from kd_trainer.models import tokenizer_fingerprint
from kd_trainer.tiny import byte_tokenizer, tiny_texts

IGNORED = -100


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; padding is its last id, so that it is no token of a text."""
    made = byte_tokenizer()
    made.padding_side = "right"
    return made


def model(seed: int, hidden: int = 32, layers: int = 2, vocab: int = 257, tied: bool = False) -> LlamaForCausalLM:
    """A random Llama whose logits are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(20.0)
    return made


def examples(count: int = 8) -> list[dict]:
    """Token ids with labels: the first eight tokens are a prompt; lengths differ."""
    made = []
    for text in tiny_texts(count):
        ids = tokenizer()(text)["input_ids"][: 24 + 3 * len(made)]
        made.append({"input_ids": ids, "labels": [IGNORED] * 8 + ids[8:]})
    return made


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """Padded on the right, with a mask."""
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda key, value: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])  # noqa: E731
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", IGNORED), "attention_mask": mask}


def truth(
    student: nn.Module, teacher: nn.Module, rows: list[dict], divergence: str = "forward_kl", *, ce_weight: float = 0.0,
    temperature: float = 1.0, top_k: int | None = None, tail: str = "bucket",
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of what is trained, in float64 from dense logits; the mean is over the tokens that count."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double().eval()
    for module in (*student.modules(), *teacher.modules()):
        module.__dict__.pop("forward", None)  # the classes' own
    batch = collate(rows)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    z = student(**inputs).logits[:, :-1][counted]
    with torch.no_grad():
        t = teacher(**inputs).logits[:, :-1][counted]
    named = divergences.parse(divergence)
    loss = oracles.kd_loss(
        z, t if top_k is None else oracles.topk(t / temperature, top_k), named.name,
        dict(named.params) | dict(named.options),
        labels=labels[counted], ce_weight=ce_weight, temperature=temperature, tail=tail,
    )
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def gradient_of(make_trainer, student: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """Loss that one step logs, and its gradient: what plain gradient descent takes from the weights, over its rate."""
    trained = lambda: {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}  # noqa: E731
    before = trained()
    trainer = make_trainer()
    loss = trainer.train().training_loss
    return loss, {name: (before[name] - after) / RATE for name, after in trained().items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 2e-4) -> None:
    """Each gradient to ``rtol`` of its own norm: weights in fp32 were subtracted, so not to the last digit."""
    assert set(got) == set(want)
    for name in want:
        error = (got[name].double() - want[name].double()).norm() / want[name].double().norm().clamp_min(1e-12)
        assert error < rtol, f"{name}: relative error {error:.2e}"


def assert_step(got: tuple, want: tuple, rtol: float = 1e-5, gradient_rtol: float = 2e-4) -> None:
    """Loss and gradients of one step."""
    assert got[0] == pytest.approx(want[0], rel=rtol)
    assert_same(got[1], want[1], gradient_rtol)


def lora_of(student: nn.Module, **changes: object) -> nn.Module:
    """A PEFT model whose adapter does something from the start."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    options = dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return peft.get_peft_model(student, peft.LoraConfig(**(options | changes)))


def write_cache(folder: str | Path, teacher: nn.Module, rows: list[dict]) -> None:
    """Every logprob of a teacher over bytes, unrounded."""
    manifest = CacheManifest(
        teacher="t" * 64, tokenizer=tokenizer_fingerprint(tokenizer()), vocab=257, k=257, step_nats=0.0,
        temperatures=(1.0, 2.0),
    )
    with CacheWriter(folder, manifest) as writer, torch.no_grad():
        for row in rows:
            ids = torch.tensor(row["input_ids"])
            logits = teacher.eval()(input_ids=ids[None]).logits[0, :-1]
            targets = topk_targets(logits, 257, temperatures=(1.0, 2.0))
            next_logprobs = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            writer.add(ids, targets, next_logprobs=next_logprobs)


RATE = 16.0
"""Large, so that what the weights' rounding adds to the difference is small beside the gradient."""

ARGUMENTS = dict(
    per_device_train_batch_size=8, max_steps=1, learning_rate=RATE, lr_scheduler_type="constant", optim="sgd",
    max_grad_norm=0.0, weight_decay=0.0, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True,
    disable_tqdm=True, seed=0,
)
"""One step of plain gradient descent."""
