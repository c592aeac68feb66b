"""The loop: splitting changes nothing, stopping changes nothing, what does not fit is refused before the first step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd_kernels import divergences
from kd_kernels.cache import CacheError
from kd_trainer.caching.build import build_cache
from kd_trainer.caching.options import CacheOptions
from kd_trainer.config import DataConfig, OptimConfig, to_yaml
from kd_trainer.data import load_documents
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method
from kd_trainer.models import CausalLM, load_pretrained, load_tokenizer, tokenizer_fingerprint
from kd_trainer.teachers import LiveTeacher, open_cache
from kd_trainer.tiny import save_tiny_model
from kd_trainer.trainer import LossModule, accumulate, learning_rate, train
from processes import launch_kdk


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_equal_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def metrics(run: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ splitting


def test_the_gradient_does_not_depend_on_the_number_of_micro_batches(make_config, tiny):
    """Plain autograd over whole documents is the truth; 1, 2 and 4 micro-batches agree with it to float64 rounding."""
    config = make_config(data={"max_length": 32})
    tokenizer = load_tokenizer(str(tiny))
    documents = load_documents(config.data, tokenizer)[:14]
    documents = [dataclasses.replace(d, first_target=3 * (i % 4) + 1) for i, d in enumerate(documents)]  # with prompts
    count = sum(int(document.counted.sum()) for document in documents)
    torch.manual_seed(3)
    teacher_model = CausalLM(load_pretrained(str(tiny)).double())
    teacher = LiveTeacher(teacher_model, "")
    student = load_pretrained(str(tiny)).double()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    stats = ("divergence", "label_logprob")
    objective = DivergenceObjective(divergences.parse("jsd(beta=0.3)"), 0.7, 0.3, 1.5, True, "bucket", stats)
    method = Method.single("kd", DatasetTokens.of(config, documents), teacher, objective)
    accelerator = Accelerator()

    total = torch.zeros((), dtype=torch.float64)
    for document in documents:
        z = student(document.tokens[None], use_cache=False).logits[0, :-1][document.counted]
        t = teacher_model.model(document.tokens[None], use_cache=False).logits[0, :-1][document.counted]
        p, q = (t / 1.5).softmax(-1), (z / 1.5).softmax(-1)
        m = 0.3 * p + 0.7 * q
        jsd = 0.3 * (p * (p / m).log()).sum() + 0.7 * (q * (q / m).log()).sum()
        ce = torch.nn.functional.cross_entropy(z, document.tokens[1:][document.counted], reduction="sum")
        total = total + 0.7 * 1.5**2 * jsd + 0.3 * ce
    (total / count).backward()
    expected = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}

    module = LossModule(CausalLM(student), method.objectives)
    for parts in (1, 2, 4):
        student.zero_grad()
        split = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=parts))
        step = accumulate(accelerator, module, method, documents, split)
        assert step["loss"] == pytest.approx(total.item() / count, rel=1e-6) and step["tokens"] == count
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-10)


def test_a_run_in_micro_batches_is_the_same_run(make_config, tmp_path):
    runs = [train(make_config(out=str(tmp_path / f"a{n}"), train={"accumulation": n})) for n in (1, 4)]
    one, four = (metrics(run.parent) for run in runs)
    for a, b in zip(one, four):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["tokens"] == b["tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_two_processes_are_the_same_run_as_one(make_config, tmp_path):
    one = train(make_config(train={"steps": 2}))
    two = make_config(out=str(tmp_path / "two"), train={"steps": 2})
    (tmp_path / "two.yaml").write_text(to_yaml(two))
    launch_kdk(["train", str(tmp_path / "two.yaml")], timeout=300)
    for a, b in zip(metrics(one.parent), metrics(two.out), strict=True):
        assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(make_config, tmp_path):
    plain = train(make_config(train={"steps": 2}))
    checkpointed = train(make_config(out=str(tmp_path / "c"), train={"steps": 2, "gradient_checkpointing": True}))
    for a, b in zip(metrics(plain.parent), metrics(checkpointed.parent), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def test_packed_and_padded_runs_agree(make_config, tmp_path):
    packed = train(make_config(train={"steps": 2}))
    padded = train(make_config(out=str(tmp_path / "p"), train={"steps": 2}, data={"packing": False}))
    for a, b in zip(metrics(packed.parent), metrics(padded.parent), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_bf16_follows_fp32(make_config, tmp_path):
    full = train(make_config(train={"steps": 3}))
    AcceleratorState._reset_state(reset_partial_state=True)
    half = train(make_config(out=str(tmp_path / "h"), train={"steps": 3, "precision": "bf16"}))
    for a, b in zip(metrics(full.parent), metrics(half.parent), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
    assert all(tensor.dtype == torch.float32 for tensor in weights(half).values())


# --------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_ends_with_the_same_bits(make_config, tmp_path, killed_at, stop):
    """Six steps at once, and six steps of which the process dies after some; dropout makes the generators matter."""
    model = tmp_path / "dropout"
    save_tiny_model(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    options = dict(student={"model": str(model)}, train={"steps": 6, "save_every": 2, "keep_checkpoints": 1})
    whole = train(make_config(out=str(tmp_path / "whole"), **options))

    with killed_at(stop):
        train(make_config(out=str(tmp_path / "halves"), **options))
    assert [path.name for path in (tmp_path / "halves" / "checkpoints").iterdir()] == ["step-00000002"]
    torch.rand(7)  # the generator is somewhere else now
    halves = train(make_config(out=str(tmp_path / "halves"), **options))
    assert_equal_weights(whole, halves)
    drop = lambda lines: [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]  # noqa: E731
    assert drop(metrics(whole.parent)) == drop(metrics(halves.parent))


def test_a_checkpoint_of_another_run_is_refused(make_config, tmp_path):
    with pytest.raises(ValueError, match="accumulation x processes"):
        train(make_config(train={"accumulation": 100}))
    train(make_config(train={"save_every": 2}))
    for changes, message in (
        ({"optim": {"lr": 2e-3}}, r"with optim.lr=0.001 \(now 0.002\); set another out"),
        ({"seed": 1}, r"with seed=0 \(now 1\)"),
        ({"data": {"limit": 30}}, "with data="),
        ({"student": {"model": str(other_model(tmp_path))}}, "with student.model="),
    ):
        with pytest.raises(ValueError, match="the checkpoint to resume from must be of this run, got .*" + message):
            train(make_config(**changes))
    with pytest.raises(ValueError, match="out must be a folder without a run, with train.resume=false"):
        train(make_config(train={"resume": False}))


def test_a_finished_run_is_left_as_it_is(make_config, capsys):
    model = train(make_config())
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert train(make_config()) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == before
    assert "holds this run, finished" in capsys.readouterr().out


def test_checkpoints_are_folders_for_from_pretrained(make_config):
    model = train(make_config(train={"save_every": 2, "steps": 5, "tensorboard": True, "plot": True}))
    run = model.parent
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    for folder in (model, run / "checkpoints" / "step-00000004"):
        assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded(torch.arange(5)[None]).logits.isfinite().all()
    assert not list(run.rglob(".*")) and list((run / "tensorboard").iterdir())
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "final_lr: 0.1" in (run / "config.yaml").read_text()
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5]


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    optim = OptimConfig(lr=1.0, warmup=0.2, final_lr=0.1)
    rates = [learning_rate(step, 100, optim) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 21, 2 / 21, 3 / 21]) and rates[20] == pytest.approx(1.0)
    assert rates[20:] == sorted(rates[20:], reverse=True) and rates[-1] == pytest.approx(0.1)
    assert rates[20 + 79 // 2] == pytest.approx(0.55, abs=0.02)
    assert learning_rate(0, 1, optim) > 0


# ----------------------------------------------------------------------------------------------------- methods


@pytest.fixture(scope="module")
def cache(tiny, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "c"
    options = CacheOptions(k=200, step_nats=0, temperatures=(1.0, 2.0))
    build_cache(str(tiny), DataConfig(source=str(text), max_length=48), folder, options)
    return folder


def kd(make_config, tiny, **changes):
    options = {"method": "kd", "student": {"model": None, "layers": [0, 2]}, "teacher": {"model": str(tiny)}}
    for key, value in changes.items():
        options[key] = options.get(key, {}) | value if isinstance(value, dict) else value
    return make_config(**options)


def test_distillation_moves_towards_the_teacher(make_config, tiny, cache):
    lines = metrics(train(kd(make_config, tiny, cache=str(cache), optim={"lr": 3e-3}, train={"steps": 12})).parent)
    assert lines[-1]["divergence"] < 0.7 * lines[0]["divergence"]


def other_model(tmp_path, vocab: bool = False) -> Path:
    folder = tmp_path / "other"
    torch.manual_seed(1)
    save_tiny_model(folder)
    if vocab:
        tokenizer = load_tokenizer(str(folder))
        tokenizer.add_tokens(["<more>"])
        tokenizer.save_pretrained(folder)
        model = load_pretrained(str(folder))
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)
    return folder


def test_a_cache_of_another_teacher_is_refused(make_config, tiny, cache, tmp_path):
    other = other_model(tmp_path)
    with pytest.raises(CacheError, match="must be of teacher .*, got .*; set teacher.model to that one, or build a"):
        train(kd(make_config, tiny, cache=str(cache), teacher={"model": str(other)}))
    with pytest.raises(CacheError, match="must be of teacher 00ff"):
        train(make_config(method="kd", cache=str(cache), teacher={"fingerprint": "00ff"}))
    assert not (tmp_path / "run").exists()


def test_a_cache_of_another_tokenizer_is_refused(make_config, tiny, cache, tmp_path):
    other = other_model(tmp_path)
    tokenizer = load_tokenizer(str(other))
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(other)
    with pytest.raises(CacheError, match="must be of tokenizer .*; set tokenizer to the teacher's, or build a"):
        train(make_config(method="kd", cache=str(cache), student={"model": str(other)}))
    train(make_config(method="kd", cache=str(cache), student={"model": str(other)}, tokenizer=str(tiny)))


def test_a_cache_of_another_bos_policy_is_refused(make_config, tiny, cache, tmp_path):
    other = other_model(tmp_path)
    tokenizer = load_tokenizer(str(other))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    tokenizer.save_pretrained(other)
    message = "must be of BOS policy 0 text, got none .*; set tokenizer to the teacher's, or build a"
    with pytest.raises(CacheError, match=message):
        train(make_config(method="kd", cache=str(cache), student={"model": str(other)}))


def test_a_cache_of_another_chat_template_is_refused(tiny, cache):
    expected = {"teacher": None, "tokenizer": tokenizer_fingerprint(load_tokenizer(str(tiny))), "vocab": 257}
    message = "must be of chat template 7e3b, got none .*; set tokenizer to the teacher's, or build a"
    with pytest.raises(CacheError, match=message):
        open_cache(str(cache), temperature=1.0, chat_template="7e3b", **expected)
    open_cache(str(cache), temperature=1.0, chat_template="none", **expected)


def test_a_cache_of_another_text_is_refused(make_config, tiny, cache):
    with pytest.raises(CacheError, match="must hold every document, got .* that it lacks .*with kdk cache build"):
        train(kd(make_config, tiny, cache=str(cache), data={"max_length": 20}))


def test_a_cache_without_the_rows_of_another_prompt_mask_is_refused(make_config, tiny, tmp_path):
    pairs, other = tmp_path / "pairs.jsonl", tmp_path / "other.jsonl"
    one = '{"prompt": "what is it? ", "completion": "a cat."}\n'
    pairs.write_text(one + one + '{"prompt": "and that? ", "completion": "no."}\n')
    other.write_text('{"prompt": "what is", "completion": " it? a cat."}\n')  # the same tokens, split elsewhere
    config = make_config(data={"source": str(pairs)})
    numbers = build_cache(str(tiny), config.data, tmp_path / "c")
    assert numbers["documents"] == 2 and numbers["rows"] == len("a cat.") + len("no.")
    options = dict(cache=str(tmp_path / "c"), train={"steps": 1, "batch_tokens": 64})
    train(kd(make_config, tiny, data={"source": str(pairs)}, **options))
    with pytest.raises(CacheError, match="not cached"):
        train(kd(make_config, tiny, data={"source": str(other)}, out=str(tmp_path / "o"), **options))


def test_a_temperature_that_the_cache_does_not_know(make_config, tiny, cache):
    message = r"objective.temperature must be 1 or one of the cache's \(1.0, 2.0\), got 3.0; build it with"
    with pytest.raises(ValueError, match=message):
        train(kd(make_config, tiny, cache=str(cache), objective={"temperature": 3.0}))


def test_a_folder_that_is_no_cache(make_config, tiny, tmp_path):
    with pytest.raises(CacheError, match="manifest"):
        train(kd(make_config, tiny, cache=str(tmp_path)))


def test_teacher_and_student_must_share_a_vocabulary(make_config, tiny, tmp_path):
    other = other_model(tmp_path, vocab=True)
    message = "got 1 entries that differ, the first '<more>' with id 257; teacher and student must share a tokenizer"
    with pytest.raises(ValueError, match=message):
        train(kd(make_config, tiny, student={"model": str(other), "layers": None}))


def test_distillation_without_weight_on_the_teacher_is_refused(make_config, tiny):
    with pytest.raises(ValueError, match="must be above 0 for method kd, got 0.0; method: sft trains on labels"):
        train(kd(make_config, tiny, objective={"kd_weight": 0.0, "ce_weight": 1.0}))


def test_a_teacher_that_was_expected_to_be_another(make_config, tiny):
    with pytest.raises(ValueError, match="the fingerprint of teacher .* must be abc, got "):
        train(kd(make_config, tiny, teacher={"fingerprint": "abc"}))


def test_a_loss_that_is_not_finite_stops_the_run(make_config, tmp_path):
    with pytest.raises(ValueError, match="finite|NaN"):
        train(make_config(optim={"lr": 1e30, "clip": 0.0, "warmup": 0.0}, train={"steps": 12}))
    assert not (tmp_path / "run" / "model").exists()
