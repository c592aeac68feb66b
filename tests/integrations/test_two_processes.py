"""Two processes are the same step as one, by DDP and by FSDP2, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from processes import launch
from trainers import assert_same, assert_step, examples, lora_of, model, truth

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Of every trainer: starting processes takes longer than all that they do."""
    file = tmp_path_factory.mktemp("two") / "results.pt"
    launch([str(HERE / "two_processes.py"), str(file)], folders=[str(HERE)], timeout=300)
    return torch.load(file)


def taken(results: dict[str, tuple], trainer: str) -> tuple:
    if trainer not in results:
        pytest.skip("peft is not installed" if trainer == "lora" else "trl is not installed")
    return results[trainer]


@pytest.mark.parametrize("trainer", ("hf", "hf, accumulated", "hf, cache", "gkd", "gold", "fsdp2"))
def test_two_processes_are_the_same_step_as_one(results, trainer: str) -> None:
    assert_step(taken(results, trainer)[:2], truth(model(1), model(2), examples(), "jsd(beta=0.5)"))


def test_fsdp2_gathers_the_head_once(results) -> None:
    assert taken(results, "fsdp2")[2] == 1


def test_lora_with_its_own_base_as_teacher(results) -> None:
    got = taken(results, "lora")
    assert_step(got, truth(lora_of(model(1)), model(1), examples(), "jsd(beta=0.5)"))
    assert all("lora" in name for name in got[1])


def test_distillation_trainer_is_theirs(results) -> None:
    assert_step(taken(results, "distillation"), taken(results, "their distillation"))


def test_trls_own_gkd_gradient_is_half_of_that(results) -> None:
    """What kd_trainer.integrations.trl says is different: were TRL to mend it, its module's text must follow."""
    _, got = taken(results, "their gkd")
    _, want = truth(model(1), model(2), examples(), "jsd(beta=0.5)")
    assert_same({name: 2 * gradient for name, gradient in got.items()}, want)
