"""What drawing costs above the head's product, from one row to 1,024, beside torch on logits that are held.

    python -m bench.gpu_sampling --device cuda --out bench/results/gpu_sampling.json

Of each batch: the bare product in fp32, one reading of the head's weights, :func:`kd_kernels.sample` with and without
filters, and torch's softmax and multinomial after the same product. Ratios are to the product of the same round.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Callable

import torch

from bench import devices, machine, timing
from bench.devices import Device
from kd_kernels import LinearLogits, sample

HEADS = {"llama": (4096, 128_256), "qwen": (2048, 151_936)}
"""Hidden size and vocabulary."""
ROWS = (1, 16, 64, 256, 1024)
TINY = {"tiny": (16, 300)}, (1, 5)
ARGUMENTS = {"plain": {}, "stats": {"return_stats": True}, "top_p": {"top_p": 0.95}, "top_k": {"top_k": 50}}


def calls_of(hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], object]]:
    """By name; logits have a standard deviation near 3."""
    noun, place = LinearLogits(hidden, weight), dict(seed=1, check="flag")
    wide = {} if hidden.device.type == "cpu" else {"out_dtype": torch.float32}
    product = lambda: torch.mm(hidden, weight.t(), **wide)  # noqa: E731
    ours = {name: lambda a=a: sample(noun, **place, **a) for name, a in ARGUMENTS.items()}
    return {
        "product": product, "read_weights": lambda: weight.sum(dtype=torch.float32), **ours,
        "torch": lambda: torch.multinomial(product().softmax(-1), 1),
    }


def measure(device: Device, heads: dict[str, tuple[int, int]], batches: tuple[int, ...], seconds: float) -> list[dict]:
    """A record for each head and batch. The draws are checked against torch's argmax at temperature 0 first."""
    dtype, found = torch.float32 if device.name == "cpu" else torch.bfloat16, []
    for name, (width, vocab) in heads.items():
        generator = torch.Generator(device.torch_name).manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, generator=generator, device=device.torch_name)  # noqa: B023, E731
        weight = (normal(vocab, width) * (3 / width**0.5)).to(dtype)
        for rows in batches:
            hidden = normal(rows, width).to(dtype)
            greedy = sample(LinearLogits(hidden, weight), temperature=0.0, seed=0)
            logits = hidden.float() @ weight.float().t()
            short = logits.amax(1) - logits.gather(1, greedy.ids[:, None])[:, 0]
            assert bool((short <= 1e-3).all()), "sample does not find the largest logit: not timed"
            del logits
            times = timing.interleaved(calls_of(hidden, weight), device, seconds=seconds)
            found.append({
                "head": name, "rows": rows, "hidden": width, "vocab": vocab, "dtype": str(dtype).removeprefix("torch."),
                "weight_bytes": weight.nbytes, "product_flops": 2 * rows * width * vocab,
                "times": {each: timing.summary(values) for each, values in times.items()},
                "to_product": {each: timing.ratio(values, times["product"]) for each, values in times.items()},
            })
            shown = ", ".join(f"{each} {ratio:.2f}" for each, ratio in found[-1]["to_product"].items())
            print(f"{name}, {rows} rows: product {found[-1]['times']['product']['p50_ms']:.3f} ms; to it: {shown}")
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(devices.DEVICES), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: whether it works")
    asked = parser.parse_args(arguments)
    heads, batches = TINY if asked.tiny else (HEADS, ROWS)
    made = measure(devices.find(asked.device), heads, batches, 0.0 if asked.tiny else 1.0)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"machine": machine.describe(asked.device), "sampling": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
