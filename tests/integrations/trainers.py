"""What the tests of the trainers share: models, texts, one step of plain gradient descent, and its truth in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def divergence(logp: Tensor, logq: Tensor, name: str) -> Tensor:
    p, q = logp.exp(), logq.exp()
    if name == "forward_kl":
        return (p * (logp - logq)).sum(-1)
    if name == "reverse_kl":
        return (q * (logq - logp)).sum(-1)
    assert name == "jsd"
    logm = (0.5 * p + 0.5 * q).log()
    return 0.5 * (p * (logp - logm)).sum(-1) + 0.5 * (q * (logq - logm)).sum(-1)


def truth(
    student: nn.Module, teacher: nn.Module, rows: list[dict], name: str, ce_weight: float = 0.0, temperature: float = 1.0
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in float64 from dense logits; the mean is over the tokens that count."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double().eval()
    for module in (student, teacher):
        module.__dict__.pop("forward", None)  # the classes' own
    batch = collate(rows)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    counted = batch["labels"][:, 1:] != IGNORED
    z = student(**inputs).logits[:, :-1][counted]
    with torch.no_grad():
        t = teacher(**inputs).logits[:, :-1][counted]
    loss = divergence((t / temperature).log_softmax(-1), (z / temperature).log_softmax(-1), name).mean()
    if ce_weight:
        loss = loss + ce_weight * nn.functional.cross_entropy(z, batch["labels"][:, 1:][counted])
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


RATE = 16.0
"""Large, so that what the weights' rounding adds to the difference is small beside the gradient."""

ARGUMENTS = dict(
    per_device_train_batch_size=8, max_steps=1, learning_rate=RATE, lr_scheduler_type="constant", optim="sgd",
    max_grad_norm=0.0, weight_decay=0.0, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True,
    disable_tqdm=True, seed=0,
)
"""One step of plain gradient descent."""
