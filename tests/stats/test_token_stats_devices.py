"""token_stats wherever it runs: the same tests on a CPU and, marked ``gpu``, on a GPU, by its default backend."""

from __future__ import annotations

import pytest
import torch

from judge import Dense, Linear
from kd_kernels import LinearLogits, token_stats
from kd_kernels.testing import linear_pair, logits_pair
from stats_judge import compare

IDS = torch.tensor([0, 4999, 17, 2048, 2047, 300, 4095])
UPSTREAM = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, 1e-3, 7.0])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def linear(dtype: torch.dtype) -> Linear:
    pair = linear_pair(7, 5003, 64, 64, dtype)
    bias = torch.linspace(-1, 1, 5003).to(dtype)
    return Linear(pair.student_hidden, pair.student_weight, bias, scale=0.9, softcap=12.0, valid_vocab=5000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads(dtype: torch.dtype, device: str) -> None:
    compare(linear(dtype), IDS, upstream=UPSTREAM, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["peaked", "masked", "shifted"])
def test_logits(kind: str, dtype: torch.dtype, device: str) -> None:
    logits, _ = logits_pair(kind, 7, 5003, dtype)
    compare(Dense(logits), IDS, upstream=UPSTREAM, device=device)


@pytest.mark.parametrize("softcap", [None, 4.0, 0.5])
def test_ranks_of_a_row_are_a_permutation(softcap: float | None, device: str) -> None:
    """The id's logit, formed on its own, equals itself among the others to the last bit, and those that tie with it."""
    generator, vocab = torch.Generator().manual_seed(0), 5003
    whole = lambda *shape: torch.randint(-3, 4, shape, generator=generator).float().to(device)  # noqa: E731
    bias = torch.randn(vocab, generator=generator).to(device)
    noun = LinearLogits(whole(1, 8).expand(vocab, 8), whole(vocab, 8), bias, 0.37, softcap)
    stats = token_stats(noun, torch.arange(vocab, device=device))
    assert torch.equal(stats.rank.sort().values, torch.arange(vocab, device=device))
    assert bool((stats.argmax == stats.rank.argmin()).all())


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_what_is_wrong_shows() -> None:
    hidden = linear(torch.bfloat16).hidden.cuda().requires_grad_()
    weight = linear(torch.bfloat16).weight.cuda().requires_grad_()
    logits, ids = torch.randn(7, 5003, device="cuda"), IDS.cuda()
    logits[2], logits[3, 5], ids[5] = -torch.inf, torch.nan, 5003
    token_stats(LinearLogits(hidden, weight), IDS.cuda(), k=5).logprob.mean().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_stats(LinearLogits(hidden, weight), ids, k=5).logprob.mean().backward()
        stats = token_stats(logits, ids, k=6000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats.logprob.isnan().tolist() == [False, False, True, True, False, True, False]
    assert stats.argmax.lt(0).tolist() == stats.lse.isnan().tolist() == [False, False, True, True, False, False, False]
    assert stats.rank.lt(0).tolist() == stats.in_top_k.logical_not().tolist() == stats.logprob.isnan().tolist()
