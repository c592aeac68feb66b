"""Every Triton kernel that the library can launch compiles for every GPU that it supports, on a machine that has none.

Each launch of the main path is compiled for one target, in turn, so that each divergence meets each target; of the
rest, every value of every axis for one. ``python -m kd_kernels.aot`` compiles all of them for all targets.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process, and compiles nothing", allow_module_level=True)

from kd_kernels import (
    EnsembleLogits, LinearLogits, SparseTargets, _backend, aot, kd_loss, launches, sample, sampled_targets, token_stats,
    topk_targets,
)
from kd_kernels.loss import api as loss_api
from kd_kernels.loss.plan import TAILS
from kd_kernels.sampling import driver as sampling_driver
from kd_kernels.sampling import targets as sampled_targets_api
from kd_kernels.stats import api as stats_api
from kd_kernels.targets import api as targets_api


READERS = (
    "dense_rows_kernel", "sparse_rows_kernel", "token_stats_kernel", "group_kernel", "group_sums_kernel",
    "residual_kernel",
)
"""Kernels that read whole rows of logits."""


@pytest.fixture(scope="module")
def compiled() -> list[aot.Compiled]:
    return aot.compile_all(aot.main_path_in_turn() + aot.in_turn())


def test_every_kernel_compiles_and_the_main_path_spills_no_register(compiled: list[aot.Compiled]) -> None:
    print(aot.table(compiled))
    wrong = aot.offences(compiled)
    assert not wrong, "\n".join(wrong)


def test_rows_are_read_sixteen_bytes_at_a_time(compiled: list[aot.Compiled]) -> None:
    narrow = [str(each) for each in compiled if each.is_main and each.kernel in READERS and each.wide_loads == 0]
    assert not narrow, "\n".join(narrow)


def test_so_they_are_where_16_does_not_divide_the_vocabulary() -> None:
    """Scratch has room past each row: the very kernels of the main path read it."""
    main = set(launches.main_path("sm_90"))
    verbs = [verb for verb in launches.VERBS.values() if "columns" in verb.axes]
    made = launches.record([(verb, {**verb.main_path()[0], "columns": 50_257}) for verb in verbs], "sm_90")
    readers = {each for each in made if each.kernel.partition(":")[2] in READERS}
    assert len(readers) == len(READERS) and readers <= main


def test_each_formula_meets_each_target(compiled: list[aot.Compiled]) -> None:
    for kernel, formula, target in itertools.product(
        ("dense_rows_kernel", "sparse_rows_kernel"), launches.FORMULA_CASES, launches.TARGETS
    ):
        met = [each for each in compiled if each.kernel == kernel and each.target == target and each.is_main]
        assert any(f"TERMS={launches.TERMS_OF}{formula}," in each.arguments for each in met), (kernel, formula, target)


def test_what_is_wrong_is_seen() -> None:
    """A pointer of a dtype that the kernel does not take, and a lane with too few registers."""
    good = next(each for each in launches.main_path("sm_90") if "dense" in each.kernel)
    mistyped = [a._replace(type="*fp64") if a.name == "student_bias_ptr" else a for a in good.arguments]
    wanted = [good._replace(arguments=tuple(mistyped)), good._replace(options=(*good.options, ("maxnreg", 32)))]
    failed, spilled = aot.compile_all([(each, True) for each in wanted], workers=1)
    assert "CompilationError" in failed.error and spilled.spilled > 0 and not spilled.error
    assert len(aot.offences([failed, spilled])) == 2


def test_amd_runs_as_many_lanes_as_nvidia() -> None:
    """A warp has 64 lanes there: half as many warps walk a row."""
    warps = [
        [dict(each.options)["num_warps"] for each in launches.main_path(target) if "rows_kernel" in each.kernel]
        for target in ("sm_90", "gfx942")
    ]
    assert warps[0] == [2 * n for n in warps[1]]


# ------------------------------------------------------------------------------------------------- nothing is left out


_empty = functools.partial(torch.empty, device="meta")


def _values(listed: list[launches.Specialisation]) -> set[tuple[str, Any]]:
    """What each argument of each kernel was specialised on, and the declared constexprs two by two."""
    values: set[tuple[str, Any]] = set()
    for each in listed:
        values |= {(each.kernel, argument) for argument in each.arguments}
        declared = [argument for argument in each.arguments if argument.name.isupper()]
        values |= {(each.kernel, two) for two in itertools.combinations(declared, 2)}
    return values


def _student(draw: random.Random, rows: int, columns: int) -> torch.Tensor | LinearLogits:
    dtype = draw.choice(launches.FLOATS)
    if draw.random() < 0.4:
        begin = draw.choice((0, 1))
        return _empty(rows, columns + begin, dtype=dtype)[:, begin:].requires_grad_(draw.random() < 0.8)
    hidden, weight = _empty(rows, 64, dtype=dtype), _empty(columns + draw.choice((0, 3)), 64, dtype=dtype)
    bias = _empty(weight.shape[0], dtype=dtype) if draw.random() < 0.3 else None
    scale, softcap = draw.choice((1.0, 1, 2)), draw.choice((None, 30.0))
    return LinearLogits(hidden.requires_grad_(draw.random() < 0.8), weight, bias, scale, softcap, columns)


def _teacher(draw: random.Random, rows: int, columns: int) -> Any:
    kind = draw.choice(("dense", "dense", "sparse", "ensemble"))
    if kind == "dense":
        return _student(draw, rows, columns)
    if kind == "ensemble":
        members = (_empty(rows, columns), LinearLogits(_empty(rows, 64), _empty(columns, 64)))
        return EnsembleLogits(members, (0.5, 0.5), draw.choice(("logit", "prob")))
    entries = rows * min(draw.choice((0, 1, 50, 64, 300, 1000)), columns)
    begin = draw.choice((0, 1))
    given = lambda dtype: _empty(entries + begin, dtype=dtype)[begin:]  # noqa: E731
    importance = given(torch.float32) if draw.random() < 0.3 else None
    ids = given(draw.choice((torch.int64, torch.int32)))
    return SparseTargets(
        _empty(rows + 1, dtype=torch.int64), ids, given(torch.float32), _empty(rows), importance=importance
    )


def _token_stats(draw: random.Random, rows: int, columns: int) -> None:
    budget = draw.choice((None, 24 << 20))
    token_stats(_student(draw, rows, columns), _empty(rows, dtype=torch.int64), max_scratch_bytes=budget)


def _topk_targets(draw: random.Random, rows: int, columns: int) -> None:
    with contextlib.suppress(_Launched):
        topk_targets(
            _student(draw, rows, columns), draw.choice((1, 64, 3000)), mass=draw.choice((None, 0.9, 1)),
            temperatures=draw.choice(((1.0,), (1.0, 2.0))), max_scratch_bytes=draw.choice((None, 24 << 20)),
        )


def _sample(draw: random.Random, rows: int, columns: int) -> None:
    of_rows = lambda dtype, *numbers: draw.choice((None, *numbers, _empty(rows, dtype=dtype)))  # noqa: E731
    temperature = draw.choice((1.0, 0.0, _empty(rows)))
    sample(
        _student(draw, rows, columns), temperature=temperature, top_k=of_rows(torch.int64, 5),
        top_p=of_rows(torch.float32, 0.5), min_p=of_rows(torch.float64, 0.1),
        seed=draw.choice((1, _empty(rows).long())), keys=of_rows(torch.int64),
        positions=of_rows(torch.int32), return_stats=draw.random() < 0.5, check="flag",
        max_scratch_bytes=draw.choice((None, 24 << 20)),
    )


def _sampled_targets(draw: random.Random, rows: int, columns: int) -> None:
    with contextlib.suppress(_Launched):
        sampled_targets(
            _student(draw, rows, columns), draw.choice((1, 50, 300)), certain=draw.choice((0, 1, 8, 3000)), seed=0,
            keys=draw.choice((None, _empty(rows, dtype=torch.int64))),
            max_scratch_bytes=draw.choice((None, 24 << 20)),
        )


class _Launched(Exception):
    """Everything was launched; what follows would look at the result."""


def _kd_loss(draw: random.Random, rows: int, columns: int) -> None:
    """With options at random. Chunks of a small scratch begin at odd rows."""
    student, teacher = _student(draw, rows, columns), _teacher(draw, rows, columns)
    has_labels = draw.random() < 0.6
    importance = isinstance(teacher, SparseTargets) and teacher.importance is not None
    reduction = draw.choice(("mean", "sum", "none"))
    loss = kd_loss(
        student, teacher, draw.choice(list(launches.FORMULA_CASES.values())),
        labels=_empty(rows, dtype=draw.choice((torch.int64, torch.int32))) if has_labels else None,
        ce_weight=draw.choice((0.0, 0.5)) if has_labels else 0.0, kd_weight=draw.choice((0, 1, 0.5)),
        temperature=1.0 if isinstance(teacher, SparseTargets) else draw.choice((1, 2.0)),
        token_weight=_empty(rows) if draw.random() < 0.3 else None,
        normalizer=100 if reduction == "mean" and draw.random() < 0.5 else None, reduction=reduction,
        tail="drop" if importance else draw.choice(TAILS), stats=draw.choice(((), ("agreement",))),
        rows=_empty(rows // 2, dtype=torch.int64) if draw.random() < 0.3 else None,
        max_scratch_bytes=draw.choice((None, 24 << 20, 1 << 34)), backend="triton",
    )
    assert loss.loss.device.type == "meta"


def _drawn(target: str, calls: int) -> list[launches.Specialisation]:
    draw = random.Random(0)
    with launches.recording(target) as launched:
        for i in range(calls):
            rows, columns = draw.choice((5, 128, 700)), draw.choice((1, 512, 777, 4096, 32_001, 128_256))
            (_token_stats, _topk_targets, _sample, _sampled_targets, _kd_loss, _kd_loss)[i % 6](draw, rows, columns)
    return launched


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_nothing_else_is_launched(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the verbs are asked, every argument that they launch a kernel with is one of those that are compiled."""
    monkeypatch.setattr(_backend, "_runs_on", lambda name, device: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # the meta device has no autocast
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: contextlib.nullcontext())
    losses = (loss_api, "_loss"), (loss_api, "_loss_per_token")
    for owner, op in (*losses, (stats_api, "_token_stats")):
        # On the meta device an op would run its fake, which launches nothing.
        monkeypatch.setattr(owner, op, torch.no_grad()(getattr(owner, op)._init_fn))

    def stop(counts: torch.Tensor, *others: object) -> None:
        raise _Launched

    for owner in (targets_api, sampled_targets_api):
        monkeypatch.setattr(owner, "_check_rows", stop)
    monkeypatch.setattr(sampling_driver, "check_values", lambda where, values: None)  # there are none to look at
    known, launched = _values(launches.main_path(target) + launches.rest(target)), _drawn(target, calls=400)
    assert len(set(launched)) > 150
    unknown = _values(launched) - known
    assert not unknown, sorted(map(str, unknown))
