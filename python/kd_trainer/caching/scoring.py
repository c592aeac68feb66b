"""What a teacher, or several as one, says about the rows of a batch: the noun, its faults, and which rows to keep."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kd_kernels import EnsembleLogits, LinearLogits, SparseTargets, sampled_targets, token_stats, topk_targets
from kd_trainer.caching.options import WHERE, CacheOptions
from kd_trainer.data import Batch, Document
from kd_trainer.errors import fail
from kd_trainer.models import (
    CausalLM, check_same_vocabulary, load_pretrained, load_tokenizer, model_fingerprint, rows_of, vocab_of,
)

Logits = LinearLogits | EnsembleLogits

SAMPLING_SEED = 0
"""Of the draws of sampled rows: the same document has the same rows in every cache of a teacher."""


class Scorer:
    """One or several models of one tokenizer as one distribution.

    Args:
        names: as :func:`~kd_trainer.models.load_pretrained` takes them.
        dtype: of the weights.
        head_dtype: what final hidden states and the head's weight are rounded to before their product, whose result is
            fp32 in any case. None: ``dtype``.
        space, weights: of :class:`~kd_kernels.EnsembleLogits`.

    Raises:
        FileNotFoundError, ValueError: as in loading a model; tokenizers that differ; weights that do not fit.
    """

    def __init__(
        self, names: Sequence[str], dtype: str = "float32", *, head_dtype: str | None = None, space: str = "logit",
        weights: Sequence[float] | None = None,
    ) -> None:
        self.name = " + ".join(names)
        if weights is not None and len(weights) != len(names):
            fail(WHERE, "--weights", f"one number for each of {len(names)} teachers", list(weights))
        self.tokenizer = load_tokenizer(names[0])
        for name in names[1:]:
            check_same_vocabulary(self.tokenizer, name, "a teacher")
        models = [load_pretrained(name, dtype) for name in names]
        self._weights = None if weights is None else tuple(weights)
        self._space = space
        self.fingerprint = _fingerprint(models, space, self._weights)
        self.models = [CausalLM(model, vocab_of(self.tokenizer)).requires_grad_(False) for model in models]
        sizes = sorted({model.vocab for model in self.models})
        if len(sizes) > 1:
            fail(WHERE, "teachers", "of one number of ids", sizes)
        self.vocab = sizes[0]
        self.head_dtype = head_dtype or dtype
        self._cast = None if head_dtype in (None, dtype) else getattr(torch, head_dtype)
        self._heads: dict[int, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.models[0].device

    @property
    def padding(self) -> int:
        """Columns of the first head that no id of the tokenizer stands for; they count as -inf."""
        return self.models[0].head.weight.shape[0] - self.vocab

    def to(self, device: torch.device | str) -> Scorer:
        for model in self.models:
            model.to(device)
        return self

    def check_length(self, documents: Sequence[Document]) -> None:
        """Raise where a document is longer than what a model has positions for."""
        longest = max(map(len, documents))
        for model in self.models:
            most = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
            if most is not None and longest > most:
                fail(WHERE, "--max-length", f"at most the {most} positions of {type(model.model).__name__}", longest)

    def check_layouts(self, documents: Sequence[Document]) -> None:
        """Raise where segments of a packed document would see each other."""
        if any(document.layout for document in documents):
            for model in self.models:
                model.check_packing()

    @torch.no_grad()
    def logits(self, batch: Batch, rows: Tensor) -> Logits:
        """What stands for the ``[M, V]`` logits of ``rows [M]`` (int64) of a batch on the scorer's device.

        Raises:
            ValueError: a hidden state is NaN or infinite.
        """
        members = [self._member(i, model(batch), batch, rows) for i, model in enumerate(self.models)]
        if len(members) == 1:
            return members[0]
        return EnsembleLogits(tuple(members), weights=self._weights, space=self._space)

    def _member(self, i: int, logits: LinearLogits, batch: Batch, rows: Tensor) -> LinearLogits:
        hidden, weight = logits.hidden[rows], logits.weight
        bad = ~hidden.isfinite().all(1)
        if bool(bad.any()):
            document, row = _place(batch, int(rows[bad.nonzero()[0]]))
            begin = self.tokenizer.decode(document.tokens[:12])
            fail(
                WHERE, f"hidden states of {type(self.models[i].model).__name__}", "finite",
                f"NaN or infinity in row {row} of the document that begins {begin!r}", "try --dtype float32",
            )
        if self._cast is not None:
            if i not in self._heads:
                self._heads[i] = weight.to(self._cast)
            hidden, weight = hidden.to(self._cast), self._heads[i]
        return dataclasses.replace(logits, hidden=hidden, weight=weight)


def load_scorer(names: Sequence[str], options: CacheOptions) -> Scorer:
    """The teachers as the options want them."""
    return Scorer(
        names, options.dtype, head_dtype=options.head_dtype, space=options.ensemble, weights=options.weights,
    )


def _fingerprint(models: Sequence, space: str, weights: tuple[float, ...] | None) -> str:
    """Of one model its own; of several a hash of theirs, of how they are averaged, and of their normalised weights."""
    own = [model_fingerprint(model) for model in models]
    if len(own) == 1:
        return own[0]
    given = weights or (1.0,) * len(own)
    members = sorted((name, weight / sum(given)) for name, weight in zip(own, given))
    return hashlib.sha256(json.dumps({"ensemble": space, "members": members}).encode()).hexdigest()


def _place(batch: Batch, row: int) -> tuple[Document, int]:
    """The document that a row of the batch belongs to, and its number there."""
    for document in batch.documents:
        if row < len(document) - 1:
            break
        row -= len(document) - 1
    return document, row


@contextlib.contextmanager
def memory_named(batch: Batch) -> Iterator[None]:
    """An accelerator that is out of memory becomes a ValueError that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows, width = batch.input_ids.shape
        raise ValueError(
            f"{WHERE}: --batch-tokens must be small enough for the memory of {batch.input_ids.device}, got "
            f"{rows * width} tokens ({rows} documents of {width}) that do not fit; lower it, or --max-length"
        ) from error


