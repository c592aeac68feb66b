"""The verbs of sampling beside the bare product of the head, and beside torch's softmax and multinomial.

    python -m bench.sampling --out bench/results/cpu_sampling.json [--rows 256] [--seconds 20] [--tiny]
    python -m bench.sampling --device cuda --out bench/results/gpu_sampling.json

All contenders start from hidden states. They run once a round, in an order that rotates; a ratio is the median over
rounds of the time over that of the product in the same round, so what slows a whole round cancels. The product is
torch's at its best: into memory that it has written before, in huge pages, with rows that do not compete for a cache's
sets. torch's ways to sample take several times as long; they have rounds of their own, or there would be few of the
verbs'. Before anything is timed, ids must be in range and their log-probabilities those of the logits in float64. A
contender that cannot run here is recorded with its reason.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import devices, machine, tables, timing
from kd_kernels import LinearLogits, accept_or_resample, heads, products, sample, sampled_targets, token_stats

HEADS = {"SmolLM2-135M": (576, 49_152), "Qwen3-0.6B": (1024, 151_936)}
GPU_HEADS = HEADS | {"Llama-3.1-8B": (4096, 128_256)}
TINY = {"tiny": (16, 500)}
TARGETS = {"sample": 1.15, "sample, top_p 0.95": 1.35}
"""Of the time of the product, on a CPU at 256 rows."""
TORCH = "torch: "
"""Begins the names of what is measured for comparison."""
ROUNDS = 9
"""Of the verbs, at least: of three or five, a median of ratios is off by a tenth now and then."""
OVER_TWO = ", over two products"
"""Ends the names of what multiplies by a teacher's and a student's head."""
LOGPROB_ERROR = 2e-3  # nats, of bf16 products on a GPU; 1e-4 in fp32


@dataclass(frozen=True)
class Rows:
    """Hidden states of so many rows, a head whose logits have a standard deviation of 3, and an id for each row; a
    student of the same size at a total variation of about 0.25, and what it drafts."""

    noun: LinearLogits
    ids: Tensor
    student: LinearLogits
    drafts: Tensor

    @staticmethod
    def make(rows: int, hidden: int, vocab: int, device: str) -> Rows:
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        normal = lambda *shape: torch.randn(*shape, generator=generator, device=device).to(dtype)  # noqa: E731
        states, weight = normal(rows, hidden), normal(vocab, hidden).mul_(3 / hidden**0.5)
        ids = torch.randint(0, vocab, (rows,), generator=generator, device=device)
        student = LinearLogits(states, weight + normal(vocab, hidden).mul_(0.6 / hidden**0.5))
        return Rows(LinearLogits(states, weight), ids, student, sample(student, seed=2).ids)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """As one writes it: a sort of the row, a running sum, and -inf behind the cut."""
    ordered, ids = logits.sort(-1, descending=True)
    p = ordered.softmax(-1)
    cut = p.cumsum(-1) - p >= top_p
    return logits.scatter(-1, ids, ordered.masked_fill(cut, -torch.inf))


def _speculative(teacher: Tensor, student: Tensor, drafts: Tensor) -> Tensor:
    """As one writes it: min(1, p/q), and a draw from what is left of the teacher."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    of_draft = lambda x: x.gather(-1, drafts[:, None])[:, 0]  # noqa: E731
    accepted = torch.rand(len(drafts), device=drafts.device) * of_draft(q) <= of_draft(p)
    left = (p - q).clamp_(min=0)
    drawn = torch.multinomial(torch.where(left.sum(-1, keepdim=True) > 0, left, p), 1)[:, 0]
    return torch.where(accepted, drafts, drawn)


