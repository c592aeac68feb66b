"""Two processes are the same step as one, by DDP and by FSDP2, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import launch
from trainers import assert_same, examples, model, truth

HERE = Path(__file__).resolve().parent


def result_of(trainer: str, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    launch([str(HERE / "two_processes.py"), trainer, str(folder)], folders=[str(HERE)], timeout=180)
    return torch.load(folder / "result.pt")


@pytest.mark.parametrize("trainer", ("hf", "gkd", "fsdp2"))
def test_two_processes_are_the_same_step_as_one(tmp_path, trainer: str) -> None:
    if trainer == "gkd":
        pytest.importorskip("trl", reason="trl is not installed")
    loss, want = truth(model(1), model(2), examples(), "jsd")
    got_loss, got = result_of(trainer, tmp_path)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert_same(got, want)


def test_trls_own_gradient_is_half_of_that(tmp_path) -> None:
    """What kd_trainer.integrations.trl says is different: were TRL to mend it, its module's text must follow."""
    pytest.importorskip("trl", reason="trl is not installed")
    _, want = truth(model(1), model(2), examples(), "jsd")
    _, got = result_of("their_gkd", tmp_path)
    assert_same({name: 2 * gradient for name, gradient in got.items()}, want)
