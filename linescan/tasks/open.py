"""Opens the model of a tool: one of the zoo by its name, or what another library's config says."""

from importlib import import_module
from pathlib import Path
from typing import Any, Callable

from ..errors import InputError
from ..zoo import list_models

__all__ = ["open_model", "register_opener"]

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
    if args:
        known = f" ({', '.join(names)})" if names else ""
        raise InputError(f"{', '.join(args)}: only for models by name{known}; a config has its own")
    for bridge in _BRIDGES:
        import_module(bridge)
    return _OPENERS[task](model, checkpoint)
