"""Texts of a data set in which a model has put some of the words: cheaper than roll-outs, closer to them than the
data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_trainer.data import Document
from kd_trainer.errors import check_one_of, fail
from kd_trainer.models import CausalLM
from kd_trainer.rollout.decoder import Decoder, check_decoding, evaluating
from kd_trainer.rollout.generate import by_length, check_documents, draw, fail_logits, score
from kd_trainer.rollout.options import Sampling, check_ids, check_keys, sequence_generator
from kd_trainer.rollout.result import pad

STRATEGIES = ("random", "uniform", "hard", "easy")


@dataclass(frozen=True, eq=False)
class Rewritten:
    """Documents with some targets drawn anew, in the order of what they were made of.

    Attributes:
        documents: of the same lengths and first targets. Away from the places, the same tokens.
        places: int64 ``[m_i]`` each, rising: which tokens were drawn anew; m_i may be 0. One may be the old token
            again.
        logprobs: ``[m_i]`` each: of the new tokens under the distribution that they were drawn from.
        model_logprobs: likewise under the model's own.
    """

    documents: list[Document]
    places: list[Tensor]
    logprobs: list[Tensor]
    model_logprobs: list[Tensor]


def choose_places(
    documents: Sequence[Document], fraction: float, strategy: str = "random", *, seed: int, keys: Tensor | None = None,
    entropies: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Which targets of each document to replace: ``round(fraction * targets)`` of them, int64 ``[m_i]``, rising.

    Args:
        fraction: above 0, up to 1.
        strategy: "random"; "uniform", at equal distances from a random start; "hard", where the entropy is largest;
            "easy", where it is smallest (the first among equals).
        seed, keys: what is random is a function of these, as in :func:`generate`.
        entropies: of the model at each document's targets, as :func:`score` gives them: for "hard" and "easy".
    """
    where = "choose_places"
    check_one_of(where, "strategy", strategy, STRATEGIES)
    if not 0.0 < fraction <= 1.0:
        fail(where, "fraction", "above 0, up to 1", fraction)
    if strategy in ("hard", "easy") and entropies is None:
        fail(where, "entropies", f'given with strategy="{strategy}"', None, "score gives them")
    keys = check_keys(where, keys, [document.tokens for document in documents])
    places = []
    for i, (document, key) in enumerate(zip(documents, keys.tolist())):
        target_places = _target_places(document)
        targets = len(target_places)
        count = round(fraction * targets)
        if strategy == "random":
            chosen = torch.randperm(targets, generator=sequence_generator(seed, key))[:count]
        elif strategy == "uniform":
            start = torch.rand((), dtype=torch.float64, generator=sequence_generator(seed, key))
            chosen = ((torch.arange(count) + start) * (targets / max(count, 1))).long()
        else:
            chosen = entropies[i].argsort(stable=True, descending=strategy == "hard")[:count]
        places.append(target_places[chosen.sort().values])
    return places


def hide(documents: Sequence[Document], places: Sequence[Tensor], mask_id: int) -> list[Document]:
    """Documents with a mask token at the places, int64 ``[m_i]`` each. Their labels are what they were: see
    :func:`labelled`."""
    return [
        dataclasses.replace(document, tokens=document.tokens.index_fill(0, there, mask_id))
        for document, there in zip(documents, places)
    ]


def labelled(changed: Sequence[Document], texts: Sequence[Document]) -> list[Document]:
    """Documents whose rows read the changed tokens, and have to predict those of the texts that they were made of."""
    return [
        dataclasses.replace(document, labels=text.tokens[1:] if text.labels is None else text.labels)
        for document, text in zip(changed, texts)
    ]


def _target_places(document: Document) -> Tensor:
    """int64 ``[n]``, rising: the tokens that are targets."""
    return document.counted.nonzero().squeeze(1) + 1


