"""The benchmarks' own arithmetic, their refusal of wrong results, and their command lines.

Nothing here is timed: every op runs on a tiny shape, and times that come out are looked at for their presence alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import ceilings, comparisons, contenders, devices, inputs, launches, machine, timing  # noqa: E402
from bench.cases import BACKENDS, CASES, DTYPES, WrongResult  # noqa: E402
from bench.comparisons import Sweep  # noqa: E402
from bench.contenders import CONTENDERS, Unavailable  # noqa: E402
from bench.inputs import Shape  # noqa: E402
from kd_kernels import divergences  # noqa: E402
from kd_trainer import bench_cli, cli  # noqa: E402

TINY = Shape(rows=20, vocab=300, student_hidden=12, teacher_hidden=16, kept=8)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
COMPILED = ("torch_compile", "cut_cross_entropy", "liger_chunked_compiled")  # which takes half a minute
TRITON = ("liger_jsd", "liger_kl", "fla", "liger_flce")


# --------------------------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize(
    ("case", "mode", "flops", "elements", "others"),
    [
        # 6 N Hs V + 2 N Ht V; both hidden states and weights read, two gradients written.
        ("kd_loss_dense", "gradient", 2 * 20 * 300 * (3 * 12 + 16), 2 * (20 * 12 + 300 * 12) + 20 * 16 + 300 * 16, 0),
        ("kd_loss_dense", "loss", 2 * 20 * 300 * (12 + 16), 20 * 12 + 300 * 12 + 20 * 16 + 300 * 16, 0),
        ("kd_loss_dense", "backward", 4 * 20 * 300 * 12, 2 * (20 * 12 + 300 * 12), 0),
        ("kd_loss_sparse", "gradient", 6 * 20 * 300 * 12, 2 * (20 * 12 + 300 * 12), 20 * (8 * 12 + 12)),
        ("cross_entropy", "gradient", 6 * 20 * 300 * 12, 2 * (20 * 12 + 300 * 12), 20 * 8),
        ("token_stats", "stats", 2 * 20 * 300 * 12, 20 * 12 + 300 * 12, 20 * 40),
        ("topk_targets", "targets", 2 * 20 * 300 * 16, 20 * 16 + 300 * 16, 20 * (8 * 12 + 12)),
        # One more product of the student's than against one teacher, which reads what was read before.
        (
            "kd_loss_ensemble", "gradient", 2 * 20 * 300 * (4 * 12 + 16),
            2 * (20 * 12 + 300 * 12) + 20 * 16 + 300 * 16, 0,
        ),
        ("sample", "draws", 2 * 20 * 300 * 16, 20 * 16 + 300 * 16, 20 * 16),
        ("sampled_targets", "targets", 2 * 20 * 300 * 16, 20 * 16 + 300 * 16, 20 * 8),
        ("accept_or_resample", "draws", 2 * 20 * 300 * 16, 20 * 16 + 300 * 16, 20 * 33),
    ],
)
def test_formulas_of_flops_and_bytes(case: str, mode: str, flops: int, elements: int, others: int) -> None:
    assert CASES[case].flops(mode, TINY) == flops
    assert CASES[case].bytes(mode, TINY, torch.float32) == 4 * elements + others
    assert CASES[case].bytes(mode, TINY, torch.bfloat16) == 2 * elements + others


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_floor_multiplies_what_the_formula_says(case) -> None:
    made = inputs.build(TINY, torch.float32)
    for mode in case.products:
        for reuse in (False, True):
            floor = case.floor(mode, made, reuse)
            with FlopCounterMode(display=False) as counted:
                floor()
            assert counted.get_total_flops() == case.flops(mode, TINY)


def test_floor_multiplies_real_numbers() -> None:
    """Zeros are multiplied faster than data on a GPU, denormals slower on a CPU: the stand-in has neither."""
    made = inputs.build(TINY, torch.float32)
    stand_in = CASES["cross_entropy"].floor("backward", made).products[0][0]
    assert torch.equal(stand_in, made.student_hidden @ made.student_weight.t())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("total_variation", (0.3, 0.03))
def test_inputs_are_as_far_apart_as_asked_and_no_uniform_noise(device: str, total_variation: float) -> None:
    shape = dataclasses.replace(TINY, rows=500, vocab=4000)
    made = inputs.build(shape, torch.float32, device, total_variation)
    hidden, weight, teacher_hidden, teacher_weight = (x.detach().double() for x in made.tensors)
    student, teacher = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
    distance = 0.5 * (student.softmax(1) - teacher.softmax(1)).abs().sum(1).mean().item()
    assert distance == pytest.approx(total_variation, rel=0.1)  # the scale was found on 64 of these rows
    assert 2 < teacher.std() < 8
    assert made.device.type == device and all(torch.equal(x, y) for x, y in zip(
        made.tensors, inputs.build(shape, torch.float32, device, total_variation).tensors
    ))


def test_labels_are_drawn_from_the_teacher() -> None:
    made = inputs.build(dataclasses.replace(TINY, rows=4000), torch.float32)
    probabilities = (made.teacher_hidden @ made.teacher_weight.t()).softmax(1)
    drawn = probabilities.gather(1, made.labels[:, None]).mean().item()
    assert drawn == pytest.approx((probabilities**2).sum(1).mean().item(), rel=0.1)


def test_only_so_many_rows_are_judged() -> None:
    made = inputs.build(Shape(rows=300, vocab=2500, student_hidden=4, teacher_hidden=4), torch.float32)
    rows, ids = made.judged
    assert len(rows) == inputs.JUDGED_ROWS == len(set(rows.tolist())) and len(ids) == inputs.JUDGED_IDS
    result = CASES["cross_entropy"].prepare(made)()
    CASES["cross_entropy"].verify(made, result)
    result["student_weight"][ids[-1]] += 1.0
    with pytest.raises(WrongResult, match="student_weight"):
        CASES["cross_entropy"].verify(made, result)


@pytest.mark.parametrize("case", ("kd_loss_dense", "kd_loss_sparse", "kd_loss_ensemble", "cross_entropy"))
def test_wrong_gradients_are_not_timed(case: str) -> None:
    made = inputs.build(TINY, torch.float32)
    result = CASES[case].prepare(made)()
    verdict = CASES[case].verify(made, result)
    assert min(verdict.cosines.values()) > 0.999999 and set(verdict.cosines) == {"student_hidden", "student_weight"}
    for name in ("loss", "student_hidden", "student_weight"):
        for wrong in (1.001 * result[name], result[name] * math.nan):
            with pytest.raises(WrongResult, match=f"{case}.*{name}.*not timed"):
                CASES[case].verify(made, result | {name: wrong})


def test_wrong_targets_are_not_timed() -> None:
    made = inputs.build(TINY, torch.float32)
    case = CASES["topk_targets"]
    result = case.prepare(made)()
    case.verify(made, result)
    # An id that is not among the best, with its own true logprob.
    ids, logprobs = (result[name].reshape(TINY.rows, -1).clone() for name in ("ids", "logprobs"))
    true = (made.teacher_hidden @ made.teacher_weight.t()).log_softmax(1)
    ids[3, 5] = true[3].argmin()
    logprobs[3, 5] = true[3].min()
    with pytest.raises(WrongResult, match="missed"):
        case.verify(made, result | {"ids": ids, "logprobs": logprobs})
    for wrong in (1e-3, math.nan):
        with pytest.raises(WrongResult, match="tail_logprob"):
            case.verify(made, result | {"tail_logprob": result["tail_logprob"] + wrong})


def test_wrong_stats_are_not_timed() -> None:
    made = inputs.build(TINY, torch.float32)
    case = CASES["token_stats"]
    result = case.prepare(made)()
    case.verify(made, result)
    changed = {"logprob": 1e-3, "lse": math.nan, "entropy": -1e-3, "max": 1e-3, "rank": 1}
    for name, by in changed.items():
        with pytest.raises(WrongResult, match=f"'{name}'"):
            case.verify(made, result | {name: result[name] + by})
    with pytest.raises(WrongResult, match="'argmax'"):
        case.verify(made, result | {"argmax": (result["argmax"] + 1) % TINY.vocab})
    gradient = case.prepare(made, "gradient")()
    case.verify(made, gradient)
    with pytest.raises(WrongResult, match="student_weight"):
        case.verify(made, gradient | {"student_weight": 1.001 * gradient["student_weight"]})


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("sample", {"logprobs": lambda x: x + 1e-3, "ids": lambda x: (x + 1) % TINY.vocab}),
        ("sampled_targets", {"logprobs": lambda x: x * math.nan, "importance": lambda x: 1.001 * x}),
        (
            "accept_or_resample",
            {"rank": lambda x: x + 1, "accepted": lambda x: ~x, "ids": lambda x: (x + 1) % TINY.vocab},
        ),
    ],
)
def test_wrong_draws_are_not_timed(case: str, changes: dict) -> None:
    made = inputs.build(TINY, torch.float32)
    result = CASES[case].prepare(made)()
    CASES[case].verify(made, result)
    for name, change in changes.items():
        with pytest.raises(WrongResult, match="not timed"):
            CASES[case].verify(made, result | {name: change(result[name])})


# ---------------------------------------------------------------------------------------------------------- contenders

SETTINGS = {
    "kd_loss_dense": ("jsd(beta=0.3)", "forward_kl", "reverse_kl"), "kd_loss_sparse": ("forward_kl",),
    "cross_entropy": (None,), "topk_targets": (None,), "token_stats": (None,),
}


def _agrees(case: str, name: str, divergence: str | None, device: str, dtype: torch.dtype) -> None:
    made = inputs.build(TINY, dtype, device)
    try:
        call = contenders.prepare(case, name, made, divergence)
    except Unavailable as reason:
        pytest.skip(f"bench: {name} {reason}")
    options = {} if divergence is None else {"divergence": divergence}
    for result in (call(), call()):
        verdict = CASES[case].judge(made, result, **options)
        # In bf16 others round their logits, which the errors in the results are there to show.
        assert max(verdict.errors.values()) < (1e-4 if dtype == torch.float32 else 0.5), verdict
        assert min(verdict.cosines.values(), default=1.0) > 0.9


@pytest.mark.parametrize(("case", "name", "divergence"), [
    (case, name, divergence)
    for case, names in CONTENDERS.items() for name in names if name not in (*COMPILED, *TRITON)
    for divergence in SETTINGS[case]
])
def test_contenders_compute_the_same(case: str, name: str, divergence: str | None) -> None:
    _agrees(case, name, divergence, "cpu", torch.float32)


@pytest.mark.interpret
@pytest.mark.parametrize(("case", "name", "divergence"), [
    ("kd_loss_dense", "liger_jsd", "jsd(beta=0.3)"), ("kd_loss_dense", "liger_jsd", "reverse_kl"),
    ("kd_loss_dense", "liger_kl", "forward_kl"), ("kd_loss_dense", "fla", "forward_kl"),
    ("cross_entropy", "liger_flce", None),
])
def test_triton_peers_compute_the_same(case: str, name: str, divergence: str | None) -> None:
    """Without a GPU: in Triton's interpreter."""
    _agrees(case, name, divergence, "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "name"), [(case, name) for case, names in CONTENDERS.items() for name in names])
def test_contenders_compute_the_same_on_a_gpu(case: str, name: str) -> None:
    _agrees(case, name, SETTINGS[case][-1] and "forward_kl", "cuda", torch.bfloat16)


def test_who_cannot_take_part_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    made = inputs.build(TINY, torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(Unavailable, match="has no total_variation"):
        contenders.prepare("kd_loss_dense", "trl", made, "total_variation")
    with pytest.raises(Unavailable, match="needs a GPU"):
        contenders.prepare("kd_loss_dense", "liger_jsd", made, "forward_kl")
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_divergence", None)
    with pytest.raises(Unavailable, match="cannot be imported: .*trl"):
        contenders.prepare("kd_loss_dense", "trl", made, "forward_kl")


def test_every_contender_and_case_is_compared_somewhere() -> None:
    taking_part = set()
    for device in comparisons.PLANS:
        for made in comparisons.plan(device).values():
            base = made.base if isinstance(made, Sweep) else made
            taking_part |= {(base.case, name) for name in base.contenders}
    assert taking_part == {(case, name) for case, names in CONTENDERS.items() for name in names}
    # Whose peers bench.sampling has, and an ensemble of heads has none.
    assert set(CASES) - set(CONTENDERS) == {"kd_loss_ensemble", "sample", "sampled_targets", "accept_or_resample"}


# -------------------------------------------------------------------------------------------------------------- timing


class FakeDevice(devices.CPU):
    """Calls are counted, not timed."""

    warm_ups = 2

    def milliseconds(self, call) -> float:
        call()
        return 1.0


def test_rounds_alternate_and_warm_up() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = timing.interleaved(runs, FakeDevice(), seconds=60.0, before_each=lambda: calls.append("-"))
    said = "".join(calls)
    assert said.startswith("-a-b-c" + "-a-b-c" + "-a-b-c" + "-b-c-a" + "-c-a-b" + "-a-b-c")
    assert {name: len(ms) for name, ms in times.items()} == dict.fromkeys("abc", timing.MAX_ROUNDS)
    calls.clear()  # no time at all: one warm-up, and as few rounds as a median takes
    timing.interleaved(runs, FakeDevice(), seconds=0.0)
    assert len(calls) == 3 * (1 + timing.MIN_ROUNDS)


def test_summary_and_ratio() -> None:
    times = [float(x) for x in range(11)]
    assert timing.summary(times) == {"p20_ms": 2.0, "p50_ms": 5.0, "p80_ms": 8.0, "min_ms": 0.0}
    # A round that was slow for both says as much as the others.
    assert timing.ratio([2.0, 40.0, 2.2], [1.0, 20.0, 1.0]) == 2.0


def test_launches_are_those_within_the_call() -> None:
    events = [
        ("cudaLaunchKernel", 0.0, 1.0), (launches.REGION, 10.0, 50.0), ("aten::mm", 11.0, 20.0),
        ("cudaLaunchKernel", 12.0, 13.0), ("cuLaunchKernelEx", 14.0, 15.0), ("cudaLaunchKernelExC", 16.0, 17.0),
        ("cudaMemcpyAsync", 18.0, 19.0), ("cudaStreamSynchronize", 20.0, 30.0), ("cudaDeviceSynchronize", 55.0, 60.0),
    ]
    assert launches.counted(events) == {"launches": 3, "host_syncs": 1}


class FakeEvent:
    """Stands for torch.cuda.Event; the clock is the number of things said so far."""

    said: list[str] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.said.append("record")
        self.at = len(self.said)

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.at - self.at)


def test_the_gpus_clock_empties_the_cache_and_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    said = FakeEvent.said = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("synchronize"))
    monkeypatch.setattr(devices.CUDA, "torch_name", "cpu")
    device = devices.CUDA()
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: said.append(f"flush {tensor.nbytes >> 20}"))
    assert device.milliseconds(lambda: said.append("call")) == 2.0
    assert said == ["flush 256", "synchronize", "record", "call", "record", "synchronize"]


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="--device must be one that torch .* sees, got cuda; try --device cpu"):
        devices.find("cuda")


