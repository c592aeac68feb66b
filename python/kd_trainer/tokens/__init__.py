"""Sources of tokens that several methods share, beside the data set (:class:`~kd_trainer.methods.base.DatasetTokens`).

writers     models that write on from the prompts of texts
mixture     texts of the data set and written ones, in given proportions; and two data sets side by side
replay      what a student wrote earlier, with what the teacher said about it
off_policy  a schedule of writing, replay and reading
pairs       two answers to every prompt
taken_back  texts with mistakes and backspaces, beside written ones
lessons     texts and answers, each with the one of several models that it is learnt from
rounds      what a student makes of the texts of many steps at once
"""

from kd_trainer.tokens.lessons import ChosenTeachers, Lessons
from kd_trainer.tokens.mixture import MixedTokens, SideBySide, uniform
from kd_trainer.tokens.off_policy import FRESH, OffPolicyTokens, Schedule
from kd_trainer.tokens.pairs import PairTokens, geometric_means
from kd_trainer.tokens.replay import RememberingTeacher, ReplayBuffer
from kd_trainer.tokens.rounds import Rounds
from kd_trainer.tokens.taken_back import TakenBack
from kd_trainer.tokens.writers import KeptWriter, Writer, check_prompts, prompt_length

__all__ = [
    "ChosenTeachers", "FRESH", "KeptWriter", "Lessons", "MixedTokens", "OffPolicyTokens", "PairTokens",
    "RememberingTeacher", "ReplayBuffer", "Rounds", "Schedule", "SideBySide", "TakenBack", "Writer", "check_prompts",
    "geometric_means", "prompt_length", "uniform",
]
