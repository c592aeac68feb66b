"""The fixtures do what the rest of the suite relies on."""

from __future__ import annotations

import types

import torch


def allocate_as(module: str, text: str) -> torch.Tensor:
    """Evaluate an allocation as if it were written in the named module."""
    return types.FunctionType(compile(text, module, "eval"), {"__name__": module, "torch": torch})()


def test_library_memory_is_poisoned() -> None:
    for text in ("torch.empty(3)", "torch.empty_like(torch.ones(3))", "torch.ones(3).new_empty(3)"):
        assert allocate_as("kd_kernels.loss.api", text).isnan().all(), text
    assert (allocate_as("kd_kernels", "torch.empty(3, dtype=torch.int64)") == torch.iinfo(torch.int64).min).all()


def test_other_memory_is_not_poisoned(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "fill_", None)  # a call would raise
    allocate_as("kd_trainer", "torch.empty(3)")


def test_unpoisoned_leaves_torch_alone(unpoisoned) -> None:
    assert torch.empty.__name__ == "empty" and type(torch.empty).__name__ == "builtin_function_or_method"
