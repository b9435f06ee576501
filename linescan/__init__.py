"""linescan: linear-time vision models (Mamba, RWKV, gated linear attention) for timm, OpenMMLab and the command line.

`linescan.create_model(NAME)` builds the models of all tasks; after `import linescan`, in any order with `import timm`,
`timm.create_model("vim_tiny_patch16_224")` builds the classifiers.

Importing this package imports neither torch nor timm: its names are looked up when they are used, and the models are
registered as soon as timm is there. `linescan --help` is quick for that reason.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint, read_state_dict
    from .errors import BrokenImage, BrokenVideo, CheckpointError, InputError
    from .tasks.anomaly import AnomalyDetector
    from .tasks.change import ChangeDetector
    from .tasks.classify import Classifier
    from .tasks.detect import Detector
    from .tasks.point_detect import BoxDetector
    from .tasks.point_occupancy import SceneCompleter
    from .tasks.point_parts import PartSegmenter
    from .tasks.points import PointClassifier
    from .tasks.prompt import Prompter
    from .tasks.restore import Restorer
    from .tasks.segment import Segmenter
    from .tasks.segment_volumes import VolumeSegmenter
    from .zoo import create_model, list_models

__version__ = "0.1.0"
__all__ = [
    "AnomalyDetector",
    "BoxDetector",
    "BrokenImage",
    "BrokenVideo",
    "ChangeDetector",
    "CheckpointError",
    "Classifier",
    "Detector",
    "InputError",
    "PartSegmenter",
    "PointClassifier",
    "Prompter",
    "Restorer",
    "SceneCompleter",
    "Segmenter",
    "VolumeSegmenter",
    "create_model",
    "list_models",
    "load_checkpoint",
    "read_state_dict",
]

_HOMES = {
    "AnomalyDetector": "tasks.anomaly",
    "BoxDetector": "tasks.point_detect",
    "BrokenImage": "errors",
    "BrokenVideo": "errors",
    "ChangeDetector": "tasks.change",
    "CheckpointError": "errors",
    "Classifier": "tasks.classify",
    "Detector": "tasks.detect",
    "InputError": "errors",
    "PartSegmenter": "tasks.point_parts",
    "PointClassifier": "tasks.points",
    "Prompter": "tasks.prompt",
    "Restorer": "tasks.restore",
    "SceneCompleter": "tasks.point_occupancy",
    "Segmenter": "tasks.segment",
    "VolumeSegmenter": "tasks.segment_volumes",
    "create_model": "zoo",
    "list_models": "zoo",
    "load_checkpoint": "checkpoint",
    "read_state_dict": "checkpoint",
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterTimm(MetaPathFinder):
    """Registers the models at the end of `import timm`, and stays until then: looking for timm is not importing it."""

    def find_spec(self, name, path=None, target=None):
        if name != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                import_module(".backbones", __name__)

            spec.loader.exec_module = exec_module
        return spec


if "timm" in sys.modules:
    import_module(".backbones", __name__)
else:
    sys.meta_path.insert(0, _AfterTimm())
