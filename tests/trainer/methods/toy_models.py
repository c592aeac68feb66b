"""Llamas over five tokens, in float64, whose continuations of a prompt can all be listed, for expectations."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kd_trainer.data import Document
from kd_trainer.models import CausalLM

TOKENS, NEW = 5, 2
PROMPT = torch.tensor([1, 3, 0])


def toy_model(seed: int) -> CausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # distributions that are neither flat nor certain
    return CausalLM(model.double())


def texts() -> list[Document]:
    """The prompt with each of its 25 continuations of two tokens."""
    ends = itertools.product(range(TOKENS), repeat=NEW)
    return [Document(torch.cat([PROMPT, torch.tensor(end)]), len(PROMPT)) for end in ends]


def logprobs(model: CausalLM, document: Document) -> Tensor:
    """``[NEW, V]``: of the targets' rows, from transformers alone."""
    return model.model(document.tokens[None]).logits[0, document.first_target - 1 : -1].log_softmax(-1)


def sequence_logprob(model: CausalLM, document: Document) -> Tensor:
    labels = document.tokens[document.first_target :]
    return logprobs(model, document).gather(1, labels[:, None]).sum()
