"""A run, written down: frozen dataclasses, read from YAML, overridden by ``key=value``.

A key that does not exist is an error that lists those that do, and the complete configuration, every default
included, is written into the run's folder. What a method's paper decides stands wherever nothing else was written, in
YAML as in Python: ``Config(method="skd", rollout=RolloutConfig(max_new_tokens=64))`` draws at the temperature of SKD.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from kd_kernels import divergences
from kd_trainer import registry
from kd_trainer.errors import check_one_of, check_positive, fail
from kd_trainer.section import Section

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TeacherConfig(Section):
    model: str | None = None  # a name, a folder, or "smollm2-135m-instruct"
    dtype: str = "float32"
    fingerprint: str | None = None  # expected of the model and of the cache; None: not checked

    def __post_init__(self) -> None:
        check_one_of("config", "teacher.dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class StudentConfig(Section):
    model: str | None = None  # a name or a folder, such as a checkpoint of another run
    layers: tuple[int, ...] | None = None  # or: these layers of the teacher, and all the rest of it
    dtype: str = "float32"  # of the weights that the optimiser sees; train.precision is what is computed in

    def __post_init__(self) -> None:
        check_one_of("config", "student.dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class DataConfig(Section):
    source: str = ""  # text, .jsonl, .jsonl.gz: a file, a folder or a pattern; a datasets name or folder; wiki-intros
    split: str = "train"  # of a datasets source
    text_field: str = "text"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str = "messages"  # a chat, which the tokenizer's template writes out
    max_length: int = 512  # tokens of a document; longer texts are split
    append_eos: bool = False  # the tokenizer's end of sequence, after the last token of a text
    packing: bool = True  # several documents in one row of max_length tokens, with attention kept apart
    limit: int | None = None  # as many texts, chosen by hash
    holdout: float = 0.0  # fraction of the texts, chosen by hash, that part=train leaves out
    part: str = "train"  # train or holdout

    def __post_init__(self) -> None:
        if self.max_length < 2:
            fail("config", "data.max_length", "at least 2", self.max_length)
        if self.limit is not None and self.limit < 1:
            fail("config", "data.limit", "at least 1", self.limit, "leave it out for all texts")
        if not 0.0 <= self.holdout < 1.0:
            fail("config", "data.holdout", "a fraction in [0, 1)", self.holdout)
        check_one_of("config", "data.part", self.part, ("train", "holdout"))
        if self.part == "holdout" and self.holdout == 0.0:
            fail("config", "data.holdout", "above 0 with part=holdout", self.holdout)


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    divergence: str = "forward_kl"
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    squared_temperature: bool = False
    tail: str = "bucket"  # of a cached teacher: bucket, renormalize or drop

    def __post_init__(self) -> None:
        divergences.parse(self.divergence)
        check_positive("config", "objective.temperature", self.temperature)
        check_one_of("config", "objective.tail", self.tail, ("bucket", "renormalize", "drop"))
        for name in ("kd_weight", "ce_weight"):
            if getattr(self, name) < 0.0:
                fail("config", f"objective.{name}", "at least 0", getattr(self, name))


@dataclass(frozen=True)
class RolloutConfig(Section):
    """How methods that train on generated text generate it."""

    max_new_tokens: int = 128
    # Of a text without a prompt: so many first tokens are one; None: such texts are refused.
    prompt_tokens: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    batch_size: int = 16  # sequences that are generated together; changes no draw

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "prompt_tokens", "top_k", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                fail("config", f"rollout.{name}", "at least 1", value)
        if not 0.0 <= self.temperature < float("inf"):
            fail("config", "rollout.temperature", "finite and at least 0", self.temperature)
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            fail("config", "rollout.top_p", "in (0, 1]", self.top_p)


@dataclass(frozen=True)
class OptimConfig(Section):
    lr: float = 3e-4  # AdamW, at the peak
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # of matrices; vectors are never decayed
    warmup: float = 0.05  # fraction of the steps
    final_lr: float = 0.1  # fraction of lr at the end of the cosine
    clip: float = 1.0  # of the gradient's norm; 0: none

    def __post_init__(self) -> None:
        check_positive("config", "optim.lr", self.lr)
        for name in ("warmup", "final_lr"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                fail("config", f"optim.{name}", "a fraction in [0, 1]", getattr(self, name))
        if self.clip < 0.0:
            fail("config", "optim.clip", "at least 0", self.clip)


@dataclass(frozen=True)
class TrainConfig(Section):
    steps: int | None = None  # None: as many as `epochs` take
    epochs: float = 1.0
    batch_tokens: int = 8192  # of one optimiser step, over all micro-batches and processes
    accumulation: int = 1  # micro-batches of a step on each process; changes no gradient beyond rounding
    precision: str = "fp32"  # fp32 or bf16 (autocast; the loss reads fp32-grade logits either way)
    gradient_checkpointing: bool = False
    save_every: int = 0  # steps between checkpoints that a run can be resumed from; 0: none
    keep_checkpoints: int = 2
    resume: bool = True  # go on from the last checkpoint in `out`
    tensorboard: bool = True
    plot: bool = True  # of the metrics, when all steps are done
    max_scratch_mib: int | None = None  # of kd_loss; None: its default

    def __post_init__(self) -> None:
        check_one_of("config", "train.precision", self.precision, ("fp32", "bf16"))
        for name in ("steps", "batch_tokens", "accumulation", "keep_checkpoints", "max_scratch_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                fail("config", f"train.{name}", "at least 1", value)
        if self.save_every < 0:
            fail("config", "train.save_every", "at least 0", self.save_every)
        check_positive("config", "train.epochs", self.epochs)


@dataclass(frozen=True)
class Config:
    out: str = ""  # folder of the run
    method: str = "kd"  # a name that kdk methods lists
    cache: str | None = None  # folder of the teacher's cache; None: the teacher is run
    tokenizer: str | None = None  # None: the teacher's, or where there is no teacher the student's
    imports: tuple[str, ...] = ()  # modules to import first: they register methods of one's own
    seed: int = 0
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    more_teachers: tuple[TeacherConfig, ...] = ()  # of methods that have several
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    options: object = None  # the method's own settings; None: all of its defaults
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        registry.import_modules(self.imports)
        method = registry.spec(self.method)
        for name, values in method.defaults.items():
            if name != "options":
                section = getattr(self, name)
                decided = from_tree(type(section), values, f"{name}.")
                object.__setattr__(self, name, section.elsewhere(decided))
        object.__setattr__(self, "options", self._options(method))
        if not self.out:
            fail("config", "out", "the folder of the run", repr(self.out))
        if not 0 <= self.seed < 2**31:
            fail("config", "seed", "in 0..2^31 - 1", self.seed)
        if not self.data.source:
            fail("config", "data.source", "a file, a folder or a name", repr(self.data.source))
        if (self.student.model is None) == (self.student.layers is None):
            fail(
                "config", "student", "exactly one of model and layers",
                f"model={self.student.model!r} and layers={self.student.layers!r}",
            )
        if self.student.layers is not None and self.teacher.model is None:
            fail("config", "teacher.model", "given when the student is cut from its layers", None)
        method.check(self)

    def _options(self, method: registry.MethodSpec) -> object:
        """The method's settings, from an object of their class or from a mapping of those that were written."""
        options, decided = self.options, method.defaults.get("options", {})
        if options is None or isinstance(options, dict):
            return from_tree(method.options, decided | (options or {}), "options.")
        if type(options) is not method.options:
            fail("config", "options", f"those of method {self.method}", type(options).__name__)
        return options.elsewhere(method.options(**decided)) if decided else options


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with ``section.key=value`` overrides applied (values are YAML too).

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML mapping, a key that does not exist, a value of the wrong type or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_config: path must be an existing YAML file, got {str(path)!r}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"load_config: {path} must be YAML, got {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        fail("load_config", str(path), "a YAML mapping", type(tree).__name__)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            fail("load_config", "override", "of the form key=value", repr(override))
        *sections, key = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
            if not isinstance(branch, dict):
                fail("load_config", name, "a key inside a section", f"{section}, which holds a value")
        branch[key] = yaml.safe_load(text)
    return from_tree(Config, tree)


def from_tree(kind: type, tree: typing.Mapping, prefix: str = ""):
    """A config dataclass from nested dicts, with every key and type checked."""
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            fail(
                "config", f"key {prefix}{key}", "one of " + ", ".join(hints), repr(key),
                f"did you mean {prefix}{near[0]}?" if near else "",
            )
        values[key] = _convert(value, hints[key], f"{prefix}{key}")
    return kind(**values)


def _convert(value: object, hint: object, name: str) -> object:
    """``value`` as the declared type; YAML 1.1 reads ``3e-4`` as a string, so numbers may be text."""
    if hint is object:
        return value
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            fail("config", name, "a section with keys", repr(value))
        return from_tree(hint, value, f"{name}.")
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        fixed = inner[-1] is not Ellipsis
        if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(inner)):
            fail("config", name, f"a list of {len(inner)} values" if fixed else "a list", repr(value))
        return tuple(_convert(item, inner[0], name) for item in value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        fail("config", name, f"of type {hint.__name__}", repr(value))
    return value


def to_yaml(config: object) -> str:
    """Every key with its value, defaults included, in a form that :func:`load_config` reads back."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
