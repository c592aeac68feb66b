"""Launch numbers of the Triton kernels. They change the speed and no draw. Not yet measured on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from kd_kernels import row_launch

MEMBERS = 2048
"""Logits of listed groups that a filter looks at together: 8 a lane."""

DRAWS = 8
"""Draws with replacement that a program looks at together: with the 128 ids of a group each, 8 fp64 numbers a lane."""


def members_launch(warp_size: int) -> row_launch.Launch:
    """For a kernel that looks at MEMBERS: without the limit, ptxas spills on sm_90 to fit a third program."""
    lanes = MEMBERS // 8
    return row_launch.Launch(MEMBERS, lanes // warp_size, row_launch.max_registers(lanes, warp_size, programs=2))


@dataclass(frozen=True)
class Launch:
    """``block`` elements at a time by ``num_warps`` warps."""

    block: int
    num_warps: int


def group_launch(vocab: int, warp_size: int) -> Launch:
    """For the kernel that reads the logits: 16 of them a lane, which are four loads of 16 bytes in flight in fp32."""
    block = 512
    while block < min(vocab, 4096):
        block *= 2
    return Launch(block, max(1, block // (16 * warp_size)))


def race_launch(n_groups: int, warp_size: int, most: int = 256) -> Launch:
    """For kernels that walk the groups of a row, up to ``most`` at a time: two a lane (with four, ptxas spills on
    sm_100)."""
    block = 64
    while block < min(n_groups, most):
        block *= 2
    return Launch(block, max(1, block // (2 * warp_size)))


def draw_launch(n_groups: int, warp_size: int) -> Launch:
    """For the race: all groups of most vocabularies in one or two rounds. Of few rows, nobody else hides how long one
    takes, and it is thousands of clocks."""
    return race_launch(n_groups, warp_size, most=1024)


def residual_launch(warp_size: int) -> row_launch.Launch:
    """For the kernel that walks two rows in fp64: four numbers of each a lane."""
    lanes = 256
    return row_launch.Launch(4 * lanes, lanes // warp_size, row_launch.max_registers(lanes, warp_size, programs=2))


MAX_FUSED_ROWS = 64
"""Up to so many rows, the head's product and the summaries of the groups are one kernel, which reads the weights once.
Beyond, the product is bound by arithmetic, and cuBLAS has the tuning for that."""


@dataclass(frozen=True)
class FusedLaunch:
    """A program has a group of 128 ids and ``rows`` rows, and goes through the hidden size in steps of ``depth``;
    ``num_stages`` of them are loaded ahead: 48 KB of weights."""

    rows: int
    depth: int
    num_warps: int
    num_stages: int


def fused_launch(rows: int, warp_size: int) -> FusedLaunch:
    """For so many rows, at least the 16 that a matrix unit takes."""
    taken = 16
    while taken < rows:
        taken *= 2
    return FusedLaunch(taken, 64, 256 // warp_size, 3)
