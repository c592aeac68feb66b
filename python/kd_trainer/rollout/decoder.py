"""A model that reads tokens a few at a time and remembers them: rows of a batch that grow, roll back and leave.

Every row's tokens end at the right edge of the cache, with nothing or padding on their left, which is the layout that
every attention of transformers understands through a mask ``[B, width]``. Rolling a row back leaves a hole in that
mask; holes and padding are squeezed out when they make up a fifth of the cache, and at once where a layer attends to a
window, which counts columns and not tokens.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from kd_trainer.errors import fail
from kd_trainer.models import PROBE_LENGTHS, CausalLM
from kd_trainer.rollout.result import pad

MOST_WASTE = 1.25
"""Columns of a cache over those of its longest row, above which it is squeezed: copying it costs about what one step of
attention over it does."""
GROWTH = 1.5


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in storage with room to spare: a step writes its own columns and copies no others.

    (DynamicLayer joins old and new columns anew in every step.) ``keys`` and ``values`` are views
    ``[B, heads, width, D]`` of storage ``[B, room, heads, D]``, where a token's vectors lie together and rows can be
    gathered at the speed of a copy. Windows of attention are left to the mask, so no column is lost that a roll-back
    may need.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._store([x.new_empty(x.shape[0], 0, x.shape[1], x.shape[3]) for x in (key_states, value_states)], 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the columns ``[B, heads, q, D]`` of q new tokens; return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        begin = self.get_seq_length()
        end = begin + count
        if end > self._room[0].shape[2]:
            self._replace(None, None, room=max(end, min(self._limit, int(GROWTH * end))))
        keys, values = self._room
        keys.narrow(2, begin, count).copy_(key_states)
        values.narrow(2, begin, count).copy_(value_states)
        self.keys, self.values = keys.narrow(2, 0, end), values.narrow(2, 0, end)
        return self.keys, self.values

    def select(self, rows: Tensor | None, columns: Tensor | None) -> None:
        """Keep some rows (int64 ``[M]``), and of row i the columns ``columns[i]`` (int64 ``[M, width]``); None: all."""
        if self.is_initialized:
            width = self.get_seq_length() if columns is None else columns.shape[1]
            self._replace(rows, columns, room=min(self._room[0].shape[2], max(width, int(GROWTH * width))))

    def _replace(self, rows: Tensor | None, columns: Tensor | None, room: int) -> None:
        width, storage = self.get_seq_length(), []
        for old in self._room:
            old = old.transpose(1, 2)
            held = old[:, :width] if rows is None else old[rows, :width]
            if columns is not None:
                flat = columns + width * torch.arange(held.shape[0], device=held.device)[:, None]
                held = held.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, columns.shape)
            new = held.new_empty(held.shape[0], room, *held.shape[2:])
            new[:, : held.shape[1]] = held
            storage.append(new)
        self._store(storage, width if columns is None else columns.shape[1])

    def _store(self, storage: list[Tensor], width: int) -> None:
        """Go on in storage ``[B, room, heads, D]``, of which so many columns are written."""
        self._room = [x.transpose(1, 2) for x in storage]
        self.keys, self.values = (x.narrow(2, 0, width) for x in self._room)


def new_cache(where: str, model: CausalLM, limit: int) -> DynamicCache:
    """transformers' own cache of a model, each of its layers with room for ``limit`` tokens.

    Raises:
        ValueError: a layer keeps something else than keys and values (recurrent states), or the model takes no cache.
    """
    decoder = model.model.get_decoder()
    cache = DynamicCache(config=model.model.config.get_text_config())
    known = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    strange = sorted({type(layer).__name__ for layer in cache.layers} - {kind.__name__ for kind in known})
    if strange or model.model._is_stateful or "past_key_values" not in inspect.signature(decoder.forward).parameters:
        fail(
            where, type(model.model).__name__, "a model with a cache of keys and values, which can be rolled back",
            ", ".join(strange) or "a model that keeps another state", "generate with its own generate()",
        )
    cache.layers = [layer if isinstance(layer, DummyLayer) else GrowingLayer(limit) for layer in cache.layers]
    return cache


class Decoder:
    """A model and its cache: feeds tokens, gives last hidden states. No logits are computed here.

    Args:
        where: the public function, for messages.
        model: in evaluation mode, see :func:`evaluating`. The caller also disables gradients.
        rows: B.
        limit: the most tokens that a row that still matters will hold. Positions stay below it, so that rows which
            are finished and fed on cannot leave a model's table of positions.
    """

    def __init__(self, where: str, model: CausalLM, rows: int, limit: int) -> None:
        self._model = model.model.get_decoder()
        self._cache = new_cache(where, model, limit)
        self._device = model.device
        self._limit = limit
        self._has_window = has_window(model)
        self._width = 0  # columns of the cache
        self._is_token: Tensor | None = None  # bool [B, width]; None: all of them are
        self.lengths = torch.zeros(rows, dtype=torch.int64)

    def feed_prompts(self, prompts: Sequence[Tensor]) -> Tensor:
        """Read one int64 ``[L_i]`` a row; return hidden states ``[B, longest, H]``, those of prompts at the right."""
        ids, mask = pad(prompts, "left", int(prompts[0][0]))
        return self.feed(ids.to(self._device), mask)

    def feed(self, ids: Tensor, is_token: Tensor | None = None) -> Tensor:
        """Read int64 ``[B, q]`` and return last hidden states ``[B, q, H]``.

        Args:
            is_token: ``[B, q]`` on the CPU: 0 where there is padding, which nothing attends to. None: tokens only.
        """
        count = ids.shape[1]
        if is_token is not None and is_token.all():
            is_token = None
        if is_token is not None:
            self._mark_columns()
        if self._is_token is None:  # attention is faster without a mask
            places = torch.arange(self._width, self._width + count, device=self._device).expand(ids.shape)
            added = count
        else:
            new = torch.ones(ids.shape, dtype=torch.bool) if is_token is None else is_token.bool()
            places = (self.lengths[:, None] + new.cumsum(1) - 1).to(self._device)
            self._is_token = torch.cat([self._is_token, new.to(self._device)], 1)
            added = new.sum(1)
        self._width += count
        self.lengths = self.lengths + added
        # Small operations cost less than without gradients alone. But what hooks gather from other processes must stay
        # an ordinary tensor.
        with torch.no_grad() if torch.distributed.is_initialized() else torch.inference_mode():
            output = self._model(
                input_ids=ids, attention_mask=None if self._is_token is None else self._is_token.long(),
                position_ids=places.clamp(0, self._limit - 1), past_key_values=self._cache, use_cache=True,
            )
        return output.last_hidden_state

    def drop_last(self, counts: Tensor) -> None:
        """Forget the last ``counts[i]`` tokens (int64 ``[B]``, on the CPU) of row i: those that were fed last."""
        common = int(counts.min())
        if common:
            self._cache.crop(-common)
            self._width -= common
            if self._is_token is not None:
                self._is_token = self._is_token[:, : self._width]
        self.lengths = self.lengths - counts
        ragged = counts - common
        if ragged.any():
            column = torch.arange(self._width)
            self._mark_columns()
            self._is_token &= (column < self._width - ragged[:, None]).to(self._device)
            self._squeeze(None, at_once=self._has_window)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows, in the given order."""
        self.lengths = self.lengths[rows]
        index = torch.tensor(rows, device=self._device)
        if self._is_token is not None:
            self._is_token = self._is_token[index]
        self._squeeze(index, at_once=False)

    def _mark_columns(self) -> None:
        """From now on, some columns hold no token."""
        if self._is_token is None:
            self._is_token = torch.ones(len(self.lengths), self._width, dtype=torch.bool, device=self._device)

    def _squeeze(self, rows: Tensor | None, at_once: bool) -> None:
        """Make the selection of rows true in the cache, and push every row's tokens together if that is worth it."""
        longest = int(self.lengths.max())
        columns = None
        if self._is_token is not None and (at_once or self._width > MOST_WASTE * longest):
            holes_first = self._is_token.to(torch.uint8).argsort(dim=1, stable=True)
            columns = holes_first[:, self._width - longest :]
            self._is_token = self._is_token.gather(1, columns)
            self._width = longest
        if rows is not None or columns is not None:
            for layer in self._cache.layers:
                if isinstance(layer, GrowingLayer):
                    layer.select(rows, columns)
        if bool((self.lengths == self._width).all()):
            self._is_token = None


