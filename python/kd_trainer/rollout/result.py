"""What roll-outs return, and the ways into and out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_trainer.data import Document
from kd_trainer.errors import check_one_of, fail

SIDES = ("left", "right")


@dataclass(frozen=True, eq=False)
class RollOuts:
    """B sequences, in the order of their prompts, on the CPU. Sequence i has a completion of n_i >= 1 tokens.

    Attributes:
        prompts: int64 ``[L_i]`` each.
        completions: int64 ``[n_i]`` each; a stop id that ended one is its last token.
        finish_reasons: "stop" after a stop id, "length" at the largest length.
        logprobs: fp32 (fp64 of a model in fp64) ``[n_i]`` each, nats: of every token under the distribution that it was
            drawn from. None where an external engine does not say.
        model_logprobs: likewise under the model's own distribution: temperature 1, no filter. None likewise.
        entropies: likewise, of the model's own distribution; None unless ``Options.entropy``.
    """

    prompts: tuple[Tensor, ...]
    completions: tuple[Tensor, ...]
    finish_reasons: tuple[str, ...]
    logprobs: tuple[Tensor, ...] | None
    model_logprobs: tuple[Tensor, ...] | None
    entropies: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(completion) for completion in self.completions]

    def documents(self) -> list[Document]:
        """Prompt and completion as one document each, whose targets are the completion: what the trainer learns
        from."""
        return [
            Document(torch.cat([prompt, completion]), len(prompt))
            for prompt, completion in zip(self.prompts, self.completions)
        ]

    def padded(self, side: str = "right", pad_id: int = 0) -> tuple[Tensor, Tensor]:
        """``(input_ids, attention_mask)``, int64 ``[B, longest]``: prompts with their completions."""
        return pad([document.tokens for document in self.documents()], side, pad_id)


def pad(sequences: Sequence[Tensor], side: str = "right", pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """``(input_ids, attention_mask)``, int64 ``[B, longest]``, of int64 ``[L_i]`` each; padding is on the ``side``."""
    check_one_of("pad", "side", side, SIDES)
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        begin = width - len(sequence) if side == "left" else 0
        ids[row, begin : begin + len(sequence)] = sequence
        mask[row, begin : begin + len(sequence)] = 1
    return ids, mask


def unpad(input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """The sequences of a batch ``[B, L]`` that is padded on either side: int64 ``[L_i]`` each, on the CPU.

    Raises:
        ValueError: shapes differ, or a row's tokens are not one run.
    """
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        shapes = f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
        fail("unpad", "input_ids and attention_mask", "of one shape [B, L]", shapes)
    input_ids, is_token = input_ids.long().cpu(), attention_mask.cpu() != 0
    for row, edges in enumerate((is_token[:, 1:] & ~is_token[:, :-1]).sum(1) + is_token[:, 0]):
        if edges > 1:
            fail("unpad", f"attention_mask[{row}]", "ones in one run, with padding before or after", "a hole in it")
    return [ids[there] for ids, there in zip(input_ids, is_token)]


def prompts_of(documents: Sequence[Document]) -> list[Tensor]:
    """The prompts of documents: the tokens before their first target."""
    return [document.tokens[: document.first_target] for document in documents]
