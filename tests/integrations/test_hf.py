"""transformers' Trainer with our loss: gradients against float64, however the batch is split, and what is refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from transformers import Trainer, TrainingArguments
from trainers import ARGUMENTS, assert_same, collate, examples, gradient_of, model, tokenizer, truth

from kd_kernels.cache import CacheError, CacheManifest, CacheWriter
from kd_trainer.integrations import hf
from kd_trainer.integrations.hf import KDCallback, KDOptions, KDTrainer

JSD = KDOptions("jsd(beta=0.5)", ce_weight=0.5, temperature=2.0)


def arguments(tmp_path, **changes) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), **(ARGUMENTS | changes))


@pytest.mark.parametrize("accumulation", (1, 2, 4))
@pytest.mark.parametrize("tied", (False, True))
def test_gradient_is_that_of_dense_float64_however_the_batch_is_split(tmp_path, accumulation: int, tied: bool) -> None:
    student, teacher = model(1, tied=tied), model(2, hidden=48)
    loss, want = truth(student, teacher, examples(), "jsd", ce_weight=0.5, temperature=2.0)
    args = arguments(
        tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        gradient_checkpointing=accumulation == 2,
    )
    make = lambda: KDTrainer(  # noqa: E731
        student, args, train_dataset=examples(), data_collator=collate, teacher=teacher, kd=JSD
    )
    got_loss, got = gradient_of(make, student)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert_same(got, want)


def test_callback_leaves_the_trainer_as_it_is_and_detaches(tmp_path) -> None:
    student, teacher = model(1), model(2)
    loss, want = truth(student, teacher, examples(), "forward_kl")
    callback = KDCallback(teacher)
    make = lambda: Trainer(  # noqa: E731
        student, arguments(tmp_path), train_dataset=examples(), data_collator=collate, callbacks=[callback]
    )
    got_loss, got = gradient_of(make, student)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert_same(got, want)
    callback.detach()
    batch = collate(examples())
    assert "forward" not in student.__dict__ and student(**batch).logits.shape[-1] == 257


def test_without_labels_the_model_is_as_before_and_a_copy_has_its_own_weights(tmp_path) -> None:
    student, teacher = model(1), model(2)
    batch = collate(examples())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    before = student.eval()(**inputs).logits
    KDTrainer(student, arguments(tmp_path), train_dataset=examples(), data_collator=collate, teacher=teacher)
    assert torch.equal(student.eval()(**inputs).logits, before)
    other = copy.deepcopy(student)
    with torch.no_grad():
        other.get_output_embeddings().weight.zero_()
    assert not other(**inputs).logits.any() and other(**batch).loss != student(**batch).loss
    with pytest.raises(ValueError, match="labels must be given to the model in training"):
        student.train()(**inputs)


def test_evaluation_gives_the_same_loss(tmp_path) -> None:
    student, teacher = model(1), model(2)
    loss, _ = truth(student, teacher, examples(), "forward_kl")
    trainer = KDTrainer(
        student, arguments(tmp_path), eval_dataset=examples(), data_collator=collate, teacher=teacher
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_frozen_head(tmp_path) -> None:
    student, teacher = model(1), model(2)
    _, want = truth(student, teacher, examples(), "forward_kl")
    student.get_output_embeddings().requires_grad_(False)
    make = lambda: KDTrainer(  # noqa: E731
        student, arguments(tmp_path), train_dataset=examples(), data_collator=collate, teacher=teacher
    )
    _, got = gradient_of(make, student)
    del want["lm_head.weight"]
    assert_same(got, want)


def test_top_k_with_its_tail_is_the_full_gradient_on_the_head_at_large_k(tmp_path) -> None:
    student, teacher = model(1), model(2)
    loss, want = truth(student, teacher, examples(), "forward_kl")
    make = lambda: KDTrainer(  # noqa: E731
        student, arguments(tmp_path), train_dataset=examples(), data_collator=collate, teacher=teacher,
        kd=KDOptions(top_k=257),
    )
    got_loss, got = gradient_of(make, student)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert_same(got, want)


def test_padded_heads_with_valid_vocab(tmp_path) -> None:
    student, teacher = model(1), model(2)
    loss, want = truth(student, teacher, examples(), "forward_kl")
    padded = model(2)
    padded.resize_token_embeddings(264)
    padded.load_state_dict(
        {n: torch.cat([t, torch.ones(7, t.shape[1])]) if "embed" in n or "head" in n else t
         for n, t in teacher.state_dict().items()}
    )
    make = lambda: KDTrainer(  # noqa: E731
        student, arguments(tmp_path), train_dataset=examples(), data_collator=collate, teacher=padded,
        kd=KDOptions(valid_vocab=257),
    )
    got_loss, got = gradient_of(make, student)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert_same(got, want)


def test_autocast_and_compile(tmp_path) -> None:
    """bf16 autocast: the loss near float64's; compiled: the same as eager."""
    teacher = model(2)
    losses = {}
    for name, options in (("plain", {}), ("bf16", {"bf16": True}), ("compiled", {"torch_compile": True})):
        student = model(1)
        trainer = KDTrainer(
            student, arguments(tmp_path, **options), train_dataset=examples(), data_collator=collate, teacher=teacher
        )
        losses[name] = trainer.train().training_loss
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=3e-2)


