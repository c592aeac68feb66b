"""The runs that docs/methods.md shows, and what they print: on a teacher, a text and students that are made in seconds.

    python -m bench.methods_page --out bench/results/methods_page.json       some four minutes on two cores

Nothing here is timed. The text and the teacher are those of ``kdk demo --offline-tiny``: sentences of a small grammar,
split after their third word into a prompt and its completion.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from bench.kid import write
from kd_trainer.tiny import make_tiny

SOME = "--data text.jsonl --limit 40"
PROGRAM = "import sys; from kd_trainer.cli import main; sys.exit(main(sys.argv[1:]))"


@dataclass(frozen=True)
class Example:
    """One command.

    Attributes:
        config: the YAML file that it reads, ``NAME.yaml``; None: one that an earlier example wrote, or none.
        fields: of the lines of metrics.jsonl that are shown: the first and the last, or with ``origins`` the first of
            each origin of its texts.
    """

    command: str
    config: str | None = None
    fields: tuple[str, ...] = ()
    origins: bool = False


EXAMPLES = {
    "distillm": Example("kdk train distillm.yaml", """\
method: distillm
out: runs/distillm
teacher: {model: teacher}
student: {layers: [0, 3]}
data: {source: text.jsonl, max_length: 96, append_eos: true, holdout: 0.2}   # whose loss the schedule goes by
options: {threshold: 0.9, capacity: 24}
optim: {lr: 2e-3}
rollout: {max_new_tokens: 60}
train: {steps: 12, batch_tokens: 768}
""", ("step", "loss", "written", "replayed", "validation_loss", "threshold"), origins=True),
    "gkd-refused": Example("kdk train distillm.yaml method=gkd out=runs/x options='{student: 1.2}'"),
    "kid": Example("kdk train kid.yaml", """\
method: kid
out: runs/kid
teacher: {model: teacher}
student: {layers: [0, 3]}
data: {source: text.jsonl, max_length: 96, append_eos: true}
options: {mask: "<end>", fraction: 0.2, strategy: random, mle: rewritten}   # strategy: random, uniform, hard, easy
optim: {lr: 2e-3}
train: {steps: 60, batch_tokens: 1024}
""", ("step", "loss", "tokens", "divergence", "next_token_loss", "grad_norm")),
    "kid-refused": Example("kdk train kid.yaml cache=runs/cache"),
    "comblm": Example("kdk train comblm.yaml", """\
method: comblm
out: runs/comblm
teacher: {model: teacher}
more_teachers: [{model: runs/kid/model}]
student: {layers: [0, 3]}
data: {source: text.jsonl, max_length: 96, append_eos: true, holdout: 0.2}   # weights are fitted on held-out texts
options: {weights: entropy}
train: {steps: 4, batch_tokens: 1024}
"""),
    "griffin": Example("kdk train griffin.yaml", """\
method: griffin
out: runs/griffin
teacher: {model: teacher}
student: {layers: [3]}
data: {source: text.jsonl, max_length: 96, append_eos: true}
optim: {lr: 5e-3}
train: {steps: 80, batch_tokens: 1024}
""", ("step", "loss", "divergence", "agreement", "aligned")),
    "accepted": Example(f"kdk diagnose accepted --target teacher --draft runs/griffin/model {SOME} --gamma 4"),
    "exposure": Example(f"kdk diagnose exposure --teacher teacher --student runs/kid/model {SOME} --samples 4"),
    "fidelity": Example(f"kdk diagnose fidelity --teacher teacher --student runs/kid/model {SOME}"),
}
"""By the name of their block on the page, in the order in which they run."""


def run(name: str, folder: Path) -> dict[str, str | None]:
    """The example's file, its command, and what the command prints with the lines of metrics that are shown."""
    example = EXAMPLES[name]
    if example.config is not None:
        (folder / f"{name}.yaml").write_text(example.config)
    arguments = [sys.executable, "-c", PROGRAM, *shlex.split(example.command)[1:]]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    if (done.returncode == 2) != name.endswith("-refused") or done.returncode not in (0, 2):
        raise RuntimeError(f"{example.command} ended with {done.returncode}: {done.stderr[-2000:]}")
    printed = done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
    metrics = "\n".join(_metrics(example, folder / "runs" / name / "metrics.jsonl")) if example.fields else ""
    return {"config": example.config, "command": example.command, "output": printed, "metrics": metrics}


def _metrics(example: Example, file: Path) -> list[str]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    shown = [lines[0], lines[-1]]
    if example.origins:
        first: dict[tuple[float, float], dict] = {}
        for line in lines:
            first.setdefault((line["written"], line["replayed"]), line)
        shown = list(first.values())
    tidy = lambda value: round(value, 4) if isinstance(value, float) else value  # noqa: E731
    return [json.dumps({key: tidy(line[key]) for key in example.fields if key in line}) for line in shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher, _ = make_tiny(folder / "tiny")
        shutil.move(teacher, folder / "teacher")
        write(folder / "text.jsonl", 240, seed=1)
        examples = {name: run(name, folder) for name in EXAMPLES}
    asked.out.write_text(json.dumps({"machine": machine.describe(), "examples": examples}, indent=1) + "\n")


if __name__ == "__main__":
    main()
