"""What the device can do at most, measured: bytes a second of a copy, operations a second of a matrix product.

    python -m bench.ceilings --device cuda --out bench/results/gpu_ceilings.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bench import devices, machine, timing
from bench.devices import Device

COPIED_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
PRODUCT = {"cpu": (2048, torch.float32), "cuda": (8192, torch.bfloat16)}
"""Side of the square matrices, and their dtype. The numbers in them are random: zeros are multiplied faster."""


def measure(device: Device, scale: float = 1.0, seconds: float = 2.0) -> dict[str, object]:
    """Medians. ``scale`` shrinks the copy and the product's side."""
    source = torch.ones(int(COPIED_BYTES[device.name] * scale) // 4, device=device.torch_name)
    target = torch.empty_like(source)
    side, dtype = PRODUCT[device.name]
    side = max(16, int(side * scale))
    left, right = (torch.randn(side, side, device=device.torch_name).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(left, right, out=product)}
    medians = {name: timing.summary(times)["p50_ms"] for name, times in
               timing.interleaved(calls, device, seconds=seconds).items()}
    return {
        "copy_bytes_per_s": 2 * source.nbytes / (1e-3 * medians["copy"]),  # read and written
        "product_flops_per_s": 2 * side**3 / (1e-3 * medians["product"]),
        "product": f"{side}^3 {str(dtype).removeprefix('torch.')}",
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(devices.DEVICES), default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--tiny", action="store_true", help="a hundredth of the size: whether it works")
    asked = parser.parse_args(arguments)
    scale, seconds = (0.01, 0.0) if asked.tiny else (1.0, 2.0)
    made = measure(devices.find(asked.device), scale, seconds)
    print(f"copy {made['copy_bytes_per_s'] / 1e9:.0f} GB/s, {made['product']} product "
          f"{made['product_flops_per_s'] / 1e12:.2f} TFLOP/s")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"machine": machine.describe(asked.device), "ceilings": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
