"""linescan for OpenMMLab: the backbone and the layer-wise learning rates, in MMEngine's registries.

    custom_imports = dict(imports=['linescan.openmmlab'])
    model = dict(backbone=dict(type='LinescanBackbone', model='vig_h_tiny'), ...)

Both are registered at the root, so that mmsegmentation and mmdetection see them.
"""

from collections import defaultdict
from importlib.util import find_spec

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.utils import is_installed
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import zoo
from .._compat import mmengine_flop_handles
from ..backbones.feature_maps import DenseBackbone, dense_parts
from ..errors import InputError
from ..flops import flop_handles
from .keys import translate_keys

__all__ = ["LayerDecayOptimWrapperConstructor", "LinescanBackbone"]

# MMEngine looks for "mmseg::" configs in the distribution that upstream calls mmsegmentation; the maintained fork is
# named otherwise, and is found by the name of its module.
if not is_installed(MODULE2PACKAGE["mmseg"]) and find_spec("mmseg"):
    MODULE2PACKAGE["mmseg"] = "mmseg"

mmengine_flop_handles().update(flop_handles())  # what `get_model_complexity_info` goes by, which takes no others


@MODELS.register_module()
class LinescanBackbone(DenseBackbone, BaseModule):
    """Any linescan backbone of images for OpenMMLab: images -> a list of maps (B, C, H, W).

    Args:
        model: a registered name; `linescan list` shows them.
        kwargs: `out_indices`, `tap`, `norms`, `neck`, and the model's own arguments; of `dense_parts`, which has their
            defaults.
        frozen_stages: 0 freezes the stem, n also the first n stages (or blocks of a plain backbone); -1 nothing.
        norm_eval: keep BatchNorm layers (of adapters and necks) in evaluation mode.
        with_cp: gradient checkpointing, block by block.
        pretrained: as `init_cfg=dict(type='Pretrained', checkpoint=pretrained)`.
        init_cfg: `dict(type='Pretrained', checkpoint=...)`: a file, classification or dense, official or of a training
            here; its URL; or `linescan://NAME` for the official file of a registered model. `img_size` tells the
            size it was trained at, where its positions are for no square.

    Attributes:
        out_channels, strides, feature_info: of the maps, as `DenseBackbone` has them.

    Raises:
        InputError: unknown model, a model of clips, indices that it does not have, or another kind of `init_cfg`.
    """

    def __init__(
        self,
        model: str,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        pretrained: str | None = None,
        init_cfg: dict | None = None,
        **kwargs,
    ):
        if pretrained and (init_cfg or pretrained.startswith(("open-mmlab://", "torchvision://", "mmcls://"))):
            raise InputError(
                f"pretrained={pretrained!r} is for another backbone, from a _base_ of this config: unset it with "
                "model=dict(pretrained=None, ...), and give init_cfg to the backbone"
            )
        if pretrained:
            init_cfg = {"type": "Pretrained", "checkpoint": pretrained}
        if init_cfg and (init_cfg.get("type") != "Pretrained" or "checkpoint" not in init_cfg):
            raise InputError(f"init_cfg is dict(type='Pretrained', checkpoint=...) or None, not {dict(init_cfg)}")
        super().__init__(**dense_parts(model, **kwargs))
        self.init_cfg = init_cfg
        self.norm_eval = norm_eval
        self.set_grad_checkpointing(with_cp)
        self.freeze(frozen_stages)
        self.register_load_state_dict_pre_hook(translate_keys)

    def train(self, mode: bool = True):
        """As usual, but for what `frozen_stages` and `norm_eval` keep in evaluation mode."""
        super().train(mode)
        if mode and getattr(self, "norm_eval", False):
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Loads what `init_cfg` names; otherwise the model is initialised since it was built."""
        if self.init_cfg and not self._is_init:  # type: ignore[has-type]
            checkpoint = self.init_cfg["checkpoint"]
            dropped, new = self.load_pretrained(fetch_checkpoint(checkpoint), self.init_cfg.get("img_size"))
            said = [f"LinescanBackbone: loaded {checkpoint}"]
            said += [f"its classifier is dropped ({', '.join(dropped)})"] if dropped else []
            said += [f"{len(new)} parameters are new (first: {new[0]})"] if new else []
            print_log("; ".join(said), logger="current")
        self._is_init = True


def fetch_checkpoint(checkpoint: str) -> str:
    """The local path of a file, a URL, or `linescan://NAME`; what is fetched stays in torch's and the Hub's caches."""
    if checkpoint.startswith("linescan://"):
        return str(zoo.fetch(zoo.find(checkpoint.removeprefix("linescan://"))))
    if checkpoint.startswith(("http://", "https://")):
        return str(zoo.fetch_address(checkpoint))
    return checkpoint


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Learning rates that fall by a factor from each block of the backbone to the one below, the stem's the lowest.

        optim_wrapper = dict(
            constructor='LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(decay_rate=0.9), ...)

    Heads and what is new in the backbone (output norms, necks, adapters) learn at the full rate. Weight decay skips
    vectors, biases, and what the backbone's `no_weight_decay` names. `paramwise_cfg` takes what MMEngine's default
    constructor takes besides; `custom_keys` there go first.

    Raises:
        ValueError: no `decay_rate` in `paramwise_cfg`, or no LinescanBackbone in the model.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module=None) -> None:
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:  # of the recursion; what follows is done once, for the whole model
            return
        rate = self.paramwise_cfg.get("decay_rate")
        backbones = {name: m for name, m in module.named_modules() if isinstance(m, LinescanBackbone)}
        if rate is None or not backbones:
            raise ValueError("layer decay needs paramwise_cfg=dict(decay_rate=...) and a LinescanBackbone in the model")
        names = {parameter: name for name, parameter in module.named_parameters()}
        layers, depth, no_decay = {}, {}, set()
        for name, backbone in backbones.items():
            dot = name + "." if name else ""
            ids = backbone.layer_ids()
            layers |= {dot + key: i for key, i in ids.items()}
            depth |= dict.fromkeys((dot + key for key in ids), max(ids.values()))
            no_decay |= {dot + key for key in backbone.no_weight_decay()}
        custom = self.paramwise_cfg.get("custom_keys", {})
        merged = defaultdict(list)
        for group in params:
            (parameter,) = group.pop("params")
            name = names[parameter]
            scale = rate ** (depth[name] - layers[name]) if name in layers else 1.0
            group["lr"] = group.get("lr", self.base_lr) * scale
            free = parameter.ndim == 1 or name.endswith(".bias") or name in no_decay
            if free and not any(key in name for key in custom):
                group["weight_decay"] = 0.0
            merged[tuple(sorted(group.items()))].append(parameter)
        params[:] = [{"params": parameters, **dict(options)} for options, parameters in merged.items()]
