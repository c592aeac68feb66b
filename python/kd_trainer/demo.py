"""``kdk demo``: a real model is distilled on this machine, in minutes.

A teacher scores a text once into a cache. A student cut from the teacher's layers learns from that cache, and its
twin learns the same text for as many steps by next-token loss alone. Both are compared with the teacher on articles
that neither has seen.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kd_trainer import assets
from kd_trainer.caching.build import build_cache
from kd_trainer.caching.options import CacheOptions
from kd_trainer.config import Config, DataConfig, OptimConfig, StudentConfig, TeacherConfig, TrainConfig
from kd_trainer.data import load_documents
from kd_trainer.evaluate import evaluate, table
from kd_trainer.models import CausalLM, cut_layers, load_pretrained, load_tokenizer, vocab_of
from kd_trainer.plot import plot_comparison
from kd_trainer.tiny import make_tiny
from kd_trainer.trainer import train

SFT, DISTILLED, UNTRAINED = "next-token loss", "distilled", "untrained"


@dataclass(frozen=True)
class Scale:
    """The sizes of a demo."""

    teacher: str
    layers: tuple[int, ...]
    data: DataConfig
    held_out: DataConfig
    optim: OptimConfig
    steps: int
    batch_tokens: int
    k: int = 64


def smollm2_scale() -> Scale:
    """SmolLM2-135M-Instruct, 10 of its 30 layers, Wikipedia introductions: some eight minutes on two cores."""
    data = DataConfig(source=assets.WIKI_INTROS, max_length=256, holdout=0.02, limit=360)
    return Scale(
        teacher=assets.SMOLLM2, layers=(*range(0, 27, 3), 29), data=data,
        held_out=dataclasses.replace(data, part="holdout", limit=32),
        optim=OptimConfig(lr=1e-3), steps=80, batch_tokens=512,
    )


def tiny_scale(out: Path) -> Scale:
    """A teacher that is trained on the spot, on a text that is made on the spot: seconds, and no download."""
    teacher, text = make_tiny(out / "tiny")
    data = DataConfig(source=str(text), max_length=96, holdout=0.5)
    return Scale(
        teacher=str(teacher), layers=(0, 3), data=data, held_out=dataclasses.replace(data, part="holdout"),
        optim=OptimConfig(lr=3e-3), steps=60, batch_tokens=256, k=16,
    )


def run_demo(out: Path, *, offline_tiny: bool = False, fresh: bool = False) -> dict[str, object]:
    """Run the demo, or go on with one that was stopped.

    ``out`` gets ``cache/``, ``sft/`` and ``distilled/`` (runs with ``model/``, metrics and plot), ``demo.json`` and
    ``demo.png``.

    Returns:
        What is in ``demo.json``: the result of :func:`~kd_trainer.evaluate.evaluate` and ``"seconds"`` by phase.
    """
    if fresh:
        for name in ("tiny", "cache", "sft", "distilled"):
            shutil.rmtree(out / name, ignore_errors=True)
    seconds: dict[str, float] = {}
    with _phase("teacher and text", seconds):
        scale = tiny_scale(out) if offline_tiny else smollm2_scale()
        if not offline_tiny:
            assets.smollm2()
            assets.wiki_intros()
    with _phase("score the text into the cache", seconds):
        numbers = build_cache(scale.teacher, scale.data, out / "cache", CacheOptions(k=scale.k))
    print(
        f"{numbers['rows']:,} rows of {numbers['documents']:,} documents in {numbers['bytes']:,} bytes, "
        f"{numbers['bytes_per_row']:.0f} a row"
    )
    runs = {}
    for name, method, folder in ((SFT, "sft", "sft"), (DISTILLED, "kd", "distilled")):
        with _phase(f"train: {name}", seconds):
            runs[name] = train(demo_config(scale, method, out / folder, out / "cache"))
            shutil.rmtree(out / folder / "checkpoints", ignore_errors=True)  # of no use to a run that is finished
    with _phase("evaluate on held-out text", seconds):
        result = compare(scale, runs)
    result["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    (out / "demo.json").write_text(json.dumps(result, indent=1))
    plot_comparison({name: model.parent / "metrics.jsonl" for name, model in runs.items()}, result, out / "demo.png")
    print(f"\n{table(result)}\n")
    print("  ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    print(f"students: {runs[DISTILLED]} and {runs[SFT]}; numbers: {out / 'demo.json'}; picture: {out / 'demo.png'}")
    return result


def demo_config(scale: Scale, method: str, out: Path, cache: Path) -> Config:
    """The same run for both students, but for the method."""
    return Config(
        out=str(out), method=method, cache=str(cache) if method == "kd" else None,
        teacher=TeacherConfig(model=scale.teacher), student=StudentConfig(layers=scale.layers), data=scale.data,
        optim=scale.optim,
        train=TrainConfig(steps=scale.steps, batch_tokens=scale.batch_tokens, save_every=scale.steps // 2),
    )


def compare(scale: Scale, runs: dict[str, Path]) -> dict[str, object]:
    """Teacher, untrained student and both trained ones on the held-out text."""
    tokenizer = load_tokenizer(scale.teacher)
    vocab = vocab_of(tokenizer)
    model = load_pretrained(scale.teacher)
    students = {UNTRAINED: CausalLM(cut_layers(model, scale.layers), vocab)}
    students |= {name: CausalLM(load_pretrained(str(folder)), vocab) for name, folder in runs.items()}
    return evaluate(CausalLM(model, vocab), students, load_documents(scale.held_out, tokenizer, vocab))


@contextmanager
def _phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"\n== {name}", flush=True)
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began
