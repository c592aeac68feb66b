"""How many instructions the kernels' walks over a row take for the bytes that they move: counted in the machine code,
without a GPU.

    python -m bench.walks --out bench/results/walks.json

A scheduler starts one instruction of a warp a clock; a multiprocessor has four. Comparisons, integers and conversions
run on half of the lanes, exponentials on an eighth. So a round of a walk takes a number of clocks, and with the bytes
that its loads and stores move, that says how fast the memory may be before the walk falls behind. It says nothing of
latency, caches or conflicts: a kernel may be slower than that, never faster.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import machine
from kd_kernels import aot, launches
from kd_kernels.launches import Specialisation

WITHOUT_OPTIONS = {
    **{f"{whose}has_bias": 0 for whose in ("", "student_", "teacher_")},
    **{f"{whose}height": 0.0 for whose in ("", "student_", "teacher_")},
    "temperature": 1.0, "kd_weight": 1.0,
}
"""Arguments of a call that asks for nothing special. Compiled in, so that what only others run is not counted; testing
for it is ten instructions a round."""

MEMORY = {
    "A100": (2039e9, 108, 1.41e9), "H100": (3350e9, 132, 1.98e9), "H200": (4800e9, 132, 1.98e9),
    "B200": (8000e9, 148, 1.97e9),
}
"""Bytes a second at most, multiprocessors and clock, as the vendor gives them for the SXM modules."""

SCHEDULERS, WARP = 4, 32
HALF_RATE = frozenset((
    "F2FP", "FMNMX", "FSEL", "FSETP", "I2FP", "IADD", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "PLOP3", "PRMT",
    "SEL", "SHF", "VIADD", "VIMNMX",
))
"""What takes a scheduler two clocks. Exponentials, logarithms and reciprocals (MUFU) take eight, shuffles four."""

SHOWN = (
    ("kd_loss, forward_kl", r"dense_rows_kernel.*terms of forward_kl, N_PARAMS=0, KNOWS_G=True.*HAS_STATS=False"),
    ("kd_loss, reverse_kl", r"dense_rows_kernel.*terms of reverse_kl, N_PARAMS=0, KNOWS_G=True.*HAS_STATS=False"),
    ("kd_loss, jsd", r"dense_rows_kernel.*terms of jsd,.*HAS_STATS=False"),
    ("kd_loss, skew_forward_kl", r"dense_rows_kernel.*terms of skew_forward_kl,.*HAS_STATS=False"),
    ("kd_loss, top-k teacher", r"sparse_rows_kernel.*terms of forward_kl,.*HAS_STATS=False"),
    ("token_stats", "token_stats_kernel"),
    ("topk_targets, groups", "group_kernel"),
    ("sample, groups", r"group_sums_kernel\(STATS=False"),
)
"""What the rows of the table are, and the launch of the main path that is meant."""


def memory_bytes_per_clock(device: str) -> float:
    """Bytes that the memory gives each multiprocessor a clock."""
    bytes_per_s, multiprocessors, clock = MEMORY[device]
    return bytes_per_s / multiprocessors / clock


@dataclass(frozen=True)
class Walk:
    """A loop over a row; or all of a kernel that takes up one block.

    Attributes:
        instructions: of a warp, in a round.
        half_rate, special, shuffles: of those, how many of these kinds.
        shared: of those, loads from and stores to shared memory: data that changes lanes.
        moved: bytes that the warp's wide loads and stores move in a round.
        between_loads: instructions from the first wide load to the last. What waits for the first holds the last up.
    """

    instructions: int
    half_rate: int
    special: int
    shuffles: int
    shared: int
    moved: int
    between_loads: int

    @property
    def clocks(self) -> int:
        """That a round takes one scheduler, at least."""
        return max(self.instructions, 2 * self.half_rate, 8 * self.special, 4 * self.shuffles)

    @property
    def bytes_per_clock(self) -> float:
        """That a multiprocessor's memory may move before the walk falls behind."""
        return SCHEDULERS * self.moved / self.clocks


