"""Our line needs less memory than theirs: peaks of resident memory, each in a process of its own, as the README's table
has them."""

from __future__ import annotations

import importlib.util

import pytest

from bench import integrations

NEEDS = {"hf": "transformers", "trl_distillation": "trl", "trl_gkd": "trl", "trl_gold": "trl"}


@pytest.mark.parametrize("case", NEEDS)
def test_peak_is_less_than_half(case: str) -> None:
    if importlib.util.find_spec(NEEDS[case]) is None:
        pytest.skip(f"{NEEDS[case]} is not installed")
    theirs, ours = (integrations.measured_in_a_process(case, whose, 512, 1) for whose in ("theirs", "ours"))
    assert ours["peak_bytes"] < 0.5 * theirs["peak_bytes"], (ours, theirs)
