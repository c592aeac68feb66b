"""What the tests of this folder share with those of the trainer."""

from __future__ import annotations

from transformers_fixtures import fresh_accelerator, one_thread  # noqa: F401  (for every test of this folder)
