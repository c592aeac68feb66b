"""Draws of tokens that depend on nothing but the contract (``DRAWS.md``)."""

from kd_kernels.sampling.api import Sampled, sample

__all__ = ["Sampled", "sample"]
