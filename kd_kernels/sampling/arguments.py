"""Checks of what the verbs of sampling are given, before anything is allocated."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kd_kernels import _backend, _check
from kd_kernels.sampling import philox

CHECKS = ("raise", "flag")
PURPOSES = {"draw": philox.RACE, "resample": philox.RESAMPLE_RACE}


def check_vocab(where: str, backend: str, columns: int, tensors: list[Tensor]) -> None:
    if backend == "triton":
        _backend.check_triton_takes(where, columns, *tensors)
    if columns > _backend.MAX_VOCAB:
        _check.fail(
            where, "the vocabulary", f"at most {_backend.MAX_VOCAB}, whose groups the counter can tell apart", columns
        )


def check_budget(where: str, max_scratch_bytes: object) -> None:
    if max_scratch_bytes is not None and (
        isinstance(max_scratch_bytes, bool) or not isinstance(max_scratch_bytes, int)
    ):
        _check.fail_type(where, "max_scratch_bytes", "a number of bytes (int)", type(max_scratch_bytes).__name__)


def autocast_name(device: torch.device) -> str:
    """The dtype that the caller's autocast rounds to, by name; empty where there is none."""
    if not torch.is_autocast_enabled(device.type):
        return ""
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")


class Place(NamedTuple):
    """Which words are a row's: int64 ``[N]`` each."""

    seeds: Tensor
    keys: Tensor
    positions: Tensor


class Warp(NamedTuple):
    """How a distribution is tempered and cut: a number that holds for all rows, and is in range, or ``[N]``; None: not
    at all."""

    temperature: float | Tensor  # fp64
    top_k: int | Tensor | None  # int64
    top_p: float | Tensor | None  # fp64
    min_p: float | Tensor | None  # fp64

    def of(self, rows: Tensor) -> Warp:
        """Of some rows (int64 ``[M]``)."""
        return Warp(*(x[rows] if isinstance(x, Tensor) else x for x in self))

    def filled(self, count: int, device: torch.device) -> Warp:
        """Of ``count`` rows, with a tensor in place of every number."""
        dtypes = (torch.float64, torch.int64, torch.float64, torch.float64)
        return Warp(*(
            torch.full((count,), x, dtype=dtype, device=device) if isinstance(x, (int, float)) else x
            for x, dtype in zip(self, dtypes)
        ))


class Rows:
    """Checks per-row arguments, and makes flat what is a tensor."""

    def __init__(self, where: str, shape: torch.Size, device: torch.device) -> None:
        self.where, self.shape, self.device = where, shape, device
        self.count = math.prod(shape)

    def filled(self, value: int) -> Tensor:
        return torch.full((self.count,), value, dtype=torch.int64, device=self.device)

    def counted(self) -> Tensor:
        return torch.arange(self.count, device=self.device)

    def place(self, seed: object, keys: object, positions: object) -> Place:
        return Place(
            self.seeds(seed), self.counted() if keys is None else self.tensor("keys", keys),
            self.filled(0) if positions is None else self.tensor("positions", positions),
        )

    def warp(self, temperature: object, top_k: object, top_p: object, min_p: object, prefix: str = "") -> Warp:
        return Warp(
            self.numbers(prefix + "temperature", temperature, 0.0, math.inf), self.top_k(prefix + "top_k", top_k),
            None if top_p is None else self.numbers(prefix + "top_p", top_p, 0.0, 1.0),
            None if min_p is None else self.numbers(prefix + "min_p", min_p, 0.0, 1.0),
        )

    def tensor(self, name: str, value: object) -> Tensor:
        """int64 ``[N]`` from integers of the rows' shape."""
        return self._flat(name, _check.integral(self.where, name, value)).long()

    def numbers(self, name: str, value: object, least: float, most: float) -> float | Tensor:
        """A number, checked, or fp64 ``[N]`` whose values are not."""
        if isinstance(value, Tensor):
            return self._flat(name, _check.floating(self.where, name, value)).double()
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _check.fail_type(self.where, name, "a number or a tensor", type(value).__name__)
        if not least <= value <= most:
            _check.fail(self.where, name, "at least 0" if most == math.inf else f"in {least:g}..{most:g}", value)
        return float(value)

    def top_k(self, name: str, value: object) -> int | Tensor | None:
        if value is None or isinstance(value, Tensor):
            return None if value is None else self.tensor(name, value)
        if self._int(name, value) < 1:
            _check.fail(self.where, name, "at least 1", value, "pass None to keep all")
        return min(value, _backend.MAX_VOCAB)

    def seeds(self, value: object) -> Tensor:
        """Unsigned 64 bits are taken as they are."""
        if isinstance(value, Tensor):
            return self.tensor("seed", value)
        if not -(1 << 63) <= self._int("seed", value) < 1 << 64:
            _check.fail(self.where, "seed", "of 64 bits", value)
        return self.filled(value - (1 << 64) if value >= 1 << 63 else value)

    def _int(self, name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            _check.fail_type(self.where, name, "an int or a tensor", type(value).__name__)
        return value

    def _flat(self, name: str, value: Tensor) -> Tensor:
        if value.shape != self.shape:
            _check.fail(self.where, name, f"of shape {list(self.shape)} like the rows of logits", list(value.shape))
        _check.same_device(self.where, name, value, self.device)
        return value if value.dim() == 1 else value.reshape(-1)
