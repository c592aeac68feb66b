"""TRL's trainers with our loss and with their own, on the same data: gradients against float64, curves, refusals,
patching."""

from __future__ import annotations

import contextlib
import copy
import functools
import re

import pytest
import torch
from trainers import (
    ARGUMENTS, assert_step, collate, examples, gradient_of, lora_of, model, tokenizer, truth, write_cache,
)

trl = pytest.importorskip("trl", reason="trl is not installed")

from datasets import Dataset  # noqa: E402
from trl import DistillationConfig  # noqa: E402
from trl.experimental.gkd import GKDConfig  # noqa: E402
from trl.experimental.gkd import GKDTrainer as TheirGKDTrainer  # noqa: E402
from trl.experimental.gold import GOLDConfig  # noqa: E402
from trl.experimental.gold import GOLDTrainer as TheirGOLDTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

from kd_kernels import launches  # noqa: E402
from kd_kernels.cache import CacheError  # noqa: E402
from kd_trainer.integrations import trl as ours  # noqa: E402
from kd_trainer.integrations.trl import KDLossMixin, KDOptions, kd_losses  # noqa: E402

BETAS = {0.0: "forward_kl", 0.5: "jsd(beta=0.5)", 1.0: "reverse_kl"}
OFF_POLICY = {
    "gkd": (ours.GKDTrainer, TheirGKDTrainer, GKDConfig), "gold": (ours.GOLDTrainer, TheirGOLDTrainer, GOLDConfig)
}
"""Our class, TRL's, its configuration."""


def dataset(count: int = 8) -> Dataset:
    """Rows that the test's collator reads; TRL's trainers look at the column ``messages`` alone."""
    rows = examples(count)
    return Dataset.from_list([row | {"messages": [{"role": "user", "content": "x"}]} for row in rows])


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    """As TRL's collators: with the prompts apart, which only generation reads."""
    batch = collate(rows)
    return batch | {"prompts": batch["input_ids"][:, :8], "prompt_attention_mask": batch["attention_mask"][:, :8]}


def gkd_config(tmp_path, kind=GKDConfig, **changes):
    options = ARGUMENTS | dict(lmbda=0.0, bf16=False, gradient_checkpointing=False, max_length=128) | changes
    if kind is GOLDConfig:
        options["max_completion_length"] = 64
    return kind(str(tmp_path), **options)


def gkd(cls, tmp_path, student, teacher, kind=GKDConfig, rows=8, processing_class=None, config=None, **kwargs):
    return cls(
        model=student, teacher_model=teacher, args=config or gkd_config(tmp_path, kind), train_dataset=dataset(rows),
        data_collator=padded, processing_class=processing_class or tokenizer(), **kwargs,
    )


def off_policy(
    name: str, tmp_path, student, teacher=None, whose: str = "ours", kd: dict | None = None, **changes
) -> tuple:
    """Loss and gradients of one step by ``GKDTrainer`` or ``GOLDTrainer`` at temperature 1, with further
    configuration."""
    mine, theirs, kind = OFF_POLICY[name]
    config = gkd_config(tmp_path, kind, **({"temperature": 1.0, "beta": 0.5} | changes))
    cls = mine if whose == "ours" else theirs
    return gradient_of(lambda: gkd(cls, tmp_path, student, teacher, config=config, **(kd or {})), student)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("whose", ("ours", "theirs"))
@pytest.mark.parametrize("name", OFF_POLICY)
def test_by_ours_and_by_theirs_is_float64(tmp_path, name: str, beta: float, whose: str) -> None:
    """GOLDTrainer's temperature is of the loss too, GKDTrainer's of sampling alone."""
    student, teacher = model(1), model(2, hidden=48)
    want = truth(student, teacher, examples(), BETAS[beta], temperature=0.8 if name == "gold" else 1.0)
    assert_step(off_policy(name, tmp_path, student, teacher, whose, beta=beta, temperature=0.8), want)


