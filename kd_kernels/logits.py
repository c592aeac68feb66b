"""The nouns: what stands for a matrix of logits without being one.

========================  =======================================  ==================================================
noun                      holds                                    stands for
========================  =======================================  ==================================================
``torch.Tensor``          ``[..., V]``                             logits that the caller already has
:class:`LinearLogits`     ``[..., H]`` and ``[V, H]``              logits of a language-model head, never materialised
:class:`SparseTargets`    ids and log-probabilities, CSR           a cached or sampled teacher, any number of ids a row
:class:`EnsembleLogits`   other nouns                              several teachers, averaged before any truncation
========================  =======================================  ==================================================

Shapes, dtypes and devices are checked where a noun is written down, so that a mistake is reported on the caller's line
and not inside a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kernels import _check

__all__ = ["EnsembleLogits", "LinearLogits", "Logits", "SparseTargets", "Targets"]


@dataclass(frozen=True, eq=False)
class LinearLogits:
    """Logits of a linear head: ``z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``.

    Without ``softcap`` it is ``scale * (hidden @ weight.T + bias)``.

    Args:
        hidden: ``[..., H]``; fp32, bf16, fp16 or fp64. The last hidden states, after the final norm.
        weight: ``[V, H]``. The head. Need not have the dtype of ``hidden`` (fp32 master weights under autocast).
        bias: ``[V]`` or None.
        scale: multiplies the raw logits (Cohere's ``logit_scale``; Granite divides, so pass ``1 / logits_scaling``).
        softcap: Gemma's final soft-capping, or None.
        valid_vocab: the number of real tokens when ``V`` is padded: columns from ``valid_vocab`` on count as ``-inf``
            and get no gradient. None: all V.

    Raises:
        TypeError: an argument is no tensor or has a dtype that is not supported.
        ValueError: shapes or devices disagree, or a number is out of range.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None

    def __post_init__(self) -> None:
        where = "LinearLogits"
        hidden = _check.floating(where, "hidden", self.hidden)
        weight = _check.floating(where, "weight", self.weight)
        if weight.dim() != 2:
            _check.fail(where, "weight", "of shape [V, H]", list(weight.shape))
        if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
            _check.fail(where, "hidden", f"of shape [..., H={weight.shape[1]}] to match weight", list(hidden.shape))
        _check.same_device(where, "weight", weight, hidden.device)
        if self.bias is not None:
            bias = _check.floating(where, "bias", self.bias)
            if bias.shape != weight.shape[:1]:
                _check.fail(where, "bias", f"of shape [V={weight.shape[0]}]", list(bias.shape))
            _check.same_device(where, "bias", bias, hidden.device)
        _check.positive(where, "scale", self.scale)
        if self.softcap is not None:
            _check.positive(where, "softcap", self.softcap, "pass None for no soft-capping")
        if self.valid_vocab is not None:
            if isinstance(self.valid_vocab, bool) or not isinstance(self.valid_vocab, int):
                _check.fail_type(where, "valid_vocab", "an int or None", type(self.valid_vocab).__name__)
            if not 0 < self.valid_vocab <= weight.shape[0]:
                _check.fail(where, "valid_vocab", f"in 1..V={weight.shape[0]}", self.valid_vocab)

    @property
    def leading_shape(self) -> torch.Size:
        """Shape of the rows: everything but the last dimension."""
        return self.hidden.shape[:-1]

    @property
    def vocab(self) -> int:
        """Number of columns that exist: ``valid_vocab``, or V."""
        return self.weight.shape[0] if self.valid_vocab is None else self.valid_vocab

    @property
    def device(self) -> torch.device:
        return self.hidden.device


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """A teacher that is known at some ids only: from a cache on disk, or sampled.

    Row ``i`` holds entries ``offsets[i]`` to ``offsets[i + 1]``: distinct token ids with the teacher's
    log-probabilities, which are normalised over the *whole* vocabulary (they do not sum to one over the row).
    ``tail_logprob`` is the log of the mass that the row leaves out.

    Args:
        offsets: int64 ``[N + 1]``, non-decreasing, ``offsets[0] == 0`` and ``offsets[N] == nnz``. A row may be empty.
        ids: int64 or int32 ``[nnz]``, distinct within a row.
        logprobs: fp32 or fp64 ``[nnz]``, nats, natural order free.
        tail_logprob: ``[N]``, nats, at most 0; ``-inf`` where nothing is left out. None where the tail is not known
            (``tail="bucket"`` then refuses).
        importance: ``[nnz]`` or None. Weights that make ``sum_i importance_i f(p_i, q_i)`` an unbiased estimate of the
            sum over the vocabulary: 1 for an id that is in the row with certainty, ``count / (n * proposal(id))`` for a
            sampled one. With weights there is no tail: the estimate already covers it.
        temperatures: the temperatures at which ``log_z`` is known.
        log_z: ``[N, len(temperatures)]``, ``log sum_v exp(logprob_v / T)`` over the whole vocabulary; 0 at T = 1. None
            means that temperature 1 alone is known. The tail of a truncated row cannot be re-tempered without it.

    Raises:
        TypeError, ValueError: as in every noun. Values of ``offsets`` and ``ids`` are checked by the verbs, on the CPU.
    """

    offsets: Tensor
    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor | None = None
    importance: Tensor | None = None
    temperatures: tuple[float, ...] = (1.0,)
    log_z: Tensor | None = None

    def __post_init__(self) -> None:
        where = "SparseTargets"
        offsets = _check.tensor(where, "offsets", self.offsets)
        if offsets.dtype != torch.int64:
            _check.fail_type(where, "offsets", "of dtype int64", offsets.dtype)
        if offsets.dim() != 1 or offsets.shape[0] < 1:
            _check.fail(where, "offsets", "of shape [N + 1]", list(offsets.shape))
        ids = _check.integral(where, "ids", self.ids)
        if ids.dim() != 1:
            _check.fail(where, "ids", "of shape [nnz]", list(ids.shape))
        entries, rows, device = ids.shape, offsets.shape[0] - 1, ids.device
        _check.same_device(where, "offsets", offsets, device)
        for name, shape in (("logprobs", entries), ("importance", entries), ("tail_logprob", (rows,))):
            value = getattr(self, name)
            if value is None and name != "logprobs":
                continue
            value = _check.tensor(where, name, value)
            if value.dtype not in (torch.float32, torch.float64):
                _check.fail_type(where, name, "of dtype float32 or float64", value.dtype)
            if tuple(value.shape) != tuple(shape):
                _check.fail(where, name, f"of shape {list(shape)}", list(value.shape))
            _check.same_device(where, name, value, device)
        temperatures = tuple(_check.positive(where, "temperatures", t) for t in self.temperatures)
        object.__setattr__(self, "temperatures", temperatures)
        if self.log_z is None:
            if temperatures != (1.0,):
                _check.fail(where, "log_z", f"given when temperatures are {temperatures}", None)
        else:
            log_z = _check.tensor(where, "log_z", self.log_z)
            if tuple(log_z.shape) != (rows, len(temperatures)):
                _check.fail(where, "log_z", f"of shape {[rows, len(temperatures)]}", list(log_z.shape))
            _check.same_device(where, "log_z", log_z, device)

    @property
    def leading_shape(self) -> torch.Size:
        return torch.Size((self.offsets.shape[0] - 1,))

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @staticmethod
    def from_topk(ids: Tensor, logprobs: Tensor, tail_logprob: Tensor | None = None) -> SparseTargets:
        """From rectangles ``ids [N, k]`` and ``logprobs [N, k]``, as serving engines return them.

        Log-probabilities must be normalised over the whole vocabulary, and whoever pads rows must cut the padding
        first. Without ``tail_logprob`` the tail is ``log(1 - sum)`` of the row, as exact as the fp64 sum of what was
        given.
        """
        where = "SparseTargets.from_topk"
        ids, logprobs = _check.integral(where, "ids", ids), _check.tensor(where, "logprobs", logprobs)
        if ids.dim() != 2 or ids.shape != logprobs.shape:
            _check.fail(
                where, "ids and logprobs", "of one shape [N, k]", f"{list(ids.shape)} and {list(logprobs.shape)}"
            )
        rows, k = ids.shape
        if tail_logprob is None:
            tail_logprob = torch.log((1.0 - logprobs.double().exp().sum(1)).clamp_min(0.0)).to(logprobs.dtype)
        offsets = torch.arange(rows + 1, device=ids.device) * k
        return SparseTargets(offsets, ids.reshape(-1), logprobs.reshape(-1), tail_logprob)

    def at_temperature(self, temperature: float) -> SparseTargets:
        """The same rows, with log-probabilities and tail of the distribution ``p^(1/T) / Z_T``; exact, because Z_T is
        stored.

        Raises:
            ValueError: ``temperature`` is not among ``temperatures`` (the message lists those), or the rows carry
                importance weights (drawn at another temperature they estimate nothing).
        """
        if temperature == 1.0:
            return self
        if self.importance is not None:
            _check.fail("kd_loss", "temperature", "1.0 with importance-weighted targets", temperature)
        if self.log_z is None or temperature not in self.temperatures:
            declared = ", ".join(map(str, self.temperatures))
            _check.fail(
                "kd_loss", "temperature", f"one that the sparse targets declare ({declared})", temperature,
                "log Z of a truncated row cannot be recovered; build the targets with temperatures=(..., T)",
            )
        log_z = self.log_z[:, self.temperatures.index(temperature)].to(self.logprobs.dtype)
        logprobs = (self.logprobs / temperature - log_z[self.row_of_entry()]).clamp(max=0.0)
        kept = torch.zeros_like(log_z, dtype=torch.float64)
        kept.index_add_(0, self.row_of_entry(), logprobs.double().exp())
        tail = torch.log((1.0 - kept).clamp_min(0.0)).to(self.logprobs.dtype)
        if self.tail_logprob is not None:
            # What a cache rounded may leave nothing to 1, or too much. The tail as one id bounds it: sum x^(1/T) is at
            # least (sum x)^(1/T) for T > 1, and at most that for T < 1.
            bound = self.tail_logprob.to(tail.dtype) / temperature - log_z
            nearest = torch.maximum(tail, bound) if temperature > 1 else torch.minimum(tail, bound)
            tail = torch.where(tail == -torch.inf, bound, nearest)
            # A row that leaves nothing out does so at every temperature: the rounding of 1 - kept is no mass.
            tail = torch.where(self.tail_logprob == -torch.inf, -torch.inf, tail)
        return SparseTargets(self.offsets, self.ids, logprobs, tail)

    def row_of_entry(self) -> Tensor:
        """int64 ``[nnz]``: the row that each entry belongs to."""
        counts = self.offsets.diff()
        rows = torch.arange(counts.shape[0], device=self.device)
        return torch.repeat_interleave(rows, counts, output_size=self.ids.shape[0])

    def select(self, rows: Tensor) -> SparseTargets:
        """The given rows (int64 ``[M]``, any order, repeats allowed) as new targets. Synchronises on a GPU."""
        starts, counts = self.offsets[rows], self.offsets.diff()[rows]
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        shift = torch.repeat_interleave(starts - offsets[:-1], counts)
        entries = torch.arange(shift.shape[0], device=self.device) + shift
        pick = lambda x, index: None if x is None else x[index]  # noqa: E731
        return dataclasses.replace(
            self, offsets=offsets, ids=self.ids[entries], logprobs=self.logprobs[entries],
            tail_logprob=pick(self.tail_logprob, rows), importance=pick(self.importance, entries),
            log_z=pick(self.log_z, rows),
        )

    def to(self, device: torch.device | str) -> SparseTargets:
        """The same targets on another device."""
        move = lambda x: x.to(device) if isinstance(x, Tensor) else x  # noqa: E731
        return dataclasses.replace(self, **{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)})

    @staticmethod
    def cat(parts: Sequence[SparseTargets]) -> SparseTargets:
        """Rows of several targets, one after the other. All must declare the same temperatures and the same fields."""
        where = "SparseTargets.cat"
        if not parts:
            _check.fail(where, "parts", "at least one SparseTargets", "none")
        first = parts[0]
        fields = ("ids", "logprobs", "tail_logprob", "importance", "log_z")
        shape_of = lambda part: (part.temperatures, *(getattr(part, name) is None for name in fields))  # noqa: E731
        if any(shape_of(part) != shape_of(first) for part in parts):
            _check.fail(where, "parts", "alike in temperatures and in which fields they have", "a mixture")
        counts = torch.cat([part.offsets.diff() for part in parts])
        joined = {
            name: torch.cat([getattr(p, name) for p in parts]) for name in fields if getattr(first, name) is not None
        }
        return dataclasses.replace(first, offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)), **joined)


