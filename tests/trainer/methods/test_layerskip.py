"""LayerSkip: which layers are on, and the weighted losses of all exits against the model's own layers."""

from __future__ import annotations

import pytest
import torch
from built_method import assert_rows_close

from kd_trainer.data import Document, collate
from kd_trainer.methods.layerskip import EarlyExits, Options, layers_on
from kd_trainer.models import CausalLM, load_pretrained


def test_curricula():
    assert layers_on(5, 0, Options(curriculum="all")) == [0, 1, 2, 3, 4]
    rotating = [layers_on(6, step, Options(curriculum="rotational", rotation=3)) for step in range(4)]
    assert rotating == [[0, 3, 5], [1, 4, 5], [2, 5], [0, 3, 5]]
    gradual = Options(curriculum="gradual", gradual_steps=8)
    assert [layers_on(4, step, gradual)[0] for step in range(6)] == [3, 2, 1, 0, 0, 0]
    assert all(layers_on(7, step, gradual)[-1] == 6 for step in range(20))


@pytest.fixture(scope="module")
def student(tiny) -> CausalLM:
    return CausalLM(load_pretrained(str(tiny)).double())


def exits(student: CausalLM, documents: list[Document]) -> list[torch.Tensor]:
    """Log-probabilities of every layer at the rows of each document, from transformers alone."""
    model, rows = student.model, []
    for document in documents:
        states = model(document.tokens[None], output_hidden_states=True, use_cache=False).hidden_states[1:]
        states = [model.model.norm(state) for state in states[:-1]] + [states[-1]]
        rows.append(torch.stack([model.lm_head(state)[0, :-1] for state in states]))
    return list(torch.cat(rows, 1).log_softmax(-1))


@pytest.mark.parametrize(("scale", "weights"), [
    ("one", [1, 1, 1, 1]), ("l", [1, 2, 3, 4]), ("sum", [1, 3, 6, 10]), ("sqrt", [1, 2**0.5, 3**0.5, 2]),
    ("inverse", [1 / 4, 1 / 3, 1 / 2, 1]),
])
@pytest.mark.parametrize("distil", [False, True])
def test_losses_of_all_exits(student, scale, weights, distil):
    documents = [Document(torch.randint(200, (9,), generator=torch.Generator().manual_seed(1)), 3),
                 Document(torch.randint(200, (6,), generator=torch.Generator().manual_seed(2)))]
    batch = collate(documents, 32)
    options = Options(scale=scale, exit_scale=0.5, curriculum="all", distil=distil)
    student.zero_grad()
    result = EarlyExits(options)(student, None, batch, 4.0)
    result.loss.backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters()}

    share = torch.tensor(weights, dtype=torch.float64) * torch.tensor([0.5, 0.5, 0.5, 1.0])
    share = share / share.sum()
    rows = [row[batch.counted] for row in exits(student, documents)]
    labels = batch.labels[batch.counted]
    loss = 0.0
    for layer, logq in enumerate(rows):
        if distil and layer < 3:
            p = rows[-1].detach()
            term = (p.exp() * (p - logq)).sum()
        else:
            term = -logq.gather(1, labels[:, None]).sum()
        loss = loss + share[layer] * term
    assert float(result.loss.detach()) == pytest.approx(float(loss.detach() / 4), rel=1e-9)
    student.zero_grad()
    (loss / 4).backward()
    for name, parameter in student.named_parameters():
        # The norms are in fp32 whatever the weights are.
        assert_rows_close(got[name], parameter.grad, 1e-5)
    expected = rows[-1].gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(
        result.stats["label_logprob"][batch.counted].double(), expected.detach(), rtol=1e-5, atol=1e-6
    )