def _listing(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, and where the labels are."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    return instructions, labels


def _name(instruction: str) -> str:
    """``LDG.E.128`` of ``@!P0 LDG.E.128 R4, ...``."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _jump(instruction: str, labels: dict[str, int]) -> int | None:
    target = re.search(r"(\.L_\w+)", instruction) if _name(instruction).startswith("BRA") else None
    return labels.get(target[1]) if target else None


def _shortest(instructions: list[str], labels: dict[str, int], first: int, last: int) -> list[str] | None:
    """The fewest instructions from one to another: what rare blocks and options do is jumped over."""
    behind: dict[int, int] = {first: -1}
    length = {first: 1}
    for i in range(first, last):
        if i not in length:
            continue
        here = instructions[i]
        may_pass = here.startswith("@") or re.search(r"\bU?P\d", here) is not None
        jump = _jump(here, labels)
        following = [] if jump is None else [jump]
        if (jump is None and not _name(here).startswith("EXIT")) or may_pass:
            following.append(i + 1)
        for j in following:
            if i < j <= last and length[i] + 1 < length.get(j, len(instructions) + 1):
                length[j], behind[j] = length[i] + 1, i
    if last not in length:
        return None
    path = [last]
    while behind[path[-1]] >= 0:
        path.append(behind[path[-1]])
    return [instructions[i] for i in reversed(path)]


def _walk(path: list[str]) -> Walk:
    kinds = Counter(_name(each).split(".")[0] for each in path)
    widths = [int(width[1]) for each in path if (width := re.match(r"(?:LDG|STG)\.E\.(64|128)\b", _name(each)))]
    half_rate = sum(count for kind, count in kinds.items() if kind in HALF_RATE)
    shared = kinds["LDS"] + kinds["STS"]
    loads = [i for i, each in enumerate(path) if _name(each).startswith("LDG.E.128")] or [0]
    moved = sum(widths) // 8 * WARP
    return Walk(len(path), half_rate, kinds["MUFU"], kinds["SHFL"], shared, moved, loads[-1] - loads[0])


def walks(kernel: object) -> Iterator[Walk]:
    """Of one that Triton compiled for an NVIDIA GPU: its loops with 16-byte loads, or all of it if it has none."""
    instructions, labels = _listing(kernel.asm["cubin"])
    loops = [
        (begin, end) for end, each in enumerate(instructions)
        if (begin := _jump(each, labels)) is not None and begin < end
    ]
    found = [_shortest(instructions, labels, begin, end) for begin, end in loops]
    found = [path for path in found if path and any(_name(each).startswith("LDG.E.128") for each in path)]
    if not found:
        ends = [i for i, each in enumerate(instructions) if _name(each).startswith("EXIT")]
        found = [max(filter(None, (_shortest(instructions, labels, 0, end) for end in ends)), key=len)]
    yield from map(_walk, found)


def shown(target: str) -> Iterator[tuple[str, Specialisation]]:
    """The launches of :data:`SHOWN`; where a gradient is written, as half as wide as the logits."""
    listed = launches.main_path(target)
    for name, pattern in SHOWN:
        fitting = [each for each in listed if re.match(pattern, str(each))]
        yield name, next((each for each in fitting if "gradient_ptr: *bf16" in str(each)), fitting[0])


def measure(target: str) -> list[dict]:
    """An entry for each launch that is shown. Where the loads are is read off the kernel as it is launched: branches of
    options stand in the way of moving them."""
    return [
        {
            "name": name, "target": target, "arguments": str(each),
            "between_loads": max(walk.between_loads for walk in walks(aot.build(each))),
            "walks": [
                {**asdict(walk), "clocks": walk.clocks, "bytes_per_clock": walk.bytes_per_clock}
                for walk in walks(aot.build(each, WITHOUT_OPTIONS))
            ],
        }
        for name, each in shown(target)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--targets", nargs="+", default=["sm_80", "sm_90", "sm_100"], help="of NVIDIA's GPUs")
    asked = parser.parse_args(arguments)
    found = [entry for target in asked.targets for entry in measure(target)]
    for entry in found:
        rates = ", ".join(f"{walk['bytes_per_clock']:.1f}" for walk in entry["walks"])
        print(f"{entry['target']:7} {entry['name']:25} bytes a clock: {rates}")
    record = {
        "machine": machine.describe("cpu"), "versions": aot.versions(), "kernels": found,
        "memory_bytes_per_clock": {device: memory_bytes_per_clock(device) for device in MEMORY},
    }
    asked.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
