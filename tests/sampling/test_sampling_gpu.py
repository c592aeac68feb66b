"""sample on a GPU: the draws of the reference, without a synchronisation, inside a CUDA graph. All else needs none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from kd_kernels import LinearLogits, Sampled, accept_or_resample, sample, sampled_targets

pytestmark = pytest.mark.gpu

ARGUMENTS = [
    {}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 200}, {"top_p": 0.9}, {"min_p": 0.02},
    {"top_k": 3000, "top_p": 0.7, "min_p": 0.001, "temperature": 1.5},
]


def eighths(rows: int, vocab: int, seed: int = 0) -> Tensor:
    """What every product and cast keeps; many are equal."""
    return torch.randint(-60, 60, (rows, vocab), generator=torch.Generator().manual_seed(seed)) / 8


def place(rows: int, device: str = "cuda") -> dict[str, Tensor]:
    numbers = torch.arange(rows, device=device)
    return {"seed": numbers * 7, "keys": numbers * -(10**12), "positions": numbers + 5}


def heads(rows: int, vocab: int, dtype: torch.dtype) -> LinearLogits:
    """Of products that are whole numbers below 2^8, exact in any order and dtype."""
    generator = torch.Generator().manual_seed(1)
    whole = lambda *shape: torch.randint(-1, 2, shape, generator=generator).to("cuda", dtype)  # noqa: E731
    return LinearLogits(whole(rows, 64), whole(vocab, 64), scale=0.5)


def assert_equal(one: Sampled, other: Sampled) -> None:
    for field in dataclasses.fields(one):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


@pytest.mark.parametrize("vocab", [777, 50_257, 131_072])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_draws_are_those_of_the_cpu(arguments: dict, vocab: int) -> None:
    logits = eighths(16, vocab)
    ours = sample(logits.cuda(), **place(16), **arguments, return_stats=True)
    theirs = sample(logits, **place(16, "cpu"), **arguments, return_stats=True)
    assert torch.equal(ours.ids.cpu(), theirs.ids)
    for field in ("logprobs", "model_logprobs", "entropy", "lse"):
        torch.testing.assert_close(getattr(ours, field).cpu(), getattr(theirs, field), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_heads_batches_and_chunks(rows: int, dtype: torch.dtype) -> None:
    noun, at = heads(rows, 50_257, dtype), place(rows)
    whole = sample(noun, **at, top_p=0.9, return_stats=True)
    assert torch.equal(whole.ids, sample(noun, **at, top_p=0.9, backend="reference").ids)
    pieces = sample(noun, **at, top_p=0.9, return_stats=True, max_scratch_bytes=8 << 20)
    assert torch.equal(pieces.ids, whole.ids)
    order = torch.randperm(rows, device="cuda")
    moved = dataclasses.replace(noun, hidden=noun.hidden[order])
    assert torch.equal(sample(moved, **{name: x[order] for name, x in at.items()}, top_p=0.9).ids, whole.ids[order])


def test_nothing_synchronises_and_a_graph_captures_it() -> None:
    noun, at = heads(33, 5003, torch.bfloat16), place(33)
    filters = dict(temperature=0.8, top_k=50, top_p=0.9)
    call = lambda: sample(noun, **at, **filters, check="flag", return_stats=True)  # noqa: E731
    expected = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
        with pytest.raises(RuntimeError, match='check must be "flag" while a CUDA graph is captured, got "raise"'):
            sample(noun, seed=0)
    graph.replay()
    assert_equal(captured, expected)


def test_rows_that_are_no_distribution_on_a_gpu() -> None:
    logits = eighths(4, 777).cuda()
    logits[1, 5], logits[2], logits[3, 9] = torch.nan, -torch.inf, torch.inf
    found = sample(logits, seed=0, check="flag")
    assert found.ids.lt(0).tolist() == found.logprobs.isnan().tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match="sample: logits must be free of NaN .*, got NaN in row 1"):
        sample(logits, seed=0)
    assert sample(logits[:1], seed=0, check="flag", temperature=torch.tensor([-1.0], device="cuda")).ids.item() == -1


@pytest.mark.parametrize("vocab", [777, 50_257])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_speculative_sampling_on_a_gpu(arguments: dict, vocab: int) -> None:
    teacher = eighths(48, vocab)
    student = teacher + eighths(48, vocab, seed=1) / 8
    law = arguments | {f"student_{name}": value for name, value in arguments.items()}
    drafts = sample(student, **place(48, "cpu"), **arguments).ids
    ours, theirs = (
        accept_or_resample(
            drafts.to(device), teacher.to(device), "speculative", student=student.to(device), **place(48, device), **law
        )
        for device in ("cuda", "cpu")
    )
    assert torch.equal(ours.ids.cpu(), theirs.ids) and torch.equal(ours.accepted.cpu(), theirs.accepted)
    for field in ("logprobs", "model_logprobs"):
        torch.testing.assert_close(getattr(ours, field).cpu(), getattr(theirs, field), rtol=3e-6, atol=3e-6)


def test_speculation_from_heads_in_chunks_on_a_gpu() -> None:
    teacher, at = heads(300, 50_257, torch.bfloat16), place(300)
    student = dataclasses.replace(teacher, weight=teacher.weight.roll(1, 0))
    drafts = sample(student, **at).ids
    run = lambda budget: accept_or_resample(  # noqa: E731
        drafts, teacher, "speculative", student=student, **at, max_scratch_bytes=budget
    )
    whole, pieces = run(None), run(64 << 20)
    assert torch.equal(whole.ids, pieces.ids) and torch.equal(whole.accepted, pieces.accepted)


@pytest.mark.parametrize("arguments", [{}, {"certain": 40}, {"certain": 200, "proposal_temperature": 1.6}], ids=str)
def test_sampled_targets_are_those_of_the_cpu(arguments: dict) -> None:
    logits = eighths(16, 50_257)
    ours = sampled_targets(logits.cuda(), 50, **place(16), **arguments)
    theirs = sampled_targets(logits, 50, **place(16, "cpu"), **arguments)
    assert torch.equal(ours.offsets.cpu(), theirs.offsets) and torch.equal(ours.ids.cpu(), theirs.ids)
    torch.testing.assert_close(ours.logprobs.cpu(), theirs.logprobs, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(ours.importance.cpu(), theirs.importance, rtol=2e-5, atol=0)
    noun, at = heads(300, 50_257, torch.bfloat16), place(300)
    whole, pieces = (sampled_targets(noun, 50, **at, **arguments, max_scratch_bytes=b) for b in (None, 40 << 20))
    assert torch.equal(whole.ids, pieces.ids) and torch.equal(whole.importance, pieces.importance)


def test_compiles_into_one_graph() -> None:
    noun = heads(8, 5003, torch.bfloat16)
    step = lambda hidden: sample(LinearLogits(hidden, noun.weight), seed=3, check="flag").ids  # noqa: E731
    assert torch.equal(torch.compile(step, fullgraph=True)(noun.hidden), step(noun.hidden))
