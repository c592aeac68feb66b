"""Wording of complaints, as in the library: ``<where>: <what> must be <requirement>, got <value>[; <remedy>]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn


def complaint(where: str, what: str, requirement: str, got: object, remedy: str = "") -> str:
    """The text of one complaint."""
    return f"{where}: {what} must be {requirement}, got {got}" + (f"; {remedy}" if remedy else "")


def fail(where: str, what: str, requirement: str, got: object, remedy: str = "") -> NoReturn:
    """Raise ValueError."""
    raise ValueError(complaint(where, what, requirement, got, remedy))


def check_positive(where: str, what: str, value: float) -> None:
    if not 0.0 < value < float("inf"):
        fail(where, what, "finite and greater than 0", value)


def check_one_of(where: str, what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        fail(where, what, "one of " + ", ".join(known), repr(value))
