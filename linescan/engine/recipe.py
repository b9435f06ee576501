"""What a run is asked to do: dataclasses whose fields are also the options of the command line.

A field says everything about its option once: name, type, default, range, help and panel. A task adds its own fields,
or other defaults, in a subclass of `Recipe`. Nothing here imports torch, so that `linescan train --help` answers at
once.

    @dataclass(frozen=True)
    class RestorationRecipe(Recipe):
        task: ClassVar[str] = "restore"
        implementation: ClassVar[str] = "linescan.tasks.restore:RestorationTask"

        noise: float = option(15.0, "Standard deviation of the noise, of 255.", AUGMENT, POSITIVE)
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from importlib import import_module
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from ..errors import InputError

__all__ = [
    "AUGMENT", "COUNT", "DATA", "LOSS", "MODEL", "NATURAL", "OPTIMISER", "PANELS", "POSITIVE", "RUN", "Range", "Recipe",
    "Run", "SHARE", "UNIT", "check_options", "flag", "option",
]  # fmt: skip

# Panels of `linescan train --help`, in this order.
PANELS = DATA, MODEL, LOSS, OPTIMISER, AUGMENT, RUN = (
    "In and out", "Model", "Loss", "Optimiser", "Augmentation", "Run",
)  # fmt: skip


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, each of them open or closed, or absent; infinities and NaN are never inside."""

    above: float = -math.inf
    least: float = -math.inf
    below: float = math.inf
    most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.above < value < self.below and self.least <= value <= self.most

    def __str__(self) -> str:
        bounds = (("above", self.above), ("at least", self.least), ("below", self.below), ("at most", self.most))
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound)) or "a number"


POSITIVE, COUNT, NATURAL = Range(above=0), Range(least=1), Range(least=0)
SHARE, UNIT = Range(least=0, below=1), Range(least=0, most=1)


def option(
    default: Any,
    help: str,
    panel: str,
    inside: Range | None = None,
    *,
    short: str | None = None,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    scoring: bool = False,
) -> Any:
    """A field of a recipe that is an option as well.

    Args:
        default: of the field and of the option; `...` for none, a dict is copied for each recipe.
        help: one sentence; "{recipe}" stands for the recipe's class.
        panel: under which `--help` shows it.
        inside: what a number must be.
        short: a further name, such as "-b".
        choices: what a word must be.
        metavar: how `--help` writes the value.
        scoring: whether it counts when a finished model is scored, as an option of `linescan evaluate`.
    """
    facts = {"help": help, "panel": panel, "inside": inside, "short": short, "choices": choices, "metavar": metavar}
    facts["scoring"] = scoring
    if default is ...:
        return field(metadata=facts)
    return field(
        **{"default_factory": default.copy} if isinstance(default, dict) else {"default": default}, metadata=facts
    )


def flag(name: str) -> str:
    """The option of a field: "clip_grad" -> "--clip-grad"; "model_args", which may be repeated -> "--model-arg"."""
    name = name.removesuffix("s") if name.endswith("_args") else name
    return "--" + name.replace("_", "-")


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", dict: "names with values"}


def _is(value: Any, kind: type) -> bool:
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is, value, parts))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _check(name: str, value: Any, kind: Any, facts: dict) -> None:
    """Raises InputError for a value that is not of this type, or outside its range."""
    kinds = get_args(kind) if NoneType in get_args(kind) else (kind,)
    if value is None and NoneType in kinds:
        return
    kind = next(k for k in kinds if k is not NoneType)
    if not _is(value, kind):
        parts = get_args(kind)
        wanted = f"{len(parts)} numbers" if get_origin(kind) is tuple else _WORDS[kind]
        raise InputError(f"{flag(name)} must be {wanted}, not {value!r}")
    inside, choices = facts.get("inside"), facts.get("choices")
    for number in (value if isinstance(value, tuple) else (value,)) if inside else ():
        if number not in inside:
            raise InputError(f"{flag(name)} must be {inside}, not {number}")
    if choices and value not in choices:
        raise InputError(f"{flag(name)} must be one of {', '.join(choices)}, not {value!r}")


