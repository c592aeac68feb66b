"""The name of a sequence: what was scored, by whom, and how it was laid out."""

from __future__ import annotations

import hashlib
import struct
from typing import Sequence

import torch
from torch import Tensor

from kd_kernels import _check
from kd_kernels.cache.codec import to_bytes
from kd_kernels.cache.manifest import CacheManifest

__all__ = ["content_key"]


def content_key(
    tokens: Tensor, manifest: CacheManifest | tuple[str, str], layout: Sequence[int] | None = None
) -> bytes:
    """The 128-bit key of a sequence: BLAKE2b of the teacher, the tokenizer, the layout and the token ids.

    The same in every process and on every machine. Two sequences share a key only if all four are equal (a collision
    among a billion sequences is less likely than one in 10^20).

    Args:
        tokens: int64 or int32 ``[L]``, L >= 2: L tokens have L - 1 rows, and fewer than two have none.
        manifest: the cache's, or the fingerprints (teacher, tokenizer).
        layout: where the teacher started afresh, as lengths of segments that add up to L (documents of a packed
            sequence that do not see each other). None: one segment.

    Returns:
        16 bytes.

    Raises:
        TypeError, ValueError: ``tokens`` or ``layout`` are not as above, or an id is outside of the vocabulary.
    """
    where = "content_key"
    if _check.integral(where, "tokens", tokens).dim() != 1 or tokens.shape[0] < 2:
        _check.fail(where, "tokens", "of shape [L], L >= 2", list(tokens.shape))
    length = tokens.shape[0]
    if isinstance(manifest, CacheManifest):
        fingerprints, vocab = (manifest.teacher, manifest.tokenizer), manifest.vocab
    elif isinstance(manifest, tuple) and [type(part) for part in manifest] == [str, str]:
        fingerprints, vocab = manifest, 1 << 31
    else:
        _check.fail_type(where, "manifest", "a CacheManifest or two fingerprints", repr(manifest))
    low, high = (int(extreme) for extreme in tokens.aminmax())
    if low < 0 or high >= vocab:
        _check.fail(where, "tokens", f"ids in 0..{vocab - 1}", low if low < 0 else high)
    segments = (length,) if layout is None else tuple(layout)
    if sum(segments) != length or any(segment < 1 for segment in segments):
        _check.fail(where, "layout", f"positive lengths that add up to L={length}", list(segments))
    digest = hashlib.blake2b(b"kd-kernels cache key 1\n", digest_size=16)
    for fingerprint in fingerprints:
        text = fingerprint.encode()
        digest.update(struct.pack("<I", len(text)) + text)
    digest.update(struct.pack(f"<I{len(segments)}I", len(segments), *segments))
    digest.update(to_bytes(tokens.detach().to("cpu", torch.int32)))
    return digest.digest()
