"""Several processes of one job on this machine, as torchrun starts them: over gloo, on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait


def launch(command: Sequence[str], processes: int = 2, *, folders: Sequence[str] = (), timeout: float) -> list[str]:
    """Run ``python *command`` in every process, and return what each printed. One that fails is a failure of the test.

    None outlives the call: where one fails, or ``timeout`` seconds pass, all are killed. ``folders`` go before this
    process's own import path.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    with ThreadPoolExecutor(processes) as readers:
        try:
            for rank in range(processes):
                env = os.environ | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([*folders, *sys.path]),
                }
                running.append(subprocess.Popen(
                    [sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                ))
            outputs = [readers.submit(_output, process) for process in running]
            wait(outputs, timeout, FIRST_EXCEPTION)
        finally:
            for process in running:
                process.kill()  # nothing to one that has ended
    errors = "\n".join(str(output.exception()) for output in outputs if output.exception())
    assert not errors, f"within {timeout} s (-9: killed here, for another one or the time):\n{errors}"
    return [output.result() for output in outputs]


def launch_kdk(arguments: Sequence[str], *, timeout: float) -> list[str]:
    """The same for a ``kdk`` command."""
    program = "import sys; from kd_trainer.cli import main; sys.exit(main(['--traceback', *sys.argv[1:]]))"
    return launch(["-c", program, *arguments], timeout=timeout)


def _output(process: subprocess.Popen) -> str:
    """What a process prints until it ends.

    Raises:
        RuntimeError: it failed; with the end of its stderr.
    """
    output, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"exit status {process.returncode}: {errors[-3000:]}")
    return output
