"""A text, a tokenizer and a teacher out of nothing, in seconds: for ``kdk demo --offline-tiny`` and for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kd_trainer.config import Config, DataConfig, OptimConfig, StudentConfig, TrainConfig
from kd_trainer.files import new_folder
from kd_trainer.trainer import train

NOUNS = ("cat", "dog", "sailor", "lamp", "river", "teacher", "student", "engine", "garden", "violin")
VERBS = ("sees", "follows", "paints", "remembers", "lifts", "hears")
PLACES = ("near the old mill", "behind the house", "under a grey sky", "at noon", "by the sea")
ADJECTIVES = ("small", "green", "quiet", "broken", "curious")


def make_tiny(folder: Path) -> tuple[Path, Path]:
    """A teacher's folder, and a JSONL text that it has not seen, of the same kind as what it was trained on.

    Made once, in some ten seconds, and the same every time.
    """
    untrained, lessons, text = folder / "untrained", folder / "lessons.jsonl", folder / "text.jsonl"
    if not untrained.is_dir():
        with new_folder(untrained) as temporary:
            torch.manual_seed(0)
            save_tiny_model(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    _write(lessons, tiny_texts(4000, seed=0))
    _write(text, tiny_texts(120, seed=1))
    config = Config(
        out=str(folder / "teacher"), method="sft", student=StudentConfig(model=str(untrained)),
        data=DataConfig(source=str(lessons), max_length=96), optim=OptimConfig(lr=5e-3),
        train=TrainConfig(steps=200, batch_tokens=1024, tensorboard=False, plot=False),
    )
    return train(config), text


def _write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def tiny_texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of a small grammar with unequal choices, 40 to 70 characters each."""
    draw = random.Random(seed)
    pick = lambda words: draw.choices(words, range(len(words), 0, -1))[0]  # noqa: E731
    sentences = []
    for _ in range(count):
        adjective = f"{pick(ADJECTIVES)} " if draw.random() < 0.5 else ""
        sentences.append(f"the {adjective}{pick(NOUNS)} {pick(VERBS)} a {pick(NOUNS)} {pick(PLACES)}.")
    return sentences


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0} | {character: i for i, character in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def save_tiny_model(folder: Path, layers: int = 4) -> None:
    """A Llama of 64 dimensions with random weights, and its tokenizer."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
