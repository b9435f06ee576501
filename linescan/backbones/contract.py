"""The timm contract, once for all backbones: classifier, intermediates, checkpointing, parameter groups, weights.

`PlainBackbone` is a sequence of tokens through equal blocks; `HierarchicalBackbone` a map through stages. A system
states its architecture and its checkpoint filter; what timm and OpenMMLab expect of any backbone is here.
"""

import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import isqrt, prod
from typing import Callable, Mapping, Sequence

import timm
import torch
from timm.layers import is_scriptable, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from .. import zoo
from ..arguments import optional_arguments
from ..checkpoint import load_checkpoint, strip_prefix
from ..errors import InputError, known
from ..layers.blocks import run
from ..layers.pos_embed import resample_pos_embed
from ..layers.tracing import opaque

__all__ = [
    "Backbone",
    "DenseForm",
    "HierarchicalBackbone",
    "PlainBackbone",
    "architecture",
    "check_clips",
    "check_images",
    "create_backbone",
    "register",
    "take_indices",
    "to_format",
]

# How classifiers of ImageNet are evaluated, where a table states nothing else.
IMAGENET = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


def register(cls: type | None, models: Mapping[str, Mapping], **common) -> None:
    """Adds a family's classifiers to the zoo (`linescan.zoo.register`) and to timm.

    By default a model reads an image of (3, 224, 224) prepared as for ImageNet (`IMAGENET`) and its classifier is
    `head`. The module that defines the classes gets the entry points, and `default_cfgs` as timm's own modules have.
    """
    facts = {"task": "classification", "inputs": ((3, 224, 224),), "classifier": "head", "build": _through_timm}
    preprocess = {**IMAGENET, **common.pop("preprocess", {})}
    added = zoo.register(cls, models, **{**facts, **common, "preprocess": preprocess})
    for module in {entry.cls.__module__: sys.modules[entry.cls.__module__] for entry in added}.values():
        own = {e.full_name: _timm_cfg(e) for e in added if e.cls.__module__ == module.__name__}
        vars(module)["default_cfgs"] = {**getattr(module, "default_cfgs", {}), **generate_default_cfgs(own)}
    for name, module in {entry.name: entry.cls.__module__ for entry in added}.items():
        setattr(sys.modules[module], name, register_model(_entry_point(name, module)))


