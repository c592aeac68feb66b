"""Roll-outs the slow way: one sequence at a time, every token from a forward pass over all of its tokens, no cache."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kd_kernels import sample
from kd_trainer.models import CausalLM
from kd_trainer.rollout import Sampling
from test_models import make

VOCAB = 61  # of the models of test_models
LENGTHS = (3, 7, 1, 5, 12)


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float64, noise_seed: int = 0, **changes) -> CausalLM:
    """A random model; in fp64 no rounding can move a draw. Another ``noise_seed`` gives a similar, not an equal one."""
    model = make(kind, **changes)
    if noise_seed:
        generator = torch.Generator().manual_seed(noise_seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return CausalLM(model.to(dtype))


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def logits_after(lm: CausalLM, tokens: Tensor) -> Tensor:
    """``[1, V]``, from the model's own forward."""
    return lm.model(input_ids=tokens[None], use_cache=False).logits[0, -1:]


@dataclasses.dataclass
class Written:
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    model_logprobs: list[float] = dataclasses.field(default_factory=list)
    reason: str = "length"


def write_alone(
    lm: CausalLM, prompt: Tensor, key: int, steps: int, sampling: Sampling, seed: int, *, stop: tuple[int, ...] = (),
    least: int = 0, purpose: str = "draw",
) -> Written:
    """What ``generate`` must return for a sequence."""
    text, written = prompt, Written()
    for step in range(steps):
        own = logits_after(lm, text)
        allowed = own.clone()
        if step < least:
            allowed[:, list(stop)] = -torch.inf
        drawn = sample(
            allowed, **sampling.arguments(), seed=seed, keys=torch.tensor([key]), positions=torch.tensor([len(text)]),
            purpose=purpose,
        )
        token = int(drawn.ids)
        text = torch.cat([text, drawn.ids])
        written.tokens.append(token)
        written.logprobs.append(float(drawn.logprobs))
        written.model_logprobs.append(float(own.log_softmax(-1)[0, token]))
        if token in stop:
            written.reason = "stop"
            break
    return written