def check_options(cls: type, values: Mapping[str, Any]) -> None:
    """Checks values for some of the fields of a class of options.

    Raises:
        InputError: a name that is none of theirs, a value of another type or out of its range.
    """
    hints, facts = get_type_hints(cls), {f.name: f.metadata for f in fields(cls)}
    for name, value in values.items():
        if name not in facts:
            near = get_close_matches(name, facts, 3)
            raise InputError(f"{name!r} is no option" + (f"; near it: {', '.join(near)}" if near else ""))
        _check(name, tuple(value) if isinstance(value, list) else value, hints[name], facts[name])


class _Options:
    """Checks every field against its type and range when it is made."""

    def __post_init__(self):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, list):  # from JSON
                object.__setattr__(self, name, tuple(value))
        check_options(type(self), values)


@dataclass(frozen=True)
class Run(_Options):
    """How a run is carried out; none of it changes what the run computes."""

    device: str | None = option(None, "cpu, cuda, ...; default: CUDA where there is one.", RUN)
    workers: int | None = option(None, "Processes that load data; default: 4, none for data in memory.", RUN, NATURAL)
    save_every: int = option(0, "Steps between saved states; 0: only after each evaluation.", RUN, NATURAL)
    log_every: int = option(10, "Steps between rows of metrics.csv.", RUN, COUNT)
    resume: bool = option(
        False, "Continue from the last saved state, with the very same steps, if there is one.", RUN
    )  # fmt: skip


