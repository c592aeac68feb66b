"""What a backend of ``topk_targets`` returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

INFINITE, NOT_A_NUMBER = -1, -2
"""Instead of a number of entries: what is wrong with a row. As in csrc/cpu/topk.h."""


class Truncated(NamedTuple):
    """The k largest logits of N rows, as rectangles of which the first ``counts[i]`` entries of row i are written.

    A row with 0 entries is -inf throughout; a negative count says what else is wrong with a row.
    """

    counts: Tensor  # int64 [N]
    ids: Tensor  # int64 [N, k], by falling logit, the lower id first
    logprobs: Tensor  # work dtype [N, k]
    tail_logprob: Tensor  # work dtype [N]
    log_z: Tensor  # work dtype [N, temperatures]
