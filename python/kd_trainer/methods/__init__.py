"""Published methods as three choices: where tokens come from, what the teacher's target is, the objective.

One file a method. Each registers a :class:`~kd_trainer.registry.MethodSpec`, whose ``build(config, parts)`` returns the
:class:`~kd_trainer.methods.base.Method` that a configuration describes; the trainer knows no more about a method than
that class.
"""

from __future__ import annotations

import importlib
import pkgutil

from kd_trainer import registry
from kd_trainer.config import Config
from kd_trainer.methods.base import Method, Parts


def build(config: Config, parts: Parts) -> Method:
    """The method that ``config.method`` names, of the loaded ``parts``."""
    return registry.spec(config.method).build(config, parts)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Method", "Parts", "build"]
