"""Training, evaluating and using models: what stands between a backbone and a person.

    image_sets.py    sets of images with labels: folders of classes, the embedded digits
    data.py          images as batches of tensors, in an order that is a function of the step
    cards.py         building, measuring, saving and restoring models
    training.py      the training loop
    scores.py        accuracy on a labelled set
    metrics.py       metrics.csv and TensorBoard
    benchmark.py     time and memory against resolution
    atomic.py        files that are either whole or absent
    processes.py     one process or many
    progress.py      bars and messages

Every model that timm knows can be trained and used; nothing here knows one from another.
"""

from importlib import import_module

_HOMES = {
    "BrokenImage": "..errors",
    "BrokenVideo": "..errors",
    "Classifier": "..tasks.classify",
    "Detections": "..tasks.results",
    "Detector": "..tasks.detect",
    "Digits": ".image_sets",
    "Folder": ".image_sets",
    "InputError": "..errors",
    "Prediction": "..tasks.classify",
    "Recipe": ".training",
    "Segmenter": "..tasks.segment",
    "build": ".cards",
    "read_image": "..media.images",
    "train": ".training",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
