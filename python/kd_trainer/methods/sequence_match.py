"""SequenceMatch: imitation of whole texts, by a student that can take back what it wrote.

Cundy and Ermon 2024, "SequenceMatch: Imitation Learning for Autoregressive Sequence Modelling with Backtracking",
arXiv 2306.05426. The student's logits z are taken for Q values, V(s) = log sum exp z(. | s) for the value of what is
written so far, and s' for s with the action a, a token or a backspace. With phi(x) = x - x^2 / (4 alpha), minimise

    - E_text[phi(z(a | s) - gamma V(s'))] + 1/2 E_text[V(s) - gamma V(s')] + 1/2 E_written[V(s) - gamma V(s')],

the chi-square divergence from the text's states and actions to their mixture with those of what the student writes. E
is over rows, all alike: with the weights gamma^t of an occupancy measure the last two terms would be V of the prompt
whatever was written, and the student's texts would teach nothing. The end of sequence leads to a state that leads to
itself, which is one more row, with z = V there; a text without it stops in a state whose V is as good as any.

What the student writes is kept in a replay buffer of ``buffer`` sequences a process and written anew every ``refresh``
steps. In the text, before a token with probability ``mistakes``, stands another one and the backspace that deletes it,
so that the text says when to delete (the other token itself is not imitated). The backspace must be in the vocabulary:
add it to tokenizer and models first, or name a token that texts never use.

Verified: phi, and V - gamma V' over the rows of both kinds of text alike, in the released code of IQ-Learn (arXiv
2106.12142, Div99/IQ-Learn, iq.py with div "chi" and loss "value"), whose form this is; alpha and gamma are settings
there. Of the paper itself, the abstract and an extract of its appendix: it trains by next-token loss first, and then on
a convex combination of that and this one: begin with a student of method sft, and set ``likelihood``, the share of the
next-token loss.

Uncertain: the paper's alpha, gamma, share and rates, and how it draws mistakes, could not be read; the values here are
this project's. There is no public code. No teacher takes part.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kernels import KDLoss, token_stats
from kd_trainer.config import Config
from kd_trainer.data import Batch, Document
from kd_trainer.errors import check_positive, fail
from kd_trainer.methods.base import DatasetTokens, Method, Objective, Parts
from kd_trainer.models import CausalLM, logits_at
from kd_trainer.registry import MethodSpec, register
from kd_trainer.rollout import backtrack, trail
from kd_trainer.teachers import NoTeacher, Targets
from kd_trainer.tokens import ReplayBuffer, TakenBack, Writer, check_prompts


@dataclass(frozen=True)
class Options:
    backspace: str = "<backspace>"
    alpha: float = 1.0
    gamma: float = 0.99
    mistakes: float = 0.05
    refresh: int = 4
    buffer: int = 512
    likelihood: float = 0.0  # share of the next-token loss of the text

    def __post_init__(self) -> None:
        check_positive("config", "options.alpha", self.alpha)
        for name in ("gamma", "mistakes", "likelihood"):
            if not 0.0 <= getattr(self, name) < 1.0:
                fail("config", f"options.{name}", "in [0, 1)", getattr(self, name))
        for name in ("refresh", "buffer"):
            if getattr(self, name) < 1:
                fail("config", f"options.{name}", "at least 1", getattr(self, name))


class SequenceMatch(Objective):
    """The terms of one of the two expectations: over the text, or over what the student wrote."""

    has_teacher = False

    def __init__(self, of_text: bool, options: Options, backspace: int, end: int | None) -> None:
        super().__init__()
        self.of_text, self.options, self.backspace, self.end = of_text, options, backspace, end

    def ends(self, document: Document) -> bool:
        return self.end is not None and int(document.tokens[-1]) == self.end

    def count(self, document: Document) -> int:
        return super().count(document) + self.ends(document)

    def forward(
        self, student: CausalLM, targets: Targets, batch: Batch, normalizer: float,
        max_scratch_bytes: int | None = None,
    ) -> KDLoss:
        hidden, before, after, stays = self._states(student, batch)
        states, ids = torch.cat([before, stays]), batch.labels[batch.counted]
        ids = torch.cat([ids, ids.new_zeros(len(stays))])  # any id has the state's V with it
        value, logit, logprob = self._values(student, hidden[states], ids, max_scratch_bytes)
        next_value = self._values(student, hidden[after], ids.new_zeros(len(after)), max_scratch_bytes)[0]
        next_value = torch.cat([next_value, value[len(before) :]])
        logit = torch.cat([logit[: len(before)], value[len(before) :]])
        loss, share = 0.5 * (value - self.options.gamma * next_value), self.options.likelihood
        if self.of_text:
            reward = logit - self.options.gamma * next_value
            loss = loss - (reward - reward.square() / (4.0 * self.options.alpha))
        loss = (1.0 - share) * loss
        if self.of_text and share:
            loss = torch.cat([loss[: len(before)] - share * logprob[: len(before)], loss[len(before) :]])
        return KDLoss(loss.sum() / normalizer, {"label_logprob": batch.spread(logprob[: len(before)].detach())})

    def _states(self, student: CausalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states ``[B * R, H]`` of all columns, and which of them are the states before and after each row that
        counts (``[M]`` both), and where sequences that have ended stay."""
        lines, columns = batch.input_ids.shape
        positions = torch.zeros(lines, columns, dtype=torch.int64)
        sees = torch.eye(columns, dtype=torch.bool).repeat(lines, 1, 1)
        before, after, stays = [], [], []
        for document, start in zip(batch.documents, batch.starts()):
            followed = trail(document.tokens, self.backspace, document.first_target)
            line, column = divmod(start, columns)
            span = slice(column, column + len(document))
            positions[line, span], sees[line, span, span] = followed.position, followed.sees
            state = start + followed.state
            before.append(state[:-1][document.counted])
            after.append(state[1:][document.counted])
            stays.append(state[-1:] if self.ends(document) else state[:0])
        device = batch.rows.device
        hidden = student.states(sees.to(device), positions.to(device), input_ids=batch.input_ids)
        return hidden.flatten(0, 1), *(torch.cat(parts).to(device) for parts in (before, after, stays))

    def _values(self, student: CausalLM, hidden: Tensor, ids: Tensor, scratch: int | None) -> tuple[Tensor, ...]:
        """V, z and log q of an id a state, all differentiable: V = z - log q."""
        logits = student.logits_of(hidden)
        logprob, logit = token_stats(logits, ids, max_scratch_bytes=scratch).logprob, logits_at(logits, ids)
        return logit - logprob, logit, logprob


