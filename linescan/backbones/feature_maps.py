"""Backbones for dense prediction: images -> a list of feature maps, of any registered model.

A `DenseBackbone` has a trunk, takes features after some of its units, and may have norms and a neck behind them. Each
family says in its `dense` attribute (`contract.DenseForm`) what its authors take.
"""

import re
from functools import partial
from pathlib import Path
from typing import Mapping, Sequence

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from ..checkpoint import fit, read_state_dict, readable, rename, strip_prefix
from ..errors import InputError, known
from ..layers.adapter import ViTAdapter
from ..layers.norm import LayerNorm
from ..layers.pyramid import RescaledFeatures, SimpleFeaturePyramid
from ..layers.stems import pad_to_multiple
from .contract import Backbone, architecture, take_indices, to_format

__all__ = ["DenseBackbone", "dense_backbone", "dense_maps", "dense_parts"]

# What a classifier has and a dense backbone may have no use for.
CLASSIFIER = re.compile(
    r"^trunk\.(norm|fc_norm|head|head_inner|head_norm|dist_head|dist_norm|cls_token|cls_pos_embed)(\.|$)"
)

# What published files call the parts behind the trunk: norms, and a neck.
NORM_NAMES = ((r"^outnorm_?(\d+)\.", r"norms.\1."),)
NECK_NAMES = ((r"^(fpn\d|simfp_\d|level_embed$|spm|interactions|up|norm[1-4])(?=\.|$)", r"neck.\1"),)