def has_window(model: CausalLM) -> bool:
    """Whether a layer attends to the last tokens only."""
    cache = DynamicCache(config=model.model.config.get_text_config())
    return any(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no gradient checkpointing) and no gradients; every module's mode is put back.

    Under autocast the cache of rounded weights is emptied at the end: entries made without gradients would otherwise
    serve the next training step, and cut its gradient off.
    """
    training = [module for model in models for module in model.modules() if module.training]
    if training:
        for model in models:
            model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        torch.clear_autocast_cache()


_checked: weakref.WeakSet[CausalLM] = weakref.WeakSet()


def check_decoding(where: str, model: CausalLM) -> None:
    """Raise where a model that reads in pieces, padded and rolled back, does not see what it sees in one piece.

    Nothing about an architecture is taken on trust, see :class:`~kd_trainer.models.CausalLM`. Looked at once a model.

    Raises:
        ValueError: hidden states differ, or the model has no cache that can be rolled back.
    """
    if model in _checked:
        return
    texts = [torch.arange(n + 3) * 7 % model.vocab for n in PROBE_LENGTHS]

    def piece(*offsets: int) -> Tensor:
        return torch.stack([text[[n + o for o in offsets]] for text, n in zip(texts, PROBE_LENGTHS)])

    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        decoder = Decoder(where, model, len(texts), max(map(len, texts)))
        decoder.feed_prompts([text[:n] for text, n in zip(texts, PROBE_LENGTHS)])
        decoder.feed(piece(0, 1).to(model.device))
        decoder.drop_last(torch.tensor([0, 1]))
        found = decoder.feed(torch.stack([piece(2)[0], piece(1)[1]]).to(model.device))[:, -1]
        whole = [model.model.get_decoder()(input_ids=text[None].to(model.device), use_cache=False) for text in texts]
    expected = torch.stack([output.last_hidden_state[0, end] for output, end in zip(whole, (-1, -2))])
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= (1e-3 if found.dtype in (torch.float32, torch.float64) else 5e-2):
        fail(
            where, f"the cache of {type(model.model).__name__}", "without effect on what is computed from it",
            f"a relative change of {error:.2g}", "generate with the model's own generate()",
        )
    _checked.add(model)
