"""The distillation loss: from hidden states, logits or cached targets to a loss and its gradient."""

from kd_kernels.loss.api import KDLoss, kd_loss

__all__ = ["KDLoss", "kd_loss"]
