"""Fidelity: how much of its teacher a student took over, on given texts and on texts of its own.

Stanton et al. 2021, "Does Knowledge Distillation Really Work?", arXiv 2106.05945, measure agreement, KL(p || q) and
calibration on held-out inputs. A language model meets its own words when it is used, so the same quantities (those of
:mod:`kd_trainer.evaluate`: both KLs, agreement, acceptance, overlap of the first k, ECE, perplexity) are also taken
where the student wrote the context, from the prompts of the same texts. There

- the acceptance is what speculative decoding would see with this student as the draft;
- the ECE holds a model's confidence against the teacher's probability of the token: such a text has no other truth;
- the perplexities are of the student's words: the teacher's says how plausible it finds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kd_trainer.data import Document
from kd_trainer.diagnostics.contexts import prompts_in, written
from kd_trainer.evaluate import TOP_K, evaluate, table
from kd_trainer.models import CausalLM
from kd_trainer.rollout import Options


def fidelity(
    teacher: CausalLM, students: Mapping[str, CausalLM], documents: Sequence[Document], options: Options, *, seed: int,
    samples: int = 1, prompt_tokens: int | None = None, top_k: int = TOP_K, batch_tokens: int = 2048,
) -> dict[str, object]:
    """Students beside their teacher, teacher-forced and on prefixes that each student wrote.

    Args:
        options: of the students' roll-outs.
        samples: roll-outs from each prompt.
        prompt_tokens: of a text without a prompt, so many first tokens are one.

    Returns:
        ``{"text": ..., "own": {name: ...}}``, each as :func:`kd_trainer.evaluate.evaluate` returns it.

    Raises:
        ValueError: other vocabularies, no prompts, top_k out of range.
    """
    shared = dict(batch_tokens=batch_tokens, top_k=top_k)
    prompts = prompts_in("fidelity", documents, prompt_tokens)
    on_text = evaluate(teacher, students, documents, **shared)
    own = {}
    for name, student in students.items():
        texts = written(student, prompts, options, seed=seed, samples=samples)
        own[name] = evaluate(teacher, {name: student}, texts, right="teacher", **shared)
    return {"text": on_text, "own": own}


def fidelity_table(result: Mapping[str, object]) -> str:
    """The result of :func:`fidelity` for people."""
    parts = ["on the text", table(result["text"])]
    for name, found in result["own"].items():
        parts += ["", f"where {name} wrote the context", table(found)]
    return "\n".join(parts)
