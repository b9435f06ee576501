"""Opens the model of a tool: one of the zoo by its name, or what another library's config says."""

from importlib import import_module
from pathlib import Path
from typing import Any, Callable

from ..errors import InputError
from ..zoo import find, is_model, list_models

__all__ = ["expect_task", "open_model", "register_opener", "wrong_task"]

COMMANDS = {
    "anomaly": "anomaly", "change": "change", "classification": "classify", "detection": "detect",
    "prompting": "prompt", "restoration": "restore", "segmentation": "segment", "volume-segmentation": "segment",
}  # fmt: skip
"""By task: the command that runs its models on files."""

CANNOT = {
    "anomaly": "finds no anomalies", "change": "finds no changes", "detection": "detects nothing",
    "prompting": "takes no prompts", "restoration": "restores no images", "segmentation": "segments no images",
}  # fmt: skip
"""By task: what can be said of a model of another."""


def wrong_task(name: str | None, task: str) -> InputError:
    """Says that a model is not one of `task`, which models are, and which command the model is for."""
    own = COMMANDS.get(find(name).task) if name and is_model(name) else None
    more = f"; {name} is for `linescan {own}`" if own else ""
    return InputError(f"{name} {CANNOT[task]}; `linescan list --task {task}` shows models that do{more}")


def expect_task(name: str | None, task: str) -> None:
    """Raises InputError: a name of the zoo whose models have another task; other names are not judged."""
    if name and is_model(name) and find(name).task != task:
        raise wrong_task(name, task)


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
