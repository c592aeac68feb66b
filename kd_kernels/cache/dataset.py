"""Cached sequences for torch's DataLoader, whose worker processes share nothing but the files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_kernels import _check
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.key import content_key
from kd_kernels.cache.reader import CacheReader
from kd_kernels.logits import SparseTargets

__all__ = ["CachedBatch", "CachedCollator", "CachedDataset", "CachedItem"]

IGNORED = -100


class CachedItem(NamedTuple):
    """A sequence of L tokens with the L - 1 rows of its teacher.

    Attributes:
        tokens: int64 ``[L]``.
        targets: L - 1 rows of mass one: see :meth:`CacheReader.targets`.
        counted: bool ``[L - 1]``: the rows that are cached and were asked for.
    """

    tokens: Tensor
    targets: SparseTargets
    counted: Tensor


class CachedDataset(Dataset[CachedItem]):
    """``tokens`` and what the teacher said of them, in the order of ``sequences``; any order, subset and repetition is
    fine.

    Pickles as what it was made of, so it works in the workers of a DataLoader, forked or spawned::

        dataset = CachedDataset(CacheReader(folder), sequences)
        loader = DataLoader(dataset, batch_size=8, shuffle=True, num_workers=2, collate_fn=CachedCollator())
        for batch in loader:
            hidden = model(batch.tokens).last_hidden_state.flatten(0, 1)[batch.rows]
            loss = kd_loss(LinearLogits(hidden, head), batch.targets, labels=batch.labels).loss

    Args:
        reader: the cache.
        sequences: int64 or int32 ``[L]`` each, L >= 2, as they were given to :meth:`CacheWriter.add`.
        layouts: those of packed sequences, one a sequence; None: none has any.
        required: bool ``[L - 1]`` each: the rows that count, which then must be cached. None: whichever are cached.
        check: look every sequence up in the index now, so that what is missing is missed before training (some 20 us
            each).

    Raises:
        CacheError: a sequence is not in the cache.
        ValueError: as many ``layouts`` or ``required`` as ``sequences``, or None; sequences as in :func:`content_key`.
    """

    def __init__(
        self, reader: CacheReader, sequences: Sequence[Tensor], *,
        layouts: Sequence[Sequence[int] | None] | None = None, required: Sequence[Tensor] | None = None,
        check: bool = True,
    ) -> None:
        for name, given in (("layouts", layouts), ("required", required)):
            if given is not None and len(given) != len(sequences):
                _check.fail("CachedDataset", name, f"one for each of {len(sequences)} sequences, or None", len(given))
        self.reader, self.sequences, self.layouts, self.required = reader, sequences, layouts, required
        if check:
            self._check()

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> CachedItem:
        """One sequence, looked up anew. Raises CacheError as :meth:`CacheReader.lookup` does."""
        tokens = self.sequences[index]
        required = None if self.required is None else self.required[index]
        targets = self.reader.targets(tokens, layout=self._layout(index), required=required)
        cached = targets.offsets.diff() > 0
        return CachedItem(tokens.to("cpu", torch.int64), targets, cached if required is None else required.cpu())

    def _layout(self, index: int) -> Sequence[int] | None:
        return None if self.layouts is None else self.layouts[index]

    def _check(self) -> None:
        keys = (content_key(tokens, self.reader.manifest, self._layout(i)) for i, tokens in enumerate(self.sequences))
        missing = [i for i, key in enumerate(keys) if key not in self.reader]
        if missing:
            raise CacheError.mismatch(
                self.reader.folder, None, "sequences in the cache", f"all {len(self)}",
                f"{len(missing)} that it lacks, the first of them sequence {missing[0]}",
                "score them first, or look for what differs: the text, its cut, special tokens, the layout",
            )


@dataclass(frozen=True, eq=False)
class CachedBatch:
    """B sequences of at most L tokens, and the N = sum of (length - 1) rows of their teacher, one after the other.

    Attributes:
        tokens: int64 ``[B, L]``, padded on the right.
        lengths: int64 ``[B]``.
        rows: int64 ``[N]``: where in the flattened ``[B * L]`` each row of ``targets`` is predicted.
        labels: int64 ``[N]``: the token that each row predicts, -100 where the row does not count.
        targets: N rows.
    """

    tokens: Tensor
    lengths: Tensor
    rows: Tensor
    labels: Tensor
    targets: SparseTargets

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CachedBatch:
        """The same batch on another device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CachedBatch:
        """For ``DataLoader(pin_memory=True)``."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> CachedBatch:
        moved = lambda record: {n: move(x) for n, x in vars(record).items() if isinstance(x, Tensor)}  # noqa: E731
        targets = dataclasses.replace(self.targets, **moved(self.targets))
        return dataclasses.replace(self, targets=targets, **moved(self))


@dataclass(frozen=True)
class CachedCollator:
    """Items of a :class:`CachedDataset` to a :class:`CachedBatch`.

    Args:
        pad_id: what stands behind the end of a shorter sequence. Any id will do: no row looks at it.
        multiple: L is rounded up to a multiple of it.

    Raises:
        ValueError: ``multiple`` is below 1; a batch of no items.
    """

    pad_id: int = 0
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.multiple < 1:
            _check.fail("CachedCollator", "multiple", "at least 1", self.multiple)

    def __call__(self, items: Sequence[CachedItem]) -> CachedBatch:
        if not items:
            _check.fail("CachedCollator", "items", "at least one", "none")
        lengths = torch.tensor([item.tokens.shape[0] for item in items])
        width = -(-int(lengths.max()) // self.multiple) * self.multiple
        tokens = torch.full((len(items), width), self.pad_id, dtype=torch.int64)
        for i, item in enumerate(items):
            tokens[i, : item.tokens.shape[0]] = item.tokens
        following = torch.cat([item.tokens[1:] for item in items])
        counted = torch.cat([item.counted for item in items])
        return CachedBatch(
            tokens=tokens,
            lengths=lengths,
            rows=torch.cat([i * width + torch.arange(item.tokens.shape[0] - 1) for i, item in enumerate(items)]),
            labels=following.masked_fill(~counted, IGNORED),
            targets=SparseTargets.cat([item.targets for item in items]),
        )
