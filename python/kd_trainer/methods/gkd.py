"""Generalised knowledge distillation: any divergence, on texts of data, student and teacher; and its points.

Agarwal et al. 2023, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", arXiv
2306.13649:

    (1 - lambda) E_{y ~ data} D(p || q)(y | x) + lambda E_{y ~ q} D(p || q)(y | x)

with D the mean over the tokens of y of a divergence between next-token distributions (of all the tokens of a step here,
which weighs long texts more). No gradient passes through the drawing of y: the student is told what the teacher would
have said after each of its own words. lambda is ``options.student``; ``options.teacher`` is the probability of texts
that the teacher writes instead of those of the data. ``options.each`` says whether a step's texts are all of one
origin, as in the paper's algorithm.

==============  ============  ============  ================  ===========================================
name            by student    by teacher    objective         source
==============  ============  ============  ================  ===========================================
gkd             0.5           0             JSD(0.5)          as above
imitkd          0.5           0             forward KL        Lin et al. 2020, arXiv 2009.07253
f_distill       0.5           0.5           total variation   Wen et al. 2023, arXiv 2307.15190
seqkd           0             1             cross-entropy     Kim and Rush 2016, arXiv 1606.07947, 3.2
supervised_kd   0             0             forward KL        the same, 3.1: method kd, by its name here
==============  ============  ============  ================  ===========================================

Defaults: lambda and beta are TRL's. The paper tries lambda in {0, 0.5, 1} and beta in {0.1, 0.5, 0.9}, and finds
lambda = 1 best nearly everywhere and the best divergence to depend on the task. Texts are drawn at temperature 1 (TRL:
0.9), the loss is at 1. The student is evaluated without dropout while it writes.

Uncertain: ImitKD anneals the share of data texts, and takes the teacher's likeliest token for a label in one variant;
GKD's account of it, the constant mix, is followed. How often f-distill draws the student's texts anew: here in every
step. SeqKD's texts are the teacher's modes, by beam search: here they are greedy. The teacher writes once for a text.

Not reproduced from public code: a loss whose scale jumps where beta reaches 0 or 1 (the limits are ``forward_kl`` and
``reverse_kl`` by name), and other functions under the name JSD.

Cost: a step whose texts the student writes costs a pass of the student for each token in addition.
"""

from __future__ import annotations

from dataclasses import dataclass

from kd_trainer.config import Config
from kd_trainer.errors import check_one_of, fail
from kd_trainer.methods.base import DatasetTokens, DivergenceObjective, Method, Parts
from kd_trainer.registry import MethodSpec, register
from kd_trainer.section import Section
from kd_trainer.teachers import teacher_of
from kd_trainer.tokens import KeptWriter, MixedTokens, Writer, check_prompts


@dataclass(frozen=True)
class Options(Section):
    student: float = 0.5  # lambda: probability of texts that the student writes
    teacher: float = 0.0  # and of texts that the teacher writes
    each: str = "step"  # drawn once for each "step", or for each "text"

    def __post_init__(self) -> None:
        check_one_of("config", "options.each", self.each, ("step", "text"))
        for name in ("student", "teacher"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                fail("config", f"options.{name}", "a probability in [0, 1]", getattr(self, name))
        if self.student + self.teacher > 1.0:
            fail("config", "options.student + options.teacher", "at most 1", self.student + self.teacher)


def build(config: Config, parts: Parts) -> Method:
    options, objective = config.options, config.objective
    if objective.kd_weight == 0.0 and (objective.ce_weight == 0.0 or options.student):
        what = "what a student wrote is no label for it" if options.student else "nothing is left to learn"
        fail("config", "objective.kd_weight", f"above 0 for method {config.method}", 0.0, what)
    if config.cache is not None and (options.student or options.teacher):
        shares = f"student={options.student:g} and teacher={options.teacher:g}"
        remedy = "a cache holds texts of the data alone"
        fail("config", "options.student and options.teacher", "0 with a cache", shares, remedy)
    writers = {}
    if options.student:
        writers["student"] = (Writer.student(config, parts), options.student)
    if options.teacher:
        writers["teacher"] = (KeptWriter(Writer.teacher(config, parts)), options.teacher)
    if writers:
        check_prompts(parts.documents, config.rollout.prompt_tokens)
    texts = DatasetTokens.of(config, parts.documents)
    tokens = MixedTokens(texts, writers, seed=config.seed, each=options.each)
    return Method.single(config.method, tokens, teacher_of(config, parts), DivergenceObjective.of(config))


def _register(
    name: str, summary: str, source: str, divergence: str, student: float, teacher: float = 0.0,
    needs: str = "live teacher", **defaults: dict,
) -> None:
    objective = {"divergence": divergence} | defaults.pop("objective", {})
    tree = {"objective": objective, "options": {"student": student, "teacher": teacher}} | defaults
    register(MethodSpec(
        name, summary, source, build, Options, tree, (needs, "prompts") if student or teacher else (needs,),
    ))


_register(
    "gkd", "a divergence on a mix of the data's and the student's texts", "Agarwal et al. 2023, arXiv 2306.13649",
    "jsd(beta=0.5)", student=0.5,
)
_register(
    "imitkd", "gkd: forward KL on half data, half the student's texts", "Lin et al. 2020, arXiv 2009.07253",
    "forward_kl", student=0.5,
)
_register(
    "f_distill", "gkd: total variation on half the teacher's, half the student's texts",
    "Wen et al. 2023, arXiv 2307.15190", "total_variation", student=0.5, teacher=0.5,
)
_register(
    "seqkd", "gkd: labels that the teacher writes", "Kim and Rush 2016, arXiv 1606.07947", "forward_kl", student=0.0,
    teacher=1.0, objective={"kd_weight": 0.0, "ce_weight": 1.0}, rollout={"temperature": 0.0},
)
_register(
    "supervised_kd", "gkd: forward KL on the data's texts alone", "Kim and Rush 2016, arXiv 1606.07947", "forward_kl",
    student=0.0, needs="teacher",
)