@pytest.mark.parametrize("accumulation", (1, 2, 4))
@pytest.mark.parametrize("name", OFF_POLICY)
def test_however_the_batch_is_split(tmp_path, name: str, accumulation: int) -> None:
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples(), "jsd(beta=0.5)")
    split = dict(per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)
    assert_step(off_policy(name, tmp_path, student, teacher, **split), want)


def test_trls_own_gold_gradient_is_smaller_by_the_number_of_micro_batches(tmp_path) -> None:
    """What kd_trainer.integrations.trl says is different: were TRL to mend it, its module's text must follow."""
    student, teacher = model(1), model(2)
    loss, want = truth(student, teacher, examples(), "jsd(beta=0.5)")
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    got_loss, got = off_policy("gold", tmp_path, student, teacher, "theirs", **split)
    assert_step((4 * got_loss, {name: 4 * gradient for name, gradient in got.items()}), (loss, want))


@pytest.mark.parametrize("divergence", launches.FORMULA_CASES.values())
def test_any_divergence(tmp_path, divergence: str) -> None:
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples(), divergence)
    assert_step(off_policy("gkd", tmp_path, student, teacher, kd=dict(kd=KDOptions(divergence))), want)


@pytest.mark.parametrize("name", OFF_POLICY)
@pytest.mark.parametrize(
    "objective",
    (
        dict(ce_weight=0.5, temperature=2.0), dict(top_k=8, ce_weight=0.1), dict(top_k=8, tail="renormalize"),
        dict(top_k=257, temperature=2.0),
    ),
    ids=str,
)
def test_cross_entropy_top_k_and_its_tail(tmp_path, name: str, objective: dict) -> None:
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples(), "forward_kl", **objective)
    assert_step(off_policy(name, tmp_path, student, teacher, kd=dict(kd=KDOptions("forward_kl", **objective))), want)


def test_lora_student(tmp_path) -> None:
    student, teacher = lora_of(model(1)), model(2)
    want = truth(student, teacher, examples(), "jsd(beta=0.5)")
    got = off_policy("gkd", tmp_path, student, teacher)
    assert_step(got, want, 1e-4)
    assert all("lora" in name for name in got[1])


@pytest.mark.parametrize("name", OFF_POLICY)
def test_trls_default_of_gradient_checkpointing(tmp_path, name: str) -> None:
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples(), "jsd(beta=0.5)")
    assert_step(off_policy(name, tmp_path, student, teacher, gradient_checkpointing=True), want)


@pytest.mark.parametrize("name", OFF_POLICY)
def test_trls_default_of_bf16_is_near(tmp_path, name: str) -> None:
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples(), "jsd(beta=0.5)")
    assert_step(off_policy(name, tmp_path, student, teacher, bf16=True), want, 3e-2, 5e-2)


@pytest.mark.parametrize("name", OFF_POLICY)
def test_evaluation_gives_the_same_loss(tmp_path, name: str) -> None:
    student, teacher = model(1), model(2)
    loss, _ = truth(student, teacher, examples(), "jsd(beta=0.5)")
    cls, _, kind = OFF_POLICY[name]
    config = gkd_config(tmp_path, kind, beta=0.5, temperature=1.0, per_device_eval_batch_size=8)
    trainer = gkd(cls, tmp_path, student, teacher, config=config, eval_dataset=dataset())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", OFF_POLICY)
def test_context_manager_patches_and_restores(tmp_path, name: str) -> None:
    _, theirs, kind = OFF_POLICY[name]
    before = theirs.__init__
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples(), "reverse_kl")
    config = gkd_config(tmp_path, kind, temperature=1.0)
    with kd_losses(KDOptions("reverse_kl")):
        trainer = gkd(theirs, tmp_path, student, teacher, config=config)
    assert theirs.__init__ is before
    assert_step(gradient_of(lambda: trainer, student), want)
    outside = gkd(theirs, tmp_path, model(1), teacher, config=config)
    assert "compute_loss" not in vars(outside)
    with pytest.raises(ZeroDivisionError), kd_losses():
        raise ZeroDivisionError
    assert theirs.__init__ is before


