"""Every launch of a Triton kernel that the library can make, found without a GPU.

The truth about what can be launched is the host code, so nobody writes a signature here: the host functions are
called with tensors of the meta device, of any size at no cost, and what they launch is recorded and specialised as
Triton would do it for a given GPU (pointers and integers that 16 divides, integers that are 1, tensors below 2 GiB). A
:class:`Verb` says which calls there are, as values on axes: all combinations on its main path, and for the rest few
calls that between them show every combination of values of any two axes.

To add a verb: one entry in :data:`VERBS`.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd_kernels import products, row_launch
from kd_kernels.divergences import parse
from kd_kernels.logits import EnsembleLogits, LinearLogits, Logits
from kd_kernels.loss import driver
from kd_kernels.loss.plan import TAILS, RowJob
from kd_kernels.products import PITCH, RawRows, SparseRows
from kd_kernels.sampling.reference import Request, RowSamples, RowTargets, TargetRequest
from kd_kernels.stats.reference import RowStats

TARGETS = {
    "sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64),
}
"""Backend, architecture and lanes of a warp, as ``triton.backends.compiler.GPUTarget`` takes them."""

TERMS_OF = "terms of "
"""How a constexpr that is a divergence's device function is written, so that a specialisation is plain text."""


# ---------------------------------------------------------------------------------------------------------------------
# Recording
# ---------------------------------------------------------------------------------------------------------------------


class Argument(NamedTuple):
    """``type`` is "constexpr" or one of Triton's; ``detail`` the value of a constexpr, else what Triton noted: "D"
    where 16 divides it, "S" where a tensor is below 2 GiB."""

    name: str
    type: str
    detail: Any


class Specialisation(NamedTuple):
    """What Triton compiles once. ``options`` are those of the launch, ``num_warps`` among them."""

    kernel: str
    target: str
    arguments: tuple[Argument, ...]
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        """Without the floats, which Triton does not specialise."""
        known = [f"{a.name}={a.detail}" for a in self.arguments if a.type == "constexpr"]
        rest = [a for a in self.arguments if a.type not in ("constexpr", "fp32")]
        known += [f"{name}={value}" for name, value in self.options]
        shown = ", ".join(f"{a.name}: {a.type} {a.detail or ''}".rstrip() for a in rest)
        return f"{self.kernel.partition(':')[2]}({', '.join(known)}; {shown})"


class _Address:
    """A tensor as Triton looks at it: its dtype, size and alignment. Allocations begin at multiples of 256 bytes."""

    def __init__(self, x: Tensor) -> None:
        self.dtype = x.dtype
        self.offset, self.bytes = x.storage_offset() * x.dtype.itemsize, x.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return self.bytes


@functools.cache
def backend_of(target: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    return make_backend(GPUTarget(*TARGETS[target]))


@functools.cache
def _binder(kernel: Any, target: str) -> Callable[..., tuple[dict, list, dict]]:
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, backend_of(target))


def specialise(kernel: Any, target: str, *args: Any, **kwargs: Any) -> Specialisation:
    """As ``kernel[grid](*args, **kwargs)`` would on a GPU of this kind."""
    from triton.runtime.jit import JITFunction

    address = lambda x: _Address(x) if isinstance(x, Tensor) else x  # noqa: E731
    bind = _binder(kernel, target)
    bound, noted, options = bind(*map(address, args), **{name: address(value) for name, value in kwargs.items()})
    arguments = []
    for (name, value), (kind, detail) in zip(bound.items(), noted):
        if kind == "constexpr":
            detail = value
        if isinstance(detail, JITFunction):
            detail = TERMS_OF + detail.__name__.lstrip("_")
        arguments.append(Argument(name, kind, detail))
    name = f"{kernel.module}:{kernel.__name__}"
    return Specialisation(name, target, tuple(arguments), tuple(sorted(options.items())))


