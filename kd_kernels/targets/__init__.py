"""Sparse targets out of dense teachers."""

from kd_kernels.targets.api import topk_targets

__all__ = ["topk_targets"]
