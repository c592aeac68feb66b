"""The commands of the README's page on the cache, and what they print: a capture, its report, a training from it.

    python -m bench.cache_page --out bench/results/cache_page.json [--teacher smollm2-135m-instruct] \\
        [--data wiki-intros]

Nothing here is timed; bytes and errors are those of the teacher and text named.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import machine

CONFIG = """\
out: run
method: kd
cache: cache
teacher: {{model: {teacher}}}
student: {{layers: [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]}}
data: {{source: {data}, max_length: 256, limit: 48}}
objective: {{divergence: jsd(beta=0.5)}}
train: {{steps: 6, batch_tokens: 1024, tensorboard: false}}
"""
PROGRAM = "import sys; from kd_trainer.cli import main; sys.exit(main(sys.argv[1:]))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", default="smollm2-135m-instruct")
    parser.add_argument("--data", default="wiki-intros")
    asked = parser.parse_args()
    text = f"--data {asked.data} --max-length 256 --limit 48"
    commands = [
        f"kdk cache build --teacher {asked.teacher} {text} --k 64 --out cache",
        f"kdk cache report cache --plot report.png --teacher {asked.teacher} {text} --compared 12",
        "kdk train run.yaml",
    ]
    shown = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run.yaml").write_text(CONFIG.format(teacher=asked.teacher, data=asked.data))
        for command in commands:
            arguments = [sys.executable, "-c", PROGRAM, *shlex.split(command)[1:]]
            done = subprocess.run(arguments, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
            shown.append({"command": command, "output": done.stdout.strip()})
        metrics = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    shown[-1]["output"] += f"\n# first and last line of run/metrics.jsonl\n{metrics[0]}\n{metrics[-1]}"
    asked.out.write_text(
        json.dumps({"machine": machine.describe(), "commands": shown, "config": CONFIG.format(**vars(asked))}, indent=1)
    )


if __name__ == "__main__":
    main()
