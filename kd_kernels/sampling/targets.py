"""``sampled_targets``: a teacher that is known at the ids that were drawn from it, without bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_kernels import _backend, _check, products
from kd_kernels.logits import Logits, SparseTargets, check_dense, leading_shape, vocab
from kd_kernels.sampling import driver, philox
from kd_kernels.sampling.arguments import Place, Rows, autocast_name, check_budget, check_vocab
from kd_kernels.sampling.reference import RowTargets, TargetRequest

WHERE = "sampled_targets"
MAX_CERTAIN = 65_535 - philox.MAX_DRAWS
"""So that a row has at most 65,535 entries, which is what a row of the cache can hold."""


def sampled_targets(
    logits: Logits, n: int, *, proposal_temperature: float = 1.0, certain: int = 0, seed: int | Tensor,
    keys: Tensor | None = None, positions: Tensor | None = None, max_scratch_bytes: int | None = None,
    backend: str | None = None,
) -> SparseTargets:
    """n draws of every row, with replacement, as importance-weighted targets: an unbiased stand-in for the whole row.

    For any f of an id's log-probabilities, ``sum_i importance_i f_i`` over a row's entries has the expectation
    ``sum_v f_v`` over the vocabulary; :func:`kd_loss` with such targets, and its gradient, have those of the dense
    teacher (for divergences that are sums over ids, which all of the built-in ones are). Top-k targets do not: what
    they cut changes the optimum. Has the distribution of::

        p = logits.softmax(-1)
        q = p ** (1 / proposal_temperature)
        q[the ``certain`` likeliest ids] = 0
        q = q / q.sum(-1)
        drawn = torch.multinomial(q, n, replacement=True)
        importance = bincount(drawn) / (n * q)                    # 1 at the certain ids

    Draws depend on the row, ``seed``, ``keys`` and ``positions`` as in :func:`sample` (``DRAWS.md`` beside this file,
    section 6), and share no words with those of :func:`sample`.

    Args:
        logits: the teacher, ``[..., V]`` or what stands for it; fp32, bf16, fp16 or fp64. Leading dimensions are
            flattened to N rows. A logit of -inf is never drawn.
        n: draws in a row, 1 to 4,096. Distinct ids are fewer: 50 draws give 17 in a row of SmolLM2's, on average.
        proposal_temperature: above 0, finite. Above 1 the tail is drawn more often and weighs less.
        certain: 0 to 61,439. So many of the likeliest ids (ties to the lower id) are entries with importance 1, and the
            draws are of the others: less variance for the same n, as long as the head of the distribution matters most.
        seed, keys, positions: as in :func:`sample`.
        max_scratch_bytes: bound on temporary memory, the result (16 bytes an entry in fp32) not counted. None: 256 MiB
            on a CPU, 1.4 GiB elsewhere.
        backend: "cpp" (CPU), "triton" (GPU; no fp64), "reference" (torch operations, any device), or None: by device.

    Returns:
        SparseTargets of N rows, without gradient, with distinct ids in a row, by falling logit, equal ones by rising
        id. ``logprobs`` are the teacher's own, at temperature 1. ``importance`` is count / (n proposal(id)), or 1.
        ``tail_logprob`` is None: the estimate covers the tail. A row of which ``certain`` leaves nothing has no draws.

    Raises:
        TypeError, ValueError: an argument is not as above; a row with NaN or +inf, or with -inf alone; a budget too
            small for one row.
        RuntimeError: a backend that does not exist here, or while a CUDA graph is captured: how many entries come out
            depends on the data.

    Numerics: logits and exponentials in fp32 (fp64 for fp64 inputs), sums of 128 exponentials in fp32, everything
    across those in fp64; under autocast, inputs of products are rounded to its dtype. Uniforms have 52 bits. Equal
    logits give equal targets on one device, bit for bit, in any batch, order and chunk. Between backends a draw differs
    if it falls within rounding of one of the V boundaries: one in a thousand at V = 150,000.

    Cost: 2 N H V operations for a head; each logit is read once, and once more where the proposal is not the row
    itself. One exponential a logit and reading, n calls of Philox a row, 128 exponentials for each group that is hit.
    Waits for a GPU once a chunk. Not a registered op of torch, as :func:`topk_targets` is not.

    Source: Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs",
    arXiv 2503.16870 (random sampling KD; there, 50 draws at temperature 1).
    """
    if torch.compiler.is_compiling():  # kernels that write through pointers must not be traced
        return torch.compiler.disable(sampled_targets)(
            logits, n, proposal_temperature=proposal_temperature, certain=certain, seed=seed, keys=keys,
            positions=positions, max_scratch_bytes=max_scratch_bytes, backend=backend,
        )
    check_dense(WHERE, logits)
    _check_number("n", n, 1, philox.MAX_DRAWS)
    _check_number("certain", certain, 0, MAX_CERTAIN)
    temperature = _check.positive(WHERE, "proposal_temperature", proposal_temperature)
    place = Rows(WHERE, leading_shape(logits), logits.device).place(seed, keys, positions)
    check_budget(WHERE, max_scratch_bytes)
    chosen = _backend.choose(WHERE, backend, logits.device, tuple(driver.IMPLEMENTATIONS))
    check_vocab(WHERE, chosen, vocab(logits), products.tensors_of(logits))
    _backend.check_not_capturing(
        WHERE, "the call", "made outside", "a capture", "how many entries come out depends on the data"
    )
    name = autocast_name(logits.device)
    autocast = getattr(torch, name) if name else None
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        driver.check_values(WHERE, driver.valid_positions(place.positions))
        return _walk(products.flattened(logits), place, n, temperature, certain, autocast, max_scratch_bytes, chosen)


def _check_number(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        _check.fail_type(WHERE, name, "an int", type(value).__name__)
    if not least <= value <= most:
        _check.fail(WHERE, name, f"in {least}..{most}", value)


def _walk(
    noun: Logits, place: Place, n: int, temperature: float, certain: int, autocast: torch.dtype | None,
    max_scratch_bytes: int | None, backend: str,
) -> SparseTargets:
    """All rows, chunk by chunk."""
    columns, count, device = vocab(noun), place.seeds.shape[0], place.seeds.device
    dtype, rows_of = products.work_dtype(*products.tensors_of(noun)), driver.implementation(backend)
    inverse = torch.tensor(driver.inverse_of(temperature), dtype=dtype).item()
    request = TargetRequest(*place, inverse, n, min(certain, columns))
    width = min(columns, n + certain)
    rows = products.source(noun, None, dtype, autocast=autocast, native=rows_of.NATIVE)
    own_bytes_per_row, own_fixed_bytes = rows_of.target_scratch(columns, request, dtype)
    rectangle_bytes = width * (8 + 2 * dtype.itemsize)
    step = products.rows_per_chunk(
        WHERE, count, rows.bytes_per_row + own_bytes_per_row + rectangle_bytes, rows.fixed_bytes + own_fixed_bytes,
        max_scratch_bytes, device,
    )
    rows.open(min(step, max(count, 1)))
    new = lambda size, kind: torch.empty(min(step, count), *size, dtype=kind, device=device)  # noqa: E731
    room = RowTargets(new((), torch.int64), new((width,), torch.int64), new((width,), dtype), new((width,), dtype))
    parts = [tuple(x[:0].flatten() for x in room)]
    for begin in range(0, count, step):
        here = slice(begin, min(begin + step, count))
        out = RowTargets(*(x[: here.stop - begin] for x in room))
        chunk_request = request._replace(**{name: x[here].contiguous() for name, x in place._asdict().items()})
        rows_of.target_rows(rows.chunk(here.start, here.stop), chunk_request, out)
        _check_rows(out.counts, begin, noun, dtype, autocast)
        written = torch.arange(width, device=device) < out.counts[:, None]
        parts.append((out.counts.clone(), *(x[written] for x in out[1:])))
    counts, ids, logprobs, importance = (torch.cat(field) for field in zip(*parts))
    return SparseTargets(F.pad(counts.cumsum(0), (1, 0)), ids, logprobs, importance=importance)


def _check_rows(counts: Tensor, begin: int, noun: Logits, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    """Raise for the first row of a chunk that is no distribution."""
    if bool((counts < 0).any()):
        row = begin + (counts < 0).nonzero()[0]
        remedy = "look for an overflow in the teacher, and leave out rows that are padding"
        driver.fail_row(WHERE, "logits", noun, row, dtype, autocast, remedy)