# --------------------------------------------------------------------------------------------------------------- caches


def write_cache(folder, teacher, rows, fingerprint: str) -> None:
    """Every logprob of the teacher, unrounded."""
    from kd_kernels import topk_targets

    manifest = CacheManifest(
        teacher="t" * 64, tokenizer=fingerprint, vocab=257, k=257, step_nats=0.0, temperatures=(1.0, 2.0)
    )
    with CacheWriter(folder, manifest) as writer, torch.no_grad():
        for row in rows:
            ids = torch.tensor(row["input_ids"])
            logits = teacher.eval()(input_ids=ids[None]).logits[0, :-1]
            targets = topk_targets(logits, 257, temperatures=(1.0, 2.0))
            next_logprobs = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            writer.add(ids, targets, next_logprobs=next_logprobs)


@pytest.fixture
def cache(tmp_path):
    from kd_trainer.models import tokenizer_fingerprint

    folder = tmp_path / "cache"
    write_cache(folder, model(2), examples(), tokenizer_fingerprint(tokenizer()))
    return folder


def test_cache_in_place_of_the_teacher(tmp_path, cache) -> None:
    student = model(1)
    loss, want = truth(student, model(2), examples(), "jsd", ce_weight=0.5, temperature=2.0)
    make = lambda: KDTrainer(  # noqa: E731
        student, arguments(tmp_path), train_dataset=examples(), data_collator=collate, processing_class=tokenizer(),
        cache=str(cache), kd=JSD,
    )
    got_loss, got = gradient_of(make, student)
    assert got_loss == pytest.approx(loss, rel=1e-4)
    assert_same(got, want, rtol=1e-3)


