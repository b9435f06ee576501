"""Backbones for dense prediction: images -> a list of feature maps, of any registered model.

Families with a published form for segmentation and detection (an adapter, a choice of features, output norms) come in
that form; all others give the maps after some of their stages or blocks, each through a LayerNorm of its own. Maps of
one scale can be brought to several.
"""

import inspect
import re
from pathlib import Path
from typing import Sequence

from torch import Tensor, nn

from ..checkpoint import CheckpointError, read_state_dict, strip_prefix
from ..layers.pyramid import RescaledFeatures, SimpleFeaturePyramid
from .contract import Backbone, PlainBackbone, architecture
from .localmamba import LocalVim, LocalVimDense, LocalVMamba, LocalVMambaDense
from .segman import SegMANDense, SegMANEncoder
from .vig import HierViG, HierViGDense
from .vim import Vim, VimDense
from .vision_rwkv import VisionRWKV, VisionRWKVAdapter
from .vmamba import VMamba, VMambaDense

__all__ = ["DENSE_FORMS", "FeatureMaps", "NormedMaps"]

DENSE_FORMS: dict[type, type] = {
    Vim: VimDense,
    VMamba: VMambaDense,
    LocalVim: LocalVimDense,
    LocalVMamba: LocalVMambaDense,
    HierViG: HierViGDense,
    SegMANEncoder: SegMANDense,
    VisionRWKV: VisionRWKVAdapter,
}
"""The published dense form of each family that has one."""

# What a classifier has and a dense backbone has no use for.
CLASSIFIER = re.compile(r"^(norm|head|head_inner|cls_token)(\.|$)")


