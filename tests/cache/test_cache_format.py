"""The files are what FORMAT.md says: read here by a second reader, in plain Python, written from that text alone."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from pathlib import Path

import pytest
import torch
from cache_builders import example, manifest, write

from kd_kernels.cache import CacheReader, content_key
from kd_kernels.cache.format import IndexEntry, Piece, ShardHeader, encode_block, encode_index
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


def plain_payload(identity: dict, payload: bytes, inflated_bytes: int, rows: int) -> list[dict]:
    data = zlib.decompress(payload)
    assert len(data) == inflated_bytes
    at = 0

    def stream(count: int, size: int) -> list[int]:
        nonlocal at
        planes = [data[at + plane * count : at + (plane + 1) * count] for plane in range(size)]
        at += size * count
        return [sum(planes[b][i] << 8 * b for b in range(size)) for i in range(count)]

    def floats(count: int) -> list[float]:
        return list(struct.unpack(f"<{count}f", struct.pack(f"<{count}I", *stream(count, 4))))

    counts = stream(rows, 2)
    cached, entries, step = sum(n > 0 for n in counts), sum(counts), identity["step_nats"]
    tail = floats(cached) if identity["tail"] else [None] * cached
    log_z = {t: [0.0] * cached if t == 1 else floats(cached) for t in identity["temperatures"]}
    following = floats(cached)
    ids = stream(entries, math.ceil(math.log2(identity["vocab"]) / 8))
    if step:
        fractions, gaps = stream(cached, 1), stream(entries, 1)
        escaped = iter(stream(gaps.count(255), 4))
        gaps = [next(escaped) if gap == 255 else gap for gap in gaps]
    else:
        logprobs = floats(entries)
    weights = floats(entries) if identity["importance"] else [None] * entries
    assert at == len(data)

    decoded, row, entry = [], 0, 0
    for count in counts:
        if count == 0:
            decoded.append(None)
            continue
        if step:
            level, values = 0, []
            for gap in gaps[entry : entry + count]:
                level += gap
                values.append(-step * (level + fractions[row] / 256))
        else:
            values = logprobs[entry : entry + count]
        decoded.append({
            "ids": ids[entry : entry + count], "logprobs": values, "weights": weights[entry : entry + count],
            "tail": tail[row], "next": following[row], "log_z": [log_z[t][row] for t in identity["temperatures"]],
        })
        row, entry = row + 1, entry + count
    return decoded


def plain_read(folder: Path) -> tuple[dict, dict[bytes, list[dict]]]:
    """Identity, and rows by key (None: not cached), of a whole cache."""
    body, _ = checked_lines(folder / "manifest.jsonl")
    identity = json.loads(body)
    assert identity["version"] == 1
    digest = hashlib.blake2b(body, digest_size=16).digest()
    sequences = {}
    for journal in folder.glob("*.journal"):
        for record in map(json.loads, checked_lines(journal)):
            shard = (folder / f"{journal.stem}-{record['number']:06d}.kdc").read_bytes()
            assert len(shard) == record["bytes"]
            header = struct.pack("<8sII16s24s4x", b"KDCACHE\n", 1, record["number"], digest, journal.stem.encode())
            seed = zlib.crc32(header)
            assert shard[:64] == header + struct.pack("<I", seed)
            index_at, count, crc, magic = struct.unpack("<QQI8s", shard[-28:])
            assert magic == b"KDCINDEX" and crc == zlib.crc32(shard[index_at:-12], seed)
            assert f"{crc:08x}" == record["index_crc32"] and index_at + 40 * count == len(shard) - 28
            assert count == record["sequences"]
            for key, offset, size, rows, cached in struct.iter_unpack("<16sQQII", shard[index_at:-28]):
                found, stop = [], offset + size
                while offset < stop:
                    magic, crc, own, pieces, payload, inflated = struct.unpack_from("<4sIQIII", shard, offset)
                    end = offset + 28 + 28 * pieces + payload
                    assert magic == b"KDCB" and own == offset and crc == zlib.crc32(shard[offset + 8 : end], seed)
                    table = list(struct.iter_unpack("<16sIIHH", shard[offset + 28 : offset + 28 + 28 * pieces]))
                    in_block = sum(piece[3] for piece in table)
                    assert 1 <= in_block <= 256
                    block = plain_payload(identity, shard[end - payload : end], inflated, in_block)
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
            assert row["next"] == found.next_logprobs[i]
            assert row["log_z"] == found.targets.log_z[i].tolist()
            if cache.tail:
                assert row["tail"] == found.targets.tail_logprob[i]
            if cache.importance:
                assert row["weights"] == found.targets.importance[entries].tolist()


def test_key_is_the_one_of_the_format():
    cache = manifest(teacher="Ünïcode", bos_policy="1 text")
    tokens = torch.tensor([1, 999, 0, 7])
    assert content_key(tokens, cache) == plain_key(vars(cache), [1, 999, 0, 7], [4])
    assert content_key(tokens, cache, [3, 1]) == plain_key(vars(cache), [1, 999, 0, 7], [3, 1])


def test_offsets_beyond_4_gib(tmp_path):
    """A sparse file, with its only block behind a hole of 5 GiB."""
    cache, item = manifest(), example(5, 0, manifest())
    write(tmp_path, cache, [item])
    key = content_key(item.tokens, cache)
    digest = hashlib.blake2b(checked_lines(tmp_path / "manifest.jsonl")[0], digest_size=16).digest()
    near = (tmp_path / "w0-000000.kdc").read_bytes()
    _, _, _, _, payload, inflated = struct.unpack_from("<4sIQIII", near, 64)
    start = 64 + 28 + 28
    header, offset = ShardHeader("w1", 0, digest), 5 << 30
    block = encode_block(header.crc, offset, [Piece(key, 4, 0, 4, 4)], near[start : start + payload], inflated)
    entry = IndexEntry(key, offset, len(block), 4, 4)
    with open(tmp_path / header.name, "wb") as file:
        file.write(header.encode())
        file.seek(offset)
        file.write(block + encode_index(header.crc, offset + len(block), [entry]))
    shard = Shard(tmp_path / header.name, header)
    assert shard.index()[2] == offset + len(block)
    assert torch.equal(shard.rows(entry, cache).targets.ids, item.targets.ids)
