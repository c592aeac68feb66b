"""``sample``: the public function and its checks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kd_kernels import _backend, _check, products
from kd_kernels.logits import Logits, check_dense, leading_shape, vocab
from kd_kernels.sampling import driver
from kd_kernels.sampling.arguments import CHECKS, PURPOSES, Rows, autocast_name, check_budget, check_vocab
from kd_kernels.sampling.driver import IMPLEMENTATIONS, Call


@dataclass(frozen=True)
class Sampled:
    """What :func:`sample` returns, of the rows' shape: int64, or fp32 (fp64 if an input is) and nats. No gradient.

    Attributes:
        ids: what was drawn; -1 where a row is no distribution and ``check="flag"``.
        logprobs: of the id under the distribution that it was drawn from: tempered, filtered, normalised.
        model_logprobs: of the id under the model's own distribution: temperature 1, no filter.
        entropy: of the model's own distribution; None unless ``return_stats``.
        lse: log-sum-exp of the model's own logits; None unless ``return_stats``.
    """

    ids: Tensor
    logprobs: Tensor
    model_logprobs: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None


def sample(
    logits: Logits, *, temperature: float | Tensor = 1.0, top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None, min_p: float | Tensor | None = None, seed: int | Tensor,
    keys: Tensor | None = None, positions: Tensor | None = None, return_stats: bool = False, check: str = "raise",
    purpose: str = "draw", max_scratch_bytes: int | None = None, backend: str | None = None,
) -> Sampled:
    """One id a row, drawn from ``softmax(logits / temperature)`` after the filters, with its exact log-probability.

    Has the distribution of, but without the ``[N, V]`` matrix where ``logits`` is a :class:`LinearLogits`::

        z = logits / temperature
        z[ids that top_k, then top_p, then min_p leave out] = -inf
        ids = torch.multinomial(z.softmax(-1), 1)[..., 0]
        logprobs = z.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        model_logprobs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]

    A draw is a function of the row's logits and arguments, its seed, key and position, and of nothing else: not of the
    batch around it, its place there, chunks, tiles or threads. Give every sequence a key and count positions along it,
    and its text does not depend on which sequences it is generated with. The contract, word by word, is ``DRAWS.md``
    beside this file.

    Args:
        logits: ``[..., V]`` or what stands for it; fp32, bf16, fp16 or fp64 ("triton": no fp64); V up to 2^24. A logit
            of -inf is never drawn.
        temperature: at least 0. 0 takes the likeliest id, the lowest among equals, whose logprob is 0. Infinite draws
            uniformly from what the filters leave. Like all that follow up to ``positions``: a number, or a tensor of
            the rows' shape.
        top_k: keep the k largest logits, ties to the lower id. At least 1; k > V keeps all. None: off.
        top_p: of what ``top_k`` leaves, keep the shortest prefix, by falling logit and rising id, whose mass at the
            temperature reaches ``top_p``; at least one id. 0..1; 1 keeps all. None: off.
        min_p: keep ids at least ``min_p`` times as likely as the likeliest, at the temperature. 0..1. None: off.
        seed: any 64 bits.
        keys: int64; names the sequence, any 64 bits. None: the number of the row, so that draws depend on its place.
        positions: int64, 0..2^32-1; the place in the sequence. None: 0, so that a second call draws the same.
        return_stats: also return entropy and lse of the model's own distribution.
        check: "raise" for an error where a row is no distribution (NaN, +inf, or -inf alone); on a GPU that waits for
            the device, once. "flag": such rows get the id -1 and NaN.
        purpose: "draw", or "resample" for the draws that :func:`accept_or_resample` takes in place of a rejected one:
            the two are independent at the same seed, key and position.
        max_scratch_bytes: bound on temporary memory. None: 256 MiB on a CPU, 1.4 GiB elsewhere.
        backend: "cpp" (CPU), "triton" (GPU), "reference" (torch operations, any device), or None: by device.

    Returns:
        :class:`Sampled`, on the device of ``logits``. N = 0 gives empty ones.

    Raises:
        TypeError, ValueError: an argument is not as above. Values of tensors are looked at on a CPU, and elsewhere with
            ``check="raise"``; with "flag", a row that has one out of range gets the id -1 on a GPU.
        RuntimeError: the backend does not exist here, or ``check="raise"`` while a CUDA graph is captured.

    Numerics: products, logits and exponentials in fp32 (fp64 for fp64 inputs), under autocast with its rounding of the
    products' inputs; sums of 128 exponentials in fp32 in a fixed order, everything across those in fp64. Uniforms of
    the race have 32 bits, with their full relative precision near 0. Equal logits give equal ids on one device, bit for
    bit; between devices and backends but for draws that fall within rounding of a boundary, below one in a million.
    Which ids the filters keep is exact, but that a prefix whose mass is within 1e-6 of ``top_p`` may differ by an id
    between backends.

    Cost: 2 N H V operations for a head, each logit read once (with filters, those near the cut again) and V / 512 calls
    of Philox a row. ``cpp``: one or two exponentials a logit; ``reference`` sorts rows where there is a filter.

    Source: groups of ids and a race between them as in FlashSampling, arXiv 2603.15854; Philox of Salmon et al. 2011;
    top_p of Holtzman et al. 2020, arXiv 1904.09751; min_p of Nguyen et al. 2024, arXiv 2407.01082.
    """
    where = "sample"
    check_dense(where, logits)
    shape, device, columns = leading_shape(logits), logits.device, vocab(logits)
    rows = Rows(where, shape, device)
    place, warp = rows.place(seed, keys, positions), rows.warp(temperature, top_k, top_p, min_p)
    _check.one_of(where, "check", check, CHECKS)
    _check.one_of(where, "purpose", purpose, tuple(PURPOSES))
    check_budget(where, max_scratch_bytes)
    chosen = _backend.choose(where, backend, device, tuple(IMPLEMENTATIONS))
    check_vocab(where, chosen, columns, products.tensors_of(logits))
    if check == "raise":
        _backend.check_not_capturing(where, "check", '"flag"', '"raise"', "look for ids of -1 after the replay")
    call = Call(
        where, "logits", columns, PURPOSES[purpose], bool(return_stats), check, autocast_name(device),
        max_scratch_bytes, chosen,
    )
    found = driver.run(logits, call, place, warp)
    return Sampled(*(found if len(shape) == 1 else (None if x is None else x.reshape(shape) for x in found)))