class NormedMaps(nn.Module):
    """The maps of a backbone after chosen units (stages, or blocks of a plain one), each through its own LayerNorm.

    Args:
        trunk: the backbone; units after the last chosen one, its final norm and its classifier are removed.
        out_indices: units; by default all stages, or four blocks at equal distances.
    """

    def __init__(self, trunk: Backbone, out_indices: Sequence[int] | None = None):
        super().__init__()
        count = len(units(trunk))
        if out_indices is None:
            plain = isinstance(trunk, PlainBackbone)
            out_indices = [count * (i + 1) // 4 - 1 for i in range(4)] if plain else range(count)
        self.out_indices = check_indices(out_indices, count)
        trunk.prune_intermediate_layers(self.out_indices, prune_norm=True)
        self.trunk = trunk
        self.channels = [trunk.feature_info[i]["num_chs"] for i in self.out_indices]
        self.out_norms = nn.ModuleDict({str(i): nn.LayerNorm(c) for i, c in zip(self.out_indices, self.channels)})

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.trunk.forward_intermediates(x, self.out_indices, intermediates_only=True)
        normed = [norm(y.permute(0, 2, 3, 1)) for norm, y in zip(self.out_norms.values(), maps)]
        return [y.permute(0, 3, 1, 2).contiguous() for y in normed]

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the backbone's own, without the units that are not used."""
        if any(key.startswith("trunk.") for key in state):
            return state
        used, unit = len(units(self.trunk)), re.compile(r"^(?:blocks|stages)\.(\d+)\.")
        state = self.trunk.checkpoint_filter(state)
        return {f"trunk.{k}": v for k, v in state.items() if not (m := unit.match(k)) or int(m[1]) < used}


class FeatureMaps(nn.Module):
    """Images -> a list of maps (B, C, H, W), of any registered model.

    Args:
        model: a registered name.
        out_indices: stages, or blocks of a plain backbone, whose maps are taken (with an adapter: which of its maps);
            by default those of the published dense form, or all stages, or four blocks at equal distances.
        neck: "rescaled" brings four maps of one scale to strides 4, 8, 16 and 32 (`RescaledFeatures`), "simple" makes
            p2 to p6 of the last map (`SimpleFeaturePyramid`), None leaves the maps alone; "auto" is what the published
            dense form does, and "rescaled" for other plain backbones.
        out_channels: of the "simple" neck.
        kwargs: of the published dense form and of the model; they override what the name stands for.

    Attributes:
        body: the model, or its dense form.
        trunk: the backbone within it.
        frozen: units that `freeze` has frozen; -1 for none.

    Raises:
        ValueError: unknown model, or indices it does not have.
    """

    def __init__(
        self,
        model: str,
        out_indices: Sequence[int] | None = None,
        neck: str | None = "auto",
        out_channels: int = 256,
        **kwargs,
    ):
        super().__init__()
        if neck not in ("auto", "rescaled", "simple", None):
            raise ValueError(f"neck is 'auto', 'rescaled', 'simple' or None, not {neck!r}")
        cls, kwargs = architecture(model, **kwargs)
        dense = DENSE_FORMS.get(cls)
        self.taken = None
        if dense is None:
            plain = issubclass(cls, PlainBackbone)
            self.body = NormedMaps(cls(**{**kwargs, "num_classes": 0}), out_indices)
            self.trunk_prefix = "body.trunk."
            neck = ("rescaled" if plain else None) if neck == "auto" else neck
        else:
            known = inspect.signature(dense).parameters
            if "neck" in known:
                kwargs |= {} if neck == "auto" else {"neck": neck, "out_channels": out_channels}
                neck = None
            if "out_indices" not in known:
                self.taken = None if out_indices is None else check_indices(out_indices, 4)
            elif out_indices is not None:
                kwargs["out_indices"] = check_indices(out_indices, count_units(cls, kwargs))
            self.body = dense(**kwargs)
            self.trunk_prefix = "body."
            neck = None if neck == "auto" else neck
        width = self.trunk.feature_info[-1]["num_chs"]
        if neck == "rescaled":
            self.neck = RescaledFeatures(width, self.trunk.feature_info[-1]["reduction"])
        else:
            self.neck = SimpleFeaturePyramid(width, out_channels) if neck == "simple" else nn.Identity()
        self.single = neck == "simple"
        self.frozen = -1

    @property
    def trunk(self) -> Backbone:
        return self.get_submodule(self.trunk_prefix[:-1])

    def _of_trunk(self, name: str, units: str = r"|^(blocks|stages)\.") -> bool:
        """Whether a parameter belongs to the stem or to the units, as a classifier's does."""
        inside = name.startswith(self.trunk_prefix)
        stem = self.trunk.group_matcher()["stem"]
        return inside and re.match(stem + units, name.removeprefix(self.trunk_prefix)) is not None

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.body(x)
        maps = maps if self.taken is None else [maps[i] for i in self.taken]
        return self.neck(maps[-1] if self.single else maps)

    # -- training ---------------------------------------------------------------------------------------------------

    def freeze(self, stages: int) -> None:
        """Stops the training of the stem (`stages` >= 0) and of the first stages, or blocks of a plain backbone.

        The new norms of their maps go on learning. `train` keeps the frozen parts in evaluation mode.
        """
        self.frozen = stages
        if stages < 0:
            return
        for name, parameter in self.named_parameters():
            if self._of_trunk(name, units=""):
                parameter.requires_grad_(False)
        for unit in units(self.trunk)[:stages]:
            unit.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and self.frozen >= 0:
            for module in (self.trunk.patch_embed, *units(self.trunk)[: self.frozen]):
                module.eval()
        return self

    def layer_ids(self) -> dict[str, int]:
        """Every parameter's layer: the stem 0, blocks from 1 on, and one above the last for what no classifier has."""
        from timm.models._manipulate import group_parameters

        ids = group_parameters(self.trunk, self.trunk.group_matcher(coarse=False), reverse=True)
        ids = {self.trunk_prefix + name: i for name, i in ids.items() if self._of_trunk(self.trunk_prefix + name)}
        return {name: ids.get(name, max(ids.values()) + 1) for name, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay skips, as the backbone says."""
        return {self.trunk_prefix + name for name in self.trunk.no_weight_decay()}

    # -- weights ----------------------------------------------------------------------------------------------------

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keys of a classification or dense file, official or ours, whole models included, to this module's."""
        state = strip_prefix(state, "backbone.")
        if any(key.startswith("body.") for key in state):
            return state
        return {f"body.{key}": value for key, value in self.body.checkpoint_filter(state).items()}

    def load_pretrained(self, path: str | Path) -> tuple[list[str], list[str]]:
        """Loads a published classification or dense checkpoint, or one of ours; position embeddings are resampled.

        Returns:
            (dropped, new): the file's parameters that only a classifier has, and ours that no classifier has and that
            stay as they are (output norms, necks, adapters).

        Raises:
            CheckpointError: the file cannot be read, or is not one of this backbone.
        """
        try:
            state = self.checkpoint_filter(read_state_dict(path, self.trunk.checkpoint_nesting))
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is not a checkpoint of {type(self.trunk).__name__} ({error})") from None
        own = self.state_dict()
        dropped = [k for k in state if k not in own and CLASSIFIER.match(k.removeprefix(self.trunk_prefix))]
        state = {k: v for k, v in state.items() if k not in dropped}
        new = [k for k in own if k not in state and not self._of_trunk(k)]
        wrong = {
            "missing": [k for k in own if k not in state and k not in new],
            "unexpected": [k for k in state if k not in own],
            "of another shape": [k for k in state if k in own and state[k].shape != own[k].shape],
        }
        said = [f"{len(keys)} keys {what} (first: {keys[0]})" for what, keys in wrong.items() if keys]
        if said:
            raise CheckpointError(f"{path} is not a checkpoint of this {type(self.trunk).__name__}: {'; '.join(said)}")
        self.load_state_dict(own | state)
        return dropped, new


def units(trunk: Backbone) -> nn.ModuleList:
    """The stages of a hierarchical backbone, the blocks of a plain one."""
    return trunk.blocks if isinstance(trunk, PlainBackbone) else trunk.stages


def count_units(cls: type[Backbone], kwargs: dict) -> int:
    """How many units `cls(**kwargs)` will have."""
    known = inspect.signature(cls).parameters
    if issubclass(cls, PlainBackbone):
        return kwargs.get("depth", known["depth"].default)
    return len(kwargs["depths"] if "depths" in kwargs else known["depths"].default)


def check_indices(indices: Sequence[int], count: int) -> list[int]:
    """The indices sorted, negative ones counted from the end.

    Raises:
        ValueError: one of them is out of range.
    """
    if not indices or any(not -count <= i < count for i in indices):
        raise ValueError(f"out_indices are from 0 to {count - 1}, got {tuple(indices)}")
    return sorted(i % count for i in indices)
