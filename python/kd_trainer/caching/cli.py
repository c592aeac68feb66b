"""``kdk cache``: the command line of teacher caches."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kd_trainer.data_cli import DTYPES, add_data_arguments, data_config


def add_parser(commands) -> None:
    cache = commands.add_parser("cache", help="make, fill and examine a teacher's cache")
    cache = cache.add_subparsers(required=True, metavar="COMMAND")
    _add_build(cache.add_parser("build", help="score a text with a teacher, once; called again, it goes on"))
    _add_verify(cache.add_parser("verify", help="check every byte; with --teacher, compare rows with the live teacher"))
    _add_import(cache.add_parser("import", help="take what a serving API answered, as JSON lines"))
    _add_export(cache.add_parser("export", help="write a cache as safetensors or Parquet"))
    _add_report(cache.add_parser("report", help="where its bytes go; with --teacher, what rounding did"))
    merge = cache.add_parser("merge", help="put the shards of several folders of one cache into one folder")
    merge.add_argument("folders", nargs="+")
    merge.add_argument("--out", required=True, help="a folder; its cache grows if it has one")
    merge.set_defaults(run=_merge)
    recover = cache.add_parser("recover", help="seal what writers left that were killed and will not come again")
    recover.add_argument("folder")
    recover.set_defaults(run=_recover)
    info = cache.add_parser("info", help="what a cache is, from its manifest and indexes")
    info.add_argument("folder")
    info.set_defaults(run=_info)


def _add_teacher(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--teacher", required=required, action="append",
        help="a model's name or folder, or smollm2-135m-instruct; several times for an ensemble",
    )
    parser.add_argument(
        "--ensemble", choices=("logit", "prob"), default="logit", help="average of several teachers (%(default)s)"
    )
    parser.add_argument("--weights", type=float, nargs="+", help="of the teachers in that average (equal)")
    parser.add_argument("--head-dtype", choices=DTYPES, help="what the head multiplies (that of --dtype)")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="scored at a time (%(default)s)")


def _add_build(build: argparse.ArgumentParser) -> None:
    _add_teacher(build, required=True)
    build.add_argument("--dtype", default="float32", choices=DTYPES, help="of the teacher's weights (%(default)s)")
    build.add_argument("--out", required=True, help="folder of the cache")
    build.add_argument("--k", type=int, default=64, help="tokens kept a row (%(default)s)")
    build.add_argument("--mass", type=float, help="keep fewer where they hold this much probability")
    build.add_argument(
        "--sampled", type=int, help="draw so many tokens a row beside the first k (which may be 0): unbiased"
    )
    build.add_argument("--proposal-temperature", type=float, default=1.0, help="that they are drawn at (%(default)s)")
    build.add_argument("--temperatures", type=float, nargs="+", default=[1.0], help="that the cache can be read at (1)")
    build.add_argument("--step-nats", type=float, default=1 / 16, help="of log-probabilities; 0: exact (%(default)s)")
    build.add_argument("--min-entropy", type=float, help="leave out rows where the teacher's entropy is less, in nats")
    build.add_argument("--fraction", type=float, help="of the rows of a document, keep those with most entropy")
    build.add_argument("--select", help="a model whose entropy decides in place of the teacher's")
    build.add_argument("--writer", help="begin of the names of its files (of this machine's)")
    build.add_argument("--share", help="i/n: score the i-th of n shares, without a launcher")
    build.add_argument("--no-resume", dest="resume", action="store_false", help="refuse a folder that has rows")
    add_data_arguments(build)
    build.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> None:
    from kd_kernels.cache import CacheReader
    from kd_trainer.caching.build import build_cache
    from kd_trainer.caching.describe import describe
    from kd_trainer.caching.options import CacheOptions
    from kd_trainer.caching.team import Team

    names = (
        "k", "mass", "sampled", "proposal_temperature", "step_nats", "dtype", "head_dtype", "ensemble", "min_entropy",
        "fraction", "select", "batch_tokens", "writer", "share", "resume",
    )
    options = CacheOptions(
        temperatures=tuple(arguments.temperatures), weights=arguments.weights and tuple(arguments.weights),
        **{name: getattr(arguments, name) for name in names},
    )
    build_cache(arguments.teacher, data_config(arguments), arguments.out, options)
    if Team.of(options).rank == 0:
        print(describe(CacheReader(arguments.out)))


def _add_verify(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("folder")
    _add_teacher(verify, required=False)
    verify.add_argument("--documents", type=int, default=64, help="compared, chosen by hash; 0: all (%(default)s)")
    verify.add_argument("--json", help="write the numbers to this file")
    add_data_arguments(verify, required=False)
    verify.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from kd_kernels.cache import CacheReader
    from kd_trainer.files import progress

    _check_given_with_data("verify_cache", arguments, "teacher")
    reader = CacheReader(arguments.folder)
    with progress(total=reader.bytes, desc="read", unit="B", unit_scale=True) as bar:
        reader.verify(bar.update)
    print(f"every block of {reader.bytes:,} bytes is whole")
    if arguments.teacher is None:
        return 0
    verdict = _verdict(reader, arguments, arguments.documents)
    print(verdict.table())
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(verdict.as_dict(), indent=1))
    return 0 if verdict.passed else 1


def _check_given_with_data(where: str, arguments: argparse.Namespace, name: str) -> None:
    from kd_trainer.errors import fail

    if (getattr(arguments, name) is None) != (arguments.data is None):
        fail(where, f"--{name} and --data", "given together", "one of them")


def _verdict(reader, arguments: argparse.Namespace, documents: int):
    """The cache compared with the teacher that the arguments name, on so many of their documents (0: all)."""
    import torch

    from kd_trainer.caching.scoring import Scorer
    from kd_trainer.caching.verify import verify
    from kd_trainer.data import load_documents

    meta = reader.manifest.meta
    scorer = Scorer(
        arguments.teacher, meta.get("dtype", "float32"), head_dtype=arguments.head_dtype, space=arguments.ensemble,
        weights=arguments.weights,
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    known = load_documents(data_config(arguments), scorer.tokenizer, scorer.vocab)
    return verify(reader, scorer, known[: documents or None], batch_tokens=arguments.batch_tokens)


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("folder")
    _add_teacher(report, required=False)
    report.add_argument("--documents", type=int, default=4096, help="looked at, chosen by hash; 0: all (%(default)s)")
    report.add_argument("--compared", type=int, default=64, help="with the teacher's, of --data; 0: all (%(default)s)")
    report.add_argument("--json", help="write the numbers to this file")
    report.add_argument("--plot", help="draw them into this .png")
    add_data_arguments(report, required=False)
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    from kd_kernels.cache import CacheReader
    from kd_trainer.caching.report import report

    _check_given_with_data("report", arguments, "teacher")
    reader = CacheReader(arguments.folder)
    verdict = None if arguments.teacher is None else _verdict(reader, arguments, arguments.compared)
    found = report(reader, documents=arguments.documents, verdict=verdict)
    print(found.table())
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found.as_dict(), indent=1))
    if arguments.plot:
        found.plot(arguments.plot)


def _add_import(taken: argparse.ArgumentParser) -> None:
    taken.add_argument("files", nargs="+", help=".jsonl or .jsonl.gz: answers of OpenAI-style or vLLM servers, or rows")
    taken.add_argument("--out", required=True, help="folder of the cache")
    taken.add_argument("--tokenizer", required=True, help="of the model that was served: a name or folder")
    taken.add_argument("--teacher", required=True, help="name and revision of that model, such as name@revision")
    taken.add_argument("--k", type=int, required=True, help="log-probabilities that the server was asked for")
    taken.add_argument("--step-nats", type=float, default=1 / 16, help="of log-probabilities; 0: exact (%(default)s)")
    taken.add_argument("--head-dtype", default="unknown", help="of the server's logits (%(default)s)")
    taken.add_argument("--writer", help="begin of the names of its files (of this machine's)")
    taken.add_argument("--skip-refused", action="store_true", help="count records that are refused instead of stopping")
    taken.add_argument("--write-data", help="also write the tokens, for kdk train, to this .jsonl")
    taken.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> None:
    from kd_trainer.caching.importing import ImportOptions, import_cache

    names = ("k", "step_nats", "head_dtype", "writer", "skip_refused", "write_data")
    options = ImportOptions(**{name: getattr(arguments, name) for name in names})
    print(import_cache(arguments.files, arguments.tokenizer, arguments.teacher, arguments.out, options).table())


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("folder")
    export.add_argument("--out", required=True, help="a new folder")
    export.add_argument("--format", default="safetensors", choices=("safetensors", "parquet"), help="(%(default)s)")
    export.add_argument("--rows-per-file", type=int, default=1 << 18, help="(%(default)s)")
    export.add_argument("--tokenizer", help="with --data: put the tokens of these documents beside their rows")
    add_data_arguments(export, required=False)
    export.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from kd_kernels.cache import CacheReader, content_key
    from kd_trainer.caching.exporting import export_cache
    from kd_trainer.data import load_documents
    from kd_trainer.models import load_tokenizer

    _check_given_with_data("export_cache", arguments, "tokenizer")
    tokens = None
    if arguments.data is not None:
        manifest = CacheReader(arguments.folder).manifest
        documents = load_documents(data_config(arguments), load_tokenizer(arguments.tokenizer), manifest.vocab)
        tokens = {content_key(document.tokens, manifest, document.layout): document.tokens for document in documents}
    written = export_cache(
        arguments.folder, arguments.out, arguments.format, rows_per_file=arguments.rows_per_file, tokens=tokens
    )
    print(f"{written:,} sequences in {arguments.out}")


def _merge(arguments: argparse.Namespace) -> None:
    from kd_kernels.cache import CacheReader, merge
    from kd_trainer.caching.describe import describe

    merged = merge(arguments.folders, arguments.out)
    for (folder, name), new in merged.renamed.items():
        print(f"{name} of {folder} is {new} here")
    print(f"{merged.added} shards added, {merged.shards} in all, {merged.copied_bytes:,} bytes copied")
    print(describe(CacheReader(arguments.out)))


def _recover(arguments: argparse.Namespace) -> None:
    from kd_kernels.cache import recover

    print("\n".join(recover(arguments.folder)) or "nothing was left unsealed")


def _info(arguments: argparse.Namespace) -> None:
    from kd_kernels.cache import CacheReader
    from kd_trainer.caching.describe import describe

    print(describe(CacheReader(arguments.folder)))
