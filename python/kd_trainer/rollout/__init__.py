"""Roll-outs: the tokens that models write for each other to learn from.

generate      a model writes by itself; ``score`` says what a model makes of what is written
interleave    a student writes, and a teacher replaces what it would not have said
rewrite, mix  a model puts words of its own into given texts
backtrack     a model writes, and takes back what it wrote by a backspace
external      the same roll-outs from an engine outside of this process
"""

from kd_trainer.rollout.backtrack import Trail, backtrack, mistaken, text_left, trail
from kd_trainer.rollout.external import ExternalEngine, LocalEngine, VLLMEngine
from kd_trainer.rollout.generate import generate, score
from kd_trainer.rollout.interleaved import Interleaved, interleave
from kd_trainer.rollout.options import Options, Sampling, sequence_keys, step_seed
from kd_trainer.rollout.result import RollOuts, pad, prompts_of, unpad
from kd_trainer.rollout.rewrite import Rewritten, choose_places, hide, labelled, mix, rewrite

__all__ = [
    "ExternalEngine", "Interleaved", "LocalEngine", "Options", "RollOuts", "Rewritten", "Sampling", "Trail",
    "VLLMEngine", "backtrack", "choose_places", "generate", "hide", "interleave", "labelled", "mistaken", "mix", "pad",
    "prompts_of", "rewrite", "score", "sequence_keys", "step_seed", "text_left", "trail", "unpad",
]
