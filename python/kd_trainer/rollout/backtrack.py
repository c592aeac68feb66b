"""Texts with a backspace: a token that deletes the one before it, in what is read and in what is written.

A sequence of actions is what was written, backspaces and deleted tokens included. What a model sees at any point is
the text that is left by then. So a token attends to the tokens that were left when it was written, at its place in the
text that they make; after a backspace the model is where it was before the deleted token, and its state there is the
state that it had: nothing is read again, and one pass gives the states of a whole sequence of actions.

Source: Cundy and Ermon 2024, "SequenceMatch: Imitation Learning for Autoregressive Sequence Modelling with
Backtracking", arXiv 2306.05426, which masks what was deleted in one pass, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_trainer.data import Document
from kd_trainer.models import CausalLM
from kd_trainer.rollout.decoder import Decoder, check_decoding, evaluating
from kd_trainer.rollout.generate import Record, draw, fail_logits, in_batches, without
from kd_trainer.rollout.options import Options, check_ids, check_keys, check_prompts, sequence_generator
from kd_trainer.rollout.result import RollOuts


@dataclass(frozen=True, eq=False)
class Trail:
    """How a model reads L actions.

    Attributes:
        position: int64 ``[L]``: a token's place in the text that is left when it is written. Of a backspace 0.
        sees: bool ``[L, L]``: what a token attends to. A backspace sees itself alone, and nothing sees it.
        state: int64 ``[L]``: the action whose hidden state is the model's after so many actions.
    """

    position: Tensor
    sees: Tensor
    state: Tensor


def trail(actions: Tensor, backspace: int, first: int) -> Trail:
    """Follow actions, int64 ``[L]``. The first ``first`` are a prompt, which nothing is deleted from."""
    left: list[int] = []
    position, state = torch.zeros_like(actions), torch.zeros_like(actions)
    sees = torch.eye(len(actions), dtype=torch.bool)
    for i, action in enumerate(actions.tolist()):
        if action == backspace and i >= first:
            del left[max(first, len(left) - 1) :]
        else:
            position[i] = len(left)
            left.append(i)
            sees[i, left] = True
        state[i] = left[-1]
    return Trail(position, sees, state)


def text_left(actions: Tensor, backspace: int, first: int) -> Tensor:
    """The text that actions leave: int64, no longer than they are."""
    followed = trail(actions, backspace, first)
    return actions[followed.sees[followed.state[-1]]]


def mistaken(
    document: Document, rate: float, backspace: int, vocab: int, *, never: Sequence[int] = (), seed: int, key: int
) -> Document:
    """A text in which, before each target with probability ``rate``, somebody wrote another token and took it back.

    The other token is drawn evenly from the vocabulary, without the target, the backspace and ``never``. It is read and
    not learned from (its label is -100); the backspace after it is. Draws are a function of ``seed`` and ``key``.
    """
    tokens, generator = document.tokens.tolist(), sequence_generator(seed, key)
    counted = [False, *document.counted.tolist()]
    actions, labels = [], []
    coins = torch.rand(len(tokens), generator=generator)
    never = {backspace, *never}
    others = torch.randint(vocab - len(never) - 1, (len(tokens),), generator=generator)
    for i, token in enumerate(tokens):
        if i >= document.first_target and coins[i] < rate:
            other = int(others[i])
            for taken in sorted({token, *never}):
                other += other >= taken
            actions += [other, backspace]
            labels += [-100, backspace if counted[i] else -100]
        actions.append(token)
        labels.append(token if counted[i] else -100)
    return Document(torch.tensor(actions), document.first_target, torch.tensor(labels[1:]), document.tag)


def backtrack(
    model: CausalLM, prompts: Sequence[Tensor], options: Options, *, backspace: int, seed: int,
    keys: Tensor | None = None,
) -> RollOuts:
    """Completions as :func:`kd_trainer.rollout.generate` draws them, of a model that can delete what it wrote.

    Completions are actions, backspaces and deleted tokens included; lengths and budgets count them. A backspace where
    nothing of the completion is left is drawn and does nothing. Without one the result is that of ``generate``.

    Raises:
        ValueError: as ``generate`` does; a ``backspace`` that is not the model's, or ends sequences.

    Cost: that of ``generate``, and the states of the text that is left, ``[B, longest, H]``.
    """
    where = "backtrack"
    prompts = check_prompts(where, prompts, model.vocab)
    check_ids(where, "backspace", [backspace], model.vocab)
    check_ids(where, "stop_ids", options.stop_ids, model.vocab)
    keys, budgets = check_keys(where, keys, prompts), options.budgets(where, prompts)
    check_decoding(where, model)

    def part(members: list[int]) -> RollOuts:
        chosen, limits = [prompts[i] for i in members], [budgets[i] for i in members]
        return _backtrack(where, model, chosen, limits, keys[members], options, backspace, seed)

    with evaluating(model):
        return in_batches(part, prompts, options.batch_size)


def _backtrack(
    where: str, model: CausalLM, prompts: list[Tensor], budgets: list[int], keys: Tensor, options: Options,
    backspace: int, seed: int,
) -> RollOuts:
    """One batch."""
    count, steps = len(prompts), max(budgets)
    decoder = Decoder(where, model, count, max(len(prompt) + budget for prompt, budget in zip(prompts, budgets)))
    rows = torch.arange(count)  # the sequence that each row of the decoder writes
    record = Record(count, model.device)
    ends: list[tuple[int, str] | None] = [None] * count
    keys, positions = keys.to(model.device), torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    last = decoder.feed_prompts(prompts)[:, -1]
    states = last.new_zeros(count, steps + 1, last.shape[1])  # after the prompt, and after each token that is left
    states[:, 0] = last
    left = torch.zeros(count, dtype=torch.int64)  # tokens of the completion
    for step in range(steps):
        own = model.logits_of(states[torch.arange(len(rows)), left])
        allowed = without(own, options.stop_ids if step < options.min_new_tokens else ())
        drawn = draw(allowed, options.sampling, seed, keys, positions + step, own=own, entropy=options.entropy)
        record.write(rows.tolist(), drawn)
        ids = drawn.ids.cpu()
        for i, token in zip(rows.tolist(), ids.tolist()):
            if token < 0:
                fail_logits(where, i, len(prompts[i]) + step)
            if token in options.stop_ids or step + 1 == budgets[i]:
                ends[i] = step + 1, "stop" if token in options.stop_ids else "length"
        going = torch.tensor([ends[i] is None for i in rows.tolist()])
        if not going.any():
            break
        if not going.all():
            decoder.keep(going.nonzero()[:, 0].tolist())
            there = going.to(model.device)
            keys, positions, states = keys[there], positions[there], states[there]
            rows, left, ids = rows[going], left[going], ids[going]
        # Every row is fed its token; those that took one back forget it again, and the one that it deletes.
        last = decoder.feed(ids[:, None].to(model.device))[:, -1]
        back = ids == backspace
        if back.any():
            decoder.drop_last(back * (1 + (left > 0)))
        left = torch.where(back, (left - 1).clamp(min=0), left + 1)
        forward = (~back).nonzero()[:, 0]
        states[forward, left[forward]] = last[forward.to(model.device)]
    return record.result(prompts, [end for end in ends if end is not None])
