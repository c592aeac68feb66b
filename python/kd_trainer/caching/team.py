"""Several processes that fill one folder: who writes under which name, and which documents are whose."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from kd_kernels.cache import CacheError, CacheManifest, CacheWriter
from kd_trainer.caching.options import WHERE, CacheOptions, parse_share
from kd_trainer.errors import fail


@dataclass(frozen=True)
class Team:
    """This process among those that share a cache: of one launcher (torchrun, accelerate), or told so by ``--share``."""

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

    def writer(self, prefix: str) -> str:
        return f"{prefix}{self.rank}"

    def owns(self, key: bytes) -> bool:
        """Whether a sequence is this process's to score.

        By a hash of its key and of the number of processes: what some processes left undone is then shared out evenly among
        any other number of them.
        """
        digest = hashlib.blake2b(key + self.size.to_bytes(4, "little"), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.size == self.rank

    def recover(self, folder: Path, manifest: CacheManifest, prefix: str) -> None:
        """Seal what writers that were killed have left unsealed, so that every process sees it. The first one does it.

        A name that another process holds is left to it.
        """
        if self.rank == 0:
            running = {f"{prefix}{rank}" for rank in range(self.size)} if self.launched is None else set()
            for name in sorted(unsealed_writers(folder) - running):
                try:
                    CacheWriter(folder, manifest, writer=name).close()
                except CacheError as error:
                    if error.path is None or error.path.suffix != ".lock":
                        raise
        self.wait()


def unsealed_writers(folder: Path) -> set[str]:
    """Names of the writers that have a file under construction in a folder."""
    return {path.name.rsplit("-", 1)[0] for path in folder.glob("*.kdc.tmp")}


def check_fresh(folder: Path) -> None:
    """Raise where a folder has rows, for ``--no-resume``."""
    shards: Sequence[Path] = sorted(path for path in folder.glob("*.kdc*") if re.search(r"\.kdc(\.tmp)?$", path.name))
    if shards:
        fail(
            WHERE, "--out", "a folder without rows with --no-resume", f"{len(shards)} shards in {folder}",
            "leave --no-resume out to go on with it",
        )