@pytest.mark.gpu
def test_a_gpu_is_measured() -> None:
    device = devices.find("cuda")
    x = torch.randn(4096, 4096, device="cuda")
    product = lambda: x @ x  # noqa: E731
    assert 0.01 < device.milliseconds(product) < 1000
    assert device.peak(product)["peak_bytes"] == pytest.approx(4 * 4096**2, rel=0.6)
    found = launches.count(lambda: (x + 1, (x + 1).sum().item()))
    assert found["launches"] >= 3 and found["host_syncs"] >= 1
    assert launches.count(lambda: x + 1) == {"launches": 1, "host_syncs": 0}
    described = machine.describe("cuda")
    assert described["model"] and described["memory_bytes"] > 1 << 30 and described["triton"]


def test_ceilings_are_bytes_and_operations_a_second() -> None:
    found = ceilings.measure(devices.CPU(), 0.01, 0.0)
    assert found["product"] == "20^3 float32"
    assert 1e8 < found["copy_bytes_per_s"] < 1e13 and 1e6 < found["product_flops_per_s"] < 1e14


# ------------------------------------------------------------------------------------------------------- command lines


def test_gpu_script_runs_all_parts(tmp_path: Path) -> None:
    """One comparison and every row, on tiny shapes on the CPU."""
    (tmp_path / "out").mkdir()
    environment = os.environ | {
        "PYTHON": sys.executable, "KD_RESULTS": str(tmp_path / "results"), "OUT": str(tmp_path / "out"),
        "KD_WHEELS": str(tmp_path / "none"),
    }
    command = ["bash", "bench/gpu.sh", "--dry-run", "--device", "cpu", "--", "--seconds", "0", "--only", "topk_llama"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for part in ("ceilings", "tests", "compare", "sampler", "ops"):
        assert f"== {part}: status 0" in done.stdout, part
    assert "topk_llama: topk_targets" in done.stdout.split("== ops: status 0")[1]  # the table comes last
    names = {"gpu_ceilings.json", "gpu_side_by_side.json", "gpu_sampling.json", "gpu_ops.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    sampling = json.loads((tmp_path / "out" / "gpu_sampling.json").read_text())["results"]
    assert all("of_product" in row for found in sampling.values() for row in found.values()) and len(sampling) == 4

    rows = json.loads((tmp_path / "out" / "gpu_ops.json").read_text())["benchmarks"]
    modes = sum(len(case.products) for case in CASES.values())
    assert len(rows) == modes * len(BACKENDS["cpu"]) * len(DTYPES) + len(divergences.REGISTRY)
    for row in rows:
        needed = {"flops", "bytes", "errors", "floor_ms", "ratio_to_floor", "backend", "dtype", "mode"}
        assert needed <= set(row["extra_info"])


def test_gpu_script_goes_on_after_a_failure(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "KD_RESULTS": str(tmp_path), "KD_WHEELS": str(tmp_path)}
    (tmp_path / "not-a.whl").write_text("")
    command = ["bash", "bench/gpu.sh", "--dry-run", "--device", "cpu", "--parts", "wheels,ceilings,compare", "--"]
    done = subprocess.run(
        [*command, "--only", "no-such"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert "== ceilings: status 0" in done.stdout and (tmp_path / "gpu_ceilings.json").exists()
    assert "FAILED: wheels: status 1" in done.stdout and "FAILED: compare: status 2" in done.stdout
    assert "--only must be among dense_jsd_llama" in done.stderr
    assert subprocess.run(["bash", "bench/gpu.sh", "--no-such"], cwd=ROOT, capture_output=True).returncode == 2


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            ["peers", "--only", "rows", "ce", "--seconds", "3"],
            ["-m", "bench.side_by_side", "--only", "rows", "ce", "--seconds", "3.0"],
        ),
        (
            ["ops", "--device", "cuda", "--only", "topk", "jsd", "--tiny"],
            ["-m", "pytest", "--device", "cuda", "--tiny", "-k", "topk or jsd"],
        ),
    ],
)
def test_kdk_bench_calls_the_checkout(asked, expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    called = {}

    def run(command, cwd, env):
        called.update(command=command, cwd=cwd, path=env["PYTHONPATH"])
        return subprocess.CompletedProcess(command, called["status"])

    monkeypatch.setattr(bench_cli.subprocess, "run", run)
    called["status"] = 0
    out = tmp_path / "new" / "out.json"
    assert cli.main(["bench", *asked, "--out", str(out)]) == 0
    assert called["cwd"] == ROOT and str(ROOT / "python") in called["path"].split(os.pathsep)
    remaining = iter(called["command"])
    assert all(word in remaining for word in expected), called["command"]  # in this order, with others between
    assert str(out) in called["command"] and out.parent.exists() and str(out) in capsys.readouterr().out
    called["status"] = 1
    assert cli.main(["bench", *asked, "--out", str(out)]) == 2
    assert "failed with status 1; what was measured is in" in capsys.readouterr().err


def test_kdk_bench_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bench_cli, "__file__", str(tmp_path / "site-packages" / "kd_trainer" / "bench_cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "peers"]) == 2
    assert "must run in a checkout of kd-kernels" in capsys.readouterr().err
    monkeypatch.chdir(ROOT)
    assert bench_cli.checkout() == ROOT
