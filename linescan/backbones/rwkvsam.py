"""RWKV-SAM's image encoder: two stages of convolutions, then blocks of Vision-RWKV at stride 16.

Paper: "Mamba or RWKV: Exploring High-Quality and High-Efficiency Segment Anything Model", Yuan et al., 2024, arXiv
2406.19369. Official code: github.com/HarborYuan/ovsam (S-Lab License 1.0: not for commercial use). Its authors have
published no weights. Written from the paper and the facts of the code.

The maps of strides 4 and 8 carry the detail that a mask needs, the last one what the image shows; its cost is linear in
the tokens. `linescan.heads.prompting` has the whole segmentor.
"""

from functools import partial
from typing import Callable, Iterable, Sequence

import torch
from timm.layers import LayerNorm2d, LayerScale, calculate_drop_path_rates, to_2tuple
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..checkpoint import fit_shapes, rename
from ..errors import InputError
from ..layers.blocks import Block, Stage, run
from ..layers.linear import init_linear, linear
from ..layers.norm import LayerNorm
from ..layers.rwkv import ChannelMix, KernelMix, Place, QuadShift, RWKVBlock, SpatialMix, from_official
from ..layers.stems import ImageStem, MapConv2d, PatchConv2d, channels_first
from .contract import DenseForm, HierarchicalBackbone, register

__all__ = ["MBConv", "RWKVSAM", "RWKVStage"]

layer_norm = partial(LayerNorm, eps=1e-6)


# -- stages, over maps (B, H, W, C) -----------------------------------------------------------------------------------


@register_notrace_module
class InvertedBottleneck(nn.Module):
    """(B, H, W, dim) -> (B, H / stride, W / stride, out): a depthwise 3x3 convolution between two Linear layers.

    Args:
        dim, out_dim: channels in and out; between there are 4 * out_dim.
        stride: of the convolution.
    """

    def __init__(self, dim: int, out_dim: int, stride: int):
        super().__init__()
        hidden = 4 * out_dim
        self.expand = nn.Linear(dim, hidden)
        self.conv = MapConv2d(hidden, hidden, 3, stride, 1, groups=hidden)
        self.project = nn.Linear(hidden, out_dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(linear(self.expand, x))
        return linear(self.project, self.act(self.conv(x)))


@register_notrace_module
class Shortcut(nn.Module):
    """(B, H, W, dim) -> (B, H / 2, W / 2, out): the mean of 3x3 pixels, then a Linear if the width changes."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.expand = nn.Identity() if dim == out_dim else nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.expand, channels_first(self.pool, x))


class MBConv(Block):
    """shortcut(x) + drop_path(mixer(norm1(x))): a block of convolutions, which may halve the map.

    Args:
        dim, out_dim: channels in and out.
        stride: 1 (then both are equal) or 2.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, dim: int, out_dim: int, stride: int, drop_path: float = 0.0):
        super().__init__(dim, InvertedBottleneck(dim, out_dim, stride), norm_layer=layer_norm, drop_path=drop_path)
        self.shortcut = Shortcut(dim, out_dim) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.drop_path(self.branch(x, self.norm1, self.mixer, None))


class Halve(nn.Module):
    """(B, H, W, dim) -> (B, H / 2, W / 2, out): LayerNorm, then a 3x3 convolution of stride 2."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm = layer_norm(dim)
        self.proj = MapConv2d(dim, out_dim, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(x))


class RWKVStage(Stage):
    """A stage of RWKV's blocks, which read tokens; a LayerNorm ends it.

    Args:
        downsample, blocks: of `Stage`.
        dim: channels of the blocks.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module], dim: int):
        super().__init__(downsample, blocks)
        self.norm = layer_norm(dim)

    def forward(self, x: Tensor, positions: Callable | None = None) -> Tensor:
        """`positions`: grid -> a table (1, H, W, dim), added before the blocks."""
        x = self.downsample(x)
        if positions is not None:
            x = x + positions(x.shape[1:3])
        return self.norm(self.run_blocks(x))

    def run_blocks(self, x: Tensor) -> Tensor:
        grid = x.shape[1:3]
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = run(block, x, grid, checkpointing=self.grad_checkpointing)
        return x.unflatten(1, grid)


# -- model ------------------------------------------------------------------------------------------------------------


