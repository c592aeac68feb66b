"""ProFuser: which source teaches which text, who answers best, and the loss of both stages."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from built_method import assert_same_gradients, built, logprobs, noisy, step_loss
from kd_trainer.data import Document, collate
from kd_trainer.methods.profuser import Options
from kd_trainer.rollout import Options as Written
from kd_trainer.rollout import generate, step_seed

END, NEW = 0, 6


@pytest.fixture(scope="module")
def models(tiny):
    """The student and two sources, all different."""
    return [noisy(tiny, seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def texts(models) -> list[Document]:
    """Two that the first source would say, and two of the second."""
    generator, found = torch.Generator().manual_seed(0), []
    for i in range(4):
        tokens = torch.randint(1, 257, (9 + i,), generator=generator)
        with torch.no_grad():
            for place in range(4, len(tokens)):
                tokens[place] = models[1 + i % 2].model(
                    tokens[None, :place], use_cache=False
                ).logits[0, -1, 1:].argmax() + 1
        found.append(Document(tokens, 4))
    return found


@pytest.fixture
def profuser(models, texts, make_config, tiny):
    def make(steps=10, objective=None, **options):
        config = make_config(
            method="profuser", teacher={"model": str(tiny)}, more_teachers=[{"model": str(tiny)}], options=options,
            objective=objective or {}, rollout={"max_new_tokens": NEW}, train={"batch_tokens": 4096, "steps": steps},
        )
        return built(config, models[0], texts, models[1:])

    return make


def likelihood(model, text) -> torch.Tensor:
    """Log-probabilities of the targets."""
    return logprobs(model, text.tokens).gather(1, text.tokens[1:, None])[:, 0][text.counted]


@torch.no_grad()
def likeliest(models, text) -> int:
    return max((0, 1), key=lambda i: float(likelihood(models[1 + i], text).mean()))


@torch.no_grad()
def best_answer(models, text, judge) -> tuple[int, Document]:
    answers = []
    for i, source in enumerate(models[1:]):
        seed = step_seed(0, 0, f"text of source {i}")
        options = Written(max_new_tokens=NEW, stop_ids=(END,))
        answers += generate(
            source, [text.tokens[:4]], options, seed=seed, keys=torch.tensor([text.key])
        ).documents()
    if judge == "likelihood":
        merits = [sum(float(likelihood(source, answer).mean()) for source in models[1:]) for answer in answers]
    else:
        reference, merits = Counter(text.tokens[4:].tolist()), []
        for answer in answers:
            said = Counter(answer.tokens[4:].tolist())
            precision, recall = ((said & reference).total() / x.total() for x in (said, reference))
            merits.append(2 * precision * recall / (precision + recall) if precision else 0.0)
    best = merits.index(max(merits))
    return best, answers[best]


def test_every_text_has_the_source_that_finds_it_likeliest(profuser, models, texts):
    lessons = profuser(first_stage=0.0, infer_weight=0.0).tokens
    produced = lessons.produce(texts, 0)
    assert [text.tag for text in produced] == ["text"] * 4
    assert [lessons.source_of(text) for text in produced] == [likeliest(models, text) for text in texts] == [0, 1, 0, 1]


@pytest.mark.parametrize("judge", ["reference", "likelihood"])
def test_the_best_answer_has_the_source_that_wrote_it(profuser, models, texts, judge):
    lessons = profuser(first_stage=1.0, judge=judge).tokens
    produced = lessons.produce(texts, 3)
    expected = [best_answer(models, text, judge) for text in texts]
    for answer, (source, document) in zip(produced, expected):
        assert answer.tag == "answer" and answer.first_target == 4
        assert torch.equal(answer.tokens, document.tokens) and lessons.source_of(answer) == source


def test_stages(profuser, texts):
    options = Options(first_stage=0.3, infer_weight=0.1)
    weights = [(options.weight("answer", step, 10), options.weight("text", step, 10)) for step in range(10)]
    assert weights == [(1.0, 0.0)] * 3 + [(0.1, 1.0)] * 7
    lessons = profuser(first_stage=0.3).tokens
    assert Counter(text.tag for text in lessons.produce(texts, 2)) == {"answer": 4}
    assert Counter(text.tag for text in lessons.produce(texts, 3)) == {"answer": 4, "text": 4}


@pytest.mark.parametrize(("step", "weights"), [(0, (1.0, 0.0)), (9, (0.2, 1.0))])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_loss_of_both_kinds_of_lesson(profuser, models, texts, step, weights, divergence):
    method = profuser(infer_weight=0.2, objective={"divergence": divergence, "kd_weight": 0.7})
    for objective in method.objectives.values():
        objective.begin_step(step)
    produced = method.tokens.produce(texts, step)
    expected = 0.0
    for weight, lessons in zip(weights, (
        [best_answer(models, text, "reference") for text in texts], [(likeliest(models, text), text) for text in texts],
    )):
        total, count = 0.0, 0
        for source, text in lessons:
            q = logprobs(models[0], text.tokens)[text.counted]
            with torch.no_grad():
                p = logprobs(models[1 + source], text.tokens)[text.counted]
            a, b = (p, q) if divergence == "forward_kl" else (q, p)
            labels = text.tokens[1:][text.counted]
            total = total + 0.7 * (a.exp() * (a - b)).sum() - q.gather(1, labels[:, None]).sum()
            count += len(q)
        expected = expected + weight * total / count
    assert_same_gradients(step_loss(method, models[0], produced), expected, models[0])


def test_sources_write_and_are_chosen_once_and_one_of_them_reads(profuser, models, texts):
    method = profuser(first_stage=0.0)
    produced = method.tokens.produce(texts, 0)
    seen = []
    hooks = [
        model.model.get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs, i=i: seen.append((i, kwargs["input_ids"].numel())), with_kwargs=True
        )
        for i, model in enumerate(models[1:])
    ]
    again = method.tokens.produce(texts[::-1], 7)
    assert seen == [] and {tuple(text.tokens.tolist()) for text in again} == {
        tuple(t.tokens.tolist()) for t in produced
    }
    group = [text for text in produced if text.tag == "text"]
    method.teacher.targets(collate(group, 64))
    assert sorted(i for i, _ in seen) == [0, 1]
    assert sum(tokens for _, tokens in seen) == sum(map(len, group))  # every token by one source

    seen.clear()
    resumed = profuser(first_stage=0.0)
    resumed.tokens.load_state(method.tokens.state())
    kept = resumed.tokens.produce(texts, 3)
    for hook in hooks:
        hook.remove()
    assert [text.tokens.tolist() for text in kept] == [text.tokens.tolist() for text in produced]
    assert len(seen) == 2  # both sources read the texts, to be chosen between; neither wrote
    assert [resumed.tokens.source_of(text) for text in kept] == [method.tokens.source_of(text) for text in produced]


@pytest.mark.parametrize(("changes", "message"), [
    ({"options": {"judge": "reward"}}, "options.judge must be one of reference, likelihood, got 'reward'"),
    ({"options": {"first_stage": 1.5}}, r"options.first_stage must be a fraction in \[0, 1\], got 1.5"),
    ({"options": {"infer_weight": -1.0}}, "options.infer_weight must be finite and at least 0, got -1.0"),
    ({"more_teachers": []}, "more_teachers must be at least one for method profuser, got none"),
    ({"cache": "somewhere"}, "cache must be absent for method profuser"),
])
def test_settings_out_of_range(make_config, tiny, changes, message):
    tree = {"teacher": {"model": str(tiny)}, "more_teachers": [{"model": str(tiny)}]} | changes
    with pytest.raises(ValueError, match=message):
        make_config(method="profuser", **tree)


def test_what_leaves_nothing_to_fuse_is_refused(profuser, models, make_config, tiny):
    with pytest.raises(ValueError, match="objective.kd_weight must be above 0 for method profuser, got 0.0"):
        profuser(objective={"kd_weight": 0.0})
    config = make_config(method="profuser", teacher={"model": str(tiny)}, more_teachers=[{"model": str(tiny)}])
    with pytest.raises(ValueError, match="rollout.prompt_tokens must be given for texts without a prompt"):
        built(config, models[0], [Document(torch.arange(1, 9))], models[1:])
