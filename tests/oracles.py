"""The truth that the library is judged by: from the formulas, with torch's own losses, and nothing of the library.

p is the teacher, q the student. Everything computes in the dtype of what it is given: hand it float64 and it is the
truth, hand it float32 and it is the yardstick, the error that plain torch makes on the same inputs. Gradients come from
autograd. Nothing is chunked, truncated rows are made by adding up the columns that they leave out: slow and clear.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEVER = 1e5
"""How far below the row's maximum a logit of -inf is put: exp underflows to exactly 0 and autograd stays finite."""


# -------------------------------------------------------------------------------------------- divergences, term by term


def kl_terms(logp: Tensor, logq: Tensor) -> Tensor:
    """Terms of KL(p||q)."""
    return F.kl_div(logq, logp, reduction="none", log_target=True)


def log_mixture(weight: float, loga: Tensor, logb: Tensor) -> Tensor:
    """log(weight a + (1 - weight) b), 0 <= weight <= 1."""
    parts = [math.log(w) + x for w, x in ((weight, loga), (1.0 - weight, logb)) if w > 0.0]
    return parts[0] if len(parts) == 1 else torch.logaddexp(*parts)


def forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    return kl_terms(logp, logq)


def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    return kl_terms(logq, logp)


def jsd(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    logm = log_mixture(beta, logp, logq)
    return beta * kl_terms(logp, logm) + (1.0 - beta) * kl_terms(logq, logm)


def skew_forward_kl(logp: Tensor, logq: Tensor, alpha: float) -> Tensor:
    return kl_terms(logp, log_mixture(alpha, logp, logq))


def skew_reverse_kl(logp: Tensor, logq: Tensor, alpha: float, detach_mixture: bool = False) -> Tensor:
    logm = log_mixture(alpha, logq, logp)
    return kl_terms(logq, logm.detach() if detach_mixture else logm)


def jeffreys(logp: Tensor, logq: Tensor, weight: float) -> Tensor:
    return weight * kl_terms(logp, logq) + (1.0 - weight) * kl_terms(logq, logp)


def total_variation(logp: Tensor, logq: Tensor) -> Tensor:
    return 0.5 * F.l1_loss(logq.exp(), logp.exp(), reduction="none")


def squared_hellinger(logp: Tensor, logq: Tensor) -> Tensor:
    return 0.5 * F.mse_loss((0.5 * logq).exp(), (0.5 * logp).exp(), reduction="none")


def alpha(logp: Tensor, logq: Tensor, alpha: float) -> Tensor:
    product = (alpha * logp + (1.0 - alpha) * logq).exp()
    return (product - alpha * logp.exp() - (1.0 - alpha) * logq.exp()) / (alpha * (alpha - 1.0))


def alpha_beta(logp: Tensor, logq: Tensor, alpha: float, beta: float) -> Tensor:
    order = alpha + beta
    mean = (alpha * (order * logp).exp() + beta * (order * logq).exp()) / order
    return (mean - (alpha * logp + beta * logq).exp()) / (alpha * beta)


def squared_logprob(logp: Tensor, logq: Tensor) -> Tensor:
    both = (logp > -NEVER / 2) & (logq > -NEVER / 2)
    return torch.where(both, 0.5 * (logq - logp) ** 2, 0.0)


TERMS = {
    f.__name__: f
    for f in (
        forward_kl,
        reverse_kl,
        jsd,
        skew_forward_kl,
        skew_reverse_kl,
        jeffreys,
        total_variation,
        squared_hellinger,
        alpha,
        alpha_beta,
        squared_logprob,
    )
}
"""Name -> terms(logp, logq, **parameters), one term an event. Every entry of the library's registry needs one here."""

SYMMETRIC = {"total_variation", "squared_hellinger", "squared_logprob", ("jsd", 0.5), ("jeffreys", 0.5), ("alpha", 0.5)}
"""D(p, q) == D(q, p): by name, or by name and parameter."""

UPPER_BOUND = {
    "total_variation": lambda: 1.0,
    "squared_hellinger": lambda: 1.0,
    "jsd": lambda beta: -beta * math.log(beta) - (1.0 - beta) * math.log(1.0 - beta),
    "skew_forward_kl": lambda alpha: -math.log(alpha) if alpha > 0 else math.inf,
    "skew_reverse_kl": lambda alpha, detach_mixture=False: -math.log(alpha) if alpha > 0 else math.inf,
    "alpha": lambda alpha: 1.0 / (alpha * (1.0 - alpha)) if 0 < alpha < 1 else math.inf,
}
"""Name -> bound(**parameters): what the divergence of two disjoint distributions is."""


# --------------------------------------------------------------------------------------------------------------- logits


def linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    gradient_dtype: torch.dtype | None = None,
) -> Tensor:
    """Logits of a head, with the padding columns cut off. The gradient of the product is rounded to ``gradient_dtype``,
    as autograd does where half-precision products are widened to fp32 before the loss."""
    product = F.linear(hidden, weight, bias)
    if gradient_dtype is not None and product.requires_grad:
        product.register_hook(lambda gradient: gradient.to(gradient_dtype).to(gradient.dtype))
    logits = scale * product
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits[..., :valid_vocab]


