"""kd_loss as a citizen of torch: gradcheck, partial gradients, upstream gradients, opcheck, compile, autocast."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import oracles
from judge import CASES, SOME, Dense, Linear, Sparse, compare, run_library, sparse_targets
from kd_kernels import EnsembleLogits, LinearLogits, kd_loss
from kd_kernels.loss.plan import STATS
from kd_kernels.testing import linear_pair, logits_pair

N, V, H = 3, 7, 4
LABELS = torch.tensor([2, -100, 6])

every_divergence = pytest.mark.parametrize("divergence", list(CASES))
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def doubles() -> dict[str, Tensor]:
    heads = linear_pair(N, V, H, 6, torch.float64)
    return {"hidden": heads.student_hidden, "weight": heads.student_weight, "bias": torch.linspace(-1, 1, V).double()}


def double_teacher() -> Tensor:
    heads = linear_pair(N, V, H, 6, torch.float64)
    return heads.teacher_hidden @ heads.teacher_weight.T


# ------------------------------------------------------------------------------------------------------------ gradcheck


def differentiable(divergence: str) -> bool:
    """A detached mixture's gradient is not the derivative of its value: the oracle's autograd judges it instead."""
    return "detach_mixture=True" not in divergence


@every_divergence
@every_reduction
def test_gradcheck_dense(backend: str, divergence: str, reduction: str) -> None:
    if not differentiable(divergence):
        compare(
            Dense(doubles()["hidden"] @ doubles()["weight"].T),
            Dense(double_teacher()),
            divergence,
            backend=backend,
            reduction=reduction,
        )
        return
    logits = (doubles()["hidden"] @ doubles()["weight"].T).requires_grad_()
    run = lambda z: kd_loss(z, double_teacher(), divergence, reduction=reduction, backend=backend).loss  # noqa: E731
    assert torch.autograd.gradcheck(run, logits, fast_mode=divergence not in SOME)


@pytest.mark.parametrize("divergence", [d for d in SOME if differentiable(d)])
@every_reduction
def test_gradcheck_linear_with_everything(backend: str, divergence: str, reduction: str) -> None:
    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = LinearLogits(hidden, weight, bias, scale=1.3, softcap=4.0, valid_vocab=6)
        return kd_loss(
            student,
            double_teacher()[:, :6],
            divergence,
            labels=LABELS.clamp_max(5),
            ce_weight=0.5,
            kd_weight=0.8,
            temperature=2.0,
            squared_temperature=True,
            token_weight=torch.tensor([1.0, 2.0, 0.5]),
            reduction=reduction,
            backend=backend,
        ).loss

    leaves = tuple(x.requires_grad_() for x in doubles().values())
    assert torch.autograd.gradcheck(run, leaves, fast_mode=reduction == "sum")


@pytest.mark.parametrize("divergence", [d for d in CASES if differentiable(d)])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
def test_gradcheck_sparse(backend: str, divergence: str, tail: str) -> None:
    ids = [torch.tensor([6, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([3, 0, 5, 2])]
    targets = sparse_targets(oracles.truncate(double_teacher(), ids), torch.float64)
    parts = doubles()

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = LinearLogits(hidden, weight, bias, softcap=4.0)
        return kd_loss(student, targets, divergence, tail=tail, labels=LABELS, ce_weight=0.5, backend=backend).loss

    leaves = tuple(x.requires_grad_() for x in parts.values())
    assert torch.autograd.gradcheck(run, leaves, fast_mode=divergence != "jsd(beta=0.5)")


# ---------------------------------------------------------------------------------------- which gradients are asked for


@pytest.mark.parametrize(
    "requires", [c for n in range(4) for c in itertools.combinations(("hidden", "weight", "bias"), n)]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_subset_of_gradients(backend: str, requires: tuple[str, ...], reduction: str, dtype: torch.dtype) -> None:
    """Exactly those, and no other (judge.run_library asserts it); a frozen head has no dW."""
    heads = linear_pair(7, 40, 16, 24, dtype)
    student = Linear(heads.student_hidden, heads.student_weight, torch.linspace(-1, 1, 40).to(dtype))
    teacher = Linear(heads.teacher_hidden, heads.teacher_weight)
    for target in (teacher, Sparse.of(teacher.oracle(teacher.leaves), [torch.arange(5)] * 7)):
        outcome = run_library(student, target, "forward_kl", requires=requires, reduction=reduction, backend=backend)
        if requires:
            compare(student, target, "forward_kl", requires=requires, reduction=reduction, backend=backend)
        else:
            assert not outcome.loss.requires_grad


def test_tied_head(backend: str) -> None:
    """An embedding that is also the head: its two gradients add up."""
    embedding = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    tokens, teacher = torch.tensor([3, 9, 9, 0]), torch.randn(4, 40, dtype=torch.float64)
    kd_loss(LinearLogits(embedding[tokens].tanh(), embedding), teacher, backend=backend).loss.backward()
    truth = embedding.detach().clone().requires_grad_()
    oracles.kd_loss(truth[tokens].tanh() @ truth.T, teacher).backward()
    torch.testing.assert_close(embedding.grad, truth.grad)


def test_nothing_flows_into_the_teacher(backend: str) -> None:
    heads = linear_pair(4, 20, 8, 8)
    student = heads.student_hidden.clone().requires_grad_()
    inputs = [x.clone().requires_grad_() for x in (heads.teacher_hidden, heads.teacher_weight)]
    for teacher in (LinearLogits(*inputs), inputs[0] @ inputs[1].T, EnsembleLogits((LinearLogits(*inputs),))):
        for reduction in ("mean", "none"):
            kd_loss(
                LinearLogits(student, heads.student_weight), teacher, reduction=reduction, backend=backend
            ).loss.sum().backward()
            frozen = kd_loss(
                LinearLogits(student.detach(), heads.student_weight), teacher, reduction=reduction, backend=backend
            )
            assert not frozen.loss.requires_grad
    assert student.grad is not None and all(x.grad is None for x in inputs)


def test_no_grad_and_inference_mode(backend: str) -> None:
    student, teacher = logits_pair("near_0.3", 4, 20)
    student.requires_grad_()
    want = kd_loss(student, teacher, backend=backend).loss.detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = kd_loss(student, teacher, backend=backend).loss
            assert not loss.requires_grad and loss == want


# --------------------------------------------------------------------------------------------------- upstream gradients


def linear_case(dtype: torch.dtype) -> tuple[Linear, Linear]:
    heads = linear_pair(7, 40, 16, 24, dtype)
    student = Linear(heads.student_hidden, heads.student_weight, torch.linspace(-1, 1, 40).to(dtype))
    return student, Linear(heads.teacher_hidden, heads.teacher_weight)


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5, 1 / 3, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scaled_loss(backend: str, scale: float, reduction: str) -> None:
    compare(
        *linear_case(torch.float32), "jsd(beta=0.5)", upstream=torch.tensor(scale), reduction=reduction, backend=backend
    )


@pytest.mark.parametrize("scale", [0.0, -2.5, 1 / 3, 65536.0])
def test_scaled_loss_in_bf16(backend: str, scale: float) -> None:
    """Forward mode rounds a gradient before its scale is known, but the scale itself is not rounded."""
    plain = run_library(*linear_case(torch.bfloat16), "jsd(beta=0.5)", backend=backend)
    scaled = run_library(*linear_case(torch.bfloat16), "jsd(beta=0.5)", upstream=torch.tensor(scale), backend=backend)
    for name, gradient in scaled.gradients.items():
        want = (plain.gradients[name].double() * scale).bfloat16()
        torch.testing.assert_close(gradient, want, rtol=2**-8, atol=0, msg=f"gradient of {name}")


@pytest.mark.parametrize("scale", [0.0, -2.5, 1 / 3, 65536.0])
def test_scaled_loss_in_fp16(backend: str, scale: float) -> None:
    """A scale beyond the range of fp16 included: the one that GradScaler starts with."""
    compare(*linear_case(torch.float16), "jsd(beta=0.5)", upstream=torch.tensor(scale), backend=backend)


@pytest.mark.parametrize("kind", ["dense", "linear"])
def test_loss_scaling_rescues_half_precision_gradients(backend: str, kind: str) -> None:
    """What torch.amp.GradScaler is for: gradients below the least fp16 number exist once the loss is scaled."""
    heads = linear_pair(7, 2053, 16, 24, torch.float16, total_variation=0.03)
    student = Linear(heads.student_hidden, heads.student_weight)
    if kind == "dense":
        student = Dense((heads.student_hidden.float() @ heads.student_weight.float().T).half())
    teacher = Linear(heads.teacher_hidden, heads.teacher_weight)
    scaled = dict(upstream=torch.tensor(65536.0), normalizer=1e5, backend=backend)
    outcome = compare(student, teacher, "forward_kl", **scaled)
    for gradient in outcome.gradients.values():
        present, without_scale = (gradient != 0).double().mean(), (gradient / 65536 != 0).double().mean()
        assert present > 0.5 and without_scale < present - 0.1


@pytest.mark.parametrize("teacher", ["linear", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_gradient_per_token(backend: str, teacher: str, dtype: torch.dtype) -> None:
    heads = linear_pair(7, 40, 16, 24, dtype)
    student = Linear(heads.student_hidden, heads.student_weight, torch.linspace(-1, 1, 40).to(dtype))
    target = Linear(heads.teacher_hidden, heads.teacher_weight)
    if teacher == "sparse":
        target = Sparse.of(target.oracle(target.leaves), [torch.arange(i, i + 5) for i in range(7)])
    upstream = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, 1e-3, 7.0])
    labels = torch.tensor([3, 4, 5, -100, 39, 0, 1])
    compare(
        student,
        target,
        "reverse_kl",
        reduction="none",
        upstream=upstream,
        labels=labels,
        ce_weight=0.5,
        token_weight=torch.linspace(0.5, 2, 7),
        temperature=1.0,
        backend=backend,
    )


def test_learnt_token_weights(backend: str) -> None:
    """reduction="none" times a weight that requires grad: both gradients are right."""
    student, teacher = logits_pair("near_0.3", 4, 20, torch.float64)
    weight = torch.tensor([0.3, 1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    leaf = student.clone().requires_grad_()
    rows = kd_loss(leaf, teacher, reduction="none", backend=backend).loss
    (weight * rows).sum().backward()
    torch.testing.assert_close(weight.grad, rows.detach())
    truth = student.clone().requires_grad_()
    (weight.detach() * oracles.kd_loss(truth, teacher, reduction="none")).sum().backward()
    torch.testing.assert_close(leaf.grad, truth.grad)


@every_reduction
def test_backward_twice(backend: str, reduction: str) -> None:
    """retain_graph: a second backward adds the same again."""
    student, teacher = logits_pair("near_0.3", 4, 20)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, teacher, reduction=reduction, backend=backend).loss.sum()
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * once)


@every_reduction
def test_gradient_changed_in_place_between_two_backwards(backend: str, reduction: str) -> None:
    """As clipping does: the second one is right or refuses, it never starts from the changed gradient."""
    student, teacher = logits_pair("near_0.3", 4, 20)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, teacher, reduction=reduction, backend=backend).loss.sum()
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    leaf.grad.mul_(100.0)
    leaf.grad = None
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(leaf.grad, once)


@every_reduction
def test_accumulation_over_micro_batches(backend: str, reduction: str) -> None:
    heads = linear_pair(6, 40, 16, 24, torch.float64)
    weight = heads.student_weight.clone().requires_grad_()
    teacher = heads.teacher_hidden @ heads.teacher_weight.T
    for rows in torch.arange(6).split(2):
        kd_loss(
            LinearLogits(heads.student_hidden[rows], weight), teacher[rows], reduction=reduction, backend=backend
        ).loss.sum().backward()
    truth = heads.student_weight.clone().requires_grad_()
    factor = 3.0 if reduction == "mean" else 1.0
    (factor * oracles.kd_loss(heads.student_hidden @ truth.T, teacher, reduction=reduction).sum()).backward()
    torch.testing.assert_close(weight.grad, truth.grad)


@every_reduction
def test_second_derivatives_are_refused(backend: str, reduction: str) -> None:
    """Never silently zero."""
    student, teacher = logits_pair("near_0.3", 4, 20)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, teacher, reduction=reduction, backend=backend).loss.sum()
    with pytest.raises(RuntimeError, match="kd_loss: create_graph must be False"):
        (gradient,) = torch.autograd.grad(loss * loss, leaf, create_graph=True)
        gradient.square().sum().backward()


def test_through_gradient_checkpointing(backend: str) -> None:
    heads = linear_pair(6, 40, 16, 24, torch.float64)
    hidden = heads.student_hidden.clone().requires_grad_()
    teacher = heads.teacher_hidden @ heads.teacher_weight.T
    run = lambda h: kd_loss(LinearLogits(h, heads.student_weight), teacher, backend=backend).loss  # noqa: E731
    torch.utils.checkpoint.checkpoint(run, hidden, use_reentrant=False).backward()
    direct = heads.student_hidden.clone().requires_grad_()
    run(direct).backward()
    assert torch.equal(hidden.grad, direct.grad)


# ------------------------------------------------------------------------------------------------ registration, compile


@pytest.fixture
def compiler(unpoisoned) -> None:
    """A compiler that remembers no other test."""
    torch.compiler.reset()


def sample_calls(backend: str) -> dict[str, tuple[tuple, dict]]:
    heads = linear_pair(5, 24, 8, 12)
    hidden, weight = (x.clone().requires_grad_() for x in (heads.student_hidden, heads.student_weight))
    teacher = LinearLogits(heads.teacher_hidden, heads.teacher_weight)
    dense = heads.teacher_hidden @ heads.teacher_weight.T
    sparse = sparse_targets(oracles.topk(dense.double(), 4))
    labels = torch.tensor([0, -100, 3, 23, 5])
    return {
        "dense": ((dense.clone().requires_grad_(), dense.flip(0)), {}),
        "linear": ((LinearLogits(hidden, weight), teacher, "jsd(beta=0.5)"), dict(labels=labels, ce_weight=0.5)),
        "frozen head": ((LinearLogits(hidden, weight.detach()), teacher), {}),
        "bias, stats": (
            (LinearLogits(hidden, weight, torch.zeros(24, requires_grad=True)), dense),
            dict(stats=STATS, labels=labels),
        ),
        "sparse": ((LinearLogits(hidden, weight), sparse, "reverse_kl"), dict(token_weight=torch.linspace(0.5, 2, 5))),
        "ensemble": ((LinearLogits(hidden, weight), EnsembleLogits((teacher, dense), space="prob")), {}),
    }


@pytest.fixture
def registered_calls(monkeypatch: pytest.MonkeyPatch):
    """The arguments that kd_loss hands to its registered ops, as a function of a call."""
    from kd_kernels.loss import api

    def arguments_of(*args, **kwargs) -> tuple:
        caught: list[tuple] = []
        with monkeypatch.context() as patch:
            for name in ("_loss", "_loss_per_token"):
                real = getattr(api, name)
                patch.setattr(api, name, lambda *a, real=real: (caught.append((real, a)), real(*a))[1])
            kd_loss(*args, **kwargs)
        return caught[0]

    return arguments_of


@pytest.mark.parametrize("call", list(sample_calls("reference")))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(backend: str, call: str, reduction: str, registered_calls, unpoisoned) -> None:
    args, options = sample_calls(backend)[call]
    if "labels" in options:  # opcheck compares outputs with NaN unequal to NaN, which is what an ignored row has
        options = {**options, "labels": options["labels"].clamp_min(0)}
    op, arguments = registered_calls(*args, reduction=reduction, backend=backend, **options)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(op, arguments, test_utils=tests)


@pytest.mark.parametrize("call", list(sample_calls("reference")))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(backend: str, call: str, reduction: str, compiler) -> None:
    def leaves(args) -> list[Tensor]:
        student = args[0]
        found = [student] if isinstance(student, Tensor) else [student.hidden, student.weight, student.bias]
        return [x for x in found if x is not None and x.requires_grad]

    def step(args, options):
        result = kd_loss(*args, reduction=reduction, backend=backend, **options)
        return (2.0 * result.loss).sum(), result.stats

    outcomes = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        args, options = sample_calls(backend)[call]
        loss, stats = run(args, options)
        loss.backward()
        outcomes.append((loss.detach(), stats, [x.grad for x in leaves(args)]))
    (loss, stats, gradients), (other_loss, other_stats, other_gradients) = outcomes
    torch.testing.assert_close(other_loss, loss)
    assert stats.keys() == other_stats.keys()
    for name in stats:
        torch.testing.assert_close(other_stats[name], stats[name], equal_nan=True)
    assert gradients and all(g.abs().sum() > 0 for g in gradients)
    for got, want in zip(other_gradients, gradients):
        torch.testing.assert_close(got, want)


def test_compiled_backbone_and_head(compiler) -> None:
    """A model in front of it: one graph from tokens to loss, the same gradients as eager."""
    torch.manual_seed(0)
    embedding, mixing, head = torch.nn.Embedding(24, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 24, bias=False)
    parameters = [*embedding.parameters(), *mixing.parameters(), *head.parameters()]
    tokens, teacher = torch.randint(24, (2, 5)), torch.randn(2, 5, 24)

    def step() -> Tensor:
        return kd_loss(LinearLogits(mixing(embedding(tokens)).tanh(), head.weight), teacher, "jsd(beta=0.5)").loss

    eager = torch.autograd.grad(step(), parameters)
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(), parameters)
    for got, want in zip(compiled, eager):
        torch.testing.assert_close(got, want)


def test_compiled_graph_serves_other_row_counts(compiler) -> None:
    """Dynamic rows: right for every N, and not compiled anew for each."""
    heads = linear_pair(12, 24, 8, 12)
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def step(hidden: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(LinearLogits(hidden, heads.student_weight), teacher).loss

    run = torch.compile(step, backend=counting, fullgraph=True, dynamic=True)
    teacher = heads.teacher_hidden @ heads.teacher_weight.T
    for rows in (5, 12, 3, 7):
        torch.testing.assert_close(
            run(heads.student_hidden[:rows], teacher[:rows]), step(heads.student_hidden[:rows], teacher[:rows])
        )
    assert len(compilations) <= 2


# ------------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(backend: str, reduction: str) -> None:
    """fp32 parameters under bf16 autocast: inputs are rounded as autocast does, logits not; gradients are fp32."""
    heads = linear_pair(16, 256, 32, 48, total_variation=0.1)
    leaves = [heads.student_hidden.clone().requires_grad_(), heads.student_weight.clone().requires_grad_()]
    teacher = LinearLogits(heads.teacher_hidden, heads.teacher_weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kd_loss(LinearLogits(*leaves), teacher, "forward_kl", reduction=reduction, backend=backend).loss
    assert loss.dtype == torch.float32
    loss.sum().backward()
    rounded = lambda x: x.bfloat16().double()  # noqa: E731
    truth = [rounded(x.detach()).requires_grad_() for x in leaves]
    target = rounded(heads.teacher_hidden) @ rounded(heads.teacher_weight).T
    want = oracles.kd_loss(truth[0] @ truth[1].T, target, reduction=reduction)
    want.sum().backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6)
    for leaf, reference in zip(leaves, truth):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - reference.grad).norm() < 5e-3 * reference.grad.norm()


def test_autocast_leaves_doubles_alone(backend: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(Linear(**doubles()), Dense(double_teacher()), "forward_kl", backend=backend)
