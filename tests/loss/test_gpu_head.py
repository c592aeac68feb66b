"""The path of a GPU, held to its errors without one: half-precision operands, fp32 results, and the gradient of a chunk
in the head's dtype, in the memory of the logits that it replaces. Only the products themselves are stood in for."""

from __future__ import annotations

import pytest
import torch

from judge import Linear, compare, compare_on_matrix_units
from kd_kernels import heads, products
from kd_kernels.testing import linear_pair, logits_pair

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.interpret)])
def backend(request: pytest.FixtureRequest) -> str:
    """Those that run on a GPU."""
    return request.param


@pytest.fixture(autouse=True)
def gpu_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    def product_into(out, left, right, adds=False):
        assert left.dtype == right.dtype and out.dtype in (left.dtype, torch.float32)
        product = left.float() @ right.float()
        out.copy_(out + product if adds else product)

    monkeypatch.setattr(heads, "CpuHead", heads.GpuHead)
    monkeypatch.setattr(heads, "product_into", product_into)


def pair(dtype: torch.dtype, rows: int = 9, vocab: int = 333) -> tuple[Linear, Linear]:
    made = linear_pair(rows, vocab, 16, 24, dtype)
    return Linear(made.student_hidden, made.student_weight), Linear(made.teacher_hidden, made.teacher_weight)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd(beta=0.5)", "reverse_kl"])
def test_gradients(backend: str, divergence: str, reduction: str, dtype: torch.dtype) -> None:
    options = dict(reduction=reduction, labels=torch.arange(9), ce_weight=0.5)
    compare_on_matrix_units(*pair(dtype), divergence, backend=backend, **options)


@pytest.mark.parametrize("dtype", HALVES)
def test_several_chunks_and_padding(backend: str, dtype: torch.dtype) -> None:
    student, teacher = pair(dtype)
    student = Linear(student.hidden, student.weight, torch.linspace(-1, 1, 333).to(dtype), 0.7, 12.0, 300)
    teacher = Linear(teacher.hidden, teacher.weight, valid_vocab=300)
    budget = {"library_only": {"max_scratch_bytes": 120_000 if backend == "reference" else 12_000 + 4 * 333 * 2 * 8}}
    compare(student, teacher, "jsd(beta=0.5)", temperature=2.0, backend=backend, **budget)


@pytest.mark.parametrize("weight", [1e-4, 1.0, 3e3])
def test_fp16_tiles_do_not_underflow(backend: str, weight: float) -> None:
    """Weights of tokens, 1 / N and a loss scale would push most of a row below what fp16 can hold, or above it."""
    student, teacher = pair(torch.float16)
    compare(student, teacher, "forward_kl", token_weight=torch.full((9,), weight), normalizer=3e3, backend=backend)


def test_dtypes_meet_in_the_wider_one(backend: str) -> None:
    student, teacher = pair(torch.bfloat16)
    student = Linear(student.hidden, student.weight.float())
    compare(student, teacher, "forward_kl", backend=backend)


def test_rows_that_are_listed(backend: str) -> None:
    compare(*pair(torch.bfloat16), "jsd(beta=0.5)", rows=torch.tensor([7, 2, 3]), backend=backend)


def test_chunks_on_a_gpu_are_whole_tiles() -> None:
    cuda = torch.device("cuda")
    step = products.rows_per_chunk("kd_loss", 8192, 8 * 128_256, 0, None, cuda)
    assert step % products.ROW_TILE == 0 and step * 8 * 128_256 <= products.FALLBACK_SCRATCH_BYTES and step >= 1024
    assert products.rows_per_chunk("kd_loss", 100, 8 * 128_256, 0, None, cuda) == 100
    assert products.rows_per_chunk("kd_loss", 8192, 1 << 20, 0, 100 << 20, cuda) <= 100  # too small a budget for a tile


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_scaling_in_place(dtype: torch.dtype) -> None:
    from kd_kernels.loss.triton_impl import scale_in_place

    x = logits_pair("near_0.3", 3, 2001, dtype)[0]
    for scale in (torch.tensor(1.0), torch.tensor(0.37, dtype=torch.float64)):
        scaled = x.clone()
        scale_in_place(scaled, scale)
        assert torch.equal(scaled, (x.float() * scale.float()).to(dtype))
