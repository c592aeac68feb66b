"""What a step of each method costs beside a step of supervised fine-tuning: taken in turns, in one process.

All methods take their steps with one student and one teacher, round by round, so that whatever slows the machine slows
them alike; a learning rate of 0 keeps the student what it was, and with it the length of what it writes. A step is
everything from the choice of its texts to the optimiser's: roll-outs, the teacher's pass, both passes of the student.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from kd_trainer import methods
from kd_trainer.files import progress
from kd_trainer.study.lineup import ENTRIES, config_of
from kd_trainer.study.stages import Stages
from kd_trainer.trainer import LossModule, load_parts, take_step

BASELINE = "sft"


def latency(stages: Stages, names: Sequence[str], rounds: int, warm_up: int = 1) -> dict[str, object]:
    """Mean seconds of a step, by the clock and of the processor, and both over those of ``sft``.

    Args:
        names: of the entries; the first is ``sft``.
        rounds: steps of each that are measured, after ``warm_up`` that are not. Methods that write texts in some of
            their steps only need many.
    """
    assert names[0] == BASELINE
    accelerator = Accelerator(mixed_precision="bf16" if stages.size.precision == "bf16" else "no")
    parts, _ = load_parts(config_of(stages, "fkl", 0))
    optimizer = accelerator.prepare(torch.optim.AdamW(parts.student.parameters(), lr=0.0, fused=True))
    steps = {name: _stepper(stages, name, parts, accelerator, optimizer) for name in names}
    wall, processor = ({name: [] for name in names} for _ in range(2))
    with progress(total=(warm_up + rounds) * len(names), desc="latency", unit="step") as bar:
        for index in range(warm_up + rounds):
            for name, step in steps.items():
                begins = time.perf_counter(), time.process_time()
                step(index)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if index >= warm_up:
                    wall[name].append(time.perf_counter() - begins[0])
                    processor[name].append(time.process_time() - begins[1])
                bar.update()
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    found = {
        name: {
            "label": ENTRIES[name].label, "seconds": mean(wall[name]), "cpu_seconds": mean(processor[name]),
            "relative": mean(wall[name]) / mean(wall[BASELINE]),
            "cpu_relative": mean(processor[name]) / mean(processor[BASELINE]),
        }
        for name in names
    }
    return {"rounds": rounds, "threads": torch.get_num_threads(), "steps": found}


def _stepper(
    stages: Stages, name: str, parts: methods.Parts, accelerator: Accelerator, optimizer: torch.optim.Optimizer
) -> Callable[[int], object]:
    """One optimiser step of a method, as :func:`~kd_trainer.trainer.train` takes it."""
    config = config_of(stages, name, 0)
    method = methods.build(config, parts)
    module = accelerator.prepare(LossModule(parts.student, method.objectives)).train()

    return lambda index: take_step(accelerator, module, optimizer, method, config, index, is_last=False)
