"""vLLM behind the engine's method, with a module that has the documented classes and answers as a recording does."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch

from kd_trainer.rollout import LocalEngine, Options, Sampling, VLLMEngine, generate, sequence_keys
from rollout_oracles import prompts, tiny_model

OPTIONS = Options(max_length=12, min_new_tokens=1, stop_ids=(2, 9), sampling=Sampling(0.8, top_p=0.9))
TEXTS = [torch.tensor([5, 6, 7]), torch.tensor([8])]
ANSWERS = [([11, 12, 2], "stop"), ([13, 14, 15, 16], "length")]


@dataclasses.dataclass
class SamplingParams:
    """The documented fields that concern us, with vLLM's defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True


class Recording:
    """An ``LLM`` that answers with ``answers`` and remembers what it was asked."""

    def __init__(self, answers=ANSWERS, mode: str = "raw_logprobs") -> None:
        self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(logprobs_mode=mode))
        self.answers = answers

    def generate(self, requests, params, use_tqdm=True):
        self.requests, self.params, self.use_tqdm = requests, params, use_tqdm
        return [self.output(request, *answer) for request, answer in zip(requests, self.answers)]

    def output(self, request, tokens, reason):
        logprobs = [{token: types.SimpleNamespace(logprob=-0.1 * (i + 1), rank=1)} for i, token in enumerate(tokens)]
        completion = types.SimpleNamespace(index=0, token_ids=tuple(tokens), logprobs=logprobs, finish_reason=reason)
        return types.SimpleNamespace(
            prompt_token_ids=list(request["prompt_token_ids"]), outputs=[completion], finished=True
        )


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    module, inputs = types.ModuleType("vllm"), types.ModuleType("vllm.inputs")
    module.SamplingParams, module.__version__ = SamplingParams, "0.20.2"
    inputs.TokensPrompt = lambda prompt_token_ids: {"prompt_token_ids": prompt_token_ids}  # a TypedDict
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
    return module


def test_requests_and_answers():
    llm = Recording()
    rollouts = VLLMEngine(llm, vocab=61).generate(TEXTS, OPTIONS, seed=4)
    assert llm.requests == [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [8]}] and llm.use_tqdm is False
    first, second = llm.params
    assert dataclasses.replace(first, seed=None) == SamplingParams(
        temperature=0.8, top_p=0.9, max_tokens=9, min_tokens=1, stop_token_ids=[2, 9], ignore_eos=True, logprobs=0,
        detokenize=False,
    )
    assert second.max_tokens == 11
    assert [c.tolist() for c in rollouts.completions] == [[11, 12, 2], [13, 14, 15, 16]]
    assert rollouts.finish_reasons == ("stop", "length")
    torch.testing.assert_close(rollouts.model_logprobs[0], torch.tensor([-0.1, -0.2, -0.3]))
    assert rollouts.logprobs is None and rollouts.entropies is None
    assert rollouts.documents()[1].tokens.tolist() == [8, 13, 14, 15, 16] and rollouts.documents()[1].first_target == 1


def test_seeds_follow_the_sequence_and_not_its_place():
    llm = Recording()
    engine = VLLMEngine(llm, vocab=61)
    seeds = []
    for texts, seed in ((TEXTS, 4), (TEXTS[::-1], 4), (TEXTS, 5)):
        engine.generate(texts, OPTIONS, seed=seed, keys=sequence_keys(texts))
        seeds.append([params.seed for params in llm.params])
    assert seeds[0] == seeds[1][::-1] and not set(seeds[0]) & set(seeds[2])
    assert all(0 <= seed < 2**63 for pair in seeds for seed in pair)


def test_processed_logprobs_are_those_of_the_distribution_that_was_drawn_from():
    rollouts = VLLMEngine(Recording(mode="processed_logprobs"), vocab=61).generate(TEXTS, OPTIONS, seed=4)
    assert rollouts.model_logprobs is None
    torch.testing.assert_close(rollouts.logprobs[1], torch.tensor([-0.1, -0.2, -0.3, -0.4]))


