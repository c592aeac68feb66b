"""The ``kdk`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_trainer import bench_cli

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 for a mistake of the user, which is told in one line on stderr."""
    arguments = _parser().parse_args(argv)
    from kd_kernels.cache import CacheError

    try:
        arguments.run(arguments)
    except (ValueError, OSError, CacheError) as error:
        if arguments.traceback:
            raise
        print(f"kdk: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kdk: interrupted; the same command goes on from what was saved", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdk", description="Distil language models without their logits.")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    cache = commands.add_parser("cache", help="build or look at a teacher's cache")
    cache = cache.add_subparsers(required=True, metavar="COMMAND")
    build = cache.add_parser("build", help="score a text with a teacher, once; called again, it goes on")
    build.add_argument("--teacher", required=True, help="a model's name or folder, or smollm2-135m-instruct")
    build.add_argument("--out", required=True, help="folder of the cache")
    build.add_argument("--k", type=int, default=64, help="tokens kept a row (%(default)s)")
    build.add_argument("--mass", type=float, help="keep fewer where they hold this much probability")
    build.add_argument("--temperatures", type=float, nargs="+", default=[1.0], help="that the cache can be read at (1)")
    build.add_argument("--step-nats", type=float, default=1 / 16, help="of log-probabilities; 0: exact (%(default)s)")
    build.add_argument("--dtype", default="float32", choices=DTYPES, help="of the teacher (%(default)s)")
    build.add_argument("--batch-tokens", type=int, default=2048, help="scored at a time (%(default)s)")
    build.add_argument("--writer", default="w0", help="name of this writer, if several write (%(default)s)")
    _data_arguments(build)
    build.set_defaults(run=_cache_build)
    info = cache.add_parser("info", help="what a cache holds")
    info.add_argument("folder")
    info.add_argument("--verify", action="store_true", help="read every block and check it")
    info.set_defaults(run=_cache_info)

    training = commands.add_parser("train", help="train a student")
    training.add_argument("config", help="a YAML file")
    training.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=1e-4")
    training.set_defaults(run=_train)

    listing = commands.add_parser("methods", help="what can be trained by name, and what each needs")
    listing.set_defaults(run=_methods)

    evaluation = commands.add_parser("eval", help="compare students with their teacher")
    evaluation.add_argument("--teacher", required=True, help="a model's name or folder, or smollm2-135m-instruct")
    evaluation.add_argument("--student", required=True, nargs="+", help="names or folders")
    evaluation.add_argument("--dtype", default="float32", choices=DTYPES, help="of all (%(default)s)")
    evaluation.add_argument("--batch-tokens", type=int, default=2048, help="scored at a time (%(default)s)")
    evaluation.add_argument("--json", help="write the numbers to this file")
    _data_arguments(evaluation)
    evaluation.set_defaults(run=_eval)

    demo = commands.add_parser("demo", help="distil SmolLM2-135M into a third of its layers, on this machine")
    demo.add_argument("--out", help="folder for all that is made (runs/demo, or runs/demo-tiny)")
    demo.add_argument("--offline-tiny", action="store_true", help="the same in seconds, on a model it trains itself")
    demo.add_argument("--fresh", action="store_true", help="start over")
    demo.set_defaults(run=_demo)

    bench_cli.add_parser(commands)
    return parser


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    """The keys of :class:`~kd_trainer.config.DataConfig` as options."""
    source = "text or .jsonl: file, folder, pattern; or datasets name; or wiki-intros"
    parser.add_argument("--data", required=True, help=source)
    parser.add_argument("--split", help="of a datasets source (train)")
    parser.add_argument("--text-field", help="(text)")
    parser.add_argument("--prompt-field", help="(prompt)")
    parser.add_argument("--completion-field", help="(completion)")
    parser.add_argument("--max-length", type=int, help="tokens of a document (512)")
    parser.add_argument("--append-eos", action="store_true", default=None, help="end texts with the end token")
    parser.add_argument("--limit", type=int, help="as many texts, chosen by hash")
    parser.add_argument("--holdout", type=float, help="fraction of the texts, by hash, that --part train leaves out")
    parser.add_argument("--part", choices=("train", "holdout"), help="(train)")


def _data_config(arguments: argparse.Namespace):
    from kd_trainer.config import DataConfig

    names = (
        "split", "text_field", "prompt_field", "completion_field", "max_length", "append_eos", "limit", "holdout",
        "part",
    )
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return DataConfig(source=arguments.data, **given)


def _cache_build(arguments: argparse.Namespace) -> None:
    from kd_kernels.cache import CacheReader
    from kd_trainer.cache_build import CacheOptions, build_cache, describe

    options = CacheOptions(
        k=arguments.k, mass=arguments.mass, temperatures=tuple(arguments.temperatures), step_nats=arguments.step_nats,
        dtype=arguments.dtype, batch_tokens=arguments.batch_tokens, writer=arguments.writer,
    )
    build_cache(arguments.teacher, _data_config(arguments), arguments.out, options)
    print(describe(CacheReader(arguments.out)))


def _cache_info(arguments: argparse.Namespace) -> None:
    from kd_kernels.cache import CacheReader
    from kd_trainer.cache_build import describe
    from kd_trainer.files import progress

    reader = CacheReader(arguments.folder)
    if arguments.verify:
        with progress(total=reader.bytes, desc="verify", unit="B", unit_scale=True) as bar:
            reader.verify(bar.update)
    print(describe(reader) + ("\nevery block is whole" if arguments.verify else ""))


def _train(arguments: argparse.Namespace) -> None:
    from kd_trainer.config import load_config
    from kd_trainer.trainer import train

    print(train(load_config(arguments.config, arguments.overrides)))


def _methods(arguments: argparse.Namespace) -> None:
    from kd_trainer import registry

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
    documents = load_documents(_data_config(arguments), tokenizer, teacher.vocab)
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
