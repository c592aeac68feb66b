"""``kd_loss``: the public function, its checks, and its registration with torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kd_kernels import _backend, _check, divergences
from kd_kernels.divergences import Divergence
from kd_kernels.logits import EnsembleLogits, LinearLogits, SparseTargets, Targets, leading_shape
from kd_kernels.loss import driver
from kd_kernels.loss.plan import ID_STATS, REDUCTIONS, STATS, TAILS, Plan, pack, read, unpack
from kd_kernels.products import work_dtype

WHERE = "kd_loss"


@dataclass(frozen=True)
class KDLoss:
    """What :func:`kd_loss` returns.

    Attributes:
        loss: fp32 (fp64 if an input is fp64), nats. A scalar, or of the rows' leading shape for ``reduction="none"``.
        stats: the statistics that were asked for, each of the rows' leading shape.
    """

    loss: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)


def kd_loss(
    student: Tensor | LinearLogits,
    teacher: Targets | None,
    divergence: str | Divergence = "forward_kl",
    *,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    temperature: float = 1.0,
    squared_temperature: bool = False,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    tail: str = "bucket",
    stats: tuple[str, ...] = (),
    rows: Tensor | None = None,
    compact: bool | None = None,
    group: object | None = None,
    logits_dtype: str | None = None,
    max_scratch_bytes: int | None = None,
    backend: str | None = None,
) -> KDLoss:
    """Distillation loss of a student against a teacher, without ever holding ``[N, V]`` logits.

    Row i costs ``w_i (kd_weight T'^2 D(p_i, q_i) + ce_weight CE_i)``, with p_i and q_i the teacher's and the student's
    distributions at ``temperature``, ``T' = temperature`` if ``squared_temperature`` else 1, and CE_i the cross-entropy
    of ``labels[i]`` under the student at temperature 1. The mean divides by ``normalizer``, or by ``sum w_i``.

    Equivalent to, with D the forward KL::

        q = log_softmax((student.hidden @ student.weight.T).float() / temperature, -1)
        p = log_softmax((teacher.hidden @ teacher.weight.T).float() / temperature, -1)
        loss = (p.exp() * (p - q)).sum(-1).mean()

    Args:
        student: logits ``[..., V]`` or :class:`LinearLogits`; fp32, bf16, fp16 or fp64. Rows are everything but the
            last dimension, N in all.
        teacher: a dense noun with as many rows, or :class:`SparseTargets` of N rows. Never differentiated. None with
            ``kd_weight=0``: cross-entropy alone.
        divergence: a :class:`Divergence` or its string form, ``"jsd(beta=0.5)"``.
        labels: int64 or int32, the rows' shape, *not* shifted: ``labels[i]`` is the token that row i predicts. Rows
            with ``ignore_index`` do not count. Their range is checked where they are used (``ce_weight`` or ``stats``).
        ce_weight, kd_weight: weights of the two terms; at least 0.
        temperature: > 0. Sparse targets must declare it.
        squared_temperature: multiply D by T^2, so that its gradient keeps its size as T grows (Hinton et al. 2015).
        token_weight: float, the rows' shape. Not differentiated: for a learnt weight use ``reduction="none"``.
        normalizer: with ``reduction="mean"``, the number to divide by: a number or a tensor of one element. Give the
            *global* token count and splitting a batch, or a run over processes, changes nothing.
        reduction: "mean", "sum" or "none" (per row, times its weight).
        ignore_index: the label of rows that do not count.
        tail: how a sparse teacher's missing mass is treated. These are different objectives with different optima:
            "bucket" adds one event with the masses that both leave out (optimum: head and tail mass of the teacher;
            never above the full divergence); "renormalize" compares shapes over the kept ids (the student's mass
            elsewhere is free); "drop" sums over the kept ids as they are (for forward KL the optimum is over-confident,
            p / sum p). Importance-weighted targets need no treatment and get none.
        stats: names among ``divergence, student_entropy, teacher_entropy, agreement, captured_mass, label_logprob,
            teacher_label_logprob, student_top1, teacher_top1, student_confidence, teacher_confidence``, from the same
            pass. At ``temperature``, but for ``label_logprob`` (temperature 1). fp32, nats, NaN at ignored rows;
            ``*_top1`` are ids, int64, -1 there. Of sparse teachers the entropy counts the tail as one event, and
            ``teacher_label_logprob`` is NaN where the label is not kept.
        rows: int64 indices, distinct, of the rows that count, known on the host: the others are dropped before the
            products without a synchronisation.
        compact: drop ignored rows before the products. None: where that needs no synchronisation (CPU; or ``rows``
            given).
        group: vocabulary-parallel heads; not in this version.
        logits_dtype: None for fp32-grade logits. "input" rounds them to the head's dtype: cheaper where the hardware
            multiplies bf16, and wrong by 3 to 30 percent in the gradient as the student gets good.
        max_scratch_bytes: bound on temporary memory, beside gradients, the fp32 sum of the gradient of a half-precision
            head in several chunks (4 V H bytes), and what a BLAS keeps for itself (on a CPU some MiB a thread). None:
            256 MiB on a CPU, 1,400 MiB elsewhere.
        backend: "cpp" (CPU), "triton" (CUDA from sm_80 on, ROCm; no fp64), "reference" (torch operations, any device),
            or None: by device; a divergence of the user's own runs on "reference".

    Returns:
        :class:`KDLoss`. With no row that counts the loss is 0 and so are the gradients.

    Raises:
        TypeError, ValueError: an argument is not as above; on a CPU also for NaN or +inf logits, all -inf rows, labels
            or ids out of range, masses above 1. On a GPU nothing is read back: such rows have a loss and a gradient of
            NaN.
        RuntimeError: the backend does not exist here; ``compact=True`` without ``rows`` while a CUDA graph is captured.
        torch.OutOfMemoryError: with the scratch budget that was in force.

    Numerics: logits, sums and the divergence in fp32 or better, products never rounded to half precision; the gradient
    of the head is summed in fp32. On a GPU the gradient of a chunk of logits is handed to its products in the dtype of
    the head. -inf logits are masked columns. Deterministic. A forward KL from a teacher with mass where the student's
    logit is -inf is inf; so is a reverse KL the other way round.

    Cost: with mean and sum the gradient is formed in the forward pass (6 N Hs V + 2 N Ht V operations, nothing computed
    twice); "none" computes the student's logits again in the backward. Memory: scratch and gradients; an upstream
    gradient other than 1 (``(loss / 4).backward()``) costs a scaled copy of them on a CPU and a pass over them on a
    GPU, which ``normalizer`` and the weights spare. No synchronisation on a GPU, but for ``compact=True``; CUDA graphs
    can capture it.
    """
    student_noun = student if isinstance(student, LinearLogits) else _check.floating(WHERE, "student", student)
    if isinstance(student_noun, Tensor) and student_noun.dim() < 1:
        _check.fail(WHERE, "student", "of shape [..., V]", list(student_noun.shape))
    shape, device = leading_shape(student_noun), student_noun.device
    count = shape.numel()
    _check_scalars(ce_weight, kd_weight, temperature, reduction, tail, normalizer, stats, group, max_scratch_bytes)
    if logits_dtype not in (None, "input"):
        _check.fail(WHERE, "logits_dtype", 'one of None, "input"', repr(logits_dtype))
    if not isinstance(squared_temperature, bool):
        _check.fail_type(WHERE, "squared_temperature", "a bool", type(squared_temperature).__name__)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        _check.fail_type(WHERE, "ignore_index", "an integer", type(ignore_index).__name__)
    if teacher is None and kd_weight != 0:
        _check.fail(WHERE, "teacher", "given", None, "for cross-entropy alone pass kd_weight=0")
    if labels is None and ce_weight != 0:
        _check.fail(WHERE, "labels", "given when ce_weight is not 0", None)
    if isinstance(teacher, Tensor):
        _check.floating(WHERE, "teacher", teacher)
    elif not isinstance(teacher, (LinearLogits, EnsembleLogits, SparseTargets, type(None))):
        _check.fail_type(
            WHERE, "teacher", "a tensor, LinearLogits, EnsembleLogits or SparseTargets", type(teacher).__name__
        )
    if teacher is not None:
        _check.same_device(WHERE, "teacher", teacher, device)  # type: ignore[arg-type]
        if leading_shape(teacher).numel() != count:
            _check.fail(WHERE, "teacher", f"of N={count} rows like the student", leading_shape(teacher).numel())
    if isinstance(teacher, SparseTargets):
        if tail == "bucket" and teacher.tail_logprob is None and teacher.importance is None:
            _check.fail(WHERE, "tail", '"renormalize" or "drop" for targets without tail_logprob', '"bucket"')
        teacher = teacher.at_temperature(float(temperature))
    columns = _common_vocab(student_noun, teacher)

    given: dict[str, Tensor] = {}
    if labels is not None:
        given["labels"] = _check.integral(WHERE, "labels", labels)
    if token_weight is not None:
        given["token_weight"] = _check.floating(WHERE, "token_weight", token_weight)
        if token_weight.requires_grad:
            _check.fail(
                WHERE, "token_weight", "without requires_grad", "a tensor that requires grad",
                'multiply the result of reduction="none" instead',
            )
    for name, value in given.items():
        if value.shape != shape:
            _check.fail(WHERE, name, f"of shape {list(shape)} like the student's rows", list(value.shape))
        given[name] = value.reshape(-1)
    if normalizer is not None:
        given["normalizer"] = _normalizer(normalizer, device)
    if rows is not None:
        given["rows"] = _check.integral(WHERE, "rows", rows).long()
        if rows.dim() != 1 or rows.shape[0] > count:
            _check.fail(WHERE, "rows", f"of shape [M], M at most N={count}", list(rows.shape))
        if device.type == "cpu" and not torch.compiler.is_compiling() and rows.numel():
            if int(rows.min()) < 0 or int(rows.max()) >= count or rows.unique().shape[0] != rows.shape[0]:
                _check.fail(WHERE, "rows", f"distinct and in 0..N-1={count - 1}", f"{rows.tolist()[:8]}")
    for name, value in given.items():
        _check.same_device(WHERE, name, value, device)

    # Under torch.compile the string travels as it is and is read when the op runs.
    name = str(divergence if torch.compiler.is_compiling() else divergences.parse(divergence))
    is_builtin = divergences.is_builtin(name)
    if backend is None and not is_builtin:
        backend = "reference"
    backend = _backend.choose(WHERE, backend, device, tuple(driver.ROW_IMPLEMENTATIONS))
    if backend != "reference" and not is_builtin:
        raise RuntimeError(
            _check.complaint(WHERE, "divergence", f'built in for backend="{backend}"', name, "leave backend=None")
        )

    student_tensors, student_description = pack(student_noun)
    teacher_tensors, teacher_description = pack(teacher)
    if backend == "triton":
        _backend.check_triton_takes(WHERE, columns, *student_tensors, *teacher_tensors)
    teacher_tensors = [t.detach() for t in teacher_tensors]
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    plan = Plan(
        where=WHERE, student=student_description, teacher=teacher_description, columns=columns,
        needs_grad=tuple(t.requires_grad and torch.is_grad_enabled() for t in student_tensors),
        row_inputs=tuple(given), divergence=name, temperature=float(temperature),
        kd_weight=float(kd_weight) * (float(temperature) ** 2 if squared_temperature else 1.0),
        ce_weight=float(ce_weight), tail=tail, reduction=reduction, ignore_index=ignore_index, stats=tuple(stats),
        compact=(device.type == "cpu" or rows is not None) if compact is None else compact,
        precision="float32" if logits_dtype is None else "input",
        autocast="" if autocast is None else str(autocast).removeprefix("torch."),
        max_scratch_bytes=max_scratch_bytes, backend=backend,
    )
    op = _loss_per_token if reduction == "none" else _loss
    loss, *rest = op(student_tensors, teacher_tensors, list(given.values()), plan.text())
    named = dict(zip(plan.stats, (value.detach().reshape(shape) for value in rest)))
    return KDLoss(loss.reshape(shape) if reduction == "none" else loss, named)


def _check_scalars(
    ce_weight: float, kd_weight: float, temperature: float, reduction: str, tail: str, normalizer: object,
    stats: tuple[str, ...], group: object, max_scratch_bytes: int | None,
) -> None:
    _check.positive(WHERE, "temperature", temperature, "the limit T -> 0 has no gradient; use labels for the argmax")
    for name, value in (("ce_weight", ce_weight), ("kd_weight", kd_weight)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _check.fail_type(WHERE, name, "a number", type(value).__name__, "for a weight per token use token_weight")
        if not 0 <= value < float("inf"):
            _check.fail(WHERE, name, "finite and at least 0", value)
    _check.one_of(WHERE, "reduction", reduction, REDUCTIONS)
    _check.one_of(WHERE, "tail", tail, TAILS)
    if isinstance(stats, str):
        _check.fail_type(WHERE, "stats", "a tuple of names", "str", f'("{stats}",)')
    for name in stats:
        _check.one_of(WHERE, "stats", name, STATS)
    if normalizer is not None and reduction != "mean":
        _check.fail(WHERE, "normalizer", 'None unless reduction="mean"', f'given with reduction="{reduction}"')
    if group is not None:
        _check.fail(WHERE, "group", "None", group, "vocabulary-parallel heads are not in this version")
    if max_scratch_bytes is not None and (
        isinstance(max_scratch_bytes, bool) or not isinstance(max_scratch_bytes, int)
    ):
        _check.fail_type(WHERE, "max_scratch_bytes", "a number of bytes (int)", type(max_scratch_bytes).__name__)


def _normalizer(value: float | Tensor, device: torch.device) -> Tensor:
    """A tensor of one element; a number is checked to be positive, a tensor is not read."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            _check.fail(WHERE, "normalizer", "a number or a tensor of one element", list(value.shape))
        return value.detach().reshape(())
    # Filled on the device: a copy from the host would wait for it, and could not be captured in a CUDA graph.
    return torch.full((), _check.positive(WHERE, "normalizer", value), dtype=torch.float64, device=device)


def _common_vocab(student: Tensor | LinearLogits, teacher: Targets | None) -> int:
    """Columns that both sides have. ``valid_vocab`` of either counts for both."""
    full, valid = [], []
    for noun in (student, teacher):
        members = noun.members if isinstance(noun, EnsembleLogits) else (noun,)
        for member in members:
            if isinstance(member, Tensor):
                full.append(member.shape[-1])
            elif isinstance(member, LinearLogits):
                full.append(member.weight.shape[0])
                if member.valid_vocab is not None:
                    valid.append(member.valid_vocab)
    columns = valid[0] if valid else full[0]
    remedy = "give valid_vocab=<number of real tokens> to the padded LinearLogits, or slice the padded columns"
    if (valid and any(v != columns for v in valid)) or (not valid and any(v != columns for v in full)):
        _check.fail(WHERE, "student and teacher", "of one vocabulary size", f"{valid or full}", remedy)
    if any(v < columns for v in full):
        _check.fail(WHERE, "student and teacher", f"of at least valid_vocab={columns} columns", f"{full}", remedy)
    if columns < 1:
        _check.fail(WHERE, "student", "of at least one column", list(full))
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Registration. One op for mean and sum, whose gradients are outputs that its backward only scales; one for "none",
# whose backward is a second pass with the upstream gradient as weights.
# ---------------------------------------------------------------------------------------------------------------------


def _run(
    student: list[Tensor], teacher: list[Tensor], row_inputs: list[Tensor], plan: Plan, with_gradient: bool,
    upstream: Tensor | None = None,
) -> driver.Outcome:
    inputs = driver.RowInputs(**dict(zip(plan.row_inputs, row_inputs)))
    return driver.run(
        plan, unpack(student, plan.student), unpack(teacher, plan.teacher), inputs,  # type: ignore[arg-type]
        with_gradient=with_gradient, upstream=upstream,
    )


def _loss_dtype(student: list[Tensor], teacher: list[Tensor]) -> torch.dtype:
    return work_dtype(*(t for t in (*student, *teacher) if t.is_floating_point()))


def _row_count(student: list[Tensor]) -> int:
    return student[0].shape[:-1].numel()


def _fake_stats(student: list[Tensor], plan: Plan) -> list[Tensor]:
    dtype_of = lambda name: torch.int64 if name in ID_STATS else torch.float32  # noqa: E731
    return [student[0].new_empty(_row_count(student), dtype=dtype_of(name)) for name in plan.stats]


def _fake_gradients(student: list[Tensor], plan: Plan) -> list[Tensor]:
    wanted = [t for t, needed in zip(student, plan.needs_grad) if needed]
    return [t.new_empty(t.shape, dtype=driver.gradient_dtype(t.dtype)) for t in wanted]


def _spread(plan: Plan, dtypes: list[torch.dtype], gradients: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the places, and the dtypes, of the tensors that need one; None in the others."""
    waiting = iter(gradients)
    spread = [next(waiting) if needed else None for needed in plan.needs_grad]
    return [None if g is None else g.to(dtype) for g, dtype in zip(spread, dtypes)]


@torch.library.custom_op("kd_kernels::loss", mutates_args=())
def _loss(student: list[Tensor], teacher: list[Tensor], row_inputs: list[Tensor], plan_text: str) -> list[Tensor]:
    """``[loss, *stats, *gradients]``."""
    plan = read(plan_text)
    outcome = _run(student, teacher, row_inputs, plan, with_gradient=any(plan.needs_grad))
    shapes = [t.shape for t, needed in zip(student, plan.needs_grad) if needed]
    gradients = [g.reshape(shape) for g, shape in zip(outcome.gradients, shapes)]
    return [outcome.loss.to(_loss_dtype(student, teacher)), *outcome.stats, *gradients]


@_loss.register_fake
def _(student: list[Tensor], teacher: list[Tensor], row_inputs: list[Tensor], plan_text: str) -> list[Tensor]:
    plan = read(plan_text)
    loss = student[0].new_empty((), dtype=_loss_dtype(student, teacher))
    return [loss, *_fake_stats(student, plan), *_fake_gradients(student, plan)]


def _keep_gradients(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # else autograd makes zeros of the head's size for the gradients among the outputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = [tensor.dtype for tensor in inputs[0]]
    ctx.plan, ctx.lengths = read(inputs[3]), (len(inputs[1]), len(inputs[2]))
    ctx.save_for_backward(*output[1 + len(ctx.plan.stats) :])


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():  # autograd records a backward pass only for create_graph=True
        raise RuntimeError(
            _check.complaint(WHERE, "create_graph", "False: the gradient is not differentiable", True)
        )


def _may_scale_in_place(plan: Plan, scale: Tensor) -> bool:
    """On a GPU nobody reads the scale: a kernel multiplies by it, or returns at once where it is 1. The gradients that
    were kept are nobody else's, unless the graph is kept for another backward."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return type(scale) is Tensor and scale.device.type == "cuda" and plan.backend == "triton" and not keeps_graph()


def _scale_gradients(ctx, upstream):
    _refuse_second_derivatives()
    scale = upstream[0]
    gradients: list[Tensor | None] = list(ctx.saved_tensors)
    if scale is None:
        gradients = [None] * len(gradients)
    elif _may_scale_in_place(ctx.plan, scale):
        scale_in_place = driver.row_implementation("triton").scale_in_place
        for gradient in gradients:
            scale_in_place(gradient, scale)
    # loss.backward() sends 1: then the gradients are returned as they are. Reading it costs nothing on a CPU.
    elif type(scale) is not Tensor or scale.device.type != "cpu" or scale.item() != 1.0:
        # In the wider of the two dtypes: a loss scale may be beyond fp16, and must not be rounded to bf16.
        gradients = [(gradient * scale[None]).to(gradient.dtype) for gradient in gradients]
    return _spread(ctx.plan, ctx.dtypes, gradients), [None] * ctx.lengths[0], [None] * ctx.lengths[1], None


_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@torch.library.custom_op("kd_kernels::loss_per_token", mutates_args=())
def _loss_per_token(
    student: list[Tensor], teacher: list[Tensor], row_inputs: list[Tensor], plan_text: str
) -> list[Tensor]:
    """``[loss [N], *stats]``."""
    outcome = _run(student, teacher, row_inputs, read(plan_text), with_gradient=False)
    return [outcome.loss.to(_loss_dtype(student, teacher)), *outcome.stats]


@_loss_per_token.register_fake
def _(student: list[Tensor], teacher: list[Tensor], row_inputs: list[Tensor], plan_text: str) -> list[Tensor]:
    loss = student[0].new_empty(_row_count(student), dtype=_loss_dtype(student, teacher))
    return [loss, *_fake_stats(student, read(plan_text))]


@torch.library.custom_op("kd_kernels::loss_per_token_backward", mutates_args=())
def _loss_per_token_backward(
    upstream: Tensor, student: list[Tensor], teacher: list[Tensor], row_inputs: list[Tensor], plan_text: str
) -> list[Tensor]:
    """``[*gradients]`` of ``sum_i upstream_i loss_i``."""
    plan = read(plan_text)
    outcome = _run(student, teacher, row_inputs, plan, with_gradient=True, upstream=upstream.reshape(-1))
    shapes = [t.shape for t, needed in zip(student, plan.needs_grad) if needed]
    return [g.reshape(shape) for g, shape in zip(outcome.gradients, shapes)]


@_loss_per_token_backward.register_fake
def _(
    upstream: Tensor, student: list[Tensor], teacher: list[Tensor], row_inputs: list[Tensor], plan_text: str
) -> list[Tensor]:
    return _fake_gradients(student, read(plan_text))


def _keep_inputs(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    student, teacher, row_inputs, ctx.plan_text = inputs
    ctx.lengths = (len(student), len(teacher), len(row_inputs))
    ctx.save_for_backward(*student, *teacher, *row_inputs)


def _recompute(ctx, upstream):
    _refuse_second_derivatives()
    tensors, (a, b, c) = list(ctx.saved_tensors), ctx.lengths
    student, teacher, row_inputs = tensors[:a], tensors[a : a + b], tensors[a + b :]
    if upstream[0] is None:
        return [None] * a, [None] * b, [None] * c, None
    gradients = _loss_per_token_backward(upstream[0], student, teacher, row_inputs, ctx.plan_text)
    return _spread(read(ctx.plan_text), [t.dtype for t in student], gradients), [None] * b, [None] * c, None


_loss_per_token.register_autograd(_recompute, setup_context=_keep_inputs)
