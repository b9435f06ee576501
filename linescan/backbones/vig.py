"""ViG and ViG-H: plain and hierarchical backbones of bidirectional gated linear attention.

Paper: "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention", Liao et al., AAAI 2025,
arXiv 2405.18425. Official code: github.com/hustvl/ViG (MIT). Written from the paper and the published weights.

Pre-norm blocks of a `BiGLA` mixer and a gated MLP: over one grid with learned positions (ViG), or in four stages
without (ViG-H). `HierViGDense` is ViG-H as a backbone for segmentation and detection.
"""

from functools import partial
from typing import Callable, Sequence

import torch
from timm.layers import DropPath, GluMlp, LayerScale, Mlp, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..checkpoint import rename, strip_prefix
from ..layers.gla import BiGLA
from ..layers.norm import RMSNorm
from ..layers.pos_embed import resample_pos_embed
from ..layers.stems import ConvDownsample, ConvStem, PatchMerging
from .contract import HierarchicalBackbone, PlainBackbone, register

__all__ = ["ViG", "HierViG", "HierViGDense"]


def feed_forward(dim: int, gated: bool, multiple: int, act_layer: Callable) -> nn.Module:
    """A block's MLP: gated by SiLU with 8/3 of the channels, rounded up to a `multiple`, or plain with four times."""
    if not gated:
        return Mlp(dim, 4 * dim, act_layer=act_layer)
    hidden = -(-int(8 * dim / 3) // multiple) * multiple
    return GluMlp(dim, 2 * hidden, act_layer=nn.SiLU, bias=False, gate_last=False)


class ViGBlock(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)), over a map (B, H, W, dim)."""

    def __init__(
        self,
        dim: int,
        norm_layer: Callable,
        mlp: nn.Module,
        drop_path: float = 0.0,
        init_values: float | None = None,
        **mixer,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.mixer = BiGLA(dim, **mixer)
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = mlp
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class TokenBlock(ViGBlock):
    """A block over the tokens (B, H * W, dim) of a grid."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return super().forward(x.unflatten(1, grid)).flatten(1, 2)


# -- ViG ---------------------------------------------------------------------------------------------------------------


