"""kd-kernels: distil language models from hidden states to loss and gradient, without the logits.

``kd_loss`` is the loss, ``topk_targets`` extracts a sparse teacher, ``token_stats`` says what a model makes of given tokens,
``sample`` draws tokens from it, ``LinearLogits``, ``SparseTargets`` and ``EnsembleLogits`` stand for logits, ``divergences``
holds the formulas, ``kd_kernels.cache`` the file format.
"""

from kd_kernels import divergences
from kd_kernels.divergences import Divergence
from kd_kernels.logits import EnsembleLogits, LinearLogits, SparseTargets
from kd_kernels.loss import KDLoss, kd_loss
from kd_kernels.sampling import Sampled, sample
from kd_kernels.stats import TokenStats, token_stats
from kd_kernels.targets import topk_targets

__version__ = "0.1.0"

__all__ = [
    "Divergence", "EnsembleLogits", "KDLoss", "LinearLogits", "Sampled", "SparseTargets", "TokenStats",
    "divergences", "kd_loss", "sample", "token_stats", "topk_targets",
]
