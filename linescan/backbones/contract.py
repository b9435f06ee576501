"""The timm contract, once for all backbones: classifier, intermediates, checkpointing, parameter groups, weights.

`PlainBackbone` is a sequence of tokens through equal blocks; `HierarchicalBackbone` a map through stages. A system
states its architecture and its checkpoint filter; what timm and OpenMMLab expect of any backbone is here.
"""

import inspect
import sys
from dataclasses import replace
from typing import Callable, Iterable, Mapping, Sequence, get_args

import timm
import torch
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .. import zoo
from ..checkpoint import load_checkpoint
from ..errors import InputError
from ..layers.linear import through_onednn

__all__ = ["Backbone", "PlainBackbone", "HierarchicalBackbone", "architecture", "create_backbone", "register"]

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
        module.default_cfgs = {**getattr(module, "default_cfgs", {}), **generate_default_cfgs(own)}
    for name, module in {entry.name: entry.cls.__module__ for entry in added}.items():
        register_model(_entry_point(name, module))


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
        **entry.preprocess,
    }


def _through_timm(entry: zoo.Entry, pretrained: bool, **args) -> nn.Module:
    """Builds as `timm.create_model` does. It takes None for "not given": where None is a value, it goes as a word."""
    optional = _optional(entry.cls)
    args = {k: "none" if v is None and k in optional else v for k, v in args.items()}
    return timm.create_model(entry.full_name, pretrained, **args)


def _optional(cls: type) -> set[str]:
    """The arguments of a class, and of those it extends, for which None is a value."""
    parameters = {p.name: p for base in reversed(cls.__mro__) for p in _parameters(base)}
    return {name for name, p in parameters.items() if type(None) in get_args(p.annotation)}


def _parameters(cls: type) -> Iterable[inspect.Parameter]:
    return inspect.signature(cls.__init__).parameters.values() if "__init__" in vars(cls) else ()


def _entry(name: str, pretrained_cfg) -> zoo.Entry:
    """The entry of a model and of the tag that timm's `pretrained_cfg` stands for: a tag, a configuration, or None."""
    if isinstance(pretrained_cfg, str):
        return zoo.find(f"{name}.{pretrained_cfg}")
    if pretrained_cfg is None:
        return zoo.find(name)
    tag = pretrained_cfg.get("tag") if isinstance(pretrained_cfg, dict) else pretrained_cfg.tag
    return next((entry for entry in zoo.tags(name) if entry.tag == tag), zoo.find(name))


def architecture(name: str, **kwargs) -> tuple[type["Backbone"], dict]:
    """The class behind a registered backbone and the arguments it is built with, `kwargs` over the name's own.

    The word "none" stands for None where None is a value: timm drops arguments that are None.

    Raises:
        InputError: there is no such backbone.
    """
    entry = zoo.find(name)
    if not issubclass(entry.cls, Backbone):
        raise InputError(f"{name} is a whole model for {entry.task}, not a backbone")
    optional = _optional(entry.cls)
    kwargs = {k: None if v == "none" and k in optional else v for k, v in kwargs.items()}
    return entry.cls, {**entry.args, **kwargs}