@contextmanager
def recording(target: str) -> Iterator[list[Specialisation]]:
    """Launches become entries of the list that this yields, and nothing runs.

    Raises:
        RuntimeError: Triton interprets its kernels (``TRITON_INTERPRET=1``), so that there is nothing to compile.
    """
    import triton
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("recording: kernels must be compiled, got TRITON_INTERPRET=1; unset it")
    launched: list[Specialisation] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append(specialise(kernel, target, *args, **kwargs))

    run, lanes_per_warp = JITFunction.run, row_launch.lanes_per_warp
    JITFunction.run, row_launch.lanes_per_warp = record, lambda: TARGETS[target][2]
    try:
        yield launched
    finally:
        JITFunction.run, row_launch.lanes_per_warp = run, lanes_per_warp


# ---------------------------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------------------------

Choice = dict[str, Any]


@dataclass(frozen=True)
class Verb:
    """A host function that launches, and the calls of it that there are.

    Args:
        axes: for each property of a call, its values.
        is_possible: whether the library makes the call; axes are not free of each other.
        launch: makes the call, on the meta device.
        main: the values that most users meet; the main path is all their combinations.
    """

    axes: dict[str, tuple]
    is_possible: Callable[[Choice], bool]
    launch: Callable[[Choice], None]
    main: dict[str, tuple]

    def main_path(self) -> list[Choice]:
        every = [dict(zip(self.main, values)) for values in itertools.product(*self.main.values())]
        return [choice for choice in every if self.is_possible(choice)]

    def covering(self, together: int) -> list[Choice]:
        """Few calls that, with the main path, show every possible combination of values of any ``together`` axes."""
        groups = list(itertools.combinations(self.axes, together))
        products = {group: itertools.product(*(self.axes[name] for name in group)) for group in groups}
        wanted = {tuple(zip(group, values)) for group in groups for values in products[group]}
        shown = lambda choice: {tuple((name, choice[name]) for name in group) for group in groups}  # noqa: E731
        for choice in self.main_path():
            wanted -= shown(choice)
        draw, found = random.Random(0), []
        for combination in sorted(wanted, key=repr):
            if combination not in wanted:
                continue
            at_random = lambda: {name: draw.choice(values) for name, values in self.axes.items()}  # noqa: E731
            drawn = ({**at_random(), **dict(combination)} for _ in range(400))
            candidates = list(itertools.islice(filter(self.is_possible, drawn), 12))
            if candidates:  # else the combination is none that the library makes
                best = max(candidates, key=lambda choice: len(shown(choice) & wanted))
                found.append(best)
                wanted -= shown(best)
        return found


def record(choices: list[tuple[Verb, Choice]], target: str) -> list[Specialisation]:
    """What the calls launch, each specialisation once."""
    with recording(target) as launched:
        for verb, choice in choices:
            verb.launch(choice)
    return list(dict.fromkeys(launched))


def main_path(target: str) -> list[Specialisation]:
    """The launches that most users meet: the compiler must not spill a register in them."""
    return record([(verb, choice) for verb in VERBS.values() for choice in verb.main_path()], target)


def rest(target: str, together: int = 2) -> list[Specialisation]:
    """Launches beside the main path that show every value (``together=1``) or every pair of values (2) of all axes."""
    listed = record([(verb, choice) for verb in VERBS.values() for choice in verb.covering(together)], target)
    is_main = set(main_path(target))
    return [each for each in listed if each not in is_main]


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------

