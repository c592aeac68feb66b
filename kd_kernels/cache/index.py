"""Where the sequences of many shards are: 48 bytes a sequence, found by bisection."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from kd_kernels.cache.format import IndexEntry

__all__ = ["MergedIndex"]

_KEY = struct.Struct("<qq")
_ROWS = struct.Struct("<II")


class MergedIndex:
    """The packed indexes of shards 0, 1, ... as one table, sorted by key; of equal keys the first shard's counts.

    Columns (int64): the two halves of the key, offset, bytes, rows and cached rows in one, shard. Tensors and not a
    dict: a tenth of the memory, and forked workers share it.
    """

    def __init__(self, packed: Sequence[bytes]) -> None:
        tables = []
        for shard, entries in enumerate(packed):
            table = torch.frombuffer(bytearray(entries), dtype=torch.int64).view(-1, 5)
            tables.append(torch.nn.functional.pad(table, (0, 1), value=shard))
        table = torch.cat([torch.zeros(0, 6, dtype=torch.int64), *tables])
        table = table[table[:, 1].argsort(stable=True)]
        table = table[table[:, 0].argsort(stable=True)]
        first = torch.ones(len(table), dtype=torch.bool)
        first[1:] = (table[1:, :2] != table[:-1, :2]).any(1)
        self._table = table[first]
        self._low = self._table[:, 0].contiguous()

    def __len__(self) -> int:
        return len(self._table)

    def find(self, key: bytes) -> tuple[int, IndexEntry] | None:
        """The shard and the entry of a key, or None."""
        low, high = _KEY.unpack(key)
        at = int(torch.searchsorted(self._low, low))
        while at < len(self._table):
            found_low, found_high, offset, size, rows, shard = self._table[at].tolist()
            if found_low != low:
                return None
            if found_high == high:
                return shard, IndexEntry(key, offset, size, *_ROWS.unpack(rows.to_bytes(8, "little")))
            at += 1
        return None

    def keys(self) -> list[bytes]:
        return [_KEY.pack(*halves) for halves in self._table[:, :2].tolist()]

    @property
    def rows(self) -> int:
        return int((self._table[:, 4] & 0xFFFFFFFF).sum())

    @property
    def cached_rows(self) -> int:
        return int((self._table[:, 4] >> 32).sum())