@dataclass(frozen=True, eq=False)
class EnsembleLogits:
    """Several teachers as one: ``sum_i w_i z_i`` (``space="logit"``) or ``log sum_i w_i softmax(z_i)``
    (``space="prob"``).

    The members are reduced densely, chunk of rows by chunk of rows, so a top-k taken afterwards is the top-k of the
    ensemble and not a union of supports.

    Args:
        members: tensors or :class:`LinearLogits` with the same rows and the same vocabulary.
        weights: one positive number a member; or floats ``[..., members]``, the rows' shape and one weight a member, at
            least 0 (values are not looked at); normalised to sum 1. None: equal.
        space: "logit" averages logits (the geometric mean of the distributions, renormalised), "prob" averages
            probabilities (the mixture).
    """

    members: tuple[Tensor | LinearLogits, ...]
    weights: tuple[float, ...] | Tensor | None = None
    space: str = "logit"

    def __post_init__(self) -> None:
        where = "EnsembleLogits"
        members = tuple(self.members)
        if not members:
            _check.fail(where, "members", "at least one", "none")
        _check.one_of(where, "space", self.space, ("logit", "prob"))
        for i, member in enumerate(members):
            if not isinstance(member, (Tensor, LinearLogits)):
                _check.fail_type(where, f"members[{i}]", "a tensor or LinearLogits", type(member).__name__)
            if isinstance(member, Tensor):
                _check.floating(where, f"members[{i}]", member)
            if leading_shape(member) != leading_shape(members[0]):
                _check.fail(
                    where, f"members[{i}]", f"of {list(leading_shape(members[0]))} rows like members[0]",
                    list(leading_shape(member)),
                )
            _check.same_device(where, f"members[{i}]", member, members[0].device)  # type: ignore[arg-type]
            if vocab(member) != vocab(members[0]):
                _check.fail(
                    where, f"members[{i}]", f"of V={vocab(members[0])} like members[0]", vocab(member),
                    "give the padded ones valid_vocab",
                )
        object.__setattr__(self, "members", members)
        if isinstance(self.weights, Tensor):
            weights, shape = _check.floating(where, "weights", self.weights), (*leading_shape(members[0]), len(members))
            if tuple(weights.shape) != shape:
                _check.fail(where, "weights", f"of shape {list(shape)}", list(weights.shape))
            _check.same_device(where, "weights", weights, members[0].device)
            weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
            object.__setattr__(self, "weights", weights / weights.sum(-1, keepdim=True))
            return
        weights = (1.0,) * len(members) if self.weights is None else tuple(self.weights)
        if len(weights) != len(members):
            _check.fail(where, "weights", f"one number for each of {len(members)} members", f"{len(weights)}")
        total = sum(_check.positive(where, "weights", w) for w in weights)
        object.__setattr__(self, "weights", tuple(w / total for w in weights))

    @property
    def leading_shape(self) -> torch.Size:
        return leading_shape(self.members[0])

    @property
    def vocab(self) -> int:
        return vocab(self.members[0])

    @property
    def device(self) -> torch.device:
        return self.members[0].device


Logits = Tensor | LinearLogits | EnsembleLogits
"""Whatever stands for a dense matrix of logits."""

Targets = Logits | SparseTargets
"""Whatever can be a teacher."""


def leading_shape(logits: Targets) -> torch.Size:
    """Shape of the rows of any noun: everything but the vocabulary."""
    return logits.shape[:-1] if isinstance(logits, Tensor) else logits.leading_shape


def vocab(logits: Logits) -> int:
    """Number of columns of any dense noun that exist."""
    return logits.shape[-1] if isinstance(logits, Tensor) else logits.vocab


def check_dense(where: str, logits: object) -> None:
    """Raise unless ``logits`` is a dense noun of floats with at least one column."""
    if not isinstance(logits, (Tensor, LinearLogits, EnsembleLogits)):
        _check.fail_type(where, "logits", "a tensor, LinearLogits or EnsembleLogits", type(logits).__name__)
    if isinstance(logits, Tensor) and _check.floating(where, "logits", logits).dim() < 1:
        _check.fail(where, "logits", "of shape [..., V]", list(logits.shape))
    if vocab(logits) < 1:
        _check.fail(where, "logits", "of at least one column", 0)
