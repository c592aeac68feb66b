"""Checkpoints: a folder that ``from_pretrained`` loads, with what an exact resumption needs beside the weights.

    checkpoints/step-00000040/   config.json model.safetensors tokenizer.json ...   the student
                                 run.json        step and identity of the run
                                 optimizer.pt    state of AdamW
                                 rng.pt          torch's generators, host and devices, of every process

A checkpoint is filled under a temporary name, synced and renamed, so that one which is there is complete. The
learning rate and the data position are functions of the step and need no file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_trainer.files import new_folder


def save(
    folder: Path, accelerator: Accelerator, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer | None, step: int, identity: dict[str, object],
) -> None:
    """Write a checkpoint, from the main process; every process must call. Without optimizer: the weights alone."""
    generators = gather_object([_rng_state(accelerator.device)])
    if accelerator.is_main_process:
        with new_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "run.json").write_text(json.dumps({"step": step, "identity": identity}, indent=1))
            if optimizer is not None:
                torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
                torch.save(generators, temporary / "rng.pt")
    accelerator.wait_for_everyone()


def restore(folder: Path, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Optimiser and generators as they were; the weights were loaded with the model."""
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    generators = torch.load(folder / "rng.pt", map_location="cpu", weights_only=True)
    if len(generators) == accelerator.num_processes:  # on another number of processes dropout goes on from new seeds
        state = generators[accelerator.process_index]
        torch.set_rng_state(state["host"])
        if state["device"] is not None:
            torch.cuda.set_rng_state(state["device"], accelerator.device)


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step."""
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return found[-1] if found else None


def keep_last(folder: Path, count: int) -> None:
    """Delete all but the newest ``count`` checkpoints."""
    for old in sorted(folder.glob("step-*"))[:-count]:
        shutil.rmtree(old)


def check_identity(folder: Path, identity: dict[str, object]) -> int:
    """The step of a checkpoint, once it is known to belong to this very run.

    Raises:
        ValueError: it belongs to another run; the message lists what differs.
    """
    state = json.loads((folder / "run.json").read_text())
    then, now = state["identity"], json.loads(json.dumps(identity))
    different = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
    if different:
        changed = ", ".join(f"{key}={then.get(key)!r} (now {now.get(key)!r})" for key in different)
        raise ValueError(
            f"train: the checkpoint to resume from must be of this run, got {folder} with {changed}; "
            "set another out, or delete that folder to start over"
        )
    return state["step"]


def _rng_state(device: torch.device) -> dict[str, torch.Tensor | None]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"host": torch.get_rng_state(), "device": on_device}
