"""What all shards of a folder have in common."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_kernels import _check
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.journal import encode_line, parse_lines
from kd_kernels.cache.sources import LocalFolder, SourceFolder
from kd_kernels.cache.storage import sync_folder, system_errors

__all__ = ["VERSION", "CacheManifest", "check_same", "create_manifest", "read_manifest"]

VERSION = 3
MAX_KEPT = (1 << 16) - 1
MAX_VOCAB = 1 << 24
_NAME = "manifest.jsonl"


@dataclass(frozen=True)
class CacheManifest:
    """The identity of a cache. Everything but ``meta`` must be equal for a folder to be opened again.

    Args:
        teacher: which teacher: a hash of its weights and configuration, as hex; of one that only a server has, its name
            and revision, as ``"name@revision"``.
        tokenizer: fingerprint of the tokenizer, as hex.
        vocab: V, the number of real tokens; ids are in ``0..V-1``. At most 2^24.
        k: the most entries that a row may have; at most 65,535.
        mass: the mass at which rows were cut short of ``k``, or None.
        temperatures: at which log Z is stored; dimensionless. At T = 1 it is 0 and takes no space.
        step_nats: log-probabilities are stored to the nearest multiple of it within a row, so that none is off by more
            than ``step_nats / 2`` nats; that of the next token likewise, log Z to ``step_nats / 32`` nats, and the
            tail's mass and the entries' to a factor of ``exp(step_nats / 8)``. 0: fp32, exact.
        head_dtype: dtype in which the teacher's head computed its logits.
        tie_rule: which of two equal logits comes first.
        chat_template: fingerprint of the template that made texts out of messages; ``"none"`` where texts were read as
            they are.
        bos_policy: which special ids the tokenizer put around every text of its own accord, such as ``"1 text"``;
            ``"none"``.
        tail: rows carry the log of the mass that they leave out.
        importance: entries carry importance weights (a sampled teacher).
        meta: names, versions, whatever people want to read later. Not compared.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.
    """

    teacher: str
    tokenizer: str
    vocab: int
    k: int
    mass: float | None = None
    temperatures: tuple[float, ...] = (1.0,)
    step_nats: float = 1 / 16
    head_dtype: str = "float32"
    tie_rule: str = "lower id first"
    chat_template: str = "none"
    bos_policy: str = "none"
    tail: bool = True
    importance: bool = False
    meta: dict[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        where = "CacheManifest"
        for name in ("teacher", "tokenizer", "head_dtype", "tie_rule", "chat_template", "bos_policy"):
            value = getattr(self, name)
            if not isinstance(value, str):
                _check.fail_type(where, name, "a string", type(value).__name__)
            if not value:
                _check.fail(where, name, "a string that is not empty", repr(value))
        for name, most in (("vocab", MAX_VOCAB), ("k", MAX_KEPT)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                _check.fail_type(where, name, "an int", type(value).__name__)
            if not 1 <= value <= most:
                _check.fail(where, name, f"in 1..{most}", value)
        if self.k > self.vocab:
            _check.fail(where, "k", f"at most vocab={self.vocab}", self.k)
        if self.mass is not None:
            object.__setattr__(self, "mass", _check.positive(where, "mass", self.mass, "pass None for no cut"))
            if self.mass > 1.0:
                _check.fail(where, "mass", "at most 1", self.mass)
        temperatures = tuple(_check.positive(where, "temperatures", t) for t in self.temperatures)
        if not temperatures or len(set(temperatures)) != len(temperatures):
            _check.fail(where, "temperatures", "distinct and at least one", temperatures)
        object.__setattr__(self, "temperatures", temperatures)
        if isinstance(self.step_nats, bool) or not isinstance(self.step_nats, (int, float)):
            _check.fail_type(where, "step_nats", "a number", type(self.step_nats).__name__)
        if not (self.step_nats == 0 or 1e-6 <= self.step_nats <= 1):
            _check.fail(where, "step_nats", "0 (exact) or in 1e-6..1 nats", self.step_nats)
        object.__setattr__(self, "step_nats", float(self.step_nats))
        for name in ("tail", "importance"):
            if not isinstance(getattr(self, name), bool):
                _check.fail_type(where, name, "a bool", type(getattr(self, name)).__name__)
        if not isinstance(self.meta, dict) or any(not isinstance(x, str) for pair in self.meta.items() for x in pair):
            _check.fail_type(where, "meta", "a dict of strings", repr(self.meta))

    @property
    def stored_temperatures(self) -> tuple[float, ...]:
        """The temperatures whose log Z takes space: all but 1, where it is 0."""
        return tuple(t for t in self.temperatures if t != 1.0)


_IDENTITY = tuple(f.name for f in dataclasses.fields(CacheManifest) if f.compare)


def create_manifest(folder: Path, manifest: CacheManifest, scratch: str) -> bytes:
    """Writes the manifest of a new folder, or compares with the one that is there. Returns the digest of the identity.

    ``scratch`` is a file name that no other process uses.
    """
    path, temporary = folder / _NAME, folder / scratch
    with system_errors(path, "creating the manifest"):
        if not path.exists():
            identity: dict[str, Any] = {"version": VERSION} | {name: getattr(manifest, name) for name in _IDENTITY}
            with open(temporary, "wb") as file:
                file.write(encode_line(identity) + encode_line(manifest.meta))
                file.flush()
                os.fsync(file.fileno())
            # A link, unlike a rename, never replaces: of several processes that start at once, one makes the manifest.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
            sync_folder(folder)
        temporary.unlink(missing_ok=True)
    there, digest = read_manifest(LocalFolder(folder))
    check_same(path, manifest, there, "a folder holds one cache")
    return digest


def check_same(path: Path | str, expected: CacheManifest, found: CacheManifest, remedy: str) -> None:
    """Raises CacheError with the first field in which the identity of two caches differs."""
    for name in _IDENTITY:
        wanted, there = getattr(expected, name), getattr(found, name)
        if wanted != there:
            raise CacheError.mismatch(path, 0, f"manifest.{name}", wanted, there, remedy)


def read_manifest(folder: SourceFolder, **expected: str | None) -> tuple[CacheManifest, bytes]:
    """The manifest of a folder, and the 128-bit digest of its identity that every shard carries.

    ``expected`` names fields that must have a given value (None: any).
    """
    path = folder.path(_NAME)
    lines = parse_lines(path, folder.read(_NAME))
    if len(lines) != 2:
        raise CacheError.mismatch(path, 0, "whole lines of the manifest", 2, len(lines))
    (_, body, identity), (_, _, meta) = lines
    version = identity.pop("version", None)
    if version != VERSION:
        remedy = "build the cache again, or read it with the release that wrote it"
        raise CacheError.mismatch(path, 0, "format version", VERSION, version, remedy)
    if set(identity) != set(_IDENTITY):
        raise CacheError.mismatch(path, 0, "fields of the manifest", sorted(_IDENTITY), sorted(identity))
    try:
        manifest = CacheManifest(**identity, meta=meta)
    except (TypeError, ValueError) as error:
        raise CacheError.mismatch(path, 0, "fields of the manifest", "what a CacheManifest takes", error) from error
    for name, value in expected.items():
        if value is not None and value != getattr(manifest, name):
            raise CacheError.mismatch(path, 0, f"manifest.{name}", value, getattr(manifest, name))
    return manifest, hashlib.blake2b(body, digest_size=16).digest()
