"""Launch numbers of the Triton kernels. They change the speed and no result."""

from __future__ import annotations

from dataclasses import dataclass

from kd_kernels.row_launch import max_registers

MAX_TILE = 16_384
"""Keys that a selection keeps in registers: k = 1,024 of 151,936 logits, in groups of 16. What follows is not yet
measured on a GPU."""


@dataclass(frozen=True)
class Launch:
    """``block`` elements at a time by ``num_warps`` warps; the first ``tile`` of what is selected from stay in
    registers."""

    block: int
    num_warps: int
    tile: int = 0
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Of the launch."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, **limit}


def group_columns(vocab: int, k: int) -> int:
    """Columns of a group, S: the power of two below the root of 2 V / k, where V / S summaries of 8 bytes and k S
    logits of 4 are the fewest bytes together. From 16, which are 64 bytes of a row, to 512."""
    columns = 16
    while columns < 512 and (2 * columns) ** 2 <= 2 * vocab / k:
        columns *= 2
    return columns


def group_launch(vocab: int, warp_size: int) -> Launch:
    """For the kernel that reads the logits: 16 of them a lane, which are four loads of 16 bytes in flight in fp32."""
    block = 512
    while block < min(vocab, 4096):
        block *= 2
    return Launch(block, max(1, block // (16 * warp_size)))


def select_launch(candidates: int, warp_size: int) -> Launch:
    """For kernels that select from so many candidates: the first MAX_TILE keys stay in registers, 8 a lane up to 512
    lanes (with 16 a lane on fewer, ptxas spills on sm_100); then 4 candidates a lane at a time."""
    tile = 512
    while tile < min(candidates, MAX_TILE):
        tile *= 2
    lanes = max(64, min(tile // 8, 512))
    return Launch(min(tile, 4 * lanes), max(1, lanes // warp_size), tile, max_registers(lanes, warp_size))


def write_launch(k: int, warp_size: int) -> Launch:
    """For the kernel that writes k entries a row: four a lane."""
    block = 128
    while block < min(k, 1024):
        block *= 2
    return Launch(block, max(1, block // (4 * warp_size)), 0, max_registers(block // 4, warp_size))
