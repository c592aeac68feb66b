"""GRIFFIN: a draft that reads its target's features, trained on the contexts that drafting gives it.

Hu et al. 2025, "GRIFFIN: Effective Token Alignment for Faster Speculative Decoding", arXiv 2502.11018. The teacher is
the target model, with last hidden states h; the student is the draft: layers of the target (one, as a rule), whose
embeddings and head stay the target's. At position t it reads ``W [embedding of token t; feature of t - 1]`` and says
what h_t is, g_t. Per position, with p and q the one head's distributions of h_t and of g_t,

    feature_weight SmoothL1(g, h) + soft_weight KL(p || q) + top_k_weight sum over the top_k of p: p log(p / q)

In the first pass all features are the target's. Pass n sees what the n-th token of a draft sees: the last n - 1
features are those of the passes before it (no gradient through them), all earlier ones the target's. A position counts
in pass n if the text's next token was among the draft's ``align_k`` likeliest there in the pass before and, from the
third pass on, the position before it counted in that pass: contexts that drafting would not reach teach nothing. The
mask and all defaults are the released code's (its second stage; the first is ``passes: 1, top_k_weight: 0``), and so is
the uniform noise on the features that are read, ``noise`` * 512 / length wide.

Other than there: the soft terms are divergences, with the cross-entropies' gradients; every pass is divided by the
tokens of the step, not by those that its mask leaves, so that splitting a batch changes nothing. The paper's fusion
module and second output are architecture: here W is all. ``model/`` gets the draft, and ``objectives.safetensors`` in
it W and its bias, as ``main.fuse.weight`` and ``main.fuse.bias``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kd_kernels import KDLoss, LinearLogits, SparseTargets, kd_loss, token_stats, topk_targets
from kd_trainer.config import Config
from kd_trainer.data import Batch
from kd_trainer.drafting import Fusion
from kd_trainer.errors import check_positive, fail
from kd_trainer.methods.base import DatasetTokens, Method, Objective, Parts
from kd_trainer.models import CausalLM, rows_of
from kd_trainer.registry import MethodSpec, register
from kd_trainer.rollout import step_seed
from kd_trainer.rollout.options import sequence_generator
from kd_trainer.teachers import live_teachers


@dataclass(frozen=True)
class Options:
    passes: int = 2
    align_k: int = 3
    top_k: int = 10
    feature_weight: float = 1.0
    soft_weight: float = 0.1
    top_k_weight: float = 0.5
    noise: float = 0.2

    def __post_init__(self) -> None:
        for name in ("passes", "align_k", "top_k"):
            if getattr(self, name) < 1:
                fail("config", f"options.{name}", "at least 1", getattr(self, name))
        check_positive("config", "options.soft_weight", self.soft_weight)
        for name in ("feature_weight", "top_k_weight", "noise"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                fail("config", f"options.{name}", "finite and at least 0", getattr(self, name))


class Draft(Objective):
    def __init__(self, options: Options, width: int, seed: int = 0) -> None:
        super().__init__()
        self.fuse = Fusion(width)
        self.options, self.seed, self.step = options, seed, 0
        self.stats = ("divergence", "label_logprob", "agreement") + ("aligned",) * (options.passes > 1)

    def begin_step(self, index: int) -> None:
        self.step = index

    def forward(
        self, student: CausalLM, targets: LinearLogits, batch: Batch, normalizer: float,
        max_scratch_bytes: int | None = None,
    ) -> KDLoss:
        options, budget = self.options, dict(max_scratch_bytes=max_scratch_bytes)
        features = targets.hidden.to(student.head.weight.dtype)
        drafted = self.fuse.passes(student, batch, features + self.noise(batch, features), options.passes)
        counts = self.counting(student, batch, drafted.detach(), budget)
        drafted, weight = drafted[:, batch.counted], counts[:, batch.counted].double().flatten()
        q, target = student.logits_of(drafted.flatten(0, 1)), rows_of(targets, batch.counted)
        again = lambda x: x.repeat(options.passes, *[1] * (x.dim() - 1))  # noqa: E731
        soft = dict(token_weight=weight, normalizer=normalizer, **budget)
        result = kd_loss(
            q, dataclasses.replace(target, hidden=again(target.hidden)), "forward_kl", kd_weight=options.soft_weight,
            labels=again(batch.labels[batch.counted]), stats=self.stats[:3], **soft,
        )
        features = again(target.hidden).to(drafted.dtype)
        error = functional.smooth_l1_loss(drafted.flatten(0, 1), features, reduction="none").mean(-1)
        loss = result.loss + options.feature_weight * (weight * error).sum() / normalizer
        if options.top_k_weight:
            likeliest = SparseTargets.cat([topk_targets(target, options.top_k, **budget)] * options.passes)
            loss = loss + kd_loss(q, likeliest, "forward_kl", kd_weight=options.top_k_weight, tail="drop", **soft).loss
        stats = {name: batch.spread(value[: len(batch.counted)]) for name, value in result.stats.items()}
        if options.passes > 1:
            stats["aligned"] = batch.spread(counts[1, batch.counted].float())
        return KDLoss(loss, stats)

    def noise(self, batch: Batch, features: Tensor) -> Tensor | float:
        """Uniform, a function of the run's seed, the step and the document."""
        if not self.options.noise:
            return 0.0
        seed, drawn = step_seed(self.seed, self.step, "noise"), []
        for document in batch.documents:
            uniform = torch.rand(len(document) - 1, features.shape[1], generator=sequence_generator(seed, document.key))
            drawn.append((uniform - 0.5) * (self.options.noise * 512 / len(document)))
        return torch.cat(drawn).to(features)

    def counting(self, student: CausalLM, batch: Batch, drafted: Tensor, budget: dict) -> Tensor:
        """bool ``[passes, N]``: the rows that count in each pass."""
        next_tokens = batch.input_ids.flatten()[batch.rows + 1]
        counted = torch.zeros_like(batch.labels, dtype=torch.bool).index_fill(0, batch.counted, True)
        goes_on = batch.places()[1] > 0
        counts = [counted]
        for earlier in drafted[:-1]:
            stats = token_stats(student.logits_of(earlier), next_tokens, k=self.options.align_k, **budget)
            aligned = stats.in_top_k & counted
            counts.append(aligned & goes_on & counts[-1].roll(1) if len(counts) > 1 else aligned)
        return torch.stack(counts)


def build(config: Config, parts: Parts) -> Method:
    (teacher, *_) = live_teachers(config, parts)
    target, draft = parts.teachers[0].head.weight, parts.student.head.weight
    if draft.shape != target.shape or not torch.equal(draft, target.to(draft.dtype)):
        fail(
            "train", "the student", "a draft with the head of its target, teacher.model",
            f"another head, {list(draft.shape)}", "cut it from the target: student.layers: [...]",
        )
    parts.student.check_masks()
    for frozen in (parts.student.model.get_input_embeddings(), parts.student.head):
        frozen.requires_grad_(False)
    objective = Draft(config.options, draft.shape[1], config.seed)
    return Method.single("griffin", DatasetTokens.of(config, parts.documents), teacher, objective)


register(MethodSpec(
    "griffin", "a draft for speculative decoding, on aligned tokens of its own", "Hu et al. 2025, arXiv 2502.11018",
    build, Options, needs=("live teacher",),
))
