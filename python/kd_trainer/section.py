"""Settings that know what was written."""

from __future__ import annotations

import dataclasses
from typing import Self


class Section:
    """Base of frozen dataclasses: ``given`` names the fields that were written, as against left at their defaults."""

    def __new__(cls, *values: object, **named: object) -> Self:
        section = super().__new__(cls)
        positional = (field.name for field, _ in zip(dataclasses.fields(cls), values))
        object.__setattr__(section, "given", frozenset((*positional, *named)))
        return section

    def elsewhere(self, decided: Self) -> Self:
        """With the fields that ``decided`` was given, where this one was not."""
        fields = decided.given - self.given
        return dataclasses.replace(self, **{name: getattr(decided, name) for name in fields}) if fields else self
