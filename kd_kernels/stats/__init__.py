"""What a model says about given tokens."""

from kd_kernels.stats.api import TokenStats, token_stats

__all__ = ["TokenStats", "token_stats"]
