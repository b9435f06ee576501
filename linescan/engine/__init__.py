"""Training, evaluating and using models: what stands between a backbone and a person.

    images.py        pictures: reading files, folders of classes, the embedded digits
    video.py         videos as clips: which frames, which crops, and how they are read
    data.py          pictures as batches of tensors, in an order that is a function of the step
    models.py        building, measuring, saving and restoring models
    training.py      the training loop
    evaluate.py      accuracy on a labelled set
    inference.py     Classifier: pictures and videos in, names out
    dense_inference.py  Segmenter and Detector: pictures in, masks and boxes out (dense_models.py: of which models)
    dense_files.py   what they write; overlay.py: what they draw; pixels.py: pictures larger than memory
    demo.py          `make demo`
    files.py         files that are either whole or absent
    processes.py     one process or many

Every model that timm knows can be trained and used; nothing here knows one from another.
"""

from .dense_inference import Detections, Detector, Segmenter
from .errors import BrokenImage, BrokenVideo, InputError
from .images import Digits, Folder, read_image
from .inference import Classifier, Prediction
from .models import build
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