_empty = functools.partial(torch.empty, device="meta")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Origin(NamedTuple):
    """Where the rows of a dense noun lie: scratch of a head's products, or rows picked out ("padded" to 64 columns),
    copies and ensembles ("packed"), or the caller's own tensor, whose rows may begin anywhere ("view")."""

    kind: str
    dtype: torch.dtype = torch.float32
    layout: str = "packed"

    def rows(self, count: int, columns: int) -> Tensor:
        if self.layout == "view":
            return _empty(count, columns + 1, dtype=self.dtype)[:, 1:]
        pitch = -(-columns // PITCH) * PITCH if self.layout == "padded" else columns
        return _empty(count, pitch, dtype=self.dtype)[:, :columns]


HEAD, COPY = Origin("head", layout="padded"), Origin("copy")
CALLERS = tuple(Origin("caller", dtype, layout) for dtype in FLOATS for layout in ("packed", "view"))
PICKED = tuple(Origin("picked", dtype, "padded") for dtype in FLOATS)

_ROWS: dict[str, tuple] = {
    "columns": (1, 1000, 1024, 10_001, 16_384, 50_257, 128_256),  # three launches; by 16 or not; 1, which is inlined
    "rows": (64, 40_000),  # below 2 GiB, or not
    "first_row": (0, 1),  # of a chunk, in what has an entry a row
    "scale": (1.0, 1, 2),
}
_ROWS_MAIN: dict[str, tuple] = {"columns": (128_256,), "rows": (1024,), "first_row": (0,), "scale": (1.0,)}


def _triton(subject: str) -> ModuleType:
    """The launching functions of a verb."""
    return importlib.import_module(f"kd_kernels.{subject}.triton_impl")


def _of_rows(choice: Choice, dtype: torch.dtype) -> Tensor:
    return _empty(choice["rows"] + 1, dtype=dtype)[choice["first_row"] :][: choice["rows"]]


def _raw_rows(choice: Choice, whose: str) -> RawRows:
    columns = choice["columns"]
    bias = _empty(columns) if choice[f"{whose}_bias"] else None
    return RawRows(choice[whose].rows(choice["rows"], columns), bias, choice["scale"])


def _has_rows(choice: Choice, whose: str) -> bool:
    return choice[whose] == HEAD or not choice[f"{whose}_bias"] and choice["scale"] == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# kd_loss
# ---------------------------------------------------------------------------------------------------------------------

FORMULA_CASES = {
    parse(text).kernel: text
    for text in (
        "forward_kl", "reverse_kl", "jsd(beta=0.3)", "skew_forward_kl(alpha=0.1)", "skew_reverse_kl(alpha=0.1)",
        "skew_reverse_kl(alpha=0.1, detach_mixture=True)", "jeffreys(weight=0.4)", "total_variation",
        "squared_hellinger", "alpha(alpha=0.7)", "alpha_beta(alpha=0.7, beta=1.1)", "squared_logprob",
    )
}
"""A divergence for each formula."""

_COMMON: dict[str, tuple] = {
    **_ROWS,
    "divergence": tuple(FORMULA_CASES.values()),
    "gradient": (None, *FLOATS),
    "stats": (False, True),
    "labels": (True, False),
    "student_bias": (False, True),
    "temperature": (1.0, 2.0),
}
_COMMON_MAIN: dict[str, tuple] = {
    **_ROWS_MAIN, "divergence": _COMMON["divergence"], "gradient": (torch.bfloat16, torch.float32),
    "stats": (True, False), "labels": (True,), "student": (HEAD,), "student_bias": (False,),
}


def _gradient(choice: Choice, raw: Tensor) -> Tensor | None:
    dtype, student = choice["gradient"], choice["student"]
    if dtype is None:
        return None
    if student.kind == "caller":
        return _empty(raw.shape, dtype=dtype)
    return raw if dtype == raw.dtype else raw.view(dtype)[:, : raw.shape[1]]


def _has_student(choice: Choice) -> bool:
    student, gradient = choice["student"], choice["gradient"]
    if student.kind == "head":
        return True
    written = torch.float32 if student.kind == "copy" else driver.gradient_dtype(student.dtype)
    return gradient in (None, written) and _has_rows(choice, "student")


def _labels(choice: Choice) -> Tensor | None:
    return _of_rows(choice, torch.int64) if choice["labels"] else None


def _dense_rows(choice: Choice) -> None:
    student, teacher = _raw_rows(choice, "student"), _raw_rows(choice, "teacher")
    job = RowJob(parse(choice["divergence"]), choice["temperature"], 1.0, 1.0, "bucket")
    _triton("loss").dense_rows(
        student, teacher, job, _labels(choice), _of_rows(choice, torch.float64), _gradient(choice, student.raw),
        choice["stats"],
    )


def _is_dense(choice: Choice) -> bool:
    # The scale that varies is the student's; the teacher's is only ever divided.
    return _has_student(choice) and (choice["teacher"] == HEAD or not choice["teacher_bias"])


def _sparse_rows(choice: Choice) -> None:
    student, entries = _raw_rows(choice, "student"), choice["rows"] * choice["entries"]
    entry = lambda dtype: _empty(entries + 1, dtype=dtype)[choice["first_entry"] :][:entries]  # noqa: E731
    teacher = SparseRows(
        _of_rows(choice, torch.int64), _of_rows(choice, torch.int64), entry(torch.int64), entry(torch.float32),
        tail_logprob=_of_rows(choice, torch.float32) if choice["tail"] else None,
        importance=entry(torch.float32) if choice["importance"] else None,
    )
    job = RowJob(parse(choice["divergence"]), choice["temperature"], 1.0, 1.0, choice["treatment"])
    _triton("loss").sparse_rows(
        student, teacher, job, _labels(choice), _of_rows(choice, torch.float64), _gradient(choice, student.raw),
        choice["stats"],
    )


def _is_sparse(choice: Choice) -> bool:
    needs_tail = choice["treatment"] == "bucket" and not choice["importance"]
    return _has_student(choice) and choice["entries"] <= choice["columns"] and (choice["tail"] or not needs_tail)


def _scale_in_place(choice: Choice) -> None:
    scale = _empty((), dtype=torch.float32)
    _triton("loss").scale_in_place(_empty(choice["elements"], dtype=choice["dtype"]), scale)


# ---------------------------------------------------------------------------------------------------------------------
# token_stats
# ---------------------------------------------------------------------------------------------------------------------


def _stat_rows(choice: Choice) -> None:
    out = RowStats(*(_of_rows(choice, dtype) for dtype in (torch.float32,) * 4 + (torch.int64,) * 2))
    _triton("stats").stat_rows(_raw_rows(choice, "logits"), _of_rows(choice, torch.int64), out)


# ---------------------------------------------------------------------------------------------------------------------
# sample
# ---------------------------------------------------------------------------------------------------------------------


def _sample_request(choice: Choice) -> tuple[Request, RowSamples]:
    ids, numbers, fine = (functools.partial(_of_rows, choice, d) for d in (torch.int64, torch.float32, torch.float64))
    wants = lambda name, of: of() if name in choice["filters"] else None  # noqa: E731
    request = Request(
        ids(), ids(), ids(), numbers(), wants("top_k", ids), wants("top_p", fine), wants("min_p", fine),
        ids() if choice["given"] else None, race=0,
    )
    stats = (numbers(), numbers()) if choice["stats"] else (None, None)
    return request, RowSamples(ids(), numbers(), numbers(), *stats)


def _sample_rows(choice: Choice) -> None:
    _triton("sampling").sample_rows(_raw_rows(choice, "logits"), *_sample_request(choice))


def _sample_head(choice: Choice) -> None:
    rows, columns, dtype, width = choice["rows"], choice["columns"], choice["dtype"], choice["width"]
    hidden, weight = _of_rows(choice, dtype)[:, None].expand(rows, width), _empty(columns, width, dtype=dtype)
    head = LinearLogits(hidden, weight, _empty(columns) if choice["logits_bias"] else None, choice["scale"])
    source = products.source(head, None, torch.float32)
    source.open(rows)
    assert _triton("sampling").fuses(source, rows)
    _triton("sampling").sample_head(source, 0, rows, *_sample_request(choice))


def _residual(choice: Choice) -> None:
    teacher, student = _raw_rows(choice, "teacher"), _raw_rows(choice, "student")
    requests = (
        _sample_request(choice | {"filters": choice[f"{whose}_filters"], "given": False, "stats": False})[0]
        for whose in ("teacher", "student")
    )
    _triton("sampling").residual(teacher, student, *requests)


# ---------------------------------------------------------------------------------------------------------------------
# sampled_targets
# ---------------------------------------------------------------------------------------------------------------------


def _target_rows(choice: Choice) -> None:
    rows, columns, draws, certain = choice["rows"], choice["columns"], choice["draws"], choice["certain"]
    certain, width = min(certain, columns), min(columns, draws + certain)
    rectangle = lambda dtype: _empty(rows, width, dtype=dtype)  # noqa: E731
    request = TargetRequest(*(_of_rows(choice, torch.int64) for _ in range(3)), 0.5, draws, certain)
    out = RowTargets(
        _empty(rows, dtype=torch.int64), rectangle(torch.int64), rectangle(torch.float32), rectangle(torch.float32)
    )
    _triton("sampling").target_rows(_raw_rows(choice, "logits"), request, out)


# ---------------------------------------------------------------------------------------------------------------------
# topk_targets
# ---------------------------------------------------------------------------------------------------------------------


def _topk(choice: Choice) -> None:
    rows, columns, k = choice["rows"], choice["columns"], choice["k"]
    raw = _raw_rows(choice, "logits")
    logits: Logits = raw.raw
    if choice["logits"] == HEAD:
        logits = LinearLogits(_empty(rows, 1), _empty(columns, 1), raw.bias, raw.scale)
    elif choice["logits"] == COPY:
        logits = EnsembleLogits((raw.raw,), (1.0,), "logit")
    bytes_of_a_row = 32 * (columns + k) + 4096  # enough for a few
    budget = 3 * bytes_of_a_row if choice["few_rows_a_chunk"] else None
    _triton("targets").topk(logits, torch.float32, k, choice["mass"], choice["temperatures"], budget)


VERBS: dict[str, Verb] = {
    "kd_loss, dense teacher": Verb(
        axes={
            **_COMMON, "student": (HEAD, COPY, *CALLERS), "teacher": (HEAD, COPY, *CALLERS),
            "teacher_bias": (False, True),
        },
        is_possible=_is_dense,
        launch=_dense_rows,
        main={**_COMMON_MAIN, "teacher": (HEAD,), "teacher_bias": (False,), "temperature": (1.0, 2.0)},
    ),
    "kd_loss, sparse teacher": Verb(
        axes={
            **_COMMON, "student": (HEAD, COPY), "entries": (0, 40, 64, 100, 256, 500, 1000), "first_entry": (0, 1),
            "tail": (False, True), "importance": (False, True), "treatment": TAILS,
        },
        is_possible=_is_sparse,
        launch=_sparse_rows,
        main={
            **_COMMON_MAIN, "entries": (64,), "first_entry": (0,), "tail": (True,), "importance": (False,),
            "treatment": ("bucket",), "temperature": (1.0,),
        },
    ),
    "scaling of kd_loss's gradients": Verb(
        axes={"dtype": (torch.float32, torch.bfloat16), "elements": (1, 1000, 1 << 25, (1 << 31) + 1, 1 << 32)},
        is_possible=lambda choice: True,
        launch=_scale_in_place,
        main={"dtype": (torch.float32, torch.bfloat16), "elements": (1 << 25,)},
    ),
    "token_stats": Verb(
        axes={**_ROWS, "logits": (HEAD, COPY, *CALLERS), "logits_bias": (False, True)},
        is_possible=lambda choice: _has_rows(choice, "logits"),
        launch=_stat_rows,
        main={**_ROWS_MAIN, "logits": (HEAD,), "logits_bias": (False,)},
    ),
    "sample": Verb(
        axes={
            **_ROWS, "columns": (*_ROWS["columns"], 32_000, 500_000, 1 << 24), "logits": (HEAD, COPY, *CALLERS),
            "logits_bias": (False, True), "stats": (False, True), "given": (False, True),
            "filters": ((), ("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p", "min_p")),
        },
        is_possible=lambda choice: _has_rows(choice, "logits"),
        launch=_sample_rows,
        main={
            **_ROWS_MAIN, "logits": (HEAD,), "logits_bias": (False,), "filters": ((), ("top_p",)),
            "stats": (False, True), "given": (False,),
        },
    ),
    "sample, few rows of a head": Verb(
        axes={
            **_ROWS, "columns": (*_ROWS["columns"], 32_000, 500_000, 1 << 24), "rows": (1, 16, 17, 33, 64),
            "dtype": (torch.bfloat16, torch.float16), "width": (1, 100, 4096), "logits_bias": (False, True),
            "stats": (False, True), "given": (False,), "filters": ((), ("top_k",), ("top_k", "top_p", "min_p")),
        },
        is_possible=lambda choice: True,
        launch=_sample_head,
        main={
            **_ROWS_MAIN, "rows": (16, 64), "dtype": (torch.bfloat16,), "width": (4096,), "logits_bias": (False,),
            "filters": ((),), "stats": (False, True), "given": (False,),
        },
    ),
    "accept_or_resample, what is left": Verb(
        axes={
            **_ROWS, "columns": (*_ROWS["columns"], 500_000, 1 << 24), "first_row": (0,),
            "teacher": (HEAD, *PICKED), "student": (HEAD, *PICKED), "teacher_bias": (False, True),
            "student_bias": (False, True), "teacher_filters": ((), ("top_k",), ("top_k", "top_p", "min_p")),
            "student_filters": ((), ("top_p",), ("min_p",)),
        },
        is_possible=lambda choice: _has_rows(choice, "teacher") and _has_rows(choice, "student"),
        launch=_residual,
        main={
            **_ROWS_MAIN, "teacher": (HEAD,), "student": (HEAD,), "teacher_bias": (False,), "student_bias": (False,),
            "teacher_filters": ((), ("top_p",)), "student_filters": ((), ("top_p",)),
        },
    ),
    "sampled_targets": Verb(
        axes={
            **_ROWS, "columns": (*_ROWS["columns"], 500_000, 1 << 24), "logits": (HEAD, COPY, *CALLERS),
            "logits_bias": (False, True), "draws": (1, 50, 4096), "certain": (0, 1, 40, 5000),
        },
        is_possible=lambda choice: _has_rows(choice, "logits"),
        launch=_target_rows,
        main={**_ROWS_MAIN, "logits": (HEAD,), "logits_bias": (False,), "draws": (50,), "certain": (0, 8)},
    ),
    "topk_targets": Verb(
        axes={
            **{name: values for name, values in _ROWS.items() if name != "first_row"},
            "columns": (*_ROWS["columns"], 512, 4096, 1_000_000, 1 << 24), "rows": (65, 40_000),
            "few_rows_a_chunk": (False, True), "logits": (HEAD, COPY, *CALLERS), "logits_bias": (False, True),
            "k": (1, 2, 3, 8, 12, 20, 50, 100, 200, 500, 1024, 5000, 65_535),
            "mass": (None, 0.9, 1), "temperatures": ((), (2.0,)),
        },
        is_possible=lambda choice: _has_rows(choice, "logits") and choice["k"] <= choice["columns"]
        and (choice["rows"] == 65 or not choice["few_rows_a_chunk"]),
        launch=_topk,
        main={
            **_ROWS_MAIN, "few_rows_a_chunk": (False,), "logits": (HEAD,), "logits_bias": (False,), "k": (64,),
            "mass": (None,), "temperatures": ((),),
        },
    ),
}
