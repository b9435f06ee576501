"""linescan: linear-time vision backbones (Mamba, RWKV, gated linear attention) for timm and OpenMMLab.

`import linescan` registers every backbone with timm; `timm.create_model("vim_tiny_patch16_224")` then works.
"""

from . import backbones  # noqa: F401  (registers the models)
from .checkpoint import CheckpointError, load_checkpoint, read_state_dict
from .zoo import list_models

__version__ = "0.1.0"
__all__ = ["CheckpointError", "list_models", "load_checkpoint", "read_state_dict"]
