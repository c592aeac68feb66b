"""The examples run as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, tmp_path: Path) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)], capture_output=True, text=True, env=env, cwd=tmp_path,
        timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_plain_loop(tmp_path) -> None:
    losses = [float(line.split()[-1]) for line in run("plain_loop.py", tmp_path).splitlines()]
    assert losses[-1] < 0.8 * losses[0]


def test_lightning_module(tmp_path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    assert "after 16 steps" in run("lightning_module.py", tmp_path)
