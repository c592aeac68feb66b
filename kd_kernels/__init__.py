"""kd-kernels: distil language models from hidden states to loss and gradient, without the logits.

``kd_loss`` is the loss, ``topk_targets`` extracts a sparse teacher, ``token_stats`` says what a model makes of given
tokens, ``sample`` draws tokens from it, ``sampled_targets`` a sparse teacher, ``accept_or_resample`` replaces a
student's tokens that a teacher does not accept. ``LinearLogits``, ``SparseTargets`` and ``EnsembleLogits`` stand for
logits, ``divergences`` holds the formulas, ``kd_kernels.cache`` the file format.
"""

from kd_kernels import divergences
from kd_kernels.divergences import Divergence
from kd_kernels.logits import EnsembleLogits, LinearLogits, SparseTargets
from kd_kernels.loss import KDLoss, kd_loss
from kd_kernels.sampling import Accepted, Sampled, accept_or_resample, sample, sampled_targets
from kd_kernels.stats import TokenStats, token_stats
from kd_kernels.targets import topk_targets

__version__ = "0.1.0"

__all__ = [
    "Accepted", "Divergence", "EnsembleLogits", "KDLoss", "LinearLogits", "Sampled", "SparseTargets", "TokenStats",
    "accept_or_resample", "divergences", "kd_loss", "sample", "sampled_targets", "token_stats", "topk_targets",
]