def rewrite(
    model: CausalLM, documents: Sequence[Document], *, mask_id: int, fraction: float = 0.2, strategy: str = "random",
    sampling: Sampling = Sampling(), seed: int, keys: Tensor | None = None, batch_tokens: int = 4096,
) -> Rewritten:
    """Hide some targets behind a mask token, let the model predict them in one pass, and put the predictions in.

    The model reads every document once with all of its masks; the prediction at a masked place is drawn from the row
    before it, which sees the masks to its left. Nothing is decoded token by token. The head's product is made for
    masked places only. The strategies "hard" and "easy" read the unmasked documents once more, for the entropies.

    Args:
        model: as in :func:`generate`.
        mask_id: what stands at a place while the model predicts; "<s>" in the paper.
        fraction, strategy: as in :func:`choose_places`.
        sampling: what predictions are drawn from; ``Sampling(temperature=0)`` takes the likeliest.
        keys: int64, one a document; None: those of :func:`sequence_keys` of the documents' tokens.
        batch_tokens: about how many tokens are read at a time, padding included.

    Raises:
        ValueError: a document without targets, an id outside the vocabulary, a fraction or strategy that does not
            exist.

    Source: "Learning from Imperfect Data", arXiv 2410.11371, which leaves open whether it draws or takes the likeliest.
    """
    where = "rewrite"
    check_documents(where, documents, model.vocab)
    check_ids(where, "mask_id", [mask_id], model.vocab)
    keys = check_keys(where, keys, [document.tokens for document in documents])
    entropies = None
    if strategy in ("hard", "easy"):
        entropies = [stats.entropy for stats in score(model, documents, batch_tokens=batch_tokens)]
    places = choose_places(documents, fraction, strategy, seed=seed, keys=keys, entropies=entropies)
    masked = hide(documents, places, mask_id)
    drawn = _Drawn(places)
    with evaluating(model):
        for members, batch in by_length(masked, batch_tokens):
            begins = torch.tensor([0] + [len(documents[i]) - 1 for i in members]).cumsum(0)  # each one's first row
            rows = torch.cat([begin + places[i] - 1 for begin, i in zip(begins, members)])
            if len(rows):
                entries = torch.cat([drawn.entries(i) for i in members])
                batch = batch.to(model.device)
                hidden = model.hidden(batch)[rows.to(model.device)]
                drawn.draw(where, model, hidden, entries, sampling, seed, keys)
    return drawn.put_into(documents)


def mix(
    model: CausalLM, documents: Sequence[Document], *, fraction: float, sampling: Sampling = Sampling(), seed: int,
    keys: Tensor | None = None, batch_size: int | None = None,
) -> Rewritten:
    """Documents in which each target is, with a probability, what the model says after the mixture so far.

    Scheduled sampling, made for a whole batch before it is trained on: unlike :func:`rewrite`, a new token is drawn
    after the new tokens before it, with the cache of keys and values, one pass a new token and document; the tokens of
    the data between two new ones are read at once.

    Args:
        fraction: the probability of a new token, above 0, up to 1; 1 is the model's own continuation, as long as the
            old.
        batch_size: documents that are mixed together; None: all.
        model, sampling, seed, keys: as in :func:`rewrite`.

    Source: "Bridging the training-inference gap in LLMs by leveraging self-generated tokens", arXiv 2410.14655 (batch
    scheduled sampling), whose schedule of the probability is the caller's here.
    """
    where = "mix"
    check_documents(where, documents, model.vocab)
    if not 0.0 < fraction <= 1.0:
        fail(where, "fraction", "above 0, up to 1", fraction)
    keys = check_keys(where, keys, [document.tokens for document in documents])
    check_decoding(where, model)
    places = []
    for document, key in zip(documents, keys.tolist()):
        targets = _target_places(document)
        coins = torch.rand(len(targets), generator=sequence_generator(seed, key))
        places.append(targets[coins < fraction])
    drawn = _Drawn(places)
    order = sorted((i for i in range(len(documents)) if len(places[i])), key=lambda i: -len(documents[i]))
    size = max(1, len(order)) if batch_size is None else batch_size
    with evaluating(model):
        for begin in range(0, len(order), size):
            _mix(where, model, documents, order[begin : begin + size], drawn, sampling, seed, keys)
    return drawn.put_into(documents)


