"""Every verb of the CPU kernels on the same inputs: ``python every_verb.py FILE`` saves the results and what ran."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from kd_kernels import accept_or_resample, kd_loss, sample, sampled_targets, token_stats, topk_targets
from kd_kernels._backend import extension

ROWS, VOCAB = 5, 9001


def results() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(ROWS, VOCAB, generator=generator) * 3
    student = teacher + torch.randn(ROWS, VOCAB, generator=generator) / 2
    ids, keys = torch.arange(ROWS) * 2000, torch.arange(ROWS)
    top = topk_targets(teacher, 70, temperatures=(1.0, 2.0))
    found = {"topk": top, "stats": token_stats(teacher, ids)}
    for divergence, target in (("jsd(beta=0.3)", teacher), ("forward_kl", top), ("alpha(alpha=0.5)", teacher)):
        logits = student.clone().requires_grad_()
        result = kd_loss(logits, target, divergence, labels=ids, ce_weight=0.5, reduction="none")
        result.loss.sum().backward()
        found[f"loss {divergence}"] = {"loss": result.loss.detach(), "gradient": logits.grad}
    cut = {"temperature": 1.3, "top_k": 900, "top_p": 0.9, "min_p": 1e-4}
    laws = {"plain": {}, "cold": {"temperature": 0.7}, "cut": cut}
    for name, law in laws.items():
        found[f"sample {name}"] = sample(teacher, **law, seed=1, keys=keys, return_stats=True)
        likewise = {f"student_{argument}": value for argument, value in law.items()}
        rank = accept_or_resample(ids, teacher, k=4000, **law, seed=1, keys=keys)
        ratio = accept_or_resample(ids, teacher, "speculative", student=student, **law, **likewise, seed=1, keys=keys)
        found |= {f"rank {name}": rank, f"ratio {name}": ratio}
    found["sampled targets"] = sampled_targets(teacher, 50, certain=8, proposal_temperature=1.2, seed=0, keys=keys)
    fields = lambda result: result if isinstance(result, dict) else vars(result)  # noqa: E731
    return {
        f"{verb}: {name}": value for verb, result in found.items() for name, value in fields(result).items()
        if isinstance(value, Tensor)
    }


if __name__ == "__main__":
    torch.save({"isa": extension().isa, "results": results()}, sys.argv[1])
