"""Log-probabilities as servers answer them, brought into one form: L tokens and L - 1 rows of (ids, log-probabilities).

Known are

own         ``{"input_ids": [L], "top_ids": [[...] * (L - 1)], "top_logprobs": [[...] * (L - 1)],
            "next_logprobs": [L - 1]}``
vLLM        ``prompt_logprobs``: a list of ``{id: {"logprob": ...}}``, with ``prompt_token_ids`` beside it
chat        ``choices[i].logprobs.content[j].top_logprobs``: lists of ``{"token", "bytes", "logprob"}``
completions ``choices[i].logprobs`` with lists ``tokens``, ``token_logprobs`` and ``top_logprobs``

Row i says what the model expected after token i. A row that a server left out is None. What servers are known to do to
rows is undone and counted in ``notes``, or the record is :class:`Refused`; nothing is guessed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from kd_trainer.caching.refused import Refused
from kd_trainer.caching.token_names import TokenNames

MASS_TOLERANCE = 1e-3
"""How far above 1 the probabilities of a row may add up: log-probabilities of half precision, or printed with few
digits."""

SAME_TOKEN_NATS = 1e-2
"""How far two mentions of one token in a row may be apart and still be one."""

UNFILLED = -9999.0
"""What vLLM writes for the log-probability of a slot that has none."""

Entries = list[tuple[int, float]]


@dataclass(frozen=True)
class Row:
    """The teacher at one position: what is kept, the log of what is not, and the token that followed (NaN: unknown)."""

    ids: list[int]
    logprobs: list[float]
    tail_logprob: float
    next_logprob: float


@dataclass(frozen=True)
class Scored:
    """A sequence with its rows; None where there is none."""

    tokens: list[int]
    rows: list[Row | None]


@dataclass
class Reader:
    """Reads records into :class:`Scored`, and counts what it had to put right.

    Args:
        tokenizer: of the model that was served.
        vocab: ids are below it.
        k: entries that a row has at most: what the server was asked for.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab: int
    k: int
    notes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._names = TokenNames(self.tokenizer)

    def read(self, record: object) -> list[Scored]:
        """The sequences of one record: one, or one for each choice that a server answered.

        Raises:
            Refused: it is none of the forms above, or has a fault that cannot be put right.
        """
        if not isinstance(record, dict):
            raise Refused("a record that is no JSON object", type(record).__name__)
        request, response = _unwrapped(record)
        if response.get("error") or response.get("status_code", 200) != 200:
            raise Refused("an answer that is an error", str(response.get("error") or response["status_code"])[:120])
        try:
            if "top_ids" in response:
                return [self._own(response)]
            return [self._choice(request, response, choice) for choice in response.get("choices") or [{}]]
        except (AttributeError, IndexError, KeyError, TypeError) as error:  # lists where objects are expected
            raise Refused("a record of an unknown form", f"{type(error).__name__}: {error}") from error

    # ------------------------------------------------------------------------------------------------------- forms

    def _own(self, record: dict) -> Scored:
        tokens = self._tokens(record.get("input_ids"), "input_ids")
        ids, logprobs = record["top_ids"], record.get("top_logprobs")
        if not isinstance(ids, list) or not isinstance(logprobs, list) or len(ids) != len(logprobs):
            raise Refused(
                "top_ids and top_logprobs that are no lists of one length", f"{_size(ids)} and {_size(logprobs)}"
            )
        next_logprobs = record.get("next_logprobs") or [None] * (len(tokens) - 1)
        if len(next_logprobs) != len(tokens) - 1:
            raise Refused("next_logprobs that are not one a row", f"{len(next_logprobs)} for {len(tokens)} tokens")
        entries: list[Entries | None] = []
        for i, (row_ids, row) in enumerate(zip(ids, logprobs)):
            if row_ids is None:
                entries.append(None)
            elif not isinstance(row, list) or len(row_ids) != len(row):
                raise Refused(
                    "a row with other than one log-probability an id", f"row {i}: {len(row_ids)} and {_size(row)}"
                )
            else:
                entries.append(list(zip(row_ids, row)))
        if len(entries) == len(tokens) and entries[0] is None:
            entries = entries[1:]
        if len(entries) != len(tokens) - 1:
            raise Refused(
                "rows shifted or missing", f"{len(entries)} rows for {len(tokens)} tokens, which have {len(tokens) - 1}"
            )
        rows = [
            self._row(row, token, given, i)
            for i, (row, token, given) in enumerate(zip(entries, tokens[1:], next_logprobs))
        ]
        return Scored(tokens, rows)

    def _choice(self, request: dict, response: dict, choice: dict) -> Scored:
        logprobs = choice.get("logprobs")
        in_prompt = choice.get("prompt_logprobs") or response.get("prompt_logprobs")
        if logprobs is None and in_prompt is None:
            raise Refused("a record without log-probabilities", "keys " + ", ".join({**response, **choice}))
        if in_prompt is None and self._echoes(logprobs):
            tokens = [self._names.id_of(text) for text in logprobs["tokens"]]
            given, entries = logprobs["token_logprobs"], self._completion_entries(logprobs)
            rows = [self._row(entries[i], tokens[i], given[i], i - 1) for i in range(1, len(tokens))]
            return Scored(self._tokens(tokens, "tokens"), rows)

        prompt = self._prompt(request, response, choice)
        unscored: list[Row | None] = [None] * (len(prompt) - 1)
        rows = unscored if in_prompt is None else self._prompt_rows(in_prompt, prompt)
        tokens = list(prompt)
        if logprobs is not None:
            said, given, entries = self._said(logprobs, choice)
            rows += [
                self._row(row, token, value, len(prompt) + i)
                for i, (row, token, value) in enumerate(zip(entries, said, given))
            ]
            tokens += said
            if not prompt:
                self.notes["first position without a prompt: no row"] += 1
                rows = rows[1:]
        return Scored(self._tokens(tokens, "tokens"), rows)

    def _prompt(self, request: dict, response: dict, choice: dict) -> list[int]:
        """The ids that the answer follows."""
        for holder in (choice, response, request):
            for name in ("prompt_token_ids", "input_ids"):
                if holder.get(name) is not None:
                    return self._tokens(holder[name], name, least=0)
        messages, prompt = request.get("messages"), request.get("prompt", response.get("prompt"))
        if isinstance(messages, list) and self.tokenizer.chat_template is not None:
            self.notes["prompts written by the tokenizer's chat template"] += 1
            text = self.tokenizer.apply_chat_template(
                messages, tools=request.get("tools"), add_generation_prompt=True, tokenize=False
            )
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if isinstance(prompt, list):
            return self._tokens(prompt, "prompt", least=0)
        if isinstance(prompt, str):
            self.notes["prompts tokenised from their text"] += 1
            return self.tokenizer(prompt)["input_ids"]
        raise Refused(
            "a record without the tokens of its prompt", "keys " + ", ".join({**request, **response}),
            "put prompt_token_ids (vLLM: return_token_ids), messages or prompt beside the answer",
        )

    def _prompt_rows(self, listed: object, tokens: list[int]) -> list[Row | None]:
        """vLLM's list for a prompt. In it every position names the token that stands there, whatever its rank, so that
        a list that is shifted shows."""
        if not isinstance(listed, list) or not all(entry is None or isinstance(entry, dict) for entry in listed):
            raise Refused("prompt_logprobs that are no list of objects", repr(listed)[:80])
        positions = [self._by_id(entry) if entry else None for entry in listed]
        length = len(tokens)

        def names(first: int) -> bool:
            """Whether every row there is, from position ``first`` of the list on, has the token that follows it."""
            rows = positions[first : first + length - 1]
            return len(rows) == length - 1 and all(
                row is None or any(index == token for index, _ in row) for row, token in zip(rows, tokens[1:])
            )

        usual = bool(positions) and positions[0] is None
        starts = [
            first for first in ((1,) if usual else (0, 1))
            if len(positions) in (first + length - 1, first + length) and names(first)
        ]
        if len(starts) != 1:
            what = "shifted, missing or of another text" if not starts else "that fit at two places"
            raise Refused(
                "prompt_logprobs " + what,
                f"{len(positions)} positions for {length} tokens, the first {'null' if usual else 'not null'}",
            )
        (first,) = starts
        if first == 1 and not usual:
            self.notes["a row before the first token dropped"] += 1
        if first == 0:
            self.notes["lists without their first position"] += 1
        if len(positions) == first + length:
            self.notes["a row after the last token dropped"] += 1
        rows = positions[first : first + length - 1]
        return [self._row(row, token, None, i) for i, (row, token) in enumerate(zip(rows, tokens[1:]))]

    def _by_id(self, entry: dict) -> Entries:
        found = []
        for name, value in entry.items():
            if not name.lstrip("-").isdigit():
                raise Refused("prompt_logprobs by text, not by id", repr(name), "their keys must be token ids")
            found.append((int(name), value.get("logprob") if isinstance(value, dict) else value))
        return found

    def _said(self, logprobs: dict, choice: dict) -> tuple[list[int], list[float | None], list[Entries | None]]:
        """Tokens of an answer, their log-probabilities, and what else was likely."""
        ids = choice.get("token_ids")
        if "content" in logprobs:
            content = logprobs["content"] or []
            said = ids or [self._names.id_of(item.get("token"), item.get("bytes")) for item in content]
            given = [item.get("logprob") for item in content]
            entries: list[Entries | None] = [
                [(self._names.id_of(e.get("token"), e.get("bytes")), e.get("logprob")) for e in item["top_logprobs"]]
                if item.get("top_logprobs") else None
                for item in content
            ]
        else:
            said = ids or [self._names.id_of(text) for text in logprobs["tokens"]]
            given, entries = logprobs["token_logprobs"], self._completion_entries(logprobs)
        if not len(said) == len(given) == len(entries):
            raise Refused("an answer with other than one row a token", f"{len(said)} tokens, {len(entries)} rows")
        return self._tokens(said, "token_ids", least=0), given, entries

    @staticmethod
    def _echoes(logprobs: dict) -> bool:
        """Whether the prompt's tokens stand before the answer's: its first has no log-probability then."""
        return "content" not in logprobs and (logprobs.get("token_logprobs") or [0.0])[0] is None

    def _completion_entries(self, logprobs: dict) -> list[Entries | None]:
        top = logprobs.get("top_logprobs")
        if not isinstance(top, list):
            raise Refused("an answer without top_logprobs", repr(top), "ask the server for logprobs=k")
        return [row and [(self._names.id_of(text), value) for text, value in row.items()] or None for row in top]

    # -------------------------------------------------------------------------------------------------------- rows

    def _tokens(self, ids: object, name: str, least: int = 2) -> list[int]:
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < self.vocab for token in ids):
            raise Refused(f"{name} that are no list of ids below {self.vocab}", repr(ids)[:80])
        if len(ids) < least:
            raise Refused(f"a sequence of fewer than {least} tokens", len(ids))
        return ids

    def _row(self, entries: Entries | None, token: int, given: float | None, place: int) -> Row | None:
        """One row, put right.

        Args:
            token: the one that followed.
            given: its log-probability, where the server sent it apart.
            place: for messages.
        """
        if entries is None:
            self.notes["rows without log-probabilities left out"] += 1
            return None
        values = self._distinct(entries, place)
        following = min(given, 0.0) if given is not None and given > UNFILLED else math.nan
        if token in values:
            if abs(following - values[token]) > SAME_TOKEN_NATS:  # false for NaN
                raise Refused(
                    "rows that contradict the log-probability of the token that follows",
                    f"row {place}: {values[token]} and {following} for id {token}", "are the rows shifted?",
                )
            following = values[token]
        if len(values) == self.k + 1 and values.get(token) == min(values.values()):
            del values[token]
            self.notes["rows of k + 1 entries: the token itself, beyond the top k, kept apart"] += 1
        if len(values) > self.k:
            raise Refused("rows of more entries than --k", f"row {place}: {len(values)}", f"raise --k from {self.k}")
        if not values:
            self.notes["rows without log-probabilities left out"] += 1
            return None
        if len(values) < self.k:
            self.notes["rows of fewer than k entries"] += 1
        mass = math.fsum(map(math.exp, values.values()))
        if mass > 1.0 + MASS_TOLERANCE:
            raise Refused(
                "rows whose probabilities add up to more than 1", f"row {place}: {mass:.6f}",
                "they must be natural logarithms of probabilities over the whole vocabulary, at temperature 1",
            )
        tail = math.log1p(-mass) if mass < 1.0 else -math.inf
        return Row(list(values), list(values.values()), tail, following)

    def _distinct(self, entries: Entries, place: int) -> dict[int, float]:
        """Entries that say something, once each."""
        values: dict[int, float] = {}
        for index, value in entries:
            if index is None or index < 0 or value is None or value <= UNFILLED:
                self.notes["unfilled slots dropped"] += 1
                continue
            if type(index) is not int or index >= self.vocab:
                raise Refused(f"an id that is not below the vocabulary of {self.vocab}", f"row {place}: {index}")
            if not value <= MASS_TOLERANCE:  # true for NaN
                raise Refused("a log-probability that is no number up to 0", f"row {place}: {value}")
            if index in values:
                if abs(values[index] - value) > SAME_TOKEN_NATS:
                    raise Refused(
                        "one id with two log-probabilities", f"row {place}, id {index}: {values[index]}, {value}"
                    )
                self.notes["duplicated tokens dropped"] += 1
                continue
            values[index] = min(0.0, float(value))
        return values


def _unwrapped(record: dict) -> tuple[dict, dict]:
    """Request and answer of a record: side by side, as a batch API files them, or one without the other."""
    response = record.get("response", record)
    if isinstance(response, dict) and isinstance(response.get("body"), dict):
        response = {"status_code": response.get("status_code", 200)} | response["body"]
    request = record.get("request", record)
    if isinstance(request, dict) and isinstance(request.get("body"), dict):
        request = request["body"]
    if not isinstance(response, dict) or not isinstance(request, dict):
        raise Refused("a request or answer that is no JSON object", repr(response)[:80])
    if response.get("error") is None and record.get("error"):
        response = response | {"error": record["error"]}
    return request, response


def _size(value: object) -> str:
    return str(len(value)) if isinstance(value, Sequence) and not isinstance(value, str) else type(value).__name__
