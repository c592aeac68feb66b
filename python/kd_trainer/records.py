"""What one record of a data set can be: a text, a prompt with its completion, a chat, or token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kd_trainer.config import DataConfig
from kd_trainer.errors import fail

IGNORED = -100
WHERE = "load_documents"


class Record:
    """64 bits of the content are its name: an order and a sample that depend neither on files nor on their order."""

    def _content(self) -> object:
        raise NotImplementedError

    @property
    def hash(self) -> int:
        digest = hashlib.blake2b(json.dumps(self._content()).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


@dataclass(frozen=True)
class Text(Record):
    """A text before tokenisation. ``prompt`` is read but not learned."""

    text: str
    prompt: str = ""

    def _content(self) -> object:
        return [self.prompt, self.text]


@dataclass(frozen=True)
class Chat(Record):
    """Messages, of which a model learns what the assistant says; ``tools`` go to the template as they are."""

    messages: Sequence[dict]
    tools: Sequence[dict] | None = None

    def _content(self) -> object:
        return [self.messages, self.tools]


@dataclass(frozen=True)
class Tokens(Record):
    """Token ids that somebody else made.

    Args:
        ids: L of them.
        labels: L of them, ``ids`` again with -100 at tokens that are not learned (not shifted, as transformers has
            them).
        layout: lengths of the documents of a packed sequence, none of which sees another; None: one.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    layout: tuple[int, ...] | None = None

    def _content(self) -> object:
        return [self.ids, self.labels, self.layout]

    @property
    def counted(self) -> list[bool]:
        """Which tokens are learned: a document's first token follows nothing."""
        learned = [label != IGNORED for label in self.labels]
        begin = 0
        for length in self.layout or (len(self.ids),):
            learned[begin] = False
            begin += length
        return learned


def record_of(fields: dict, config: DataConfig, where: str) -> Record:
    """The record that the fields of a line make, by the first of the names that is among them.

    Raises:
        ValueError: none is, or what it holds is not of its kind.
    """
    if isinstance(text := fields.get(config.text_field), str):
        return Text(text)
    if config.messages_field in fields:
        return _chat(fields[config.messages_field], fields.get("tools"), f"{where}: {config.messages_field}")
    if "input_ids" in fields:
        return _tokens(fields, where)
    prompt, completion = fields.get(config.prompt_field), fields.get(config.completion_field)
    if isinstance(prompt, str) and isinstance(completion, str):
        return Text(completion, prompt)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(
            prompt + completion, fields.get("tools"), f"{where}: {config.prompt_field}, {config.completion_field}"
        )
    fail(
        WHERE, where,
        f"a record with a string {config.text_field!r}, or {config.prompt_field!r} and {config.completion_field!r}, or "
        f"a list of messages {config.messages_field!r}, or 'input_ids'",
        "keys " + ", ".join(map(str, fields)), "set data.text_field, data.prompt_field and data.completion_field",
    )


def _chat(messages: object, tools: object, where: str) -> Chat:
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        fail(WHERE, where, "a list of messages, each with a role", repr(messages)[:80])
    if not any(message["role"] == "assistant" for message in messages):
        fail(WHERE, where, "messages with at least one of role assistant", [message["role"] for message in messages])
    return Chat(messages, tools or None)


def _tokens(fields: dict, where: str) -> Tokens:
    ids = fields["input_ids"]
    labels = fields.get("labels") or ids
    layout = fields.get("seq_lengths")
    for name, values in (("input_ids", ids), ("labels", labels)):
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            fail(WHERE, f"{where}: {name}", "a list of integers", repr(values)[:80])
    if len(ids) < 2 or min(ids) < 0:
        fail(WHERE, f"{where}: input_ids", "at least two ids, none below 0", repr(ids)[:80])
    if len(labels) != len(ids) or any(label not in (IGNORED, token) for label, token in zip(labels, ids)):
        fail(
            WHERE, f"{where}: labels", f"{len(ids)} ids, each that of input_ids or {IGNORED}", repr(labels)[:80],
            "labels are not shifted here",
        )
    if layout is not None:
        if not isinstance(layout, list) or any(type(n) is not int or n < 1 for n in layout) or sum(layout) != len(ids):
            fail(WHERE, f"{where}: seq_lengths", f"positive lengths that add up to {len(ids)}", repr(layout)[:80])
        layout = tuple(layout) if len(layout) > 1 else None
    return Tokens(ids, labels, layout)


def encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of a chat as the tokenizer's template writes it, and which of them the assistant says.

    The template is rendered up to every assistant message and past it: what lies between is that message with the marks
    that end it. The whole is then tokenised at once, as a model that is used will see it; a token counts if it begins
    inside of such a stretch.

    Raises:
        ValueError: no template; one that fails on these messages, or that writes earlier messages differently once
            later ones follow, so that no stretch can be named.
    """
    if tokenizer.chat_template is None:
        fail("tokenize", "the tokenizer's chat template", "there for records of messages", "none")
    if not tokenizer.is_fast:
        fail("tokenize", "the tokenizer", "a fast one for records of messages", type(tokenizer).__name__)

    def rendered(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                list(chat.messages[:count]), tools=chat.tools, add_generation_prompt=prompt, tokenize=False
            )
        except Exception as error:  # jinja's errors share no base class with what templates raise by themselves
            raise ValueError(f"tokenize: messages must fit the chat template, got {error}") from error

    whole = rendered(len(chat.messages), False)
    spans = []
    for i, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before, after = rendered(i, True), rendered(i + 1, False)
        if not (after.startswith(before) and whole.startswith(after)):
            fail(
                "tokenize", "the chat template", "one that writes a message the same whatever follows",
                f"another text up to message {i}",
                "keep the last exchange of each chat only, or give prompt and completion",
            )
        spans.append((len(before), len(after)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counted = [any(begin <= start < end for begin, end in spans) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], counted
