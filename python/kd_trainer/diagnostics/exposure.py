"""Excess accumulated error: how much more a student errs on contexts of its own than on those of its teacher.

Arora et al. 2022, "Why Exposure Bias Matters: An Imitation Learning Perspective of Error Accumulation in Language
Generation", arXiv 2204.01171. With p the teacher, which is the oracle here, q the student, x a prompt and l a length,

    R(l)        = sum over t <= l of E_{y_<t ~ q} KL(p(. | x, y_<t) || q(. | x, y_<t))    on the student's contexts
    l eps(l)    = sum over t <= l of E_{y_<t ~ p} KL(p(. | x, y_<t) || q(. | x, y_<t))    on the teacher's
    ExAccErr(l) = 100 (R(l) - l eps(l)) / (l eps(l))  percent

0 is a student without exposure bias: it errs no more where it led itself. MiniLLM (arXiv 2306.08543) and KID (arXiv
2410.11371) report this number. Contexts are sampled; the KL at each is exact, over the whole vocabulary.

Verified in the authors' code (kushalarora/quantifying_exposure_bias, exposure_bias.py): the KL's direction, that it is
summed along a sequence before means are taken, and 100 (ratio - 1). Other than there, on purpose: their second
expectation runs along human text, and here along what the oracle writes, as the formula has it; they sum from the
prompt's second token on, which both expectations share, and here from the first one written; they drop sequences that
have ended from the means of larger lengths.

A sequence that has ended says nothing more: both models are taken to stay at its end, so that its later terms are 0.
Where a student ends earlier or later than its teacher, that is part of R; ``student_tokens`` and ``teacher_tokens``
say how far it is so, and ``per_token`` is the same excess of mean errors a token, which lengths do not enter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kernels import kd_loss
from kd_trainer.data import Document
from kd_trainer.diagnostics.contexts import prompts_in, written
from kd_trainer.errors import fail
from kd_trainer.models import CausalLM
from kd_trainer.rollout import Options, Sampling, step_seed
from kd_trainer.rollout.decoder import evaluating
from kd_trainer.rollout.generate import by_length


@dataclass(frozen=True)
class ExcessError:
    """Of one student and one teacher; nats, and percent where it says so.

    Attributes:
        prompts, samples: as many prompts, as many sequences of each model from each.
        length: l, the most tokens of a sequence.
        student_tokens, teacher_tokens: mean length of what each wrote.
        regret: R(l), mean of a sequence.
        expected: l eps(l), likewise.
        excess: ExAccErr(l), percent.
        standard_error: of it, percent, by the spread over prompts (delta method); None of one prompt.
        per_token: percent: the excess of mean errors a token.
        by_length: ``(l', R(l'), l' eps(l'))`` for every l' up to l.
    """

    prompts: int
    samples: int
    length: int
    student_tokens: float
    teacher_tokens: float
    regret: float
    expected: float
    excess: float
    standard_error: float | None
    per_token: float
    by_length: list[tuple[int, float, float]]

    def table(self) -> str:
        """For people: the excess at a few lengths."""
        error = "" if self.standard_error is None else f" +- {self.standard_error:.1f}"
        powers = [2**i for i in range(self.length.bit_length()) if 2**i < self.length]
        lines = [f"{'length':>7}  {'R':>8}  {'l eps':>8}  {'ExAccErr':>9}"]
        for length in (*powers, self.length):
            _, regret, expected = self.by_length[length - 1]
            lines.append(f"{length:>7}  {regret:>8.3f}  {expected:>8.3f}  {_percent(regret, expected):>8.1f}%")
        return "\n".join([
            *lines,
            f"ExAccErr {self.excess:.1f}%{error}, {self.per_token:.1f}% a token; {self.prompts} prompts, "
            f"{self.samples} sequences of each model from each",
            f"mean length {self.student_tokens:.1f} of the student, {self.teacher_tokens:.1f} of the teacher",
        ])


def oracle_texts(
    teacher: CausalLM, documents: Sequence[Document], options: Options, *, seed: int, samples: int = 1,
    prompt_tokens: int | None = None,
) -> list[Document]:
    """What the teacher, sampled from as it is, writes from the prompts of documents.

    It depends on no student, so that several can be measured on one writing. Arguments and errors are those of
    :func:`excess_error`.
    """
    where = "oracle_texts"
    _check(where, options, samples)
    plain = dataclasses.replace(options, sampling=Sampling())
    prompts = prompts_in(where, documents, prompt_tokens)
    return written(teacher, prompts, plain, seed=step_seed(seed, 0, "teacher's contexts"), samples=samples)


def excess_error(
    teacher: CausalLM, student: CausalLM, documents: Sequence[Document], options: Options, *, seed: int,
    samples: int = 1, prompt_tokens: int | None = None, batch_tokens: int = 2048,
    by_teacher: Sequence[Document] | None = None,
) -> ExcessError:
    """ExAccErr at ``options.max_new_tokens`` over the prompts of documents.

    Args:
        options: of roll-outs. ``sampling`` is how the student decodes; the teacher, which is the oracle, is sampled
            from as it is. ``stop_ids`` end a sequence; without them all are ``max_new_tokens`` long.
        samples: sequences of each model from each prompt.
        prompt_tokens: of a text without a prompt, so many first tokens are one.
        by_teacher: what :func:`oracle_texts` returned for the same documents and arguments; None: written now.

    Raises:
        ValueError: other vocabularies; no prompts; no ``max_new_tokens``; no error on the teacher's contexts; teacher's
            texts of other prompts.

    Cost: the roll-outs of both models (with ``by_teacher`` of the student alone), and a pass of both over all of them.
    """
    where = "excess_error"
    if teacher.vocab != student.vocab:
        fail(where, "the student's vocabulary", f"the teacher's {teacher.vocab}", student.vocab)
    _check(where, options, samples)
    prompts, length = prompts_in(where, documents, prompt_tokens), options.max_new_tokens
    texts = {"student": written(
        student, prompts, options, seed=step_seed(seed, 0, "student's contexts"), samples=samples
    )}
    how = dict(seed=seed, samples=samples, prompt_tokens=prompt_tokens)
    texts["teacher"] = oracle_texts(teacher, documents, options, **how) if by_teacher is None else by_teacher
    repeated = [prompt.tolist() for prompt in prompts for _ in range(samples)]
    if repeated != [text.tokens[: text.first_target].tolist() for text in texts["teacher"]]:
        need = f"{samples} texts of each of the {len(prompts)} prompts"
        fail(where, "by_teacher", need, f"{len(by_teacher)} of others")
    errors, tokens = {}, {}
    for name, own in texts.items():
        found = divergences_along(teacher, student, own, batch_tokens)
        tokens[name] = sum(map(len, found)) / len(found)
        padded = torch.stack([torch.nn.functional.pad(error, (0, length - len(error))) for error in found])
        errors[name] = padded.unflatten(0, (len(prompts), samples)).mean(1).cumsum(1)  # [prompts, length]
    regret, expected = errors["student"].mean(0), errors["teacher"].mean(0)
    if not float(expected[-1]) > 0.0:
        fail(
            where, "the error on the teacher's contexts", "above 0", float(expected[-1]), "are the two the same model?"
        )
    return ExcessError(
        prompts=len(prompts), samples=samples, length=length, student_tokens=tokens["student"],
        teacher_tokens=tokens["teacher"], regret=float(regret[-1]), expected=float(expected[-1]),
        excess=_percent(regret[-1], expected[-1]),
        standard_error=_ratio_error(errors["student"][:, -1], errors["teacher"][:, -1]),
        per_token=_percent(float(regret[-1]) / tokens["student"], float(expected[-1]) / tokens["teacher"]),
        by_length=[(i + 1, *pair) for i, pair in enumerate(zip(regret.tolist(), expected.tolist()))],
    )


def _check(where: str, options: Options, samples: int) -> None:
    if samples < 1:
        fail(where, "samples", "at least 1", samples)
    if options.max_new_tokens is None:
        fail(where, "options.max_new_tokens", "given: it is the length that errors accumulate over", None)


def divergences_along(
    teacher: CausalLM, student: CausalLM, documents: Sequence[Document], batch_tokens: int = 2048
) -> list[Tensor]:
    """KL(p || q) at every target of each document: fp64 ``[n_i]``, on the CPU, in the documents' order."""
    found: dict[int, Tensor] = {}
    with evaluating(teacher, student):
        for members, batch in by_length(documents, batch_tokens):
            batch = batch.to(student.device)
            if teacher.device != student.device:
                teacher.to(student.device)
            q, p = (model.logits_of(model.hidden(batch)[batch.counted]) for model in (student, teacher))
            error = kd_loss(q, p, "forward_kl", stats=("divergence",)).stats["divergence"]
            counts = [int(documents[i].counted.sum()) for i in members]
            found |= zip(members, error.double().cpu().split(counts))
    return [found[i] for i in range(len(documents))]


def _percent(regret: float | Tensor, expected: float | Tensor) -> float:
    return 100.0 * float(regret - expected) / float(expected)


def _ratio_error(above: Tensor, below: Tensor) -> float | None:
    """Standard error of ``100 mean(above) / mean(below)`` over independent prompts."""
    if len(above) < 2:
        return None
    residual = above - above.mean() / below.mean() * below
    return 100.0 * float(residual.std() / below.mean() / len(above) ** 0.5)
