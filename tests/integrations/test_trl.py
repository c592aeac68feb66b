"""TRL's trainers with our loss and with their own, on the same data: gradients against float64, curves, refusals, patching."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from trainers import ARGUMENTS, assert_same, collate, examples, gradient_of, model, tokenizer, truth

trl = pytest.importorskip("trl", reason="trl is not installed")

from datasets import Dataset  # noqa: E402
from test_hf import write_cache  # noqa: E402
from trl import DistillationConfig  # noqa: E402
from trl.experimental.gkd import GKDConfig  # noqa: E402
from trl.experimental.gkd import GKDTrainer as TheirGKDTrainer  # noqa: E402
from trl.experimental.gold import GOLDConfig  # noqa: E402
from trl.experimental.gold import GOLDTrainer as TheirGOLDTrainer  # noqa: E402

from kd_kernels.cache import CacheError  # noqa: E402
from kd_trainer.integrations import trl as ours  # noqa: E402
from kd_trainer.integrations.trl import KDOptions, kd_losses  # noqa: E402
from kd_trainer.models import tokenizer_fingerprint  # noqa: E402

BETAS = {0.0: "forward_kl", 0.5: "jsd", 1.0: "reverse_kl"}


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


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("whose", ("ours", "theirs"))
def test_gkd_by_ours_and_by_theirs_is_float64(tmp_path, beta: float, whose: str) -> None:
    cls = ours.GKDTrainer if whose == "ours" else TheirGKDTrainer
    student, teacher = model(1), model(2, hidden=48)
    loss, want = truth(student, teacher, examples(), BETAS[beta])
    config = gkd_config(tmp_path, beta=beta)
    got_loss, got = gradient_of(lambda: gkd(cls, tmp_path, student, teacher, config=config), student)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert_same(got, want)


@pytest.mark.parametrize("accumulation", (1, 2, 4))
def test_gkd_however_the_batch_is_split(tmp_path, accumulation: int) -> None:
    student, teacher = model(1), model(2)
    loss, want = truth(student, teacher, examples(), "jsd")
    config = gkd_config(
        tmp_path, beta=0.5, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation
    )
    got_loss, got = gradient_of(lambda: gkd(ours.GKDTrainer, tmp_path, student, teacher, config=config), student)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert_same(got, want)


def test_gkd_with_another_divergence_cross_entropy_and_top_k(tmp_path) -> None:
    student, teacher = model(1), model(2)
    loss, want = truth(student, teacher, examples(), "forward_kl", ce_weight=0.5, temperature=2.0)
    kd = KDOptions("forward_kl", ce_weight=0.5, temperature=2.0, top_k=257)
    got_loss, got = gradient_of(lambda: gkd(ours.GKDTrainer, tmp_path, student, teacher, kd=kd), student)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert_same(got, want)


@pytest.mark.parametrize("whose", ("ours", "theirs"))
def test_gold_same_tokenizer(tmp_path, whose: str) -> None:
    """Its temperature is of the loss too, in contrast to GKDTrainer's."""
    cls = ours.GOLDTrainer if whose == "ours" else TheirGOLDTrainer
    student, teacher = model(1), model(2)
    loss, want = truth(student, teacher, examples(), "jsd", temperature=0.9)
    config = gkd_config(tmp_path, GOLDConfig, beta=0.5, temperature=0.9, use_uld_loss=False)
    make = lambda: gkd(cls, tmp_path, student, teacher, config=config)  # noqa: E731
    got_loss, got = gradient_of(make, student)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert_same(got, want)


def test_context_manager_patches_and_restores(tmp_path) -> None:
    before = TheirGKDTrainer.__init__
    student, teacher = model(1), model(2)
    _, want = truth(student, teacher, examples(), "reverse_kl")
    with kd_losses(KDOptions("reverse_kl")):
        trainer = gkd(TheirGKDTrainer, tmp_path, student, teacher)
    assert TheirGKDTrainer.__init__ is before
    _, got = gradient_of(lambda: trainer, student)
    assert_same(got, want)
    outside = gkd(TheirGKDTrainer, tmp_path, model(1), teacher)
    assert "compute_loss" not in vars(outside)
    with pytest.raises(ZeroDivisionError), kd_losses():
        1 / 0
    assert TheirGKDTrainer.__init__ is before


def test_convergence_is_theirs(tmp_path) -> None:
    """Fifty steps of AdamW: the same curve by our loss and by TRL's own."""
    curves = []
    for cls in (ours.GKDTrainer, TheirGKDTrainer):
        config = gkd_config(
            tmp_path, beta=0.5, max_steps=50, optim="adamw_torch", learning_rate=3e-3, per_device_train_batch_size=4
        )
        trainer = gkd(cls, tmp_path, model(1), model(2), config=config)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    mine, theirs = (torch.tensor(curve) for curve in curves)
    assert len(mine) == 50 and mine[-5:].mean() < 0.7 * mine[:5].mean()
    torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-4)


# -------------------------------------------------------------------------------------------------- on-policy trainers


