"""The demo's teacher, where its package is installed: that it is the model it claims to be."""

from __future__ import annotations

import torch

from kd_kernels import kd_loss
from kd_trainer import assets
from kd_trainer.config import DataConfig
from kd_trainer.data import Text, collate, tokenize
from kd_trainer.models import CausalLM, cut_layers, load_pretrained, load_tokenizer, vocab_of
from transformers_fixtures import NEEDS_SMOLLM2

pytestmark = NEEDS_SMOLLM2
TEXT = (
    "Photosynthesis is the process by which green plants and certain other organisms transform light energy into "
    "chemical energy. During photosynthesis in green plants, light energy is captured and used to convert water, "
    "carbon dioxide, and minerals into oxygen and energy-rich organic compounds."
)


@torch.no_grad()
def test_smollm2_predicts_english_and_its_cut_copy_does_not():
    tokenizer = load_tokenizer(assets.SMOLLM2)
    model = load_pretrained(assets.SMOLLM2)
    assert vocab_of(tokenizer) == model.config.vocab_size == 49_152 and model.config.num_hidden_layers == 30
    assert "quantization_config" not in model.config.to_dict()
    batch = collate(tokenize([Text(TEXT)], tokenizer, DataConfig(source="-", max_length=128)), 128)
    teacher, student = CausalLM(model), CausalLM(cut_layers(model, (0, 15, 29)))
    result = kd_loss(
        student(batch), teacher(batch), labels=batch.labels,
        stats=("label_logprob", "teacher_label_logprob", "divergence"),
    )
    assert -result.stats["teacher_label_logprob"].mean() < 3.0
    assert -result.stats["label_logprob"].mean() > 6.0 and result.stats["divergence"].mean() > 3.0