class DenseBackbone(nn.Module):
    """Images -> a list of maps (B, C, H, W).

    Args:
        trunk: the backbone. What stands behind the last wanted unit is removed from it, and its classifier.
        out_indices: units (stages, or blocks of a plain backbone) whose features are taken, see `take_indices`. With an
            adapter, which takes its own, the maps of the pyramid that are wanted.
        tap: "stream" for the stream after a unit, as the next one reads it; "mixer" for the output of a block's mixer
            alone, before it joins the stream (plain backbones).
        norms: "each" for a LayerNorm behind every feature; "last" for the trunk's final norm behind the last block's;
            None for features as they are.
        neck: a module from the features to other maps, or from the trunk itself (`ViTAdapter`); None for none.

    Attributes:
        out_channels, strides: of each map.
        feature_info: of each map, as timm has it.
        frozen: units that `freeze` has frozen; -1 for none.

    Raises:
        InputError: a trunk that reads clips, indices that it does not have, or options that do not go together.
    """

    def __init__(
        self,
        trunk: Backbone,
        out_indices: int | Sequence[int] | None = None,
        tap: str = "stream",
        norms: str | None = None,
        neck: nn.Module | None = None,
    ):
        super().__init__()
        known("tap", tap, ("stream", "mixer"))
        known("norms", norms, ("each", "last", None))
        if getattr(trunk, "num_frames", 0):
            raise InputError(f"this {type(trunk).__name__} reads clips: a dense backbone needs one that reads images")
        plain = trunk.unit_name == "blocks"
        if tap == "mixer" and not plain:
            raise InputError(f"tap='mixer' is for plain backbones: a {type(trunk).__name__} has stages")
        self.tap, self.frozen = tap, -1
        count = len(trunk.units)
        if isinstance(neck, ViTAdapter):
            if tap != "stream" or norms:
                raise InputError("an adapter takes the stream of all blocks, without norms")
            if not plain or trunk.stride != 16 or count % 4 or trunk.class_token:
                raise InputError("an adapter needs patches of 16 pixels, a depth that 4 divides, and no class token")
            neck.keep_maps(take_indices(4, out_indices, "out_indices"))
            self.out_indices = [count - 1]
        else:
            self.out_indices = take_indices(count, out_indices, "out_indices")
        if isinstance(neck, RescaledFeatures) and len(self.out_indices) != 4:
            raise InputError(f"neck 'rescaled' is for four maps, out_indices has {len(self.out_indices)}")
        trunk.prune_intermediate_layers(self.out_indices, prune_norm=norms != "last")
        if tap == "mixer":
            trunk.units[-1].without_mlp()
        self.trunk = trunk
        infos = [trunk.feature_info[i] for i in self.out_indices]
        self.norms = nn.ModuleDict()
        if norms == "each":
            self.norms.update({str(i): LayerNorm(f["num_chs"]) for i, f in zip(self.out_indices, infos)})
        self.last_norm = norms == "last"
        self.neck = neck
        if neck is None:
            self.out_channels, self.strides = [f["num_chs"] for f in infos], [f["reduction"] for f in infos]
            modules = [f"norms.{i}" if self.norms else f"trunk.{trunk.unit_name}.{i}" for i in self.out_indices]
        else:
            self.out_channels, self.strides, modules = neck.describe()
            modules = [f"neck.{name}" for name in modules]
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": module, "index": i}
            for i, (channels, stride, module) in enumerate(zip(self.out_channels, self.strides, modules))
        ]

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Images -> the features (B, C, H, W), before the neck."""
        trunk, kept = self.trunk, []
        x, grid, context = trunk.embed(x)
        dtype = next(trunk.parameters()).dtype
        for i, unit in enumerate(trunk.units):
            if self.tap == "mixer":
                x, y = trunk.run_unit(unit, x, context, with_mixed=True)
            else:
                x = trunk.run_unit(unit, x, context)
                y = trunk.as_next_reads(x, i, context)
            if i not in self.out_indices:
                continue
            if self.last_norm and i == self.out_indices[-1]:
                y = trunk.norm(y)
            y = trunk.to_map(y, grid)
            if dtype.itemsize < y.dtype.itemsize:  # a float32 stream between half-precision layers
                y = y.to(dtype)
            kept.append(to_format(self.norms[str(i)](y) if self.norms else y, "NCHW"))
        return kept

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) -> maps (B, C, H / stride, W / stride), sizes rounded as the trunk has it."""
        if isinstance(self.neck, ViTAdapter):
            return self.forward_adapter(x)
        maps = self.forward_maps(x)
        return maps if self.neck is None else self.neck(maps)

    def forward_adapter(self, x: Tensor) -> list[Tensor]:
        """The maps of an adapter; sides that 32 does not divide are padded, and the maps cut to the image."""
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, 32)
        trunk = self.trunk
        first, grid, context = trunk.embed(x)
        quarter = len(trunk.blocks) // 4

        def part(start: int, tokens: Tensor) -> Tensor:
            stream = trunk.to_stream(tokens, first.shape)
            for block in trunk.blocks[start : start + quarter]:
                stream = trunk.run_unit(block, stream, context)
            return trunk.patch_tokens(stream)

        maps = self.neck(x, trunk.patch_tokens(first), grid, [partial(part, i * quarter) for i in range(4)])
        return [y[..., : -(-height // s), : -(-width // s)] for y, s in zip(maps, self.strides)]

    # -- training ---------------------------------------------------------------------------------------------------

    def of_trunk(self, name: str, units: bool = True) -> bool:
        """Whether a parameter is of the stem (or, with `units`, of a unit), which a classifier has, too."""
        stem = self.trunk.group_matcher()["stem"]
        pattern = rf"{stem}|^{self.trunk.unit_name}\." if units else stem
        return name.startswith("trunk.") and re.match(pattern, name.removeprefix("trunk.")) is not None

    def freeze(self, units: int) -> None:
        """Stops the training of the stem (`units` >= 0) and of the first units.

        The new norms of their maps go on training. `train` keeps the frozen parts in evaluation mode.
        """
        self.frozen = units
        if units < 0:
            return
        for name, parameter in self.named_parameters():
            if self.of_trunk(name, units=False):
                parameter.requires_grad_(False)
        for unit in self.trunk.units[:units]:
            unit.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and self.frozen >= 0:
            for module in (self.trunk.patch_embed, *self.trunk.units[: self.frozen]):
                module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.trunk.set_grad_checkpointing(enable)

    def layer_ids(self) -> dict[str, int]:
        """Every parameter's layer: the stem 0, blocks from 1 on; what no classifier has is one above the last."""
        ids = group_parameters(self.trunk, self.trunk.group_matcher(coarse=False), reverse=True)
        ids = {f"trunk.{name}": i for name, i in ids.items() if self.of_trunk(f"trunk.{name}")}
        return {name: ids.get(name, max(ids.values()) + 1) for name, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay skips, as the trunk says."""
        return {f"trunk.{name}" for name in self.trunk.no_weight_decay()}

    # -- weights ----------------------------------------------------------------------------------------------------

    @property
    def checkpoint_nesting(self) -> Sequence[str]:
        return self.trunk.checkpoint_nesting

    def fit(
        self, state: dict[str, Tensor], img_size: int | Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """Brings a classification or dense file, official or ours, whole models included, to this module's keys.

        Args:
            state: tensors of the file.
            img_size: as for `Backbone.checkpoint_filter`.

        Returns:
            the state; keys left out of it, which only a classifier or a longer trunk has; and keys of this module that
            no classifier has, filled with what they are now.
        """
        own, form = self.state_dict(), self.trunk.dense
        state = strip_prefix(state, "backbone.")
        names = (*NORM_NAMES, *(NECK_NAMES if self.neck is not None else ()))  # a trunk may have a norm1 of its own
        state = rename({key.removeprefix("net."): value for key, value in state.items()}, names)
        if form.norms_by_place:  # the file numbers the norms, not the blocks
            places = {f"norms.{k}.": f"norms.{i}." for k, i in enumerate(self.out_indices)}
            ours = any(key.startswith("trunk.") for key in state)
            state = state if ours else {_replace(key, places): value for key, value in state.items()}
        behind = {key: value for key, value in state.items() if key.startswith(("norms.", "neck."))}
        inner = {key.removeprefix("trunk."): value for key, value in state.items() if key not in behind}
        state = behind | {f"trunk.{k}": v for k, v in self.trunk.checkpoint_filter(inner, img_size).items()}
        unit, count = re.compile(rf"^trunk\.{self.trunk.unit_name}\.(\d+)\."), len(self.trunk.units)

        def is_useless(key: str) -> bool:
            if number := unit.match(key):  # of a unit behind the last, or of an MLP behind the last mixer
                after_mixer = self.tap == "mixer" and re.search(r"^[\w.]+?\.(cpe2|norm2|mlp|scale2)\.", key)
                return int(number[1]) >= count - bool(after_mixer)
            adapter = isinstance(self.neck, ViTAdapter) and self.neck.is_of_other_map(key.removeprefix("neck."))
            return adapter or CLASSIFIER.match(key) is not None

        def is_new(key: str) -> bool:
            return key.startswith(("norms.", "neck.")) or bool(form.new_keys and re.search(form.new_keys, key))

        dropped = [key for key in state if key not in own and is_useless(key)]
        new = [] if behind else [key for key in own if key not in state and is_new(key)]
        return {k: v for k, v in state.items() if k not in dropped} | {k: own[k] for k in new}, dropped, new

    def checkpoint_filter(self, state: dict[str, Tensor], img_size: int | Sequence[int] | None = None):
        """Keys of a classification or dense file to this module's, see `fit`."""
        return self.fit(state, img_size)[0]

    def load_pretrained(
        self, path: str | Path, img_size: int | Sequence[int] | None = None
    ) -> tuple[list[str], list[str]]:
        """Loads a published classification or dense checkpoint, or one of ours; position tables are resampled.

        Returns:
            (dropped, new): the file's parameters that only a classifier has, and ours that no classifier has and that
            stay as they are (output norms, necks, adapters).

        Raises:
            CheckpointError: the file cannot be read, or is not one of this backbone.
        """
        state = read_state_dict(path, self.checkpoint_nesting)
        name = type(self.trunk).__name__
        with readable(path, name):
            state, dropped, new = self.fit(state, img_size)
        fit(self, state, path, name=name)
        return dropped, new


def _replace(key: str, prefixes: Mapping[str, str]) -> str:
    return next((new + key.removeprefix(old) for old, new in prefixes.items() if key.startswith(old)), key)


# -- by name -----------------------------------------------------------------------------------------------------------


def dense_parts(
    model: str,
    out_indices: int | Sequence[int] | None = None,
    tap: str | None = None,
    norms: str | None = "auto",
    neck: str | Mapping | None = "auto",
    **kwargs,
) -> dict:
    """The arguments of `DenseBackbone` for a registered model.

    Args:
        model: a registered name.
        out_indices, tap, norms: of `DenseBackbone`; by default what the family's authors take, or else a LayerNorm
            behind the stream after the last stage of each stride, or after four blocks at equal distances. These are
            taken, too, where the authors' blocks are more than the model has.
        neck: of plain backbones. "rescaled" brings four maps of one scale to strides 4, 8, 16 and 32
            (`RescaledFeatures`), "simple" makes p2 to p6 of the last map (`SimpleFeaturePyramid`), "adapter" exchanges
            features with a pyramid (`ViTAdapter`); with options as a dict, {"type": "simple", "out_channels": 128}.
            None is none. By default what the authors take, or "rescaled" for other plain backbones.
        kwargs: of the model, over what the name stands for.

    Raises:
        InputError: unknown model, options or indices, or a neck that the model does not fit.
    """
    cls, kwargs = architecture(model, **kwargs)
    form = cls.dense
    trunk = cls(**{**form.trunk, **kwargs, "num_classes": 0})
    count = len(trunk.units)
    options = dict(neck) if isinstance(neck, Mapping) else {"type": neck}
    kind = options.pop("type", None)
    kind = form.neck if kind == "auto" else known("neck", kind, ("auto", "rescaled", "simple", "adapter", None))
    if kind and trunk.unit_name != "blocks":
        raise InputError(f"neck {kind!r} is for plain backbones: a {cls.__name__} has maps of several strides")
    if kind == "adapter":
        options.setdefault("drop_path_rate", kwargs.get("drop_path_rate", 0.0))
        if trunk.embed_dim % 6:  # heads by default
            options.setdefault("num_heads", 16)  # as published for the large model
    width, stride = trunk.feature_info[-1]["num_chs"], trunk.feature_info[-1]["reduction"]
    try:
        made = {
            "rescaled": lambda: RescaledFeatures(width, stride, **options),
            "simple": lambda: SimpleFeaturePyramid(width, stride, **options),
            "adapter": lambda: ViTAdapter(width, in_chans=trunk.in_chans, **options),
            None: lambda: None,
        }[kind]()
    except TypeError as error:
        raise InputError(f"neck {kind!r} does not take these options: {', '.join(options)} ({error})") from None
    if out_indices is None and kind != "adapter":
        out_indices = form.out_indices
        if trunk.unit_name == "blocks" and (out_indices is None or max(out_indices) >= count):
            out_indices = [count * (i + 1) // 4 - 1 for i in range(4)]
        elif out_indices is None:
            out_indices = sorted({f["reduction"]: i for i, f in enumerate(trunk.feature_info)}.values())
    return {
        "trunk": trunk,
        "out_indices": out_indices,
        "tap": tap or ("stream" if kind == "adapter" else form.tap),
        "norms": (None if kind == "adapter" else form.norms) if norms == "auto" else norms,
        "neck": made,
    }


def dense_backbone(model: str, **options) -> DenseBackbone:
    """A registered model as a backbone for dense prediction; options as for `dense_parts`."""
    return DenseBackbone(**dense_parts(model, **options))


def dense_maps(model: str, **options) -> list[dict]:
    """`{"channels": C, "stride": s, "module": name}` of each map of `dense_backbone(model, **options)`."""
    with torch.device("meta"):
        backbone = dense_backbone(model, **options)
    return [{"channels": f["num_chs"], "stride": f["reduction"], "module": f["module"]} for f in backbone.feature_info]
