"""The name of a sequence: what was scored, by whom, and how it was laid out."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from kd_kernels import _check
from kd_kernels.cache.codec import to_bytes
from kd_kernels.cache.manifest import CacheManifest

__all__ = ["content_key"]


FIELDS = ("teacher", "head_dtype", "tokenizer", "chat_template", "bos_policy")
"""What of the manifest says whose rows they are: a copy of them under another of these would be another teacher's."""


def content_key(tokens: Tensor, manifest: CacheManifest, layout: Sequence[int] | None = None) -> bytes:
    """The 128-bit key of a sequence: BLAKE2b of the teacher, how it read and answered, the layout and the token ids.

    The same in every process, version of Python and machine, whatever batch, pack, epoch or world size the sequence is
    met in. Two sequences share a key only if all of it is equal (a collision among a billion sequences is less likely
    than one in 10^20).

    Args:
        tokens: int64 or int32 ``[L]``, L >= 2: L tokens have L - 1 rows, and fewer than two have none.
        manifest: the cache's. Of its fields the teacher, the dtype of its head, the tokenizer, the chat template and
            the BOS policy enter.
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
    if not isinstance(manifest, CacheManifest):
        _check.fail_type(where, "manifest", "a CacheManifest", type(manifest).__name__)
    low, high = (int(extreme) for extreme in tokens.aminmax())
    if low < 0 or high >= manifest.vocab:
        _check.fail(where, "tokens", f"ids in 0..{manifest.vocab - 1}", low if low < 0 else high)
    segments = (length,) if layout is None else tuple(layout)
    if sum(segments) != length or any(segment < 1 for segment in segments):
        _check.fail(where, "layout", f"positive lengths that add up to L={length}", list(segments))
    digest = hashlib.blake2b(b"kd-kernels cache key 2\n", digest_size=16)
    for name in FIELDS:
        text = getattr(manifest, name).encode()
        digest.update(struct.pack("<I", len(text)) + text)
    digest.update(struct.pack(f"<I{len(segments)}I", len(segments), *segments))
    digest.update(to_bytes(tokens.detach().to("cpu", torch.int32)))
    return digest.digest()