class ViG(PlainBackbone):
    """ViG: equal blocks over a stride-16 grid.

    Args:
        img_size: size (or height and width) that the position embedding is built for; other sizes run too.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: "avg", or "" for the tokens as they are.
        embed_dim: channels of the stream.
        depth: number of blocks.
        num_heads: heads of the mixer.
        gated_mlp: gated MLP of 8/3 the channels; otherwise a plain one of four times.
        conv_act, conv_bias, out_act: of the mixer (`BiGLA`); ViG-T has both activations, the larger models none.
        scan: "row", or "zigzag" to turn every second row of the grid around, for positions and convolutions as well.
        init_values: initial value of a learned factor on each branch; None for none.
        drop_rate: dropout before the classifier and after the position embedding.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    stride = 16
    min_size = 7  # the first kernel less its padding

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        gated_mlp: bool = True,
        conv_act: bool = False,
        conv_bias: bool = False,
        out_act: bool = False,
        scan: str = "row",
        init_values: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if scan not in ("row", "zigzag"):
            raise ValueError(f"scan is 'row' or 'zigzag', not {scan!r}")
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.scan = scan
        self.native_grid = self.grid_of(*((img_size, img_size) if isinstance(img_size, int) else img_size))

        self.patch_embed = ConvStem(in_chans, embed_dim, kernel_size=9, stride=8, act_layer=nn.SiLU)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.native_grid[0] * self.native_grid[1], embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        norm_layer = partial(RMSNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            TokenBlock(
                embed_dim,
                norm_layer,
                feed_forward(embed_dim, gated_mlp, 256, nn.SiLU),
                rate,
                init_values,
                num_heads=num_heads,
                conv_act=conv_act,
                conv_bias=conv_bias,
                out_act=out_act,
                scale=0.25,  # the published evaluation halves the mean of the directions once more
            )
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm = norm_layer(embed_dim)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": self.stride, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation: Linear layers N(0, 0.02) but for the mixers', which keep their own."""
        trunc_normal_(self.pos_embed, std=0.02)
        for layer in [*(m for block in self.blocks for m in block.mlp.modules()), self.head]:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @staticmethod
    def grid_of(height: int, width: int) -> tuple[int, int]:
        """Tokens down and across for an image of this size."""
        return tuple(((size - 7) // 8) // 2 + 1 for size in (height, width))

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        self.check_input(x, self.in_chans)
        x = self.patch_embed(x)
        grid = tuple(x.shape[1:3])
        x = self.turn_rows(x).flatten(1, 2) + resample_pos_embed(self.pos_embed, self.native_grid, grid)
        return self.pos_drop(x), grid, (grid,)

    def turn_rows(self, x: Tensor) -> Tensor:
        """Turns every second row of a map (B, H, W, C) around if the scan is a zigzag; its own inverse."""
        if self.scan == "row":
            return x
        odd = torch.arange(x.shape[1], device=x.device) % 2 == 1
        return torch.where(odd[:, None, None], x.flip(2), x)

    def patch_tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.turn_rows(x.unflatten(1, grid)).flatten(1, 2)

    def pool(self, x: Tensor) -> Tensor:
        """Mean over the tokens, or the tokens as they are without `global_pool`."""
        return x.mean(1) if self.global_pool else x

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to ours; a position embedding of another grid is resampled."""
        state = rename(strip_prefix(state, "backbone."), PLAIN_KEYS)
        positions = state.get("pos_embed")
        if positions is not None and positions.shape[1] != self.pos_embed.shape[1]:
            side = int(positions.shape[1] ** 0.5)
            state["pos_embed"] = resample_pos_embed(positions, (side, side), self.native_grid)
        return state


# -- ViG-H -------------------------------------------------------------------------------------------------------------


class ViGStage(nn.Module):
    """Downsampling, then blocks of one width."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[ViGBlock]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)


class HierViG(HierarchicalBackbone):
    """ViG-H: four stages at strides 4 to 32, no position embedding.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: "avg", or "" for the map as it is.
        dims: channels of the stages; an int doubles with every stage.
        depths: blocks of the stages.
        num_heads: heads of the mixers of the stages.
        gated_mlp: gated MLP of 8/3 the channels; otherwise a plain one of four times with GELU.
        downsample: "conv" (`ConvDownsample`), or "merge" (`PatchMerging`).
        conv_act, conv_bias, out_act: of the mixer (`BiGLA`).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    min_size = 4  # the stem's stride

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: int | Sequence[int] = 96,
        depths: Sequence[int] = (2, 2, 5, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        gated_mlp: bool = True,
        downsample: str = "conv",
        conv_act: bool = False,
        conv_bias: bool = False,
        out_act: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if not len(dims) == len(depths) == len(num_heads):
            raise ValueError(f"dims, depths and num_heads are for the same stages, got {dims}, {depths}, {num_heads}")
        if downsample not in ("conv", "merge"):
            raise ValueError(f"downsample is 'conv' or 'merge', not {downsample!r}")
        reduce = ConvDownsample if downsample == "conv" else PatchMerging
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.patch_embed = ConvStem(in_chans, dims[0])
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList(
            ViGStage(
                reduce(dims[i - 1], dim) if i else nn.Identity(),
                [
                    ViGBlock(
                        dim,
                        nn.LayerNorm,
                        feed_forward(dim, gated_mlp, 32, nn.GELU),
                        next(rates),
                        num_heads=num_heads[i],
                        conv_act=conv_act,
                        conv_bias=conv_bias,
                        out_act=out_act,
                    )
                    for _ in range(depths[i])
                ],
            )
            for i, dim in enumerate(dims)
        )
        self.norm = nn.LayerNorm(self.num_features)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation: every Linear truncated normal 0.02; the mixers' convolutions keep their own."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def pool(self, x: Tensor) -> Tensor:
        """Mean over the map, or the map as it is without `global_pool`."""
        return super().pool(x) if self.global_pool else x

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to ours: a stage's downsampling stands at the end of the stage before in the file."""
        return rename(strip_prefix(state, "backbone."), HIERARCHICAL_KEYS)


class HierViGDense(HierViG):
    """ViG-H as a backbone for segmentation and detection: images -> a list of normalised maps (B, C, H, W).

    Args:
        out_indices: stages whose maps are returned, each after a LayerNorm of its own.
        kwargs: of `HierViG`.
    """

    def __init__(self, out_indices: Sequence[int] = (0, 1, 2, 3), **kwargs):
        super().__init__(num_classes=0, **kwargs)
        self.norm = nn.Identity()
        stages = range(len(self.stages))
        if any(i not in stages for i in out_indices):
            raise ValueError(f"out_indices are stages {stages[0]} to {stages[-1]}, got {tuple(out_indices)}")
        self.out_indices = sorted(out_indices)
        for i in self.out_indices:
            self.add_module(f"outnorm{i}", nn.LayerNorm(self.feature_info[i]["num_chs"]))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.forward_intermediates(x, self.out_indices, output_fmt="NHWC", intermediates_only=True)
        return [
            self.get_submodule(f"outnorm{i}")(y).permute(0, 3, 1, 2).contiguous()
            for i, y in zip(self.out_indices, maps)
        ]

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `HierViG`; a classification file fills all but the output norms, which keep their values."""
        state = super().checkpoint_filter(state)
        if not any(key.startswith("outnorm") for key in state):
            state = {key: value for key, value in state.items() if not key.startswith(("norm.", "head."))}
            state |= {key: value for key, value in self.state_dict().items() if key.startswith("outnorm")}
        return state


# -- official keys -----------------------------------------------------------------------------------------------------

MIXER_KEYS = [
    (r"\.mixer\.in_proj\.0\.", ".mixer.conv."),
    (r"\.mixer\.qkv_proj\.", ".mixer.qkv."),
    (r"\.mixer\.gk_proj\.", ".mixer.forget."),
    (r"\.mixer\.g_proj\.", ".mixer.gate."),
    (r"\.mixer\.g_norm\.", ".mixer.norm."),
    (r"\.mixer\.l_norm\.", ".mixer.local_norm."),
    (r"\.mixer\.o_proj\.", ".mixer.proj."),
]
PLAIN_KEYS = [
    (r"^patch_embed\.proj\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.proj\.1\.", "patch_embed.norm1."),
    (r"^patch_embed\.proj\.3\.", "patch_embed.conv2."),
    (r"^patch_embed\.proj\.4\.", "patch_embed.norm2."),
    (r"\.attn_norm\.", ".norm1."),
    (r"\.mlp_norm\.", ".norm2."),
    (r"\.gate_proj\.", ".fc1."),
    (r"\.down_proj\.", ".fc2."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"\.attn\.", ".mixer."),
    *MIXER_KEYS,
]
HIERARCHICAL_KEYS = [
    (r"^patch_embed\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.2\.", "patch_embed.norm1."),
    (r"^patch_embed\.5\.", "patch_embed.conv2."),
    (r"^patch_embed\.7\.", "patch_embed.norm2."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.downsample\.3\.", ".downsample.norm."),
    (r"^layers\.", "stages."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"^classifier\.", ""),
    (r"\.op\.", ".mixer."),
    *MIXER_KEYS,
]


# -- models -----------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "paper": "AAAI 2025, arXiv 2405.18425",
    "code": "https://github.com/hustvl/ViG",
    "licence": "MIT",
    "data": "ImageNet-1K",
    "first_conv": "patch_embed.conv1",
    "page": "https://huggingface.co/hustvl/ViG/tree/main",  # the authors name this folder, not the six files in it
}

register(
    ViG,
    **PUBLISHED,
    models={
        "vig_tiny": {
            "args": {"embed_dim": 192, "num_heads": 3, "conv_act": True, "out_act": True},
            "params": 5.835,
            "gmacs": 1.11,
            "weights": {"in1k": {"metrics": {"top1": 77.2}}},
        },
        "vig_small": {
            "args": {"embed_dim": 384, "num_heads": 6},
            "params": 22.615,
            "gmacs": 4.37,
            "weights": {"in1k": {"metrics": {"top1": 81.7}}},
        },
        "vig_base": {
            "args": {"embed_dim": 768, "num_heads": 12},
            "params": 89.022,
            "gmacs": 17.32,
            "weights": {"in1k": {"metrics": {"top1": 82.6}}},
        },
    },
)

register(
    HierViG,
    **PUBLISHED,
    models={
        "vig_h_tiny": {
            "params": 28.601,
            "gmacs": 4.41,
            "weights": {"in1k": {"metrics": {"top1": 82.8}}},
        },
        "vig_h_small": {
            "args": {"depths": (2, 2, 17, 2)},
            "params": 50.052,
            "gmacs": 8.61,
            "weights": {"in1k": {"metrics": {"top1": 83.8}}},
        },
        "vig_h_base": {
            "args": {"dims": 128, "depths": (2, 2, 17, 2), "num_heads": (4, 8, 16, 32)},
            "params": 88.904,
            "gmacs": 15.36,
            "weights": {"in1k": {"metrics": {"top1": 84.2}}},
        },
    },
)
