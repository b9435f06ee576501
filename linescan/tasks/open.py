"""Opens a segmentor or detector by its name or its config."""

from pathlib import Path

from ..errors import InputError
from ..openmmlab.models import MMDetector, MMSegmentor
from ..zoo import list_models
from .named import NamedSegmentor

__all__ = ["open_detector", "open_segmentor"]


def open_segmentor(model: str | Path, checkpoint: str | Path | None, **args) -> "MMSegmentor | NamedSegmentor":
    """A segmentor: SegMAN by its name, or what an mmseg config says.

    Raises:
        InputError, CheckpointError: no such model or config, a package is missing, or the weights are not its.
    """
    names = list_models(task="segmentation")
    if str(model).partition(".")[0] in names:
        return NamedSegmentor(str(model), checkpoint, **args)
    if args:
        raise InputError(f"{', '.join(args)}: only for models by name ({', '.join(names)}); a config has its own")
    return MMSegmentor(model, checkpoint)


def open_detector(model: str | Path, checkpoint: str | Path | None) -> "MMDetector":
    """The detector that an mmdet config says. Raises InputError, CheckpointError."""
    return MMDetector(model, checkpoint)
