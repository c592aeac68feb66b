"""Philox4x32-10 and the words of the contract (``DRAWS.md``), in torch operations on int64: any device.

The same generator is in ``csrc/include/kd/philox.h`` and in the Triton kernels. All three are held to the known answers
of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""What the two words of the key grow by from round to round."""

GROUP = 128
"""Ids of the vocabulary that share one word of the race."""

RACE, PICK, TARGETS, ACCEPT, RESAMPLE_RACE, RESAMPLE_PICK = range(6)
"""What words are for: four bits of the counter, so that no two uses share a word."""

MAX_DRAWS = 1 << 12
"""Draws at one position that the counter tells apart."""

LOW = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words from a counter of four and a key of two: int64 tensors of values below 2^32, which are broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The 64 bits of a product of two words, in an int64 that may come out negative: the mask takes the sign off.
        even, odd = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((odd >> 32) & LOW) ^ c1 ^ k0, odd & LOW, ((even >> 32) & LOW) ^ c3 ^ k1, even & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1, c2, c3


def words(
    seeds: Tensor, keys: Tensor, positions: Tensor, purpose: int, block: Tensor | int = 0, draw: Tensor | int = 0,
) -> Tensor:
    """``[..., 4]``: the words of one block for each (seed, sequence key, position), int64 tensors of one shape."""
    first = torch.zeros_like(seeds) + block + (draw << 16) + (purpose << 28)
    counter = (first, positions & LOW, keys & LOW, (keys >> 32) & LOW)
    return torch.stack(torch.broadcast_tensors(*philox4x32(counter, (seeds & LOW, (seeds >> 32) & LOW))), -1)


def group_words(seeds: Tensor, keys: Tensor, positions: Tensor, purpose: int, groups: int) -> Tensor:
    """``[C, groups]``: the word of every vocabulary group, for rows ``[C]``."""
    blocks = torch.arange(-(-groups // 4), device=seeds.device)
    rows = (x[:, None] for x in (seeds, keys, positions))
    return words(*rows, purpose, blocks).flatten(1)[:, :groups]


def uniform(word: Tensor) -> Tensor:
    """A word as a number of (0, 1) in fp64: the middle of its 2^-32, exactly."""
    return (word.double() + 0.5) * 2.0**-32


def fine_uniform(pair: Tensor) -> Tensor:
    """Two words ``[..., 2]`` as one number of (0, 1): the middle of its 2^-52, exactly; the 12 lowest bits are not
    used."""
    high, low = pair.unbind(-1)
    return (((high << 20) | (low >> 12)).double() + 0.5) * 2.0**-52
