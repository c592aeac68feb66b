"""``accept_or_resample``: what a teacher makes of a student's drafts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kd_kernels import _backend, _check, products
from kd_kernels.logits import Logits, check_dense, leading_shape, vocab
from kd_kernels.products import RawRows
from kd_kernels.sampling import driver, philox
from kd_kernels.sampling.arguments import CHECKS, Place, Rows, Warp, autocast_name, check_budget, check_vocab
from kd_kernels.sampling.driver import IMPLEMENTATIONS, Call
from kd_kernels.sampling.reference import STUDENT_FAULT, TEACHER_FAULT, RowSamples, Verdicts
from kd_kernels.stats import driver as stats
from kd_kernels.stats.reference import RowStats

WHERE = "accept_or_resample"
RULES = ("top_k", "speculative")


@dataclass(frozen=True)
class Accepted:
    """What :func:`accept_or_resample` returns, of the rows' shape. Log-probabilities: fp32 (fp64 if an input is), nats.

    Attributes:
        ids: int64, the draft where it was accepted, what was drawn in its place where not; -1 where a row is no
            distribution and ``check="flag"``.
        accepted: bool.
        logprobs: of ``ids`` under the teacher's distribution, tempered and cut. NaN where rule "top_k" accepted a
            draft: such an id was not drawn from it.
        model_logprobs: of ``ids`` under the teacher's own distribution: temperature 1, no filter.
        rank: int64, how many ids the teacher finds likelier than the draft (as :class:`TokenStats`); None under
            "speculative".
    """

    ids: Tensor
    accepted: Tensor
    logprobs: Tensor
    model_logprobs: Tensor
    rank: Tensor | None = None


def accept_or_resample(
    drafts: Tensor, teacher: Logits, rule: str = "top_k", *, k: int | None = None, student: Logits | None = None,
    temperature: float | Tensor = 1.0, top_k: int | Tensor | None = None, top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None, student_temperature: float | Tensor = 1.0,
    student_top_k: int | Tensor | None = None, student_top_p: float | Tensor | None = None,
    student_min_p: float | Tensor | None = None, seed: int | Tensor, keys: Tensor | None = None,
    positions: Tensor | None = None, check: str = "raise", max_scratch_bytes: int | None = None,
    backend: str | None = None,
) -> Accepted:
    """A student's tokens where the teacher accepts them, and tokens of the teacher's where it does not.

    rule="top_k"
        Speculative knowledge distillation: a draft is accepted if fewer than ``k`` ids have larger logits of the
        teacher's (ties to the lower id), tempered by nothing and cut by nothing. Else the id is drawn from the
        teacher's distribution, tempered and cut. ``k = 0`` accepts nothing, ``k >= V`` all.
    rule="speculative"
        Speculative sampling: with p and q the distributions of teacher and student, each tempered and cut as they are
        drawn from, a draft is accepted with probability min(1, p/q), and else replaced by a draw from max(p - q, 0),
        normalised. If drafts are distributed as q, the ids are distributed as p.

    Rows are independent: the caller who tests several drafts of one sequence discards what follows the first that was
    refused. Only refused rows are drawn anew. A replacement is the draw of ``sample(..., purpose="resample")`` at the
    row's seed, key and position, whichever other rows were refused, and shares no words with the draft's own draw nor
    with its test (``DRAWS.md`` beside this file, section 7).

    Args:
        drafts: int64 or int32, ids in 0..V-1, of the rows' shape.
        teacher: ``[..., V]`` or what stands for it; fp32, bf16, fp16 or fp64.
        k: of rule "top_k", at least 0. 25 in the paper.
        student: of rule "speculative", what the drafts were drawn from: of the teacher's rows and vocabulary.
        temperature, top_k, top_p, min_p: of the teacher, as in :func:`sample`.
        student_temperature, ...: likewise of the student; rule "speculative" alone.
        seed, keys, positions, check, max_scratch_bytes: as in :func:`sample`.
        backend: "cpp" (CPU), "reference" (any device), or None: by device.

    Returns:
        :class:`Accepted`, without gradient, on the device of ``teacher``. N = 0 gives empty ones.

    Raises:
        TypeError, ValueError: an argument is not as above, or does not belong to the rule; with ``check="raise"`` a row
            of either model with NaN or +inf, or with -inf alone.
        RuntimeError: the backend does not exist here, or while a CUDA graph is captured: how many rows are refused
            depends on the data.

    Numerics: as :func:`sample` and :func:`token_stats`. p - q is taken in fp64. Where rounding leaves max(p - q, 0)
    without any id (p = q), the id is drawn from p.

    Cost: a product of the head and a reading of the logits for all N rows, under "speculative" of both models. For
    refused rows the logits are read again, and under "speculative" take three exponentials and a logarithm an id in
    fp64. Waits for a GPU twice, and once a chunk of rows.

    Source: Xu et al. 2024, "Speculative Knowledge Distillation", arXiv 2410.11325, algorithm 1; Leviathan et al. 2022,
    "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192, algorithm 1.
    """
    if torch.compiler.is_compiling():  # sizes depend on the data
        return torch.compiler.disable(accept_or_resample)(
            drafts, teacher, rule, k=k, student=student, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            student_temperature=student_temperature, student_top_k=student_top_k, student_top_p=student_top_p,
            student_min_p=student_min_p, seed=seed, keys=keys, positions=positions, check=check,
            max_scratch_bytes=max_scratch_bytes, backend=backend,
        )
    check_dense(WHERE, teacher)
    _check.one_of(WHERE, "rule", rule, RULES)
    shape, device, columns = leading_shape(teacher), teacher.device, vocab(teacher)
    rows = Rows(WHERE, shape, device)
    drafts = rows.tensor("drafts", drafts)
    place, warp = rows.place(seed, keys, positions), rows.warp(temperature, top_k, top_p, min_p)
    student_warp = rows.warp(student_temperature, student_top_k, student_top_p, student_min_p, "student_")
    _check.one_of(WHERE, "check", check, CHECKS)
    check_budget(WHERE, max_scratch_bytes)
    nouns = [teacher]
    if rule == "top_k":
        given = (student_temperature, student_top_k, student_top_p, student_min_p)
        _check_top_k(k, student is not None or any(x is not y for x, y in zip(given, (1.0, None, None, None))))
    else:
        _check_student(k, student, teacher)
        nouns.append(student)
    chosen = _backend.choose(WHERE, backend, device, tuple(IMPLEMENTATIONS))
    for noun in nouns:
        check_vocab(WHERE, chosen, columns, products.tensors_of(noun))
    _backend.check_not_capturing(
        WHERE, "the call", "made outside", "a capture", "how many rows are refused depends on the data"
    )
    values = {"drafts": (drafts, (drafts >= 0) & (drafts < columns), f"in 0..V-1={columns - 1}")}
    values |= driver.valid_positions(place.positions) | driver.valid_warp(warp)
    driver.check_values(WHERE, values | driver.valid_warp(student_warp, "student_"))
    options = _Options(check, autocast_name(device), max_scratch_bytes, chosen)
    with torch.no_grad():
        if rule == "top_k":
            found = _test_rank(drafts, teacher, k, place, warp, options)
        else:
            found = _test_ratio(drafts, teacher, student, place, warp, student_warp, options)
    return Accepted(*(None if x is None else x.reshape(shape) for x in found))


def _check_top_k(k: object, has_student: bool) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        _check.fail_type(WHERE, "k", 'an int for rule="top_k"', type(k).__name__)
    if k < 0:
        _check.fail(WHERE, "k", "at least 0", k)
    if has_student:
        _check.fail(
            WHERE, "student and its sampling", 'left out for rule="top_k"',
            "a student or its temperature, top_k, top_p or min_p", "the test looks at the teacher alone",
        )


def _check_student(k: object, student: object, teacher: Logits) -> None:
    if k is not None:
        _check.fail(WHERE, "k", 'None for rule="speculative"', k, "pass top_k=... to cut the teacher's distribution")
    if student is None:
        _check.fail(WHERE, "student", 'given for rule="speculative"', None, "it says what the drafts were drawn from")
    check_dense(WHERE, student)
    if leading_shape(student) != leading_shape(teacher) or vocab(student) != vocab(teacher):
        wanted, given = ([*leading_shape(noun), vocab(noun)] for noun in (teacher, student))
        _check.fail(WHERE, "student", f"of shape {wanted} like the teacher", given, "give a padded one valid_vocab")
    _check.same_device(WHERE, "student", student, teacher.device)


class _Options(NamedTuple):
    check: str
    autocast: str
    max_scratch_bytes: int | None
    backend: str

    def call(self, argument: str, noun: Logits) -> Call:
        return Call(WHERE, argument, vocab(noun), philox.RESAMPLE_RACE, False, *self)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return getattr(torch, self.autocast) if self.autocast else None


def _test_rank(drafts: Tensor, teacher: Logits, k: int, place: Place, warp: Warp, options: _Options) -> tuple:
    """The fields of :class:`Accepted`, ``[N]``: ranks of all rows, and draws of those that are refused, out of the same
    logits."""
    is_accepted = lambda rank: (rank >= 0) & (rank < k)  # noqa: E731
    call, noun = options.call("teacher", teacher), products.flattened(teacher)
    tensors, rows_of = products.tensors_of(noun), driver.implementation(call.backend)
    dtype = products.work_dtype(*tensors)
    parts = [driver.new_samples(tensors, 0)]

    def draw(found: RowStats, begin: int, chunk: RawRows) -> None:
        picked = (~is_accepted(found.rank)).nonzero()[:, 0]
        rows = begin + picked
        part = driver.new_samples(tensors, len(rows))
        request = driver.request_of(Place(*(x[rows] for x in place)), warp.of(rows), dtype, call.race)
        rows_of.sample_picked(chunk, picked, request, part)
        if call.check == "raise":
            driver.check_rows(call, part.ids, {}, noun, rows, dtype, options.autocast_dtype)
        parts.append(part)

    found = stats.walk(
        WHERE, noun, drafts, autocast=options.autocast_dtype, max_scratch_bytes=call.max_scratch_bytes,
        backend=call.backend, each_chunk=draw, each_scratch=rows_of.picked_scratch(call.columns, dtype),
    )
    drawn = RowSamples(*(None if fields[0] is None else torch.cat(fields) for fields in zip(*parts)))
    accepted = is_accepted(found.rank)
    refused = (~accepted).nonzero()[:, 0]
    logprobs = torch.full_like(found.logprob, torch.nan).index_copy_(0, refused, drawn.logprobs)
    return (
        drafts.index_copy(0, refused, drawn.ids), accepted, logprobs,
        found.logprob.index_copy(0, refused, drawn.model_logprobs), found.rank,
    )


def _test_ratio(
    drafts: Tensor, teacher: Logits, student: Logits, place: Place, warp: Warp, student_warp: Warp, options: _Options,
) -> tuple:
    """The fields of :class:`Accepted`, ``[N]``: tests and draws out of the same logits."""
    rows_of = driver.implementation(options.backend)
    nouns = {"teacher": products.flattened(teacher), "student": products.flattened(student)}
    dtype = products.work_dtype(*products.tensors_of(teacher), *products.tensors_of(student))
    autocast, device = options.autocast_dtype, drafts.device
    sources = [
        products.source(noun, None, dtype, autocast=autocast, native=rows_of.NATIVE) for noun in nouns.values()
    ]
    requests = [driver.request_of(place, each, dtype, philox.RESAMPLE_RACE) for each in (warp, student_warp)]
    drafts, out = drafts.contiguous(), Verdicts.new(len(drafts), dtype, device)
    with torch.autocast(device.type, enabled=False):
        scratch = rows_of.judge_scratch(vocab(teacher), dtype)
        for here, chunks in products.chunks_of(
            WHERE, sources, len(drafts), *scratch, options.max_scratch_bytes, device
        ):
            both = (request.of(here) for request in requests)
            rows_of.judge_rows(*chunks, drafts[here], *both, out.of(here))
    if options.check == "raise":
        for fault, (argument, noun) in zip((TEACHER_FAULT, STUDENT_FAULT), nouns.items()):
            ids = torch.where((out.faults & fault) > 0, -1, 0)
            driver.check_rows(options.call(argument, noun), ids, {}, noun, None, dtype, autocast)
    return out.ids, out.accepted, out.logprobs, out.model_logprobs, None
