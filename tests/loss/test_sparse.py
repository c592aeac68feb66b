"""Truncated and sampled teachers: three ways to treat what is missing, any number of ids a row, importance weights."""

from __future__ import annotations

import math

import pytest
import torch

import oracles
from judge import CASES, SOME, Dense, Linear, Sparse, compare, run_library, smallest_budget, sparse_targets
from kd_kernels import kd_loss
from kd_kernels.testing import linear_pair, logits_pair

every_divergence = pytest.mark.parametrize("divergence", list(CASES))
some_divergences = pytest.mark.parametrize("divergence", SOME)
every_tail = pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])


def largest(logits: torch.Tensor, k: int) -> list[torch.Tensor]:
    return list(logits.double().topk(min(k, logits.shape[1]), -1).indices)


def scattered(logits: torch.Tensor, counts: list[int], seed: int = 0) -> list[torch.Tensor]:
    """As many ids as said for each row, anywhere, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(logits.shape[1], generator=generator)[:count] for count in counts]


@every_divergence
@every_tail
@pytest.mark.parametrize("kind", ["near_0.3", "near_0.03", "uniform", "peaked", "shifted"])
def test_dense_students(backend: str, divergence: str, tail: str, kind: str) -> None:
    student, teacher = logits_pair(kind, 7, 150)
    compare(
        Dense(student),
        Sparse.of(teacher, largest(teacher, 12)),
        divergence,
        backend=backend,
        tail=tail,
        reduction="none",
    )


@every_divergence
@every_tail
def test_linear_students(backend: str, divergence: str, tail: str) -> None:
    heads = linear_pair(7, 150, 24, 40)
    teacher = heads.teacher_hidden @ heads.teacher_weight.T
    student = Linear(heads.student_hidden, heads.student_weight)
    compare(student, Sparse.of(teacher, largest(teacher, 12)), divergence, backend=backend, tail=tail)


@some_divergences
@every_tail
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(backend: str, divergence: str, tail: str, dtype: torch.dtype) -> None:
    heads = linear_pair(7, 150, 24, 40, dtype, total_variation=0.1)
    teacher = heads.teacher_hidden.double() @ heads.teacher_weight.double().T
    student = Linear(heads.student_hidden, heads.student_weight)
    held = torch.float64 if dtype == torch.float64 else torch.float32
    compare(student, Sparse.of(teacher, largest(teacher, 12), dtype=held), divergence, backend=backend, tail=tail)


@some_divergences
@every_tail
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_number_of_ids_a_row(backend: str, divergence: str, tail: str, reduction: str) -> None:
    """No entries, one, a few, all but one, all: in one batch, in no order."""
    student, teacher = logits_pair("near_0.3", 7, 40)
    targets = Sparse.of(teacher, scattered(teacher, [0, 1, 5, 39, 40, 0, 17]))
    outcome = compare(Dense(student), targets, divergence, backend=backend, tail=tail, reduction=reduction)
    if reduction == "none":
        empty = [0, 5]  # they say nothing: the one event that is left has mass 1 on both sides, to the last bit or two
        assert outcome.loss[empty].abs().max() < 5e-7 and outcome.gradients["logits"][empty].abs().max() < 5e-7


@every_tail
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 2053])
@pytest.mark.parametrize("rows", [1, 7])
def test_sizes(backend: str, tail: str, rows: int, vocab: int) -> None:
    student, teacher = logits_pair("near_0.3", rows, vocab)
    compare(Dense(student), Sparse.of(teacher, largest(teacher, 9)), "jsd(beta=0.5)", backend=backend, tail=tail)


@every_tail
def test_no_rows(backend: str, tail: str) -> None:
    student, _ = logits_pair("near_0.3", 0, 20)
    outcome = run_library(Dense(student), Sparse([]), "forward_kl", backend=backend, tail=tail)
    assert outcome.loss == 0 and outcome.gradients["logits"].shape == (0, 20)


def test_int32_ids(backend: str) -> None:
    student, teacher = logits_pair("near_0.3", 5, 40)
    rows = oracles.truncate(teacher.double(), largest(teacher, 6))
    targets = sparse_targets(rows)
    narrow = type(targets)(targets.offsets, targets.ids.int(), targets.logprobs, targets.tail_logprob)
    assert torch.equal(kd_loss(student, narrow, backend=backend).loss, kd_loss(student, targets, backend=backend).loss)


@every_tail
def test_order_of_entries_is_free(backend: str, tail: str) -> None:
    student, teacher = logits_pair("near_0.3", 5, 40, torch.float64)
    ids = largest(teacher, 6)
    losses = [
        kd_loss(
            student,
            sparse_targets(oracles.truncate(teacher, order), torch.float64),
            "jsd(beta=0.5)",
            tail=tail,
            backend=backend,
        ).loss
        for order in (ids, [i.flip(0) for i in ids])
    ]
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)


@some_divergences
def test_leading_dimensions_are_the_students(backend: str, divergence: str) -> None:
    student, teacher = logits_pair("near_0.3", 6, 40)
    targets = Sparse.of(teacher, largest(teacher, 5))
    outcome = compare(Dense(student.view(2, 3, 40)), targets, divergence, backend=backend, reduction="none")
    assert outcome.loss.shape == (2, 3)


@some_divergences
@every_tail
def test_padded_heads(backend: str, divergence: str, tail: str) -> None:
    heads = linear_pair(7, 48, 24, 24)
    weight = heads.student_weight.clone()
    weight[45:] = 1e4
    teacher = (heads.teacher_hidden @ heads.teacher_weight.T)[:, :45]
    student = Linear(heads.student_hidden, weight, valid_vocab=45)
    outcome = compare(student, Sparse.of(teacher, largest(teacher, 6)), divergence, backend=backend, tail=tail)
    assert not outcome.gradients["weight"][45:].any()


@some_divergences
@every_tail
@pytest.mark.parametrize("times", [1, 3.5, 100])
def test_every_chunking_is_right(backend: str, divergence: str, tail: str, times: float) -> None:
    heads = linear_pair(7, 150, 24, 40)
    teacher = heads.teacher_hidden @ heads.teacher_weight.T
    student = Linear(heads.student_hidden, heads.student_weight)
    targets = Sparse.of(teacher, scattered(teacher, [3, 0, 9, 1, 150, 4, 7]))
    one = smallest_budget(student.noun(student.leaves), targets.noun({}), divergence, tail=tail, backend=backend)
    budget = dict(max_scratch_bytes=int(one * times))
    compare(student, targets, divergence, backend=backend, tail=tail, library_only=budget)


@some_divergences
@every_tail
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(backend: str, divergence: str, tail: str, temperature: float) -> None:
    """log Z at the declared temperatures makes the tempered head and its tail exact."""
    student, teacher = logits_pair("near_0.3", 6, 40, torch.float64)
    ids, declared = largest(teacher, 9), (1.0, 2.0, 0.5)
    rows = oracles.truncate(teacher, ids)
    targets = sparse_targets(rows, torch.float64, temperatures=declared, log_z=oracles.log_z(teacher, declared))
    leaf, truth = student.clone().requires_grad_(), student.clone().requires_grad_()
    ours = kd_loss(
        leaf, targets, divergence, temperature=temperature, squared_temperature=True, tail=tail, backend=backend
    ).loss
    ours.backward()
    name, params = CASES[divergence]
    want = oracles.kd_loss(
        truth,
        oracles.truncate(teacher, ids, temperature),
        name,
        params,
        temperature=temperature,
        squared_temperature=True,
        tail=tail,
    )
    want.backward()
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(leaf.grad, truth.grad, rtol=1e-8, atol=1e-12)


def test_labels_and_cross_entropy(backend: str) -> None:
    """The label's logprob is taken from the student's full softmax, whether the teacher kept the label or not."""
    student, teacher = logits_pair("near_0.3", 7, 40)
    targets = Sparse.of(teacher, largest(teacher, 5))
    labels = torch.tensor([3, -100, 39, 0, 17, -100, 8])
    for tail in ("bucket", "renormalize", "drop"):
        compare(
            Dense(student),
            targets,
            "forward_kl",
            backend=backend,
            labels=labels,
            ce_weight=0.7,
            kd_weight=0.3,
            tail=tail,
        )


# ------------------------------------------------------------------------------------------------ what lies in the tail


def test_empty_tail_says_that_the_rest_has_no_mass(backend: str) -> None:
    """-inf: the teacher excludes every other id. Forward KL ignores them, reverse KL is infinite."""
    student, teacher = logits_pair("near_0.3", 3, 20)
    ids = largest(teacher, 4)
    keep = torch.zeros(3, 20, dtype=torch.bool).scatter(1, torch.stack(ids), True)
    masked = teacher.masked_fill(~keep, -math.inf)
    targets = Sparse.of(masked, ids)
    for divergence in ("forward_kl", "jsd(beta=0.5)", "skew_reverse_kl(alpha=0.1)", "total_variation"):
        compare(Dense(student), targets, divergence, backend=backend, reduction="none")
    loss = kd_loss(student, targets.noun({}), "reverse_kl", reduction="none", backend=backend).loss
    assert (loss == math.inf).all()


def test_forward_kl_bucket_has_the_dense_gradient_on_the_head(backend: str) -> None:
    student, teacher = logits_pair("near_0.3", 5, 60)
    ids = largest(teacher, 8)
    sparse = run_library(Dense(student), Sparse.of(teacher, ids), "forward_kl", backend=backend).gradients["logits"]
    dense = run_library(Dense(student), Dense(teacher), "forward_kl", backend=backend).gradients["logits"]
    head = torch.stack(ids)
    torch.testing.assert_close(sparse.gather(1, head), dense.gather(1, head), rtol=1e-4, atol=1e-8)
    assert not torch.allclose(sparse, dense, rtol=1e-2)  # the tail's shape is free


def test_treatments_are_different_objectives(backend: str) -> None:
    student, teacher = logits_pair("near_0.3", 5, 60)
    targets = Sparse.of(teacher, largest(teacher, 8)).noun({})
    losses = [
        kd_loss(student, targets, tail=tail, backend=backend).loss.item() for tail in ("bucket", "renormalize", "drop")
    ]
    assert len({round(x, 4) for x in losses}) == 3


@every_tail
def test_unknown_tail_is_fine_where_it_is_not_used(backend: str, tail: str) -> None:
    student, teacher = logits_pair("near_0.3", 4, 20)
    rows = oracles.truncate(teacher.double(), largest(teacher, 4))
    known = sparse_targets(rows)
    unknown = type(known)(known.offsets, known.ids, known.logprobs)
    if tail == "bucket":
        with pytest.raises(ValueError, match="^kd_loss: .*tail.*bucket.*tail_logprob|^kd_loss: .*tail_logprob.*"):
            kd_loss(student, unknown, tail=tail, backend=backend)
    else:
        both = [kd_loss(student, t, tail=tail, backend=backend).loss for t in (known, unknown)]
        assert torch.equal(*both)


# ----------------------------------------------------------------------------------------------------------- importance


def sampled(logits: torch.Tensor, draws: int, seed: int) -> list[oracles.Row]:
    """Draws with replacement from the teacher; weight = count / (draws * p)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for logp in oracles.log_probs(logits.double()):
        drawn = torch.multinomial(logp.exp(), draws, replacement=True, generator=generator)
        ids, counts = drawn.unique(return_counts=True)
        weight = (counts / (draws * logp[ids].exp())).float().double()
        rows.append(oracles.Row(ids, logp[ids].float().double(), torch.tensor(-math.inf, dtype=torch.float64), weight))
    return rows


