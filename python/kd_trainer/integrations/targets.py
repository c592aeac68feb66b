"""What the teacher says about a padded batch, as transformers' trainers have it: a live model, the student without its
adapter, or a cache.

A batch is the keyword arguments of a model's forward. Row ``b T + t`` of its flattened ``[B, T]`` positions predicts
the token at ``t + 1``; ``rows`` names those that count, in ascending order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd_kernels import LinearLogits, SparseTargets, topk_targets
from kd_kernels.cache import CacheError, CacheReader, content_key
from kd_trainer.errors import fail
from kd_trainer.integrations.options import KDOptions
from kd_trainer.models import CausalLM

NOT_FOR_THE_BACKBONE = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_dict", "use_cache")


class BatchTargets(Protocol):
    """A source of targets for padded batches."""

    vocab: int
    needs_dataset_check: bool

    def __call__(self, inputs: Mapping[str, Tensor], rows: Tensor) -> LinearLogits | SparseTargets:
        """Targets of the named rows."""


def last_hidden(model: PreTrainedModel, inputs: Mapping[str, object], rows: Tensor) -> Tensor:
    """``[M, H]``: hidden states after the final norm at the named rows; the head is not applied."""
    body = model.base_model if model.base_model is not model else model.get_decoder()
    given = {name: value for name, value in inputs.items() if value is not None and name not in NOT_FOR_THE_BACKBONE}
    return body(**given, use_cache=False).last_hidden_state.flatten(0, 1)[rows]


def gathered(weight: Tensor) -> Tensor:
    """A head's weight as one plain tensor: under FSDP2 it is all-gathered once, and its gradient averaged and scattered
    once."""
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial

    mesh = weight.device_mesh
    full = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        # Data parallel: the mean over processes, not the sum.
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full


def head_logits(model: PreTrainedModel, like: CausalLM, hidden: Tensor) -> LinearLogits:
    """What stands for the logits of a model at some rows; ``like`` has the scale, softcap and padding found for it."""
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return LinearLogits(
        hidden.to(head.weight.device), gathered(head.weight), None if bias is None else gathered(bias),
        scale=like.scale, softcap=like.softcap, valid_vocab=like.valid_vocab,
    )


class LiveTargets:
    """A model that is run on every batch, without gradient, in the dtype that it was loaded in, on the student's
    device."""

    needs_dataset_check = False

    def __init__(self, lm: CausalLM, options: KDOptions) -> None:
        self.lm = lm.eval().requires_grad_(False)
        self.vocab, self.options = self.lm.vocab, options

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], rows: Tensor) -> LinearLogits | SparseTargets:
        if self.lm.device != rows.device:
            self.lm.to(rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            logits = head_logits(self.lm.model, self.lm, last_hidden(self.lm.model, inputs, rows))
        return reduced(logits, self.options)


class AdapterOffTargets:
    """The student's own base model, its adapter switched off for one pass: a teacher that costs no memory."""

    needs_dataset_check = False

    def __init__(self, peft_model: nn.Module, like: CausalLM, options: KDOptions) -> None:
        self._peft_model, self._like = peft_model, like
        self.vocab, self.options = like.vocab, options

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], rows: Tensor) -> LinearLogits | SparseTargets:
        model = self._like.model
        training = model.training
        model.eval()  # dropout off
        try:
            with self._peft_model.disable_adapter():
                logits = head_logits(model, self._like, last_hidden(model, inputs, rows))
                return reduced(logits, self.options)
        finally:
            model.train(training)


class CachedTargets:
    """Targets that lie on disk, found by the tokens of each sequence; a sequence that is not there is an error."""

    needs_dataset_check = True

    def __init__(self, reader: CacheReader) -> None:
        self.reader, self.vocab = reader, reader.manifest.vocab

    def sequences(self, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, int]]:
        """Of each sequence its tokens, on the host, and the place of the first in its padded row."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        found = []
        for b, row in enumerate(ids.cpu()):
            places = torch.arange(len(row)) if mask is None else mask[b].cpu().nonzero()[:, 0]
            first, last = int(places[0]), int(places[-1])
            if last - first + 1 != len(places):
                fail("CachedTargets", f"attention_mask of sequence {b}", "one run of ones", "a mask with holes")
            found.append((row[first : last + 1], first))
        return found

    @torch.compiler.disable
    def __call__(self, inputs: Mapping[str, Tensor], rows: Tensor) -> SparseTargets:
        positions = inputs.get("position_ids")
        if positions is not None and bool((positions[:, 1:] < positions[:, :-1]).any()):
            fail(
                "CachedTargets", "position_ids", "those of one document a row", "packed documents", "set packing=False"
            )
        width = inputs["input_ids"].shape[1]
        host_rows = rows.cpu()
        parts = []
        for b, (tokens, first) in enumerate(self.sequences(inputs)):
            mine = host_rows[(host_rows // width) == b] % width - first
            if len(mine) and not 0 <= int(mine[0]) <= int(mine[-1]) < len(tokens) - 1:
                fail("CachedTargets", f"labels of sequence {b}", "-100 at padding", "a label where the mask is 0")
            required = torch.zeros(len(tokens) - 1, dtype=torch.bool)
            required[mine] = True
            parts.append(self.reader.targets(tokens, required=required).select(mine))
        return SparseTargets.cat(parts).to(rows.device)

    def check(self, loader: object, at_most: int = 1024) -> None:
        """Raise :class:`CacheError` where sequences of a data loader's dataset are not in the cache.

        Looks at ``at_most`` of them, evenly spread; any other that is missing raises when its batch comes. A dataset
        without a length is looked at when its batches come, only.
        """
        dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
        if not hasattr(dataset, "__len__") or collate is None:
            return
        chosen = range(0, len(dataset), -(-len(dataset) // at_most))
        missing = 0
        for i in chosen:
            for tokens, _ in self.sequences(collate([dataset[i]])):
                missing += content_key(tokens, self.reader.manifest) not in self.reader
        if missing:
            raise CacheError(
                f"train: cache {self.reader.folder} must hold every sequence of the data set, got {missing} of "
                f"{len(chosen)} that it lacks (another text, tokenisation or length); build it of the same token ids",
                self.reader.folder,
            )


def reduced(logits: LinearLogits, options: KDOptions) -> LinearLogits | SparseTargets:
    """A live teacher's rows as a cache would hold them, where ``top_k`` asks for that. Call it without gradients."""
    if options.top_k is None:
        return logits
    temperatures = tuple(dict.fromkeys((1.0, float(options.temperature or 1.0))))
    return topk_targets(logits, min(options.top_k, logits.vocab), temperatures=temperatures)
