"""Checkpoints: a folder that ``from_pretrained`` loads, with what an exact resumption needs beside the weights.

    checkpoints/step-00000040/   config.json model.safetensors tokenizer.json ...   the student
                                 run.json        step and identity of the run
                                 optimizer.pt    state of AdamW
                                 objectives.pt   parameters that the method trains beside the student's
                                 tokens.pt       replay buffer and schedule of the method's token source, a process
                                 rng.pt          torch's generators, host and devices, a process

The final ``model/`` has none of the last four; where the method trained something beside the student (an adapter, a
fusion layer), it is in ``objectives.safetensors``, named ``<tag>.<parameter>``.

A checkpoint is filled under a temporary name, synced and renamed, so that one which is there is complete. The
learning rate and the data position are functions of the step and need no file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_trainer.errors import fail
from kd_trainer.files import new_folder
from kd_trainer.methods.base import TokenSource

OBJECTIVES = "objectives.safetensors"


class Progress(NamedTuple):
    """What a run has beside its student's weights."""

    optimizer: torch.optim.Optimizer
    objectives: nn.Module
    tokens: TokenSource


def save(
    folder: Path, accelerator: Accelerator, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    progress: Progress, step: int, identity: dict[str, object], final: bool = False,
) -> None:
    """Write a checkpoint, from the main process; every process must call. ``final``: what was trained, and no more."""
    generators = gather_object([_rng_state(accelerator.device)])
    sources = gather_object([progress.tokens.state()]) if not final else []
    if accelerator.is_main_process:
        with new_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "run.json").write_text(json.dumps({"step": step, "identity": identity}, indent=1))
            trained = dict(progress.objectives.named_parameters())
            if final and trained:
                save_file({name: tensor.detach().cpu() for name, tensor in trained.items()}, temporary / OBJECTIVES)
            if not final:
                torch.save(progress.optimizer.state_dict(), temporary / "optimizer.pt")
                torch.save(progress.objectives.state_dict(), temporary / "objectives.pt")
                torch.save(sources, temporary / "tokens.pt")
                torch.save(generators, temporary / "rng.pt")
    accelerator.wait_for_everyone()


def restore(folder: Path, accelerator: Accelerator, progress: Progress) -> None:
    """All that :class:`Progress` names as it was; the weights were loaded with the model.

    Raises:
        ValueError: the token source has a state, and the number of processes is another than it was.
    """
    load = lambda name: torch.load(folder / name, map_location="cpu", weights_only=True)  # noqa: E731
    progress.optimizer.load_state_dict(load("optimizer.pt"))
    progress.objectives.load_state_dict(load("objectives.pt"))
    sources, generators = load("tokens.pt"), load("rng.pt")
    same_world = len(generators) == accelerator.num_processes
    if any(sources) and not same_world:
        fail(
            "train", "the number of processes", f"{len(sources)}, as when the replay buffer was saved",
            accelerator.num_processes,
        )
    progress.tokens.load_state(sources[accelerator.process_index] if same_world else {})
    if same_world:  # on another number of processes dropout goes on from new seeds
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
