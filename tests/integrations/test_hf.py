"""transformers' Trainer with our loss: gradients against float64, however the batch is split, and what is refused."""

from __future__ import annotations

import copy
import re
import types

import pytest
import torch
from trainers import (
    ARGUMENTS, assert_step, collate, examples, gradient_of, lora_of, model, tokenizer, truth, write_cache,
)
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments

from kd_kernels.cache import CacheError
from kd_trainer.integrations import hf
from kd_trainer.integrations.hf import KDCallback, KDOptions, KDTrainer

JSD = KDOptions("jsd(beta=0.5)", ce_weight=0.5, temperature=2.0)


def arguments(tmp_path, **changes) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), **(ARGUMENTS | changes))


def step(tmp_path, student, teacher=None, args=None, rows=8, **kwargs) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step by KDTrainer."""
    make = lambda: KDTrainer(  # noqa: E731
        student, args or arguments(tmp_path), train_dataset=examples(rows), data_collator=collate, teacher=teacher,
        **kwargs
    )
    return gradient_of(make, student)


@pytest.mark.parametrize("accumulation", (1, 2, 4))
@pytest.mark.parametrize("tied", (False, True))
def test_gradient_is_that_of_dense_float64_however_the_batch_is_split(tmp_path, accumulation: int, tied: bool) -> None:
    student, teacher = model(1, tied=tied), model(2, hidden=48)
    want = truth(student, teacher, examples(), "jsd(beta=0.5)", ce_weight=0.5, temperature=2.0)
    args = arguments(
        tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation
    )
    assert_step(step(tmp_path, student, teacher, args, kd=JSD), want)


@pytest.mark.parametrize(
    ("options", "objective"),
    (
        (KDOptions("total_variation"), dict(divergence="total_variation")),
        (KDOptions(top_k=257), {}),  # all ids: the tail is empty
        (KDOptions(top_k=8), dict(top_k=8)),
        (KDOptions(top_k=8, tail="renormalize", temperature=2.0), dict(top_k=8, tail="renormalize", temperature=2.0)),
        (KDOptions("reverse_kl", top_k=8), dict(divergence="reverse_kl", top_k=8)),
    ),
    ids=("total_variation", "all", "bucket", "renormalize", "reverse_kl"),
)
def test_objective(tmp_path, options: KDOptions, objective: dict) -> None:
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples(), **objective)
    assert_step(step(tmp_path, student, teacher, kd=options), want)


def test_callback_leaves_the_trainer_as_it_is_and_detaches(tmp_path) -> None:
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples())
    callback = KDCallback(teacher)
    make = lambda: Trainer(  # noqa: E731
        student, arguments(tmp_path), train_dataset=examples(), data_collator=collate, callbacks=[callback]
    )
    assert_step(gradient_of(make, student), want)
    callback.detach()
    batch = collate(examples())
    assert "forward" not in student.__dict__ and student(**batch).logits.shape[-1] == 257


def test_teacher_by_its_folder(tmp_path) -> None:
    student, teacher = model(1), model(2)
    for name, saved in (("student", student), ("teacher", teacher)):
        saved.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    want = truth(student, teacher, examples())
    assert_step(step(tmp_path, student, str(tmp_path / "teacher"), processing_class=tokenizer()), want)


def test_what_is_saved_is_the_plain_model(tmp_path) -> None:
    student = model(1)
    trainer = KDTrainer(
        student, arguments(tmp_path), train_dataset=examples(), data_collator=collate, teacher=model(2)
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = type(student).from_pretrained(tmp_path / "saved")
    assert set(again.state_dict()) == set(model(1).state_dict())
    assert all(torch.equal(x, student.state_dict()[name]) for name, x in again.state_dict().items())


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
    loss, _ = truth(student, teacher, examples())
    trainer = KDTrainer(
        student, arguments(tmp_path), eval_dataset=examples(), data_collator=collate, teacher=teacher
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("tied", (False, True))
def test_frozen_head(tmp_path, tied: bool) -> None:
    student, teacher = model(1, tied=tied), model(2)
    student.get_output_embeddings().requires_grad_(False)  # a tied one takes the embeddings with it
    want = truth(student, teacher, examples())
    assert len(want[1]) == len(list(student.parameters())) - 1
    assert_step(step(tmp_path, student, teacher), want)


def test_padded_heads_with_valid_vocab(tmp_path) -> None:
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples())
    padded = model(2)
    padded.resize_token_embeddings(264)
    padded.load_state_dict(
        {n: torch.cat([t, torch.ones(7, t.shape[1])]) if "embed" in n or "head" in n else t
         for n, t in teacher.state_dict().items()}
    )
    assert_step(step(tmp_path, student, padded, kd=KDOptions(valid_vocab=257)), want)


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing(tmp_path, reentrant: bool) -> None:
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples())
    runs = []
    student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    args = arguments(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert_step(step(tmp_path, student, teacher, args), want)
    assert len(runs) == 2 + 2  # the head is compared with the model's logits; forward, and again for the backward pass


def test_compiled(tmp_path) -> None:
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples())
    assert_step(step(tmp_path, student, teacher, arguments(tmp_path, torch_compile=True)), want)


def test_bf16_autocast_is_near(tmp_path) -> None:
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples())
    assert_step(step(tmp_path, student, teacher, arguments(tmp_path, bf16=True)), want, 3e-2, 5e-2)


# --------------------------------------------------------------------------------------------------------------- caches


@pytest.fixture
def cache(tmp_path) -> str:
    write_cache(tmp_path / "cache", model(2), examples())
    return str(tmp_path / "cache")


def test_cache_in_place_of_the_teacher(tmp_path, cache) -> None:
    student = model(1)
    want = truth(student, model(2), examples(), "jsd(beta=0.5)", ce_weight=0.5, temperature=2.0)
    assert_step(step(tmp_path, student, cache=cache, kd=JSD, processing_class=tokenizer()), want, 1e-4, 1e-3)


def test_cache_of_another_data_set_is_refused_before_training(tmp_path, cache) -> None:
    trainer = KDTrainer(
        model(1), arguments(tmp_path), train_dataset=examples(10), data_collator=collate, processing_class=tokenizer(),
        cache=cache,
    )
    with pytest.raises(CacheError, match="must hold every sequence of the data set, got 2 of 10 that it lacks"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_a_cache_cannot_serve_is_refused(tmp_path, cache) -> None:
    other = tokenizer()
    other.add_tokens(["<other>"])
    with pytest.raises(CacheError, match="must be of tokenizer"):
        step(tmp_path, model(1), cache=cache, processing_class=other)
    with pytest.raises(ValueError, match="processing_class must be given with a cache"):
        step(tmp_path, model(1), cache=cache)
    with pytest.raises(ValueError, match="top_k must be None with a cache"):
        step(tmp_path, model(1), cache=cache, processing_class=tokenizer(), kd=KDOptions(top_k=8))
    with pytest.raises((ValueError, CacheError), match="temperature"):
        step(tmp_path, model(1), cache=cache, processing_class=tokenizer(), kd=KDOptions(temperature=3.0))


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_work_is_refused_when_the_trainer_is_made(tmp_path) -> None:
    student, teacher = model(1), model(2)

    def trainer(args=None, teacher=teacher, student=student, **kwargs):
        return KDTrainer(
            student, args or arguments(tmp_path), train_dataset=examples(), data_collator=collate, teacher=teacher,
            **kwargs
        )

    def changed(**attributes) -> TrainingArguments:
        """Options whose own checks want hardware or packages that are not here."""
        args = arguments(tmp_path)
        vars(args).update(attributes)
        return args

    folder = tmp_path / "other"
    model(3).save_pretrained(folder)
    other = tokenizer()
    other.add_tokens(["<other>"])
    other.save_pretrained(folder)
    named = type(student).from_pretrained(folder)
    model(1).save_pretrained(tmp_path / "own")
    tokenizer().save_pretrained(tmp_path / "own")
    own = type(student).from_pretrained(tmp_path / "own")
    classifier = LlamaForSequenceClassification(student.config)
    for call, message in (
        (lambda: trainer(teacher=None), "teacher and cache must be one given, not both, got neither"),
        (lambda: trainer(cache="x"), "got both"),
        (
            lambda: trainer(teacher=model(2, vocab=300)),
            "the vocabularies of student and teacher must be of one size, got 257 and 300",
        ),
        (lambda: trainer(arguments(tmp_path, label_smoothing_factor=0.1)), "label_smoothing_factor must be 0, got 0.1"),
        (
            lambda: trainer(changed(_n_gpu=2, __cached__setup_devices=torch.device("cpu"))),
            "n_gpu must be 1 a process, got 2",
        ),
        (lambda: trainer(changed(deepspeed="zero3.json")), "deepspeed must be None, got a configuration"),
        (lambda: trainer(compute_metrics=len), "compute_metrics must be None"),
        (lambda: trainer(compute_loss_func=len), "compute_loss_func must be None"),
        (lambda: trainer(preprocess_logits_for_metrics=len), "preprocess_logits_for_metrics must be None"),
        (lambda: trainer(teacher=str(folder), processing_class=tokenizer()), "must be that of the tokenizer in use"),
        (lambda: trainer(teacher=named, processing_class=tokenizer()), "must be that of the tokenizer in use"),
        (lambda: trainer(teacher=str(folder), student=own), "must be that of the tokenizer in use"),
        (lambda: trainer(teacher=hf.ADAPTER_OFF), "the student must be a PEFT model with teacher=ADAPTER_OFF"),
        (
            lambda: trainer(student=torch.nn.Linear(2, 2)),
            re.escape("get_output_embeddings() (lm_head) and get_decoder()"),
        ),
        (
            lambda: trainer(student=model(1).model),
            r"get_output_embeddings\(\) of LlamaModel must be a linear head with a 2-d weight, .* lm_head, got none",
        ),
        (
            lambda: trainer(student=classifier),
            re.escape("get_output_embeddings() of LlamaForSequenceClassification must be a linear head"),
        ),
        (lambda: KDOptions("kl"), "divergence must be one of"),
        (lambda: KDOptions(temperature=0.0), "KDOptions: temperature must be finite and greater than 0"),
        (lambda: KDOptions(ce_weight=-1.0), "KDOptions: ce_weight must be finite and at least 0, got -1.0"),
        (lambda: KDOptions(tail="keep"), "KDOptions: tail must be one of bucket, renormalize, drop, got 'keep'"),
        (lambda: KDOptions(top_k=0), "top_k must be a positive integer or None, got 0"),
        (lambda: KDOptions(valid_vocab=True), "valid_vocab must be a positive integer or None, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError):
        trainer(teacher="./nowhere")
    sequence_parallel = types.SimpleNamespace(cp_enabled=False, sp_enabled=True, tp_enabled=False)
    with pytest.raises(ValueError, match="parallelism_config must be data parallel, got cp, sp or tp above 1"):
        hf.check_arguments("KDCallback", changed(parallelism_config=sequence_parallel))  # accelerate wants its devices


def test_a_model_whose_forward_takes_no_kwargs_is_refused_by_the_callback_alone(tmp_path) -> None:
    class Plain(type(model(1))):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, labels=None):
            inputs = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
            return super().forward(**inputs, use_cache=use_cache, labels=labels)

    student, teacher = Plain(model(1).config), model(2)
    student.load_state_dict(model(1).state_dict())
    with pytest.raises(
        ValueError, match=re.escape("forward of Plain must be one that takes **kwargs, got none; use KDTrainer")
    ):
        Trainer(student, arguments(tmp_path), data_collator=collate, callbacks=[KDCallback(teacher)])
    assert_step(step(tmp_path, student, teacher), truth(model(1), teacher, examples()))


# ----------------------------------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize(
    "changes",
    ({}, dict(gradient_checkpointing=True), dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)),
    ids=str,
)
def test_lora_student_with_its_own_base_as_teacher(tmp_path, changes: dict) -> None:
    teacher = model(1)
    student = lora_of(copy.deepcopy(teacher))
    want = truth(student, teacher, examples())
    got = step(tmp_path, student, hf.ADAPTER_OFF, arguments(tmp_path, **changes))
    assert_step(got, want, 1e-4)
    assert all("lora" in name for name in got[1]) and len(got[1]) == 8


def test_lora_dropout_is_off_for_the_teacher_alone(tmp_path) -> None:
    """The adapter's dropout is the student's; the base with its adapter off has none, so only the student's loss
    moves."""
    student = lora_of(model(1), lora_dropout=0.5)
    trainer = KDTrainer(
        student, arguments(tmp_path), train_dataset=examples(), data_collator=collate, teacher=hf.ADAPTER_OFF
    )
    batch = collate(examples())
    losses = {student.train()(**batch).loss.item() for _ in range(3)}
    assert len(losses) == 3 and student.training and student.base_model.model.training
    assert len({student.eval()(**batch).loss.item() for _ in range(2)}) == 1
    assert trainer.evaluate(examples())["eval_loss"] == pytest.approx(student.eval()(**batch).loss.item(), rel=1e-5)


def test_adapters_that_the_loss_would_not_see_are_refused_but_a_trained_head_is_not(tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    teacher = model(2)
    with pytest.raises(ValueError, match="the head must be free of an adapter, got lm_head with a LoRA layer"):
        step(tmp_path, lora_of(model(1), target_modules=["q_proj", "lm_head"]), teacher)
    prompted = peft.get_peft_model(model(1), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(
        ValueError, match="the PEFT method must be one that changes weights, such as LoRA, got prompt learning"
    ):
        step(tmp_path, prompted, teacher)
    student = lora_of(model(1), modules_to_save=["lm_head"])
    want = truth(student, teacher, examples())
    got = step(tmp_path, student, teacher)
    assert_step(got, want, 1e-4)
    assert any("lm_head" in name for name in got[1])
