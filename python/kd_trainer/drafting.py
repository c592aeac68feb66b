"""Drafts for speculative decoding that read their target's features, in training: all positions of a text at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_trainer.data import Batch
from kd_trainer.models import CausalLM, causal


class Fusion(nn.Linear):
    """What a draft reads at position t: ``W [embedding of token t; feature of t - 1] + b``, H values out of 2 H.

    The feature is the target's last hidden state where the target has been, and the draft's own prediction of it after.
    """

    def __init__(self, width: int) -> None:
        super().__init__(2 * width, width)

    def passes(self, draft: CausalLM, batch: Batch, features: Tensor, count: int) -> Tensor:
        """``[count, N, H]``: the draft's predictions of the target's features at the batch's rows.

        Pass n predicts as the (n + 1)-th token of a draft does: the last n features that it reads are those of the
        passes before it, without gradient, and all earlier ones are the target's. It attends to what came of the same
        ones. The passes lie side by side in one row of ``count * R`` columns, so any model that attends through a mask
        will do.

        Args:
            features: ``[N, H]``, the target's at the same rows.
        """
        with torch.no_grad():
            embeddings = draft.model.get_input_embeddings()(batch.input_ids)
            read = [features]
            for _ in range(count - 1):
                read.append(self._predict(draft, batch, embeddings, read)[-1])
            torch.clear_autocast_cache()  # weights rounded without gradient must not serve the pass that has one
        return self._predict(draft, batch, embeddings, read)

    def _predict(self, draft: CausalLM, batch: Batch, embeddings: Tensor, read: list[Tensor]) -> Tensor:
        """``[len(read), N, H]``, each pass from the features that it reads."""
        after = batch.rows + 1  # the token that a row predicts is read together with that row's feature
        has_feature = (batch.position_ids > 0)[..., None]
        fused = []
        for features in read:
            grid = features.new_zeros(batch.input_ids.numel(), features.shape[1]).index_copy(0, after, features)
            fused.append(self(torch.cat([embeddings, grid.view_as(embeddings) * has_feature], -1)))
        positions = batch.position_ids.repeat(1, len(read))
        found = draft.states(sees(batch.position_ids, len(read)), positions, inputs_embeds=torch.cat(fused, 1))
        return torch.stack([part.flatten(0, 1)[batch.rows] for part in found.chunk(len(read), 1)])


def sees(position_ids: Tensor, passes: int) -> Tensor:
    """bool ``[B, passes R, passes R]``: pass j at column i attends to columns up to i - j of pass 0, and to one of each
    later pass, column i - j + k of pass k, up to itself."""
    inside, columns = causal(position_ids), torch.arange(position_ids.shape[1], device=position_ids.device)
    back = columns[:, None] - columns
    block = lambda j, k: inside & (back >= j if k == 0 else (back == j - k) & (k <= j))  # noqa: E731
    return torch.cat([torch.cat([block(j, k) for k in range(passes)], 2) for j in range(passes)], 1)
