"""Mamba-ND: plain Mamba layers, each of which reads images, clips or volumes along another order of the axes.

Paper: "Mamba-ND: Selective State Space Modeling for Multi-Dimensional Data", Li et al., ECCV 2024, arXiv 2402.05892.
Official code: github.com/jacklishufan/Mamba-ND (no licence is given). Written from the paper and the published weights.

A layer is one unidirectional Mamba; the next one reads backward, the two after that along the next order of the axes,
and so on in turn. Nothing is merged. The residual goes around the mixer alone: x = norm(x) + mixer(norm(x)).
"""

import re
from functools import partial
from math import isqrt, prod
from typing import Sequence

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..checkpoint import rename
from ..errors import InputError
from ..layers.blocks import Block, Stage, run
from ..layers.linear import trunc_normal_
from ..layers.mamba import MambaMixer, stack_routes
from ..layers.norm import LayerNorm
from ..layers.pos_embed import resample_volume
from ..layers.stems import PatchConv2d, PatchConv3d, PatchMerging, pad_for_patches
from .contract import HierarchicalBackbone, PlainBackbone, check_clips, check_images, register

__all__ = ["MambaND", "MambaND3D", "MambaNDBlock"]

ROUTES_2D = ("row", "-row", "col", "-col")  # of the layers, in turn
ROUTES_3D = ("thw", "-thw", "twh", "-twh", "wht", "-wht")


class MambaNDBlock(Block):
    """norm(x) + mixer(norm(x)): what comes in goes on normed, or not at all."""

    def forward(self, x: Tensor, *context, **options):
        return super().forward(self.norm1(x), *context, **options)

    def branch(self, x: Tensor, norm: nn.Module, layer: nn.Module, scale: nn.Module | None, *context, **options):
        return layer(x, *context, **options)


