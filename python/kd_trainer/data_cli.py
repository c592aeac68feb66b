"""The keys of :class:`~kd_trainer.config.DataConfig` as options of commands."""

from __future__ import annotations

import argparse

DTYPES = ("float32", "bfloat16", "float16")
"""Here again, because config.py imports torch and a command line should not wait for it."""

NAMES = (
    "split", "text_field", "prompt_field", "completion_field", "messages_field", "max_length", "append_eos", "limit",
    "holdout", "part",
)


def add_data_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    source = "text or .jsonl: file, folder, pattern; or datasets name; or wiki-intros"
    parser.add_argument("--data", required=required, help=source)
    parser.add_argument("--split", help="of a datasets source (train)")
    parser.add_argument("--text-field", help="(text)")
    parser.add_argument("--prompt-field", help="(prompt)")
    parser.add_argument("--completion-field", help="(completion)")
    parser.add_argument("--messages-field", help="of chats, which the tokenizer's template writes out (messages)")
    parser.add_argument("--max-length", type=int, help="tokens of a document (512)")
    parser.add_argument("--append-eos", action="store_true", default=None, help="end texts with the end token")
    parser.add_argument("--limit", type=int, help="as many texts, chosen by hash")
    parser.add_argument("--holdout", type=float, help="fraction of the texts, by hash, that --part train leaves out")
    parser.add_argument("--part", choices=("train", "holdout"), help="(train)")


def data_config(arguments: argparse.Namespace):
    """The :class:`~kd_trainer.config.DataConfig` that was asked for."""
    from kd_trainer.config import DataConfig

    given = {name: value for name in NAMES if (value := getattr(arguments, name)) is not None}
    return DataConfig(source=arguments.data, **given)
