"""Peak memory, and a table out of results that are known."""

from __future__ import annotations

import pytest
import torch

from kd_trainer.study.peak import STATUS, peak_memory
from kd_trainer.study.report import COLUMNS, summary, table


@pytest.mark.skipif(torch.cuda.is_available() or not STATUS.exists(), reason="reads what Linux says of a process")
def test_a_peak_is_of_its_block_alone():
    torch.ones(64 << 18).sum()  # 64 MiB, before
    with peak_memory() as small:
        torch.ones(16 << 18).sum()
    with peak_memory() as large:
        torch.ones(128 << 18).sum()
    assert 14 << 20 < small.bytes < 48 << 20 and 126 << 20 < large.bytes < 160 << 20


def _run(method: str, seed: int, **values: float | None) -> dict:
    same = dict.fromkeys((*COLUMNS, "tokens_per_s"), 0.5)
    return {"method": method, "seed": seed, "peak_bytes": 2**20} | same | values


def test_means_and_deviations_over_seeds():
    runs = [_run("sft", seed, exact=exact) for seed, exact in enumerate((0.1, 0.2, 0.3))]
    runs.append(_run("kid", 0, peak_bytes=None))
    result = {"runs": runs, "latency": {"steps": {"sft": {"relative": 1.0}, "kid": {"relative": 1.75}}}}
    found = summary(result)
    assert found["sft"]["exact"] == pytest.approx((0.2, 0.1)) and found["kid"]["exact"] == (0.5, None)
    _, _, sft, kid = table(result).splitlines()
    assert sft.startswith("| SFT | 20.0% ± 10.0% | 50.0% ± 0.0% | 0.500 ± 0.000 |")
    assert sft.endswith("| 1.00 | 0 | 1 MiB |")
    assert kid.startswith("| KID | 50.0% | 50.0% | 0.500 |") and kid.endswith("| 1.75 | 0 |  |")