@every_divergence
def test_importance_weights(backend: str, divergence: str) -> None:
    student, teacher = logits_pair("near_0.3", 6, 50)
    compare(Dense(student), Sparse(sampled(teacher, 30, 0)), divergence, backend=backend, reduction="none")


@some_divergences
def test_importance_weights_with_linear_students(backend: str, divergence: str) -> None:
    heads = linear_pair(6, 50, 24, 24, torch.bfloat16)
    teacher = heads.teacher_hidden.double() @ heads.teacher_weight.double().T
    student = Linear(heads.student_hidden, heads.student_weight)
    compare(
        student, Sparse(sampled(teacher, 30, 0)), divergence, backend=backend, labels=torch.arange(6), ce_weight=0.5
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "total_variation", "jsd(beta=0.5)"])
def test_importance_estimates_are_unbiased(divergence: str) -> None:
    """Exhaustively: the mean over every possible draw, by its probability, is the dense value and gradient."""
    student, teacher = logits_pair("near_0.3", 1, 12, torch.float64)
    logp = oracles.log_probs(teacher)[0]
    tail = torch.tensor(-math.inf, dtype=torch.float64)
    each = [oracles.Row(torch.tensor([v]), logp[v : v + 1], tail, (-logp[v : v + 1]).exp()) for v in range(12)]
    leaf = student.expand(12, 12).clone().requires_grad_()
    loss = kd_loss(leaf, sparse_targets(each, torch.float64), divergence, token_weight=logp.exp(), reduction="sum").loss
    loss.backward()
    dense = student.clone().requires_grad_()
    want = kd_loss(dense, teacher, divergence, reduction="sum").loss
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(leaf.grad.sum(0, keepdim=True), dense.grad)


