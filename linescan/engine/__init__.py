"""Training and scoring of any task, on one process or several.

    recipe.py        what a run is asked to do: fields that are also the options of the command line
    configs.py       files of configs/ by name
    training.py      the training loop
    data.py          samples in batches, in an order that is a function of the step
    image_sets.py    sets of images and videos: folders of classes, the embedded digits
    samples.py       images and clips as tensors
    scores.py        totals over held-out data, and the scores from them
    optimisers.py    optimisers and schedules by name
    metrics.py       metrics.csv and TensorBoard
    cards.py         building, measuring, saving and restoring models
    benchmark.py     time and memory against resolution
    atomic.py        files that are either whole or absent
    processes.py     one process or many
    progress.py      bars and messages

Nothing here knows one task or one model from another.
"""

from importlib import import_module

_HOMES = {
    "Digits": "image_sets",
    "Folder": "image_sets",
    "Recipe": "recipe",
    "build": "cards",
    "train": "training",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Names of `__all__`, imported when they are first used: `linescan train --help` needs no torch."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