def create_backbone(name: str, pretrained: bool = False, **kwargs) -> nn.Module:
    """Builds a registered backbone as timm's registry asks for it.

    Weights come through `linescan.load_checkpoint`, never a pickle. The tag decides the arguments, too: the classes
    and frames of the model are those of its weights.

    Args:
        name: the registered name, without a tag.
        pretrained: load the official weights, or the file that `pretrained_cfg_overlay={"file": PATH}` names.
        kwargs: the model's arguments and timm's (`features_only`, `out_indices`, `pretrained_cfg_overlay`, ...).

    Raises:
        InputError: the weights cannot be fetched.
    """
    entry = _entry(name, kwargs.get("pretrained_cfg"))
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    if pretrained:
        cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), overlay)
        if not (cfg.source or cfg.file or cfg.state_dict):
            source = replace(entry, hub=cfg.hf_hub_id, file=cfg.hf_hub_filename, url=cfg.url)
            overlay["file"] = str(zoo.fetch(source, kwargs.get("cache_dir")))
    overlay.setdefault("custom_load", "hf")  # timm then hands the file's path to Backbone.load_pretrained
    given = {key: kwargs.pop(key) for key in _TIMMS & kwargs.keys()}
    cls, args = architecture(entry.full_name, **kwargs)
    if "num_classes" not in kwargs:
        args.pop("num_classes", None)  # timm takes them from the configuration, which may be another file's
    return build_model_with_cfg(
        cls,
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


class Backbone(nn.Module):
    """What every linescan backbone has in common.

    Subclasses set `num_features`, `feature_info`, and either the plain or the hierarchical members, and call
    `init_head` once. `blocks` or `stages` are the units of features, checkpointing and layer decay.
    """

    default_out_indices: Sequence[int] = (0, 1, 2, 3)
    head_name = "head"
    min_size = 1  # smallest height and width that the model can read
    checkpoint_nesting: Sequence[str] = ()  # entries of a published file that come before those of `read_state_dict`

    def init_head(self, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Sets the classifier: dropout and a Linear from the pooled features; `num_classes=0` for none."""
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.head_hidden_size = self.num_features
        self.grad_checkpointing = False
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        through_onednn(self)

    # -- classifier -------------------------------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        """The final Linear, or Identity."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier for `num_classes` (0: none); optionally another pooling."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        old = next(self.parameters())
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head.to(device=old.device, dtype=old.dtype)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features of `forward_features` -> pooled (B, num_features) if `pre_logits`, else logits."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes), or pooled features without a classifier."""
        return self.forward_head(self.forward_features(x))

    # -- training utilities -----------------------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable

    def run(self, block: Callable, x: Tensor, *context) -> Tensor:
        """One block, under gradient checkpointing where that is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, *context)
        return block(x, *context)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay skips: what the modules themselves name, and class tokens and positions."""
        names = {n for n, _ in self.named_parameters() if n.rpartition(".")[2] in ("pos_embed", "cls_token")}
        for prefix, module in self.named_modules():
            if module is not self and hasattr(module, "no_weight_decay"):
                names |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
        return names

    # -- weights ----------------------------------------------------------------------------------------------------

    def load_pretrained(self, path: str) -> None:
        """Loads a published file, keeping the own classifier or folding the stem where classes or channels differ."""
        load_checkpoint(self, path, adapt=True)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Maps the keys and layouts of the official file to this model's."""
        return state

    # -- input ------------------------------------------------------------------------------------------------------

    def check_input(self, x: Tensor, in_chans: int) -> None:
        """Raises one clear ValueError for an input of the wrong rank, channel count or size."""
        name = type(self).__name__
        if x.ndim != 4:
            raise ValueError(f"{name} expects images (B, {in_chans}, H, W), got shape {tuple(x.shape)}")
        if x.shape[1] != in_chans:
            raise ValueError(f"{name} expects {in_chans} input channels, got {x.shape[1]} (shape {tuple(x.shape)})")
        if min(x.shape[-2:]) < self.min_size:
            raise ValueError(
                f"{name} expects images of at least {self.min_size}x{self.min_size} pixels, "
                f"got {x.shape[-2]}x{x.shape[-1]}"
            )


def _take(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    try:
        return feature_take_indices(count, indices)
    except AssertionError as error:
        raise ValueError(str(error)) from None


class PlainBackbone(Backbone):
    """Equal blocks over a token sequence (B, L, dim).

    Subclasses define `blocks`, `norm`, `embed(x) -> (tokens, grid, context)`, where every block is called as
    `block(tokens, *context)`, `patch_tokens(x, grid) -> (B, H * W, dim)` if class tokens stand in the sequence, and
    `pool(x)`.
    """

    default_out_indices = (-1,)

    def patch_tokens(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The grid tokens of a sequence, in row-major order, without class tokens."""
        return x

    def pool(self, x: Tensor) -> Tensor:
        """Tokens after the final norm -> (B, num_features)."""
        return x.mean(1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> all tokens (B, L, dim) after the final norm."""
        x, _, context = self.embed(x)
        for block in self.blocks:
            x = self.run(block, x, *context)
        return self.norm(x)

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
        """Features after chosen blocks, as timm has it.

        Args:
            x: images (B, in_chans, H, W).
            indices: block numbers, the last n if an int, all if None.
            return_prefix_tokens: accepted for timm; class tokens are never among the intermediates.
            norm: apply the final norm to each.
            stop_early: skip the blocks after the last wanted one.
            output_fmt: "NCHW" maps or "NLC" tokens.
            intermediates_only: return only the list.

        Returns:
            The list of intermediates, or (final features, list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is 'NCHW' or 'NLC', not {output_fmt!r}")
        take, last = _take(len(self.blocks), indices)
        x, grid, context = self.embed(x)
        kept = []
        for i, block in enumerate(self.blocks):
            if stop_early and i > last:
                break
            x = self.run(block, x, *context)
            if i in take:
                tokens = self.patch_tokens(self.norm(x) if norm else x, grid)
                kept.append(tokens if output_fmt == "NLC" else tokens.transpose(1, 2).unflatten(2, grid).contiguous())
        return kept if intermediates_only else (self.norm(x), kept)

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drops the blocks after the last wanted one (and norm and head if asked); returns the block numbers."""
        take, last = _take(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return take

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning-rate decay."""
        return {
            "stem": r"^cls_token|^pos_embed|^temporal_pos|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


class HierarchicalBackbone(Backbone):
    """Stages over a channels-last map (B, H, W, C), each at half the resolution of the one before.

    Subclasses define `patch_embed(x) -> (B, H, W, C)`, `stages`, each a `downsample` and then `blocks`,
    and `norm`.
    """

    def pool(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) after the final norm -> (B, C), its mean or maximum by `global_pool`; with "" as it is."""
        if self.global_pool == "max":
            return x.amax((1, 2))
        return x.mean((1, 2)) if self.global_pool else x

    def forward_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        """A stage's downsampling, then its blocks one by one."""
        x = stage.downsample(x)
        for block in stage.blocks:
            x = self.run(block, x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> the last map (B, H, W, C) after the final norm."""
        x = self.embed(x)
        for stage in self.stages:
            x = self.forward_stage(stage, x)
        return self.norm(x)

    def embed(self, x: Tensor) -> Tensor:
        """Checks the images and runs the stem."""
        self.check_input(x, self.in_chans)
        return self.patch_embed(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """The map after each chosen stage, as timm has it.

        Args:
            x: images (B, in_chans, H, W).
            indices: stage numbers, the last n if an int, all if None.
            norm: apply the final norm to the last stage's map (the others have another width).
            stop_early: skip the stages after the last wanted one.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return only the list.

        Returns:
            The list of maps, or (final features, list).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is 'NCHW' or 'NHWC', not {output_fmt!r}")
        take, last = _take(len(self.stages), indices)
        x = self.embed(x)
        kept = []
        for i, stage in enumerate(self.stages):
            if stop_early and i > last:
                break
            x = self.forward_stage(stage, x)
            if i in take:
                y = self.norm(x) if norm and i == len(self.stages) - 1 else x
                kept.append(y if output_fmt == "NHWC" else y.permute(0, 3, 1, 2).contiguous())
        return kept if intermediates_only else (self.norm(x), kept)

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drops the stages after the last wanted one (and norm and head if asked); returns the stage numbers."""
        take, last = _take(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm or last + 1 < len(self.feature_info):
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return take

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning-rate decay."""
        return {
            "stem": r"^patch_embed|^pos_embed",
            "blocks": [(r"^stages\.(\d+)", None)]
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }
