"""The name of a sequence: the same wherever it is computed, another for whatever would be another teacher's row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache_builders import manifest
from kd_kernels.cache import content_key
from kd_kernels.cache.key import FIELDS

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def test_known_answers():
    """What other processes, machines and versions of Python must find. A change of these orphans every cache there
    is."""
    cache = manifest(vocab=1 << 24, bos_policy="1 text", chat_template="7e3b")
    assert content_key(torch.tensor([0, 1]), cache).hex() == "bced15ed555cb65dab90716823a9b844"
    assert content_key(
        torch.tensor([(1 << 24) - 1, 1 << 16, 5]), cache, [2, 1]
    ).hex() == "f9bc2309ee0ae7d8c5e54925debb8367"


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_the_same_in_every_process(seed):
    """Python salts its own hash() anew in every process, after PYTHONHASHSEED."""
    program = (
        "import torch; from cache_builders import manifest; from kd_kernels.cache import content_key;"
        "print(content_key(torch.arange(100), manifest(), [60, 40]).hex())"
    )
    environment = os.environ | {
        "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), *sys.path])
    }
    child = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == content_key(torch.arange(100), manifest(), [60, 40]).hex()


def test_tells_apart_all_that_matters():
    cache, tokens = manifest(), torch.tensor([1, 2, 3, 4])
    keys = [
        content_key(tokens, cache), content_key(tokens[:3], cache), content_key(tokens.flip(0), cache),
        content_key(tokens, cache, [2, 2]), content_key(tokens, cache, [1, 3]),
        content_key(tokens, manifest(teacher=cache.teacher + "7", tokenizer=cache.tokenizer[1:])),
        *(content_key(tokens, manifest(**{field: "other"})) for field in FIELDS),
    ]
    assert len(set(keys)) == len(keys)


def test_does_not_depend_on_what_does_not_matter():
    cache, tokens = manifest(), torch.tensor([1, 2, 3, 4])
    key = content_key(tokens, cache)
    assert key == content_key(tokens.int(), cache) == content_key(tokens, cache, [4])
    assert key == content_key(torch.tensor([9, 1, 9, 2, 9, 3, 9, 4])[1::2], cache), "a strided view"
    assert key == content_key(tokens, manifest(k=3, step_nats=0, meta={"made": "elsewhere"}))


def test_refuses_what_is_no_manifest():
    with pytest.raises(TypeError, match="content_key: manifest must be a CacheManifest, got tuple"):
        content_key(torch.tensor([1, 2]), ("teacher", "tokenizer"))
