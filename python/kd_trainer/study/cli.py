"""``kdk study``: methods beside each other on one task."""

from __future__ import annotations

import argparse
from pathlib import Path

PHASES = ("runs", "latency", "report")


def add_parser(commands: argparse._SubParsersAction) -> None:
    study = commands.add_parser("study", help="compare methods on a task, with several seeds")
    tasks = study.add_subparsers(required=True, metavar="TASK")
    task = tasks.add_parser(
        "text2sql", help="questions to SQL on WikiSQL",
        description="Fine-tune a teacher and a student cut from it on WikiSQL, then train that student by each method "
        "with each seed, and measure. Whatever is in --out already is not done again.",
    )
    source = "WikiSQL: a folder with train.jsonl and dev.jsonl, or a datasets name"
    task.add_argument("--data", required=True, help=source)
    task.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for all that is made (%(default)s)")
    sizes = "small: two cores; full: a GPU (%(default)s)"
    task.add_argument("--size", choices=("small", "full"), default="small", help=sizes)
    task.add_argument("--set", nargs="+", default=[], metavar="key=value", help="change the size, such as steps=100")
    task.add_argument("--methods", nargs="+", metavar="NAME", help="of the rows of the table (all)")
    task.add_argument("--seeds", type=int, default=3, help="runs of each method (%(default)s)")
    task.add_argument("--only", choices=PHASES, help="one phase (all)")
    task.add_argument("--rounds", type=int, default=12, help="steps of each method that are timed (%(default)s)")
    task.add_argument("--json", type=Path, help="the results (study.json under --out); a plot lies beside it")
    task.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from kd_trainer.study.lineup import ENTRIES
    from kd_trainer.study.options import SIZES, changed
    from kd_trainer.study.stages import Stages
    from kd_trainer.study.text2sql import study

    stages = Stages(arguments.data, arguments.out, changed(SIZES[arguments.size], arguments.set))
    phases = PHASES if arguments.only is None else (arguments.only,)
    names = arguments.methods or list(ENTRIES)
    print("\n" + study(stages, names, arguments.seeds, arguments.rounds, phases, arguments.json))