def distillation(cls, tmp_path, student, teacher, beta=0.5, **kwargs):
    config = DistillationConfig(
        str(tmp_path), **(ARGUMENTS | dict(
            bf16=False, gradient_checkpointing=False, beta=beta, max_completion_length=12, temperature=0.8, **kwargs.pop("args", {})
        )),
    )
    prompts = Dataset.from_list([{"prompt": text} for text in ("the small cat sees ", "the dog ", "a lamp ", "the river ")] * 2)
    return cls(
        model=student, teacher_model=teacher, args=config, train_dataset=prompts, processing_class=tokenizer(), **kwargs
    )


@pytest.mark.parametrize("beta", BETAS)
def test_distillation_trainer_is_theirs(tmp_path, beta: float) -> None:
    """The same completions by the same seed, so the same gradient."""
    results = []
    for cls in (ours.DistillationTrainer, trl.DistillationTrainer):
        student = model(1)
        trainer = distillation(cls, tmp_path, student, model(2, hidden=48), beta)
        results.append(gradient_of(lambda: trainer, student))  # noqa: B023
        results[-1] += ([entry["entropy"] for entry in trainer.state.log_history if "entropy" in entry],)
    (loss, gradient, entropy), (their_loss, their_gradient, their_entropy) = results
    assert loss == pytest.approx(their_loss, rel=1e-4) and entropy == pytest.approx(their_entropy, rel=1e-4)
    assert_same(gradient, their_gradient, rtol=1e-3)


def test_distillation_trainer_with_another_divergence_differs_and_runs(tmp_path) -> None:
    student = model(1)
    kd = KDOptions("total_variation", ce_weight=0.1, top_k=16)
    loss, gradient = gradient_of(lambda: distillation(ours.DistillationTrainer, tmp_path, student, model(2), kd=kd), student)
    assert 0 < loss and all(g.isfinite().all() and g.any() for n, g in gradient.items() if "lm_head" in n)


def test_gkd_on_policy_generates_as_before(tmp_path) -> None:
    losses = []
    for cls in (ours.GKDTrainer, TheirGKDTrainer):
        student = model(1)
        config = gkd_config(tmp_path, beta=0.5, lmbda=1.0, max_new_tokens=8)
        losses.append(gradient_of(lambda: gkd(cls, tmp_path, student, model(2), config=config), student)[0])  # noqa: B023
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ------------------------------------------------------------------------------------------------------ cache, refusals


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    write_cache(folder, model(2), examples(), tokenizer_fingerprint(tokenizer()))
    return str(folder)


@pytest.mark.parametrize("cls, kind", ((ours.GKDTrainer, GKDConfig), (ours.GOLDTrainer, GOLDConfig)))
def test_cache_in_place_of_the_teacher(tmp_path, cache, cls, kind) -> None:
    student = model(1)
    loss, want = truth(student, model(2), examples(), "jsd")
    config = gkd_config(tmp_path, kind, beta=0.5, temperature=1.0)
    got_loss, got = gradient_of(lambda: gkd(cls, tmp_path, student, None, config=config, cache=cache), student)
    assert got_loss == pytest.approx(loss, rel=1e-4)
    assert_same(got, want, rtol=1e-3)


def test_padded_vocabulary(tmp_path) -> None:
    student, teacher = model(1), model(2)
    loss, want = truth(student, teacher, examples(), "jsd")
    padded_teacher = copy.deepcopy(teacher)
    padded_teacher.resize_token_embeddings(264)
    with pytest.raises(ValueError, match="must be of one size, got 257 and 264; give KDOptions"):
        gkd(ours.GKDTrainer, tmp_path, student, padded_teacher)
    for cls, kind in ((ours.GKDTrainer, GKDConfig), (ours.GOLDTrainer, GOLDConfig)):
        student = model(1)
        config = gkd_config(tmp_path, kind, beta=0.5, temperature=1.0)
        make = lambda: gkd(  # noqa: E731
            cls, tmp_path, student, padded_teacher, config=config, kd=KDOptions(valid_vocab=257)  # noqa: B023
        )
        got_loss, got = gradient_of(make, student)
        assert got_loss == pytest.approx(loss, rel=1e-5)
        assert_same(got, want)
        assert padded_teacher.config.vocab_size == 264


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
        (lambda: make(cache=cache), "teacher_model must be None with a cache"),
        (lambda: make(teacher=None, cache=cache, config=config(lmbda=0.5)), "lmbda must be 0.0 with a cache"),
        (lambda: make(teacher=None, cache=cache, config=config(seq_kd=True)), "seq_kd must be False with a cache"),
        (lambda: make(config=config(label_smoothing_factor=0.1)), "label_smoothing_factor must be 0"),
        (lambda: make(teacher=str(folder)), "must be that of the tokenizer in use"),
        (
            lambda: gkd(
                ours.GOLDTrainer, tmp_path, model(1), teacher, config=gkd_config(tmp_path, GOLDConfig, use_uld_loss=True)
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
