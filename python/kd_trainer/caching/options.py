"""What ``kdk cache build`` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from kd_trainer.config import DTYPES
from kd_trainer.errors import check_one_of, check_positive, fail

WHERE = "build_cache"
SPACES = ("logit", "prob")


@dataclass(frozen=True)
class CacheOptions:
    """Everything beside teachers, data and folder. Each is an option of the command, written with dashes."""

    k: int = 64
    mass: float | None = None
    sampled: int | None = None  # draws a row, beside the k likeliest
    proposal_temperature: float = 1.0  # that they are drawn at
    temperatures: tuple[float, ...] = (1.0,)
    step_nats: float = 1 / 16
    dtype: str = "float32"
    head_dtype: str | None = None  # None: dtype
    ensemble: str = "logit"
    weights: tuple[float, ...] | None = None
    min_entropy: float | None = None
    fraction: float | None = None
    select: str | None = None
    batch_tokens: int = 2048
    writer: str | None = None  # None: the machine's name
    share: str | None = None
    resume: bool = True

    def __post_init__(self) -> None:
        check_one_of(WHERE, "--dtype", self.dtype, DTYPES)
        if self.head_dtype is not None:
            check_one_of(WHERE, "--head-dtype", self.head_dtype, DTYPES)
        check_one_of(WHERE, "--ensemble", self.ensemble, SPACES)
        if self.min_entropy is not None and not 0.0 <= self.min_entropy < float("inf"):
            fail(WHERE, "--min-entropy", "finite and at least 0 nats", self.min_entropy)
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            fail(WHERE, "--fraction", "in (0, 1]", self.fraction)
        if self.select is not None and not self.selects:
            fail(WHERE, "--min-entropy or --fraction", "given with --select", None)
        if self.sampled is None:
            if self.proposal_temperature != 1.0:
                fail(WHERE, "--sampled", "given with --proposal-temperature", None)
        else:
            if self.sampled < 1:
                fail(WHERE, "--sampled", "at least 1 draw a row", self.sampled)
            check_positive(WHERE, "--proposal-temperature", self.proposal_temperature)
            if self.mass is not None:
                fail(WHERE, "--mass", "absent with --sampled, which leaves nothing out on average", self.mass)
            if self.temperatures != (1.0,):
                remedy = "sampled rows are unbiased at the temperature 1 alone"
                fail(WHERE, "--temperatures", "1 with --sampled", self.temperatures, remedy)
        if self.batch_tokens < 2:
            fail(WHERE, "--batch-tokens", "at least 2", self.batch_tokens)
        if self.share is not None:
            parse_share(self.share)

    @property
    def entries(self) -> int:
        """The most entries that a row can have."""
        return self.k + (self.sampled or 0)

    @property
    def selects(self) -> bool:
        """Whether positions that count are left out by entropy."""
        return self.min_entropy is not None or self.fraction is not None

    @property
    def positions(self) -> str:
        """Which of the rows that count are kept, for the manifest."""
        rules = []
        if self.min_entropy is not None:
            rules.append(f"entropy >= {self.min_entropy:g} nats")
        if self.fraction is not None:
            rules.append(f"the {self.fraction:g} of a document with most entropy")
        return " and ".join(rules) + f" by {self.select or 'the teacher'}" if rules else "all"


def parse_share(share: str) -> tuple[int, int]:
    """``"2/8"`` as (2, 8)."""
    own, slash, total = share.partition("/")
    if not (slash and own.isdigit() and total.isdigit() and int(own) < int(total)):
        fail(WHERE, "--share", "i/n with 0 <= i < n, such as 0/4", repr(share))
    return int(own), int(total)
