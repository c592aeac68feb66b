"""From a noun and per-row arguments to samples: the registered op, its walk over chunks of rows, and what it
refuses."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import math
from types import ModuleType
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kd_kernels import _check, products
from kd_kernels.logits import Logits
from kd_kernels.loss.plan import pack, unpack
from kd_kernels.sampling.arguments import Place, Warp
from kd_kernels.sampling.reference import Request, RowSamples

IMPLEMENTATIONS = {"reference": "reference", "cpp": "cpp_impl", "triton": "triton_impl"}
"""By backend, the module with its ``sample_rows``; imported when the backend first runs."""

INVERSE_RANGE = (2.0**-126, 3.4028234663852886e38)
"""Of 1 / temperature: normal numbers of fp32, so that a logit of -inf stays -inf at an infinite temperature, and the
largest logit stays 0 below itself at the smallest."""


class Call(NamedTuple):
    """One call without its tensors. It travels as a string, as :class:`kd_kernels.loss.plan.Plan` does."""

    where: str  # the public function, for messages
    argument: str  # its name for the noun
    columns: int
    race: int
    stats: bool
    check: str
    autocast: str
    max_scratch_bytes: int | None
    backend: str


@functools.lru_cache(maxsize=256)
def _read(text: str) -> tuple[tuple, Call]:
    """How ``plan.pack`` describes the noun, and the call."""
    noun, *call = ast.literal_eval(text)
    return noun, Call(*call)


def implementation(backend: str) -> ModuleType:
    return importlib.import_module(f"kd_kernels.sampling.{IMPLEMENTATIONS[backend]}")


def inverse_of(temperature: float) -> float:
    """1 / T as implementations take it: infinite for T = 0."""
    least, most = INVERSE_RANGE
    return math.inf if temperature == 0 else min(max(1.0 / temperature, least), most)


def inverse_temperature(temperature: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, row by row; NaN for what is no temperature."""
    inverse = temperature.double().reciprocal().clamp(*INVERSE_RANGE).to(dtype)
    inverse = torch.where(temperature == 0, torch.inf, inverse)
    return torch.where(temperature >= 0, inverse, torch.nan)


