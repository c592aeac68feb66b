"""The methods that a study compares, each with its paper's defaults, and the run of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kd_trainer import registry
from kd_trainer.config import Config, from_tree
from kd_trainer.study.stages import Stages


@dataclass(frozen=True)
class Entry:
    """One row of the table: a registered method, and the keys of its configuration that name the row."""

    label: str
    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)


def _kd(label: str, divergence: str) -> Entry:
    return Entry(label, "kd", {"objective": {"divergence": divergence}})


ENTRIES: Mapping[str, Entry] = {
    "sft": Entry("SFT", "sft"),
    "fkl": _kd("forward KL", "forward_kl"),
    "rkl": _kd("reverse KL", "reverse_kl"),
    "jsd": _kd("JSD(0.5)", "jsd(beta=0.5)"),
    "sfkl": _kd("skew forward KL(0.1)", "skew_forward_kl(alpha=0.1)"),
    "srkl": _kd("skew reverse KL(0.1)", "skew_reverse_kl(alpha=0.1)"),
    "kid": Entry("KID", "kid"),
    "gkd": Entry("GKD, half on-policy", "gkd"),
    "gkd_on": Entry("GKD, on-policy", "gkd", {"options": {"student": 1.0}}),
    "distillm": Entry("DistiLLM", "distillm", {"options": {"threshold": 0.5, "raise_by": 0.0}}),
    "skd": Entry("SKD", "skd"),
    "first": Entry("FIRST", "first"),
}
"""By the names that --methods takes. DistiLLM's threshold is held at a half: a run of less than an epoch never
validates, and would keep it at its start, 0."""


def config_of(stages: Stages, name: str, seed: int) -> Config:
    """The run of one entry with one seed; everything that is not the method's own is the same for all."""
    size, entry = stages.size, ENTRIES[name]
    spec = registry.spec(entry.method)
    tree: dict[str, Any] = {
        "out": str(stages.out / "runs" / f"{name}-{seed}"), "method": entry.method, "seed": seed,
        "student": {"model": str(stages.start_model)},
        "data": dataclasses.asdict(stages.data("train", size.method_questions)),
        "optim": {"lr": size.lr},
        "rollout": {"max_new_tokens": size.max_new_tokens},
        "train": {
            "steps": size.steps, "batch_tokens": size.batch_tokens, "precision": size.precision, "tensorboard": False,
        },
    }
    if "cache" in spec.needs:
        tree["cache"] = str(stages.out / "cache")
    elif spec.has_teacher:
        tree["teacher"] = {"model": str(stages.teacher_model), "dtype": size.teacher_dtype}
    return from_tree(Config, tree | dict(entry.changes))
