"""Token ids from what serving APIs write in their place: ``token_id:17``, bytes, or text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from kd_trainer.caching.refused import Refused

REPLACEMENT = "\ufffd"
TOKEN_ID = re.compile(r"token_id:(\d+)")
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
AMBIGUOUS = -1


class TokenNames:
    """The ids of one tokenizer by name. A name that several ids have is refused, never guessed.

    Args:
        tokenizer: fast; its pieces are byte-level (GPT-2, Llama 3, Qwen) or SentencePiece (Llama 2, Gemma, Mistral).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._by_bytes: dict[bytes, int] | None = None
        self._by_text: dict[str, int] | None = None

    def id_of(self, text: str | None, data: Sequence[int] | None = None) -> int:
        """The id of a token.

        Args:
            text: as it was written; ``bytes:\\xe2\\x80`` stands for bytes.
            data: its bytes, where the server sent them.

        Raises:
            Refused: no id has this name, or several have; the text stands for bytes that are no UTF-8 and were not
                sent.
        """
        if text is not None and (found := TOKEN_ID.fullmatch(text)):
            return int(found[1])
        if data is None and text is not None and text.startswith("bytes:\\x"):
            data = bytes.fromhex(text.removeprefix("bytes:").replace("\\x", ""))
        if REPLACEMENT in (text or "") or REPLACEMENT.encode() in bytes(data or ()):
            raise Refused(
                "a token whose text is no UTF-8 and whose bytes were lost", repr(text),
                "ask the server for token ids (vLLM: return_tokens_as_token_ids)",
            )
        if data is not None:
            self._by_bytes = self._by_bytes or self._bytes_table()
            return self._only(self._by_bytes.get(bytes(data)), repr(bytes(data)))
        if text is None:
            raise Refused("a token without text, bytes or id", "null")
        self._by_text = self._by_text or self._text_table()
        return self._only(self._by_text.get(text), repr(text))

    def _only(self, found: int | None, name: str) -> int:
        if found is None:
            raise Refused(
                "a token that the tokenizer does not have", name, "give the tokenizer of the model that was served"
            )
        if found == AMBIGUOUS:
            raise Refused(
                "a token whose name several ids have", name, "ask the server for token ids, or for bytes",
            )
        return found

    def _text_table(self) -> dict[str, int]:
        """What ``decode`` makes of every id alone, which is what servers send."""
        table: dict[str, int] = {}
        ids = sorted(self._tokenizer.get_vocab().values())
        for index, text in zip(
            ids, self._tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        ):
            table[text] = AMBIGUOUS if text in table else index
        return table

    def _bytes_table(self) -> dict[bytes, int]:
        """The bytes that every id stands for inside of a text."""
        added = {index: token.content.encode() for index, token in self._tokenizer.added_tokens_decoder.items()}
        decoder = json.dumps(json.loads(self._tokenizer.backend_tokenizer.to_str())["decoder"])
        alphabet = _byte_alphabet() if "ByteLevel" in decoder else None
        if alphabet is None and "\\u2581" not in decoder:
            raise Refused(
                "a tokenizer whose pieces are neither byte-level nor SentencePiece", type(self._tokenizer).__name__,
                "ask the server for token ids",
            )
        table: dict[bytes, int] = {}
        fallback: dict[bytes, int] = {}  # <0x41>, which stands for a byte that no ordinary piece begins with
        for piece, index in self._tokenizer.get_vocab().items():
            into = table
            if index in added:
                data = added[index]
            elif alphabet is not None:
                data = bytes(alphabet[character] for character in piece)
            elif found := BYTE_PIECE.fullmatch(piece):
                data, into = bytes([int(found[1], 16)]), fallback
            else:
                data = piece.replace("\u2581", " ").encode()
            into[data] = AMBIGUOUS if data in into else index
        return fallback | table


def _byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level vocabularies write bytes with, GPT-2's choice."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
