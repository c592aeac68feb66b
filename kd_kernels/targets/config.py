"""Sizes of the panels in which logits are formed. They change the speed and no result."""

from __future__ import annotations


def panel_columns(vocab: int) -> int:
    """Columns of a panel."""
    return min(vocab, 4096)


def panel_rows(rows: int, fitting: int) -> int:
    """Rows of a panel, at most ``fitting``, spread evenly over the panels."""
    panels = max(1, -(-rows // min(fitting, 256)))
    return max(1, -(-rows // panels))
