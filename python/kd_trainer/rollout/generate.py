"""Sequences that a model writes by itself, and what it makes of written ones."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from kd_kernels import LinearLogits, Sampled, TokenStats, sample, token_stats
from kd_trainer.data import Batch, Document, collate
from kd_trainer.errors import fail
from kd_trainer.models import CausalLM, dense_logits
from kd_trainer.rollout.decoder import Decoder, check_decoding, evaluating
from kd_trainer.rollout.options import Options, Sampling, check_ids, check_keys, check_prompts
from kd_trainer.rollout.result import RollOuts

R = TypeVar("R", bound=RollOuts)

WORTH_DROPPING = 1 / 8
"""Finished rows over rows of a batch from which a copy of the cache without them pays."""


def generate(
    model: CausalLM, prompts: Sequence[Tensor], options: Options, *, seed: int, keys: Tensor | None = None,
) -> RollOuts:
    """Completions of prompts, each token drawn by :func:`kd_kernels.sample` from the last hidden state of its sequence.

    Token t of a completion is drawn at position ``len(prompt) + t`` with the sequence's key. So a sequence's text
    depends on the model, its prompt, the options, ``seed`` and its key, and not on the sequences that it is generated
    with, but for what their padding changes in the rounding of the model's own sums.

    Args:
        model: in any mode, on any device; it is evaluated without dropout and without gradients, under the caller's
            autocast, and its mode is put back.
        prompts: int64 ``[L_i]`` each, at least one token; :func:`unpad` makes them of a padded batch, and
            :func:`prompts_of` of documents.
        seed: 64 bits; :func:`step_seed` makes one for each step of a run.
        keys: int64 ``[B]``, or None for those of :func:`sequence_keys`.

    Returns:
        :class:`RollOuts`, in the order of the prompts.

    Raises:
        ValueError: prompts, options, ids and keys do not fit together or the model; the model has no cache of keys and
            values; a row of logits is NaN, +inf, or -inf alone.

    Cost: the head multiplies one hidden state a sequence and step, 2 H V operations. The cache takes B * longest *
    bytes of a token's keys and values, and half of that in addition while it grows. Waits for the device once a step.
    """
    where = "generate"
    prompts = check_prompts(where, prompts, model.vocab)
    check_ids(where, "stop_ids", options.stop_ids, model.vocab)
    keys, budgets = check_keys(where, keys, prompts), options.budgets(where, prompts)
    check_decoding(where, model)

    def part(members: list[int]) -> RollOuts:
        chosen, limits = [prompts[i] for i in members], [budgets[i] for i in members]
        return _generate(where, model, chosen, limits, keys[members], options, seed)

    with evaluating(model):
        return in_batches(part, prompts, options.batch_size)


def _generate(
    where: str, model: CausalLM, prompts: list[Tensor], budgets: list[int], keys: Tensor, options: Options, seed: int,
) -> RollOuts:
    """One batch."""
    count, steps = len(prompts), max(budgets)
    decoder = Decoder(where, model, count, max(len(prompt) + budget for prompt, budget in zip(prompts, budgets)))
    rows = list(range(count))  # the sequence that each row of the decoder writes
    record = Record(count, model.device)
    ends: list[tuple[int, str] | None] = [None] * count
    keys, positions = keys.to(model.device), torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    hidden = decoder.feed_prompts(prompts)[:, -1]
    for step in range(steps):
        logits = model.logits_of(hidden)
        drawn = draw(
            without(logits, options.stop_ids if step < options.min_new_tokens else ()), options.sampling, seed, keys,
            positions + step, own=logits, entropy=options.entropy,
        )
        record.write(rows, drawn)
        for i, token in zip(rows, drawn.ids.tolist()):
            if token < 0:
                fail_logits(where, i, len(prompts[i]) + step)
            if ends[i] is None and (token in options.stop_ids or step + 1 == budgets[i]):
                ends[i] = step + 1, "stop" if token in options.stop_ids else "length"
        left = [row for row, i in enumerate(rows) if ends[i] is None]
        if not left:
            break
        ids = drawn.ids
        if len(rows) - len(left) >= WORTH_DROPPING * len(rows):
            decoder.keep(left)
            rows, index = [rows[row] for row in left], torch.tensor(left, device=model.device)
            keys, positions, ids = keys[index], positions[index], ids[index]
        hidden = decoder.feed(ids[:, None])[:, -1]
    return record.result(prompts, [end for end in ends if end is not None])


def in_batches(part: Callable[[list[int]], R], prompts: Sequence[Tensor], batch_size: int | None) -> R:
    """The roll-outs of ``part`` over all prompts, batch by batch, each of prompts of nearly one length.

    The longest come first, so that what does not fit into memory fails at once.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = len(order) if batch_size is None else batch_size
    parts = [part(order[begin : begin + size]) for begin in range(0, len(order), size)]
    back = torch.tensor(order).argsort().tolist()
    joined = {}
    for field in dataclasses.fields(parts[0]):
        values = [getattr(rollouts, field.name) for rollouts in parts]
        flat = [] if values[0] is None else [x for value in values for x in value]
        joined[field.name] = None if values[0] is None else tuple(flat[i] for i in back)
    return type(parts[0])(**joined)