def build(config: Config, parts: Parts) -> Method:
    options, name, end = config.options, config.options.backspace, parts.tokenizer.eos_token_id
    backspace = parts.token_id("options.backspace", name)
    used = sum(bool((document.tokens[document.first_target :] == backspace).any()) for document in parts.documents)
    if used:
        got = f"{name!r}, which is in {used} of {len(parts.documents)}"
        fail("config", "options.backspace", "a token that no text has", got, "name one that texts never use")
    check_prompts(parts.documents, config.rollout.prompt_tokens)
    parts.student.check_masks()
    writer = Writer.student(config, parts, generate=functools.partial(backtrack, backspace=backspace))
    tokens = TakenBack(
        DatasetTokens.of(config, parts.documents), writer, ReplayBuffer(options.buffer), refresh=options.refresh,
        mistakes=options.mistakes, backspace=backspace, vocab=parts.student.vocab, seed=config.seed,
        never=() if end is None else (end,),  # what ends a sequence cannot be taken back
    )
    objectives = {tag: SequenceMatch(tag == "text", options, backspace, end) for tag in ("text", "written")}
    return Method("sequence_match", tokens, NoTeacher(), objectives)


register(MethodSpec(
    "sequence_match", "imitation of texts, with a backspace and a replay buffer",
    "Cundy and Ermon 2024, arXiv 2306.05426", build, Options, defaults={"data": {"append_eos": True}},
    needs=("prompts",),
))
