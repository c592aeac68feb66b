"""Every number of ``kdk eval`` against full logits in float64."""

from __future__ import annotations

import math

import pytest
import torch

from kd_trainer.data import Document
from kd_trainer.evaluate import Calibration, batches_by_length, evaluate, table
from kd_trainer.models import CausalLM, cut_layers, load_pretrained


@pytest.fixture
def pair(tiny):
    teacher = load_pretrained(str(tiny))
    torch.manual_seed(2)
    with torch.no_grad():  # initial weights predict nothing with confidence, and layers do next to nothing
        for parameter in teacher.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return CausalLM(teacher), CausalLM(cut_layers(teacher, (0, 3)))


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(5)
    sizes = ((9, 1), (30, 4), (17, 1), (2, 1), (30, 29))  # tokens, and the first that is a target
    return [Document(torch.randint(0, 257, (length,), generator=generator), first) for length, first in sizes]


def truth(teacher: CausalLM, student: CausalLM, documents: list[Document]) -> dict[str, dict[str, float]]:
    """Definitions, one document at a time, with [N, V] logits in float64."""
    p, q, labels = [], [], []
    for document in documents:
        for model, logits in ((teacher, p), (student, q)):
            with torch.no_grad():
                z = model.model.double()(document.tokens[None], use_cache=False).logits[0, :-1]
            logits.append(z[document.counted].log_softmax(-1))
        labels.append(document.tokens[1:][document.counted])
    p, q, labels = torch.cat(p), torch.cat(q), torch.cat(labels)
    rows = torch.arange(len(labels))

    def ece(logprobs):
        confidence, top = logprobs.exp().max(-1)
        total = 0.0
        for b in range(15):
            inside = (confidence >= b / 15) & (confidence < (b + 1) / 15) if b < 14 else confidence >= b / 15
            if inside.any():
                gap = (top == labels)[inside].double().mean() - confidence[inside].mean()
                total += float(inside.double().mean() * gap.abs())
        return total

    return {
        "teacher": {"perplexity": math.exp(-p[rows, labels].mean()), "ece": ece(p)},
        "student": {
            "perplexity": math.exp(-q[rows, labels].mean()), "ece": ece(q),
            "forward_kl": float((p.exp() * (p - q)).sum(-1).mean()),
            "reverse_kl": float((q.exp() * (q - p)).sum(-1).mean()),
            "agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
            "acceptance": float(torch.minimum(p.exp(), q.exp()).sum(-1).mean()),
        },
    }


def test_every_number_is_that_of_full_logits_in_float64(pair, documents, monkeypatch):
    monkeypatch.setattr("kd_trainer.evaluate.CHUNK_BYTES", 4 * 257 * 7)  # seven rows at a time
    result = evaluate(pair[0], {"student": pair[1]}, documents, batch_tokens=64)
    expected = truth(*pair, documents)
    assert result["tokens"] == sum(int(document.counted.sum()) for document in documents)
    for model, values in expected.items():
        for name, value in values.items():
            assert result["models"][model][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (model, name)
    assert expected["student"]["forward_kl"] > 0.1 and 0.0 < expected["student"]["agreement"] < 1.0


def test_a_teacher_is_at_distance_zero_from_itself(pair, documents):
    models = evaluate(pair[0], {"itself": pair[0]}, documents)["models"]
    assert models["itself"]["perplexity"] == pytest.approx(models["teacher"]["perplexity"])
    assert models["itself"]["ece"] == pytest.approx(models["teacher"]["ece"])
    for name in ("forward_kl", "reverse_kl", "agreement", "acceptance"):
        assert models["itself"][name] == pytest.approx(models["teacher"][name], abs=1e-5)


def test_students_do_not_disturb_each_other(pair, documents):
    both = evaluate(pair[0], {"a": pair[1], "b": pair[0]}, documents)["models"]
    assert both["a"] == evaluate(pair[0], {"a": pair[1]}, documents)["models"]["a"]
    assert both["b"] == evaluate(pair[0], {"b": pair[0]}, documents)["models"]["b"]


def test_unequal_vocabularies(pair, documents, tiny):
    with pytest.raises(ValueError, match="of small must be the teacher's 257, got 200; teacher and student must share"):
        evaluate(pair[0], {"small": CausalLM(load_pretrained(str(tiny)), vocab=200)}, documents)


def test_calibration_error_of_known_counts():
    calibration = Calibration()
    calibration.add(torch.tensor([0.95, 0.95, 0.95, 0.95]), torch.tensor([1, 1, 1, 0]))
    calibration.add(torch.tensor([0.5, 1.0]), torch.tensor([1, 1]))
    # the last bin holds 0.95 four times and 1.0, four of five correct: |4/5 - 0.96| * 5/6, and |1 - 0.5| * 1/6
    assert calibration.error() == pytest.approx(5 / 6 * 0.16 + 1 / 6 * 0.5)


def test_batches_cover_every_document_once_with_little_padding(documents):
    batches = batches_by_length(documents, 60)
    assert sorted(id(d) for batch in batches for d in batch.documents) == sorted(map(id, documents))
    assert all(batch.input_ids.numel() <= 60 for batch in batches)
    assert [batch.input_ids.shape[1] for batch in batches] == [30, 17]


def test_the_table_has_a_row_for_every_model(pair, documents):
    lines = table(evaluate(pair[0], {"student": pair[1]}, documents)).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["teacher", "student"]
    assert "KL(p||q)" in lines[0] and "100.0%" in lines[2] and lines[-1].startswith("52 tokens")
