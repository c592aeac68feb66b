"""What tests of methods share. They import their judge by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kd_trainer.tiny import save_tiny_model

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an untrained two-layer Llama, with other weights than ``tiny``."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    save_tiny_model(folder, layers=2)
    return str(folder)
