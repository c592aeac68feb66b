"""Flips and churn of items and of tokens."""

from __future__ import annotations

import pytest
import torch

from kd_trainer.config import DataConfig
from kd_trainer.data import load_documents
from kd_trainer.diagnostics.flips import flips, token_flips
from kd_trainer.models import CausalLM, load_pretrained, load_tokenizer


def test_items():
    found = flips([True, True, False, False, True], [True, False, True, False, False])
    assert (found.old_accuracy, found.new_accuracy) == (0.6, 0.4)
    assert (found.negative, found.positive, found.churn) == (0.4, 0.2, pytest.approx(0.6))
    with pytest.raises(ValueError, match="as long as each other, and not empty, got 0 and 0"):
        flips([], [])
    with pytest.raises(ValueError, match="got 1 and 2"):
        flips([True], [True, False])


def test_tokens(tiny, text):
    old = CausalLM(load_pretrained(str(tiny)))
    new = load_pretrained(str(tiny))
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    new = CausalLM(new)
    documents = load_documents(DataConfig(source=str(text), max_length=32, limit=9), load_tokenizer(str(tiny)))
    same = token_flips(old, old, documents)
    assert same.churn == same.negative == same.positive == 0.0
    found = token_flips(old, new, documents, batch_tokens=64)
    firsts = {"old": [], "new": []}
    for document in documents:
        for name, model in (("old", old), ("new", new)):
            firsts[name].append(model.model(document.tokens[None], use_cache=False).logits[0, :-1].argmax(-1))
    a, b = (torch.cat(firsts[name]) for name in ("old", "new"))
    labels = torch.cat([document.tokens[1:] for document in documents])
    assert found.items == len(labels)
    assert found.churn == pytest.approx(float((a != b).double().mean())) and found.churn > 0
    assert found.negative == pytest.approx(float(((a == labels) & (b != labels)).double().mean()))
    assert found.new_accuracy == pytest.approx(float((b == labels).double().mean()))