def test_the_models_own_generation_is_an_engine():
    lm = tiny_model()
    four = Options(max_new_tokens=4)
    ours, direct = LocalEngine(lm).generate(prompts(), four, seed=1), generate(lm, prompts(), four, seed=1)
    assert all(map(torch.equal, ours.completions, direct.completions))


@pytest.mark.parametrize(
    "answers, message",
    [
        (ANSWERS[:1], "LLM.generate's answer must be 2 outputs, got 1; vllm is 0.20.2"),
        ([([], "length"), ANSWERS[1]], "output 0 must be of at least one token, got none"),
        ([ANSWERS[0], ([13, 14], "abort")], "finish_reason of output 1 must be .*, got 'abort' after 14"),
        ([ANSWERS[0], ([13, 14], "stop")], "finish_reason of output 1 must be .*, got 'stop' after 14"),
    ],
)
def test_answers_that_are_not_as_documented(answers, message):
    with pytest.raises(RuntimeError, match=f"VLLMEngine: {message}"):
        VLLMEngine(Recording(answers), vocab=61).generate(TEXTS, OPTIONS, seed=0)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda o: setattr(o, "prompt_token_ids", [1]),
            r"prompt_token_ids of output 0 must be those of the prompt, got \[1\]",
        ),
        (
            lambda o: setattr(o.outputs[0], "logprobs", None),
            "logprobs of output 0 must be one entry for each of its 3 tokens, got None",
        ),
        (lambda o: o.outputs[0].logprobs[1].clear(), "logprobs of output 0 must be one entry for each of its 3 tokens"),
        (
            lambda o: delattr(o.outputs[0], "token_ids"),
            "SimpleNamespace must be something with token_ids, got no token_ids",
        ),
    ],
)
def test_outputs_that_are_not_as_documented(spoil, message):
    class Spoiled(Recording):
        def output(self, *args):
            made = super().output(*args)
            spoil(made)
            return made

    with pytest.raises(RuntimeError, match=f"VLLMEngine: {message}"):
        VLLMEngine(Spoiled(), vocab=61).generate(TEXTS, OPTIONS, seed=0)


def test_versions_that_do_not_fit(vllm, monkeypatch):
    llm = Recording()
    del llm.llm_engine.model_config.logprobs_mode
    with pytest.raises(
        RuntimeError, match="Recording must be something with llm_engine.model_config.logprobs_mode, got no"
    ):
        VLLMEngine(llm, vocab=61)
    with pytest.raises(
        ValueError, match="logprobs_mode of the LLM must be raw_logprobs or processed_logprobs, got 'raw_logits'"
    ):
        VLLMEngine(Recording(mode="raw_logits"), vocab=61)
    vllm.SamplingParams = lambda temperature: None
    with pytest.raises(
        RuntimeError, match="SamplingParams must be a class with the fields n, temperature, .*unexpected keyword"
    ):
        VLLMEngine(Recording(), vocab=61).generate(TEXTS, OPTIONS, seed=0)
    del vllm.SamplingParams
    with pytest.raises(RuntimeError, match="vllm must be something with SamplingParams, got no SamplingParams"):
        VLLMEngine(Recording(), vocab=61)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RuntimeError, match="VLLMEngine: vllm must be installed, got .*; pip install vllm"):
        VLLMEngine(Recording(), vocab=61)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            Options(4, sampling=Sampling(temperature=0.005)),
            "temperature must be 0, or finite and at least 0.01, got 0.005",
        ),
        (
            Options(4, sampling=Sampling(temperature=float("inf"))),
            "temperature must be 0, or finite and at least 0.01, got inf",
        ),
        (Options(4, sampling=Sampling(top_p=0.0)), "top_p must be above 0, got 0.0; temperature=0 takes the likeliest"),
        (Options(4, entropy=True), "entropy must be False, got True; vLLM does not return it"),
        (Options(4, stop_ids=(61,)), "stop_ids must be below the model's vocabulary of 61, got 61"),
        (Options(max_length=3), "max_length must be at least 4 for prompt 0 of 3 tokens, got 3"),
    ],
)
def test_options_that_vllm_does_not_have(options, message):
    with pytest.raises(ValueError, match=f"VLLMEngine.generate: {message}"):
        VLLMEngine(Recording(), vocab=61).generate(TEXTS, options, seed=0)
