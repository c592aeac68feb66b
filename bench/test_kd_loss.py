"""``kd_loss``: dense and sparse teachers, by backend, dtype and mode; and every divergence that there is."""

from __future__ import annotations

import inspect

import pytest
import torch

from bench.cases import BACKENDS, CASES, DTYPES
from bench.conftest import Rows
from bench.inputs import Shape
from kd_kernels.divergences import REGISTRY

SHAPE = Shape(rows=256, vocab=32768, student_hidden=256, teacher_hidden=512)
MODES = ("loss", "gradient", "per_token")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ("kd_loss_dense", "kd_loss_sparse"))
def test_mode(rows: Rows, case: str, backend: str, dtype: torch.dtype, mode: str) -> None:
    rows.time(CASES[case], SHAPE, dtype, mode, backend=backend)


@pytest.mark.parametrize("name", REGISTRY)
def test_divergence(rows: Rows, name: str) -> None:
    needed = [p.name for p in inspect.signature(REGISTRY[name]).parameters.values() if p.default is p.empty]
    divergence = str(REGISTRY[name](**dict.fromkeys(needed, 0.5)))
    rows.time(CASES["kd_loss_dense"], SHAPE, torch.float32, "gradient", divergence=divergence)
