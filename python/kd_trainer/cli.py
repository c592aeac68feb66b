"""The ``kdk`` command."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_trainer import bench_cli
from kd_trainer.caching import cli as caching_cli
from kd_trainer.data_cli import DTYPES, add_data_arguments, data_config
from kd_trainer.diagnostics import cli as diagnostics_cli
from kd_trainer.study import cli as study_cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0; 1 if a check that was asked for failed; or 2 for a mistake of the user, which is told
    in one line on stderr."""
    arguments = _parser().parse_args(argv)
    from kd_kernels.cache import CacheError

    try:
        status = arguments.run(arguments) or 0
        _leave_group()
        return status
    except (ValueError, OSError, CacheError) as error:
        if arguments.traceback:
            raise
        print(f"kdk: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kdk: interrupted; the same command goes on from what was saved", file=sys.stderr)
        return 130


def _leave_group() -> None:
    """Destroy the launcher's group of processes, if there is one, while the interpreter is whole.

    A thread of gloo that lets go of a tensor while Python is being taken down asks for the GIL, and the process aborts.
    Destroying the group ends its threads, once nothing else holds it: a wrapped model is in a cycle, which is collected
    first. Not after an error: the threads may be waiting for a process that is not coming.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdk", description="Distil language models without their logits.")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    caching_cli.add_parser(commands)

    training = commands.add_parser("train", help="train a student")
    training.add_argument("config", help="a YAML file")
    training.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=1e-4")
    training.set_defaults(run=_train)

    listing = commands.add_parser("methods", help="what can be trained by name, and what each needs")
    listing.add_argument("--imports", nargs="+", default=(), metavar="MODULE", help="that register more of them")
    listing.set_defaults(run=_methods)

    evaluation = commands.add_parser("eval", help="compare students with their teacher")
    evaluation.add_argument("--teacher", required=True, help="a model's name or folder, or smollm2-135m-instruct")
    evaluation.add_argument("--student", required=True, nargs="+", help="names or folders")
    evaluation.add_argument("--dtype", default="float32", choices=DTYPES, help="of all (%(default)s)")
    evaluation.add_argument("--batch-tokens", type=int, default=2048, help="scored at a time (%(default)s)")
    evaluation.add_argument("--json", help="write the numbers to this file")
    add_data_arguments(evaluation)
    evaluation.set_defaults(run=_eval)

    diagnostics_cli.add_parser(commands)

    demo = commands.add_parser("demo", help="distil SmolLM2-135M into a third of its layers, on this machine")
    demo.add_argument("--out", help="folder for all that is made (runs/demo, or runs/demo-tiny)")
    demo.add_argument("--offline-tiny", action="store_true", help="the same in seconds, on a model it trains itself")
    demo.add_argument("--fresh", action="store_true", help="start over")
    demo.set_defaults(run=_demo)

    bench_cli.add_parser(commands)
    study_cli.add_parser(commands)
    return parser


def _train(arguments: argparse.Namespace) -> None:
    from kd_trainer.config import load_config
    from kd_trainer.trainer import train

    print(train(load_config(arguments.config, arguments.overrides)))


def _methods(arguments: argparse.Namespace) -> None:
    from kd_trainer import registry

    registry.import_modules(arguments.imports)
    print(registry.describe())


def _eval(arguments: argparse.Namespace) -> None:
    from kd_trainer.data import load_documents
    from kd_trainer.evaluate import evaluate, table
    from kd_trainer.models import CausalLM, check_same_vocabulary, load_pretrained, load_tokenizer, vocab_of

    tokenizer = load_tokenizer(arguments.teacher)
    for name in arguments.student:
        check_same_vocabulary(tokenizer, name, "the student")
    load = lambda name: CausalLM(load_pretrained(name, arguments.dtype), vocab_of(tokenizer))  # noqa: E731
    teacher, students = load(arguments.teacher), {name: load(name) for name in arguments.student}
    documents = load_documents(data_config(arguments), tokenizer, teacher.vocab)
    result = evaluate(teacher, students, documents, batch_tokens=arguments.batch_tokens)
    print(table(result))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1))


def _demo(arguments: argparse.Namespace) -> None:
    from kd_trainer.demo import run_demo

    out = arguments.out or ("runs/demo-tiny" if arguments.offline_tiny else "runs/demo")
    run_demo(Path(out), offline_tiny=arguments.offline_tiny, fresh=arguments.fresh)


if __name__ == "__main__":
    sys.exit(main())