# ------------------------------------------------------------------------------------------------------ one step


def without(logits: LinearLogits, ids: Sequence[int], rows: Tensor | None = None) -> Tensor | LinearLogits:
    """``[N, V]`` logits of a few rows with -inf at the ids: in the rows that are True (bool ``[N]``), or in all."""
    if not ids:
        return logits
    gone = torch.zeros(logits.vocab, dtype=torch.bool, device=logits.device).index_fill(
        0, torch.tensor(ids, device=logits.device), True
    )
    return dense_logits(logits).masked_fill(gone if rows is None else gone & rows[:, None], -torch.inf)


def draw(
    logits: Tensor | LinearLogits, sampling: Sampling, seed: int, keys: Tensor, positions: Tensor, *, own: LinearLogits,
    entropy: bool = False,
) -> Sampled:
    """One id a row; -1 where a row is no distribution.

    ``own`` is the model's logits where some ids of ``logits`` are forbidden: model_logprobs and entropy are of those.
    """
    drawn = sample(
        logits, **sampling.arguments(), seed=seed, keys=keys, positions=positions, return_stats=entropy, check="flag",
    )
    if logits is own or bool((drawn.ids < 0).any()):
        return drawn
    stats = token_stats(own, drawn.ids)
    return dataclasses.replace(drawn, model_logprobs=stats.logprob, entropy=stats.entropy if entropy else None)


def fail_logits(where: str, sequence: int, position: int) -> NoReturn:
    fail(
        where, "logits", "free of NaN and +inf, with a finite logit in every row",
        f"none that can be drawn from for sequence {sequence} at position {position}",
        "look for an overflow in the model",
    )


class Record:
    """What was drawn, on the device, until all is finished."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._steps: list[tuple[list[int], Sampled]] = []

    def write(self, rows: list[int], drawn: Sampled) -> None:
        """What the next step drew for some rows."""
        self._steps.append((rows, drawn))

    def _field(self, name: str) -> Tensor | None:
        """``[B, steps]``, 0 where nothing was drawn. Steps of the same rows are written together."""
        first = getattr(self._steps[0][1], name)
        if first is None:
            return None
        values, begin = first.new_zeros(self._rows, len(self._steps)), 0
        for rows, steps in itertools.groupby(self._steps, lambda step: step[0]):
            new = torch.stack([getattr(drawn, name) for _, drawn in steps], 1)
            values[torch.tensor(rows, device=self._device), begin : begin + new.shape[1]] = new
            begin += new.shape[1]
        return values.cpu()

    def result(self, prompts: Sequence[Tensor], ends: Sequence[tuple[int, str]]) -> RollOuts:
        def cut(name: str) -> tuple[Tensor, ...] | None:
            values = self._field(name)
            return None if values is None else tuple(row[:length].clone() for row, (length, _) in zip(values, ends))

        return RollOuts(
            tuple(prompts), cut("ids"), tuple(reason for _, reason in ends), cut("logprobs"), cut("model_logprobs"),
            cut("entropy"),
        )


# ------------------------------------------------------------------------------------------------ written sequences


def score(model: CausalLM, documents: Sequence[Document], *, batch_tokens: int = 4096) -> list[TokenStats]:
    """What a model makes of every target of documents that are there already: one teacher-forced pass.

    For the documents of a roll-out, ``logprob`` is what generation returned as ``model_logprobs``, to rounding. The
    model is evaluated as :func:`generate` does it. Head products are made for targets only.

    Args:
        batch_tokens: about how many tokens are read at a time, padding included.

    Returns:
        :class:`~kd_kernels.TokenStats` of ``[n_i]`` for each document's n_i targets, on the CPU, in the documents'
        order.

    Raises:
        ValueError: a document without targets, or ids outside the model's vocabulary.
    """
    check_documents("score", documents, model.vocab)
    found: dict[int, TokenStats] = {}
    with evaluating(model):
        for members, batch in by_length(documents, batch_tokens):
            batch = batch.to(model.device)
            stats = token_stats(model.logits_of(model.hidden(batch)[batch.counted]), batch.labels[batch.counted])
            fields = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
            counts = [int(documents[i].counted.sum()) for i in members]
            parts = {name: value.cpu().split(counts) for name, value in fields.items() if value is not None}
            found |= {
                i: TokenStats(**{name: part[row] for name, part in parts.items()}) for row, i in enumerate(members)
            }
    return [found[i] for i in range(len(documents))]


def by_length(documents: Sequence[Document], batch_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of documents of nearly one length, a row each, with the documents' indices. The longest come first."""
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    while order:
        size = max(1, batch_tokens // len(documents[order[0]]))
        members, order = order[:size], order[size:]
        yield members, collate([documents[i] for i in members], len(documents[members[0]]), packing=False)


def check_documents(where: str, documents: Sequence[Document], vocab: int) -> None:
    """Raise for a document without a target, or with an id that is not the model's."""
    if not documents:
        fail(where, "documents", "at least one", "none")
    for i, document in enumerate(documents):
        if not bool(document.counted.any()):
            fail(where, f"documents[{i}]", "of at least one target token", "none")
        extremes = [int(document.tokens.min()), int(document.tokens.max())]
        check_ids(where, f"token ids of documents[{i}]", extremes, vocab)
