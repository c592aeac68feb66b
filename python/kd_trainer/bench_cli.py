"""``kdk bench``: the benchmarks of a checkout."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

WHAT = {"peers": "beside torch and other libraries on the same inputs", "ops": "every verb, backend, dtype and mode"}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """The command and its two sub-commands."""
    bench = commands.add_parser("bench", help="measure this library, in a checkout of its repository")
    bench = bench.add_subparsers(required=True, metavar="COMMAND")
    for name, what in WHAT.items():
        command = bench.add_parser(name, help=what)
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
        command.add_argument("--out", type=Path, help=f"JSON file (<device>_{name}.json under runs/bench/)")
        if name == "peers":
            command.add_argument("--only", nargs="+", metavar="NAME", help="of the comparisons (all)")
            command.add_argument("--seconds", type=float, help="of rounds, for each comparison (30; on a GPU 8)")
        else:
            command.add_argument("--only", nargs="+", metavar="WORD", help="rows that have any of these in their names")
        command.add_argument("--tiny", action="store_true", help="on tiny shapes: whether it works, in seconds")
        command.set_defaults(run=_run, what=name)


def checkout() -> Path:
    """The repository that this package is imported from, or the one that the command was called in.

    Raises:
        FileNotFoundError: neither holds the benchmarks, which are not installed with the package.
    """
    places = (Path(__file__).resolve().parents[2], Path.cwd())
    for place in places:
        if (place / "bench" / "side_by_side.py").exists():
            return place
    raise FileNotFoundError(
        f"kdk bench: must run in a checkout of kd-kernels, whose folder bench/ is not installed, got {places[1]}; "
        "clone the repository and call it there"
    )


def command(arguments: argparse.Namespace, out: Path) -> list[str]:
    """What is run in the checkout."""
    common = ["--device", arguments.device] + ["--tiny"] * arguments.tiny
    if arguments.what == "peers":
        only = [] if arguments.only is None else ["--only", *arguments.only]
        seconds = [] if arguments.seconds is None else ["--seconds", str(arguments.seconds)]
        return [sys.executable, "-m", "bench.side_by_side", "--out", str(out), *common, *only, *seconds]
    only = [] if arguments.only is None else ["-k", " or ".join(arguments.only)]
    pytest = [sys.executable, "-m", "pytest", "-q", "bench", "--benchmark-only", "--benchmark-json", str(out)]
    return [*pytest, *common, *only]


def _run(arguments: argparse.Namespace) -> None:
    root = checkout()
    out = (arguments.out or Path("runs/bench") / f"{arguments.device}_{arguments.what}.json").resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(root), str(root / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command(arguments, out), cwd=root, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        failed = f"kdk bench {arguments.what}: failed with status {done.returncode}"
        raise ValueError(f"{failed}; what was measured is in {out}")
    print(f"written: {out}")
