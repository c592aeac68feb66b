"""Several processes that fill one folder: who writes under which name, and which documents are whose."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from kd_kernels.cache import recover, writer_name
from kd_trainer.caching.options import WHERE, CacheOptions, parse_share
from kd_trainer.errors import fail


@dataclass(frozen=True)
class Team:
    """This process among those that share a cache: of one launcher (torchrun, accelerate), or told so by
    ``--share``."""

    rank: int
    size: int
    device: torch.device
    launched: PartialState | None

    @staticmethod
    def of(options: CacheOptions) -> Team:
        gpu = torch.cuda.is_available()
        if options.share is not None:
            return Team(*parse_share(options.share), torch.device("cuda" if gpu else "cpu"), None)
        state = PartialState(cpu=not gpu)
        return Team(state.process_index, state.num_processes, state.device, state)

    def wait(self) -> None:
        """Until all processes of the launcher are here. Processes that only know their share do not wait."""
        if self.launched is not None:
            self.launched.wait_for_everyone()

    def writer(self, prefix: str | None) -> str:
        """The name that this process writes under, which no other of the team has."""
        return writer_name(self.rank) if prefix is None else f"{prefix}{self.rank}"

    def owns(self, key: bytes) -> bool:
        """Whether a sequence is this process's to score.

        By a hash of its key and of the number of processes: what some processes left undone is then shared out evenly
        among any other number of them.
        """
        digest = hashlib.blake2b(key + self.size.to_bytes(4, "little"), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.size == self.rank

    def recover(self, folder: Path) -> None:
        """Seal what writers that were killed have left unsealed, so that nobody scores it again. The first process does
        it.

        Not with shares: one that is just being started would find its name taken. It seals its own;
        ``kdk cache recover`` is for names that do not come again.
        """
        if self.launched is not None and self.rank == 0 and any(folder.glob("manifest.jsonl")):
            recover(folder)
        self.wait()


def check_fresh(folder: Path) -> None:
    """Raise where a folder has rows, for ``--no-resume``."""
    shards: Sequence[Path] = sorted(path for path in folder.glob("*.kdc*") if re.search(r"\.kdc(\.tmp)?$", path.name))
    if shards:
        fail(
            WHERE, "--out", "a folder without rows with --no-resume", f"{len(shards)} shards in {folder}",
            "leave --no-resume out to go on with it",
        )