@pytest.mark.parametrize("empty", ["some rows", "all rows"])
def test_importance_of_rows_without_entries(backend: str, empty: str) -> None:
    """Nothing was drawn: nothing is said, whatever treatment of a tail is the default."""
    student, teacher = logits_pair("near_0.3", 3, 20)
    rows = sampled(teacher, 10, 0)
    none = torch.zeros(0, dtype=torch.float64)
    nothing = oracles.Row(torch.zeros(0, dtype=torch.int64), none, torch.tensor(-math.inf, dtype=torch.float64), none)
    targets = Sparse([nothing, rows[1], nothing] if empty == "some rows" else [nothing] * 3)
    outcome = compare(Dense(student), targets, "forward_kl", backend=backend, reduction="none")
    assert outcome.loss[0] == 0 and not outcome.gradients["logits"][0].any()


def test_importance_of_one_everywhere_is_dense(backend: str) -> None:
    student, teacher = logits_pair("near_0.3", 4, 30)
    rows = [
        oracles.Row(
            torch.arange(30), logp, torch.tensor(-math.inf, dtype=torch.float64), torch.ones(30, dtype=torch.float64)
        )
        for logp in oracles.log_probs(teacher.double()).float().double()
    ]
    for divergence in SOME:
        sparse = kd_loss(student, sparse_targets(rows), divergence, backend=backend).loss
        torch.testing.assert_close(
            sparse, kd_loss(student, teacher, divergence, backend=backend).loss, rtol=1e-5, atol=1e-6
        )
