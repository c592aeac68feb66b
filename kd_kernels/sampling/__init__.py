"""Draws of tokens that depend on nothing but the contract (``DRAWS.md``)."""

from kd_kernels.sampling.accept import Accepted, accept_or_resample
from kd_kernels.sampling.api import Sampled, sample
from kd_kernels.sampling.targets import sampled_targets

__all__ = ["Accepted", "Sampled", "accept_or_resample", "sample", "sampled_targets"]
