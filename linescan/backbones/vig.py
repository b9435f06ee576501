"""ViG and ViG-H: plain and hierarchical backbones of bidirectional gated linear attention.

Paper: "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention", Liao et al., AAAI 2025,
arXiv 2405.18425. Official code: github.com/hustvl/ViG (MIT). Written from the paper and the published weights.

Pre-norm blocks of a `BiGLA` mixer and a gated MLP: over one grid with learned positions (ViG), or in four stages
without (ViG-H).
"""

from functools import partial
from typing import Callable, Sequence

import torch
from timm.layers import LayerScale, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..checkpoint import rename
from ..errors import InputError, known
from ..layers.blocks import Block, Stage
from ..layers.gla import BiGLA
from ..layers.linear import init_linear, trunc_normal_
from ..layers.mlp import GatedMlp, Mlp
from ..layers.norm import LayerNorm, RMSNorm
from ..layers.stems import ConvDownsample, ConvStem, PatchMerging
from ..layers.tracing import opaque
from .contract import HierarchicalBackbone, PlainBackbone, check_images, register

__all__ = ["HierViG", "ViG"]


def feed_forward(dim: int, gated: bool, multiple: int, act_layer: Callable) -> nn.Module:
    """A block's MLP: gated by SiLU with 8/3 of the channels, rounded up to a `multiple`, or plain with four times."""
    if not gated:
        return Mlp(dim, 4 * dim, act_layer)
    hidden = -(-int(8 * dim / 3) // multiple) * multiple
    return GatedMlp(dim, hidden, nn.SiLU, bias=False, gate_first=True)


@opaque
def turn_rows(x: Tensor) -> Tensor:
    """Turns every second row of a map (B, H, W, C) around; its own inverse."""
    odd = torch.arange(x.shape[1], device=x.device) % 2 == 1
    return torch.where(odd[:, None, None], x.flip(2), x)


# -- ViG ---------------------------------------------------------------------------------------------------------------


class ViG(PlainBackbone):
    """ViG: equal blocks over a stride-16 grid.

    Args:
        img_size: size (or height and width) that the position embedding is built for; other sizes run too.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the tokens as they are.
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
        known("scan", scan, ("row", "zigzag"))
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.scan = scan

        self.patch_embed = ConvStem(in_chans, embed_dim, kernel_size=9, stride=8, act_layer=nn.SiLU)
        self.init_positions(self.grid_of(*to_2tuple(img_size)))
        self.pos_drop = nn.Dropout(drop_rate)
        norm_layer = partial(RMSNorm, eps=1e-6)
        mixer = partial(BiGLA, embed_dim, num_heads, conv_act=conv_act, conv_bias=conv_bias, out_act=out_act)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                mixer(scale=0.25),  # the published evaluation halves the mean of the directions once more
                feed_forward(embed_dim, gated_mlp, 256, nn.SiLU),
                norm_layer,
                scale_layer=None if init_values is None else partial(LayerScale, init_values=init_values),
                drop_path=rate,
            )
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm = norm_layer(embed_dim)
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

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return tuple(((size - 7) // 8) // 2 + 1 for size in (height, width))

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        x = self.patch_embed(x)
        grid = x.shape[1:3]
        if self.scan == "zigzag":
            x = turn_rows(x)
        return self.pos_drop(x + self.positions(grid)), grid, ()

    def patch_tokens(self, x: Tensor) -> Tensor:
        return super().patch_tokens(turn_rows(x) if self.scan == "zigzag" else x)

    def to_stream(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        x = super().to_stream(x, shape)
        return turn_rows(x) if self.scan == "zigzag" else x

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's."""
        return rename(state, PLAIN_KEYS)


# -- ViG-H -------------------------------------------------------------------------------------------------------------


class HierViG(HierarchicalBackbone):
    """ViG-H: four stages at strides 4 to 32, no position embedding.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the map as it is.
        dims: channels of the stages; an int doubles with every stage.
        depths: blocks of the stages.
        num_heads: heads of the mixers of the stages.
        gated_mlp: gated MLP of 8/3 the channels; otherwise a plain one of four times with GELU.
        downsample: "conv" (`ConvDownsample`), or "merge" (`PatchMerging`).
        conv_act, conv_bias, out_act: of the mixer (`BiGLA`).
        img_size: accepted for timm; every size runs.
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
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if not len(dims) == len(depths) == len(num_heads):
            raise InputError(f"dims, depths and num_heads are for the same stages, got {dims}, {depths}, {num_heads}")
        reduce = {"conv": ConvDownsample, "merge": PatchMerging}[known("downsample", downsample, ("conv", "merge"))]
        self.in_chans = in_chans
        self.dims = dims
        self.num_features = dims[-1]
        self.patch_embed = ConvStem(in_chans, dims[0])
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        mixer = partial(BiGLA, conv_act=conv_act, conv_bias=conv_bias, out_act=out_act)
        self.stages = nn.ModuleList(
            Stage(
                reduce(dims[i - 1], dim) if i else None,
                [
                    Block(
                        dim,
                        mixer(dim, num_heads[i]),
                        feed_forward(dim, gated_mlp, 32, nn.GELU),
                        drop_path=next(rates),
                    )
                    for _ in range(depths[i])
                ],
            )
            for i, dim in enumerate(dims)
        )
        self.norm = LayerNorm(self.num_features)
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation: every Linear truncated normal 0.02; the mixers' convolutions keep their own."""
        self.apply(init_linear)

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's: a stage's downsampling stands at the end of the stage before in the file."""
        return rename(state, HIERARCHICAL_KEYS)


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
    (r"\.gamma([12])$", r".scale\1.gamma"),
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