# ---------------------------------------------------------------------------------------------------- rows and values


class Selector:
    """Which of the rows that count are kept, by the entropy of the teacher or of another model.

    A position where a model is sure teaches little: SE-KD (arXiv 2602.01395) keeps the fifth of the positions where the
    student is least sure. Here a fraction is taken document by document, so that what is kept of one does not depend
    on which others it is scored with.
    """

    def __init__(self, options: CacheOptions, tokenizer, device: torch.device | str) -> None:
        self._options = options
        self._model: CausalLM | None = None
        if options.select is not None:
            check_same_vocabulary(tokenizer, options.select, "--select")
            self._model = CausalLM(load_pretrained(options.select, options.dtype), vocab_of(tokenizer)).to(device)

    @torch.no_grad()
    def rows(self, batch: Batch, scorer: Scorer) -> tuple[Tensor, Logits, Tensor | None]:
        """Rows of the batch to keep (int64), the teacher's logits there, and its log-probabilities of their labels
        where these came with the entropies."""
        counted = batch.counted
        if not self._options.selects:
            return counted, scorer.logits(batch, counted), None
        logits = scorer.logits(batch, counted)
        if self._model is None:
            stats = token_stats(logits, batch.labels[counted])
            entropy, logprobs = stats.entropy, stats.logprob
        else:
            judged = rows_of(self._model(batch), counted)
            entropy, logprobs = token_stats(judged, batch.labels[counted]).entropy, None
        kept = self._kept(entropy, batch)
        return counted[kept], rows_of(logits, kept), None if logprobs is None else logprobs[kept]

    def _kept(self, entropy: Tensor, batch: Batch) -> Tensor:
        kept = torch.ones_like(entropy, dtype=torch.bool)
        if self._options.min_entropy is not None:
            kept &= entropy >= self._options.min_entropy
        if self._options.fraction is not None:
            counts = [int(document.counted.sum()) for document in batch.documents]
            for part, own in zip(entropy.split(counts), kept.split(counts)):
                most = math.ceil(self._options.fraction * len(part))
                own &= torch.zeros_like(own).index_fill_(0, part.topk(most).indices, True)
        return kept.nonzero().squeeze(1)


def kept_targets(logits: Logits, batch: Batch, kept: Tensor, options: CacheOptions, vocab: int) -> SparseTargets:
    """The entries of each row that go into the cache: the likeliest, or some of them and draws from the others.

    Draws are a function of the document's tokens and the place in it, so that they do not depend on the batch.

    Args:
        logits: of the rows ``kept`` (int64) of the batch.
    """
    if options.sampled is None:
        return topk_targets(logits, min(options.k, vocab), mass=options.mass, temperatures=options.temperatures)
    lengths = torch.tensor([len(document) - 1 for document in batch.documents])
    keys = torch.tensor([document.key for document in batch.documents]).repeat_interleave(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    here = kept.cpu()
    return sampled_targets(
        logits, options.sampled, proposal_temperature=options.proposal_temperature, certain=min(options.k, vocab - 1),
        seed=SAMPLING_SEED, keys=keys[here].to(kept.device), positions=positions[here].to(kept.device),
    )


def label_logprobs(logits: Logits, labels: Tensor, targets: SparseTargets) -> Tensor:
    """fp32 ``[N]``: log-probability of each row's label, from its logit and that of the row's first entry.

    The log-probability of the first entry fixes the row's normaliser, so that two dot products of length H a row take
    the place of a pass over the vocabulary. A mixture of probabilities has no logit: there the pass is taken.
    """
    if isinstance(logits, EnsembleLogits) and logits.space == "prob":
        return token_stats(logits, labels).logprob
    top, top_logprob = targets.ids[targets.offsets[:-1]].long(), targets.logprobs[targets.offsets[:-1]]
    return top_logprob + _logits_at(logits, labels) - _logits_at(logits, top)


def _logits_at(logits: Logits, ids: Tensor) -> Tensor:
    """fp32 ``[N]``: one logit a row."""
    if isinstance(logits, EnsembleLogits):
        return sum(weight * _logits_at(member, ids) for weight, member in zip(logits.weights, logits.members))
    value = (logits.hidden.float() * logits.weight[ids].float()).sum(1)
    if logits.bias is not None:
        value = value + logits.bias[ids].float()
    value = value * logits.scale
    return value if logits.softcap is None else logits.softcap * torch.tanh(value / logits.softcap)
