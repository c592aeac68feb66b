"""Launch numbers of the Triton row kernels: a pure function of the row and the device, never tuned on N.

Not yet measured on a GPU. What they follow from: four fp32 logits a thread and block are one 16-byte load from each
model, and the several fp32 sums that a lane keeps for each of them stay below 64 registers, so that two programs of 512
threads share a multiprocessor: 32 KB of loads in flight, where its share of the memory's bandwidth times its latency is
about 25 KB.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """``block`` columns at a time by ``num_warps`` warps, of lanes with at most ``max_registers`` (None: AMD's compiler
    decides)."""

    block: int
    num_warps: int
    max_registers: int | None

    @property
    def options(self) -> dict[str, int]:
        """Of the launch."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, **limit}


@functools.cache
def lanes_per_warp() -> int:
    """32, or what an AMD GPU says of itself."""
    if torch.version.hip is None or not torch.cuda.is_available():
        return 32
    return torch.cuda.get_device_properties(torch.cuda.current_device()).warp_size


def max_registers(lanes: int, warp_size: int, programs: int = 1) -> int | None:
    """Of a lane, so that so many programs share a multiprocessor's 65,536 registers. Left to itself, ptxas gives more
    to a lane, or spills some to make room for one program more. None: AMD's compiler decides."""
    return min(255, 65_536 // (programs * lanes)) if warp_size == 32 and torch.version.hip is None else None


def readable_columns(*rows: Tensor) -> int:
    """How many columns of the rows ``[C, V]`` have memory that a kernel may read, and fill with zeros where it writes:
    V, or the next multiple of 16 where all rows lie so far apart and begin at multiples of 16 elements."""
    columns = rows[0].shape[1]
    padded = -(-columns // 16) * 16
    for each in rows:
        ends = each.storage_offset() + (each.shape[0] - 1) * each.stride(0) + padded
        has_room = each.stride(0) >= padded and ends <= each.untyped_storage().nbytes() // each.dtype.itemsize
        if not has_room or each.stride(0) % 16:
            return columns
    return padded


def row_launch(vocab: int, warp_size: int | None = None) -> Launch:
    """For kernels that walk a row of the vocabulary with one program: four columns a lane."""
    warp_size = lanes_per_warp() if warp_size is None else warp_size
    lanes = 128 if vocab <= 1024 else 256 if vocab <= 16_384 else 512
    return Launch(4 * lanes, lanes // warp_size, max_registers(lanes, warp_size, programs=2))