class RWKVSAM(HierarchicalBackbone):
    """RWKV-SAM's image encoder, with a classifier on the last map.

    Args:
        img_size: size (or height and width) that the position embedding is built for; every size runs.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the map as it is.
        dims: channels of the maps of strides 4, 8 and 16; the stem has the first.
        depths: blocks of these stages, two of convolutions and one of RWKV. A fourth number adds a stage of
            convolutions of stride 32, of twice the channels.
        mlp_ratio: hidden channels of RWKV's channel mixes as a multiple of the stage's.
        pos_embed: add a learned position embedding before RWKV's blocks.
        kernel: compute Bi-WKV as the published CUDA kernel does, not as the paper's equation says (`KernelMix`).
        init_values: initial value of the learned factor on the branches of RWKV's blocks.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.

    Raises:
        InputError: another number of stages.
    """

    default_out_indices = (0, 1, 2)
    dense = DenseForm(norms=None)
    min_size = 2  # the stem's stride

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 384),
        depths: Sequence[int] = (2, 4, 14),
        mlp_ratio: int = 2,
        pos_embed: bool = False,
        kernel: bool = False,
        init_values: float = 1e-2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if len(dims) != 3 or len(depths) not in (3, 4) or min(depths) < 1:
            raise InputError(f"dims are of 3 stages and depths of 3 or 4, all with blocks, got {dims} and {depths}")
        self.in_chans = in_chans
        self.dims = [*dims, 2 * dims[-1]][: len(depths)]
        self.num_features = self.dims[-1]
        self.patch_embed = ImageStem(
            PatchConv2d(in_chans, dims[0], 3, 2, 1),
            LayerNorm2d(dims[0], eps=1e-6),
            nn.GELU(),
            nn.Conv2d(dims[0], dims[0], 3, 1, 1),
        )
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        mixer = KernelMix if kernel else SpatialMix

        def convolutions(dim: int, out_dim: int, depth: int) -> Stage:
            return Stage(
                None, [MBConv(out_dim if i else dim, out_dim, 1 if i else 2, next(rates)) for i in range(depth)]
            )

        first, second, third = dims
        self.stages = nn.ModuleList([convolutions(first, first, depths[0]), convolutions(first, second, depths[1])])
        places = [Place(i, depths[2]) for i in range(depths[2])]
        blocks = [
            RWKVBlock(
                third,
                mixer(third, QuadShift(), place),
                ChannelMix(third, QuadShift(), place, ratio=mlp_ratio),
                norm_layer=layer_norm,
                scale_layer=partial(LayerScale, init_values=init_values),
                drop_path=next(rates),
            )
            for place in places
        ]
        self.stages.append(RWKVStage(Halve(second, third), blocks, third))
        if len(depths) == 4:
            self.stages.append(convolutions(third, 2 * third, depths[3]))
        if pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(1, *self.grid_of(*to_2tuple(img_size)), third))
        self.norm = nn.Identity()  # the third stage's is its own
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation: all layers but the classifier have torch's own, and RWKV's mixes theirs."""
        init_linear(self.head)

    @classmethod
    def timm_sizes(cls, height: int, width: int, args: dict) -> dict:
        stride = 2 ** (1 + len(args.get("depths", (2, 4, 14))))
        return {"pool_size": (height // stride, width // stride)}

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // 16), -(-width // 16)

    def run_unit(self, unit: nn.Module, x: Tensor, context: tuple) -> Tensor:
        if self.pos_embed is not None and isinstance(unit, RWKVStage):
            return unit(x, self.positions)
        return unit(x)

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's; 1x1 convolutions become matrices."""
        return fit_shapes(from_official(rename(state, OFFICIAL_NAMES)), self)


OFFICIAL_NAMES = (
    (r"^stem\.conv1\.", "patch_embed.0."),
    (r"^stem\.norm1\.", "patch_embed.1."),
    (r"^stem\.conv2\.", "patch_embed.3."),
    (r"^conv_stages\.([01])\.", r"stages.\1.blocks."),
    (r"^conv_final_pool\.", "stages.2.downsample."),
    (r"^layers\.(\d+)\.attn\.", r"stages.2.blocks.\1.att."),
    (r"^layers\.(\d+)\.mlp\.", r"stages.2.blocks.\1.ffn."),
    (r"^layers\.(\d+)\.layer_scale_([12])$", r"stages.2.blocks.\1.gamma\2"),
    (r"^layers\.", "stages.2.blocks."),
    (r"^final_norm\.", "stages.2.norm."),
    (r"^final_layer\.", "stages.3.blocks.0."),
    (r"\.pre_norm\.(?=weight|bias)", ".norm1."),
    (r"\.conv1_1x1\.", ".mixer.expand."),
    (r"\.conv2_kxk\.", ".mixer.conv."),
    (r"\.conv3_1x1\.", ".mixer.project."),
)


# -- models -----------------------------------------------------------------------------------------------------------

register(
    RWKVSAM,
    paper="preprint 2024, arXiv 2406.19369",
    code="https://github.com/HarborYuan/ovsam",
    licence="S-Lab-1.0",
    first_conv="patch_embed.0",
    models={
        "rwkvsam_tiny": {"args": {"dims": (32, 64, 192), "depths": (2, 4, 14)}},
        "rwkvsam_small": {"args": {"dims": (64, 128, 384), "depths": (2, 4, 14)}},
        "rwkvsam_base": {"args": {"dims": (128, 256, 768), "depths": (2, 4, 14)}},
        "rwkvsam_large": {"args": {"dims": (160, 320, 1024), "depths": (2, 4, 14)}},
    },
)
