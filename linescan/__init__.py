"""linescan: linear-time vision models (Mamba, RWKV, gated linear attention) for timm, OpenMMLab and the command line.

`import linescan` registers every model: `linescan.create_model(NAME)` builds those of all tasks, and
`timm.create_model("vim_tiny_patch16_224")` the classifiers.
"""

from . import backbones, heads  # noqa: F401  (register the models)
from .checkpoint import CheckpointError, load_checkpoint, read_state_dict
from .zoo import create_model, list_models

__version__ = "0.1.0"
__all__ = ["CheckpointError", "create_model", "list_models", "load_checkpoint", "read_state_dict"]
