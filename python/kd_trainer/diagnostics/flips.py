"""What an update changed: negative flips and churn.

negative flip   an item that the old model had right and the new one has wrong
                (Yan et al. 2021, "Positive-Congruent Training", arXiv 2011.09161; as MUSCLE reports them, arXiv
                2407.09435)
churn           a row where the likeliest token of the two models differs (Jiang et al. 2021, arXiv 2106.02654)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kd_kernels import token_stats
from kd_trainer.data import Document
from kd_trainer.errors import fail
from kd_trainer.evaluate import batches_by_length
from kd_trainer.models import CausalLM


@dataclass(frozen=True)
class Flips:
    """Shares of all items; ``negative - positive`` is the loss of accuracy."""

    items: int
    old_accuracy: float
    new_accuracy: float
    negative: float
    positive: float
    churn: float

    def table(self) -> str:
        """For people."""
        rows = {
            "accuracy of the old model": self.old_accuracy, "accuracy of the new model": self.new_accuracy,
            "negative flips": self.negative, "positive flips": self.positive, "churn": self.churn,
        }
        width = max(map(len, rows))
        lines = [f"{name.ljust(width)}  {100 * share:.2f}%" for name, share in rows.items()]
        return "\n".join([*lines, f"of {self.items:,} items"])


def flips(old_right: Sequence[bool], new_right: Sequence[bool]) -> Flips:
    """Of items that two models answered; churn counts items of which one model had the answer right and the other
    not."""
    if len(old_right) != len(new_right) or not len(old_right):
        fail(
            "flips", "old_right and new_right", "as long as each other, and not empty",
            f"{len(old_right)} and {len(new_right)}",
        )
    pairs = list(zip(map(bool, old_right), map(bool, new_right)))
    share = lambda which: sum(map(which, pairs)) / len(pairs)  # noqa: E731
    return Flips(
        len(pairs), share(lambda pair: pair[0]), share(lambda pair: pair[1]),
        share(lambda pair: pair[0] and not pair[1]),
        share(lambda pair: pair[1] and not pair[0]), share(lambda pair: pair[0] != pair[1]),
    )


@torch.no_grad()
def token_flips(old: CausalLM, new: CausalLM, documents: Sequence[Document], *, batch_tokens: int = 2048) -> Flips:
    """Of the next token at every row that counts; right is the label in the first place. Churn compares the first
    places."""
    if old.vocab != new.vocab:
        fail("token_flips", "the new model's vocabulary", f"the old one's {old.vocab}", new.vocab)
    first: dict[str, list[torch.Tensor]] = {"old": [], "new": []}
    labels = []
    for batch in batches_by_length(documents, batch_tokens):
        labels.append(batch.labels[batch.counted])
        for name, model in (("old", old), ("new", new)):
            rows = batch.to(model.device)
            logits = model.logits_of(model.hidden(rows)[rows.counted])
            first[name].append(token_stats(logits, rows.labels[rows.counted]).argmax.cpu())
    wanted, (a, b) = torch.cat(labels), (torch.cat(first[name]) for name in ("old", "new"))
    found = flips((a == wanted).tolist(), (b == wanted).tolist())
    return Flips(
        found.items, found.old_accuracy, found.new_accuracy, found.negative, found.positive,
        float((a != b).double().mean()),
    )
