"""Sizes of the panels in which logits are formed. They change the speed and no result.

Measured as time of the whole call over that of the bare head product (2 cores with AVX-512 and 2 MiB of second-level
cache each, fp32, H=576, V=49152, k=64). N=256: 0.91 with 2048 or 4096 columns, 0.97 with 8192 and with whole rows.
N=1024: 0.91 with 1024 rows at a time, 1.15 with 256, because the weight is read for every panel of rows.
"""

from __future__ import annotations

MAX_ROWS = 1024
MIN_COLUMNS, MAX_COLUMNS = 2048, 16_384
LOGITS = 1 << 20
"""Logits in a panel, if that leaves the product wide enough."""


def panel_columns(rows: int, vocab: int) -> int:
    """Columns of a panel, when there are ``rows`` rows in all."""
    wanted = LOGITS // max(1, min(rows, MAX_ROWS))
    return min(vocab, max(MIN_COLUMNS, min(MAX_COLUMNS, wanted)))


def panel_rows(rows: int, fitting: int) -> int:
    """Rows of a panel, at most ``fitting``, spread evenly over the panels."""
    panels = max(1, -(-rows // min(fitting, MAX_ROWS)))
    return max(1, -(-rows // panels))
