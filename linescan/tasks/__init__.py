"""One file per task: how a model is trained for it and scored, and the tool that applies it to files.

Training: `base.Task` is what a task is, `recipes` holds the options of every task that `linescan train` knows.
classify.py      images and videos (with the tool)
distill.py       the same, with a teacher; teacher.py
distill_encoder.py    maps of features that match a teacher's
pretrain.py      masked pre-training

Tools: `tool.Tool` and `tool.Writer` are what they share, `tool.run` applies them to files; windows.py slides over
images of any size, results.py holds detections.
segment.py, detect.py    masks and boxes; open.py and named.py find the models
prompt.py                masks of what points and boxes show; prompt_training.py trains such models
restore.py, anomaly.py, change.py    tasks with their training and their tools in one file
"""

from importlib import import_module

_HOMES = {
    "ClassificationRecipe": "recipes",
    "Classifier": "classify",
    "Detections": "results",
    "Detector": "detect",
    "DistillationRecipe": "recipes",
    "Prediction": "classify",
    "PretrainingRecipe": "recipes",
    "Segmenter": "segment",
    "Task": "base",
    "Tool": "tool",
    "Writer": "tool",
    "read_recipe": "recipes",
    "run": "tool",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Names of `__all__`, imported when they are first used: `linescan train --help` needs no torch."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
