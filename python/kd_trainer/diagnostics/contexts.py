"""Texts that models write on from the prompts of a data set: the contexts that a student meets when it is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kd_trainer.data import Document
from kd_trainer.errors import fail
from kd_trainer.models import CausalLM
from kd_trainer.rollout import Options, generate
from kd_trainer.tokens import prompt_length


def prompts_in(where: str, documents: Sequence[Document], prompt_tokens: int | None = None) -> list[torch.Tensor]:
    """The tokens before the first one that counts; of a text without a prompt its first ``prompt_tokens``.

    Raises:
        ValueError: a text without a prompt, or none longer than it, and no number of tokens to take for one.
    """
    prompts = []
    for document in documents:
        if prompt_tokens is None and prompt_length(document, None) == 1:
            fail(
                where, "prompt_tokens", "given for texts without a prompt", None,
                "give it, or texts with a prompt and a completion",
            )
        prompts.append(document.tokens[: prompt_length(document, prompt_tokens)])
    if not prompts:
        fail(where, "documents", "at least one", "none")
    return prompts


def written(
    model: CausalLM, prompts: Sequence[torch.Tensor], options: Options, *, seed: int, samples: int = 1
) -> list[Document]:
    """``samples`` continuations of each prompt, those of one prompt together; the targets are what was written."""
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    return generate(model, repeated, options, seed=seed).documents()