def test_mixin_gives_a_subclass_of_ones_own_the_loss_and_leaves_it_the_rest(tmp_path) -> None:
    class Noting(TheirGKDTrainer):
        noted: list[dict] = []

        def log(self, logs, *args, **kwargs):
            self.noted.append(logs)
            super().log(logs, *args, **kwargs)

    class Mine(KDLossMixin, Noting):
        pass

    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples(), "total_variation")
    with kd_losses(KDOptions("reverse_kl")):  # which is not for subclasses
        got = gradient_of(lambda: gkd(Mine, tmp_path, student, teacher, kd=KDOptions("total_variation")), student)
    assert_step(got, want)
    assert any("loss" in logs for logs in Noting.noted)


# -------------------------------------------------------------------------------------------------- on-policy trainers


def distillation(cls, tmp_path, student, teacher, beta=0.5, **kwargs):
    config = DistillationConfig(
        str(tmp_path), **(ARGUMENTS | dict(
            bf16=False, gradient_checkpointing=False, beta=beta, max_completion_length=12, temperature=0.8
        ) | kwargs.pop("args", {})),
    )
    prompts = Dataset.from_list(
        [{"prompt": text} for text in ("the small cat sees ", "the dog ", "a lamp ", "the river ")] * 2
    )
    return cls(
        model=student, teacher_model=teacher, args=config, train_dataset=prompts, processing_class=tokenizer(), **kwargs
    )


