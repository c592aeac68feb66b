"""Which methods there are: a name, what it needs, its settings with the paper's defaults, and how it is put together.

A method of one's own, from any module that is imported before the configuration is read, such as those that its
``imports`` name::

    from kd_trainer.registry import MethodSpec, register

    register(MethodSpec("mine", "what it does in a line", "where it is from", build, options=MyOptions))
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kd_trainer.errors import fail
from kd_trainer.section import Section

if TYPE_CHECKING:
    from kd_trainer.config import Config
    from kd_trainer.methods.base import Method, Parts

NEEDS = {
    "teacher": "a teacher: teacher.model, or cache",
    "optional teacher": "a teacher, if there is one: teacher.model, or cache",
    "live teacher": "a teacher that runs: teacher.model, not a cache",
    "cache": "cache: the teacher's rows on disk",
    "several teachers": "teacher.model and more_teachers",
    "prompts": "texts with prompts, or rollout.prompt_tokens",
}
"""What a method can ask for beside a student and a text, and how it is given."""


@dataclass(frozen=True)
class NoOptions:
    """A method without settings of its own."""


@dataclass(frozen=True)
class MethodSpec:
    """One method, before any model is loaded.

    Args:
        name: as ``method:`` takes it.
        summary: what it does, in a line.
        source: the paper.
        build: puts it together out of a configuration and what was loaded for it.
        options: frozen dataclass of its own settings; its defaults are the paper's.
        defaults: other keys of the configuration that the paper decides, as a tree: ``{"objective": {...}}``. What the
            user writes goes before them. Its "options", for classes that several methods share, need a
            :class:`~kd_trainer.section.Section`.
        needs: keys of :data:`NEEDS`.
    """

    name: str
    summary: str
    source: str
    build: Callable[[Config, Parts], Method]
    options: type = NoOptions
    defaults: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def has_teacher(self) -> bool:
        return bool({"teacher", "optional teacher", "live teacher", "cache", "several teachers"} & set(self.needs))

    def check(self, config: Config) -> None:
        """Raise ValueError where the configuration lacks what the method needs, or has what it cannot use."""
        live, cached = config.teacher.model is not None, config.cache is not None
        where = f"for method {self.name}"
        remedy = "method: sft needs neither"
        if "live teacher" in self.needs:
            if not live:
                fail("config", "teacher.model", f"given {where}", None, "its teacher must run" if cached else remedy)
            if cached:
                holds = "a cache has what one teacher said of known texts"
                fail("config", "cache", f"absent {where}, whose teacher must run", config.cache, holds)
        elif "cache" in self.needs and not cached:
            fail("config", "cache", f"given {where}", None, "build one with kdk cache build")
        elif "teacher" in self.needs and not live and not cached:
            fail("config", "teacher.model or cache", f"given {where}", None, remedy)
        elif not self.has_teacher and cached:
            fail("config", "cache", f"absent {where}, which has no teacher", config.cache)
        if "several teachers" in self.needs and not config.more_teachers:
            fail("config", "more_teachers", f"at least one {where}", "none")
        if "several teachers" not in self.needs and config.more_teachers:
            fail("config", "more_teachers", f"absent {where}, which has one teacher at most", len(config.more_teachers))


_specs: dict[str, MethodSpec] = {}


def register(spec: MethodSpec) -> MethodSpec:
    """Add a method. A name that is taken is an error."""
    unknown = set(spec.needs) - set(NEEDS)
    if unknown:
        fail("register", f"needs of {spec.name}", "among " + ", ".join(NEEDS), ", ".join(sorted(unknown)))
    if "options" in spec.defaults and not issubclass(spec.options, Section):
        need = "a Section, since defaults decide some of them"
        fail("register", f"options of {spec.name}", need, spec.options.__name__)
    if spec.name in _specs:
        fail("register", "name", "free", repr(spec.name), "a method of this name is there already")
    _specs[spec.name] = spec
    return spec


def import_modules(names: Iterable[str]) -> None:
    """Import modules, which register methods of one's own; ValueError where there is no such module."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # it is there, and lacks another
                raise
            fail("config", "imports", "modules that Python finds", repr(name), "put its folder into PYTHONPATH")


def specs() -> dict[str, MethodSpec]:
    """Every method by its name."""
    # Each file registers its own; they import the configuration, which imports us.
    importlib.import_module("kd_trainer.methods")
    return dict(sorted(_specs.items()))


def spec(name: str) -> MethodSpec:
    """The method of this name; ValueError with the known ones where there is none."""
    known = specs()
    if name not in known:
        fail("config", "method", "one of " + ", ".join(known), repr(name))
    return known[name]


def describe() -> str:
    """What ``kdk methods`` prints."""
    lines = []
    for name, found in specs().items():
        lines.append(f"{name:<16} {found.summary}")
        lines.append(f"{'':<16} {found.source}")
        if found.needs:
            lines.append(f"{'':<16} needs " + "; ".join(NEEDS[need] for need in found.needs))
    return "\n".join(lines)
