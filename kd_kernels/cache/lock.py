"""Who writes under a name: at most one process, on whatever machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
from pathlib import Path
from typing import BinaryIO, NoReturn

from kd_kernels import _check
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.storage import system_errors

__all__ = ["NameHeld", "WriterLock", "writer_name"]

_LONGEST_NAME = 24  # FORMAT.md, section 2
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def writer_name(rank: int = 0) -> str:
    """A writer's name out of the machine's name and a rank: ``node17_3``. Another for every process of a job.

    Args:
        rank: of the process among those of this machine, or of the job.

    Returns:
        1 to 24 characters of A-Z a-z 0-9 _. What of the machine's name does not fit is replaced by a hash of all of it.

    Raises:
        ValueError: ``rank`` is negative, or has more than 8 digits.
    """
    if not 0 <= rank < 10**8:
        _check.fail("writer_name", "rank", "in 0..99999999", rank)
    host, room = platform.node() or "host", _LONGEST_NAME - len(f"_{rank}")
    name = re.sub(r"[^A-Za-z0-9_]", "_", host)
    if name != host or len(name) > room:
        name = name[: room - 9] + "_" + hashlib.blake2b(host.encode(), digest_size=4).hexdigest()
    return f"{name}_{rank}"


class NameHeld(CacheError):
    """Another process writes under this name now."""


class WriterLock:
    """Holds a writer's name in a folder until it is closed or the process ends. Makes the folder.

    The lock is ``flock`` on ``WRITER.lock``, which the kernel lets go of however a process ends, and which network file
    systems carry to the other machines (NFS since Linux 2.6.12, CephFS, GPFS, Lustre with ``-o flock``). Mounted with
    locks that are local (``nolock``, ``local_lock``, ``localflock``) they do not, and nobody can tell. So the file also
    says which process of which machine holds the name, until that lets go of it in order; and what another machine has
    not let go of is refused, until somebody who knows that it is dead removes the file.

    Raises:
        NameHeld: another process holds the name.
        CacheError: one on another machine held it and did not let go of it; or the file system has no locks.
    """

    def __init__(self, folder: Path, writer: str) -> None:
        path = folder / f"{writer}.lock"
        with system_errors(folder, "making the folder"):
            folder.mkdir(parents=True, exist_ok=True)
        remedy = "on a file system without locks no cache can be written: write elsewhere and merge"
        with system_errors(path, "locking the name of the writer", remedy=remedy):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  held open for as long as the writer lives
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                remedy = "one process at a time; give every writer a name of its own"
                self._refuse(NameHeld, path, writer, "held by", remedy)
            holder = _Holder.read(self._file)
            if holder is not None and holder.elsewhere():
                remedy = "if that process is dead, remove the file; else give every writer a name of its own"
                self._refuse(CacheError, path, writer, "not let go of by", remedy)
            self._file.truncate(0)
            self._file.write(_Holder.this().encode())

    def _refuse(self, kind: type[CacheError], path: Path, writer: str, how: str, remedy: str) -> NoReturn:
        holder = _Holder.read(self._file) or "a process that has only just started"
        self._file.close()
        raise kind.mismatch(path, None, f"lock of writer {writer}", "free", f"{how} {holder}", remedy) from None

    def close(self) -> None:
        """Lets go of the name. A second call does nothing."""
        if not self._file.closed:
            with system_errors(Path(self._file.name), "letting go of the name of the writer"):
                self._file.truncate(0)
            self._file.close()


class _Holder:
    """A process, and its machine by name and by when it was started: a container or a restart changes one of these."""

    def __init__(self, process: str, host: str, boot: str) -> None:
        self.process, self.host, self.boot = process, host, boot

    @classmethod
    def this(cls) -> _Holder:
        boot = _BOOT.read_text().strip() if _BOOT.exists() else "unknown"
        return cls(str(os.getpid()), platform.node() or "host", boot)

    @classmethod
    def read(cls, file: BinaryIO) -> _Holder | None:
        """None: nobody, or a process that was stopped before it could write who it is."""
        file.seek(0)
        fields = file.read(4096).decode(errors="replace").split()
        return cls(*fields) if len(fields) == 3 else None

    def elsewhere(self) -> bool:
        here = self.this()
        return self.host != here.host and self.boot != here.boot

    def encode(self) -> bytes:
        return f"{self.process} {self.host} {self.boot}".encode()

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"
