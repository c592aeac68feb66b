"""What bad input gets: a message of the form `kd_loss: <argument> must be <requirement>, got <value>[; <remedy>]`."""

from __future__ import annotations

import dataclasses
import math
import os
import sys

import pytest
import torch

import oracles
from judge import smallest_budget, sparse_targets
from kd_kernels import EnsembleLogits, LinearLogits, SparseTargets, _backend, kd_loss, products
from kd_kernels.testing import logits_pair

N, V, H = 4, 12, 6
STUDENT, TEACHER = logits_pair("near_0.3", N, V)
HEAD = LinearLogits(torch.randn(N, H), torch.randn(V, H))
TARGETS = sparse_targets(oracles.topk(TEACHER.double(), 3))
LABELS = torch.tensor([0, -100, 11, 4])


def refuses(error: type[Exception], match: str):
    return pytest.raises(error, match="^kd_loss: " + match)


def with_value(tensor: torch.Tensor, index: tuple[int, ...] | int, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


# ------------------------------------------------------------------------------------ wrong before anything is computed


@pytest.mark.parametrize(
    "error, match, arguments",
    [
        # student
        (TypeError, r"student must be a torch.Tensor.*, got list", dict(student=[[0.0]])),
        (TypeError, r"student must be a torch.Tensor.*, got SparseTargets", dict(student=TARGETS)),
        (TypeError, r"student must be a torch.Tensor.*, got EnsembleLogits", dict(student=EnsembleLogits((STUDENT,)))),
        (TypeError, r"student must be of dtype float32, .*, got torch.int64", dict(student=STUDENT.long())),
        (ValueError, r"student must be of shape \[\.\.\., V\], got \[\]", dict(student=torch.tensor(0.0))),
        (ValueError, r"student must be of at least one column", dict(student=STUDENT[:, :0], teacher=TEACHER[:, :0])),
        # teacher
        (ValueError, r"teacher must be given, got None; for cross-entropy alone pass kd_weight=0", dict(teacher=None)),
        (
            TypeError,
            r"teacher must be a tensor, LinearLogits, EnsembleLogits or SparseTargets, got dict",
            dict(teacher={}),
        ),
        (TypeError, r"teacher must be of dtype .*, got torch.int64", dict(teacher=TEACHER.long())),
        (ValueError, r"teacher must be of N=4 rows like the student, got 3", dict(teacher=TEACHER[:3])),
        (
            ValueError,
            r"teacher must be of N=4 rows like the student, got 3",
            dict(teacher=TARGETS.select(torch.arange(3))),
        ),
        (ValueError, r"teacher must be of N=4 rows like the student, got 1", dict(teacher=TEACHER[0])),
        (ValueError, r"teacher must be on cpu, like the rest, got meta", dict(teacher=TEACHER.to("meta"))),
        # vocabularies
        (
            ValueError,
            r"student and teacher must be of one vocabulary size, got \[12, 11\]; give valid_vocab=",
            dict(teacher=TEACHER[:, :11]),
        ),
        (
            ValueError,
            r"student and teacher must be of one vocabulary size, got \[12, 14\]; give valid_vocab=.*slice the padded",
            dict(teacher=LinearLogits(HEAD.hidden, torch.randn(14, H))),
        ),
        (
            ValueError,
            r"student and teacher must be of one vocabulary size, got \[10, 11\]",
            dict(student=dataclasses.replace(HEAD, valid_vocab=10), teacher=dataclasses.replace(HEAD, valid_vocab=11)),
        ),
        (
            ValueError,
            r"student and teacher must be of at least valid_vocab=12 columns, got \[12, 11\]",
            dict(student=dataclasses.replace(HEAD, valid_vocab=12), teacher=TEACHER[:, :11]),
        ),
        # divergence
        (ValueError, r"divergence must be one of forward_kl, reverse_kl, jsd, .*, got 'kl'", dict(divergence="kl")),
        (TypeError, r"divergence must be a string or a Divergence, got function", dict(divergence=lambda: None)),
        # labels
        (ValueError, r"labels must be given when ce_weight is not 0, got None", dict(ce_weight=0.5)),
        (TypeError, r"labels must be a torch.Tensor, got list", dict(labels=[0, 1, 2, 3])),
        (TypeError, r"labels must be of dtype int64 or int32, got torch.float32", dict(labels=LABELS.float())),
        (ValueError, r"labels must be of shape \[4\] like the student's rows, got \[3\]", dict(labels=LABELS[:3])),
        (
            ValueError,
            r"labels must be of shape \[4\] like the student's rows, got \[2, 2\]",
            dict(labels=LABELS.view(2, 2)),
        ),
        (ValueError, r"labels must be on cpu, like the rest, got meta", dict(labels=LABELS.to("meta"))),
        # numbers
        (ValueError, r"temperature must be finite and greater than 0, got 0;", dict(temperature=0)),
        (ValueError, r"temperature must be finite and greater than 0, got -1.0", dict(temperature=-1.0)),
        (ValueError, r"temperature must be finite and greater than 0, got nan", dict(temperature=math.nan)),
        (ValueError, r"temperature must be finite and greater than 0, got inf", dict(temperature=math.inf)),
        (TypeError, r"temperature must be a number, got Tensor", dict(temperature=torch.tensor(2.0))),
        (ValueError, r"ce_weight must be finite and at least 0, got -0.5", dict(ce_weight=-0.5, labels=LABELS)),
        (ValueError, r"kd_weight must be finite and at least 0, got nan", dict(kd_weight=math.nan)),
        (ValueError, r"kd_weight must be finite and at least 0, got inf", dict(kd_weight=math.inf)),
        (
            TypeError,
            r"kd_weight must be a number, got Tensor; for a weight per token use token_weight",
            dict(kd_weight=torch.ones(N)),
        ),
        (TypeError, r"ce_weight must be a number, got bool", dict(ce_weight=True, labels=LABELS)),
        (TypeError, r"ignore_index must be an integer, got float", dict(ignore_index=-100.0, labels=LABELS)),
        (TypeError, r"squared_temperature must be a bool, got str", dict(squared_temperature="yes")),
        # token_weight
        (TypeError, r"token_weight must be a torch.Tensor, got float", dict(token_weight=0.5)),
        (
            TypeError,
            r"token_weight must be of dtype float32, .*, got torch.int64",
            dict(token_weight=torch.ones(N).long()),
        ),
        (
            ValueError,
            r"token_weight must be of shape \[4\] like the student's rows, got \[4, 1\]",
            dict(token_weight=torch.ones(N, 1)),
        ),
        (
            ValueError,
            r'token_weight must be without requires_grad, got .*; multiply the result of reduction="none"',
            dict(token_weight=torch.ones(N, requires_grad=True)),
        ),
        # normalizer
        (ValueError, r"normalizer must be finite and greater than 0, got 0", dict(normalizer=0)),
        (ValueError, r"normalizer must be finite and greater than 0, got -3.0", dict(normalizer=-3.0)),
        (TypeError, r"normalizer must be a number, got str", dict(normalizer="4")),
        (
            ValueError,
            r"normalizer must be a number or a tensor of one element, got \[2\]",
            dict(normalizer=torch.ones(2)),
        ),
        (
            ValueError,
            r'normalizer must be None unless reduction="mean", got given with reduction="sum"',
            dict(normalizer=4, reduction="sum"),
        ),
        (
            ValueError,
            r"normalizer must be on cpu, like the rest, got meta",
            dict(normalizer=torch.ones((), device="meta")),
        ),
        # names
        (ValueError, r"reduction must be one of mean, sum, none, got 'batchmean'", dict(reduction="batchmean")),
        (ValueError, r"tail must be one of bucket, renormalize, drop, got 'keep'", dict(teacher=TARGETS, tail="keep")),
        (
            ValueError,
            r"stats must be one of divergence, student_entropy, .*, got 'entropy'",
            dict(stats=("divergence", "entropy")),
        ),
        (TypeError, r"stats must be a tuple of names, got str", dict(stats="divergence")),
        (ValueError, r"logits_dtype must be one of None, .*input.*, got 'bfloat16'", dict(logits_dtype="bfloat16")),
        (ValueError, r"backend must be one of reference, cpp, triton, got 'metal'", dict(backend="metal")),
        (
            ValueError,
            r"group must be None, got .*; vocabulary-parallel heads are not in this version",
            dict(group="tp"),
        ),
        # rows
        (TypeError, r"rows must be of dtype int64 or int32, got torch.bool", dict(rows=torch.ones(N).bool())),
        (
            ValueError,
            r"rows must be of shape \[M\], M at most N=4, got \[2, 2\]",
            dict(rows=torch.arange(4).view(2, 2)),
        ),
        (ValueError, r"rows must be of shape \[M\], M at most N=4, got \[5\]", dict(rows=torch.zeros(5).long())),
        (ValueError, r"rows must be distinct and in 0\.\.N-1=3, got \[4\]", dict(rows=torch.tensor([4]))),
        (ValueError, r"rows must be distinct and in 0\.\.N-1=3, got \[-1, 0\]", dict(rows=torch.tensor([-1, 0]))),
        (ValueError, r"rows must be distinct and in 0\.\.N-1=3, got \[1, 1\]", dict(rows=torch.tensor([1, 1]))),
        # scratch
        (TypeError, r"max_scratch_bytes must be a number of bytes \(int\), got float", dict(max_scratch_bytes=1e6)),
        (
            ValueError,
            r"max_scratch_bytes must be at least \d+ bytes, which one row takes, got 1",
            dict(student=HEAD, max_scratch_bytes=1),
        ),
        (
            ValueError,
            r"max_scratch_bytes must be at least \d+ bytes, which one row takes, got 0",
            dict(student=HEAD, max_scratch_bytes=0),
        ),
        (
            ValueError,
            r"max_scratch_bytes must be at least \d+ bytes, which one row takes, got -1",
            dict(student=HEAD, max_scratch_bytes=-1),
        ),
    ],
)
def test_bad_arguments(error: type[Exception], match: str, arguments: dict) -> None:
    with refuses(error, match):
        kd_loss(**{"student": STUDENT, "teacher": TEACHER, **arguments})


def test_a_budget_that_the_message_names_is_enough(backend: str) -> None:
    enough = smallest_budget(HEAD, TEACHER, backend=backend)
    assert torch.allclose(
        kd_loss(HEAD, TEACHER, max_scratch_bytes=enough, backend=backend).loss, kd_loss(HEAD, TEACHER).loss
    )
    with refuses(ValueError, rf"max_scratch_bytes must be at least {enough} bytes, .*, got {enough - 1}"):
        kd_loss(HEAD, TEACHER, max_scratch_bytes=enough - 1, backend=backend)


# --------------------------------------------------------------------------------------------- wrong values, on the CPU


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_and_inf_logits(backend: str, side: str, bad: float, reduction: str) -> None:
    spoiled = {"student": STUDENT, "teacher": TEACHER}
    spoiled[side] = with_value(spoiled[side], (2, 5), bad)
    with refuses(ValueError, rf"{side}.* must be free of NaN and \+inf.* a finite entry in every row.*, got .*row 2"):
        kd_loss(**spoiled, reduction=reduction, backend=backend)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rows_of_minus_inf_alone(backend: str, side: str) -> None:
    spoiled = {"student": STUDENT, "teacher": TEACHER}
    spoiled[side] = with_value(spoiled[side], 1, -math.inf)
    with refuses(ValueError, rf"{side}.* must be free of NaN and \+inf.* a finite entry in every row.*, got .*row 1"):
        kd_loss(**spoiled, backend=backend)


@pytest.mark.parametrize("field", ["hidden", "weight"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_heads(backend: str, side: str, field: str) -> None:
    head = dataclasses.replace(HEAD, **{field: with_value(getattr(HEAD, field), (0, 0), math.nan)})
    with refuses(ValueError, rf"{side}.* must be free of NaN and \+inf.*, got .*row 0"):
        kd_loss(**{"student": STUDENT, "teacher": TEACHER, side: head}, backend=backend)


def test_the_row_that_is_named_is_the_callers(backend: str) -> None:
    """Not its number among the rows that count, nor in its chunk."""
    labels = torch.tensor([-100, 1, -100, 2])
    with refuses(ValueError, r"student logits .*row 3$"):
        kd_loss(with_value(STUDENT, (3, 0), math.nan), TEACHER, labels=labels, backend=backend)
    head = dataclasses.replace(HEAD, hidden=with_value(HEAD.hidden, (3, 0), math.nan))
    with refuses(ValueError, r"student logits .*row 3$"):
        kd_loss(head, TEACHER, max_scratch_bytes=smallest_budget(HEAD, TEACHER, backend=backend), backend=backend)


@pytest.mark.parametrize("label", [V, 10**9, -1, -(2**40)])
@pytest.mark.parametrize("teacher", ["dense", "sparse"])
def test_labels_out_of_range(backend: str, label: int, teacher: str) -> None:
    target = TEACHER if teacher == "dense" else TARGETS
    with refuses(ValueError, r"labels must be in 0\.\.V-1=11, or ignore_index, got .*row 2"):
        kd_loss(STUDENT, target, labels=with_value(LABELS, 2, label), ce_weight=0.5, backend=backend)
    with refuses(ValueError, r"labels must be in 0\.\.V-1=11, or ignore_index, got .*row 2"):
        kd_loss(STUDENT, target, labels=with_value(LABELS, 2, label), stats=("label_logprob",), backend=backend)


def test_labels_in_the_padding(backend: str) -> None:
    padded = dataclasses.replace(HEAD, valid_vocab=11)
    with refuses(ValueError, r"labels must be in 0\.\.V-1=10, or ignore_index, got .*row 2"):
        kd_loss(padded, dataclasses.replace(HEAD, valid_vocab=11), labels=LABELS, ce_weight=0.5, backend=backend)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_token_weights_that_are_not_finite(backend: str, bad: float) -> None:
    with refuses(ValueError, r"token_weight.* must be .*finite, got .*"):
        kd_loss(STUDENT, TEACHER, token_weight=with_value(torch.ones(N), 1, bad), backend=backend)


def replaced(**fields) -> SparseTargets:
    return dataclasses.replace(TARGETS, **fields)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize(
    "match, targets",
    [
        (
            r"teacher.ids must be in 0\.\.V-1=11 and distinct within a row, got .*row 1",
            replaced(ids=with_value(TARGETS.ids, 4, V)),
        ),
        (
            r"teacher.ids must be in 0\.\.V-1=11 and distinct within a row, got .*row 1",
            replaced(ids=with_value(TARGETS.ids, 4, -1)),
        ),
        (
            r"teacher.ids must be in 0\.\.V-1=11 and distinct within a row, got .*row 1",
            replaced(ids=with_value(TARGETS.ids, 4, 2**40)),
        ),
        (
            r"teacher.ids must be in 0\.\.V-1=11 and distinct within a row, got .*row 1",
            replaced(ids=with_value(TARGETS.ids, 4, TARGETS.ids[3].item())),
        ),
        (
            r"teacher.offsets must be non-decreasing from 0 to nnz=12, got \[1, 3, 6, 9, 12\]",
            replaced(offsets=torch.tensor([1, 3, 6, 9, 12])),
        ),
        (
            r"teacher.offsets must be non-decreasing from 0 to nnz=12, got \[0, 3, 2, 9, 12\]",
            replaced(offsets=torch.tensor([0, 3, 2, 9, 12])),
        ),
        (
            r"teacher.offsets must be non-decreasing from 0 to nnz=12, got \[0, 3, 6, 9, 13\]",
            replaced(offsets=torch.tensor([0, 3, 6, 9, 13])),
        ),
        (
            r"teacher must be .*log-probabilities those of masses up to 1, got .*row 1",
            replaced(logprobs=with_value(TARGETS.logprobs, 4, math.nan)),
        ),
        (
            r"teacher must be .*log-probabilities those of masses up to 1, got .*row 1",
            replaced(logprobs=with_value(TARGETS.logprobs, 4, 0.5)),
        ),
        (
            r"teacher must be .*log-probabilities those of masses up to 1, got .*row 1",
            replaced(logprobs=with_value(TARGETS.logprobs, slice(3, 6), -0.5)),
        ),
    ],
)
def test_bad_sparse_targets(backend: str, tail: str, match: str, targets: SparseTargets) -> None:
    with refuses(ValueError, match):
        kd_loss(STUDENT, targets, tail=tail, backend=backend)


@pytest.mark.parametrize("bad", [math.nan, 0.5, math.inf])
def test_tail_mass_above_one(backend: str, bad: float) -> None:
    with refuses(ValueError, r"teacher.tail_logprob must be at most 0: the log of a mass, got .*row 2"):
        kd_loss(STUDENT, replaced(tail_logprob=with_value(TARGETS.tail_logprob, 2, bad)), backend=backend)


def test_head_and_tail_together_above_one(backend: str) -> None:
    """Each mass is below 1, their sum is not: the row is not a distribution, whoever made it."""
    with refuses(ValueError, r"teacher.* masses up to 1.*row 2"):
        kd_loss(STUDENT, replaced(tail_logprob=with_value(TARGETS.tail_logprob, 2, -0.01)), backend=backend)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_bad_importance_weights(backend: str, bad: float) -> None:
    targets = replaced(importance=with_value(torch.ones(12), 4, bad))
    with refuses(ValueError, r"teacher.importance must be .*, got .*row 1"):
        kd_loss(STUDENT, targets, backend=backend)


def test_bucket_without_a_tail(backend: str) -> None:
    with refuses(ValueError, r'tail must be "renormalize" or "drop" for targets without tail_logprob, got "bucket"'):
        kd_loss(STUDENT, replaced(tail_logprob=None), backend=backend)


def test_temperature_that_the_targets_do_not_declare(backend: str) -> None:
    with refuses(
        ValueError, r"temperature must be one that the sparse targets declare \(1.0\), got 2.0; log Z .*temperatures="
    ):
        kd_loss(STUDENT, TARGETS, temperature=2.0, backend=backend)


# ------------------------------------------------------------------------------------------------------------- backends


def test_unknown_backend() -> None:
    with refuses(ValueError, "backend must be one of reference, cpp, triton, got 'cuda'"):
        kd_loss(STUDENT, TEACHER, backend="cuda")


@pytest.fixture
def fresh_checks():
    """What is found out about Triton and the GPU once a process is found out anew, before and after."""
    caches = (_backend._triton, _backend._check_gpu)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes tensors of the CPU")
def test_triton_refuses_a_tensor_of_the_cpu() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    with refuses(
        RuntimeError, r'backend must be one for tensors on cpu, got "triton"; move the tensors to a GPU, or pass .*cpp'
    ):
        kd_loss(STUDENT, TEACHER, backend="triton")


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, fresh_checks) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(
        RuntimeError, match=r'backend "triton" must be installed, got no module triton .*pip install "triton>=3.6"'
    ):
        kd_loss(STUDENT, TEACHER, backend="triton")


def test_triton_that_is_too_old(monkeypatch: pytest.MonkeyPatch, fresh_checks) -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(RuntimeError, match=r'triton must be 3.6 or newer, got 3.5.1; pip install "triton>=3.6"'):
        kd_loss(STUDENT, TEACHER, backend="triton")


def test_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch, fresh_checks) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with refuses(
        RuntimeError, r"the GPU must be of compute capability 8.0 or newer, got 7.5 \(Tesla T4\); pass backend="
    ):
        _backend.choose("kd_loss", None, torch.device("cuda", 0), ("reference", "cpp", "triton"))


@pytest.mark.interpret
def test_what_the_triton_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    with refuses(
        TypeError, r"tensors must be of dtype float32, bfloat16 or float16 .*got torch.float64; pass backend="
    ):
        kd_loss(STUDENT.double(), TEACHER, backend="triton")
    monkeypatch.setattr(_backend, "MAX_VOCAB", STUDENT.shape[1] - 1)
    with refuses(ValueError, rf'the vocabulary must be at most {STUDENT.shape[1] - 1} for backend="triton"'):
        kd_loss(STUDENT, TEACHER, backend="triton")


def test_out_of_memory_names_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(products.TensorSource, "open", no_room)
    with refuses(
        torch.OutOfMemoryError, r"max_scratch_bytes must be smaller .*got 123456 bytes; .*Tried to allocate 2.00 GiB"
    ):
        kd_loss(STUDENT, TEACHER, max_scratch_bytes=123456, backend="reference")


def test_capture_of_sizes_that_depend_on_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with refuses(
        RuntimeError, r"compact must be None or False while a CUDA graph is captured, got True; pass .* rows="
    ):
        kd_loss(STUDENT, TEACHER, compact=True, backend="reference")


@pytest.mark.parametrize("asked", [None, "cpp"])
def test_extension_that_was_not_built(monkeypatch: pytest.MonkeyPatch, asked: str | None) -> None:
    """An error that says so: never the reference in its place."""
    monkeypatch.setitem(sys.modules, "kd_kernels._C", None)
    _backend.extension.cache_clear()
    try:
        with pytest.raises(
            RuntimeError, match=r'backend "cpp" must be built, got no extension kd_kernels._C .*backend="reference"'
        ):
            kd_loss(STUDENT, TEACHER, backend=asked)
        assert kd_loss(STUDENT, TEACHER, backend="reference").loss.isfinite()
    finally:
        _backend.extension.cache_clear()


@pytest.mark.gpu
def test_cpp_with_gpu_tensors() -> None:
    with refuses(RuntimeError, r'backend must be one for tensors on cuda:0, got "cpp"'):
        kd_loss(STUDENT.cuda(), TEACHER.cuda(), backend="cpp")
