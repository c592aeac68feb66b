"""Compares samples with the oracle of the contract: ids exactly, log-probabilities as well as plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from kd_kernels import Sampled, sample
from kd_kernels.testing import assert_as_good

Arguments = dict[str, Any]
"""Per-row arguments by name: numbers, or lists with one for each row."""


def of_row(arguments: Arguments, row: int) -> Arguments:
    return {name: value[row] if isinstance(value, list) else value for name, value in arguments.items()}


def tensors(arguments: Arguments) -> Arguments:
    """Lists as tensors: int64, or fp64, in which 0.3 is the 0.3 of the oracle."""
    as_tensor = lambda x: torch.tensor(x, dtype=torch.int64 if isinstance(x[0], int) else torch.float64)  # noqa: E731
    return {name: as_tensor(value) if isinstance(value, list) else value for name, value in arguments.items()}


def far_apart(one: Tensor, other: Tensor) -> Tensor:
    """``[2, V]``: two rows more than an int32 of elements apart, which takes addresses and little memory."""
    columns = one.shape[0]
    try:
        memory = torch.empty((1 << 31) + 2 * columns)
    except RuntimeError as error:
        pytest.skip(f"no address space for 2^31 elements: {error}")
    far = memory.as_strided((2, columns), ((1 << 31) + columns, 1))
    far[0], far[1] = one, other
    return far


def plain(row: Tensor, left: list[float], token: int, temperature: float) -> list[float]:
    """The two log-probabilities as one writes them in torch, in the dtype of the row."""
    if temperature == 0:
        return [0.0, float(row.log_softmax(0)[token])]
    tempered = torch.where(torch.tensor(left) > -torch.inf, (row - row.max()) / temperature, -torch.inf)
    return [float(tempered.log_softmax(0)[token]), float(row.log_softmax(0)[token])]


def oracle(row: Tensor, place: oracles.Place, **arguments: Any) -> oracles.Draw:
    return oracles.sample(row.double().tolist(), place, **arguments)


def assert_samples(
    logits: Tensor, seed: int | list[int], keys: list[int], positions: list[int], arguments: Arguments, **options: Any,
) -> Sampled:
    """The library's samples of logits ``[N, V]``, which the oracle has confirmed."""
    found = sample(
        logits, seed=torch.tensor(seed) if isinstance(seed, list) else seed, keys=torch.tensor(keys),
        positions=torch.tensor(positions), **tensors(arguments), **options,
    )
    ids, truth, near = [], [], []
    for i, row in enumerate(logits):
        here = of_row(arguments, i)
        place = oracles.Place(seed[i] if isinstance(seed, list) else seed, keys[i], positions[i])
        draw = oracle(row, place, **here)
        assert draw.lead > 1e-5, f"row {i} is a photo finish: choose another seed"
        ids.append(draw.id)
        truth.append([draw.logprob, draw.model_logprob])
        left, temperature = oracles.filtered(row.double().tolist(), **here), here.get("temperature", 1.0)
        near.append(plain(row, left, draw.id, temperature))
    assert found.ids.tolist() == ids
    actual = torch.stack([found.logprobs, found.model_logprobs], 1)
    unit = torch.tensor([[1.0 if math.isfinite(t[0]) else 0.0] for t in truth])
    assert_as_good(actual, torch.tensor(near).to(actual.dtype), torch.tensor(truth, dtype=torch.float64), unit=unit)
    return found
