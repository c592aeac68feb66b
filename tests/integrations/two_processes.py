"""One of two processes over gloo: ``python two_processes.py FILE`` trains one step by every trainer and saves what each
took.

Run by test_two_processes.py. ``fsdp2`` shards the model with ``fully_shard``, the head on its own, and saves gradients:
accelerate knows FSDP on accelerators alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable

import torch
from transformers import TrainingArguments

from kd_trainer.integrations.hf import ADAPTER_OFF, KDOptions, KDTrainer
from trainers import ARGUMENTS, collate, examples, gradient_of, model, tokenizer, write_cache

JSD = KDOptions("jsd(beta=0.5)")
Result = tuple[float, dict[str, torch.Tensor]]
OPTIONS = ARGUMENTS | dict(per_device_train_batch_size=4, ddp_find_unused_parameters=False)
"""Four sequences a process: the eight of the truth."""


def hf(student, cache: str | None = None, teacher=None, **changes) -> Result:
    args = TrainingArguments(tempfile.mkdtemp(), **(OPTIONS | changes))
    make = lambda: KDTrainer(  # noqa: E731
        student, args, train_dataset=examples(), data_collator=collate, teacher=teacher, cache=cache, kd=JSD,
        processing_class=tokenizer() if cache else None,
    )
    return gradient_of(make, student)


def hf_of_a_cache() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        write_cache(f"{folder}/cache", model(2), examples())
        return hf(model(1), cache=f"{folder}/cache")


def lora() -> Result:
    """Its own base model is the teacher."""
    from trainers import lora_of

    return hf(lora_of(model(1)), teacher=ADAPTER_OFF)


def gkd(whose: str, gold: bool = False) -> Result:
    from kd_trainer.integrations import trl
    from test_trl import GKDConfig, GOLDConfig, TheirGKDTrainer, dataset, gkd_config, padded

    options = dict(per_device_train_batch_size=4, ddp_find_unused_parameters=False, beta=0.5, temperature=1.0)
    args = gkd_config(tempfile.mkdtemp(), GOLDConfig if gold else GKDConfig, **options)
    cls = TheirGKDTrainer if whose == "theirs" else trl.GOLDTrainer if gold else trl.GKDTrainer
    student = model(1)
    make = lambda: cls(  # noqa: E731
        model=student, teacher_model=model(2), args=args, train_dataset=dataset(), data_collator=padded,
        processing_class=tokenizer(),
    )
    return gradient_of(make, student)


def distillation(whose: str) -> Result:
    import test_trl

    cls = test_trl.trl.DistillationTrainer if whose == "theirs" else test_trl.ours.DistillationTrainer
    options = dict(per_device_train_batch_size=4, ddp_find_unused_parameters=False)
    student = model(1)
    make = lambda: test_trl.distillation(cls, tempfile.mkdtemp(), student, model(2), args=options)  # noqa: E731
    return gradient_of(make, student)


def fsdp2() -> tuple[float, dict[str, torch.Tensor], int]:
    """As accelerate applies it, but with the head a group of its own: it is sharded when the loss needs it. Third, how
    often a DTensor was gathered, which is for the head alone: FSDP gathers its groups by collectives of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    from kd_kernels import divergences
    from kd_trainer.integrations.attach import attach, inspected
    from kd_trainer.integrations.targets import LiveTargets

    options, student = JSD.filled(divergences.forward_kl()), model(1)
    attach(inspected(student, None), LiveTargets(inspected(model(2), None), options), options)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*student.model.layers, student.lm_head):
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    batch, mine = collate(examples()), collate(examples()[torch.distributed.get_rank() :: 2])
    count = (batch["labels"][:, 1:] != -100).sum()
    with CommDebugMode() as communicated:
        loss = student.train()(**mine, num_items_in_batch=count / 2).loss  # FSDP averages over the two
        loss.backward()
    torch.distributed.all_reduce(total := loss.detach().clone())
    gathers = communicated.get_comm_counts()[torch.ops.c10d_functional.all_gather_into_tensor]
    return total.item() / 2, {name: p.grad.full_tensor() for name, p in student.named_parameters()}, gathers


CASES: dict[str, Callable[[], tuple]] = {
    "hf": lambda: hf(model(1), teacher=model(2)),
    "hf, accumulated": lambda: hf(
        model(1), teacher=model(2), per_device_train_batch_size=2, gradient_accumulation_steps=2
    ),
    "hf, cache": hf_of_a_cache,
    "fsdp2": fsdp2,
}
WITH_PEFT: dict[str, Callable[[], tuple]] = {"lora": lora}
WITH_TRL: dict[str, Callable[[], tuple]] = {
    "gkd": lambda: gkd("ours"),
    "gold": lambda: gkd("ours", gold=True),
    "their gkd": lambda: gkd("theirs"),
    "distillation": lambda: distillation("ours"),
    "their distillation": lambda: distillation("theirs"),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for package, cases in (("peft", WITH_PEFT), ("trl", WITH_TRL)):
        if importlib.util.find_spec(package) is not None:
            CASES |= cases
    results = {name: run() for name, run in CASES.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(results, sys.argv[1])
    torch.distributed.barrier()
    sys.stdout.flush(), sys.stderr.flush()
    # gloo's threads outlive destroy_process_group(), because torch keeps the group where nothing of ours reaches
    # (default arguments of torch.distributed.nn.functional, DTensor's caches). One that lets go of a tensor while
    # Python is being taken down asks for the GIL, and the process aborts: "terminate called without an active
    # exception"
    os._exit(0)
