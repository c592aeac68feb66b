"""The files are what FORMAT.md says: read here by a second reader, in plain Python, written from that text alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

import kd_kernels.cache
from cache_builders import assert_rows, example, manifest, write
from kd_kernels.cache import CacheReader, content_key
from kd_kernels.cache.codec import RowModel
from kd_kernels.cache.format import IndexEntry, Piece, ShardHeader, encode_block, encode_index, encode_model
from kd_kernels.cache.shard import Shard

# The second reader. It shares no line with the library.


def checked_lines(path: Path) -> list[bytes]:
    bodies = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        body = line[len('{"crc32":"01234567","record":') : -1]
        assert line == b'{"crc32":"%08x","record":%s}' % (zlib.crc32(body), body)
        bodies.append(body)
    return bodies


def plain_key(identity: dict, tokens: list[int], segments: list[int]) -> bytes:
    text = b"kd-kernels cache key 2\n"
    for name in ("teacher", "head_dtype", "tokenizer", "chat_template", "bos_policy"):
        text += struct.pack("<I", len(identity[name].encode())) + identity[name].encode()
    text += struct.pack(f"<I{len(segments)}I", len(segments), *segments)
    return hashlib.blake2b(text + struct.pack(f"<{len(tokens)}I", *tokens), digest_size=16).digest()


class PlainCode:
    """Section 4.1: sixteen lanes, words and bits."""

    def __init__(self, data: bytes) -> None:
        *self.lanes, count = struct.unpack_from("<17I", data)
        self.words = list(struct.unpack_from(f"<{count}H", data, 68))[::-1]
        self.rest, self.left = int.from_bytes(data[68 + 2 * count :], "little"), 8 * (len(data) - 68 - 2 * count)

    def bits(self, count: int) -> int:
        value, self.rest, self.left = self.rest & (1 << count) - 1, self.rest >> count, self.left - count
        assert self.left >= 0
        return value

    def gamma(self) -> int:
        zeros = 0
        while zeros < 31 and self.bits(1) == 0:
            zeros += 1
        return (1 << zeros) + self.bits(zeros)

    def run(self, contexts: Iterable[list[int]]) -> Iterator[int]:
        """Numbers of which the i-th has the i-th context, which may depend on the rows of the numbers before."""
        for i, frequencies in enumerate(contexts):
            yield self._number(i % 16, frequencies)

    def _number(self, lane: int, frequencies: list[int]) -> int:
        slot, start, symbol = self.lanes[lane] % 2048, 0, 0
        while start + frequencies[symbol] <= slot:
            start, symbol = start + frequencies[symbol], symbol + 1
        state = frequencies[symbol] * (self.lanes[lane] // 2048) + slot - start
        self.lanes[lane] = state << 16 | self.words.pop() if state < 1 << 16 else state
        if symbol == len(frequencies) - 1:
            return self.bits(32)
        if symbol < 16:
            return symbol
        octave = symbol // 2 - 4
        return (2 + symbol % 2 << octave - 1) + self.bits(octave - 1)

    def end(self) -> None:
        assert self.lanes == [1 << 16] * 16 and not self.words and self.left < 8 and self.rest == 0


def signed(value: int) -> int:
    return -(value + 1) // 2 if value % 2 else value // 2


def plain_model(identity: dict, payload: bytes) -> tuple[list[list[int]], list[int], int]:
    """The frequencies of all contexts, the ids by rank, and whether the model ranks them."""
    code, contexts = PlainCode(payload), []
    for _ in range(59 + sum(t != 1 for t in identity["temperatures"])):
        alphabet = code.gamma()
        assert alphabet <= 73
        frequencies = [code.gamma() for _ in range(alphabet - 1)]
        contexts.append([*frequencies, 2048 - sum(frequencies)])
        assert contexts[-1][-1] > 0
    ids = list(range(identity["vocab"]))
    is_ranked = code.bits(1)
    if is_ranked:
        levels = list(code.run(contexts[5] for _ in ids))
        assert max(levels) < 32
        ids.sort(key=lambda id: -levels[id])
    code.end()
    return contexts, ids, is_ranked


def plain_payload(identity: dict, payload: bytes, model: tuple, rows: int, in_block: int) -> list[dict | None]:
    contexts, frozen, is_ranked = model
    id_of_rank = list(frozen)
    code, step, k = PlainCode(payload), identity["step_nats"], identity["k"]
    exact = lambda: struct.unpack("<f", struct.pack("<I", code.bits(32)))[0]  # noqa: E731
    run = lambda numbers: code.run(contexts[number] for number in numbers)  # noqa: E731
    missing = list(run(0 for _ in range(rows)))
    block = [{"n": k + 1 - m, "ranks": [], "gaps": []} if m else None for m in missing]
    cached = [row for row in block if row]
    assert all(row["n"] > 0 for row in cached) and sum(row["n"] for row in cached) == in_block
    longest = max((row["n"] for row in cached), default=0)
    column = lambda j: sorted((row for row in cached if row["n"] > j), key=lambda row: -row["n"])  # noqa: E731
    places = [0 if j == 0 else min(j.bit_length(), 7) for j in range(longest)]
    if step:
        for row in column(0):
            row["fraction"] = code.bits(8)
        for j in range(longest):
            for row, gap in zip(column(j), run(7 + places[j] for _ in column(j))):
                row["gaps"].append(gap)
    for row in cached:
        row["levels"] = list(itertools.accumulate(row["gaps"]))
        row["ties"] = [bool(step) and j > 1 and row["gaps"][j] == 0 for j in range(row["n"])] + [False]
        if step:
            row["logprobs"] = [-step * (level + row["fraction"] / 256) for level in row["levels"]]
        else:
            row["logprobs"] = [exact() for _ in range(row["n"])]
    for j in range(longest):
        numbers = [
            (31 + 2 * min(max(row["ranks"][-1], 1).bit_length() - 1, 13) if row["ties"][j] else 15 + 2 * places[j])
            + row["ties"][j + 1] for row in column(j)
        ]
        for row, number in zip(column(j), run(numbers)):
            row["ranks"].append(row["ranks"][-1] + 1 + number if row["ties"][j] else number)
    for row in cached:
        row["weights"] = [exact() if identity["importance"] else None for _ in range(row["n"])]
        row["tail"], row["log_z"] = None, []
    if identity["tail"]:
        numbers = [1 if row["n"] == k else 2 for row in cached]
        cut_tail = 0
        for row, value in zip(cached, run(numbers) if step else (exact() for _ in cached)):
            if not step:
                row["tail"] = value
            elif value == 0:
                row["tail"] = -math.inf
            else:
                units = signed(value - 1) + (cut_tail if row["n"] < k else -4 * min(row["levels"][-1], 1 << 20))
                cut_tail = units if row["n"] < k else cut_tail
                odds = units * step / 4
                row["tail"] = odds if odds < -40 else -math.log1p(math.exp(-odds))
    context = 59
    for t in identity["temperatures"]:
        if t == 1:
            values = [0.0 for _ in cached]
        elif step:
            values = [z * step / 16 for z in itertools.accumulate(map(signed, run(context for _ in cached)))]
        else:
            values = [exact() for _ in cached]
        context += t != 1
        for row, value in zip(cached, values):
            row["log_z"].append(value)
    for row in cached:  # entries in their order, and the ranks of the next row
        ids, order = [id_of_rank[rank] for rank in row["ranks"]], row["levels"] or range(row["n"])
        first, *others = zip(order, ids, row["logprobs"], row["weights"])
        entries = [first, *sorted(others, key=lambda entry: entry[:2])]
        _, row["ids"], row["logprobs"], row["weights"] = map(list, zip(*entries))
        for rank in row["ranks"] if is_ranked else []:
            if rank >= 16:
                other = rank // 2 if rank < 8192 else rank // 4
                id_of_rank[rank], id_of_rank[other] = id_of_rank[other], id_of_rank[rank]
    not_kept = []
    for row, value in zip(cached, run(3 for _ in cached)):
        if value == 2:
            not_kept.append(row)
        else:
            row["next"] = row["logprobs"][value - 3] if value > 2 else [math.nan, -math.inf][value]
    for row, value in zip(not_kept, run(4 for _ in not_kept) if step else (exact() for _ in not_kept)):
        row["next"] = -step * value if step else value
    code.end()
    return block


def plain_read(folder: Path) -> tuple[dict, dict[bytes, list[dict]]]:
    """Identity, and rows by key (None: not cached), of a whole cache."""
    body, _ = checked_lines(folder / "manifest.jsonl")
    identity = json.loads(body)
    assert identity["version"] == 3
    digest = hashlib.blake2b(body, digest_size=16).digest()
    sequences = {}
    for journal in folder.glob("*.journal"):
        for record in map(json.loads, checked_lines(journal)):
            shard = (folder / f"{journal.stem}-{record['number']:06d}.kdc").read_bytes()
            assert len(shard) == record["bytes"]
            header = struct.pack("<8sII16s24s4x", b"KDCACHE\n", 3, record["number"], digest, journal.stem.encode())
            seed = zlib.crc32(header)
            assert shard[:64] == header + struct.pack("<I", seed)
            index_at, count, crc, magic = struct.unpack("<QQI8s", shard[-28:])
            assert magic == b"KDCINDEX" and crc == zlib.crc32(shard[index_at:-12], seed)
            assert f"{crc:08x}" == record["index_crc32"] and index_at + 40 * count == len(shard) - 28
            assert count == record["sequences"]
            models = {}
            for key, offset, size, rows, cached in struct.iter_unpack("<16sQQII", shard[index_at:-28]):
                found, stop = [], offset + size
                while offset < stop:
                    magic, crc, own, at, pieces, payload, entries = struct.unpack_from("<4sIQQIII", shard, offset)
                    end = offset + 36 + 28 * pieces + payload
                    assert magic == b"KDCB" and own == offset and crc == zlib.crc32(shard[offset + 8 : end], seed)
                    table = list(struct.iter_unpack("<16sIIHH", shard[offset + 36 : offset + 36 + 28 * pieces]))
                    in_block = sum(piece[3] for piece in table)
                    assert 1 <= in_block <= 256
                    if at not in models:
                        magic, crc, own, size = struct.unpack_from("<4sIQI", shard, at)
                        assert 64 <= at < offset and magic == b"KDCM" and own == at
                        assert crc == zlib.crc32(shard[at + 8 : at + 20 + size], seed)
                        models[at] = plain_model(identity, shard[at + 20 : at + 20 + size])
                    block = plain_payload(identity, shard[end - payload : end], models[at], in_block, entries)
                    for piece_key, whole, first, n, n_cached in table:
                        part, block = block[:n], block[n:]
                        assert n_cached == sum(row is not None for row in part)
                        if piece_key == key:
                            assert whole == rows and first == len(found)
                            found += part
                    offset = end
                assert len(found) == rows and sum(row is not None for row in found) == cached
                sequences[key] = found
    return identity, sequences


# The tests.


@pytest.mark.parametrize("fields", [
    {},
    {"vocab": 24},  # few enough that the model ranks them, and more than the ranks that are final
    {"step_nats": 0, "vocab": 257},
    {"importance": True, "tail": False, "vocab": 70000, "temperatures": (0.5, 1.0, 3.0)},
])
def test_a_second_reader_agrees(tmp_path, fields):
    cache = manifest(**fields)
    random = torch.Generator().manual_seed(0)
    examples = [
        example(length, length, cache, torch.randint(9, (length - 1,), generator=random))
        for length in (2, 3, 5, 40, 7, 33)
    ]
    far = examples[2].targets.logprobs
    far[-1] -= 40  # an escaped gap
    examples[3].next_logprobs[::7] = math.nan
    examples[3].next_logprobs[(examples[3].targets.ids[:, None] != examples[3].tokens[None]).all(0)[1:]] = -math.inf
    write(tmp_path, cache, examples, rows_per_block=10, rows_per_shard=30)
    identity, sequences = plain_read(tmp_path)
    reader = CacheReader(tmp_path)
    assert len(sequences) == len(reader) == len(examples) and set(sequences) == set(reader.keys())
    for item in examples:
        length = len(item.tokens)
        rows = sequences[plain_key(identity, item.tokens.tolist(), [length])]
        found = reader.lookup(item.tokens)
        assert len(rows) == length - 1
        for i, row in enumerate(rows):
            entries = slice(int(found.targets.offsets[i]), int(found.targets.offsets[i + 1]))
            if row is None:
                assert entries.start == entries.stop
                continue
            assert row["ids"] == found.targets.ids[entries].tolist()
            assert row["logprobs"] == pytest.approx(found.targets.logprobs[entries].tolist(), rel=1e-6, abs=0)
            close = lambda expected: pytest.approx(expected, rel=1e-6, abs=0, nan_ok=True)  # noqa: E731
            assert row["next"] == close(found.next_logprobs[i].item())
            assert row["log_z"] == close(found.targets.log_z[i].tolist())
            if cache.tail:
                assert row["tail"] == close(found.targets.tail_logprob[i].item())
            if cache.importance:
                assert row["weights"] == found.targets.importance[entries].tolist()


def test_key_is_the_one_of_the_format():
    cache = manifest(teacher="Ünïcode", bos_policy="1 text")
    tokens = torch.tensor([1, 999, 0, 7])
    assert content_key(tokens, cache) == plain_key(vars(cache), [1, 999, 0, 7], [4])
    assert content_key(tokens, cache, [3, 1]) == plain_key(vars(cache), [1, 999, 0, 7], [3, 1])


def test_offsets_beyond_4_gib(tmp_path):
    """A sparse file, with its model and its only block behind holes of 5 GiB and more."""
    cache, item = manifest(), example(5, 0, manifest())
    write(tmp_path, cache, [item])
    key = content_key(item.tokens, cache)
    digest = hashlib.blake2b(checked_lines(tmp_path / "manifest.jsonl")[0], digest_size=16).digest()
    near = (tmp_path / "w0-000000.kdc").read_bytes()
    (model_bytes,) = struct.unpack_from("<I", near, 64 + 16)
    start = 64 + 20 + model_bytes
    (payload_bytes,) = struct.unpack_from("<I", near, start + 28)
    payload = near[start + 36 + 28 :][:payload_bytes]
    header, model_at, offset = ShardHeader("w1", 0, digest), 5 << 30, 6 << 30
    block = encode_block(header.crc, offset, model_at, [Piece(key, 4, 0, 4, 4)], payload, 32)
    entry = IndexEntry(key, offset, len(block), 4, 4)
    with open(tmp_path / header.name, "wb") as file:
        file.write(header.encode())
        file.seek(model_at)
        file.write(encode_model(header.crc, model_at, near[64 + 20 : start]))
        file.seek(offset)
        file.write(block + encode_index(header.crc, offset + len(block), [entry]))
    shard = Shard(tmp_path / header.name, header)
    assert shard.index()[2] == offset + len(block)
    assert_rows(shard.rows(entry, cache), item, cache)


def test_the_vectors_of_the_format():
    text = Path(kd_kernels.cache.__file__).with_name("FORMAT.md").read_text()
    vectors = text[text.index("### 4.6") :].split("```")[1].strip().split("\n\n")
    model, block = (bytes.fromhex(vector.replace("\n", "")) for vector in vectors)
    identity = dict(vocab=40, k=4, temperatures=[1.0, 2.0], step_nats=1 / 16, tail=True, importance=False)
    first, second, third = plain_payload(identity, block, plain_model(identity, model), 3, 6)
    assert second is None
    assert (first["ids"], third["ids"]) == ([7, 3, 30, 21], [7, 5])
    assert (first["logprobs"], third["logprobs"]) == ([-0.5, -2.0, -2.0, -2.75], [-0.125, -3.0])
    assert [row["tail"] for row in (first, third)] == pytest.approx([-3.003986, -2.506910], abs=1e-6)
    assert [(row["log_z"], row["next"]) for row in (first, third)] == [([0.0, 1.5], -2.0), ([0.0, 0.75], -6.25)]
    cache = manifest(vocab=40, k=4, temperatures=(1.0, 2.0))
    found = RowModel(model, cache).decode([(block, 3, 6)])
    assert found.targets.ids.tolist() == first["ids"] + third["ids"]
    assert RowModel(model, cache).encode(found) == block
