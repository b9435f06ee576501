"""Training, evaluating and using image classifiers: what stands between a backbone and a person.

    images.py        pictures: reading files, folders of classes, the embedded digits
    video.py         videos as clips: which frames, which crops, and how they are read
    data.py          pictures as batches of tensors, in an order that is a function of the step
    models.py        building, measuring, saving and restoring models
    training.py      the training loop
    evaluate.py      accuracy on a labelled set
    inference.py     Classifier: pictures and videos in, names out
    demo.py          `make demo`
    files.py         files that are either whole or absent
    processes.py     one process or many

Every model that timm knows can be trained and used; nothing here knows one from another.
"""

from .errors import BrokenImage, BrokenVideo, InputError
from .images import Digits, Folder, read_image
from .inference import Classifier, Prediction
from .models import build
from .training import Recipe, train

__all__ = [
    "BrokenImage",
    "BrokenVideo",
    "Classifier",
    "Digits",
    "Folder",
    "InputError",
    "Prediction",
    "Recipe",
    "build",
    "read_image",
    "train",
]
