"""KID's open questions, asked of a small model: which likelihood term, which predictions, and does rewriting help?

    OMP_NUM_THREADS=1 python -m bench.kid --out bench/results/cpu_kid.json [--steps 60] [--seeds 0 1 2]

A four-layer teacher is trained on sentences of a small grammar (``kdk demo --offline-tiny`` has the same); students are
two of its layers. Every variant trains from the same start on prompts with completions, with its own seeds. Of each:
processor time of its steps (user and system, of this process, so that others on the machine matter little) over that of
SFT, and held-out KL(p||q), KL(q||p) and perplexity, along the texts and along completions that the student writes. What
is found on a grammar of 29 words says something about cost, and little about language.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench import machine
from kd_trainer.config import Config, from_tree
from kd_trainer.data import load_documents
from kd_trainer.evaluate import evaluate
from kd_trainer.models import CausalLM, load_pretrained, load_tokenizer
from kd_trainer.rollout import Options, generate, prompts_of
from kd_trainer.tiny import make_tiny, tiny_texts
from kd_trainer.trainer import train

REVERSE = {"divergence": "reverse_kl", "ce_weight": 1.0}
VARIANTS = {
    "sft": {"method": "sft"},
    "reverse KL on the text, and labels": {"method": "kd", "objective": REVERSE},
    "kid: likeliest, mle rewritten": {"method": "kid"},
    "kid: likeliest, mle text": {"method": "kid", "options": {"mle": "text"}},
    "kid: drawn, mle rewritten": {"method": "kid", "rollout": {"temperature": 1.0}},
    "kid: masks stay": {"method": "kid", "options": {"rewrite": False}},
    "kid: hard places": {"method": "kid", "options": {"strategy": "hard"}},
    "gkd: all texts by the student": {
        "method": "gkd", "objective": {"divergence": "reverse_kl"}, "options": {"student": 1.0},
    },
}


def write(path: Path, count: int, seed: int) -> None:
    """Sentences, split after their third word."""
    with open(path, "w", encoding="utf-8") as file:
        for text in tiny_texts(count, seed=seed):
            words = text.split(" ")
            file.write(json.dumps({"prompt": " ".join(words[:3]), "completion": " " + " ".join(words[3:])}) + "\n")


def run(folder: Path, teacher: Path, name: str, seed: int, steps: int) -> dict[str, float]:
    """Train one variant, and measure it."""
    change = json.loads(json.dumps(VARIANTS[name]))
    if change["method"] == "kid":
        change["options"] = {"mask": "<end>"} | change.get("options", {})
    config = from_tree(Config, {
        "out": str(folder / f"{list(VARIANTS).index(name)}-{seed}-{steps}"), "seed": seed,
        "teacher": {"model": str(teacher)}, "student": {"layers": [0, 3]},
        "data": {"source": str(folder / "train.jsonl"), "max_length": 96, "append_eos": True},
        "optim": {"lr": 2e-3}, "train": {"steps": steps, "batch_tokens": 1024, "tensorboard": False},
        "rollout": {"max_new_tokens": 60} | change.pop("rollout", {}), **change,
    })
    began = time.process_time()
    model = train(config)
    seconds = time.process_time() - began
    return {"seconds": seconds} | measured(model, teacher, folder)


@torch.no_grad()
def measured(model: Path, teacher: Path, folder: Path) -> dict[str, float]:
    tokenizer = load_tokenizer(str(teacher))
    known = from_tree(Config, {
        "out": "-", "method": "sft", "student": {"model": str(model)},
        "data": {"source": str(folder / "test.jsonl"), "max_length": 96, "append_eos": True},
    })
    documents = load_documents(known.data, tokenizer)
    models = [CausalLM(load_pretrained(str(path))) for path in (teacher, model)]
    written = generate(models[1], prompts_of(documents), Options(max_new_tokens=60, stop_ids=(0,)), seed=0).documents()
    found = {}
    for where, texts in (("on the text", documents), ("on its own text", written)):
        scores = evaluate(models[0], {"student": models[1]}, texts)["models"]["student"]
        found |= {f"{key} {where}": scores[key] for key in ("forward_kl", "reverse_kl", "perplexity")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher, _ = make_tiny(folder / "tiny")
        write(folder / "train.jsonl", 600, seed=1)
        write(folder / "test.jsonl", 100, seed=2)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
        overhead = {name: run(folder, teacher, name, 0, 1)["seconds"] for name in VARIANTS}  # loading, and warming up
        for seed in arguments.seeds:
            for name in VARIANTS:
                runs[name].append(run(folder, teacher, name, seed, arguments.steps))
                runs[name][-1]["seconds"] -= overhead[name]
    rows = {}
    for name, values in runs.items():
        means = {key: statistics.mean(value[key] for value in values) for key in values[0]}
        spread = None
        if len(values) > 1:
            spread = {key: statistics.stdev(value[key] for value in values) for key in values[0]}
        ratio = statistics.median(value["seconds"] / sft["seconds"] for value, sft in zip(values, runs["sft"]))
        rows[name] = {"processor time over sft": ratio, "mean": means, "deviation": spread}
        print(f"{name:36} {ratio:5.2f}  " + "  ".join(f"{key} {value:.4f}" for key, value in means.items()))
    settings = {"steps": arguments.steps, "seeds": arguments.seeds}
    result = {"moment": machine.moment(), **machine.describe(), "settings": settings, "variants": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
