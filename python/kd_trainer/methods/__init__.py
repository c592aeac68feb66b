"""Published methods as three choices: where tokens come from, what the teacher's target is, the objective.

One file a method. Each has ``build(config, parts)``, which returns the :class:`~kd_trainer.methods.base.Method` that a
configuration describes; the trainer knows no more about a method than that class.
"""

from __future__ import annotations

from kd_trainer.config import Config
from kd_trainer.methods import kd, sft
from kd_trainer.methods.base import Method, Parts

_BUILDERS = {"kd": kd.build, "sft": sft.build}


def build(config: Config, parts: Parts) -> Method:
    """The method that ``config.method`` names, of the loaded ``parts``."""
    return _BUILDERS[config.method](config, parts)


__all__ = ["Method", "Parts", "build"]
