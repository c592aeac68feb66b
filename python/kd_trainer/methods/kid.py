"""KID, knowledge distillation on imperfect data: the student's own mistakes, for one more pass instead of a roll-out.

Zhong et al. 2024, "Learning from Imperfect Data: Towards Efficient Knowledge Distillation of Autoregressive Language
Models for Text-to-SQL", arXiv 2410.11371. In every step, of each text (x, y),

1. mask: the share ``fraction`` of the tokens of y is hidden behind ``mask``, by ``strategy``: random, uniform, hard
   (where the student's entropy on the unmasked text is largest, for which it reads it once more) or easy (where it is
   smallest);
2. predict: the student reads the masked text once, without gradient, and says what is hidden;
3. rewrite: its predictions stand in y, which makes y';

    mean_t KL(q(.|x, y'_<t) || p(.|x, y'_<t)) + w mean_t -log q(y_t | x, c_<t)        w: objective.ce_weight

with q the student and p the teacher, over the tokens of y. The teacher must run: no cache has seen y'.

Uncertain, so options. The paper does not give w (1 here). It does not say whether predictions are the likeliest tokens
or drawn: ``rollout.temperature`` 0, the default, or above. Nor in which context c its likelihood term is: ``mle:
rewritten`` (c = y', out of the same pass; the latency that the paper reports leaves no room for another) or ``text`` (c
= y, another pass of the student). ``rewrite: false`` is the paper's ablation that leaves the masks in y'. With
``objective.divergence`` the KL may be any other; the paper compares 0.2 of the tokens (0.1 to 0.3 do as well, 0.5
harms), and trains at lr 2e-4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kd_trainer.config import Config
from kd_trainer.data import Document
from kd_trainer.errors import check_one_of, fail
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, Parts
from kd_trainer.models import CausalLM
from kd_trainer.registry import MethodSpec, register
from kd_trainer.rollout import Sampling, choose_places, hide, labelled, rewrite, score, step_seed
from kd_trainer.rollout.rewrite import STRATEGIES
from kd_trainer.teachers import live_teachers


@dataclass(frozen=True)
class Options:
    fraction: float = 0.2  # alpha
    strategy: str = "random"
    mask: str | None = None  # a token; None: the tokenizer's BOS token, "<s>" in the paper
    mle: str = "rewritten"
    rewrite: bool = True

    def __post_init__(self) -> None:
        check_one_of("config", "options.strategy", self.strategy, STRATEGIES)
        check_one_of("config", "options.mle", self.mle, ("rewritten", "text"))
        if not 0.0 < self.fraction <= 1.0:
            fail("config", "options.fraction", "above 0, up to 1", self.fraction)


@dataclass(frozen=True)
class ImperfectTokens(DatasetTokens):
    """Texts in which the student has put some words; the texts themselves go with them where the options ask for it."""

    student: CausalLM
    options: Options
    mask_id: int
    sampling: Sampling
    seed: int
    autocast: bool  # of the student's extra pass, as in training
    with_texts: bool

    def produce(self, documents: Sequence[Document], index: int) -> list[Document]:
        seed = step_seed(self.seed, index, "kid")
        keys = torch.tensor([document.key for document in documents], dtype=torch.int64)
        with torch.autocast(self.student.device.type, torch.bfloat16, enabled=self.autocast):
            change = self._rewritten if self.options.rewrite else self._masked
            changed = change(documents, seed, keys)
        texts = [dataclasses.replace(document, tag="text") for document in documents] if self.with_texts else []
        return [dataclasses.replace(document, tag="rewritten") for document in labelled(changed, documents)] + texts

    def _rewritten(self, documents: Sequence[Document], seed: int, keys: torch.Tensor) -> list[Document]:
        return rewrite(
            self.student, documents, mask_id=self.mask_id, fraction=self.options.fraction,
            strategy=self.options.strategy, sampling=self.sampling, seed=seed, keys=keys,
        ).documents

    def _masked(self, documents: Sequence[Document], seed: int, keys: torch.Tensor) -> list[Document]:
        """The same places, and the masks left in them."""
        strategy, entropies = self.options.strategy, None
        if strategy in ("hard", "easy"):
            entropies = [stats.entropy for stats in score(self.student, documents)]
        places = choose_places(documents, self.options.fraction, strategy, seed=seed, keys=keys, entropies=entropies)
        return hide(documents, places, self.mask_id)


def build(config: Config, parts: Parts) -> Method:
    options, weight = config.options, config.objective.ce_weight
    if config.objective.kd_weight == 0.0:
        fail("config", "objective.kd_weight", "above 0 for method kid", 0.0, "method: masked_thought needs no teacher")
    most = max(int(document.counted.sum()) for document in parts.documents)
    if round(options.fraction * most) == 0:
        need = f"large enough to mask a token of the longest text, of {most}"
        fail("config", "options.fraction", need, options.fraction)
    with_texts = options.mle == "text" and weight > 0.0
    rollout = config.rollout
    tokens = ImperfectTokens.of(
        config, parts.documents, student=parts.student, options=options,
        mask_id=parts.token_id("options.mask", options.mask),
        sampling=Sampling(rollout.temperature, rollout.top_k, rollout.top_p), seed=config.seed,
        autocast=config.train.precision == "bf16", with_texts=with_texts,
    )
    objectives = {"rewritten": DivergenceObjective.of(config, ce_weight=0.0 if with_texts else weight)}
    if with_texts:
        objectives["text"] = DivergenceObjective.of(config, kd_weight=0.0)
    return Method("kid", tokens, live_teachers(config, parts)[0], objectives)


register(MethodSpec(
    "kid", "texts that the student rewrote in part, in one pass", "Zhong et al. 2024, arXiv 2410.11371", build, Options,
    defaults={"objective": {"divergence": "reverse_kl", "ce_weight": 1.0}, "rollout": {"temperature": 0.0}},
    needs=("live teacher",),
))
