"""How roll-outs are drawn: from which part of a distribution, until when, and by which numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_trainer.errors import fail


@dataclass(frozen=True)
class Sampling:
    """What a token is drawn from: a model's distribution, tempered and then cut, as :func:`kd_kernels.sample` does it.

    Args:
        temperature: 0 takes the likeliest id; infinity draws uniformly from what the filters leave.
        top_k: the ids of the k largest logits, or None.
        top_p: the shortest prefix of the ids by falling probability whose mass reaches top_p, or None.
        min_p: the ids at least min_p times as likely as the likeliest, or None.

    Raises:
        ValueError: a number is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            fail("Sampling", "temperature", "at least 0", self.temperature)
        if self.top_k is not None and self.top_k < 1:
            fail("Sampling", "top_k", "at least 1", self.top_k, "None keeps all")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                fail("Sampling", name, "in 0..1", value)

    def arguments(self, prefix: str = "") -> dict[str, float | int | None]:
        """The fields as keyword arguments, their names with a prefix."""
        return {prefix + name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}


@dataclass(frozen=True)
class Options:
    """When sequences end, and what is returned of them.

    Args:
        max_new_tokens: most tokens of a completion, or None.
        max_length: most tokens of prompt and completion together, or None. One of the two must be given.
        min_new_tokens: a stop id is impossible before the completion has so many tokens.
        stop_ids: ids that end a completion, as its last token.
        sampling: what tokens are drawn from.
        entropy: return the entropy of the model's own distribution at every token.
        batch_size: sequences that are generated together, those of nearly one length; None: all. Which sequences share
            a batch does not change what is drawn.

    Raises:
        ValueError: a number is out of range, or nothing bounds the length.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    entropy: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        where = "Options"
        if self.max_new_tokens is None and self.max_length is None:
            fail(where, "max_new_tokens or max_length", "given", None)
        for name in ("max_new_tokens", "max_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                fail(where, name, "at least 1", value)
        most = min(x for x in (self.max_new_tokens, self.max_length) if x is not None)
        if not 0 <= self.min_new_tokens <= most:
            fail(where, "min_new_tokens", f"in 0..{most}, the largest length", self.min_new_tokens)

    def budgets(self, where: str, prompts: Sequence[Tensor]) -> list[int]:
        """How many tokens may follow each prompt.

        Raises:
            ValueError: none, or fewer than ``min_new_tokens``.
        """
        least = max(1, self.min_new_tokens)
        budgets = []
        for i, prompt in enumerate(prompts):
            limits = [self.max_new_tokens, None if self.max_length is None else self.max_length - len(prompt)]
            budgets.append(min(limit for limit in limits if limit is not None))
            if budgets[-1] < least:
                fail(
                    where, "max_length", f"at least {len(prompt) + least} for prompt {i} of {len(prompt)} tokens",
                    self.max_length, "raise it, or shorten the prompts",
                )
        return budgets


def check_ids(where: str, what: str, ids: Sequence[int], vocab: int) -> None:
    """Raise unless all of the ids are a model's."""
    for token in ids:
        if not 0 <= token < vocab:
            fail(where, what, f"below the model's vocabulary of {vocab}", token)


def check_prompts(where: str, prompts: Sequence[Tensor], vocab: int) -> list[Tensor]:
    """Prompts as int64 ``[L]`` on the CPU.

    Raises:
        ValueError: there is none, one has no tokens or another shape, or an id is not the model's.
    """
    if len(prompts) == 0:
        fail(where, "prompts", "at least one", "none")
    checked = []
    for i, prompt in enumerate(prompts):
        prompt = torch.as_tensor(prompt)
        if prompt.dim() != 1 or prompt.is_floating_point():
            fail(where, f"prompts[{i}]", "token ids of shape [L]", f"{prompt.dtype} {list(prompt.shape)}")
        if len(prompt) == 0:
            fail(where, f"prompts[{i}]", "of at least one token", 0, "begin with the model's BOS token")
        checked.append(prompt.long().cpu())
        check_ids(where, f"token ids of prompts[{i}]", [int(checked[-1].min()), int(checked[-1].max())], vocab)
    return checked


def check_keys(where: str, keys: Tensor | None, prompts: Sequence[Tensor]) -> Tensor:
    """Keys as int64 ``[B]`` on the CPU; those of :func:`sequence_keys` where none are given."""
    if keys is None:
        return sequence_keys(prompts)
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64 or keys.shape != (len(prompts),):
        got = f"{keys.dtype} {list(keys.shape)}" if isinstance(keys, Tensor) else type(keys).__name__
        fail(where, "keys", f"int64 of shape [B={len(prompts)}], one a prompt", got)
    return keys.cpu()


def sequence_keys(prompts: Sequence[Tensor]) -> Tensor:
    """int64 ``[B]``: names for sequences that depend on a prompt's tokens and on how many equal prompts precede it.

    So a sequence keeps its key, and with it its draws, in any batch and on any process, and several sequences from one
    prompt differ.
    """
    seen: dict[bytes, int] = {}
    keys = []
    for prompt in prompts:
        content = prompt.long().cpu().numpy().tobytes()
        seen[content] = seen.get(content, -1) + 1
        keys.append(_hash64(content, seen[content].to_bytes(8, "little")))
    return torch.tensor(keys, dtype=torch.int64)


def step_seed(seed: int, step: int, purpose: str = "roll-out") -> int:
    """63 bits for the draws of one step and one purpose: another step, purpose or run's seed shares no draws."""
    return _hash64(b"step", f"{seed}/{step}/{purpose}".encode()) & (2**63 - 1)


def sequence_generator(seed: int, key: int) -> torch.Generator:
    """A generator on the CPU for choices about one sequence that no draw of tokens is."""
    return torch.Generator().manual_seed(sequence_seed(seed, key) % 2**32)  # of a seed, it looks at 32 bits alone


def sequence_seed(seed: int, key: int) -> int:
    """One seed out of a seed and a key, 0..2^63-1: for generators that know no keys."""
    return _hash64(b"sequence", f"{seed}/{key}".encode()) & (2**63 - 1)


def _hash64(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little", signed=True)
