"""Distillation as a LightningModule, with any two transformers models that share a tokenizer.

Run: pip install ".[integrations]"; python examples/lightning_module.py [STUDENT TEACHER]
"""

import sys

import lightning
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from kd_trainer.integrations.attach import attach, inspected
from kd_trainer.integrations.hf import KDOptions, targets_of
from kd_trainer.integrations.versions import check_versions

check_versions("lightning_module", "lightning", "transformers", "accelerate")


class Distillation(lightning.LightningModule):
    """The student's own forward, given labels, returns the distillation loss."""

    def __init__(self, student, teacher, options=KDOptions("jsd(beta=0.5)", temperature=1.0)):
        super().__init__()
        self.student = student
        found = inspected(student, options.valid_vocab)
        attach(found, targets_of(found, student, teacher, None, options, None), options)

    def training_step(self, batch):
        loss = self.student(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=1e-3)


if __name__ == "__main__":
    torch.manual_seed(0)
    tiny = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    names = sys.argv[1:3] or [None, None]
    configs = [LlamaConfig(**tiny) if name is None else AutoConfig.from_pretrained(name) for name in names]
    load = lambda name, config: (  # noqa: E731
        AutoModelForCausalLM.from_config(config) if name is None else AutoModelForCausalLM.from_pretrained(name)
    )
    student, teacher = (load(name, config) for name, config in zip(names, configs))
    data = torch.utils.data.DataLoader(torch.randint(512, (64, 32)), batch_size=8)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", **quiet)
    trainer.fit(Distillation(student, teacher), data)
    print(f"loss {trainer.callback_metrics['loss']:.4f} after {trainer.global_step} steps")
