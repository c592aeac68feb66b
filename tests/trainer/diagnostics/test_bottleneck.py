"""Ranks, anisotropy and the KL floor against singular value decompositions and constructed cases."""

from __future__ import annotations

import pytest
import torch

from kd_trainer.config import DataConfig
from kd_trainer.data import load_documents
from kd_trainer.diagnostics.bottleneck import anisotropy, bottleneck_report, effective_rank, head_spectrum, rank_floor
from kd_trainer.models import CausalLM, cut_layers, load_pretrained, load_tokenizer


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_effective_rank_counts_equal_values():
    assert effective_rank(torch.ones(7)) == pytest.approx(7.0)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(50, 9), (9, 50), (5000, 4)])
def test_the_spectrum_of_a_head(shape):
    weight = noise(*shape)
    torch.testing.assert_close(head_spectrum(weight), torch.linalg.svdvals(weight), rtol=1e-7, atol=1e-7)


def test_anisotropy():
    assert anisotropy(torch.eye(4)) == pytest.approx(0.0)
    assert anisotropy(torch.ones(5, 3)) == pytest.approx(1.0)
    rows = noise(20, 6) + 1.0
    pairs = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    assert anisotropy(rows) == pytest.approx(float((pairs.sum() - 20) / 380))
    with pytest.raises(ValueError, match="hidden must be of at least two rows, got 1"):
        anisotropy(torch.ones(1, 3))


def test_the_floor_is_nothing_from_the_rank_of_the_teacher_on_and_falls_until_then():
    logits = noise(40, 5, seed=1) @ noise(5, 60, seed=2) + noise(40, 1, seed=3)  # rank 5, and a constant a row
    floor = rank_floor(logits, range(0, 8))
    kl = list(floor.kl.values())
    assert all(a > b for a, b in zip(kl[:5], kl[1:6])) and kl[4] > 0.05
    assert max(kl[5:]) < 1e-9
    logp = logits.log_softmax(1)
    assert kl[0] == pytest.approx(float((logp.exp() * (logp + torch.tensor(60.0).log())).sum(1).mean()))
    centred = logits - logits.mean(1, keepdim=True)
    torch.testing.assert_close(floor.singular_values[:5], torch.linalg.svdvals(centred)[:5])
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    q = (u[:, :3] * s[:3] @ v[:3]).log_softmax(1)
    assert kl[3] == pytest.approx(float((logp.exp() * (logp - q)).sum(1).mean()))


def test_masked_columns_are_refused():
    logits = torch.zeros(3, 4)
    logits[0, 1] = -torch.inf
    with pytest.raises(ValueError, match="logits must be finite"):
        rank_floor(logits, [1])


def test_a_report_of_two_models(tiny, text):
    model = load_pretrained(str(tiny))
    teacher, student = CausalLM(model), CausalLM(cut_layers(model, (0, 3)))
    documents = load_documents(DataConfig(source=str(text), max_length=32), load_tokenizer(str(tiny)))
    report = bottleneck_report(teacher, student, documents, contexts=100)
    assert (report.contexts, report.teacher_width, report.student_width) == (100, 64, 64)
    assert report.floor_at_student_width < 1e-6 < report.floor_at_half_of_it  # the teacher's own rank is 64
    assert report.teacher_head_rank == pytest.approx(report.student_head_rank)
    assert "KL floor at the student's width, nats" in report.table()
