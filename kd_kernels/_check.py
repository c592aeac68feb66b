"""Wording of the library's complaints, in one place.

Every message reads ``<function>: <argument> must be <requirement>, got <value>[; <remedy>]``, so that a reader learns
at once where it failed, what was expected, and what to do. The checks run before anything is allocated.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def complaint(where: str, argument: str, requirement: str, got: object, remedy: str = "") -> str:
    """The text of one complaint, in the form that every message of the library has."""
    return f"{where}: {argument} must be {requirement}, got {got}" + (f"; {remedy}" if remedy else "")


def fail(where: str, argument: str, requirement: str, got: object, remedy: str = "") -> NoReturn:
    """Raise ValueError: the value or the shape is wrong."""
    raise ValueError(complaint(where, argument, requirement, got, remedy))


def fail_type(where: str, argument: str, requirement: str, got: object, remedy: str = "") -> NoReturn:
    """Raise TypeError: the type or the dtype is wrong."""
    raise TypeError(complaint(where, argument, requirement, got, remedy))


def tensor(where: str, argument: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        fail_type(where, argument, "a torch.Tensor", type(value).__name__)
    return value


def floating(where: str, argument: str, value: object) -> Tensor:
    value = tensor(where, argument, value)
    if value.dtype not in FLOAT_DTYPES:
        fail_type(where, argument, "of dtype float32, bfloat16, float16 or float64", value.dtype)
    return value


def integral(where: str, argument: str, value: object) -> Tensor:
    value = tensor(where, argument, value)
    if value.dtype not in (torch.int64, torch.int32):
        fail_type(where, argument, "of dtype int64 or int32", value.dtype)
    return value


def same_device(where: str, argument: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        fail(where, argument, f"on {device}, like the rest", value.device)


def positive(where: str, argument: str, value: object, remedy: str = "") -> float:
    """A finite Python number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail_type(where, argument, "a number", type(value).__name__)
    if not 0.0 < value < float("inf"):
        fail(where, argument, "finite and greater than 0", value, remedy)
    return float(value)


def one_of(where: str, argument: str, value: object, known: tuple[str, ...]) -> str:
    if value not in known:
        fail(where, argument, "one of " + ", ".join(known), repr(value))
    return value  # type: ignore[return-value]