@dataclass(frozen=True)
class Recipe(_Options):
    """All that decides what a run computes, of any task; `linescan.tasks.recipes` has one for each task.

    Durations (`warmup`, `milestones`, `decay_every`, `evaluate_every`) are epochs, or steps where `steps` is given.

    Raises:
        InputError: a value of another type or out of its range, or values that contradict each other.
    """

    task: ClassVar[str]
    """The task's name on the command line."""

    implementation: ClassVar[str | type]
    """The task's class, or where it is, as "package.module:Class"."""

    examples: ClassVar[tuple[str, ...]] = ()
    """Command lines, for `--help`."""

    judges: ClassVar[bool] = False
    """Whether `linescan evaluate` scores finished models of this task (`Task.judge`)."""

    scored: ClassVar[str] = "The data to score on."
    """What `--data` of `linescan evaluate` is."""

    default_model: ClassVar[str | None] = None
    """The model, where neither `model` nor the card of `checkpoint` names one."""

    data: str = option(..., "`digits`; a folder of classes; or one with train/ and val/ in it.", DATA, short="-d")
    val: str | None = option(None, "What to hold out, as --data. Default: by --holdout.", DATA)
    holdout: float = option(0.1, "Without --val: the share of data that is held out.", DATA, Range(above=0, below=1))

    model: str | None = option(None, "A name of `linescan list`, or of timm; default: that of --checkpoint, or "
                               "{recipe.default_model}.", MODEL,
                               short="-m")  # fmt: skip
    model_args: dict = option({}, "An argument of the model; may be repeated.", MODEL, metavar="KEY=VALUE")
    pretrained: bool = option(False, "Start from the published weights.", MODEL)
    checkpoint: str | None = option(
        None, "Start from these weights; a classifier for other classes is left out.", MODEL, short="-c"
    )  # fmt: skip
    drop_path: float = option(0.0, "Stochastic depth.", MODEL, SHARE)
    grad_checkpointing: bool = option(False, "Less memory, more time.", MODEL)

    epochs: int = option(100, "Times that each sample is seen.", OPTIMISER, COUNT, short="-e")
    steps: int | None = option(None, "Steps in all, instead of --epochs; all durations are then in steps.", OPTIMISER,
                               COUNT)  # fmt: skip
    batch: int = option(64, "Samples in one forward pass of a process.", OPTIMISER, COUNT, short="-b")
    accumulate: int = option(1, "Forward passes in one step.", OPTIMISER, COUNT)
    optimizer: str = option("adamw", "An optimiser of timm: adamw, sgd, lamb, lion, muon, ...", OPTIMISER)
    lr: float = option(5e-4, "Highest learning rate.", OPTIMISER, POSITIVE)
    betas: tuple[float, float] | None = option(None, "Decay of the mean and of the variance of the gradient; default: "
                                               "the optimiser's.", OPTIMISER, SHARE)  # fmt: skip
    momentum: float = option(0.9, "Momentum, of optimisers that have one.", OPTIMISER, SHARE)
    weight_decay: float = option(0.05, "Weight decay.", OPTIMISER, NATURAL)
    layer_decay: float | None = option(
        None, "Factor of the learning rate from each layer to the one below.", OPTIMISER, Range(above=0, most=1)
    )  # fmt: skip
    clip_grad: float | None = option(None, "Largest norm of the gradient.", OPTIMISER, POSITIVE)
    schedule: str = option(
        "cosine", "How the learning rate falls.", OPTIMISER,
        choices=("cosine", "constant", "poly", "step", "multistep", "tanh", "wsd"),
    )  # fmt: skip
    warmup: float = option(5.0, "Epochs in which the learning rate rises from 0.", OPTIMISER, NATURAL)
    hold: float = option(0.0, "Epochs at the highest learning rate, after the warm-up, before it falls.", OPTIMISER,
                         NATURAL)  # fmt: skip
    period: float | None = option(
        None, "Epochs in which cosine falls; it then rises in as many, falls again, and so on. Default: it falls once.",
        OPTIMISER, POSITIVE,
    )  # fmt: skip
    min_lr: float | None = option(
        None, "Learning rate at the end of cosine, poly, tanh and wsd; default: 1e-5, or --lr if that is lower.",
        OPTIMISER, NATURAL,
    )  # fmt: skip
    decay_rate: float | None = option(
        None, "Factor of step and multistep (default: 0.1), or the power of poly (default: 1).", OPTIMISER, POSITIVE
    )  # fmt: skip
    decay_every: float = option(30.0, "Epochs between two falls of step.", OPTIMISER, POSITIVE)
    milestones: str | None = option(None, "Epochs at which multistep falls, as in 60,80.", OPTIMISER)
    ema: float = option(0.0, "Decay of a moving average of the weights, in step n at most 1 - n^(-2/3); 0: none.",
                        OPTIMISER, SHARE)  # fmt: skip

    bf16: bool = option(False, "Compute in bfloat16.", RUN)
    seed: int = option(0, "Of everything random.", RUN, NATURAL)
    evaluate_every: int | None = option(
        None, "Epochs between evaluations; default: 1, or a tenth of --steps.", RUN, COUNT
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.min_lr is not None and self.min_lr > self.lr:
            raise InputError(f"--min-lr must be at most --lr, {self.lr}, not {self.min_lr}")
        if self.schedule == "multistep" and not self.falls:
            raise InputError("--schedule multistep needs --milestones, as in --milestones 60,80")
        if self.hold and self.schedule in ("constant", "step", "multistep"):
            raise InputError(f"--hold is for cosine, poly, tanh and wsd, not for --schedule {self.schedule}")
        if self.period and (self.schedule != "cosine" or self.hold):
            raise InputError("--period is for --schedule cosine without --hold")

    @property
    def falls(self) -> list[float]:
        """`milestones` as numbers."""
        try:
            falls = [float(part) for part in (self.milestones or "").split(",") if part.strip()]
        except ValueError:
            falls = [math.nan]
        if any(number not in POSITIVE for number in falls):
            raise InputError(f"--milestones must be numbers above 0 with commas between, not {self.milestones!r}")
        return falls

    @property
    def lowest_lr(self) -> float:
        """`min_lr`, or its default."""
        return min(1e-5, self.lr) if self.min_lr is None else self.min_lr

    def resumed(self) -> "Recipe":
        """The recipe of a run that goes on, whose weights are all in its state."""
        return replace(self, pretrained=False, checkpoint=None)

    def load(self) -> Any:
        """The class of the task."""
        if not isinstance(self.implementation, str):
            return self.implementation
        module, _, name = self.implementation.partition(":")
        return getattr(import_module(module), name)

    def as_dict(self) -> dict:
        """Plain values, the task's name among them."""
        return {"task": self.task, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """The inverse of `as_dict`, from JSON too."""
        return cls(**{key: value for key, value in values.items() if key != "task"})
