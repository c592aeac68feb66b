"""The decoder of the cache under a fuzzer that is guided by coverage, with AddressSanitizer and UBSan; for a longer run
by hand:

    KD_FUZZ_SECONDS=3600 pytest tests/fuzz
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from kd_kernels._backend import extension
from kd_kernels.cache import CachedRows, CacheManifest
from kd_kernels.cache.codec import RowModel, learn_model
from kd_kernels.logits import SparseTargets

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SECONDS = float(os.environ.get("KD_FUZZ_SECONDS", "10"))
TARGET_FLAGS = (
    "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    "-fsanitize-coverage=trace-pc,trace-cmp", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}",
)

# The decoder that reads many numbers at a time, or, where the processor cannot run it, the plain one again.
VECTOR_FLAGS = ("-DKD_ISA=avx2", *(("-mavx2", "-mfma") if extension().isa != "baseline" else ()))

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="fuzz: there is no g++")


def build(folder: Path, *targets: tuple[Path, tuple[str, ...]]) -> Path:
    """The fuzzer of these sources, each compiled with flags of its own."""
    objects = []
    for source, flags in [
        (HERE / "driver.cpp", ("-std=c++17", "-O2")),
        *((source, (*TARGET_FLAGS, *flags)) for source, flags in targets)
    ]:
        objects.append(folder / f"{len(objects)}.o")
        subprocess.run(["g++", *flags, "-c", source, "-o", objects[-1]], check=True, timeout=300)
    subprocess.run(["g++", "-fsanitize=address,undefined", *objects, "-o", folder / "fuzz"], check=True, timeout=300)
    return folder / "fuzz"


def fuzz(program: Path, corpus: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    crash = f"crash={program.parent / 'crash.bin'}"
    command = [program, f"seconds={seconds}", crash, corpus]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds + 300)


def test_the_fuzzer_finds_what_no_blind_search_finds(tmp_path):
    """A read one byte too far, behind a magic number of four bytes and a length that has to fit."""
    (tmp_path / "corpus").mkdir()
    program = build(tmp_path, (HERE / "planted_bug.cpp", ()))
    found = fuzz(program, tmp_path / "corpus", 240)
    assert found.returncode != 0 and "heap-buffer-overflow" in found.stderr
    again = subprocess.run([program, tmp_path / "crash.bin"], capture_output=True, text=True)
    assert "heap-buffer-overflow" in again.stderr


def seed(rows: int, manifest: CacheManifest, ranked: bool) -> bytes:
    """A model and rows as a writer makes them, in the form that decode_rows.cpp takes."""
    random = torch.Generator().manual_seed(rows)
    counts = torch.randint(manifest.k + 1, (rows,), generator=random)
    ids = torch.cat([torch.randperm(manifest.vocab, generator=random)[:n] for n in counts.tolist()])
    logprobs = torch.cat([
        (
            -torch.rand(n, generator=random) * 8 - 1
        ).log_softmax(0).sort(descending=True).values - 0.1 for n in counts.tolist()
    ])
    entries, stored = len(ids), len(manifest.stored_temperatures)
    targets = SparseTargets(
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)), ids, logprobs,
        torch.full((rows,), -2.3) if manifest.tail else None, torch.rand(entries) if manifest.importance else None,
        manifest.temperatures, torch.rand(rows, len(manifest.temperatures)),
    )
    part = CachedRows(targets, -5 * torch.rand(rows, generator=random))
    seen = torch.bincount(ids, minlength=manifest.vocab).int() if ranked else None
    model = learn_model([part], seen, manifest)
    payload = RowModel(model, manifest).encode(part)
    head = struct.pack(
        "<IIIHHfBBBB", manifest.vocab - 1, entries, len(model), manifest.k, rows, manifest.step_nats, stored,
        manifest.tail, int(manifest.importance), 0,
    )
    return head + model + payload


def test_the_decoder_never_reads_or_writes_out_of_bounds(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    fields = {"teacher": "a", "tokenizer": "b", "vocab": 500, "k": 12}
    kinds = {
        "rounded": {}, "exact": {"step_nats": 0.0}, "weighted": {"tail": False, "importance": True},
        "temperatures": {"temperatures": (1.0, 2.0, 4.0), "step_nats": 1 / 8},
    }
    for name, changes in kinds.items():
        for ranked in (False, True):
            (corpus / f"{name}-{ranked}").write_bytes(seed(20, CacheManifest(**fields | changes), ranked))
    codec = ROOT / "csrc" / "codec"
    program = build(
        tmp_path, (HERE / "decode_rows.cpp", ()), (codec / "codec.cpp", ()), (codec / "decode_rows.cpp", ()),
        (codec / "decode_rows.cpp", VECTOR_FLAGS),
    )
    found = fuzz(program, corpus, SECONDS)
    assert found.returncode == 0, found.stderr[-4000:]
    covered = json.loads(found.stdout)
    print(covered)
    assert covered["runs"] > 100 and covered["corpus"] > covered["seeds"]  # it went on from what writers make
    assert covered["edges"] > 300  # and through most of the decoder
