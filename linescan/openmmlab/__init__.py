"""The bridge to OpenMMLab: `custom_imports = dict(imports=['linescan.openmmlab'])` registers the backbone,
and checkpoints that are whole whenever a training is killed.

backbone.py      LinescanBackbone, layer-wise learning rates
models.py        segmentors and detectors of configs, as the inference tools see them
runner.py        training from a config; resumable.py: so that it can be killed at any moment
segman.py        SegMAN's decode head for mmseg; sigma.py: Sigma's encoder and head, and images in pairs
yolo.py          Mamba-YOLO-World as a detector of mmdet; lvis.py: LVIS's images and fixed AP
"""

from importlib.util import find_spec

if find_spec("mmengine"):  # without it, the other modules say in one line what is missing
    from ..engine.configs import CONFIGS, find_config, list_configs
    from .backbone import LayerDecayOptimWrapperConstructor, LinescanBackbone
    from .resumable import AtomicCheckpointHook, IterationSeedHook

    __all__ = [
        "AtomicCheckpointHook", "CONFIGS", "IterationSeedHook", "LayerDecayOptimWrapperConstructor", "LinescanBackbone",
        "find_config", "list_configs",
    ]  # fmt: skip