ON_POLICY = (
    *(dict(beta=beta) for beta in BETAS),
    *(dict(args=dict(per_device_train_batch_size=8 // n, gradient_accumulation_steps=n)) for n in (2, 4)),
    dict(args=dict(gradient_checkpointing=True)),
)


def compared(tmp_path, student=lambda: model(1), **options) -> list[tuple]:
    """Loss, gradients and entropies of one step, by ours and by theirs: the same completions by the same seed."""
    results = []
    for cls in (ours.DistillationTrainer, trl.DistillationTrainer):
        made = student()
        trainer = distillation(cls, tmp_path, made, model(2, hidden=48), **options)
        taken = gradient_of(lambda: trainer, made)  # noqa: B023
        results.append((*taken, [entry["entropy"] for entry in trainer.state.log_history if "entropy" in entry]))
    return results


@pytest.mark.parametrize("options", ON_POLICY, ids=str)
def test_distillation_trainer_is_theirs(tmp_path, options: dict) -> None:
    mine, theirs = compared(tmp_path, **options)
    assert_step(mine[:2], theirs[:2], 1e-4, 1e-3)
    assert mine[2] == pytest.approx(theirs[2], rel=1e-4)


def test_distillation_trainer_of_a_lora_student_is_theirs(tmp_path) -> None:
    mine, theirs = compared(tmp_path, lambda: lora_of(model(1)))
    assert_step(mine[:2], theirs[:2], 1e-4, 1e-3)
    assert all("lora" in name for name in mine[1])


def test_distillation_trainer_evaluates_as_theirs(tmp_path) -> None:
    losses = []
    for cls in (ours.DistillationTrainer, trl.DistillationTrainer):
        trainer = distillation(
            cls, tmp_path, model(1), model(2), eval_dataset=Dataset.from_list([{"prompt": "the river "}])
        )
        torch.manual_seed(0)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_context_manager_for_the_distillation_trainer(tmp_path) -> None:
    results = []
    for context, options in ((kd_losses(KDOptions("reverse_kl")), {}), (contextlib.nullcontext(), {"beta": 1.0})):
        student = model(1)
        with context:
            trainer = distillation(trl.DistillationTrainer, tmp_path, student, model(2), **options)
        results.append(gradient_of(lambda: trainer, student))  # noqa: B023
    assert_step(*results, 1e-4, 1e-3)


def test_models_by_their_folders_and_no_arguments(tmp_path, monkeypatch) -> None:
    """As in TRL's own first example. The tokenizers are compared, though none was given."""
    monkeypatch.chdir(tmp_path)
    for module in (ours, distillation_trainer):  # whose default, bf16, transformers refuses where there is no GPU
        monkeypatch.setattr(
            module, "DistillationConfig", functools.partial(DistillationConfig, use_cpu=True, report_to=[])
        )
    other = tokenizer()
    other.add_tokens(["<other>"])
    for name, seed, saved in (("student", 1, tokenizer()), ("teacher", 2, tokenizer()), ("stranger", 3, other)):
        model(seed).save_pretrained(name)
        saved.save_pretrained(name)
    make = lambda teacher: ours.DistillationTrainer(  # noqa: E731
        model="./student", teacher_model=teacher, train_dataset=Dataset.from_list([{"prompt": "the "}] * 8)
    )
    trainer = make("./teacher")
    assert trainer.args.output_dir == trl.DistillationTrainer(
        model="./student", teacher_model="./teacher", train_dataset=trainer.train_dataset
    ).args.output_dir
    assert trainer.kd_options.divergence.name == "reverse_kl" and trainer.kd_options.temperature == 1.0
    with pytest.raises(ValueError, match="must be that of the tokenizer in use"):
        make("./stranger")
    for cls, kind in ((ours.GKDTrainer, GKDConfig), (ours.GOLDTrainer, GOLDConfig)):
        with pytest.raises(ValueError, match="must be that of the tokenizer in use"):
            gkd(cls, tmp_path, "./student", "./stranger", config=gkd_config(tmp_path, kind))
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples(), "jsd(beta=0.5)")
    assert_step(off_policy("gkd", tmp_path, student, "./teacher"), want)


def test_distillation_trainer_with_another_divergence_differs_and_runs(tmp_path) -> None:
    student = model(1)
    kd = KDOptions("total_variation", ce_weight=0.1, top_k=16)
    loss, gradient = gradient_of(
        lambda: distillation(ours.DistillationTrainer, tmp_path, student, model(2), kd=kd), student
    )
    assert 0 < loss and all(g.isfinite().all() and g.any() for n, g in gradient.items() if "lm_head" in n)


def test_gkd_on_policy_generates_as_before(tmp_path) -> None:
    losses = []
    for cls in (ours.GKDTrainer, TheirGKDTrainer):
        student = model(1)
        config = gkd_config(tmp_path, beta=0.5, lmbda=1.0, max_new_tokens=8)
        trainer = lambda: gkd(cls, tmp_path, student, model(2), config=config)  # noqa: B023, E731
        losses.append(gradient_of(trainer, student)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ------------------------------------------------------------------------------------------------------ cache, refusals


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path / "cache", model(2), examples())
    return str(tmp_path / "cache")


@pytest.mark.parametrize("accumulation", (1, 4))
@pytest.mark.parametrize("name", OFF_POLICY)
def test_cache_in_place_of_the_teacher(tmp_path, cache, name: str, accumulation: int) -> None:
    student = model(1)
    want = truth(student, model(2), examples(), "jsd(beta=0.5)", ce_weight=0.1)
    split = dict(per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)
    options = dict(cache=cache, kd=KDOptions(ce_weight=0.1))
    assert_step(off_policy(name, tmp_path, student, kd=options, **split), want, 1e-4, 1e-3)


def test_context_manager_with_a_cache(tmp_path, cache) -> None:
    student = model(1)
    want = truth(student, model(2), examples(), "jsd(beta=0.5)")
    with kd_losses(cache=cache):
        trainer = gkd(TheirGKDTrainer, tmp_path, student, None)
    assert_step(gradient_of(lambda: trainer, student), want, 1e-4, 1e-3)


def test_padded_vocabulary(tmp_path) -> None:
    student, teacher = model(1), model(2)
    want = truth(student, teacher, examples(), "jsd(beta=0.5)")
    padded_teacher = copy.deepcopy(teacher)
    padded_teacher.resize_token_embeddings(264)
    with pytest.raises(ValueError, match="must be of one size, got 257 and 264; give KDOptions"):
        gkd(ours.GKDTrainer, tmp_path, student, padded_teacher)
    padded_teacher.save_pretrained(tmp_path / "padded")
    tokenizer().save_pretrained(tmp_path / "padded")
    for message, kd in (("must be of one size", KDOptions()), ("got the name .*; load it", KDOptions(valid_vocab=257))):
        with pytest.raises(ValueError, match=message):
            gkd(ours.GOLDTrainer, tmp_path, student, str(tmp_path / "padded"), GOLDConfig, kd=kd)
    for name in OFF_POLICY:
        got = off_policy(name, tmp_path, student := model(1), padded_teacher, kd=dict(kd=KDOptions(valid_vocab=257)))
        assert_step(got, want)
        assert padded_teacher.config.vocab_size == 264


@pytest.mark.parametrize("name", (*OFF_POLICY, "distillation"))
def test_a_head_that_is_not_found_is_refused_before_training(tmp_path, name: str) -> None:
    wanted = "get_output_embeddings() of LlamaModel must be a linear head with a 2-d weight, such as lm_head, got none"
    for student, teacher in ((model(1).model, model(2)), (model(1), model(2).model)):
        with pytest.raises(ValueError, match=re.escape(wanted)):
            if name == "distillation":
                distillation(ours.DistillationTrainer, tmp_path, student, teacher)
            else:
                gkd(OFF_POLICY[name][0], tmp_path, student, teacher, OFF_POLICY[name][2])
    with pytest.raises(ValueError, match=re.escape("get_output_embeddings() (lm_head) and get_decoder()")):
        gkd(ours.GKDTrainer, tmp_path, torch.nn.Linear(2, 2), model(2))


def test_what_cannot_work_is_refused_before_training(tmp_path, cache) -> None:
    teacher = model(2)
    config = lambda **changes: gkd_config(tmp_path, **changes)  # noqa: E731
    folder = tmp_path / "other"
    model(3).save_pretrained(folder)
    other = tokenizer()
    other.add_tokens(["<other>"])
    other.save_pretrained(folder)
    make = lambda **kwargs: gkd(ours.GKDTrainer, tmp_path, model(1), **({"teacher": teacher} | kwargs))  # noqa: E731
    for call, message in (
        (lambda: make(teacher=None), "GKDTrainer: teacher_model must be given, or cache, got None"),
        (
            lambda: distillation(ours.DistillationTrainer, tmp_path, model(1), None),
            "DistillationTrainer: teacher_model must be given, got None",
        ),
        (lambda: ours.GKDTrainer(model(1), teacher), "GKDTrainer: args must be given, got None"),
        (lambda: ours.GKDTrainer(args=config(), teacher_model=teacher), "GKDTrainer: model must be given, got None"),
        (lambda: make(compute_metrics=len), "GKDTrainer: compute_metrics must be None, got given; there are no logits"),
        (
            lambda: ours.GKDTrainer(model(1), args=config(), train_dataset=dataset(), cache=cache),
            "processing_class must be given with a cache",
        ),
        (lambda: make(cache=cache), "teacher_model must be None with a cache"),
        (lambda: make(teacher=None, cache=cache, config=config(lmbda=0.5)), "lmbda must be 0.0 with a cache"),
        (lambda: make(teacher=None, cache=cache, config=config(seq_kd=True)), "seq_kd must be False with a cache"),
        (lambda: make(config=config(label_smoothing_factor=0.1)), "label_smoothing_factor must be 0"),
        (lambda: make(teacher=str(folder)), "must be that of the tokenizer in use"),
        (
            lambda: gkd(
                ours.GOLDTrainer, tmp_path, model(1), teacher,
                config=gkd_config(tmp_path, GOLDConfig, use_uld_loss=True)
            ),
            "GOLDTrainer: use_uld_loss must be False",
        ),
        (
            lambda: distillation(ours.DistillationTrainer, tmp_path, model(1), None, cache=cache),
            re.escape("it writes its completions anew; use GKDTrainer(lmbda=0)"),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(CacheError, match="must hold every sequence of the data set, got 2 of 10"):
        make(teacher=None, cache=cache, rows=10)
    with pytest.raises(CacheError, match="must be of tokenizer"):
        make(teacher=None, cache=cache, processing_class=other)
