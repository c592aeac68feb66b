"""``topk_targets``: a dense teacher, cut to its k most likely ids, with exactly what is needed to know what was cut."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_kernels import _backend, _check, products
from kd_kernels.logits import Logits, SparseTargets, check_dense, vocab
from kd_kernels.targets.truncated import INFINITE, NOT_A_NUMBER, Truncated

WHERE = "topk_targets"
MAX_K = 65_535  # what a row of the cache can hold
IMPLEMENTATIONS = {"reference": "reference", "cpp": "cpp_impl", "triton": "triton_impl"}
"""By backend, the module with its ``topk``; imported when the backend first runs."""


def topk_targets(
    logits: Logits, k: int, *, mass: float | None = None, temperatures: Sequence[float] = (1.0,),
    max_scratch_bytes: int | None = None, backend: str | None = None,
) -> SparseTargets:
    """The k most likely ids of every row, their log-probabilities, and the exact mass of all the others.

    Equivalent to, but without the ``[N, V]`` matrix where ``logits`` is a :class:`LinearLogits`::

        logprobs = logits.double().log_softmax(-1)
        kept, ids = logprobs.topk(k)                                    # ties: the lower id
        tail_logprob = logprobs.scatter(-1, ids, -inf).logsumexp(-1)
        log_z = [(logprobs / T).logsumexp(-1) for T in temperatures]

    Args:
        logits: ``[..., V]`` or what stands for it; fp32, bf16, fp16 or fp64 ("triton": no fp64, and V up to 2^24). An
            ensemble is reduced densely before anything is cut. Leading dimensions are flattened to N rows. A logit of
            -inf is a masked id, never kept.
        k: entries to keep in a row, 1 to 65,535. Rows with fewer than k ids that are not masked keep those.
        mass: keep only the shortest prefix of those k whose probability reaches ``mass``, 0 < mass <= 1; rows then
            differ in length. None: all k. At least one id is kept.
        temperatures: dimensionless, above 0, distinct. ``log_z`` is computed at each: without it the tail of a
            truncated row cannot be re-tempered later. Each beyond 1.0 costs one exponential a logit.
        max_scratch_bytes: bytes of temporary memory, the result (12 bytes an entry in fp32) not counted. None: as much
            as runs fast.
        backend: "cpp" (CPU), "triton" (GPU) or "reference" (any device). None: by the device.

    Returns:
        SparseTargets of N rows, without gradient, on the device of ``logits``. In a row, entries fall in
        log-probability, equal ones rise in id. fp32 (fp64 for fp64 inputs), int64 ids. ``tail_logprob`` is -inf where
        nothing is left out. ``log_z`` is ``[N, len(temperatures)]``, 0 at T = 1. N = 0 gives no rows.

    Raises:
        TypeError: ``logits`` is no dense noun, or a number is no number.
        ValueError: ``k``, ``mass`` or ``temperatures`` out of range; a row with NaN or +inf, or with -inf alone; a
            budget too small for one row.
        RuntimeError: a backend that does not exist here.

    Numerics: logits in fp32, whatever autocast says (products of half-precision inputs are not rounded). The tail is
    summed over the very columns that are left out, relative to its own maximum, so it is as exact at e^-200 as at 1/2;
    it is never one minus the rest. ``cpp``: exponentials to 2 ulp of fp32, sums in fp64 from block to block. The result
    does not depend on the number of threads, and on ``max_scratch_bytes`` by no more than rounding. A prefix that
    reaches ``mass`` within 1e-6 may differ by an entry between backends. ``triton``: exponentials and sums in fp32,
    each group of 16 to 512 adjacent columns by itself, then those; a number of ``logprobs`` or ``log_z`` that is near 0
    is exact to 3e-7 nats, not to its own size. The tail is summed as above, so it is exact at any depth. Which entries
    come, and in which order, is the same for every backend that is given the same logits: it is decided by comparisons
    alone.

    Cost: the head's product, and one pass over its result while that is in cache. ``H V`` weights are read once for up
    to 1,024 rows. Scratch of ``cpp``: a panel of 1 to 2 Mi logits (4 to 8 MiB in fp32), and 16 k + 1,048 bytes a row of
    it; whole rows for a mixture of probabilities.

    ``triton``, a row: 4 V bytes are written by the product and read once (of logits that are given, V elements of their
    own dtype are read); then, with S near the root of 2 V / k, 16 V / S bytes of summaries (8 V / S more for each
    further temperature), 4 k S of candidates and about 100 k of sorting and writing: at V = 128,256 and k = 64, 15
    percent of the 4 V for everything but the logits. Scratch: the products, the summaries, and 52 k bytes a row.
    Nothing waits for the device but the search for bad rows, once, at the end. Any k is taken; where V k is beyond
    2^27, the selection reads its candidates from cache up to 32 times. Not yet measured on a GPU.

    Not a registered op of torch: how many entries come out depends on the values, so under ``torch.compile`` the graph
    breaks and this runs as it is. Targets are made outside of the training step.
    """
    if torch.compiler.is_compiling():  # kernels that write through pointers must not be traced
        return torch.compiler.disable(topk_targets)(
            logits, k, mass=mass, temperatures=temperatures, max_scratch_bytes=max_scratch_bytes, backend=backend
        )
    _check_arguments(logits, k, mass)
    temperatures = _checked_temperatures(temperatures)
    chosen = _backend.choose(WHERE, backend, logits.device, tuple(IMPLEMENTATIONS))
    _backend.check_not_capturing(
        WHERE, "the call", "made outside", "a capture", "how many entries come out depends on the data"
    )
    if chosen == "triton":
        _backend.check_triton_takes(WHERE, vocab(logits), *products.tensors_of(logits))
    topk = importlib.import_module(f"kd_kernels.targets.{IMPLEMENTATIONS[chosen]}").topk
    others = tuple(t for t in temperatures if t != 1.0)
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        noun = products.flattened(logits)
        dtype = products.work_dtype(*products.tensors_of(noun))
        result = topk(noun, dtype, min(k, vocab(noun)), mass, others, max_scratch_bytes)
        _check_rows(result.counts)
        columns = iter(result.log_z.unbind(1))
        at_one = torch.zeros_like(result.tail_logprob)
        log_z = torch.stack([at_one if t == 1.0 else next(columns) for t in temperatures], 1)
        return _compressed(result, temperatures, log_z)


def _compressed(rows: Truncated, temperatures: tuple[float, ...], log_z: Tensor) -> SparseTargets:
    """The written entries of the rectangles, in compressed rows."""
    offsets = F.pad(rows.counts.cumsum(0), (1, 0))
    width = rows.ids.shape[1]
    if offsets[-1] == rows.ids.numel():
        ids, logprobs = rows.ids.reshape(-1), rows.logprobs.reshape(-1)
    else:
        written = torch.arange(width, device=offsets.device) < rows.counts[:, None]
        ids, logprobs = rows.ids[written], rows.logprobs[written]
    return SparseTargets(offsets, ids, logprobs, rows.tail_logprob, temperatures=temperatures, log_z=log_z)


def _check_arguments(logits: object, k: object, mass: object) -> None:
    check_dense(WHERE, logits)
    if isinstance(k, bool) or not isinstance(k, int):
        _check.fail_type(WHERE, "k", "an int", type(k).__name__)
    if not 1 <= k <= MAX_K:
        _check.fail(WHERE, "k", f"in 1..{MAX_K}", k)
    if mass is not None and _check.positive(WHERE, "mass", mass, "pass None to keep all k") > 1.0:
        _check.fail(WHERE, "mass", "at most 1", mass, "it is a probability")


def _checked_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
    if isinstance(temperatures, (int, float)):
        _check.fail_type(WHERE, "temperatures", "a sequence of numbers", temperatures, f"pass ({temperatures},)")
    checked = tuple(_check.positive(WHERE, "temperatures", t) for t in temperatures)
    if not checked or len(set(checked)) < len(checked):
        _check.fail(WHERE, "temperatures", "distinct, and at least one", checked)
    return checked


def _check_rows(counts: Tensor) -> None:
    """Raise for the first row that is no distribution."""
    if counts.numel() == 0 or counts.min() > 0:
        return
    row = int((counts <= 0).nonzero()[0])
    fault = {INFINITE: "+inf", NOT_A_NUMBER: "NaN", 0: "-inf at every id"}[int(counts[row])]
    _check.fail(
        WHERE, "logits", "free of NaN and +inf, with a finite logit in every row", f"{fault} in row {row}",
        "look for an overflow in the teacher, and leave out rows that are padding",
    )
