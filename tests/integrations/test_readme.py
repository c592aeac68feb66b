"""The README's lines for other people's trainers do what they say, copied as they stand there, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from kd_kernels import LinearLogits
from kd_kernels.testing import linear_pair
from trainers import ARGUMENTS, collate, examples, lora_of, model, tokenizer, write_cache

README = Path(__file__).resolve().parents[2] / "README.md"
SECTION = README.read_text().split("## In the trainer that you have")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
TRL = dict(bf16=False, gradient_checkpointing=False, lmbda=0.0, max_length=96)


def imported(block: str) -> str:
    """The names that a block imports of ours."""
    return re.search(r"from kd_trainer\.integrations\.(\w+ import [\w, ]*\w)", block)[1]


def chatting():
    """A tokenizer whose chat template is the messages' text, and conversations."""
    from datasets import Dataset

    chats = [
        {"messages": [{"role": "user", "content": "the cat "}, {"role": "assistant", "content": f"sees {i} dogs."}]}
        for i in range(8)
    ]
    made = tokenizer()
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made, Dataset.from_list(chats)


def names_of_trl(block: str, folder: Path) -> dict[str, object]:
    """What a script that uses TRL has defined by the time it comes to the block."""
    pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from trl import DistillationConfig
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.gold import GOLDConfig
    from trl.experimental.utils import DataCollatorForChatML

    reader, chats = chatting()
    prompts = Dataset.from_list([{"prompt": text} for text in ("the small cat sees ", "the dog ")] * 4)
    if "DistillationTrainer" in block:
        options = ARGUMENTS | dict(bf16=False, gradient_checkpointing=False, max_completion_length=8)
        args = DistillationConfig(str(folder), **options)
    elif "GOLDTrainer" in block:
        args = GOLDConfig(str(folder), **ARGUMENTS, **TRL, max_completion_length=16)
    else:
        args = GKDConfig(str(folder), **ARGUMENTS, **TRL)
    read = DataCollatorForChatML(tokenizer=reader, max_length=96)(list(chats))
    rows = [{"input_ids": ids[mask.bool()].tolist()} for ids, mask in zip(read["input_ids"], read["attention_mask"])]
    write_cache(folder / "cache", model(2), rows)
    made: dict[str, object] = {}

    def main() -> None:
        made["trainer"] = GKDTrainer(model(1), model(2), args, train_dataset=chats, processing_class=reader)

    return dict(args=args, prompts=prompts, chats=chats, tokenizer=reader, main=main, made=made)


def names_of_transformers(block: str, folder: Path) -> dict[str, object]:
    write_cache(folder / "cache", model(2), examples())
    return dict(
        args=TrainingArguments(str(folder), **ARGUMENTS), dataset=examples(), collator=collate, tokenizer=tokenizer(),
        Trainer=Trainer,
    )


def names_of_losses() -> dict[str, object]:
    pair = linear_pair(24, 67, 12, 20)
    return dict(
        student_hidden=pair.student_hidden.float().requires_grad_(),
        student_weight=pair.student_weight.float().requires_grad_(),
        teacher_hidden=pair.teacher_hidden.float(), teacher_weight=pair.teacher_weight.float(),
        labels=torch.arange(24), LinearLogits=LinearLogits,
    )


def test_every_module_has_its_blocks() -> None:
    modules = {imported(block).split()[0] for block in BLOCKS}
    assert modules == {"hf", "trl", "liger", "torchtune", "torch"} and len(BLOCKS) == 11


@pytest.mark.parametrize("block", BLOCKS, ids=imported)
def test_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: str) -> None:
    monkeypatch.chdir(tmp_path)
    module = imported(block).split()[0]
    if module in ("hf", "trl"):
        model(2).save_pretrained("my/teacher")
        tokenizer().save_pretrained("my/teacher")
        names = (names_of_trl if module == "trl" else names_of_transformers)(block, tmp_path) | {"model": model(1)}
        if "peft_model" in block:
            names |= {"peft_model": lora_of(model(1))}
        exec(block, names)
        trainer = names.get("trainer") or names["made"]["trainer"]
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert trainer.train().training_loss > 0 and trainer.state.global_step == 1
        after = dict(trainer.model.named_parameters())
        assert all(after[name].isfinite().all() for name in before)
        assert any(not torch.equal(after[name], was) for name, was in before.items())
    else:
        exec(block, names := names_of_losses())
        names["loss"].backward()
        assert names["loss"] > 0 and names["student_hidden"].grad.any() and names["student_weight"].grad.any()
