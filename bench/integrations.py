"""Their line and ours: time and peak memory of one forward and backward, on a CPU, each in a process of its own.

``.venv-integrations/bin/python -m bench.integrations [--rows 1024] [--repeats 5] [--only CASE ...]`` writes
bench/results/cpu_integrations.json, which ``bench.render`` makes the README's table of. What cannot run here is
recorded with its reason.

Losses: two heads of width 576 over 49,152 ids (SmolLM2's), ``--rows`` rows, fp32, everything from hidden states to
gradients.
Trainers: one micro-batch of four sequences, ``--rows`` tokens in all, through a Llama of two layers of width 128 with
such a vocabulary. Memory is the rise of resident memory over what was there before the call (VmHWM, as in
bench.memory), gradients included; times are medians of ``--repeats`` calls after one: on the clock, and of the
processor by all threads, which says more where others use the machine.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import machine
from bench.memory import _field

RESULT = Path(__file__).resolve().parent / "results" / "cpu_integrations.json"
HIDDEN, VOCAB, WIDTH = 576, 49_152, 128
TORCHTUNE = Path(sys.prefix) / "torchtune"
"""Where `make test-integrations` puts the torchao that torchtune needs, and the others refuse."""
PACKAGES = ("transformers", "trl", "liger-kernel", "torchtune")

Call = Callable[[], None]
Sides = dict[str, Callable[[int], Call]]
"""``theirs`` and ``ours``: from a number of rows, one forward and backward."""


def _heads(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "student_input": normal(rows, HIDDEN).requires_grad_(),
        "student_weight": (normal(VOCAB, HIDDEN) * 3 / HIDDEN**0.5).requires_grad_(),
        "teacher_input": normal(rows, HIDDEN), "teacher_weight": normal(VOCAB, HIDDEN) * 3 / HIDDEN**0.5,
        "labels": torch.randint(VOCAB, (rows,), generator=generator),
    }


def _backward(loss: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Call:
    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return call


def _loss(theirs: Callable[..., torch.Tensor], ours: Callable[..., torch.Tensor]) -> Sides:
    """Both as ``call(rows)`` from functions of the two heads and labels."""

    def prepared(function):
        def make(rows: int) -> Call:
            heads = _heads(rows)
            leaves = [heads["student_input"], heads["student_weight"]]
            return _backward(lambda: function(*heads.values()), leaves)

        return make

    return {"theirs": prepared(theirs), "ours": prepared(ours)}


def _kl_div() -> Sides:
    from kd_kernels import LinearLogits
    from kd_trainer.integrations.torch import kl_div

    options = dict(reduction="batchmean", log_target=True)
    return _loss(
        lambda x, w, tx, tw, y: F.kl_div(F.log_softmax(x @ w.T, -1), F.log_softmax(tx @ tw.T, -1), **options),
        lambda x, w, tx, tw, y: kl_div(LinearLogits(x, w), LinearLogits(tx, tw), **options),
    )


def _linear_cross_entropy() -> Sides:
    from kd_trainer.integrations.torch import linear_cross_entropy

    return _loss(
        lambda x, w, tx, tw, y: F.linear_cross_entropy(x, w, y), lambda x, w, tx, tw, y: linear_cross_entropy(x, w, y)
    )


def _liger() -> Sides:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    from kd_trainer.integrations import liger

    theirs = LigerFusedLinearJSDLoss(compiled=False)  # compiled, its first call takes minutes here
    return _loss(theirs, liger.LigerFusedLinearJSDLoss())


def _torchtune() -> Sides:
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss

    from kd_kernels import LinearLogits
    from kd_trainer.integrations import torchtune

    def theirs(x, w, tx, tw, y):
        student, teacher = ([c @ head.T for c in h[None].chunk(8, 1)] for h, head in ((x, w), (tx, tw)))
        return ForwardKLWithChunkedOutputLoss()(student, teacher, y[None])

    def ours(x, w, tx, tw, y):
        student, teacher = ([LinearLogits(c, head) for c in h[None].chunk(8, 1)] for h, head in ((x, w), (tx, tw)))
        return torchtune.ForwardKLWithChunkedOutputLoss()(student, teacher, y[None])

    return _loss(theirs, ours)


def _llama(seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )


def _batch(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCAB, (4, rows // 4), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _arguments(kind, **changes):
    return kind(tempfile.mkdtemp(), use_cpu=True, report_to=[], disable_tqdm=True, bf16=False, **changes)


def _step(trainer, inputs: dict[str, torch.Tensor]) -> Call:
    """One micro-batch, as the trainer runs it; its loss is divided by the tokens of this batch."""
    count = torch.tensor(inputs["input_ids"].numel() if "input_ids" in inputs else inputs["completion_ids"].numel())

    trainer.current_gradient_accumulation_steps = 1  # which training sets

    def call() -> None:
        trainer.model.zero_grad()
        trainer.model.train()
        trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=count).backward()

    return call


def _hf() -> Sides:
    from transformers import TrainingArguments

    from bench.dense_trainer import DenseKL
    from kd_trainer.integrations.hf import KDTrainer

    def make(cls):
        return lambda rows: _step(cls(_llama(0), _arguments(TrainingArguments), teacher=_llama(1)), _batch(rows))

    return {"theirs": make(DenseKL), "ours": make(KDTrainer)}


def _trl(kind: str) -> Sides:
    import trl
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    from kd_trainer.integrations import trl as ours
    from kd_trainer.tiny import byte_tokenizer

    theirs, config = {
        "DistillationTrainer": (trl.DistillationTrainer, trl.DistillationConfig), "GKDTrainer": (GKDTrainer, GKDConfig),
        "GOLDTrainer": (GOLDTrainer, GOLDConfig),
    }[kind]

    row = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "input_ids": [1, 2], "labels": [1, 2]}

    def make(cls):
        def call(rows: int) -> Call:
            options = {"beta": 0.5, "temperature": 1.0, "gradient_checkpointing": False}
            trainer = cls(
                model=_llama(0), teacher_model=_llama(1), args=_arguments(config, **options),
                processing_class=byte_tokenizer(), train_dataset=Dataset.from_list([row] * 4),
            )
            batch = _batch(rows)
            if kind == "DistillationTrainer":
                ids, mask = batch["input_ids"], batch["attention_mask"]
                batch = {
                    "prompt_ids": ids[:, :8], "prompt_mask": mask[:, :8], "completion_ids": ids[:, 8:],
                    "completion_mask": mask[:, 8:],
                }
            return _step(trainer, batch)

        return call

    return {"theirs": make(theirs), "ours": make(getattr(ours, kind))}


@dataclass(frozen=True)
class Case:
    """What stands in a script before and after the change, and both of it to be measured."""

    theirs: str
    ours: str
    make: Callable[[], Sides]


CASES = {
    "kl_div": Case(
        "from torch.nn.functional import kl_div", "from kd_trainer.integrations.torch import kl_div", _kl_div
    ),
    "linear_cross_entropy": Case(
        "from torch.nn.functional import linear_cross_entropy",
        "from kd_trainer.integrations.torch import linear_cross_entropy", _linear_cross_entropy,
    ),
    "liger": Case(
        "from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss",
        "from kd_trainer.integrations.liger import LigerFusedLinearJSDLoss", _liger,
    ),
    "torchtune": Case(
        "from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss",
        "from kd_trainer.integrations.torchtune import ForwardKLWithChunkedOutputLoss", _torchtune,
    ),
    "hf": Case("from transformers import Trainer", "from kd_trainer.integrations.hf import KDTrainer", _hf),
    "trl_distillation": Case(
        "from trl import DistillationTrainer", "from kd_trainer.integrations.trl import DistillationTrainer",
        lambda: _trl("DistillationTrainer"),
    ),
    "trl_gkd": Case(
        "from trl.experimental.gkd import GKDTrainer", "from kd_trainer.integrations.trl import GKDTrainer",
        lambda: _trl("GKDTrainer"),
    ),
    "trl_gold": Case(
        "from trl.experimental.gold import GOLDTrainer", "from kd_trainer.integrations.trl import GOLDTrainer",
        lambda: _trl("GOLDTrainer"),
    ),
}
"""What is compared, in the order of the table."""


def _measure(case: str, whose: str, rows: int, repeats: int) -> dict[str, float]:
    """In this process."""
    make = CASES[case].make()[whose]
    make(64)()
    call = make(rows)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _field("/proc/self/status", "VmRSS")
    call()
    peak = _field("/proc/self/status", "VmHWM") - before
    seconds, of_processor = [], []
    for _ in range(repeats):
        began, began_process = time.perf_counter(), time.process_time()
        call()
        seconds.append(time.perf_counter() - began)
        of_processor.append(time.process_time() - began_process)
    return {
        "peak_bytes": peak, "p50_ms": 1e3 * statistics.median(seconds), "min_ms": 1e3 * min(seconds),
        "processor_p50_ms": 1e3 * statistics.median(of_processor),
    }


def measured_in_a_process(case: str, whose: str, rows: int, repeats: int) -> dict[str, object]:
    """Bytes and milliseconds of one side, or why it was skipped."""
    command = [
        sys.executable, "-m", "bench.integrations", "--one", case, whose, "--rows", str(rows), "--repeats", str(repeats)
    ]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TORCHTUNE)] * (case == "torchtune") + sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--one", nargs=2, metavar=("CASE", "WHOSE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_measure(*arguments.one, arguments.rows, arguments.repeats)))
        return
    content = {
        "machine": machine.describe(), "versions": {package: machine.version(package) for package in PACKAGES},
        "shape": {"rows": arguments.rows, "vocab": VOCAB, "hidden": HIDDEN, "width": WIDTH}, "comparisons": {},
    }
    if RESULT.exists():
        before = json.loads(RESULT.read_text())
        if before | {"comparisons": {}} == content:  # the same machine, versions and shape: the others' results stand
            content["comparisons"] = before["comparisons"]
    for case in arguments.only:
        sides = {
            whose: measured_in_a_process(case, whose, arguments.rows, arguments.repeats) for whose in ("theirs", "ours")
        }
        content["comparisons"][case] = sides | {"repeats": arguments.repeats, "measured": machine.moment()}
        print(case, sides, file=sys.stderr)
        RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
