"""Several processes of one job on this machine, as torchrun starts them: over gloo, on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def launch(command: Sequence[str], processes: int = 2, *, folders: Sequence[str] = (), timeout: float) -> list[str]:
    """Run ``python *command`` in every process, and return what each printed. One that fails is a failure of the test.

    ``folders`` go before this process's own import path; ``timeout`` is in seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*folders, *sys.path]),
        }
        running.append(subprocess.Popen(
            [sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ))
    outputs = [process.communicate(timeout=timeout) for process in running]
    errors = "\n".join(error[-3000:] for _, error in outputs)
    assert [process.returncode for process in running] == [0] * processes, errors
    return [output for output, _ in outputs]


def launch_kdk(arguments: Sequence[str], *, timeout: float) -> list[str]:
    """The same for a ``kdk`` command."""
    program = "import sys; from kd_trainer.cli import main; sys.exit(main(['--traceback', *sys.argv[1:]]))"
    return launch(["-c", program, *arguments], timeout=timeout)