def ensemble(members: list[Tensor], weights: list[float] | Tensor, space: str) -> Tensor:
    """Logits of several teachers: their mean, or the log of the mean of their probabilities. A tensor has weights for
    each row."""
    if isinstance(weights, Tensor):
        weights = [w[..., None] for w in weights.to(members[0].dtype).unbind(-1)]
    total = sum(weights)
    if space == "logit":
        return sum(w / total * z for w, z in zip(weights, members))
    return sum(w / total * F.softmax(z, -1) for w, z in zip(weights, members)).log()


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities; a logit of -inf becomes one that underflows (:data:`NEVER`)."""
    peak = logits.detach().amax(-1, keepdim=True)
    return F.log_softmax(torch.where(logits == -torch.inf, peak - NEVER * temperature, logits) / temperature, -1)


# -------------------------------------------------------------------------------------------------------------- targets


@dataclass
class Row:
    """One row of a truncated teacher: the ids that it keeps, their log-probabilities, and the tail's."""

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor
    importance: Tensor | None = None


def left_out(ids: Tensor, vocab: int) -> Tensor:
    """The columns that are not in ``ids``, ascending."""
    return torch.tensor(sorted(set(range(vocab)) - set(ids.tolist())), dtype=torch.int64)


def coarsen(logp: Tensor, ids: Tensor) -> Tensor:
    """Log-masses of the events {id} for every id, and of one more: everything else. [V] -> [K + 1]."""
    rest = logp[left_out(ids, logp.shape[0])]
    tail = torch.logsumexp(rest, 0) if len(rest) else torch.tensor(-NEVER, dtype=logp.dtype)
    return torch.cat([logp[ids], tail[None]])


def truncate(logits: Tensor, ids: list[Tensor], temperature: float = 1.0) -> list[Row]:
    """Truncated rows of dense teacher logits [N, V]: the log-probabilities at ``ids`` and the exact tail."""
    rows = [coarsen(logp, kept) for logp, kept in zip(log_probs(logits, temperature), ids)]
    return [Row(kept, events[:-1], events[-1]) for kept, events in zip(ids, rows)]


def topk(logits: Tensor, k: int, mass: float | None = None) -> list[Row]:
    """The k largest of each row, descending, ties to the lower id; with ``mass``, the shortest prefix that has it."""
    ids = []
    for row in logits.tolist():
        order = sorted(range(len(row)), key=lambda v: (-row[v], v))[:k]
        if mass is not None:
            probs = log_probs(torch.tensor(row, dtype=torch.float64)).exp()
            reached = [i + 1 for i in range(len(order)) if probs[order[: i + 1]].sum() >= mass]
            order = order[: reached[0]] if reached else order
        ids.append(torch.tensor(order, dtype=torch.int64))
    return truncate(logits, ids)


