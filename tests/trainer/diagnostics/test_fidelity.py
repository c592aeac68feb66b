"""Fidelity on a student's own prefixes against full logits in float64, and every diagnostic from the command line."""

from __future__ import annotations

import json

import pytest
import torch

from kd_trainer.cli import main
from kd_trainer.data import Document
from kd_trainer.diagnostics.contexts import prompts_in, written
from kd_trainer.diagnostics.fidelity import fidelity, fidelity_table
from kd_trainer.evaluate import evaluate
from kd_trainer.models import CausalLM, cut_layers, load_pretrained
from kd_trainer.rollout import Options


@pytest.fixture(scope="module")
def pair(tiny) -> tuple[CausalLM, CausalLM]:
    teacher = load_pretrained(str(tiny))
    torch.manual_seed(2)
    with torch.no_grad():  # initial weights predict nothing with confidence
        for parameter in teacher.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return CausalLM(teacher), CausalLM(cut_layers(teacher, (0, 3)))


DOCUMENTS = [Document(torch.arange(5, 5 + n) * 11 % 257, first) for n, first in ((9, 2), (14, 5), (7, 3))]
OPTIONS = Options(max_new_tokens=12, stop_ids=(0,))


def test_own_prefixes_in_float64(pair):
    teacher, student = pair
    result = fidelity(teacher, {"s": student}, DOCUMENTS, OPTIONS, seed=3, samples=2, top_k=4)
    assert result["text"] == evaluate(teacher, {"s": student}, DOCUMENTS, top_k=4)
    texts = written(student, prompts_in("test", DOCUMENTS), OPTIONS, seed=3, samples=2)
    assert len(texts) == 6 and not torch.equal(texts[0].tokens, texts[1].tokens)
    p, q, words = [], [], []
    for text in texts:
        for model, found in ((teacher, p), (student, q)):
            with torch.no_grad():
                logits = model.model.double()(text.tokens[None], use_cache=False).logits[0, :-1]
            found.append(logits[text.counted].log_softmax(-1))
            model.model.float()
        words.append(text.tokens[1:][text.counted])
    p, q, words = torch.cat(p), torch.cat(q), torch.cat(words)
    own = result["own"]["s"]
    assert own["tokens"] == len(words)
    shared = [len({*a.tolist()} & {*b.tolist()}) / 4 for a, b in zip(p.topk(4).indices, q.topk(4).indices)]
    confidence, first = q.exp().max(-1)
    gap = (confidence - p.exp().gather(1, first[:, None])[:, 0])
    bins = (confidence * 15).long().clamp(max=14)
    truth = {
        "forward_kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "reverse_kl": float((q.exp() * (q - p)).sum(-1).mean()),
        "agreement": float((p.argmax(-1) == first).double().mean()),
        "acceptance": float(torch.minimum(p.exp(), q.exp()).sum(-1).mean()), "overlap": sum(shared) / len(shared),
        "perplexity": float((-q.gather(1, words[:, None]).mean()).exp()),
        "ece": sum(abs(float(gap[bins == b].sum())) for b in range(15)) / len(gap),
    }
    for name, value in truth.items():
        assert own["models"]["s"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert own["models"]["teacher"]["ece"] == pytest.approx(0.0, abs=1e-6)  # a teacher is calibrated to itself
    assert own["models"]["teacher"]["perplexity"] == pytest.approx(
        float((-p.gather(1, words[:, None]).mean()).exp()), rel=1e-4
    )
    assert own["models"]["s"]["forward_kl"] != pytest.approx(result["text"]["models"]["s"]["forward_kl"], rel=1e-3)
    assert "on the text" in fidelity_table(result) and "where s wrote the context" in fidelity_table(result)


def test_the_overlap_of_a_model_with_itself_and_its_range(pair):
    assert evaluate(pair[0], {"same": pair[0]}, DOCUMENTS, top_k=257)["models"]["same"]["overlap"] == 1.0
    for k in (0, 258):
        with pytest.raises(ValueError, match=f"evaluate: top_k must be in 1..257, the vocabulary, got {k}"):
            evaluate(pair[0], {"same": pair[0]}, DOCUMENTS, top_k=k)
    with pytest.raises(ValueError, match="right must be one of label, teacher, got 'text'"):
        evaluate(pair[0], {"same": pair[0]}, DOCUMENTS, right="text")


@pytest.fixture(scope="module")
def folders(pair, tiny, tmp_path_factory) -> list[str]:
    made = []
    for model in pair:
        made.append(tmp_path_factory.mktemp("model"))
        model.model.save_pretrained(made[-1])
        for file in tiny.glob("*token*"):
            (made[-1] / file.name).write_bytes(file.read_bytes())
    return list(map(str, made))


@pytest.mark.parametrize(("arguments", "printed", "key"), [
    (("fidelity", "--teacher", "--student", "--prompt-tokens", "6", "--top-k", "3"), "wrote the context", "own"),
    (
        ("exposure", "--teacher", "--student", "--prompt-tokens", "6", "--samples", "2", "--no-stop"), "ExAccErr",
        "excess",
    ),
    (("flips", "--old", "--new"), "negative flips", "churn"),
    (("bottleneck", "--teacher", "--student", "--contexts", "60"), "KL floor", "floor_at_student_width"),
])
def test_from_the_command_line(capsys, folders, text, tmp_path, arguments, printed, key):
    kind, first, second, *rest = arguments
    rest = [*rest, "--max-new-tokens", "8"] if "--prompt-tokens" in rest else rest
    data = ("--data", str(text), "--limit", "6", "--max-length", "32", "--json", str(tmp_path / "d.json"))
    assert main(["diagnose", kind, first, folders[0], second, folders[1], *rest, *data]) == 0
    assert printed in capsys.readouterr().out
    assert key in json.loads((tmp_path / "d.json").read_text())


def test_a_mistake_on_the_command_line_is_one_line(capsys, folders, text):
    command = ["diagnose", "exposure", "--teacher", folders[0], "--student", folders[1], "--data", str(text)]
    assert main(command) == 2
    assert "kdk: excess_error: prompt_tokens must be given for texts without a prompt" in capsys.readouterr().err
