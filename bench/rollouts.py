"""Tokens per second of roll-outs, beside transformers' own generate() with the same model.

    python -m bench.rollouts --out bench/results/cpu_rollouts.json [--batches 1 8 32] [--tokens 32] [--rounds 5]

Greedy and with top_p 0.95, from prompts of one length, without stop ids, so that both write the same number of tokens.
Greedy texts must agree before anything is timed. Contenders alternate; the ratio is the median over rounds of
generate()'s time over ours. "sampler" is the share of our time within ``kd_kernels.sample``, the head's product
included; "theirs, outside of the model" is what generate() spends outside of the model's forward pass (which has the
head's product in it): that, and the copies of its cache, is where the difference comes from.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bench import machine, tables
from kd_trainer import rollout
from kd_trainer.models import CausalLM, load_pretrained

SAMPLINGS = {"greedy": rollout.Sampling(0.0), "top_p 0.95": rollout.Sampling(1.0, top_p=0.95)}
PROMPT = 32
SECONDS, MOST_ROUNDS = 8.0, 60
"""Of a comparison: what a small model does in milliseconds takes many rounds to measure."""


def models(tiny: bool) -> dict[str, CausalLM]:
    """By name: SmolLM2-135M, and one small enough that everything around the products shows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )
    found = {"tiny Llama": CausalLM(LlamaForCausalLM(small).eval())}
    if not tiny:
        from kd_trainer import assets

        found["SmolLM2-135M"] = CausalLM(load_pretrained(str(assets.smollm2())).float().eval())
    return found


def ours(model: CausalLM, prompts: Tensor, tokens: int, sampling: rollout.Sampling) -> Tensor:
    options = rollout.Options(max_new_tokens=tokens, sampling=sampling)
    return torch.stack(rollout.generate(model, list(prompts), options, seed=0).completions)


@torch.no_grad()
def theirs(model: CausalLM, prompts: Tensor, tokens: int, sampling: rollout.Sampling) -> Tensor:
    drawn = {"do_sample": True, "top_p": sampling.top_p, "top_k": 0}
    chosen = {"do_sample": False} if sampling.temperature == 0 else drawn
    written = model.model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, min_new_tokens=tokens,
        pad_token_id=0, **chosen,
    )
    return written[:, prompts.shape[1] :]


@contextmanager
def clocked(owner: object, name: str, spent: list[float]):
    """Time within a function goes to ``spent``."""
    function = getattr(owner, name)

    def timed(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - begin)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, function)


def seconds_of(call: Callable[[], object], owner: object, name: str) -> tuple[float, float]:
    """Of a call, and the part of it within a function."""
    spent: list[float] = []
    with clocked(owner, name, spent):
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin, sum(spent)


def compare(model: CausalLM, batch: int, tokens: int, sampling: rollout.Sampling, rounds: int) -> dict[str, float]:
    generation = importlib.import_module("kd_trainer.rollout.generate")  # the package's own name for it is the function
    prompts = torch.randint(0, model.vocab, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    one, other = (write(model, prompts, tokens, sampling) for write in (ours, theirs))
    assert one.shape == other.shape == (batch, tokens)
    if sampling.temperature == 0 and not torch.equal(one, other):
        different = int((one != other).any(1).sum())
        if different > batch // 8:  # rounding decides between two likely tokens now and then
            raise SystemExit(f"bench.rollouts: greedy texts must be those of generate(), got {different} others")
    mine, their, sampler, outside = [], [], [], []
    end = time.perf_counter() + SECONDS
    while (turn := len(mine)) < rounds or (turn < MOST_ROUNDS and time.perf_counter() < end):
        for is_ours in (turn % 2 == 0, turn % 2 == 1):
            if is_ours:
                whole, part = seconds_of(lambda: ours(model, prompts, tokens, sampling), generation, "sample")
                mine.append(whole)
                sampler.append(part / whole)
            else:
                whole, part = seconds_of(lambda: theirs(model, prompts, tokens, sampling), model.model, "forward")
                their.append(whole)
                outside.append(1 - part / whole)
    return {
        "tokens_per_s": batch * tokens / statistics.median(mine),
        "generate_tokens_per_s": batch * tokens / statistics.median(their),
        "times_as_fast": statistics.median(b / a for a, b in zip(mine, their, strict=True)),
        "rounds": len(mine), "sampler": statistics.median(sampler),
        "theirs_outside_of_the_model": statistics.median(outside),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="at least")
    parser.add_argument("--tiny", action="store_true", help="the small model alone")
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for name, model in models(options.tiny).items():
        for batch in options.batches:
            for how, sampling in SAMPLINGS.items():
                key = f"{name}, {batch}, {how}"
                row = results[key] = compare(model, batch, options.tokens, sampling, options.rounds)
                about = {"machine": machine.describe(), "moment": machine.moment()}
                options.out.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
                print(f"{key}: {row['times_as_fast']:.2f} times as fast", flush=True)
    print(tables.rollouts(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
