"""Roll-outs by an engine that is not this process's model, behind one method; and vLLM behind it.

An engine has weights of its own. Whoever trains the student says when it gets new ones: nothing here copies them, and
roll-outs of old weights are off-policy by as many steps. :func:`score` tells by how much: it gives the
log-probabilities of the model that is trained, to compare with the engine's.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from kd_trainer.errors import fail
from kd_trainer.models import CausalLM
from kd_trainer.rollout.generate import generate
from kd_trainer.rollout.options import Options, Sampling, check_ids, check_keys, check_prompts, sequence_seed
from kd_trainer.rollout.result import RollOuts


class ExternalEngine(Protocol):
    """Whatever writes completions."""

    def generate(
        self, prompts: Sequence[Tensor], options: Options, *, seed: int, keys: Tensor | None = None
    ) -> RollOuts:
        """As :func:`kd_trainer.rollout.generate`. What an engine cannot do it refuses; what it does not know is
        None."""


class LocalEngine:
    """The model of this process behind the same method: always on-policy."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model

    def generate(
        self, prompts: Sequence[Tensor], options: Options, *, seed: int, keys: Tensor | None = None
    ) -> RollOuts:
        return generate(self._model, prompts, options, seed=seed, keys=keys)


VLLM_FIELDS = {"raw_logprobs": "model_logprobs", "processed_logprobs": "logprobs"}
"""What vLLM returns in each logprobs_mode, by its name in :class:`RollOuts`."""
LEAST_TEMPERATURE = 0.01
"""vLLM raises smaller ones to this, but for 0."""


