"""MambaVision: two stages of convolutions, then two of windows whose blocks scan first and attend at the end.

Paper: "MambaVision: A Hybrid Mamba-Transformer Vision Backbone", Hatamizadeh and Kautz, CVPR 2025, arXiv 2407.08083.
Official code: github.com/NVlabs/MambaVision (NVIDIA Source Code License-NC: not for commercial use, nor are the
weights). Written from the paper and the published weights.

There is no position embedding, so any image size will do: maps are padded to whole windows. At 224 pixels a window is
the whole map of its stage.
"""

import math
from typing import Iterable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, calculate_drop_path_rates
from torch import Tensor, nn

from ..checkpoint import fit_shapes, rename
from ..errors import InputError
from ..layers.attention import SelfAttention
from ..layers.blocks import Block, Stage, TokenMixer
from ..layers.linear import init_linear, linear, trunc_normal_
from ..layers.mlp import Mlp
from ..layers.s6 import S6Scan
from ..layers.stems import ImageStem, MapConv2d, PatchConv2d, batch_norm, up_to_multiple
from ..layers.tracing import opaque
from .contract import HierarchicalBackbone, register

__all__ = ["ConvMixer", "MambaVision", "MambaVisionMixer", "WindowedStage"]


# -- mixers ----------------------------------------------------------------------------------------------------------