class IntervalStage(Stage):
    """Layers that all read the map that the stage begins with: x + the sum of mixer(norm(x)) of each."""

    def run_blocks(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = y + run(block, x, checkpointing=self.grad_checkpointing)
        return y


class IntervalLayer(Block):
    """mixer(norm(x)): a layer of an `IntervalStage`, without a residual of its own."""

    def forward(self, x: Tensor, *context, **options):
        return self.drop_path(self.branch(x, self.norm1, self.mixer, None, *context, **options))


def stack_mixers(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the mixers' parameters by our names and with an axis of routes, where they are the authors'."""
    for name, module in model.named_modules():
        if isinstance(module, MambaMixer) and f"{name}.conv1d.weight" in state:
            state |= {f"{name}.{key}": rows for key, rows in stack_routes(state, f"{name}.", module).items()}
    return state


class MambaND(HierarchicalBackbone):
    """Mamba-ND for images: layers in stages, with patch merging between them.

    Every layer is a `Stage` of its own here, so that each gives a map: the published stages are only one or two. With
    `update_interval`, an ablation of the paper, every interval is one.

    Args:
        img_size: size (or height and width) that the position embedding is built for; other sizes run too. Sides that
            `patch_size` does not divide are padded by zeros at the bottom and the right.
        patch_size: side of the square patches.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the map as it is. A norm follows, but for "".
        dims: channels of each stage, or of all.
        depths: layers of each stage.
        update_interval: so many layers in a row read the same map, and what each of them gives is added to it, not to
            a normed one; None for one layer after the other.
        d_state, d_conv, expand: of the Mamba mixer.
        drop_rate: dropout before the classifier and after the position embedding.
        drop_path_rate: stochastic depth, from 0 at the first layer to this at the last.

    Raises:
        InputError: dims and depths of different lengths, or an interval below 1 or with patch merging.
    """

    default_out_indices = (-3, -2, -1)  # as timm has it for plain models

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 8,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: int | Sequence[int] = 384,
        depths: Sequence[int] = (10, 14),
        update_interval: int | None = None,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        dims = [dims] * len(depths) if isinstance(dims, int) else list(dims)
        if len(dims) != len(depths):
            raise InputError(f"dims gives {len(dims)} stages, depths {len(depths)}")
        if update_interval is not None and (update_interval < 1 or len(depths) > 1):
            raise InputError("update_interval is at least 1, in a model of one stage")
        self.in_chans, self.update_interval = in_chans, update_interval
        places = [i for i, depth in enumerate(depths) for _ in range(depth)]  # the published stage of each layer
        own = places[:: update_interval or 1]  # and of each stage here
        self.dims = [dims[i] for i in own]
        self.strides = [patch_size * 2**i for i in own]
        self.num_features = dims[-1]
        self.first_stride = self.min_size = patch_size
        self.pooled_norm = partial(LayerNorm, eps=1e-6)
        self.patch_embed = PatchConv2d(in_chans, dims[0], patch_size, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, *self.grid_of(*to_2tuple(img_size)), dims[0]))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = calculate_drop_path_rates(drop_path_rate, len(places))

        def layer(i: int) -> Block:
            dim = dims[places[i]]
            mixer = MambaMixer(dim, ROUTES_2D[i % 4], d_state, d_conv, expand)
            return (IntervalLayer if update_interval else MambaNDBlock)(dim, mixer, drop_path=rates[i])

        def stage(i: int) -> Stage:
            if update_interval:
                return IntervalStage(None, map(layer, range(i, min(i + update_interval, len(places)))))
            merging = PatchMerging(self.dims[i - 1], self.dims[i]) if i and places[i] > places[i - 1] else None
            return Stage(merging, [layer(i)])

        self.stages = nn.ModuleList(map(stage, range(0, len(places), update_interval or 1)))
        self.norm = LayerNorm(self.num_features, eps=1e-6)
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    def init_head(self, num_classes: int, global_pool: str, drop_rate: float) -> None:
        super().init_head(num_classes, global_pool, drop_rate)
        for info, stride in zip(self.feature_info, self.strides):
            info["reduction"] = stride

    def init_weights(self) -> None:
        """The published initialisation; the mixers keep Mamba's own."""
        trunc_normal_(self.pos_embed, std=0.02)
        if self.num_classes:
            trunc_normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)

    @classmethod
    def timm_sizes(cls, height: int, width: int, args) -> dict:
        """The last map's size."""
        stride = args.get("patch_size", 8) * 2 ** (len(args.get("depths", (10, 14))) - 1)
        return {"pool_size": (height // stride, width // stride)}

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.first_stride), -(-width // self.first_stride)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        x = self.patch_embed(pad_for_patches(x, self.first_stride, self.first_stride)).permute(0, 2, 3, 1)
        grid = x.shape[1:3]
        return self.pos_drop(x + self.positions(grid)), grid, ()

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's; a merging belongs to the layer after it, channels of merged patches last."""
        merged = {
            key for key in state if ".down_sample_layer." in key
        }  # (channel, row, column) -> (column, row, channel)
        state = {
            k: v.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3) if k in merged else v for k, v in state.items()
        }
        every = self.update_interval or 1
        layers = (
            (r"^layers\.(\d+)\.down_sample_layer\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
            (r"^layers\.(\d+)\.", lambda match: "stages.{}.blocks.{}.".format(*divmod(int(match[1]), every))),
        )
        return stack_mixers(self, rename(state, (*layers, *OFFICIAL_NAMES)))


class MambaND3D(PlainBackbone):
    """Mamba-ND for clips (B, C, T, H, W), or volumes: equal layers over one grid of patches.

    Args:
        img_size: size (or height and width) that the position embedding is built for; other sizes run too.
        patch_size: side of the square patches.
        num_frames: frames that the position embedding is built for; others run too.
        tubelet_size: frames in a patch.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling of all tokens, or "" for the tokens as they are.
        embed_dim, depth: channels of the stream and layers.
        head_norm: a norm of what is pooled (the models of Kinetics-400).
        d_state, d_conv, expand: of the Mamba mixer.
        drop_rate: dropout before the classifier and after the position embedding.
        drop_path_rate: stochastic depth, from 0 at the first layer to this at the last.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_frames: int = 32,
        tubelet_size: int = 2,
        in_chans: int = 3,
        num_classes: int = 400,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 36,
        head_norm: bool = False,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if num_frames < tubelet_size or num_frames % tubelet_size:
            raise InputError(f"num_frames ({num_frames}) is a multiple of tubelet_size ({tubelet_size})")
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.stride = self.min_size = patch_size
        self.num_frames, self.tubelet_size = num_frames, tubelet_size
        self.pooled_norm = LayerNorm if head_norm else None
        patch = (tubelet_size, patch_size, patch_size)
        self.patch_embed = PatchConv3d(in_chans, embed_dim, patch, patch)
        grid = (num_frames // tubelet_size, *self.grid_of(*to_2tuple(img_size)))
        self.volume_pos_embed = nn.Parameter(torch.zeros(1, *grid, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            MambaNDBlock(embed_dim, MambaMixer(embed_dim, ROUTES_3D[i % 6], d_state, d_conv, expand), drop_path=rate)
            for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.norm = nn.Identity()
        self.init_head(num_classes, global_pool, drop_rate)
        trunc_normal_(self.volume_pos_embed, std=0.02)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return height // self.stride, width // self.stride

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple]:
        check_clips(x, self.in_chans, self.tubelet_size, self.min_size, type(self).__name__)
        x = self.patch_embed(x).permute(0, 2, 3, 4, 1)
        grid = x.shape[1:4]
        x = x + resample_volume(self.volume_pos_embed, grid)
        return self.pos_drop(x.flatten(1, 3)), grid, (grid,)

    # -- weights ----------------------------------------------------------------------------------------------------

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's.

        A file for images is inflated: its four orders are those over two of the axes, so its layers become four of each
        six, and the others stay as they are; kernels are spread over the tubelet, positions repeated in time.
        """
        kernel = state.get("patch_embed.projection.weight")
        if kernel is None or kernel.ndim == 5:
            return stack_mixers(self, rename(state, ((r"^layers\.", "blocks."), *OFFICIAL_NAMES, POSITIONS)))
        renumber = (r"^layers\.(\d+)\.", lambda match: f"blocks.{int(match[1]) // 4 * 6 + int(match[1]) % 4}.")
        state = stack_mixers(self, rename(state, (renumber, *OFFICIAL_NAMES, POSITIONS)))
        table = state["volume_pos_embed"]
        state["volume_pos_embed"] = table.unflatten(1, (1, isqrt(table.shape[1]), -1))
        state["patch_embed.weight"] = kernel[:, :, None].expand(self.patch_embed.weight.shape) / self.tubelet_size
        kept = {key: value for key, value in state.items() if not key.startswith(("norm.", "fc_norm."))}
        new = {k: v for k, v in self.state_dict().items() if re.match(r"blocks\.\d+\.|fc_norm\.", k) and k not in kept}
        return kept | new

    def fit_positions(self, state: dict[str, Tensor], img_size=None) -> dict[str, Tensor]:
        """The position table of a file, at this model's grid; one of tokens has as many frames, or as large ones."""
        table = state.get("volume_pos_embed")
        if table is None:
            return state
        grid = tuple(self.volume_pos_embed.shape[1:4])
        if table.ndim == 3:
            count, (frames, *size) = table.shape[1], grid
            if img_size is not None:
                size = self.grid_of(*to_2tuple(img_size))
            elif count % prod(size):
                size = 2 * [isqrt(count // frames)]
            if count % prod(size):
                raise InputError(
                    f"{count} positions in the file are no frames of {size[0]}x{size[1]}: give its img_size"
                )
            table = table.unflatten(1, (count // prod(size), *size))
        return state | {"volume_pos_embed": resample_volume(table, grid)}


OFFICIAL_NAMES = (
    (r"(blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"^patch_embed\.projection\.", "patch_embed."),
    (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."),
    (r"^(head\.fc|cls_head\.fc_cls|head\.1)\.", "head."),
    (r"^head\.0\.", "fc_norm."),
)
POSITIONS = (r"^pos_embed$", "volume_pos_embed")


# -- models -----------------------------------------------------------------------------------------------------------

HUB = "jacklishufan/Mamba-ND"
PUBLISHED = {
    "paper": "ECCV 2024, arXiv 2402.05892",
    "code": "https://github.com/jacklishufan/Mamba-ND",
    "licence": "none",
    "hub": HUB,
    "first_conv": "patch_embed",
}

register(
    MambaND,
    **PUBLISHED,
    data="ImageNet-1K",
    models={
        "mamband_small_patch8_224": {
            "params": 24.505,
            "weights": {"in1k": {"file": "in1k/mamba2d_s.pth", "metrics": {"top1": 81.7}}},
        },
        "mamband_base_patch8_224": {
            "args": {"dims": 768},
            "params": 94.426,
            "weights": {"in1k": {"file": "in1k/mamba2d_b.pth", "metrics": {"top1": 83.0}}},
        },
        # What the models of clips start from.
        "mamband_small_patch16_224": {
            "args": {"patch_size": 16, "depths": (24,)},
            "file": "video/mamba_2d_s_16_pretrained.pth",
        },
    },
)


def _clips(frames: int, tubelet_size: int, classes: int, **facts) -> dict:
    args = {"num_frames": frames, "tubelet_size": tubelet_size, "num_classes": classes, **facts.pop("args", {})}
    preprocess = {"interpolation": "bilinear", **facts.pop("preprocess", {})}
    return {"args": args, "inputs": ((3, frames, 224, 224),), "preprocess": preprocess, **facts}


HALF = {"mean": (0.45, 0.45, 0.45), "std": (0.225, 0.225, 0.225)}

# The files of HMDB-51 and UCF-101 have more classes than the sets.
register(
    MambaND3D,
    **PUBLISHED,
    models={
        "mamband_video_small_patch16_224": {
            "weights": {
                "hmdb51": _clips(
                    32, 2, 60, file="video/hmdb51/hmdb51.pth", data="HMDB-51", metrics={"top1": 60.9}, preprocess=HALF,
                    params=36.543,
                ),
                "ucf101": _clips(
                    32, 2, 400, file="video/ucf101/ucf101.pth", data="UCF-101", metrics={"top1": 89.6}, params=36.674,
                ),
                "k400_f16": _clips(
                    16, 1, 400, page=f"https://huggingface.co/{HUB}/tree/main/k400", data="Kinetics-400",
                    metrics={"top1": 81.9}, args={"head_norm": True}, params=36.380,
                    preprocess={"crop_pct": 1.0},
                ),
            },
        },
    },
)  # fmt: skip