class VLLMEngine:
    """vLLM's offline engine, ``vllm.LLM``.

    Every sequence gets a seed of its own, made of ``seed`` and its key, so that a call can be repeated; the draws are
    vLLM's, not those of :func:`kd_kernels.sample`. The ids that end a sequence are ``options.stop_ids`` and no others.

    Args:
        llm: a ``vllm.LLM``. Its ``logprobs_mode`` decides what is returned: "raw_logprobs", vLLM's default, are
            ``model_logprobs``, "processed_logprobs" are ``logprobs``; the other of the two is None.
        vocab: the tokenizer's number of ids, as in :class:`CausalLM`.

    New weights are the caller's to send before a call, by whatever way of vLLM's suits its placement; after that, its
    cache of prefixes, which the old weights filled, must be emptied with ``llm.reset_prefix_cache()``.

    Raises:
        RuntimeError: vllm is not installed, or this version lacks a name or a field that is used here.
        ValueError: an LLM whose logprobs_mode gives no log-probabilities; later, options that vLLM does not have.
    """

    def __init__(self, llm: object, vocab: int) -> None:
        try:
            vllm, inputs = importlib.import_module("vllm"), importlib.import_module("vllm.inputs")
        except ImportError as error:
            raise RuntimeError(
                f"VLLMEngine: vllm must be installed, got {error}; pip install vllm, or generate with the model itself"
            ) from error
        self._version = getattr(vllm, "__version__", "unknown")
        self._params, self._prompt = self._get(vllm, "SamplingParams"), self._get(inputs, "TokensPrompt")
        self._llm, self._vocab = llm, vocab
        mode = self._get(llm, "llm_engine.model_config.logprobs_mode")
        if mode not in VLLM_FIELDS:
            fail("VLLMEngine", "logprobs_mode of the LLM", " or ".join(VLLM_FIELDS), repr(mode))
        self._field = VLLM_FIELDS[mode]

    def generate(
        self, prompts: Sequence[Tensor], options: Options, *, seed: int, keys: Tensor | None = None
    ) -> RollOuts:
        """See :class:`ExternalEngine`. ``options.batch_size`` is ignored: vLLM makes its own batches.

        Raises:
            RuntimeError: what comes back is not what vLLM documents: other prompts, a sequence without tokens or
                without log-probabilities, or one that ended for another reason than a stop id or its length.
        """
        where = "VLLMEngine.generate"
        prompts = check_prompts(where, prompts, self._vocab)
        check_ids(where, "stop_ids", options.stop_ids, self._vocab)
        _check_sampling(where, options)
        keys, budgets = check_keys(where, keys, prompts), options.budgets(where, prompts)
        requests = [self._prompt(prompt_token_ids=prompt.tolist()) for prompt in prompts]
        params = [
            self._sampling_params(options, budget, sequence_seed(seed, key))
            for budget, key in zip(budgets, keys.tolist())
        ]
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        if len(outputs) != len(prompts):
            self._misfit("LLM.generate's answer", f"{len(prompts)} outputs", len(outputs))
        parts = [self._sequence(i, prompt, output, options) for i, (prompt, output) in enumerate(zip(prompts, outputs))]
        completions, reasons, logprobs = map(tuple, zip(*parts))
        fields = {"logprobs": None, "model_logprobs": None} | {self._field: logprobs}
        return RollOuts(tuple(prompts), completions, reasons, **fields)

    def _sampling_params(self, options: Options, budget: int, seed: int) -> object:
        sampling = options.sampling
        fields = {
            "n": 1, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
            "min_p": sampling.min_p, "seed": seed, "max_tokens": budget, "min_tokens": options.min_new_tokens,
            "stop_token_ids": list(options.stop_ids), "ignore_eos": True, "logprobs": 0, "detokenize": False,
        }
        try:
            return self._params(**{name: value for name, value in fields.items() if value is not None})
        except TypeError as error:
            self._misfit("SamplingParams", "a class with the fields " + ", ".join(fields), error)

    def _sequence(self, i: int, prompt: Tensor, output: object, options: Options) -> tuple[Tensor, str, Tensor]:
        """Completion, finish reason and log-probabilities of one RequestOutput."""
        if list(self._get(output, "prompt_token_ids")) != prompt.tolist():
            self._misfit(
                f"prompt_token_ids of output {i}", "those of the prompt", self._get(output, "prompt_token_ids")
            )
        (completion,) = self._get(output, "outputs")
        tokens, reason = list(self._get(completion, "token_ids")), self._get(completion, "finish_reason")
        if not tokens:
            self._misfit(f"output {i}", "of at least one token", "none")
        ended_well = reason == "length" or reason == "stop" and tokens[-1] in options.stop_ids
        if not ended_well:
            self._misfit(
                f"finish_reason of output {i}", '"length", or "stop" after one of stop_ids',
                f"{reason!r} after {tokens[-1]}"
            )
        entries = self._get(completion, "logprobs")
        if entries is None or len(entries) != len(tokens) or any(t not in entry for t, entry in zip(tokens, entries)):
            self._misfit(f"logprobs of output {i}", f"one entry for each of its {len(tokens)} tokens", entries)
        logprobs = [self._get(entry[token], "logprob") for token, entry in zip(tokens, entries)]
        return torch.tensor(tokens), reason, torch.tensor(logprobs, dtype=torch.float32)

    def _get(self, owner: object, path: str) -> object:
        """An attribute of an attribute ... of something of vLLM's."""
        found = owner
        for name in path.split("."):
            if not hasattr(found, name):
                self._misfit(getattr(owner, "__name__", type(owner).__name__), f"something with {path}", f"no {name}")
            found = getattr(found, name)
        return found

    def _misfit(self, what: str, requirement: str, got: object) -> NoReturn:
        raise RuntimeError(
            f"VLLMEngine: {what} must be {requirement}, got {got}; vllm is {self._version}, "
            "this is written for the interface that 0.11 to 0.20 document"
        )


def _check_sampling(where: str, options: Options) -> None:
    sampling: Sampling = options.sampling
    if 0.0 < sampling.temperature < LEAST_TEMPERATURE or math.isinf(sampling.temperature):
        fail(where, "temperature", f"0, or finite and at least {LEAST_TEMPERATURE}", sampling.temperature)
    if sampling.top_p == 0.0:
        fail(where, "top_p", "above 0", 0.0, "temperature=0 takes the likeliest id")
    if options.entropy:
        fail(where, "entropy", "False", True, "vLLM does not return it; score gives it")