def contenders(rows: Rows) -> dict[str, Callable[[], object]]:
    """By name; "product" is what all others are measured against."""
    noun, ids, student, drafts = rows.noun, rows.ids, rows.student, rows.drafts
    count, vocab = len(ids), noun.vocab
    pitch = products.row_pitch(vocab, torch.float32, ids.device)
    out = products.new_memory(count, pitch, dtype=torch.float32, device=ids.device)[:, :vocab]
    head = heads.head(noun, torch.float32, vocab, "float32", None)
    logits = lambda x=noun: (x.hidden @ x.weight.T).float()  # noqa: E731
    verdicts = lambda **cut: accept_or_resample(drafts, noun, "speculative", student=student, seed=1, **cut)  # noqa: E731
    multinomial = lambda z: torch.multinomial(z.softmax(-1), 1)  # noqa: E731
    return {
        "product": lambda: head.logits(noun.hidden, out),
        "sample": lambda: sample(noun, seed=1),
        "sample, temperature 0.7": lambda: sample(noun, temperature=0.7, seed=1),
        "sample, top_k 50": lambda: sample(noun, top_k=50, seed=1),
        "sample, top_p 0.95": lambda: sample(noun, top_p=0.95, seed=1),
        "sample, with entropy": lambda: sample(noun, seed=1, return_stats=True),
        "sampled_targets, 50 draws": lambda: sampled_targets(noun, 50, seed=1),
        "token_stats": lambda: token_stats(noun, ids),
        "accept_or_resample, k 25": lambda: accept_or_resample(ids, noun, k=25, seed=1),
        "accept_or_resample, speculative" + OVER_TWO: verdicts,
        "accept_or_resample, speculative, top_p 0.95" + OVER_TWO: lambda: verdicts(top_p=0.95, student_top_p=0.95),
        TORCH + "softmax, multinomial": lambda: multinomial(logits()),
        TORCH + "top_p 0.95 by a sort": lambda: multinomial(_nucleus(logits(), 0.95)),
        TORCH + "log_softmax of ids": lambda: logits().log_softmax(-1).gather(1, ids[:, None]),
        TORCH + "softmax, p/q, p - q" + OVER_TWO: lambda: _speculative(logits(), logits(student), drafts),
    }


def check(rows: Rows) -> None:
    """Raise where a sample's log-probability is not the one of its id."""
    found = sample(rows.noun, seed=1)
    exact = (rows.noun.hidden.double() @ rows.noun.weight.double().T).log_softmax(-1)
    error = float((found.logprobs.double() - exact.gather(1, found.ids[:, None])[:, 0]).abs().max())
    if not error < (LOGPROB_ERROR if rows.ids.device.type == "cuda" else 1e-4):
        raise SystemExit(f"bench.sampling: log-probabilities must be those of float64, got an error of {error:.2g}")


def measure(rows: Rows, device: devices.Device, seconds: float, rounds: int) -> dict[str, dict[str, object]]:
    """By contender: quantiles and the ratio to the product, or why it was not measured."""
    calls, skipped = contenders(rows), {}
    for name, call in list(calls.items()):
        try:
            call()
        except RuntimeError as error:
            skipped[name] = {"skipped": str(error)}
            del calls[name]
    peers = {name: calls.pop(name) for name in list(calls) if name.startswith(TORCH)}
    found = {}
    compared = peers | {"product": calls["product"]}
    for part, share, least in ((compared, 1 / 4, timing.MIN_ROUNDS), (calls, 3 / 4, rounds)):
        times = timing.interleaved(part, device, seconds=share * seconds, min_rounds=least)
        for name, ms in times.items():
            ratio = timing.ratio(ms, times["product"]) / (2 if name.endswith(OVER_TWO) else 1)
            found[name] = timing.summary(ms) | {"of_product": ratio, "rounds": len(ms)}
    return {name: found[name] for name in (*calls, *peers)} | skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[256])
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds, for each head and number of rows")
    parser.add_argument("--tiny", action="store_true", help="small shapes, a few rounds: does it run?")
    options = parser.parse_args()
    device = devices.CPU() if options.device == "cpu" else devices.CUDA()
    results = {}
    for name, (hidden, vocab) in (TINY if options.tiny else GPU_HEADS if options.device == "cuda" else HEADS).items():
        for count in options.rows:
            rows = Rows.make(count, hidden, vocab, options.device)
            check(rows)
            seconds, rounds = (0.0, 3) if options.tiny else (options.seconds, ROUNDS)
            results[f"{name}, {count} rows"] = measure(rows, device, seconds, rounds)
            about = {"machine": machine.describe(options.device), "moment": machine.moment(options.device)}
            options.out.write_text(json.dumps(about | {"targets": TARGETS, "results": results}, indent=1) + "\n")
    print(tables.sampling(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
