"""Sequences that a student writes and a teacher corrects as they grow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kd_kernels import Accepted, LinearLogits, Sampled, accept_or_resample, token_stats
from kd_trainer.errors import check_one_of, fail
from kd_trainer.models import CausalLM
from kd_trainer.rollout.decoder import Decoder, check_decoding, evaluating
from kd_trainer.rollout.generate import draw, fail_logits, in_batches, without
from kd_trainer.rollout.options import Options, Sampling, check_ids, check_keys, check_prompts
from kd_trainer.rollout.result import RollOuts, pad

RULES = ("top_k", "speculative")


@dataclass(frozen=True, eq=False)
class Interleaved(RollOuts):
    """Roll-outs of two models. What is said of a token, is said by the model that it is from.

    Attributes:
        by_student: bool ``[n_i]`` each: the token is a draft that was accepted; the others the teacher put in its
            place.
        rounds: forward passes of the teacher over each sequence.
    """

    by_student: tuple[Tensor, ...] = ()
    rounds: tuple[int, ...] = ()

    @property
    def acceptance(self) -> float:
        """Accepted drafts over drafts that were tested; those behind a rejected one are not tested."""
        return float(torch.cat(self.by_student).double().mean())

    @property
    def tokens_per_round(self) -> float:
        return sum(self.lengths) / sum(self.rounds)


def interleave(
    student: CausalLM, teacher: CausalLM, prompts: Sequence[Tensor], options: Options, *, seed: int,
    teacher_sampling: Sampling = Sampling(), rule: str = "top_k", k: int = 25, gamma: int = 5,
    keys: Tensor | None = None,
) -> Interleaved:
    """Completions that the student drafts and the teacher corrects, token by token, at the speed of several at a time.

    In a round the student drafts ``gamma`` tokens, the teacher reads them in one pass, the drafts before the first that
    it does not accept are kept, and that one is replaced by a token of the teacher's. Where all are accepted nothing is
    added to them, so every token was the student's to begin with.

    rule="top_k"
        Speculative knowledge distillation. A draft is accepted if fewer than ``k`` ids have larger logits of the
        teacher's, tempered by nothing and cut by nothing (ties to the lower id). ``k = V`` is what the student writes
        by itself, ``k = 0`` what the teacher does.
    rule="speculative"
        Speculative sampling: a draft is accepted with probability min(1, p/q), and replaced out of max(p - q, 0), p and
            q being the distributions that the teacher and the student draw from. The text is distributed as one of the
            teacher's.

    Draws depend on seed, key and position, as in :func:`generate`: what is written does not depend on ``gamma``, nor on
    the sequences that share a batch. ``options.sampling`` is the student's, ``teacher_sampling`` the teacher's. Before
    ``min_new_tokens`` stop ids do not exist, for neither of them.

    Args:
        student, teacher: as in :func:`generate`, of one vocabulary. A teacher computes in the dtype that it was loaded
            in, outside of the caller's autocast.
        k: 0..V, of rule "top_k" alone. 25 in the paper.
        gamma: tokens of a draft, at least 1; 5 in the paper.

    Raises:
        ValueError: as :func:`generate`; another vocabulary, ``k`` or ``gamma`` out of range, an unknown rule.

    Cost, a round: ``gamma`` passes of the student over a token, one of the teacher over ``gamma``, both with caches,
    that are rolled back where a draft was refused. Waits for the device once a round.

    Source: "Speculative Knowledge Distillation", arXiv 2410.11325, algorithm 1, with the test on the teacher's own
    logits as the paper has it (its published code tests after tempering and cutting); Leviathan et al., arXiv
    2211.17192.
    """
    where = "interleave"
    prompts = check_prompts(where, prompts, student.vocab)
    check_ids(where, "stop_ids", options.stop_ids, student.vocab)
    if teacher.vocab != student.vocab:
        fail(
            where, "the student's vocabulary", f"the teacher's {teacher.vocab}", student.vocab,
            "teacher and student must share a tokenizer",
        )
    check_one_of(where, "rule", rule, RULES)
    if gamma < 1:
        fail(where, "gamma", "at least 1", gamma)
    if rule == "top_k" and not 0 <= k <= teacher.vocab:
        fail(where, "k", f"in 0..V={teacher.vocab}", k)
    keys, budgets = check_keys(where, keys, prompts), options.budgets(where, prompts)
    for model in (student, teacher):
        check_decoding(where, model)

    test = {"rule": rule, "k": k} if rule == "top_k" else {"rule": rule, **options.sampling.arguments("student_")}

    def part(members: list[int]) -> Interleaved:
        texts = [_Text(i, prompts[i], budgets[i], int(keys[i]), prompts[i]) for i in members]
        pair = _Pair(where, student, teacher, texts, options, teacher_sampling, test, gamma, seed)
        while pair.rows:
            pair.round()
        return _result(texts)

    with evaluating(student, teacher):
        return in_batches(part, prompts, options.batch_size)


class _Said(NamedTuple):
    """Tokens, and what the model that each is from said about it: ``[B, gamma]``, or of a sequence ``[m]``."""

    ids: Tensor
    by_student: Tensor
    logprobs: Tensor
    model_logprobs: Tensor
    entropy: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> _Said:
        return _Said(*(None if x is None else change(x) for x in self))


@dataclass(eq=False)
class _Text:
    """A sequence while it is written."""

    number: int
    prompt: Tensor
    budget: int
    key: int
    unread: Tensor  # by both models: the prompt, later the last token
    said: list[_Said] = dataclasses.field(default_factory=list)  # a round each
    length: int = 0
    reason: str | None = None

    def append(self, where: str, said: _Said, stop_ids: Sequence[int]) -> int:
        """Append the drafts up to the first that was refused, with what replaces it; return how many tokens that is."""
        ids, count = said.ids.tolist(), 0
        for token, is_draft in zip(ids, said.by_student.tolist()):
            if token < 0:
                fail_logits(where, self.number, len(self.prompt) + self.length + count)
            count += 1
            if token in stop_ids:
                self.reason = "stop"
            elif self.length + count == self.budget:
                self.reason = "length"
            if self.reason or not is_draft:
                break
        self.said.append(said.each(lambda x: x[:count]))
        self.length += count
        self.unread = said.ids[count - 1 : count]
        return count


def _result(texts: Sequence[_Text]) -> Interleaved:
    columns = [_Said(*(None if x[0] is None else torch.cat(x) for x in zip(*text.said))) for text in texts]
    ids, by_student, logprobs, model_logprobs, entropies = zip(*columns)
    return Interleaved(
        tuple(text.prompt for text in texts), ids, tuple(str(text.reason) for text in texts), logprobs, model_logprobs,
        None if entropies[0] is None else entropies, by_student, tuple(len(text.said) for text in texts),
    )


class _Round(NamedTuple):
    """What a round begins with: rows of a batch on the device, but for masks, which are on the CPU."""

    unread: Tensor  # [B, longest]
    is_token: Tensor  # [B, longest]
    keys: Tensor  # [B]
    positions: Tensor  # [B, gamma], of the drafts
    is_early: Tensor  # [B, gamma]: before min_new_tokens

    @property
    def gamma(self) -> int:
        return self.positions.shape[1]


class _Pair:
    """Student and teacher on one batch. Both have read the same of every row: all but ``unread``."""

    def __init__(
        self, where: str, student: CausalLM, teacher: CausalLM, rows: list[_Text], options: Options,
        teacher_sampling: Sampling, rule: dict[str, object], gamma: int, seed: int,
    ) -> None:
        self.rows = rows
        self._where, self._student, self._teacher = where, student, teacher
        limit = max(len(text.prompt) + text.budget for text in rows)
        self._readers = [Decoder(where, model, len(rows), limit) for model in (student, teacher)]
        self._options, self._teacher_sampling = options, teacher_sampling
        self._rule, self._gamma, self._seed = rule, gamma, seed

    def round(self) -> None:
        """The student drafts, the teacher tests, tokens are appended, and what was refused is forgotten."""
        start = self._start()
        drafted, hidden = self._draft(start)
        said = self._test(start, drafted, hidden).each(Tensor.cpu)
        counts = [
            text.append(self._where, said.each(lambda x: x[row]), self._options.stop_ids)  # noqa: B023
            for row, text in enumerate(self.rows)
        ]
        left = [row for row, text in enumerate(self.rows) if text.reason is None]
        if left:
            for reader in self._readers:
                if len(left) < len(self.rows):
                    reader.keep(left)
                reader.drop_last(start.gamma - torch.tensor(counts)[left])  # the last token appended is unread
        self.rows = [self.rows[row] for row in left]

    def _start(self) -> _Round:
        rows, device = self.rows, self._student.device
        unread, is_token = pad([text.unread for text in rows], "left")
        steps = torch.arange(min(self._gamma, max(text.budget - text.length for text in rows)))
        keys, begins, lengths = (
            torch.tensor(values) for values in zip(*((t.key, len(t.prompt) + t.length, t.length) for t in rows))
        )
        return _Round(
            unread.to(device), is_token, keys.to(device), (begins[:, None] + steps).to(device),
            lengths[:, None] + steps < self._options.min_new_tokens,
        )

    def _draft(self, start: _Round) -> tuple[Sampled, Tensor]:
        """Tokens of the student's, fields ``[B, gamma]``, and the hidden states that they are drawn from."""
        reader, options, drafted, hidden = self._readers[0], self._options, [], []
        last = reader.feed(start.unread, start.is_token)[:, -1]
        for j in range(start.gamma):
            own = self._student.logits_of(last)
            drafted.append(
                draw(
                    self._allowed(own, start.is_early[:, j]), options.sampling, self._seed, start.keys,
                    start.positions[:, j], own=own, entropy=options.entropy,
                )
            )
            hidden.append(last)
            if j + 1 < start.gamma:
                last = reader.feed(drafted[j].ids.clamp_min(0)[:, None])[:, -1]  # an id of -1 is found in the end
        fields = zip(*((d.ids, d.logprobs, d.model_logprobs, d.entropy) for d in drafted))
        return Sampled(*(None if x[0] is None else torch.stack(x, 1) for x in fields)), torch.stack(hidden, 1)

    def _test(self, start: _Round, drafted: Sampled, hidden: Tensor) -> _Said:
        """The drafts that the teacher accepts, and its own tokens in the place of the others."""
        drafts, shape = drafted.ids.clamp_min(0), drafted.ids.shape
        with torch.autocast(drafts.device.type, enabled=False):
            more = torch.ones(shape[0], shape[1] - 1, dtype=start.is_token.dtype)
            read = torch.cat([start.unread, drafts[:, :-1]], 1), torch.cat([start.is_token, more], 1)
            own = self._teacher.logits_of(self._readers[1].feed(*read)[:, -shape[1] :].flatten(0, 1))
        early, rule = start.is_early.flatten(), dict(self._rule)
        if rule["rule"] == "speculative":
            rule["student"] = self._allowed(self._student.logits_of(hidden.flatten(0, 1)), early)
        verdict = accept_or_resample(
            drafts.flatten(), self._allowed(own, early), **rule, **self._teacher_sampling.arguments(), seed=self._seed,
            keys=start.keys.repeat_interleave(shape[1]), positions=start.positions.flatten(), check="flag",
        )
        model_logprobs, entropy = self._of_teacher(own, verdict, bool(early.any()))
        accepted = verdict.accepted.view(shape)
        pick = lambda mine, other: torch.where(accepted, mine, other.view(shape))  # noqa: E731
        return _Said(
            pick(drafted.ids, verdict.ids).where(drafted.ids >= 0, -1), accepted,
            pick(drafted.logprobs, verdict.logprobs), pick(drafted.model_logprobs, model_logprobs),
            None if entropy is None else pick(drafted.entropy, entropy),
        )

    def _of_teacher(self, own: LinearLogits, verdict: Accepted, is_early: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the tokens, and entropy, of the teacher's own distribution, which has all stop ids."""
        if not (is_early or self._options.entropy):
            return verdict.model_logprobs, None
        there = (verdict.ids >= 0).nonzero()[:, 0]  # rows without an id may lie behind a refused draft, and not matter
        stats = token_stats(dataclasses.replace(own, hidden=own.hidden[there]), verdict.ids[there])
        spread = lambda x: torch.full_like(verdict.model_logprobs, torch.nan).index_copy_(0, there, x)  # noqa: E731
        return spread(stats.logprob), spread(stats.entropy) if self._options.entropy else None

    def _allowed(self, logits: LinearLogits, is_early: Tensor) -> Tensor | LinearLogits:
        """Logits ``[N, V]`` without the stop ids in the rows (bool ``[N]``, on the CPU) that are early."""
        if not is_early.any():
            return logits
        return without(logits, self._options.stop_ids, is_early.to(logits.device))
