"""transformers' Trainer as it distils without help: the contender of bench.integrations and bench.convergence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer


class DenseKL(Trainer):
    """What people write for lack of better: forward KL of two matrices of logits."""

    def __init__(self, *args, teacher: nn.Module, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        student = model(**inputs).logits[:, :-1].log_softmax(-1)
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits[:, :-1].log_softmax(-1)
        rows = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        return (rows * (labels != -100)).sum() / num_items_in_batch
