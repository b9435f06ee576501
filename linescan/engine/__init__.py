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

from ..errors import BrokenImage, BrokenVideo, InputError
from ..media.images import read_image
from ..tasks.classify import Classifier, Prediction
from ..tasks.detect import Detector
from ..tasks.results import Detections
from ..tasks.segment import Segmenter
from .cards import build
from .image_sets import Digits, Folder
from .training import Recipe, train

__all__ = [
    "BrokenImage",
    "BrokenVideo",
    "Classifier",
    "Detections",
    "Detector",
    "Digits",
    "Folder",
    "InputError",
    "Prediction",
    "Recipe",
    "Segmenter",
    "build",
    "read_image",
    "train",
]
