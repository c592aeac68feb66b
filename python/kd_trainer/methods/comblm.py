"""CombLM's mixture of language models as a teacher: each has a say by what it is worth on held-out text.

Ormazabal, Artetxe and Agirre 2023, "CombLM: Adapting Black-Box Language Models through Small Fine-Tuned Models",
arXiv 2305.16876, combine a large model and a small expert by

    p(.|x) = sum_j w_j(x) p_j(.|x),        w fitted by cross-entropy on a little text, the models frozen

Here p is what a student learns from, by ``objective``; the models are ``teacher`` and ``more_teachers``. ``weights``:

- "mean": all the same, nothing is fitted;
- "scalar": one number for each model;
- "entropy": a function of the entropies of all models at the position, a network of one hidden layer of ``width``
  units.

The text is what ``data.holdout`` leaves out of training (its first ``texts`` documents; without holdout, training text,
on which an expert that was tuned on it looks better than it is). The fit is a smooth problem of at most a hundred
numbers, done once, in fp64, when the first batch comes. The paper's richer inputs, and its weights for every id of the
vocabulary, are not offered; how wide its networks are could not be read. Entropies cost one more product of each
teacher's head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_kernels import EnsembleLogits, LinearLogits, token_stats
from kd_trainer.config import Config
from kd_trainer.data import Batch, Document
from kd_trainer.errors import check_one_of, fail
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, Parts, held_out
from kd_trainer.models import rows_of
from kd_trainer.registry import MethodSpec, register
from kd_trainer.rollout.generate import by_length
from kd_trainer.teachers import LiveTeacher, SeveralTeachers, live_teachers

RIDGE = 1e-5
"""Times the squared norm of what is fitted: where one model is better throughout, the best weights are at infinity."""


@dataclass(frozen=True)
class Options:
    weights: str = "entropy"
    texts: int = 200  # that weights are fitted on, at most
    width: int = 16  # of "entropy"

    def __post_init__(self) -> None:
        check_one_of("config", "options.weights", self.weights, ("mean", "scalar", "entropy"))
        for name in ("texts", "width"):
            if getattr(self, name) < 1:
                fail("config", f"options.{name}", "at least 1", getattr(self, name))


class Weights(nn.Module):
    """Weights of the members, fp64 ``[M, members]``, from their entropies in nats; equal until they are fitted."""

    def __init__(self, kind: str, members: int, vocab: int, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(members, dtype=torch.float64))
        self.network, self._largest = None, math.log(vocab)
        if kind == "entropy":
            hidden = torch.randn(width, members, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            self.network = nn.ParameterDict({
                "hidden": nn.Parameter(hidden), "threshold": nn.Parameter(torch.zeros(width, dtype=torch.float64)),
                "out": nn.Parameter(torch.zeros(members, width, dtype=torch.float64)),
            })

    def log_weights(self, entropies: Tensor) -> Tensor:
        logits = self.bias.expand(entropies.shape)
        if (net := self.network) is not None:
            hidden = torch.tanh(entropies.double() / self._largest @ net["hidden"].T + net["threshold"])
            logits = logits + hidden @ net["out"].T
        return logits.log_softmax(-1)

    def forward(self, entropies: Tensor) -> Tensor:
        return self.log_weights(entropies).exp()

    def loss(self, logprobs: Tensor, entropies: Tensor) -> Tensor:
        """Cross-entropy of the labels under the mixture, a token; both ``[M, members]``."""
        return -torch.logsumexp(self.log_weights(entropies) + logprobs, -1).mean()

    def fit(self, logprobs: Tensor, entropies: Tensor) -> None:
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(logprobs, entropies) + RIDGE * sum(p.square().sum() for p in self.parameters())
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)


class Mixture(SeveralTeachers):
    """Several live models, mixed at every position by fitted weights."""

    def __init__(self, members: Sequence[LiveTeacher], weights: Weights | None, texts: Sequence[Document]) -> None:
        super().__init__(members)
        self.name, self.weights = f"mixture of {self.name}", weights
        self._texts: Sequence[Document] | None = texts  # None once the weights are fitted

    @torch.no_grad()
    def targets(self, batch: Batch) -> EnsembleLogits:
        members = super().targets(batch)
        if self.weights is None:
            return EnsembleLogits(members, space="prob")
        if self._texts is not None:
            self._fit(batch.rows.device)
        _, entropies = self._said(members, batch)
        weights = entropies.new_ones(len(batch.labels), len(members))
        weights[batch.counted] = self.weights(entropies.cpu()).to(weights)
        return EnsembleLogits(members, weights, "prob")

    def _said(self, members: Sequence[LinearLogits], batch: Batch) -> tuple[Tensor, Tensor]:
        """``[M, members]`` twice, for the rows that count: log-probabilities of the labels, and entropies."""
        labels = batch.labels[batch.counted]
        said = [token_stats(rows_of(member, batch.counted), labels) for member in members]
        return torch.stack([s.logprob for s in said], 1), torch.stack([s.entropy for s in said], 1)

    def _fit(self, device: torch.device) -> None:
        batches = [batch.to(device) for _, batch in by_length(self._texts, 4096)]
        said = [self._said(super(Mixture, self).targets(batch), batch) for batch in batches]
        logprobs, entropies = (torch.cat([one[i] for one in said]).double().cpu() for i in range(2))
        self.weights.fit(logprobs, entropies)
        self._texts = None
        mean = ", ".join(f"{weight:.3f}" for weight in self.weights(entropies).mean(0).tolist())
        alone = ", ".join(f"{loss:.4f}" for loss in (-logprobs.mean(0)).tolist())
        loss = float(self.weights.loss(logprobs, entropies))
        print(f"comblm: mean weights {mean}; loss {loss:.4f} on {len(logprobs)} tokens, of the members {alone}")


def build(config: Config, parts: Parts) -> Method:
    options, members = config.options, live_teachers(config, parts)
    weights, texts = None, ()
    if options.weights != "mean":
        weights = Weights(options.weights, len(members), parts.student.vocab, options.width)
        texts = held_out(config, parts)[: options.texts]
    tokens = DatasetTokens.of(config, parts.documents)
    return Method.single("comblm", tokens, Mixture(members, weights, texts), DivergenceObjective.of(config))


register(MethodSpec(
    "comblm", "a mixture of teachers, its weights fitted on held-out text", "Ormazabal et al. 2023, arXiv 2305.16876",
    build, Options, needs=("live teacher", "several teachers"),
))