def _entry_point(name: str, module: str) -> Callable:
    def entry_point(pretrained: bool = False, **kwargs) -> nn.Module:
        return create_backbone(name, pretrained, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    return entry_point


def _timm_cfg(entry: zoo.Entry) -> dict:
    """timm's `pretrained_cfg` of an entry."""
    channels, *_, height, width = entry.inputs[0]
    return {
        "url": entry.url,
        "hf_hub_id": entry.hub if entry.file else None,
        "hf_hub_filename": entry.file,
        "origin_url": entry.page or entry.code,
        "num_classes": entry.args.get("num_classes", 1000),
        "input_size": (channels, height, width),
        "first_conv": entry.first_conv,
        "classifier": entry.classifier,
        "license": entry.licence.lower(),
        "paper_ids": f"arXiv:{entry.arxiv}" if entry.arxiv else None,
        **entry.cls.timm_sizes(height, width, entry.args),
        **entry.preprocess,
    }


def _through_timm(entry: zoo.Entry, pretrained: bool, **args) -> nn.Module:
    """Builds as `timm.create_model` does. It takes None for "not given": where None is a value, it goes as a word."""
    optional = optional_arguments(entry.cls)
    args = {k: "none" if v is None and k in optional else v for k, v in args.items()}
    return timm.create_model(entry.full_name, pretrained, **args)


def _entry(name: str, pretrained_cfg) -> zoo.Entry:
    """The entry of a model and of the tag that timm's `pretrained_cfg` stands for: a tag, a configuration, or None."""
    if isinstance(pretrained_cfg, str):
        return zoo.find(f"{name}.{pretrained_cfg}")
    if pretrained_cfg is None:
        return zoo.find(name)
    tag = pretrained_cfg.get("tag") if isinstance(pretrained_cfg, dict) else pretrained_cfg.tag
    return next((entry for entry in zoo.tags(name) if entry.tag == tag), zoo.find(name))


def architecture(name: str, **kwargs) -> tuple[type["Backbone"], dict]:
    """The class behind a registered backbone and the arguments it is built with (`zoo.Entry.arguments`).

    Raises:
        InputError: there is no such backbone.
    """
    entry = zoo.find(name)
    if not issubclass(entry.cls, Backbone):
        raise InputError(f"{name} is a whole model for {entry.task}, not a backbone")
    return entry.cls, entry.arguments(kwargs)


def create_backbone(name: str, pretrained: bool = False, **kwargs) -> nn.Module:
    """Builds a registered backbone as timm's registry asks for it.

    Weights come through `linescan.load_checkpoint`, never a pickle. The tag decides the arguments, too: the classes
    and frames of the model are those of its weights.

    Args:
        name: the registered name, without a tag.
        pretrained: load the official weights, or the file that `pretrained_cfg_overlay={"file": PATH}` names.
        kwargs: the model's arguments and timm's (`features_only`, `out_indices`, `pretrained_cfg_overlay`, `device`,
            `dtype`, ...). Numbers are initialised in float32, whatever the dtype.

    Raises:
        InputError: the weights cannot be fetched, or the model is wanted for scripting.
    """
    if is_scriptable():
        raise InputError(f"TorchScript cannot script {name}: trace it (torch.jit.trace) or export it (torch.export)")
    entry = _entry(name, kwargs.get("pretrained_cfg"))
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    given = {key: kwargs.pop(key) for key in _TIMMS & kwargs.keys()}
    cls, args = architecture(entry.full_name, **kwargs)  # before anything is fetched
    if "num_classes" not in kwargs:
        args.pop("num_classes", None)  # timm takes them from the configuration, which may be another file's
    if pretrained:
        cfg = resolve_pretrained_cfg(name, given.get("pretrained_cfg"), overlay)
        if not (cfg.source or cfg.file or cfg.state_dict):
            source = replace(entry, hub=cfg.hf_hub_id, file=cfg.hf_hub_filename, url=cfg.url)
            overlay["file"] = str(zoo.fetch(source, given.get("cache_dir")))
    overlay.setdefault("custom_load", "hf")  # timm then hands the file's path to Backbone.load_pretrained

    def build(**args) -> Backbone:
        with nullcontext() if device is None else torch.device(device):
            return cls(**args).to(dtype=dtype)

    return build_model_with_cfg(
        build,
        name,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=lambda state, model: model.checkpoint_filter(state),
        feature_cfg={"out_indices": given.pop("out_indices", cls.default_out_indices), "feature_cls": "getter"},
        **given,
        **args,
    )


# What `build_model_with_cfg` takes for itself.
_TIMMS = {
    "pretrained_cfg", "features_only", "out_indices", "feature_cls", "cache_dir", "pretrained_model_args", "pruned",
}  # fmt: skip


# -- pooling -----------------------------------------------------------------------------------------------------------

# Outputs per channel of each pooling. timm's "fast" poolings are the same functions.
POOLS = {"avg": 1, "max": 1, "avgmax": 1, "catavgmax": 2}


def _base_pool(kind: str) -> str:
    return "avg" if kind == "fast" else kind.removeprefix("fast")


def pool_tokens(x: Tensor, kind: str, dims: tuple[int, ...]) -> Tensor:
    """Mean and maximum over `dims` as timm's poolings have them: "avg", "max", their mean, or both side by side."""
    kind = _base_pool(kind)
    if kind == "avg":
        return x.mean(dims)
    if kind == "max":
        return x.amax(dims)
    mean, most = x.mean(dims), x.amax(dims)
    return 0.5 * (mean + most) if kind == "avgmax" else torch.cat([mean, most], -1)


# -- features ----------------------------------------------------------------------------------------------------------


def take_indices(count: int, indices: int | Sequence[int] | None, name: str = "indices") -> list[int]:
    """Numbers of the wanted units, sorted.

    Args:
        count: units that there are.
        indices: their numbers, negative ones counted from the end; the last n if an int; all if None.
        name: of the argument, for the message.

    Raises:
        InputError: none is wanted, one is out of range, or one is given twice.
    """
    if indices is None:
        return list(range(count))
    wanted = range(count - indices, count) if isinstance(indices, int) else list(indices)
    taken = sorted({i + count if i < 0 else i for i in wanted})
    if not taken or taken[0] < 0 or taken[-1] >= count or len(taken) != len(wanted):
        what = indices if isinstance(indices, int) else tuple(indices)
        raise InputError(f"{name} {what} out of range: they are different numbers from 0 to {count - 1}, or below 0")
    return taken


def to_format(x: Tensor, output_fmt: str) -> Tensor:
    """A map (B, H, W, C) as "NCHW", "NHWC" or "NLC"."""
    if output_fmt == "NCHW":
        return x.movedim(-1, 1).contiguous()
    return x.flatten(1, -2) if output_fmt == "NLC" else x


# -- backbones ---------------------------------------------------------------------------------------------------------


@opaque
def check_images(x: Tensor, in_chans: int, min_size: int, name: str) -> None:
    """Raises one clear InputError for images of the wrong rank, channel count or size."""
    if x.ndim != 4:
        raise InputError(f"{name} expects images (B, {in_chans}, H, W), got shape {tuple(x.shape)}")
    if x.shape[1] != in_chans:
        raise InputError(f"{name} expects {in_chans} input channels, got {x.shape[1]} (shape {tuple(x.shape)})")
    if min(x.shape[-2:]) < min_size:
        raise InputError(
            f"{name} expects images of at least {min_size}x{min_size} pixels, got {x.shape[-2]}x{x.shape[-1]}"
        )


@opaque
def check_clips(x: Tensor, in_chans: int, tubelet_size: int, min_size: int, name: str) -> None:
    """Raises one clear InputError for clips of the wrong rank, length, channel count or size."""
    if x.ndim != 5:
        raise InputError(f"{name} expects clips (B, {in_chans}, T, H, W), got shape {tuple(x.shape)}")
    if x.shape[2] < tubelet_size:
        raise InputError(f"a clip has at least {tubelet_size} frames, got {x.shape[2]}")
    check_images(x[:, :, 0], in_chans, min_size, name)


@dataclass(frozen=True)
class DenseForm:
    """What a family's authors take for segmentation and detection; see `feature_maps.DenseBackbone`.

    Attributes:
        out_indices: units; None for the last of each stride, or four blocks at equal distances.
        tap, norms: of `DenseBackbone`.
        neck: of `dense_parts`.
        trunk: arguments of the trunk.
        norms_by_place: published files number the norms from 0, not by the block.
        new_keys: pattern of the trunk's parameters that no classifier has.
    """

    out_indices: Sequence[int] | None = None
    tap: str = "stream"
    norms: str | None = "each"
    neck: str | None = None
    trunk: Mapping = field(default_factory=dict)
    norms_by_place: bool = False
    new_keys: str | None = None


class Backbone(nn.Module):
    """What every linescan backbone has in common.

    Subclasses define `in_chans`, `num_features`, `embed`, their units (`blocks` or `stages`), `norm`, `translate` and
    `grid_of`, and call `init_head` once, at the end. The units are what features, checkpointing, layer decay and
    pruning count.
    """

    default_out_indices: Sequence[int] = (0, 1, 2, 3)
    min_size = 1  # smallest height and width that the model can read
    checkpoint_nesting: Sequence[str] = ()  # entries of a published file that come before those of `read_state_dict`
    classifiers = ("head", "head_inner.0")  # layers whose shapes follow the classes
    pooled_norm: Callable | None = None  # of an object: width -> a norm of pooled tokens (`fc_norm`, as timm has it)
    unit_name: str  # "blocks" or "stages"
    dense = DenseForm()

    def __init__(self):
        super().__init__()
        self.grad_checkpointing = False
        self.register_parameter("pos_embed", None)  # (1, H, W, dim), for the grid of `img_size`

    @property
    def units(self) -> nn.ModuleList:
        """The stages of a hierarchical backbone, the blocks of a plain one."""
        return getattr(self, self.unit_name)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple]:
        """Images -> the stream before the first unit, its grid, and what units read beside the stream."""
        raise NotImplementedError

    def run_unit(self, unit: nn.Module, x: Tensor, context: tuple, **options):
        """One unit over the stream."""
        raise NotImplementedError

    def to_map(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The stream as a map (B, H, W, C), without class tokens."""
        return x

    def as_next_reads(self, x: Tensor, unit: int, context: tuple) -> Tensor:
        """The stream after a unit, as the next one sees it."""
        return x

    def finish(self, x: Tensor) -> Tensor:
        """The stream after the last unit -> what `forward_features` returns."""
        return self.norm(x)

    @classmethod
    def timm_sizes(cls, height: int, width: int, args: Mapping) -> dict:
        """What timm's configuration of a model says of sizes: `pool_size` for an image, `min_input_size`.

        Args:
            height, width: of the image.
            args: the model's arguments.
        """
        return {"pool_size": None}

    # -- classifier -------------------------------------------------------------------------------------------------

    def init_head(self, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Sets the classifier: dropout and a Linear from the pooled features; `num_classes=0` for none."""
        self.head_drop = nn.Dropout(drop_rate)
        self.set_pool(global_pool)
        self.set_classifier(num_classes)

    def set_pool(self, global_pool: str) -> None:
        """Sets the pooling: "avg", "max", "avgmax", "catavgmax", "token" (the class token), or "" for none.

        Raises:
            InputError: another word, or no class token to take.
        """
        token = self.has_class_token
        if global_pool not in ("", *["token"] * token) and _base_pool(global_pool) not in POOLS:
            known = [*POOLS, *["token"] * token, ""]
            raise InputError(
                f"global_pool of this {type(self).__name__} is one of {', '.join(map(repr, known))}, "
                f"not {global_pool!r}"
            )
        self.global_pool = global_pool
        self.head_hidden_size = width = self.num_features * POOLS.get(_base_pool(global_pool), 1)
        if self.pooled_norm is None or global_pool in ("", "token"):
            self.fc_norm: nn.Module = nn.Identity()
        elif getattr(getattr(self, "fc_norm", None), "normalized_shape", None) != (width,):
            self.fc_norm = self.pooled_norm(width)

    @property
    def has_class_token(self) -> bool:
        """Whether a class token can be pooled."""
        return False

    def set_classifier(self, num_classes: int, **factory) -> None:
        """A new, untrained classifier of `num_classes`, none for 0."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_hidden_size, num_classes, **factory) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The final Linear, or Identity."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier for `num_classes` (0: none); optionally another pooling.

        Raises:
            InputError: there is no such pooling.
        """
        old = next(self.parameters())
        if global_pool is not None:
            self.set_pool(global_pool)
            self.fc_norm.to(device=old.device, dtype=old.dtype)
        self.set_classifier(num_classes, device=old.device, dtype=old.dtype)

    def pool(self, x: Tensor) -> Tensor:
        """What `forward_features` returned -> (B, head_hidden_size), by `global_pool`; with "" as it is."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features of `forward_features` -> pooled (B, head_hidden_size) if `pre_logits`, else logits."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes), or pooled features without a classifier."""
        return self.forward_head(self.forward_features(x))

    # -- features ---------------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> all tokens (B, L, dim), or the last map (B, H, W, C), after the final norm."""
        x, _, context = self.embed(x)
        for unit in self.units:
            x = self.run_unit(unit, x, context)
        return self.finish(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """The map after each chosen unit, as timm has it.

        Args:
            x: images (B, in_chans, H, W).
            indices: of stages or blocks, see `take_indices`.
            return_prefix_tokens: pairs of a map and its class tokens (B, n, C), where the model has class tokens.
            norm: apply the final norm: to every map, or in a hierarchical backbone to the last stage's (the others have
                another width).
            stop_early: skip the units after the last wanted one.
            output_fmt: "NCHW" or "NHWC" maps, or "NLC" tokens.
            intermediates_only: return only the list.

        Returns:
            The list of maps, or (what `forward_features` returns, list). Where `stop_early` left units out, the stream
            after the last one that ran, with the final norm if it fits.

        Raises:
            InputError: wrong indices, or an unknown format.
        """
        known("output_fmt", output_fmt, ("NCHW", "NHWC", "NLC"))
        take = take_indices(len(self.units), indices)
        x, grid, context = self.embed(x)
        kept: list = []
        for i, unit in enumerate(self.units[: take[-1] + 1] if stop_early else self.units):
            x = self.run_unit(unit, x, context)
            if i in take:
                y = self.norm(x) if norm and self.fits_norm(i) else x
                kept.append(to_format(self.to_map(y, grid), output_fmt))
                if return_prefix_tokens and self.has_class_token:
                    kept[-1] = kept[-1], self.class_tokens(y)
        if intermediates_only:
            return kept
        return self.finish(x) if self.fits_norm(i) else x, kept

    def fits_norm(self, unit: int) -> bool:
        """Whether the final norm is for the channels of a unit's output."""
        return True

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drops the units after the last wanted one, the norm if it was of one of them or if asked, and the classifier
        with the norm before it.

        Returns:
            The numbers of the wanted units.
        """
        take = take_indices(len(self.units), indices)
        if prune_norm or not self.fits_norm(take[-1]):
            self.norm = nn.Identity()
        setattr(self, self.unit_name, self.units[: take[-1] + 1])
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0)
        return take

    # -- training utilities -----------------------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay skips: what the modules themselves name, class tokens and position tables."""
        names = {n for n, _ in self.named_parameters() if n.endswith(("pos_embed", "cls_token"))}
        for prefix, module in self.named_modules():
            if module is not self and hasattr(module, "no_weight_decay"):
                names |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
        return names

    # -- weights ----------------------------------------------------------------------------------------------------

    def load_pretrained(self, path: str) -> None:
        """Loads a published file; keeps the model's classifier (or folds the stem) if classes (or channels) differ."""
        load_checkpoint(self, path, adapt=True)

    def checkpoint_filter(self, state: dict[str, Tensor], img_size: int | Sequence[int] | None = None):
        """Keys and layouts of an official file, or of ours, to this model's; position tables are resampled.

        Args:
            state: tensors of the file; of a segmentor or detector those below "backbone.", of OpenMMLab's classifiers
                `head.` or `cls_head.`, too.
            img_size: at which the file was trained, where its position table is for a grid that is not square and that
                neither the file nor `pretrained_cfg` tells.

        Raises:
            InputError: the grid of the position table is not known.
            KeyError: a tensor is missing that others are stacked with.
        """
        if any(key.startswith("backbone.") for key in state):
            head = {key: value for key, value in state.items() if key.startswith(("head.", "cls_head."))}
            state = strip_prefix(state, "backbone.") | head
        return self.fit_positions(self.translate(state), img_size)

    def is_useless(self, key: str) -> bool:
        """Whether a parameter of the whole model has no place in this one, of which timm's feature module kept part."""
        unit = re.match(rf"{self.unit_name}\.(\d+)\.", key)
        if unit:
            return len(self.units) <= int(unit[1]) < len(self.feature_info)
        return key.startswith(("norm.", "fc_norm."))

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys and layouts to linescan's; what is ours or unknown stays."""
        return state

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Positions down and across for an image of this size."""
        raise NotImplementedError

    @property
    def native_grid(self) -> tuple[int, int]:
        """The grid that the position table is built for."""
        return tuple(self.pos_embed.shape[1:3])

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table (1, H, W, dim) at a grid."""
        return resample_pos_embed(self.pos_embed, grid)

    def fit_positions(self, state: dict[str, Tensor], img_size: int | Sequence[int] | None) -> dict[str, Tensor]:
        """Resamples the position table of a file to this model's grid.

        Ours, (1, H, W, dim), tells its grid. Of one given as tokens, (1, L, dim), the grid is that of `img_size`, of
        `pretrained_cfg`, or a square, or if L is no square number this model's own.
        """
        table = state.get("pos_embed")
        if table is None or self.pos_embed is None:
            return state
        if table.ndim == 3:
            table = table.unflatten(1, self.file_grid(table.shape[1], img_size, self.grid_of, self.native_grid))
        return state | {"pos_embed": resample_pos_embed(table, self.native_grid)}

    def file_grid(
        self,
        positions: int,
        img_size: int | Sequence[int] | None,
        grid_of: Callable[[int, int], tuple[int, int]],
        native: tuple[int, int],
    ) -> tuple[int, int]:
        """The grid of a table of so many positions, see `fit_positions`.

        Args:
            positions: rows of the table.
            img_size: of the file, if it is known.
            grid_of: height and width of an image -> the grid.
            native: this model's.
        """
        if img_size is not None:
            grid = grid_of(*to_2tuple(img_size))
            if prod(grid) != positions:
                raise InputError(f"{positions} positions in the file, an image of {img_size} has {grid[0]}x{grid[1]}")
            return grid
        cfg = getattr(self, "pretrained_cfg", None) or {}
        side = isqrt(positions)
        guesses = [grid_of(*cfg["input_size"][-2:])] if "input_size" in cfg else []
        for grid in (*guesses, (side, side), native):
            if prod(grid) == positions:
                return grid
        raise InputError(f"{positions} positions make no square: give the img_size that the file was trained at")


class PlainBackbone(Backbone):
    """Equal blocks over a stream of one resolution: tokens (B, L, dim), or a map (B, H, W, dim).

    Subclasses define `blocks`, `norm`, `embed_dim`, `stride` and `embed(x) -> (stream, grid, context)`, where every
    block is called as `block(stream, *context)`. `init_positions` makes position table and class tokens.
    """

    default_out_indices = (-1,)
    unit_name = "blocks"
    dense = DenseForm(neck="rescaled")
    file_class_token = "head"  # where class tokens stand in published files, for a model without
    class_positions = True  # whether class tokens have positions
    pools_class_tokens = True  # whether mean and maximum include them

    def __init__(self):
        super().__init__()
        self.class_token = None  # where class tokens stand: "head", "middle", "tail", or "double" (head and tail)
        self.register_parameter("cls_token", None)
        self.register_parameter("cls_pos_embed", None)

    def init_head(self, num_classes: int, global_pool: str | None, drop_rate: float) -> None:
        """As `Backbone`; by default the class token is classified, or the mean of the tokens."""
        self.feature_info = [
            {"num_chs": self.embed_dim, "reduction": self.stride, "module": f"blocks.{i}"}
            for i in range(len(self.blocks))
        ]
        if global_pool is None:
            global_pool = "token" if self.has_class_token else "avg"
        super().init_head(num_classes, global_pool, drop_rate)

    # -- tokens -----------------------------------------------------------------------------------------------------

    def init_positions(self, grid: tuple[int, int], class_token: str | None = None) -> None:
        """Makes the position table for a grid, class tokens, and positions of their own for these; all zeros."""
        known("class_token", class_token, ("head", "middle", "tail", "double", None))
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, self.embed_dim))
        self.class_token = class_token
        if class_token:
            count = 2 if class_token == "double" else 1
            self.cls_token = nn.Parameter(torch.zeros(1, count, self.embed_dim))
            if self.class_positions:
                self.cls_pos_embed = nn.Parameter(torch.zeros(1, count, self.embed_dim))

    @property
    def has_class_token(self) -> bool:
        return self.class_token is not None

    @staticmethod
    def class_rows(place: str | None, patches: int) -> list[int]:
        """Rows of the class tokens among all tokens."""
        return {
            None: [],
            "head": [0],
            "middle": [patches // 2],
            "tail": [patches],
            "double": [0, patches + 1],
        }[place]

    def add_class_tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, H * W, dim) -> all tokens (B, L, dim)."""
        if self.cls_token is None:
            return x
        tokens = self.cls_token if self.cls_pos_embed is None else self.cls_token + self.cls_pos_embed
        rows = self.class_rows(self.class_token, x.shape[1])
        for i, row in enumerate(rows):
            token = tokens[:, i : i + 1].expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :row], token, x[:, row:]], 1)
        return x

    def class_tokens(self, x: Tensor) -> Tensor:
        """The class tokens (B, n, dim) of all tokens (B, L, dim)."""
        rows = self.class_rows(self.class_token, x.shape[1] - self.cls_token.shape[1])
        return torch.cat([x[:, row : row + 1] for row in rows], 1)

    def patch_tokens(self, x: Tensor) -> Tensor:
        """The stream as tokens (B, H * W, dim), row-major, without class tokens."""
        x = x.flatten(1, -2)
        if self.class_token is None:
            return x
        if self.class_token == "middle":
            row = (x.shape[1] - 1) // 2
            return torch.cat([x[:, :row], x[:, row + 1 :]], 1)
        return {"head": x[:, 1:], "tail": x[:, :-1], "double": x[:, 1:-1]}[self.class_token]

    def to_stream(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Tokens (B, H * W, dim), row-major, as a stream of this shape without class tokens: undoes `patch_tokens`."""
        return x.reshape(shape)

    def to_map(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return self.patch_tokens(x).unflatten(1, grid)

    def pool(self, x: Tensor) -> Tensor:
        if self.global_pool == "token":
            return self.class_tokens(x).mean(1)
        if not self.global_pool:
            return x
        return pool_tokens(x if self.pools_class_tokens else self.patch_tokens(x), self.global_pool, (1,))

    # -- units ------------------------------------------------------------------------------------------------------

    def run_unit(self, unit: nn.Module, x: Tensor, context: tuple, **options):
        return run(unit, x, *context, checkpointing=self.grad_checkpointing, **options)

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x).flatten(1, -2)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning-rate decay."""
        return {
            "stem": r"^cls_token|^\w*pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^(?:fc_)?norm", (99999,))],
        }

    def fit_positions(self, state: dict[str, Tensor], img_size: int | Sequence[int] | None) -> dict[str, Tensor]:
        """As `Backbone`; the rows of class tokens in a table of tokens are taken out, to `cls_pos_embed`."""
        table, tokens = state.get("pos_embed"), state.get("cls_token")
        if table is not None and table.ndim == 3 and tokens is not None and self.class_positions:
            place = self.class_token or ("double" if tokens.shape[1] == 2 else self.file_class_token)
            rows = self.class_rows(place, table.shape[1] - tokens.shape[1])
            patches = [i for i in range(table.shape[1]) if i not in rows]
            state = state | {"pos_embed": table[:, patches], "cls_pos_embed": table[:, rows]}
        return super().fit_positions(state, img_size)


class HierarchicalBackbone(Backbone):
    """Stages over a channels-last map (B, H, W, C), each at half the resolution of the one before.

    Subclasses define `patch_embed(x) -> (B, H, W, C)`, `stages`, each a `Stage`, their channels `dims`, and `norm`.
    """

    unit_name = "stages"
    output_fmt = "NHWC"
    first_stride = 4  # of the first stage's map

    @classmethod
    def timm_sizes(cls, height: int, width: int, args: Mapping) -> dict:
        """The last map's size, for four stages and an image whose sides 32 divides."""
        return {"pool_size": (height // 32, width // 32)}

    def init_head(self, num_classes: int, global_pool: str, drop_rate: float) -> None:
        self.feature_info = [
            {"num_chs": dim, "reduction": self.first_stride * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(self.dims)
        ]
        self.feature_info[-1]["num_chs_norm"] = self.num_features
        super().init_head(num_classes, global_pool, drop_rate)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple]:
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        x = self.patch_embed(x)
        return x, x.shape[1:3], ()

    def run_unit(self, unit: nn.Module, x: Tensor, context: tuple) -> Tensor:
        return unit(x)

    def fits_norm(self, unit: int) -> bool:
        return unit == len(self.dims) - 1

    def pool(self, x: Tensor) -> Tensor:
        return pool_tokens(x, self.global_pool, (1, 2)) if self.global_pool else x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning-rate decay."""
        return {
            "stem": r"^patch_embed|^pos_embed",
            "blocks": [(r"^stages\.(\d+)", None)]
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
                (r"^(?:fc_)?norm", (99999,)),
            ],
        }
