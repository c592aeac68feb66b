"""Draws from max(p - q, 0): what is left of a teacher's distribution when a student has drafted its share of it."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels import products
from kd_kernels.logits import Logits, vocab
from kd_kernels.products import RawRows
from kd_kernels.sampling import driver, philox, reference
from kd_kernels.sampling.arguments import Place, Warp
from kd_kernels.sampling.reference import Request, RowSamples

COPIES = 2 * reference.COPIES
"""Temporaries of 8 bytes a logit that are held at once: those of both models."""


def draw(
    where: str, teacher: Logits, student: Logits, rows: Tensor, place: Place, warp: Warp, student_warp: Warp,
    dtype: torch.dtype, autocast: torch.dtype | None, max_scratch_bytes: int | None, backend: str,
) -> RowSamples:
    """One id of each of the rows (int64 ``[R]``). p and q are formed in torch operations, for these rows alone.

    Place and warps are of these rows, a tensor each where they are not None. ``logprobs`` and ``model_logprobs`` are
    the teacher's, ``p`` and untempered, in ``dtype``.
    """
    count, device, columns, rows_of = rows.shape[0], rows.device, vocab(teacher), driver.implementation(backend)
    sources = [products.source(noun, rows, dtype, autocast=autocast) for noun in (teacher, student)]
    own_bytes_per_row, own_fixed_bytes = rows_of.scratch(columns, dtype)
    new = lambda size, kind: torch.empty(size, dtype=kind, device=device)  # noqa: E731
    out = RowSamples(new(count, torch.int64), new(count, dtype), new(count, dtype), None, None)
    with torch.autocast(device.type, enabled=False):
        for here, chunks in products.chunks_of(
            where, sources, count, own_bytes_per_row + 8 * COPIES * columns, own_fixed_bytes, max_scratch_bytes, device
        ):
            cut = lambda fields: [None if x is None else x[here].contiguous() for x in fields]  # noqa: B023, E731
            logits = chunks[0].logits()
            p, q = (
                reference.warped(z, driver.inverse_temperature(temperature, dtype), *filters)
                for z, (temperature, *filters) in ((logits, cut(warp)), (chunks[1].logits(), cut(student_warp)))
            )
            left = (p.exp() - q.exp()).clamp_min_(0.0).log_().to(dtype)
            has_left = left.amax(1, keepdim=True) > -torch.inf
            part = out.of(here)
            one = torch.ones(len(left), dtype=dtype, device=device)
            request = Request(*cut(place), one, None, None, None, None, philox.RESAMPLE_RACE)
            rows_of.sample_rows(RawRows(torch.where(has_left, left, p.to(dtype))), request, part)
            at = part.ids[:, None]
            part.logprobs.copy_(p.gather(1, at)[:, 0])
            part.model_logprobs.copy_(logits.double().log_softmax(1).gather(1, at)[:, 0])
    return out
