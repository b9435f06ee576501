"""Opens the model of a tool: one of the zoo by its name, or what another library's config says; of one task."""

from importlib import import_module
from pathlib import Path
from typing import Any, Callable

import timm
from torch import nn

from ..engine.cards import ModelCard, read_card, restore
from ..errors import InputError
from ..zoo import find, is_model, list_models

__all__ = ["expect_checkpoint", "expect_task", "open_model", "register_opener", "restore_for", "wrong_task"]

COMMANDS = {
    "anomaly": "anomaly", "change": "change", "classification": "classify", "detection": "detect",
    "point-classification": "points classify", "point-detection": "points detect",
    "point-occupancy": "points occupancy", "point-segmentation": "points segment", "prompting": "prompt",
    "restoration": "restore", "segmentation": "segment", "volume-segmentation": "segment",
}  # fmt: skip
"""By task: the command that runs its models on files."""

CANNOT = {
    "anomaly": "finds no anomalies", "change": "finds no changes", "classification": "classifies no images",
    "detection": "detects nothing", "point-classification": "names no point clouds",
    "point-detection": "finds no boxes in scans", "point-occupancy": "completes no scenes",
    "point-segmentation": "segments no points", "prompting": "takes no prompts", "restoration": "restores no images",
    "segmentation": "segments no images", "volume-segmentation": "segments no volumes",
}  # fmt: skip
"""By task: what can be said of a model of another."""


def _task_of(name: str | None) -> str | None:
    """The task of a model of the zoo, or of timm, which has classifiers; None for another name."""
    if name and is_model(name):
        return find(name).task
    return "classification" if name and timm.is_model(name) else None


def wrong_task(name: str | None, task: str, checkpoint: str | Path | None = None) -> InputError:
    """Says that a model is not one of `task`, which models are, and which command the model is for.

    Args:
        name: of the model.
        task: as in the zoo.
        checkpoint: the file that names the model, if it is one.
    """
    who = f"{checkpoint} is of {name}, which" if checkpoint else name
    own = COMMANDS.get(_task_of(name) or "")
    more = f"; {name} is for `linescan {own}`" if own else ""
    return InputError(f"{who} {CANNOT[task]}; `linescan list --task {task}` shows models that do{more}")


def expect_task(name: str | None, task: str) -> None:
    """Raises InputError: a name of the zoo, or of timm, whose models have another task; other names are not judged."""
    if _task_of(name) not in (None, task):
        raise wrong_task(name, task)


def expect_checkpoint(checkpoint: str | Path | None, task: str) -> ModelCard | None:
    """The card of a file of weights, if it has one.

    Raises:
        InputError: it is of a model of another task.
        CheckpointError: the file cannot be read.
    """
    card = read_card(checkpoint) if checkpoint else None
    if card and _task_of(card.model) not in (None, task):
        raise wrong_task(card.model, task, checkpoint)
    return card


def restore_for(task: str, name: str | None, checkpoint: str | Path | None, **args) -> tuple[nn.Module, ModelCard]:
    """A model of one task, with its card; one of another is refused before weights are read or fetched.

    Args:
        task: as in the zoo.
        name, checkpoint, args: as for `linescan.engine.cards.restore`.

    Raises:
        InputError, CheckpointError: of another task; or see `restore`.
    """
    expect_task(name, task)
    expect_checkpoint(checkpoint, task)
    return restore(name, checkpoint, **args)


_OPENERS: dict[str, Callable[[str, Path | None], Any]] = {}
_BRIDGES = ("linescan.openmmlab.models",)  # modules that register openers when they are imported


def register_opener(task: str, opener: Callable[[str | Path, str | Path | None], Any]) -> None:
    """Lets `opener(config, checkpoint)` open what is not a name of the zoo, for one task."""
    _OPENERS[task] = opener


def open_model(task: str, model: str | Path | None, checkpoint: str | Path | None, **args) -> Any:
    """The model with what it does to an image before and after its forward pass.

    Args:
        task: as in the zoo.
        model: a name of the zoo, or a config; None for the one that the checkpoint's card names.
        checkpoint: its weights.
        args: of a model of the zoo.

    Raises:
        InputError, CheckpointError: no such model or config, a package is missing, or the weights are not its.
    """
    from .named import NAMED

    names = list_models(task=task) if task in NAMED else []
    if model is None or str(model).partition(".")[0] in names:
        return NAMED[task](model and str(model), checkpoint, **args)
    if model is not None and task in CANNOT:
        expect_task(str(model), task)
    if args:
        known = f" ({', '.join(names)})" if names else ""
        raise InputError(f"{', '.join(args)}: only for models by name{known}; a config has its own")
    for bridge in _BRIDGES:
        import_module(bridge)
    return _OPENERS[task](model, checkpoint)