def test_cache_of_another_data_set_is_refused_before_training(tmp_path, cache) -> None:
    trainer = KDTrainer(
        model(1), arguments(tmp_path), train_dataset=examples(10), data_collator=collate, processing_class=tokenizer(),
        cache=str(cache),
    )
    with pytest.raises(CacheError, match="must hold every sequence of the data set, got 2 of 10 that it lacks"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_cache_of_another_tokenizer_is_refused(tmp_path, cache) -> None:
    other = tokenizer()
    other.add_tokens(["<other>"])
    with pytest.raises(CacheError, match="must be of tokenizer"):
        KDTrainer(
            model(1), arguments(tmp_path), train_dataset=examples(), data_collator=collate, processing_class=other,
            cache=str(cache),
        )
    with pytest.raises(ValueError, match="processing_class must be given with a cache"):
        KDTrainer(model(1), arguments(tmp_path), train_dataset=examples(), data_collator=collate, cache=str(cache))


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_work_is_refused_when_the_trainer_is_made(tmp_path) -> None:
    student, teacher = model(1), model(2)

    def trainer(args=None, teacher=teacher, student=student, **kwargs):
        return KDTrainer(
            student, args or arguments(tmp_path), train_dataset=examples(), data_collator=collate, teacher=teacher, **kwargs
        )

    folder = tmp_path / "other"
    model(3).save_pretrained(folder)
    other = tokenizer()
    other.add_tokens(["<other>"])
    other.save_pretrained(folder)
    for call, message in (
        (lambda: trainer(teacher=None), "teacher and cache must be one given, not both, got neither"),
        (lambda: trainer(cache="x"), "got both"),
        (lambda: trainer(teacher=model(2, vocab=300)), "the vocabularies of student and teacher must be of one size, got 257 and 300"),
        (lambda: trainer(arguments(tmp_path, label_smoothing_factor=0.1)), "label_smoothing_factor must be 0, got 0.1"),
        (lambda: trainer(compute_metrics=len), "compute_metrics must be None"),
        (lambda: trainer(compute_loss_func=len), "compute_loss_func must be None"),
        (lambda: trainer(teacher=str(folder), processing_class=tokenizer()), "must be that of the tokenizer in use"),
        (lambda: trainer(teacher=hf.ADAPTER_OFF), "the student must be a PEFT model with teacher=ADAPTER_OFF"),
        (lambda: trainer(student=torch.nn.Linear(2, 2)), re.escape("get_output_embeddings() (lm_head) and get_decoder()")),
        (lambda: trainer(student=model(1).model), "KDCallback|attach|CausalLM"),
        (lambda: KDOptions("kl"), "divergence must be one of"),
        (lambda: KDOptions(temperature=0.0), "KDOptions: temperature must be finite and greater than 0"),
        (lambda: KDOptions(top_k=0), "top_k must be a positive integer or None, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError):
        trainer(teacher="./nowhere")


def test_other_versions_are_refused(monkeypatch) -> None:
    from kd_trainer.integrations import versions

    monkeypatch.setattr(versions.importlib.metadata, "version", lambda package: "4.57.1")
    with pytest.raises(RuntimeError, match=re.escape("transformers must be 5.23.*, got 4.57.1; run: pip install")):
        KDCallback(model(2))


# ------------------------------------------------------------------------------------------------------------------ PEFT


def lora(student, **changes):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(**(dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False) | changes))
    return peft.get_peft_model(student, config)


@pytest.mark.parametrize("checkpointing", (False, True))
def test_lora_student_with_its_own_base_as_teacher(tmp_path, checkpointing: bool) -> None:
    teacher = model(1)
    student = lora(copy.deepcopy(teacher))
    loss, want = truth(student, teacher, examples(), "forward_kl")
    make = lambda: KDTrainer(  # noqa: E731
        student, arguments(tmp_path, gradient_checkpointing=checkpointing), train_dataset=examples(),
        data_collator=collate, teacher=hf.ADAPTER_OFF,
    )
    got_loss, got = gradient_of(make, student)
    assert got_loss == pytest.approx(loss, rel=1e-4)
    assert_same(got, {name: gradient for name, gradient in want.items() if name in got})
    assert all("lora" in name for name in got) and len(got) == 8


def test_lora_on_the_head_is_refused_but_a_trained_head_is_not(tmp_path) -> None:
    teacher = model(2)
    with pytest.raises(ValueError, match="the head must be free of an adapter, got lm_head with a LoRA layer"):
        KDTrainer(
            lora(model(1), target_modules=["q_proj", "lm_head"]), arguments(tmp_path), train_dataset=examples(),
            data_collator=collate, teacher=teacher,
        )
    student = lora(model(1), modules_to_save=["lm_head"])
    loss, want = truth(student, teacher, examples(), "forward_kl")
    make = lambda: KDTrainer(  # noqa: E731
        student, arguments(tmp_path), train_dataset=examples(), data_collator=collate, teacher=teacher
    )
    got_loss, got = gradient_of(make, student)
    assert got_loss == pytest.approx(loss, rel=1e-4)
    assert any("lm_head" in name for name in got)
    assert_same(got, {name: want[name] for name in got})
