"""``topk_targets``: by backend and dtype."""

from __future__ import annotations

import pytest
import torch

from bench.cases import BACKENDS, CASES, DTYPES
from bench.conftest import Rows
from bench.inputs import Shape

SHAPE = Shape(rows=256, vocab=49152, student_hidden=8, teacher_hidden=576)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_targets(rows: Rows, backend: str, dtype: torch.dtype) -> None:
    rows.time(CASES["topk_targets"], SHAPE, dtype, "targets", backend=backend)
