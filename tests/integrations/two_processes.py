"""One of two processes over gloo: ``python two_processes.py TRAINER FOLDER`` trains one step and saves what it took.

Run by test_two_processes.py. ``fsdp2`` shards the model with ``fully_shard``, the head on its own, and saves gradients.
"""

from __future__ import annotations

import sys

import torch
from trainers import ARGUMENTS, collate, examples, gradient_of, model, tokenizer


def split_in_two(student, trainer: str, folder: str) -> tuple[float, dict]:
    """Four sequences a process: the eight of the truth."""
    options = ARGUMENTS | dict(per_device_train_batch_size=4, ddp_find_unused_parameters=False)
    if trainer == "hf":
        from transformers import TrainingArguments

        from kd_trainer.integrations.hf import KDOptions, KDTrainer

        args = TrainingArguments(folder, **options)
        make = lambda: KDTrainer(  # noqa: E731
            student, args, train_dataset=examples(), data_collator=collate, teacher=model(2),
            kd=KDOptions("jsd(beta=0.5)"),
        )
    else:
        from test_trl import dataset, padded
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        from kd_trainer.integrations import trl

        args = GKDConfig(folder, **options, lmbda=0.0, beta=0.5, bf16=False, gradient_checkpointing=False)
        make = lambda: (trl.GKDTrainer if trainer == "gkd" else GKDTrainer)(  # noqa: E731
            model=student, teacher_model=model(2), args=args, train_dataset=dataset(), data_collator=padded,
            processing_class=tokenizer(),
        )
    return gradient_of(make, student)


def sharded(student) -> tuple[float, dict]:
    """FSDP2 as accelerate applies it, but with the head a group of its own: it is sharded when the loss needs it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh

    from kd_kernels import divergences
    from kd_trainer.integrations.attach import attach, inspected
    from kd_trainer.integrations.options import KDOptions
    from kd_trainer.integrations.targets import LiveTargets

    options = KDOptions().filled(divergences.jsd(0.5))
    attach(inspected(student, None), LiveTargets(model(2), options), options)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*student.model.layers, student.lm_head):
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    rank = torch.distributed.get_rank()
    batch, mine = collate(examples()), collate(examples()[rank::2])
    count = (batch["labels"][:, 1:] != -100).sum()
    loss = student.train()(**mine, num_items_in_batch=count / 2).loss  # FSDP averages over the two
    loss.backward()
    torch.distributed.all_reduce(total := loss.detach().clone())
    return total.item() / 2, {name: p.grad.full_tensor() for name, p in student.named_parameters()}


if __name__ == "__main__":
    trainer, folder = sys.argv[1:]
    torch.set_num_threads(1)
    student = model(1)
    if trainer == "fsdp2":
        torch.distributed.init_process_group("gloo")
        result = sharded(student)
    else:
        result = split_in_two(student, trainer, folder)
    if torch.distributed.get_rank() == 0:
        torch.save(result, f"{folder}/result.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
