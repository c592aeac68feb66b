"""Rows that lie apart, as scratch on a GPU does, are read in whole vectors past their end, which changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kd_kernels import divergences, kd_loss, sample, token_stats, topk_targets
from kd_kernels.loss.plan import RowJob
from kd_kernels.products import RawRows, SparseRows
from kd_kernels.row_launch import readable_columns

COLUMNS, PITCH = 777, 832


def apart(logits: Tensor) -> Tensor:
    """The same rows, with NaN between."""
    base = torch.full((logits.shape[0], PITCH), torch.nan, dtype=logits.dtype)
    base[:, :COLUMNS] = logits
    return base[:, :COLUMNS]


def noise(seed: int) -> Tensor:
    return 3.0 * torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(seed))


def test_how_far_rows_may_be_read() -> None:
    base = torch.empty(4, PITCH)
    near = base.flatten()[: 4 * 784 - 7]
    assert readable_columns(base[:, :COLUMNS]) == 784
    assert readable_columns(base[:, :COLUMNS], torch.empty(4, COLUMNS)) == COLUMNS  # the other's rows are adjacent
    assert readable_columns(base[:, 60:828]) == 768
    assert readable_columns(base[:, 60:]) == 772  # there is nothing past the row's end
    assert readable_columns(near.as_strided((4, COLUMNS), (784, 1))) == 784
    assert readable_columns(near.clone().as_strided((4, COLUMNS), (784, 1))) == COLUMNS  # nor past the last row's
    assert readable_columns(torch.empty(4, 1)) == 1


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_readers(dtype: torch.dtype) -> None:
    logits, ids = noise(0).to(dtype), torch.tensor([0, 776, 300, 5])
    for call in (
        lambda z: list(token_stats(z, ids, backend="triton").__dict__.values())[:6],
        lambda z: [topk_targets(z, 9, backend="triton").ids, topk_targets(z, 9, backend="triton").tail_logprob],
        lambda z: list(sample(z, seed=1, return_stats=True, backend="triton").__dict__.values()),
        lambda z: [kd_loss(noise(1), z, "jsd(beta=0.3)", reduction="none", backend="triton").loss],
    ):
        for got, expected in zip(call(apart(logits)), call(logits)):
            assert torch.equal(got, expected)


@pytest.mark.interpret
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd(beta=0.3)"])  # without and with a third walk
@pytest.mark.parametrize("is_sparse", [False, True])
def test_gradients_in_place(is_sparse: bool, divergence: str, gradient_dtype: torch.dtype) -> None:
    from kd_kernels.loss import triton_impl

    job = RowJob(divergences.parse(divergence), 1.0, 1.0, 0.5, "bucket")
    weight, labels = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64), torch.tensor([0, 5, 776, 3])
    outcomes = []
    for place in (Tensor.clone, apart):
        raw = place(noise(2))
        gradient = raw
        if gradient_dtype != raw.dtype:
            in_place = raw.view(gradient_dtype)[:, :COLUMNS] if place is apart else None
            gradient = torch.empty(4, COLUMNS, dtype=gradient_dtype) if in_place is None else in_place
        if is_sparse:
            logprobs, ids = noise(3).log_softmax(1).topk(5)
            starts = torch.arange(4) * 5
            tail = (1 - logprobs.exp().sum(1)).log()
            teacher = SparseRows(starts, starts + 5, ids.flatten(), logprobs.flatten(), tail, None)
            loss, _, status = triton_impl.sparse_rows(RawRows(raw), teacher, job, labels, weight, gradient, False)
        else:
            teacher = RawRows(place(noise(3)))
            loss, _, status = triton_impl.dense_rows(RawRows(raw), teacher, job, labels, weight, gradient, False)
        assert not status.any()
        outcomes.append((loss, gradient.clone()))
    assert torch.equal(outcomes[0][0], outcomes[1][0]) and torch.equal(outcomes[0][1], outcomes[1][1])
    assert outcomes[0][1].isfinite().all() and outcomes[0][1][0].any() and not outcomes[0][1][1].any()
