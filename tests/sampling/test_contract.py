"""Draws against an oracle that was written from DRAWS.md alone, and against the vectors printed there."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from kd_kernels import _backend, sample, testing
from kd_kernels.sampling import philox
from sampling_judge import assert_samples

DRAWS = (Path(philox.__file__).parent / "DRAWS.md").read_text()
KNOWN = [[[int(word, 16) for word in cell.split()] for cell in line] for line in
         re.findall(r"^\| ((?:\w{8} ){3}\w{8}) \| (\w{8} \w{8}) \| ((?:\w{8} ){3}\w{8}) \|$", DRAWS, re.M)]
"""Random123's vectors as the page prints them: counter, key, words."""

EDGES = [0, 1, -1, (1 << 63) - 1, -(1 << 63), 0x0123456789ABCDEF, 0xDEADBEEF]


def test_the_page_prints_random123s_vectors() -> None:
    """From kat_vectors of Random123, "philox4x32 10": all bits clear, all bits set, the digits of pi."""
    assert [sum(words) for _, _, words in KNOWN] == [
        0x6627E8D5 + 0xE169C58D + 0xBC57AC4C + 0x9B00DBD8, 0x408F276D + 0x41C83B0E + 0xA20BC7C6 + 0x6D5451FD,
        0xD16CFE09 + 0x94FDCCEB + 0x5001E420 + 0x24126EA1,
    ]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_has_the_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    as_tensors = lambda words: tuple(torch.tensor(word) for word in words)  # noqa: E731
    assert [int(word) for word in philox.philox4x32(as_tensors(counter), as_tensors(key))] == expected
    assert list(oracles.philox(tuple(counter), tuple(key))) == expected
    assert _backend.extension().philox(counter, key) == expected


def test_words_are_addressed_as_the_page_says() -> None:
    for seed in EDGES:
        for key in EDGES:
            for position in (0, 7, (1 << 32) - 1):
                place = oracles.Place(seed, key, position)
                names = (torch.tensor(x) for x in (seed, key, position))
                words = philox.words(*names, philox.ACCEPT, torch.tensor([0, 65_535]), 4095)
                assert words.tolist() == [list(place.words(3, block, 4095)) for block in (0, 65_535)]


def test_uniforms_are_inside_of_0_and_1_and_exact() -> None:
    ends = torch.tensor([0, 1, 2**32 - 1])
    assert philox.uniform(ends).tolist() == [2.0**-33, 3 * 2.0**-33, 1 - 2.0**-33]
    pairs = torch.tensor([[0, 0], [0, 4096], [2**32 - 1, 2**32 - 1]])
    assert philox.fine_uniform(pairs).tolist() == [2.0**-53, 3 * 2.0**-53, 1 - 2.0**-53]


def _vectors() -> list[tuple]:
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\d+) \| (\S+) \| ([^|]*) ?\| (\d+) \| (\S+) \| (\S+) \|$", DRAWS, re.M)
    signed = lambda digits: int(digits, 16) - (1 << 64 if int(digits, 16) >> 63 else 0)  # noqa: E731
    parse = lambda text: {  # noqa: E731
        name: (int if name == "top_k" else float)(value) for name, value in re.findall(r"(\w+)=(\S+)", text)
    }
    return [
        (
            signed(seed), signed(key), int(position), {"temperature": float(t), **parse(filters)}, int(token), float(a),
            float(b),
        )
        for seed, key, position, t, filters, token, a, b in rows
    ]


def test_the_pages_test_vectors(backend: str) -> None:
    row = (torch.arange(300) * 37 % 101).float() / 8
    vectors = _vectors()
    assert len(vectors) == 11
    for seed, key, position, arguments, token, logprob, model_logprob in vectors:
        place = dict(seed=seed, keys=torch.tensor([key]), positions=torch.tensor([position]))
        found = sample(row[None], **place, **arguments, return_stats=True, backend=backend)
        draw = oracles.sample(row.tolist(), oracles.Place(seed, key, position), **arguments)
        assert found.ids.tolist() == [token] == [draw.id]
        for value, ours, true in (
            (logprob, found.logprobs, draw.logprob), (model_logprob, found.model_logprobs, draw.model_logprob),
            (15.7266569, found.lse, 15.7266569), (4.1614118, found.entropy, 4.1614118),
        ):
            assert float(ours) == pytest.approx(value, abs=4e-6) and true == pytest.approx(value, abs=1e-6)


VOCABS = (1, 2, 127, 128, 129, 300, 1025)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", ["uniform", "peaked", "near_0.3", "one_hot", "masked", "shifted", "padded"])
def test_draws_are_the_oracles(kind: str, vocab: int, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        _, logits = testing.logits_pair(kind, 6, vocab, dtype)
        exact = logits if dtype == torch.float64 else logits.float()
        for arguments in ({}, {"temperature": 0.7}, {"temperature": [0.0, 0.3, 1.0, 1.7, 40.0, math.inf]}):
            assert_samples(exact, 11, EDGES[:6], [0, 1, 2, 3, 1 << 31, (1 << 32) - 1], arguments, backend=backend)


FILTERS = {
    "top_k": st.one_of(st.none(), st.integers(1, 50), st.just(1 << 40)),
    "top_p": st.one_of(st.none(), st.sampled_from([0.0, 0.05, 0.5, 0.9, 0.999, 1.0])),
    "min_p": st.one_of(st.none(), st.sampled_from([0.0, 0.01, 0.3, 1.0])),
}


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@settings(max_examples=60)
@given(data=st.data())
def test_filtered_draws_are_the_oracles(backend: str, data: st.DataObject) -> None:
    """Few distinct values, so that ties decide; masked ids; every row with arguments of its own, or all with the
    same."""
    vocab = data.draw(st.sampled_from([1, 3, 60, 128, 200, 300]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    values = torch.tensor([-math.inf, -6.0, -3.0, -0.0, 0.0, 0.5, 2.0, 4.0])
    logits = values[torch.randint(0 if data.draw(st.booleans()) else 1, 8, (4, vocab), generator=generator)]
    logits[:, vocab // 2] = 1.0
    arguments = {name: data.draw(strategy) for name, strategy in FILTERS.items()}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    arguments["temperature"] = data.draw(st.sampled_from([0.0, 1e-30, 0.5, 1.0, 3.0, math.inf]))
    if data.draw(st.booleans()):
        arguments = {
            name: [value] * 2 + [value / 2 if name == "temperature" else 1] * 2 for name, value in arguments.items()
        }
        arguments = {name: list(map(int if name == "top_k" else float, value)) for name, value in arguments.items()}
    seeds = [data.draw(st.integers(-(1 << 63), (1 << 63) - 1)) for _ in range(4)]
    assert_samples(logits, seeds, seeds[::-1], [0, 1, 2, 3], arguments, backend=backend)
