"""Cases of :mod:`loss_cases` that come from real models. Apart from it, because transformers imports Triton."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from kd_trainer import assets
from kd_trainer.models import cut_layers, load_pretrained
from loss_cases import IGNORED, ROWS, Case, case
from transformers_fixtures import NEEDS_SMOLLM2, STORIES260K


@functools.cache
def real_case(name: str | Path) -> Case:
    """Heads and hidden states of a real model and of a student of three of its layers, at a text that the model wrote;
    the first four tokens are its prompt."""
    teacher = load_pretrained(str(name))
    last = teacher.config.num_hidden_layers - 1
    student = cut_layers(teacher, (0, (last + 1) // 2, last))
    start = torch.full((1, 1), teacher.config.bos_token_id)
    with torch.no_grad():
        ids = teacher.generate(start, do_sample=False, min_new_tokens=ROWS, max_new_tokens=ROWS)
        states = [model.base_model(ids[:, :-1]).last_hidden_state[0] for model in (student, teacher)]
    heads = [model.get_output_embeddings().weight.detach() for model in (student, teacher)]
    labels = ids[0, 1:].clone()
    labels[:3] = IGNORED
    none = torch.zeros(len(heads[0]))
    return Case(states[0], heads[0], none, states[1], heads[1], none, labels)


CASES = (pytest.param(case, id="random"), pytest.param(functools.partial(real_case, STORIES260K), id="stories260k"))
"""What ours and theirs are compared at."""

SMOLLM2 = pytest.param(functools.partial(real_case, assets.SMOLLM2), id="smollm2", marks=NEEDS_SMOLLM2)
