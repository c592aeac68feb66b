"""Accepted length: what a round of speculative decoding yields with a student as the draft of its teacher.

In a round the draft says ``gamma`` tokens, the target reads them in one pass, keeps those before the first that it
would not have said itself, and adds one of its own:

    accepted length = tokens written / rounds,        from 1, where nothing is ever kept, to gamma + 1

which is what GRIFFIN (arXiv 2502.11018) is measured by, as tau; there drafts are trees, here they are chains. Both
models say their likeliest token. What is written is then the target's own text, and a draft matters only while all
before it are that text's words. So the target writes alone, and the drafts that begin at any place of what it wrote are
formed together: the n-th of all in one pass of the draft.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kd_kernels import token_stats
from kd_trainer.checkpoint import OBJECTIVES
from kd_trainer.data import Batch, Document
from kd_trainer.diagnostics.contexts import prompts_in, written
from kd_trainer.drafting import Fusion
from kd_trainer.errors import fail
from kd_trainer.models import CausalLM
from kd_trainer.rollout import Options, Sampling
from kd_trainer.rollout.decoder import evaluating
from kd_trainer.rollout.generate import by_length


@dataclass(frozen=True)
class AcceptedLength:
    """Of one target and one draft.

    Attributes:
        length: tokens a round, those that the target adds included. The last round of a text ends with it.
        kept: of drafts that were tested, the share that was kept: of the first of a round, the second, and so on; None
            where none was tested.
    """

    texts: int
    tokens: int
    rounds: int
    gamma: int
    length: float
    kept: tuple[float | None, ...]

    def table(self) -> str:
        """For people."""
        shares = ", ".join("-" if share is None else f"{100 * share:.1f}%" for share in self.kept)
        return "\n".join([
            f"accepted length {self.length:.2f} tokens a round, of at most {self.gamma + 1}",
            f"kept of the first draft of a round, the second, ...: {shares}",
            f"{self.tokens} tokens in {self.rounds} rounds, {self.texts} texts",
        ])


@torch.no_grad()
def accepted_length(
    target: CausalLM, draft: CausalLM, documents: Sequence[Document], options: Options, *, gamma: int = 5,
    fusion: Fusion | None = None, prompt_tokens: int | None = None, batch_tokens: int = 2048,
) -> AcceptedLength:
    """The accepted length of greedy decoding from the prompts of documents.

    Args:
        options: of the target's texts, but for the sampling, which is greedy.
        gamma: drafts of a round.
        fusion: what the draft reads the target's features through, of a draft that was trained by method griffin; None:
            a draft that reads tokens alone.
        prompt_tokens: of a text without a prompt, so many first tokens are one.

    Raises:
        ValueError: other vocabularies; no prompts; gamma below 1; a draft that needs a mask and does not obey it.

    Cost: the target's roll-outs and one pass over them; of the draft one pass, or with a ``fusion`` gamma, of which the
    last is over gamma texts side by side.
    """
    where = "accepted_length"
    if target.vocab != draft.vocab:
        fail(where, "the draft's vocabulary", f"the target's {target.vocab}", draft.vocab)
    if gamma < 1:
        fail(where, "gamma", "at least 1", gamma)
    if fusion is not None:
        draft.check_masks()
    prompts = prompts_in(where, documents, prompt_tokens)
    greedy = dataclasses.replace(options, sampling=Sampling(temperature=0.0))
    texts = written(target, prompts, greedy, seed=0)
    rounds: list[int] = []
    tested, kept = [0] * gamma, [0] * gamma
    with evaluating(target, draft):
        for members, batch in by_length(texts, batch_tokens):
            right = _right(target, draft, batch.to(draft.device), gamma, fusion)
            for member, part in zip(members, right.split([len(texts[i]) - 1 for i in members], 1)):
                part = part[:, texts[member].first_target - 1 :]
                for begin, count in kept_drafts(part.tolist()):
                    rounds.append(count)
                    for place in range(min(gamma, count + 1, part.shape[1] - begin)):
                        tested[place] += 1
                        kept[place] += place < count
    tokens = sum(len(text) - text.first_target for text in texts)
    shares = tuple(good / all_ if all_ else None for good, all_ in zip(kept, tested))
    return AcceptedLength(len(texts), tokens, len(rounds), gamma, tokens / len(rounds), shares)


def kept_drafts(right: Sequence[Sequence[bool]]) -> list[tuple[int, int]]:
    """The rounds of one text: where each begins, and how many drafts are kept.

    Args:
        right: ``[gamma][n]``: whether the draft that would be a round's (i + 1)-th says the text's token at each place.
    """
    found, place, length = [], 0, len(right[0])
    while place < length:
        count = 0
        while count < len(right) and place + count < length and right[count][place + count]:
            count += 1
        found.append((place, count))
        place += count + 1
    return found


def load_fusion(folder: str | Path) -> Fusion | None:
    """The fusion layer that a training left beside its draft; None where there is none, as of any other student."""
    file = Path(folder) / OBJECTIVES
    found = load_file(file) if file.is_file() else {}
    prefix = "main.fuse."
    weights = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    if not weights:
        return None
    fusion = Fusion(weights["weight"].shape[0])
    fusion.load_state_dict(weights)
    return fusion


def _right(target: CausalLM, draft: CausalLM, batch: Batch, gamma: int, fusion: Fusion | None) -> Tensor:
    """bool ``[gamma, N]`` on the host: whether the n-th draft of a round says the token after each row."""
    next_tokens = batch.input_ids.flatten()[batch.rows + 1]
    says = lambda logits: (token_stats(logits, next_tokens).argmax == next_tokens).cpu()  # noqa: E731
    if fusion is None:
        return says(draft(batch)).expand(gamma, -1)
    if target.device != draft.device:
        target.to(draft.device)
    features = target.hidden(batch).to(draft.head.weight.dtype)
    passes = fusion.to(features).passes(draft, batch, features, gamma)
    return torch.stack([says(draft.logits_of(hidden)) for hidden in passes])
