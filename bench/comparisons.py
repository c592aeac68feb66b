"""What is compared: which op on which shapes in which dtype, between whom. One table for a CPU, one for a GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from bench import inputs
from bench.cases import CASES
from bench.contenders import CONTENDERS, OURS, ROUNDED
from bench.inputs import Shape

TIMED_AT = 0.1
"""Total variation between student and teacher of the inputs that are timed."""
NEAR = (0.3, 0.1, 0.03)
TINY = Shape(rows=24, vocab=512, student_hidden=16, teacher_hidden=24, kept=8)
FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Comparison:
    """One op on one shape in one dtype.

    Attributes:
        kind: "time", with memory beside it where that costs nothing (a GPU); or "memory" alone.
        target: what the ratio of ours to the bare products should be at most.
        total_variations: the distances between student and teacher at which errors are measured.
        budget_bytes: bound on the scratch of ours; None: the library's default.
    """

    case: str
    divergence: str | None
    dtype: torch.dtype
    shape: Shape
    contenders: tuple[str, ...]
    kind: str = "time"
    target: float | None = None
    total_variations: tuple[float, ...] = (TIMED_AT,)
    budget_bytes: int | None = None

    @property
    def mode(self) -> str:
        return {"topk_targets": "targets", "token_stats": "stats"}.get(self.case, "gradient")

    def record(self) -> dict[str, object]:
        case = CASES[self.case]
        return {
            "kind": self.kind, "case": self.case, "mode": self.mode, "divergence": self.divergence,
            "dtype": str(self.dtype).removeprefix("torch."), "shape": dataclasses.asdict(self.shape),
            "flops": case.flops(self.mode, self.shape), "bytes": case.bytes(self.mode, self.shape, self.dtype),
            "target": self.target, "logit_std": inputs.LOGIT_STD, "timed_at_total_variation": TIMED_AT,
            "budget_bytes": self.budget_bytes, "logits_bytes": 4 * self.shape.rows * self.shape.vocab,
        }


@dataclass(frozen=True)
class Sweep:
    """Time and memory of one comparison while one thing in it changes.

    Attributes:
        over: "rows", "vocab" or "budget_bytes"; others than ours take part in the first point alone of the last one.
    """

    base: Comparison
    over: str
    values: tuple[int, ...]

    def points(self) -> list[Comparison]:
        if self.over != "budget_bytes":
            shapes = (dataclasses.replace(self.base.shape, **{self.over: value}) for value in self.values)
            return [dataclasses.replace(self.base, shape=shape) for shape in shapes]
        others = [self.base.contenders] + [(OURS,)] * (len(self.values) - 1)
        return [
            dataclasses.replace(self.base, budget_bytes=value, contenders=names)
            for value, names in zip(self.values, others)
        ]


Plan = dict[str, Comparison | Sweep]
"""By name, in the order in which they run."""


def everyone(case: str, *without: str) -> tuple[str, ...]:
    return tuple(name for name in CONTENDERS[case] if name not in without)


MIB = 1 << 20
GPU_ONLY = ("liger_jsd", "liger_kl", "fla", "liger_chunked_compiled")
SLOW_TO_START = ("torch_compile", "liger_chunked_compiled", "cut_cross_entropy")
"""Who compiles for half a minute; the last one on a CPU alone."""
FEW = (OURS, "torch_eager", "trl", "liger_chunked")
"""For sweeps: who is there at every size, without a compilation for each."""
JSD, KL = "jsd(beta=0.5)", "forward_kl"


def _cpu() -> Plan:
    shape = Shape(rows=512, vocab=32768, student_hidden=512, teacher_hidden=1024)
    few_rows = Shape(rows=256, vocab=49152, student_hidden=64, teacher_hidden=576)
    held = Shape(rows=2048, vocab=151936, student_hidden=512, teacher_hidden=1024)
    small = Shape(rows=128, vocab=32768, student_hidden=256, teacher_hidden=512)
    case, sparse, labels, topk = "kd_loss_dense", "kd_loss_sparse", "cross_entropy", "topk_targets"
    dense = everyone(case, *GPU_ONLY)
    swept = Comparison(case, JSD, FP32, small, FEW)
    return {
        "dense_fp32": Comparison(case, JSD, FP32, shape, everyone(case, ROUNDED, *GPU_ONLY), "time", 1.35, NEAR),
        "dense_bf16": Comparison(case, JSD, BF16, shape, dense, "time", 4.0, NEAR),
        "sparse_fp32": Comparison(sparse, KL, FP32, shape, everyone(sparse, ROUNDED), "time", 1.25, NEAR),
        "sparse_bf16": Comparison(sparse, KL, BF16, shape, everyone(sparse), "time", None, NEAR),
        "ce_fp32": Comparison(labels, None, FP32, shape, everyone(labels, "liger_flce"), "time", 1.25),
        "ce_bf16": Comparison(labels, None, BF16, shape, everyone(labels, "liger_flce")),
        "topk_fp32": Comparison(topk, None, FP32, few_rows, everyone(topk), "time", 1.15),
        "topk_bf16": Comparison(topk, None, BF16, few_rows, everyone(topk)),
        "stats_fp32": Comparison("token_stats", None, FP32, shape, everyone("token_stats"), "time", 1.15),
        "stats_bf16": Comparison("token_stats", None, BF16, shape, everyone("token_stats")),
        "memory_fp32": Comparison(case, JSD, FP32, held, FEW, "memory", budget_bytes=128 * MIB),
        "memory_bf16": Comparison(case, JSD, BF16, held, FEW, "memory", budget_bytes=128 * MIB),
        "rows": Sweep(swept, "rows", (64, 128, 256, 512)),
        "vocab": Sweep(swept, "vocab", (8192, 32768, 131072)),
        "budget": Sweep(swept, "budget_bytes", tuple(n * MIB for n in (4, 8, 16, 32, 64))),
        "ce_budget": Sweep(
            Comparison(labels, None, FP32, shape, everyone(labels, "liger_flce")), "budget_bytes",
            tuple(n * MIB for n in (1, 4, 16, 32, 96)),
        ),
    }


def _gpu() -> Plan:
    llama = Shape(rows=8192, vocab=128256, student_hidden=4096, teacher_hidden=8192)
    qwen = Shape(rows=8192, vocab=151936, student_hidden=2048, teacher_hidden=4096)
    labelled = Shape(rows=4096, vocab=128256, student_hidden=4096, teacher_hidden=4096)
    half = dataclasses.replace(qwen, rows=4096)
    case, sparse, labels, topk = "kd_loss_dense", "kd_loss_sparse", "cross_entropy", "topk_targets"
    compiled = everyone(case, ROUNDED, "liger_kl", "fla")  # which are forward KL only
    jsd = tuple(name for name in compiled if name not in SLOW_TO_START)
    kl = everyone(case, ROUNDED, *SLOW_TO_START)
    swept = Comparison(case, JSD, BF16, qwen, (*FEW, "liger_jsd"))
    return {
        "dense_jsd_llama": Comparison(case, JSD, BF16, llama, jsd, "time", 1.25, NEAR),
        "dense_kl_llama": Comparison(case, KL, BF16, llama, kl, "time", 1.25),
        "sparse_llama": Comparison(sparse, KL, BF16, llama, everyone(sparse, ROUNDED), "time", 1.30),
        "topk_llama": Comparison(topk, None, BF16, llama, everyone(topk), "time", 1.15),
        "stats_llama": Comparison("token_stats", None, BF16, llama, everyone("token_stats"), "time", 1.15),
        "ce": Comparison(labels, None, BF16, labelled, everyone(labels)),
        "dense_jsd_qwen": Comparison(case, JSD, BF16, qwen, compiled, "time", 1.25, NEAR),
        "dense_kl_qwen": Comparison(case, KL, BF16, qwen, kl, "time", 1.25),
        "sparse_qwen": Comparison(sparse, KL, BF16, qwen, everyone(sparse, ROUNDED), "time", 1.30),
        "topk_qwen": Comparison(topk, None, BF16, qwen, everyone(topk), "time", 1.15),
        "rows": Sweep(swept, "rows", (1024, 2048, 4096, 8192)),
        "budget": Sweep(swept, "budget_bytes", tuple(n * MIB for n in (256, 512, 1024, 2048, 4096))),
        "vocab": Sweep(dataclasses.replace(swept, shape=half), "vocab", (32768, 65536, 131072, 262144)),
    }


PLANS = {"cpu": _cpu, "cuda": _gpu}


def _tiny(comparison: Comparison) -> Comparison:
    return dataclasses.replace(
        comparison, shape=TINY, total_variations=comparison.total_variations[-1:],
        contenders=tuple(name for name in comparison.contenders if name not in SLOW_TO_START),
    )


def plan(device: str, tiny: bool = False) -> Plan:
    """What is compared on a device.

    Args:
        tiny: all of it on tiny shapes, without whoever compiles: whether it works, in seconds. Its times mean nothing.
    """
    found = PLANS[device]()
    if not tiny:
        return found
    small = {"rows": (8, 24), "vocab": (256, 512), "budget_bytes": (1 << 17, 1 << 18)}
    return {
        name: Sweep(_tiny(made.base), made.over, small[made.over]) if isinstance(made, Sweep) else _tiny(made)
        for name, made in found.items()
    }