def log_z(logits: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """[N, len(temperatures)]: log sum_v p_v^(1/T), with p at temperature 1."""
    return torch.stack([torch.logsumexp(F.log_softmax(logits, -1) / t, -1) for t in temperatures], -1)


# ----------------------------------------------------------------------------------------------------------- row by row


def dense_divergence(student: Tensor, teacher: Tensor, name: str, params: dict, temperature: float = 1.0) -> Tensor:
    """D(p, q) of every row of logits [N, V]."""
    return TERMS[name](log_probs(teacher, temperature), log_probs(student, temperature), **params).sum(-1)


def sparse_divergence(
    student: Tensor, rows: list[Row], name: str, params: dict, tail: str = "bucket", temperature: float = 1.0
) -> Tensor:
    """D of every row against a truncated teacher whose log-probabilities are already those at ``temperature``."""
    values = []
    for logq, row in zip(log_probs(student, temperature), rows):
        if row.importance is not None:
            values.append((row.importance * TERMS[name](row.logprobs, logq[row.ids], **params)).sum())
            continue
        if tail == "bucket":
            logp, logq = torch.cat([row.logprobs, row.tail_logprob[None].clamp_min(-NEVER)]), coarsen(logq, row.ids)
        elif tail == "renormalize":
            logp, logq = F.log_softmax(row.logprobs, -1), F.log_softmax(logq[row.ids], -1)
        elif tail == "drop":
            logp, logq = row.logprobs, logq[row.ids]
        else:
            raise ValueError(tail)
        values.append(TERMS[name](logp, logq, **params).sum())
    return torch.stack(values) if values else student.sum(-1)


def row_weights(
    rows: int, labels: Tensor | None, token_weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """w [N]: the token weights, 0 where the label says to ignore."""
    weights = torch.ones(rows, dtype=dtype) if token_weight is None else token_weight.to(dtype)
    return weights if labels is None else torch.where(labels == ignore_index, 0.0, weights)


def kd_loss(
    student: Tensor,
    teacher: Tensor | list[Row],
    name: str = "forward_kl",
    params: dict | None = None,
    *,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    temperature: float = 1.0,
    squared_temperature: bool = False,
    token_weight: Tensor | None = None,
    normalizer: float | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    tail: str = "bucket",
) -> Tensor:
    """The whole objective on flat rows [N, V]; a truncated teacher is given at ``temperature`` already."""
    params = params or {}
    weights = row_weights(student.shape[0], labels, token_weight, ignore_index, student.dtype)
    if isinstance(teacher, Tensor):
        divergence = dense_divergence(student, teacher, name, params, temperature)
    else:
        divergence = sparse_divergence(student, teacher, name, params, tail, temperature)
    factor = kd_weight * (temperature**2 if squared_temperature else 1.0)
    loss = factor * divergence
    if ce_weight:
        assert labels is not None
        loss = loss + ce_weight * F.cross_entropy(student, labels, ignore_index=ignore_index, reduction="none")
    loss = torch.where(weights > 0, weights * loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = weights.sum() if normalizer is None else normalizer
    return loss.sum() / total if total > 0 else loss.sum()


# ----------------------------------------------------------------------------------------------------------- statistics


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Nats, a row."""
    return torch.distributions.Categorical(logits=log_probs(logits, temperature)).entropy()


def top1(logits: Tensor) -> Tensor:
    """The most probable id, the lowest of equals."""
    return torch.tensor([row.index(max(row)) for row in logits.tolist()], dtype=torch.int64)


def confidence(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The largest probability of every row."""
    return log_probs(logits, temperature).exp().amax(-1)


def label_logprob(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the label at temperature 1."""
    return log_probs(logits).gather(-1, labels[:, None])[:, 0]


def rank(logits: Tensor, ids: Tensor) -> Tensor:
    """The place of each id when its row is sorted by falling logit, equal ones by rising id."""
    places = []
    for row, token in zip(logits.tolist(), ids.tolist()):
        places.append(sorted(range(len(row)), key=lambda v: (-row[v], v)).index(token))
    return torch.tensor(places, dtype=torch.int64)


def token_stats(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Everything that rows [N, V] say about the ids [N]."""
    return {
        "logprob": -F.cross_entropy(logits, ids, reduction="none"),
        "lse": torch.logsumexp(logits, -1),
        "entropy": entropy(logits),
        "max": logits.amax(-1),
        "argmax": top1(logits),
        "rank": rank(logits, ids),
    }


# ---------------------------------------------------------------------------------------------------------------- draws
# Written from kd_kernels/sampling/DRAWS.md alone, in Python's own numbers, which are float64: one row at a time.


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10: four words of a counter of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for turn in range(10):
        if turn:
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        one, two = c2 * 0xCD9E8D57, c0 * 0xD2511F53
        c0, c1, c2, c3 = one >> 32 ^ c1 ^ k0, one % 2**32, two >> 32 ^ c3 ^ k1, two % 2**32
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Place:
    """What names a draw beside its row."""

    seed: int = 0
    key: int = 0
    position: int = 0

    def words(self, purpose: int, block: int = 0, draw: int = 0) -> tuple[int, ...]:
        seed, key = self.seed % 2**64, self.key % 2**64
        first = block + draw * 2**16 + purpose * 2**28
        return philox((first, self.position, key % 2**32, key >> 32), (seed % 2**32, seed >> 32))

    def uniform(self, purpose: int, group: int) -> float:
        return (self.words(purpose, group // 4)[group % 4] + 0.5) * 2.0**-32

    def fine_uniform(self, purpose: int, draw: int = 0) -> float:
        high, low, _, _ = self.words(purpose, 0, draw)
        return ((high * 2**32 + low) // 2**12 + 0.5) * 2.0**-52


def inverse_temperature(temperature: float) -> float:
    inverse = 0.0 if temperature == math.inf else 1.0 / temperature if temperature > 1e-300 else math.inf
    return min(max(inverse, 2.0**-126), (2 - 2.0**-23) * 2.0**127)


def falling(row: list[float]) -> list[int]:
    """Ids by falling logit, equal logits by rising id."""
    return sorted(range(len(row)), key=lambda v: (-row[v], v))


def filtered(
    row: list[float], temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    min_p: float | None = None,
) -> list[float]:
    """The row with -inf at the ids that the filters remove."""
    order, inverse = [v for v in falling(row) if row[v] > -math.inf], inverse_temperature(temperature)
    tempered = {v: (row[v] - row[order[0]]) * inverse for v in order}
    if top_k is not None:
        order = order[:top_k]
    if top_p is not None and top_p < 1:
        target, running, prefix = top_p * sum(math.exp(tempered[v]) for v in order), 0.0, []
        for v in order:
            prefix.append(v)
            running += math.exp(tempered[v])
            if running >= target:
                break
        order = prefix
    if min_p:
        order = [v for v in order if tempered[v] >= math.log(min_p)]
    kept = set(order)
    return [x if v in kept else -math.inf for v, x in enumerate(row)]


def group_masses(row: list[float], inverse: float) -> list[tuple[float, float]]:
    """(m_g, s_g) of every group of 128 ids."""
    groups = []
    for begin in range(0, len(row), 128):
        ids = row[begin : begin + 128]
        top = max(ids)
        masses = [math.exp((x - top) * inverse) if x > -math.inf else 0.0 for x in ids] + [0.0] * (128 - len(ids))
        while len(masses) > 1:
            half = len(masses) // 2
            masses = [a + b for a, b in zip(masses[:half], masses[half:])]
        groups.append((top, masses[0]))
    return groups


def pick(row: list[float], group: int, inverse: float, part: float) -> int:
    """The id of a group at which the running sum passes ``part`` of the whole."""
    ids = row[128 * group : 128 * group + 128]
    top, running, sums = max(ids), 0.0, []
    for x in ids:
        running += math.exp((x - top) * inverse) if x > -math.inf else 0.0
        sums.append(running)
    return 128 * group + next(j for j, s in enumerate(sums) if s > part * running)


def scores(row: list[float], place: Place, inverse: float, purpose: int) -> list[float]:
    """Of every group in the race."""
    noises = (-math.log1p(-place.uniform(purpose, g)) for g in range(-(-len(row) // 128)))
    return [
        (top - max(row)) * inverse + math.log(total / noise) if total else -math.inf
        for (top, total), noise in zip(group_masses(row, inverse), noises)
    ]


@dataclass(frozen=True)
class Draw:
    """One id, its log-probability, that under the model; and how sure the race was (the lead of its winner, in
    nats)."""

    id: int
    logprob: float
    model_logprob: float
    lead: float = math.inf


def score(row: list[float], left: list[float], token: int, temperature: float) -> tuple[float, float]:
    """Log-probabilities of an id: of what the filters left, and of the model."""
    inverse, top = inverse_temperature(temperature), max(row)
    log_sum = lambda xs, r: math.log(math.fsum(math.exp((x - top) * r) for x in xs))  # noqa: E731
    model = row[token] - top - log_sum(row, 1.0)
    if temperature == 0:
        return 0.0 if token == falling(row)[0] else -math.inf, model
    return (left[token] - top) * inverse - log_sum(left, inverse), model


def sample(
    row: list[float], place: Place, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    min_p: float | None = None, race: int = 0,
) -> Draw:
    """The draw of the contract."""
    if temperature == 0:
        best = falling(row)[0]
        return Draw(best, *score(row, row, best, temperature))
    left, inverse = filtered(row, temperature, top_k, top_p, min_p), inverse_temperature(temperature)
    noisy = scores(left, place, inverse, race)
    group = noisy.index(max(noisy))
    token = pick(left, group, inverse, place.uniform(race + 1, group))
    second = max((s for g, s in enumerate(noisy) if g != group), default=-math.inf)
    return Draw(token, *score(row, left, token, temperature), noisy[group] - second)


@dataclass(frozen=True)
class Counted:
    """Draws with replacement: of each id that came, how often and its probability; how close the closest call was."""

    times: dict[int, int]
    proposal: dict[int, float]
    lead: float


def sampled_targets(row: list[float], place: Place, n: int, temperature: float = 1.0, certain: int = 0) -> Counted:
    """The draws of the contract, each by itself. ``lead`` is relative to the mass of the row."""
    sure, inverse = [v for v in falling(row) if row[v] > -math.inf][:certain], inverse_temperature(temperature)
    left = [-math.inf if v in sure else x for v, x in enumerate(row)]
    peak, times, proposal, lead = max(left), {}, {}, math.inf
    if peak == -math.inf:
        return Counted(times, proposal, lead)
    groups = group_masses(left, inverse)
    masses = [math.exp((top - peak) * inverse) * total if total else 0.0 for top, total in groups]
    upto = list(itertools.accumulate(masses))
    for d in range(n):
        target = place.fine_uniform(2, d) * upto[-1]
        group = next(g for g, mass in enumerate(upto) if mass > target)
        before = upto[group] - masses[group]
        ids = left[128 * group : 128 * group + 128]
        weights = (math.exp((x - groups[group][0]) * inverse) if x > -math.inf else 0.0 for x in ids)
        sums = list(itertools.accumulate(weights))
        part = (target - before) / masses[group] * sums[-1]
        j = next(j for j, s in enumerate(sums) if s > part)
        token = 128 * group + j
        times[token] = times.get(token, 0) + 1
        proposal[token] = math.exp((row[token] - peak) * inverse) / upto[-1]
        edges = [(sums[j] - part) * masses[group] / sums[-1]]
        edges += [(part - sums[j - 1]) * masses[group] / sums[-1]] if j else [target - before] if group else []
        lead = min(lead, *(edge / upto[-1] for edge in edges))
    return Counted(times, proposal, lead)


@dataclass(frozen=True)
class Verdict:
    """A draft that was tested: the id in the end, its log-probability under the teacher's law; how close it was."""

    id: int
    accepted: bool
    logprob: float
    lead: float


def log_law(row: list[float], **arguments) -> list[float]:
    """Log-probabilities of what is left of a row, tempered and cut."""
    left = filtered(row, **arguments)
    return [score(row, left, v, arguments.get("temperature", 1.0))[0] for v in range(len(row))]


def accept_speculative(
    draft: int, teacher: list[float], student: list[float], place: Place, law: dict, student_law: dict,
) -> Verdict:
    """Speculative sampling as the contract has it; the arguments of ``filtered`` for each of the two."""
    logp, logq = log_law(teacher, **law), log_law(student, **student_law)
    test = math.log(place.fine_uniform(3))
    threshold = logp[draft] - logq[draft] if logp[draft] > -math.inf else -math.inf
    if test <= threshold:
        return Verdict(draft, True, logp[draft], threshold - test)
    left = [max(math.exp(a) - math.exp(b), 0.0) for a, b in zip(logp, logq)]
    drawn = sample([math.log(x) if x else -math.inf for x in left] if any(left) else logp, place, race=4)
    is_rounding = math.fsum(left) < 1e-9  # p = q, but for that
    return Verdict(drawn.id, False, logp[drawn.id], 0.0 if is_rounding else min(test - threshold, drawn.lead))


# ------------------------------------------------------------------------------------------------------------ gradients


def gradients(loss: Tensor, leaves: list[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    """d(sum of upstream * loss) / d leaf for every leaf; zeros where a leaf has no part in it."""
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    found = torch.autograd.grad(loss, leaves, upstream, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found)]