def run(noun: Logits, call: Call, place: Place, warp: Warp) -> RowSamples:
    """Samples ``[N]`` of a noun's rows; the other arguments are ``[N]``, checked but for the values of tensors.

    Only who traces torch needs the registered op: going through it takes longer than drawing one token does.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        tensors, description = pack(noun)
        filled = warp.filled(place.seeds.shape[0], place.seeds.device)
        found = _sample([t.detach() for t in tensors], *place, *filled, repr((description, *call)))
        return RowSamples(*_padded(found))
    with torch.no_grad():
        return _draw(noun, call, place, warp)


def request_of(place: Place, warp: Warp, dtype: torch.dtype, race: int) -> Request:
    count, device = place.seeds.shape[0], place.seeds.device
    if isinstance(warp.temperature, Tensor):
        inverse = inverse_temperature(warp.temperature, dtype)
    else:
        inverse = torch.full((count,), inverse_of(warp.temperature), dtype=dtype, device=device)
    fields = (*place, inverse, *warp.filled(count, device)[1:])
    return Request(*(None if x is None else x.contiguous() for x in fields), None, race)


def new_samples(logits: list[Tensor], count: int, stats: bool = False) -> RowSamples:
    """Memory for the samples of so many rows of what has these tensors."""
    return RowSamples(*_padded(_allocate(logits, count, stats)))


def _allocate(logits: list[Tensor], count: int, stats: bool) -> list[Tensor]:
    dtype = products.work_dtype(*logits)
    dtypes = (torch.int64,) + (dtype,) * (4 if stats else 2)
    return [logits[0].new_empty(count, dtype=d) for d in dtypes]


@torch.library.custom_op("kd_kernels::sample", mutates_args=())
def _sample(
    logits: list[Tensor], seeds: Tensor, keys: Tensor, positions: Tensor, temperature: Tensor, top_k: Tensor | None,
    top_p: Tensor | None, min_p: Tensor | None, call_text: str,
) -> list[Tensor]:
    """Ids, log-probabilities, those of the model, and with ``stats`` entropy and lse, ``[N]`` each."""
    noun, call = _read(call_text)
    with torch.no_grad():
        place, warp = Place(seeds, keys, positions), Warp(temperature, top_k, top_p, min_p)
        found = _draw(unpack(logits, noun), call, place, warp)
    return [x for x in found if x is not None]


@_sample.register_fake
def _(logits, seeds, keys, positions, temperature, top_k, top_p, min_p, call_text):
    return _allocate(logits, seeds.shape[0], _read(call_text)[1].stats)


def _padded(tensors: list[Tensor]) -> list[Tensor | None]:
    return [*tensors, *(None,) * (5 - len(tensors))]


def _draw(noun: Logits, call: Call, place: Place, warp: Warp) -> RowSamples:
    """The walk over chunks of rows."""
    noun, tensors = products.flattened(noun), products.tensors_of(noun)
    count, device, dtype = place.seeds.shape[0], place.seeds.device, products.work_dtype(*tensors)
    values = valid_warp(warp) | valid_positions(place.positions)
    if device.type == "cpu":
        check_values(call.where, values)
    rows_of, out = implementation(call.backend), new_samples(tensors, count, call.stats)
    autocast = getattr(torch, call.autocast) if call.autocast else None
    with torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext():
        request = request_of(place, warp, dtype, call.race)
        if device.type != "cpu":
            is_valid = functools.reduce(torch.logical_and, [valid for _, valid, _ in values.values()])
            request = request._replace(inverse=torch.where(is_valid, request.inverse, torch.nan))
        if call.backend == "cpp" and request.top_k is request.top_p is request.min_p is None:
            rows_of.sample_panels(call.where, noun, dtype, autocast, call.max_scratch_bytes, request, out)
        else:
            _walk(noun, dtype, autocast, call, request, out)
        if call.check == "raise":
            check_rows(call, out.ids, values, noun, None, dtype, autocast)
    return out


def _walk(
    noun: Logits, dtype: torch.dtype, autocast: torch.dtype | None, call: Call, request: Request, out: RowSamples,
) -> None:
    """Chunks of whole rows."""
    rows_of, count, device = implementation(call.backend), out.ids.shape[0], out.ids.device
    rows = products.source(noun, None, dtype, autocast=autocast, native=rows_of.NATIVE)
    own_bytes_per_row, own_fixed_bytes = rows_of.scratch(call.columns, dtype)
    step = products.rows_per_chunk(
        call.where, count, rows.bytes_per_row + own_bytes_per_row, rows.fixed_bytes + own_fixed_bytes,
        call.max_scratch_bytes, device,
    )
    rows.open(min(step, max(count, 1)))
    is_fused = call.backend == "triton" and rows_of.fuses(rows, min(step, count))
    for begin in range(0, count, step):
        here = slice(begin, min(begin + step, count))
        part, part_out = (request, out) if step >= count else (request.of(here), out.of(here))
        if is_fused:
            rows_of.sample_head(rows, here.start, here.stop, part, part_out)
        else:
            rows_of.sample_rows(rows.chunk(here.start, here.stop), part, part_out)


Values = dict[str, tuple[Tensor, Tensor, str]]
"""By the name of a per-row argument: its values, which of them are valid, and what they must be."""


def valid_positions(positions: Tensor) -> Values:
    return {"positions": (positions, (positions >= 0) & (positions < 1 << 32), f"in 0..{(1 << 32) - 1}")}


def valid_warp(warp: Warp, prefix: str = "") -> Values:
    """Of the per-row arguments that are tensors, under their names with the prefix."""
    rules = {
        "temperature": (warp.temperature, lambda x: x >= 0, "at least 0"),
        "top_k": (warp.top_k, lambda x: x >= 1, "at least 1"),
        "top_p": (warp.top_p, lambda x: (x >= 0) & (x <= 1), "in 0..1"),
        "min_p": (warp.min_p, lambda x: (x >= 0) & (x <= 1), "in 0..1"),
    }
    return {
        prefix + name: (x, rule(x), requirement) for name, (x, rule, requirement) in rules.items()
        if isinstance(x, Tensor)
    }


def check_values(where: str, values: Values) -> None:
    """Raise for the first per-row argument that is out of range."""
    for name, (given, valid, requirement) in values.items():
        if not bool(valid.all()):
            row = int((~valid).nonzero()[0])
            _check.fail(where, name, requirement, f"{given[row].item()} in row {row}")


def check_rows(
    call: Call, ids: Tensor, values: Values, noun: Logits, picked: Tensor | None, dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> None:
    """Raise for the first row that has no id. One synchronisation on a GPU."""
    if ids.numel() == 0 or ids.min() >= 0:
        return
    check_values(call.where, values)
    row = (ids < 0).nonzero()[0]
    fail_row(
        call.where, call.argument, noun, row if picked is None else picked[row], dtype, autocast,
        'look for an overflow in the model, leave out rows that are padding, or pass check="flag" for an id of -1',
    )


def fail_row(
    where: str, argument: str, noun: Logits, row: Tensor, dtype: torch.dtype, autocast: torch.dtype | None, remedy: str,
) -> NoReturn:
    """Say why a row (int64 ``[1]``) is no distribution. Its logits are formed again."""
    rows = products.source(noun, row, dtype, autocast=autocast)
    rows.open(1)
    z = rows.chunk(0, 1).logits()
    fault = "NaN" if bool(z.isnan().any()) else "+inf" if bool((z == torch.inf).any()) else "-inf at every id"
    requirement = "free of NaN and +inf, with a finite logit in every row"
    _check.fail(where, argument, requirement, f"{fault} in row {int(row)}", remedy)
