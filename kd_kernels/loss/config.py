"""Launch numbers of the sparse row kernel that are its own; see ``row_launch.py`` for those of a row."""

from __future__ import annotations


def entry_block(entries_per_row: float) -> int:
    """Entries of a sparse row taken up at a time: the power of two from 32 to 1,024 that holds the mean row."""
    block = 32
    while block < min(entries_per_row, 1024):
        block *= 2
    return block