def _mix(
    where: str, model: CausalLM, documents: Sequence[Document], rows: list[int], drawn: _Drawn, sampling: Sampling,
    seed: int, keys: Tensor,
) -> None:
    """Draw the new tokens of one batch. ``rows``: the document that each row of the decoder reads."""
    decoder = Decoder(where, model, len(rows), max(len(documents[i]) for i in rows))
    unread = [documents[i].tokens for i in rows]  # after what the decoder has read
    number = 0  # of the place that is next, in every row
    while rows:
        here = torch.stack([drawn.places[i][number] for i in rows])
        counts = here - decoder.lengths  # tokens up to the place
        runs, _ = pad([tokens[:count] for tokens, count in zip(unread, counts.tolist())])
        hidden = decoder.feed(runs.to(model.device))
        decoder.drop_last(runs.shape[1] - counts)
        last = hidden[torch.arange(len(rows)), counts - 1]
        entries = torch.cat([drawn.entries(i)[number : number + 1] for i in rows])
        ids = drawn.draw(where, model, last, entries, sampling, seed, keys)
        unread = [
            torch.cat([token[None], tokens[count + 1 :]]) for token, tokens, count in zip(ids, unread, counts.tolist())
        ]
        number += 1
        left = [row for row, i in enumerate(rows) if len(drawn.places[i]) > number]
        if 0 < len(left) < len(rows):
            decoder.keep(left)
        rows, unread = [rows[row] for row in left], [unread[row] for row in left]


class _Drawn:
    """What is drawn at the places of documents: one entry a place, those of a document together."""

    def __init__(self, places: list[Tensor]) -> None:
        self.places = places
        counts = torch.tensor([len(there) for there in places])
        self._ends = counts.cumsum(0).tolist()
        self._sequences = torch.arange(len(places)).repeat_interleave(counts)
        self._positions = torch.cat(places)
        self._ids = torch.zeros_like(self._positions)
        self._logprobs: list[Tensor] | None = None

    def entries(self, document: int) -> Tensor:
        return torch.arange(self._ends[document] - len(self.places[document]), self._ends[document])

    def draw(
        self, where: str, model: CausalLM, hidden: Tensor, entries: Tensor, sampling: Sampling, seed: int, keys: Tensor
    ) -> Tensor:
        """Fill entries from hidden states ``[M, H]``; the ids, int64 ``[M]`` on the CPU."""
        sequences, positions = self._sequences[entries], self._positions[entries]
        logits = model.logits_of(hidden)
        drawn = draw(logits, sampling, seed, keys[sequences].to(model.device), positions.to(model.device), own=logits)
        ids = drawn.ids.cpu()
        if bool((ids < 0).any()):
            row = int((ids < 0).nonzero()[0])
            fail_logits(where, int(sequences[row]), int(positions[row]))
        if self._logprobs is None:
            self._logprobs = [torch.zeros(len(self._ids), dtype=drawn.logprobs.dtype) for _ in range(2)]
        for field, new in zip((self._ids, *self._logprobs), (ids, drawn.logprobs, drawn.model_logprobs)):
            field[entries] = new.cpu()
        return ids

    def put_into(self, documents: Sequence[Document]) -> Rewritten:
        counts = [len(there) for there in self.places]
        rewritten = [
            dataclasses.replace(document, tokens=document.tokens.index_copy(0, there, new))
            for document, there, new in zip(documents, self.places, self._ids.split(counts))
        ]
        logprobs = self._logprobs or [torch.zeros(0), torch.zeros(0)]
        return Rewritten(rewritten, self.places, *(list(values.split(counts)) for values in logprobs))
