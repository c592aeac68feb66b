"""The codec of the teacher cache on rows of SmolLM2-135M-Instruct: bytes by stream, divergence, speed, and other
layouts.

``python -m bench.cache_codec [--rows 20000] [--captured FOLDER] [--out bench/results/cpu_cache_codec.json]`` scores
documents (some ten minutes a corpus on one core; kept in FOLDER, and taken from there the next time), writes them as
caches and reads these back. Corpora: introductions of Wikipedia's articles and the Python of the standard library. Half
of the documents are for learning, the other half are the unseen ones that are measured. Bytes are of whole folders,
index and all, divided by rows:

- ``cold``: a cache of the unseen rows alone, whose writer learns its models from them as it goes;
- ``warm``: what the same rows add to a cache that has as many rows of the other documents already, as in a larger
  cache.

``triple``: every id stands for three, one of which is drawn at random: V = 147,456, near Qwen's 151,936, and the most
that such a vocabulary can cost (1.58 bits an entry), because nothing tells which of the three it is.

Speeds are the best of rounds that go over all cases, so that those of a case are minutes apart.

``reader``: sequences read in random order, from the files to a loss's targets, beside what a student of ten of the
teacher's layers trains on at full speed (forward, loss, backward, AdamW; one thread each).

Other layouts are emulations of the packing alone, on the same entries: Megatron-LM's (fp16 value, 16 bits and one of
the id; zlib here for its zstd) and DistillKit's at k = 50 with its "budget" settings (14 bytes of values, 16-bit ids).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import machine
from kd_kernels import LinearLogits, SparseTargets, kd_loss, topk_targets
from kd_kernels.cache import CachedRows, CacheManifest, CacheReader, CacheWriter
from kd_kernels.cache.codec import RowModel, learn_model, to_bytes
from kd_kernels.cache.rows import canonical_rows
from kd_trainer.assets import smollm2, wiki_intros
from kd_trainer.models import cut_layers

RESULT = Path(__file__).resolve().parent / "results" / "cpu_cache_codec.json"
VOCAB, K, MOST_TOKENS, ROWS_PER_BLOCK = 49_152, 64, 768, 128

Sequence = tuple[Tensor, SparseTargets, Tensor]
"""Tokens, teacher, and the log-probabilities of the next tokens."""


def texts(corpus: str) -> list[str]:
    if corpus == "wiki":
        found = wiki_intros()
    else:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
        files = [file for file in files if not {"site-packages", "test", "tests", "idlelib"} & set(file.parts)]
        found = [text for file in files if len(text := file.read_text("utf8", "ignore")[:6000]) > 500]
    random.Random(0).shuffle(found)
    return found


@torch.no_grad()
def score(model, tokenizer, documents: list[str], rows: int) -> Iterator[Sequence]:
    """Sequences of at least ``rows`` rows together, k = 64 with log Z at T = 1 only."""
    weight = model.get_output_embeddings().weight.detach()
    for text in documents:
        tokens = torch.tensor(tokenizer(text)["input_ids"][:MOST_TOKENS])
        if len(tokens) < 8:
            continue
        hidden = model.model(tokens[None, :-1]).last_hidden_state[0]
        logprobs = (hidden @ weight.T).log_softmax(1)
        following = logprobs.gather(1, tokens[1:, None])[:, 0]
        yield tokens, topk_targets(LinearLogits(hidden, weight), K), following
        rows -= len(hidden)
        if rows <= 0:
            return


def cut_at(sequence: Sequence, mass: float) -> Sequence:
    """The shortest prefix of each row that reaches the mass, with what it leaves out in the tail."""
    tokens, targets, following = sequence
    logprobs = targets.logprobs.view(-1, K).double()
    before = logprobs.exp().cumsum(1) - logprobs.exp()
    kept = before < mass
    tail = torch.logaddexp(targets.tail_logprob.double(), logprobs.masked_fill(kept, -math.inf).logsumexp(1)).float()
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    flat = kept.flatten()
    return tokens, SparseTargets(offsets, targets.ids[flat], targets.logprobs[flat], tail), following


def triple(sequence: Sequence) -> Sequence:
    tokens, targets, following = sequence
    generator = torch.Generator().manual_seed(len(tokens))
    ids = 3 * targets.ids + torch.randint(3, targets.ids.shape, generator=generator)
    return 3 * tokens, SparseTargets(targets.offsets, ids, targets.logprobs, targets.tail_logprob), following


def folder_bytes(sequences: list[Sequence], manifest: CacheManifest, folder: Path) -> int:
    with CacheWriter(folder, manifest) as writer:
        for tokens, targets, following in sequences:
            writer.add(tokens, targets, next_logprobs=following)
    return sum(file.stat().st_size for file in folder.iterdir())


def divergence(sequences: list[Sequence], folder: Path) -> dict[str, float]:
    """KL(exact || decoded) in nats over entries and tail, as rows come to a loss."""
    reader, found = CacheReader(folder), []
    for tokens, targets, _ in sequences:
        decoded = reader.targets(tokens)
        row = targets.row_of_entry()
        order, decoded_order = ((row * (1 << 24) + each.ids).argsort() for each in (targets, decoded))
        exact, rounded = targets.logprobs.double()[order], decoded.logprobs.double()[decoded_order]
        tail = targets.tail_logprob.double()
        kl = tail.exp() * (tail - decoded.tail_logprob.double())
        found.append(kl.index_add_(0, row, exact.exp() * (exact - rounded)))
    kl = torch.cat(found)
    return {"kl_mean": float(kl.mean()), "kl_max": float(kl.max())}


def blocks_of(sequences: list[Sequence], manifest: CacheManifest) -> list[CachedRows]:
    rows = CachedRows.cat([canonical_rows("bench", *each, None, manifest) for each in sequences])
    return [rows.slice(i, i + ROWS_PER_BLOCK) for i in range(0, len(rows), ROWS_PER_BLOCK)]


class Codec:
    """The codec on a case's unseen rows, in blocks, under a model of its known rows.

    Attributes:
        streams: bytes a row.
        speeds: rows a second of processor time, the best of all rounds so far. Decoded are as many blocks a call as a
            reader decodes of a sequence of 1,025 tokens; and, apart, one.
    """

    def __init__(self, known: list[Sequence], unseen: list[Sequence], manifest: CacheManifest) -> None:
        learnt, blocks = blocks_of(known, manifest), blocks_of(unseen, manifest)
        counts = torch.bincount(torch.cat([block.targets.ids for block in learnt]), minlength=manifest.vocab).int()
        model = RowModel(learn_model(learnt, counts, manifest), manifest)
        self._rows = sum(len(block) for block in blocks)
        self.streams: dict[str, float] = {}
        for block in blocks:
            for name, bits in model.bits(block).items():
                self.streams[name] = self.streams.get(name, 0.0) + bits / 8 / self._rows
        coded = [(model.encode(block), len(block), block.targets.ids.shape[0]) for block in blocks]
        self._ways = {
            "encode": (model.encode, blocks),
            "decode": (model.decode, [coded[i : i + 8] for i in range(0, len(coded), 8)]),
            "decode, a block a call": (model.decode, [[block] for block in coded]),
        }
        self.speeds = dict.fromkeys(self._ways, 0.0)

    def time(self) -> None:
        """A round."""
        for name, (call, inputs) in self._ways.items():
            start = time.process_time()
            for each in inputs:
                call(each)
            self.speeds[name] = max(self.speeds[name], self._rows / (time.process_time() - start))


def other_layouts(unseen: list[Sequence]) -> dict[str, float]:
    """Bytes a row of the packings alone: without an index, checksums, or anything that says whose rows they are."""
    rows = sum(len(each[2]) for each in unseen)
    packed = 0
    for _, targets, _ in unseen:
        ids = targets.ids.int()
        low = ids.view(torch.int16)[::2].contiguous()  # of a little-endian machine
        parts = (targets.logprobs.half().view(torch.int16), low, (ids >> 16).to(torch.uint8))
        packed += len(zlib.compress(b"".join(bytes(to_bytes(part)) for part in parts)))
    return {"megatron, k=64": packed / rows, "distillkit budget, k=50": 14 + 50 * 16 / 8}


def measure(
    known: list[Sequence], unseen: list[Sequence], step: float, vocab: int, mass: float | None
) -> tuple[dict[str, object], Codec]:
    """What does not depend on the moment, and the codec to be timed."""
    manifest = CacheManifest(teacher="SmolLM2", tokenizer="SmolLM2", vocab=vocab, k=K, mass=mass, step_nats=step)
    rows = sum(len(each[2]) for each in unseen)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        cold = folder_bytes(unseen, manifest, place / "cold")
        before = folder_bytes(known, manifest, place / "known")
        both = folder_bytes(known + unseen, manifest, place / "both")
        entries = sum(each[1].ids.shape[0] for each in unseen) / rows
        found = {
            "entries": entries, "cold": cold / rows, "warm": (both - before) / rows,
            **divergence(unseen, place / "cold")
        }
    codec = Codec(known, unseen, manifest)
    return found | {"streams": codec.streams}, codec


def captured(corpus: str, rows: int, folder: Path | None) -> tuple[list[Sequence], list[Sequence]]:
    """What to learn from, and what is unseen: out of the folder where it is there, else scored."""
    file = None if folder is None else folder / f"{corpus}-{rows}.pt"
    if file is None or not file.exists():
        model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
        tokenizer, documents = AutoTokenizer.from_pretrained(smollm2()), texts(corpus)
        half = len(documents) // 2
        halves = [list(score(model, tokenizer, part, rows)) for part in (documents[:half], documents[half:])]
        if file is None:
            return tuple(halves)
        folder.mkdir(parents=True, exist_ok=True)
        fields = lambda rows: (rows.offsets, rows.ids, rows.logprobs, rows.tail_logprob)  # noqa: E731
        torch.save([[(tokens, *fields(rows), after) for tokens, rows, after in half] for half in halves], file)
    return tuple(
        [(tokens, SparseTargets(*fields), after) for tokens, *fields, after in half] for half in torch.load(file)
    )


def reading(sequences: list[Sequence], repeats: int) -> float:
    """Rows a second of processor time that come out of a cache of these sequences, in random order."""
    manifest = CacheManifest(teacher="SmolLM2", tokenizer="SmolLM2", vocab=VOCAB, k=K, step_nats=1 / 16)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0)).tolist()
    rows, best = sum(len(each[2]) for each in sequences), 0.0
    with tempfile.TemporaryDirectory() as folder:
        folder_bytes(sequences, manifest, Path(folder) / "cache")
        for _ in range(repeats):
            start = time.process_time()
            reader = CacheReader(Path(folder) / "cache")
            for i in order:
                reader.targets(sequences[i][0])
            best = max(best, rows / (time.process_time() - start))
    return best


def training(sequences: list[Sequence], repeats: int) -> float:
    """Tokens a second of processor time that a student of ten layers trains on, its teacher's rows at hand."""
    student = cut_layers(AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32), tuple(range(0, 30, 3)))
    optimizer, best = torch.optim.AdamW(student.parameters(), lr=1e-5), 0.0
    for tokens, targets, _ in sequences[:repeats]:
        start = time.process_time()
        hidden = student.model(tokens[None, :-1]).last_hidden_state[0]
        kd_loss(LinearLogits(hidden, student.lm_head.weight), targets, "forward_kl").loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        best = max(best, len(hidden) / (time.process_time() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="of each half of a corpus")
    parser.add_argument("--captured", type=Path, help="folder of scored rows")
    parser.add_argument("--rounds", type=int, default=20, help="of timing, each over all cases")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, dict[str, object]] = {}
    codecs: dict[str, Codec] = {}

    def add(name: str, *of: object) -> None:
        cases[name], codecs[name] = measure(*of)

    for corpus in ("wiki", "code"):
        known, unseen = captured(corpus, options.rows, options.captured)
        for step in (1 / 32, 1 / 16, 1 / 8):
            add(f"{corpus}, k=64, 1/{round(1 / step)}", known, unseen, step, VOCAB, None)
        cut = [[cut_at(each, 0.98) for each in part] for part in (known, unseen)]
        add(f"{corpus}, mass 0.98, 1/16", *cut, 1 / 16, VOCAB, 0.98)
        tripled = [[triple(each) for each in part] for part in (known, unseen)]
        add(f"{corpus}, triple, k=64, 1/16", *tripled, 1 / 16, 3 * VOCAB, None)
        cases[f"{corpus}, other layouts"] = other_layouts(unseen)
    # A shared machine is slow for minutes at a time: so the rounds of a case are far apart.
    for _ in range(options.rounds):
        for codec in codecs.values():
            codec.time()
    for name, codec in codecs.items():
        cases[name]["rows_per_second"] = codec.speeds
    read, trained = reading(unseen, 5), training(unseen, 10)
    reader = {"rows_per_second": read, "trained_tokens_per_second": trained}
    about = {"moment": machine.moment(), "machine": machine.describe(), "rows": options.rows}
    options.out.write_text(json.dumps(about | {"reader": reader, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
