"""Records that cannot become rows of a cache."""

from __future__ import annotations


class Refused(Exception):
    """A record is not imported.

    Attributes:
        reason: the kind of fault, which is counted.
        found: what this record has.
    """

    def __init__(self, reason: str, found: object, remedy: str = "") -> None:
        super().__init__(f"{reason}: {found}" + (f"; {remedy}" if remedy else ""))
        self.reason = reason
        self.found = found