class ConvMixer(TokenMixer):
    """Of the first two stages: norm2(conv2(gelu(norm1(conv1(x))))), 3x3 convolutions, GELU by tanh.

    Args:
        dim: channels in and out.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = MapConv2d(dim, dim, 3, padding=1)
        self.norm1 = batch_norm(dim)
        self.act = nn.GELU("tanh")
        self.conv2 = MapConv2d(dim, dim, 3, padding=1)
        self.norm2 = batch_norm(dim)

    def mix_tokens(self, x: Tensor, grid: tuple[int, int], **options) -> tuple[Tensor, None]:
        x = self.act(self.norm1(self.conv1(x.unflatten(1, grid))))
        return self.norm2(self.conv2(x)).flatten(1, 2), None


class MambaVisionMixer(S6Scan):
    """out_proj([S6(u), z]), where [u, z] = silu(conv(in_proj(x))): half of the channels is scanned, forward alone.

    The depthwise convolution sees the token before, itself and the one after. The other half is joined, not multiplied.
    As published, the step's bias counts twice: softplus(dt_proj dt + 2 dt_bias).

    Args:
        dim: channels in and out.
        d_state: N, state size per channel.
    """

    def __init__(self, dim: int, d_state: int = 8):
        if dim % 2:
            raise InputError(f"half of the channels is scanned: {dim} is odd")
        super().__init__(dim // 2, "row", d_state, dt_rank=math.ceil(dim / 16))
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv = MapConv2d(dim, dim, (1, 3), padding=(0, 1), groups=dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def init_weights(self) -> None:
        """The published initialisation: projections as any Linear, so that all steps start near softplus(0)."""
        trunc_normal_(self.x_proj, std=0.02)
        trunc_normal_(self.dt_proj, std=0.02)
        nn.init.zeros_(self.dt_bias)

    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D", "dt_bias"}

    def added_to_dt(self) -> Tensor:
        return 2 * self.dt_bias

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], **options) -> tuple[Tensor, Tensor]:
        u, z = F.silu(self.conv(linear(self.in_proj, x)[:, None])).chunk(2, -1)  # tokens stand in one line
        y, state = self.scan(u, *self.project(u), grid=grid, **options)
        return linear(self.out_proj, torch.cat([y, z[:, 0]], -1)), state


# -- windows ---------------------------------------------------------------------------------------------------------


@opaque
def to_windows(x: Tensor, window: int) -> Tensor:
    """A map (B, H, W, C) -> the windows that tile it as tokens (B * windows, window^2, C), all row-major.

    Zeros fill windows that reach over the bottom or the right.
    """
    bottom, right = (up_to_multiple(n, window) for n in x.shape[1:3])
    x = F.pad(x, (0, 0, 0, right, 0, bottom))
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)


@opaque
def from_windows(x: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
    """Undoes `to_windows`: (B * windows, window^2, C) -> (B, H, W, C), of the grid (H, W)."""
    rows, columns = (-(-side // window) for side in grid)
    x = x.unflatten(0, (-1, rows, columns)).unflatten(3, (window, window)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]]


class WindowedStage(Stage):
    """A stage whose blocks read windows, as tokens. What pads a map takes part in them like any token.

    Args:
        downsample, blocks: of `Stage`.
        window: side of the windows, in tokens.
    """

    def __init__(self, downsample: nn.Module | None, blocks: Iterable[nn.Module], window: int):
        super().__init__(downsample, blocks)
        self.window = window

    def run_blocks(self, x: Tensor) -> Tensor:
        return from_windows(super().run_blocks(to_windows(x, self.window)), self.window, x.shape[1:3])


# -- model -----------------------------------------------------------------------------------------------------------


class MambaVision(HierarchicalBackbone):
    """MambaVision.

    Args:
        img_size: accepted for timm; every size runs.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the map as it is.
        stem_dim: channels between the stem's two convolutions.
        dims: channels of the first stage, doubled from stage to stage; or of every stage.
        depths: blocks of the stages. Those of the first two are convolutions; of the others the first half, rounded
            up, scan, and the rest attend.
        num_heads: of the attention in each stage.
        windows: sides of the windows in each stage, in tokens; the first two are read by nothing. For large images the
            authors enlarge them until they hold a whole map.
        mlp_ratio: hidden channels of the MLPs as a multiple of the stage's.
        init_layer_scale: initial value of a learned factor on the branches of blocks in windows; None for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last; in windows of each by itself.
    """

    min_size = 4  # the stem's stride
    conv_stages = 2

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 64,
        dims: int | Sequence[int] = 128,
        depths: Sequence[int] = (3, 3, 10, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        windows: Sequence[int] = (8, 8, 14, 7),
        mlp_ratio: float = 4.0,
        init_layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        for name, values in (("dims", self.dims), ("num_heads", num_heads), ("windows", windows)):
            if len(values) != len(depths):
                raise InputError(f"{name} gives {len(values)} stages, depths {len(depths)}")
        self.num_features = self.dims[-1]
        self.patch_embed = ImageStem(
            PatchConv2d(in_chans, stem_dim, 3, 2, 1, bias=False),
            nn.BatchNorm2d(stem_dim, eps=1e-4),
            nn.ReLU(),
            nn.Conv2d(stem_dim, self.dims[0], 3, 2, 1, bias=False),
            nn.BatchNorm2d(self.dims[0], eps=1e-4),
            nn.ReLU(),
        )
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(self.dims, depths)):
            downsample = MapConv2d(self.dims[i - 1], dim, 3, 2, 1, bias=False) if i else None
            if i < self.conv_stages:
                blocks = [
                    Block(dim, ConvMixer(dim), norm_layer=nn.Identity, drop_path=next(rates)) for _ in range(depth)
                ]
                self.stages.append(Stage(downsample, blocks))
                continue
            blocks = [
                Block(
                    dim,
                    MambaVisionMixer(dim) if j < (depth + 1) // 2 else SelfAttention(dim, num_heads[i]),
                    Mlp(dim, int(mlp_ratio * dim)),
                    scale_layer=None if init_layer_scale is None else lambda dim: LayerScale(dim, init_layer_scale),
                    drop_path=next(rates),
                )
                for j in range(depth)
            ]
            self.stages.append(WindowedStage(downsample, blocks, windows[i]))
        self.norm = batch_norm(self.num_features)
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation: Linear layers truncated normal, convolutions torch's own."""
        self.apply(init_linear)
        for module in self.modules():
            if isinstance(module, MambaVisionMixer):
                module.init_weights()

    # -- weights ----------------------------------------------------------------------------------------------------

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's: the convolutions of a mixer's halves become one."""
        if not any(key.startswith("levels.") for key in state):
            return state
        state = dict(state)
        for key in [key for key in state if key.endswith(".conv1d_x.weight")]:
            halves = state.pop(key), state.pop(key.replace("conv1d_x", "conv1d_z"))
            state[key.replace("conv1d_x", "conv")] = torch.cat(halves)
        return fit_shapes(rename(state, OFFICIAL_NAMES), self)


OFFICIAL_NAMES = (
    (r"^patch_embed\.conv_down\.", "patch_embed."),
    (r"^levels\.(\d+)\.downsample\.reduction\.0\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^levels\.([01])\.blocks\.(\d+)\.norm(\d)\.", r"stages.\1.blocks.\2.mixer.norm\3.0."),
    (r"^levels\.([01])\.blocks\.(\d+)\.conv", r"stages.\1.blocks.\2.mixer.conv"),
    (r"^levels\.", "stages."),
    (r"\.mixer\.x_proj\.weight$", ".mixer.x_proj"),
    (r"\.mixer\.dt_proj\.weight$", ".mixer.dt_proj"),
    (r"\.mixer\.dt_proj\.bias$", ".mixer.dt_bias"),
    (r"\.gamma_([12])$", r".scale\1.gamma"),
    (r"^norm\.", "norm.0."),
)


# -- models -----------------------------------------------------------------------------------------------------------

FINE_TUNED = "ImageNet-21K, then ImageNet-1K"
LARGE = {"stem_dim": 64, "dims": 196, "num_heads": (4, 8, 16, 32), "init_layer_scale": 1e-5}


def on_hub(name: str, file: str, top1: float, **facts) -> dict:
    return {"hub": f"nvidia/MambaVision-{name}", "file": f"{file}.pth.tar", "metrics": {"top1": top1}, **facts}


register(
    MambaVision,
    paper="CVPR 2025, arXiv 2407.08083",
    code="https://github.com/NVlabs/MambaVision",
    licence="NVIDIA-NC",
    data="ImageNet-1K",
    first_conv="patch_embed.0",
    preprocess={"crop_pct": 1.0},
    models={
        "mambavision_tiny": {
            "args": {"stem_dim": 32, "dims": 80, "depths": (1, 3, 8, 4)},
            "params": 31.794,
            "gmacs": 4.4,
            "weights": {"in1k": on_hub("T-1K", "mambavision_tiny_1k", 82.3)},
        },
        "mambavision_tiny2": {
            "args": {"stem_dim": 32, "dims": 80, "depths": (1, 3, 11, 4)},
            "preprocess": {"crop_pct": 0.98},
            "params": 35.104,
            "gmacs": 5.1,
            "weights": {"in1k": on_hub("T2-1K", "mambavision_tiny2_1k", 82.7)},
        },
        "mambavision_small": {
            "args": {"dims": 96, "depths": (3, 3, 7, 5)},
            "preprocess": {"crop_pct": 0.93},
            "params": 50.141,
            "gmacs": 7.5,
            "weights": {"in1k": on_hub("S-1K", "mambavision_small_1k", 83.3)},
        },
        "mambavision_base": {
            "args": {"dims": 128, "depths": (3, 3, 10, 5), "init_layer_scale": 1e-5},
            "params": 97.685,
            "gmacs": 15.0,
            "weights": {
                "in1k": on_hub("B-1K", "mambavision_base_1k", 84.2),
                "in21k_ft_in1k": on_hub("B-21K", "mambavision_base_21k", 84.9, data=FINE_TUNED),
            },
        },
        "mambavision_large": {
            "args": LARGE | {"depths": (3, 3, 10, 5)},
            "params": 227.961,
            "gmacs": 34.9,
            "weights": {
                "in1k": on_hub("L-1K", "mambavision_large_1k", 85.0),
                "in21k_ft_in1k": on_hub("L-21K", "mambavision_large_21k", 86.1, data=FINE_TUNED),
            },
        },
        "mambavision_large2": {
            "args": LARGE | {"depths": (3, 3, 12, 5)},
            "params": 241.555,
            "gmacs": 37.5,
            "weights": {
                "in1k": on_hub("L2-1K", "mambavision_large2_1k", 85.3),
                "in21k_ft_in1k_512": on_hub(
                    "L2-512-21K", "mambavision_L2_21k_240m_512", 87.3, data=FINE_TUNED,
                    args={"windows": (8, 8, 32, 16)}, inputs=((3, 512, 512),), gmacs=196.3,
                    preprocess={"crop_pct": 0.93, "crop_mode": "squash"},
                ),
            },
        },
        "mambavision_large3": {
            "args": LARGE | {"dims": 256, "depths": (3, 3, 20, 10)},
            "params": 739.570,
            "data": FINE_TUNED,
            "weights": {
                "in21k_ft_in1k_256": on_hub(
                    "L3-256-21K", "mambavision_L3_21k_740m_256", 87.3, args={"windows": (8, 8, 16, 8)},
                    inputs=((3, 256, 256),), gmacs=122.3,
                ),
                "in21k_ft_in1k_512": on_hub(
                    "L3-512-21K", "mambavision_L3_21k_740m_512", 88.1, args={"windows": (8, 8, 32, 16)},
                    inputs=((3, 512, 512),), gmacs=489.1, preprocess={"crop_pct": 0.93, "crop_mode": "squash"},
                ),
            },
        },
    },
)  # fmt: skip
