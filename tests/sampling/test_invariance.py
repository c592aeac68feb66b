"""A draw depends on its row, seed, key and position alone; and on nothing of how the work was cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kd_kernels import EnsembleLogits, LinearLogits, products, sample
from sampling_judge import far_apart

N, VOCAB = 24, 9_001
ARGUMENTS = [
    {}, {"temperature": 0.7}, {"top_k": 200}, {"top_p": 0.9}, {"min_p": 0.02},
    {"top_k": 3000, "top_p": 0.7, "min_p": 0.001},
    {"top_p": 0.5, "min_p": 0.2}, {"top_p": 0.999, "temperature": 4.0},
]


def logits(seed: int = 0) -> torch.Tensor:
    """Eighths, which every product and cast keeps; many are equal."""
    return torch.randint(-60, 60, (N, VOCAB), generator=torch.Generator().manual_seed(seed)) / 8


def place() -> dict[str, torch.Tensor]:
    return {"seed": torch.arange(N) * 7, "keys": torch.arange(N) * -(10**12), "positions": torch.arange(N) + 5}


def assert_equal(one, other) -> None:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a is None and b is None) or torch.equal(a, b), field.name


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_batches_orders_chunks_and_threads(arguments: dict) -> None:
    z, at = logits(), place()
    whole = sample(z, **at, **arguments, return_stats=True)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    shuffled = sample(z[order], **{name: x[order] for name, x in at.items()}, **arguments, return_stats=True)
    for row in (0, 7, N - 1):
        alone = sample(
            z[row : row + 1], **{name: x[row : row + 1] for name, x in at.items()}, **arguments, return_stats=True
        )
        assert all(
            torch.equal(getattr(alone, f.name)[0], getattr(whole, f.name)[row]) for f in dataclasses.fields(whole)
        )
    assert_equal(
        dataclasses.replace(whole, **{f.name: getattr(whole, f.name)[order] for f in dataclasses.fields(whole)}),
        shuffled,
    )
    assert_equal(whole, sample(z, **at, **arguments, return_stats=True, max_scratch_bytes=4_000_000))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 3)
        assert_equal(whole, sample(z, **at, **arguments, return_stats=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_panels_of_columns(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    z, at = logits(6), place()
    whole = sample(z, **at, temperature=temperature, return_stats=True)
    monkeypatch.setattr(products, "panel_rows", lambda rows, fitting: 7)
    for columns in (128, 2048, VOCAB // 128 * 128):
        monkeypatch.setattr(products, "panel_columns", lambda rows, vocab, columns=columns: columns)
        noun = LinearLogits(torch.eye(N), z.T)
        assert_equal(whole, sample(noun, **at, temperature=temperature, return_stats=True))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_backends_agree(arguments: dict) -> None:
    z, at = logits(3), place()
    ours, reference = (sample(z, **at, **arguments, return_stats=True, backend=name) for name in ("cpp", "reference"))
    assert torch.equal(ours.ids, reference.ids)
    for field in ("logprobs", "model_logprobs", "entropy", "lse"):
        torch.testing.assert_close(getattr(ours, field), getattr(reference, field), rtol=2e-6, atol=2e-6)


def test_every_noun_and_layout(backend: str) -> None:
    z, at = logits(5)[:, :300], place()
    expected = sample(z, **at, backend=backend)
    hidden, weight = torch.eye(N), torch.cat([z.T, torch.ones(5, N)])
    wide = torch.full((N, 600), torch.nan)
    wide[:, ::2] = z
    for noun in (
        LinearLogits(hidden, weight, valid_vocab=300), wide[:, ::2], EnsembleLogits((z, z)),
        LinearLogits(hidden, (z - 1).T, torch.ones(300)), LinearLogits(hidden, z.T / 2, scale=2.0),
    ):
        assert torch.equal(sample(noun, **at, backend=backend).ids, expected.ids)
    shaped = {name: x.view(4, 6) for name, x in at.items()}
    assert torch.equal(sample(z.view(4, 6, 300), **shaped, backend=backend).ids, expected.ids.view(4, 6))
    assert torch.equal(sample(z.double(), **at, backend=backend).ids, expected.ids)


def test_edges(backend: str) -> None:
    empty = sample(torch.zeros(0, 5), seed=0, return_stats=True, backend=backend)
    assert empty.ids.shape == (0,) and empty.entropy.shape == (0,)
    assert sample(torch.zeros(3, 1), seed=0, backend=backend).ids.tolist() == [0, 0, 0]
    z = logits(2)[:3, :2000]
    assert torch.equal(sample(z, seed=0, temperature=0.0, backend=backend).ids, z.argmax(1))
    assert torch.equal(sample(z, seed=0, top_p=0.0, backend=backend).ids, z.argmax(1))
    plain = sample(z, seed=0, backend=backend)
    for off in ({"top_p": 1.0}, {"top_k": 10**9}, {"min_p": 0.0}):
        assert_equal(plain, sample(z, seed=0, **off, backend=backend))


def test_rows_apart_by_more_than_an_int32_of_elements(backend: str) -> None:
    z = logits(4)[:2, :300]
    far = far_apart(*z)
    for arguments in ({}, {"top_p": 0.7, "temperature": 0.9}):
        one, other = (sample(x, seed=3, **arguments, return_stats=True, backend=backend) for x in (far, z))
        assert_equal(one, other)


@pytest.mark.parametrize(
    ("fault", "name"), [(torch.nan, "NaN"), (torch.inf, r"\+inf"), (-torch.inf, "-inf at every id")]
)
@pytest.mark.parametrize("column", [0, 200, 299])
def test_rows_that_are_no_distribution(backend: str, fault: float, name: str, column: int) -> None:
    z = logits(1)[:4, :300].clone()
    z[2] = fault if fault == -torch.inf else z[2]
    z[2, column] = fault
    with pytest.raises(ValueError, match=f"sample: logits must be free of NaN .*, got {name} in row 2"):
        sample(z, seed=0, backend=backend)
    flagged = sample(z, seed=0, check="flag", return_stats=True, backend=backend)
    assert flagged.ids[2] == -1 and flagged.logprobs[2].isnan() and flagged.entropy[2].isnan()
    assert (flagged.ids[[0, 1, 3]] >= 0).all()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"temperature": -1.0}, "sample: temperature must be at least 0, got -1.0"),
    ({"top_k": 0}, "sample: top_k must be at least 1, got 0; pass None to keep all"),
    ({"top_p": 1.5}, "sample: top_p must be in 0..1, got 1.5"),
    ({"min_p": -0.1}, "sample: min_p must be in 0..1, got -0.1"),
    ({"positions": torch.tensor([-1, 0])}, r"sample: positions must be in 0..4294967295, got -1 in row 0"),
    ({"keys": torch.tensor([1])}, r"sample: keys must be of shape \[2\] like the rows of logits, got \[1\]"),
    ({"check": "maybe"}, "sample: check must be one of raise, flag, got 'maybe'"),
    ({"backend": "gpu"}, "sample: backend must be one of"),
])
def test_what_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(2, 5), seed=0, **arguments)
