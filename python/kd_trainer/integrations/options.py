"""What a trainer of another library is asked to do differently, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kd_kernels import Divergence, divergences
from kd_trainer.errors import check_one_of, check_positive, fail


@dataclass(frozen=True)
class KDOptions:
    """The objective ``kd_weight T'^2 D(p, q) + ce_weight CE``, per token that counts, as in :func:`kd_kernels.kd_loss`.

    Args:
        divergence: any of ours, or its string form. None: what the trainer's own arguments say (TRL's ``beta``), else
            the forward KL.
        temperature: of both models. None: what the trainer's own arguments say, else 1.
        kd_weight, ce_weight: of the divergence and of the cross-entropy with the labels.
        squared_temperature: multiply the divergence by T^2.
        tail: what the mass that a cache or ``top_k`` leaves out does: "bucket", "renormalize" or "drop".
        top_k: reduce a live teacher to its k most probable tokens and a tail, exactly as a cache would hold it.
        valid_vocab: the number of real tokens, where the heads are padded to different sizes.
        max_scratch_bytes: bound on the temporary memory of the loss.

    Raises:
        ValueError, TypeError: a value out of range, an unknown divergence.
    """

    divergence: str | Divergence | None = None
    temperature: float | None = None
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    squared_temperature: bool = False
    tail: str = "bucket"
    top_k: int | None = None
    valid_vocab: int | None = None
    max_scratch_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.divergence is not None:
            object.__setattr__(self, "divergence", divergences.parse(self.divergence))
        if self.temperature is not None:
            check_positive("KDOptions", "temperature", self.temperature)
        for name in ("kd_weight", "ce_weight"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                fail("KDOptions", name, "finite and at least 0", getattr(self, name))
        check_one_of("KDOptions", "tail", self.tail, ("bucket", "renormalize", "drop"))
        for name in ("top_k", "valid_vocab"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                fail("KDOptions", name, "a positive integer or None", value)

    def filled(self, divergence: Divergence, temperature: float = 1.0) -> KDOptions:
        """The same with what was left to the trainer."""
        return dataclasses.replace(
            self, divergence=self.divergence or divergence,
            temperature=temperature if self.temperature is None else self.temperature,
        )
