"""Every verb by backend, dtype and mode, and every divergence: the rows come from ``bench.cases``."""

from __future__ import annotations

import inspect

import torch

from bench.cases import BACKENDS, CASES
from bench.conftest import Rows
from kd_kernels.divergences import REGISTRY


def test_mode(rows: Rows, case: str, mode: str, backend: str, dtype: torch.dtype) -> None:
    rows.time(CASES[case], dtype, mode, backend)


def test_divergence(rows: Rows, divergence: str) -> None:
    factory = REGISTRY[divergence]
    needed = [p.name for p in inspect.signature(factory).parameters.values() if p.default is p.empty]
    name = str(factory(**dict.fromkeys(needed, 0.5)))
    rows.time(CASES["kd_loss_dense"], torch.float32, "gradient", BACKENDS[rows.device.name][0], divergence=name)
