"""``kdk diagnose``: one subcommand a diagnostic, a table for people and JSON for programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from kd_trainer.data_cli import DTYPES, add_data_arguments, data_config


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("diagnose", help="what a distillation did beside its loss")
    kinds = parser.add_subparsers(required=True, metavar="DIAGNOSTIC")

    found = kinds.add_parser("fidelity", help="agreement, KL, acceptance, overlap, ECE: given texts and own ones")
    _add_models(found, "teacher", "student", several=True)
    _add_rollouts(found)
    found.add_argument("--top-k", type=int, default=10, help="k of the overlap (%(default)s)")
    found.set_defaults(run=_fidelity)

    found = kinds.add_parser("exposure", help="ExAccErr: the error that a student's own contexts add")
    _add_models(found, "teacher", "student")
    _add_rollouts(found)
    found.set_defaults(run=_exposure)

    found = kinds.add_parser("accepted", help="accepted length of speculative decoding with a student as the draft")
    _add_models(found, "target", "draft")
    _add_prompts(found)
    found.add_argument("--gamma", type=int, default=5, help="drafts of a round (%(default)s)")
    found.set_defaults(run=_accepted)

    found = kinds.add_parser("flips", help="negative flips and churn of the next token, from an old model to a new one")
    _add_models(found, "old", "new")
    found.set_defaults(run=_flips)

    found = kinds.add_parser("bottleneck", help="ranks, anisotropy, and the KL floor of a student's width")
    _add_models(found, "teacher", "student")
    found.add_argument("--contexts", type=int, default=2048, help="rows that are looked at (%(default)s)")
    found.set_defaults(run=_bottleneck)


def _add_models(parser: argparse.ArgumentParser, first: str, second: str, several: bool = False) -> None:
    parser.add_argument(f"--{first}", required=True, dest="first", help="name or folder, or smollm2-135m-instruct")
    parser.add_argument(f"--{second}", required=True, dest="second", nargs="+" if several else None, help="likewise")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of all (%(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="scored at a time (%(default)s)")
    parser.add_argument("--json", help="write the numbers to this file")
    add_data_arguments(parser)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt-tokens", type=int, help="of texts without a prompt, so many first tokens are one")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of a roll-out (%(default)s)")
    parser.add_argument("--no-stop", action="store_true", help="go on after the end of sequence: all of one length")


def _add_rollouts(parser: argparse.ArgumentParser) -> None:
    _add_prompts(parser)
    parser.add_argument("--samples", type=int, default=1, help="roll-outs from each prompt (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the student's roll-outs (%(default)s)")
    parser.add_argument("--top-p", type=float, help="likewise")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")


def _load(arguments: argparse.Namespace):
    """Both sides as models, the second by name, and the documents."""
    from kd_trainer.data import load_documents
    from kd_trainer.models import CausalLM, check_same_vocabulary, load_pretrained, load_tokenizer, vocab_of

    tokenizer = load_tokenizer(arguments.first)
    names = arguments.second if isinstance(arguments.second, list) else [arguments.second]
    for name in names:
        check_same_vocabulary(tokenizer, name, "the other model")
    load = lambda name: CausalLM(load_pretrained(name, arguments.dtype), vocab_of(tokenizer))  # noqa: E731
    first, others = load(arguments.first), {name: load(name) for name in names}
    return tokenizer, first, others, load_documents(data_config(arguments), tokenizer, first.vocab)


def _options(arguments: argparse.Namespace, tokenizer, **sampling: float | None):
    from kd_trainer.rollout import Options, Sampling

    end = tokenizer.eos_token_id
    return Options(
        max_new_tokens=arguments.max_new_tokens, stop_ids=() if end is None or arguments.no_stop else (end,),
        sampling=Sampling(**sampling), batch_size=16,
    )


def _rollouts(arguments: argparse.Namespace, tokenizer) -> tuple[object, dict[str, object]]:
    options = _options(arguments, tokenizer, temperature=arguments.temperature, top_p=arguments.top_p)
    keywords = ("seed", "samples", "prompt_tokens", "batch_tokens")
    return options, {name: getattr(arguments, name) for name in keywords}


def _show(arguments: argparse.Namespace, text: str, result: object) -> None:
    print(text)
    if arguments.json:
        tree = dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result
        Path(arguments.json).write_text(json.dumps(tree, indent=1))


def _fidelity(arguments: argparse.Namespace) -> None:
    from kd_trainer.diagnostics.fidelity import fidelity, fidelity_table

    tokenizer, teacher, students, documents = _load(arguments)
    options, keywords = _rollouts(arguments, tokenizer)
    result = fidelity(teacher, students, documents, options, top_k=arguments.top_k, **keywords)
    _show(arguments, fidelity_table(result), result)


def _exposure(arguments: argparse.Namespace) -> None:
    from kd_trainer.diagnostics.exposure import excess_error

    tokenizer, teacher, students, documents = _load(arguments)
    options, keywords = _rollouts(arguments, tokenizer)
    (student,) = students.values()
    result = excess_error(teacher, student, documents, options, **keywords)
    _show(arguments, result.table(), result)


def _accepted(arguments: argparse.Namespace) -> None:
    from kd_trainer.diagnostics.accepted import accepted_length, load_fusion

    tokenizer, target, drafts, documents = _load(arguments)
    ((name, draft),) = drafts.items()
    result = accepted_length(
        target, draft, documents, _options(arguments, tokenizer), gamma=arguments.gamma, fusion=load_fusion(name),
        prompt_tokens=arguments.prompt_tokens, batch_tokens=arguments.batch_tokens,
    )
    _show(arguments, result.table(), result)


def _flips(arguments: argparse.Namespace) -> None:
    from kd_trainer.diagnostics.flips import token_flips

    _, old, others, documents = _load(arguments)
    (new,) = others.values()
    result = token_flips(old, new, documents, batch_tokens=arguments.batch_tokens)
    _show(arguments, result.table(), result)


def _bottleneck(arguments: argparse.Namespace) -> None:
    from kd_trainer.diagnostics.bottleneck import bottleneck_report

    _, teacher, others, documents = _load(arguments)
    (student,) = others.values()
    result = bottleneck_report(
        teacher, student, documents, contexts=arguments.contexts, batch_tokens=arguments.batch_tokens
    )
    _show(arguments, result.table(), result)
