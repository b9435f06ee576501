"""SegMAN Encoder: neighbourhood attention that feeds a four-direction scan, in every block of a four-stage backbone.

Paper: "SegMAN: Omni-scale Context Modeling with State Space Models and Local Attention for Semantic Segmentation", Fu,
Lou and Yu, CVPR 2025, arXiv 2412.11890. Official code: github.com/yunxiangfu2001/SegMAN (Apache-2.0). Written from the
paper and the published weights.

The local half of a block is neighbourhood attention with rotary positions and a relative bias; the global half scans
its output along rows and columns, or, in the last stage, lets the same queries and keys attend to all of it. Any image
size will do in which the windows fit: 193 pixels a side for the published models. The decoder is in
`linescan.heads.segman`.
"""

import math
from functools import partial
from typing import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..checkpoint import rename
from ..errors import InputError
from ..layers.blocks import Block, Stage, TokenMixer
from ..layers.linear import linear, trunc_normal_
from ..layers.mlp import ConvMlp
from ..layers.neighborhood import neighborhood_attention
from ..layers.norm import LayerNorm
from ..layers.pos_embed import axial_rope, rotate_pairs
from ..layers.s6 import CROSS
from ..layers.ss2d import MapScan
from ..layers.stems import ChannelsFirst, ImageStem, channels_first, depthwise
from ..layers.tracing import opaque
from .contract import DenseForm, HierarchicalBackbone, register

__all__ = ["VARIANTS", "SegMANEncoder", "segman_block"]

layer_norm = partial(LayerNorm, eps=1e-6)


# -- blocks ----------------------------------------------------------------------------------------------------------


class LocalMixer(TokenMixer):
    """proj(context(o, q, k) + lepe): neighbourhood attention o, what a subclass makes of it, local positions of v.

    The block gives it rotary tables (H, W, d), cosines and sines.

    Args:
        dim: channels.
        num_heads: heads, of channels divisible by 4 each.
        window: side of the neighbourhoods.
        use_rpb: learn a bias for every relative position.
    """

    def __init__(self, dim: int, num_heads: int, window: int, use_rpb: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = depthwise(dim, 5)
        self.proj = nn.Linear(dim, dim)
        self.local_bias = nn.Parameter(torch.zeros(num_heads, 2 * window - 1, 2 * window - 1)) if use_rpb else None

    def context(self, o: Tensor, q: Tensor, k: Tensor, **options) -> tuple[Tensor, Tensor | None]:
        """Attention output, turned queries and keys, all (B, H, W, heads, d) -> (B, H, W, dim) and a state."""
        raise NotImplementedError

    def mix_tokens(self, x: Tensor, grid: tuple[int, int], rope: tuple[Tensor, Tensor], **options):
        heads = self.num_heads
        qk, v = linear(self.qkv, x).unflatten(1, grid).unflatten(-1, (3 * heads, -1)).split((2 * heads, heads), -2)
        lepe = self.lepe(v.flatten(-2))
        cos, sin = (table.unsqueeze(2) for table in rope)
        q, k = rotate_pairs(qk, cos, sin).to(v.dtype).chunk(2, -2)
        o = neighborhood_attention(q, k, v, self.window, bias=self.local_bias, scale=q.shape[-1] ** -0.5)
        o, state = self.context(o, q, k, **options)
        return linear(self.proj, o + lepe).flatten(1, 2), state


class ScanMixer(LocalMixer):
    """Stages 1 to 3: x = o + norm(scan(silu(BN(conv(o))))), o the output of neighbourhood attention.

    Args:
        dim, num_heads, window, use_rpb: as for `LocalMixer`.
        ssm_ratio: scanned channels as a multiple of `dim`.
        routes: of the scan.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        use_rpb: bool = True,
        ssm_ratio: float = 1.0,
        routes: str = CROSS,
    ):
        super().__init__(dim, num_heads, window, use_rpb)
        self.conv = depthwise(dim, 3)
        self.conv_norm = nn.BatchNorm2d(dim)
        self.ssm = MapScan(dim, ssm_ratio, routes)
        self.norm = layer_norm(dim)

    def context(self, o: Tensor, q: Tensor, k: Tensor, **options) -> tuple[Tensor, Tensor]:
        o = o.flatten(-2)
        y, state = self.ssm(F.silu(channels_first(self.conv_norm, self.conv(o))), **options)
        return o + self.norm(y), state


class AttentionMixer(LocalMixer):
    """Stage 4: the same queries and keys attend to the outputs of neighbourhood attention at all positions.

    Args:
        dim, num_heads, window, use_rpb: as for `LocalMixer`.
        tokens: positions in a map of the native size. The bias between any two of them is resized for other maps as
            the authors do it: the table of all pairs as if it were an image.
    """

    def __init__(self, dim: int, num_heads: int, window: int, use_rpb: bool = True, tokens: int = 49):
        super().__init__(dim, num_heads, window, use_rpb)
        self.global_bias = nn.Parameter(torch.zeros(num_heads, tokens, tokens)) if use_rpb else None

    def context(self, o: Tensor, q: Tensor, k: Tensor, **options) -> tuple[Tensor, None]:
        grid = o.shape[1:3]
        q, k, o = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, o))
        bias = self.global_bias
        if bias is not None:
            bias = resize_bias(bias, q.shape[2])[None].to(q.dtype)
            if not torch.is_grad_enabled():  # else a view of a parameter counts as learned, which no fast kernel takes
                bias = bias.detach()
        x = F.scaled_dot_product_attention(q, k, o, attn_mask=bias)
        # A copy, not a view: the strides that attention gives are not the same while a graph is exported.
        x = x.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return x.flatten(2).unflatten(1, grid), None


def resize_bias(bias: Tensor, tokens: int) -> Tensor:
    """A bias between all pairs (heads, L, L), resized as an image to (heads, tokens, tokens), at least in float32."""
    if bias.shape[-1] == tokens:
        return bias
    image = bias[None].to(torch.promote_types(bias.dtype, torch.float32))
    return F.interpolate(image, (tokens, tokens), mode="bicubic", align_corners=False)[0].to(bias.dtype)


def segman_block(
    dim: int, mixer: nn.Module, mlp_hidden: int, init_layer_scale: float = 0.0, drop_path: float = 0.0
) -> Block:
    """A block of the encoder and of the decoder: a 3x3 convolution is added before both branches.

    Args:
        dim: channels.
        mixer: the token mixer.
        mlp_hidden: hidden channels of the MLP.
        init_layer_scale: first value of a learned factor (beside an offset) per channel, on both branches; 0 for none.
        drop_path: rate of stochastic depth, for both branches.
    """
    block = Block(
        dim,
        mixer,
        ConvMlp(dim, mlp_hidden),
        layer_norm,
        scale_layer=partial(depthwise, kernel_size=1) if init_layer_scale else None,
        cpe_layer=partial(depthwise, kernel_size=3),
        drop_path=drop_path,
    )
    block.apply(init_weights)
    if init_layer_scale:
        nn.init.constant_(block.scale1.weight, init_layer_scale)
        nn.init.constant_(block.scale2.weight, init_layer_scale)
    return block


def init_weights(module: nn.Module) -> None:
    """The published initialisation: Linear layers and convolutions truncated normal; scans and norms keep their own."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# -- model -----------------------------------------------------------------------------------------------------------


class ConvStem(ImageStem):
    """Images (B, in_chans, H, W) -> (B, H / 4, W / 4, dim), sizes rounded up: four 3x3 convolutions, GELU between."""

    def __init__(self, in_chans: int, dim: int):
        widths, layers = (in_chans, dim // 2, dim // 2, dim, dim), []
        for source, target, stride in zip(widths, widths[1:], (2, 1, 2, 1)):
            layers += [nn.Conv2d(source, target, 3, stride, 1, bias=False), nn.BatchNorm2d(target), nn.GELU()]
        super().__init__(*layers[:-1])  # linear at the end


class SegMANStage(Stage):
    """A stage whose blocks all turn their queries and keys by the same rotary tables."""

    def context(self, x: Tensor) -> tuple:
        return None, pixel_rope(x, self.blocks[0].mixer.num_heads)


@register_notrace_module
class Projection(nn.Sequential):
    """Over a map (B, H, W, dim): Linear, BatchNorm, SiLU."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__(nn.Linear(dim, out_dim), nn.BatchNorm2d(out_dim), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return self[2](channels_first(self[1], linear(self[0], x)))


def smallest_side(windows: Sequence[int]) -> int:
    """Of an image in whose maps, at strides 4, 8, ..., the windows fit; sizes round up."""
    return max(4 * 2**i * (window - 1) + 1 for i, window in enumerate(windows))


class SegMANEncoder(HierarchicalBackbone):
    """SegMAN Encoder.

    Args:
        img_size: size (or height and width) that the last stage's bias is built for; other sizes resize it.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the map as it is.
        depths, dims, num_heads: blocks, channels and attention heads of each stage.
        windows: odd sides of the neighbourhoods in each stage.
        mlp_ratios: hidden channels of the MLPs as a multiple of the stage's.
        init_layer_scale: first value of the factors on the branches, 0 for none; one for all stages or one per stage.
        projection: channels between the last map and the classifier (Linear, BatchNorm, SiLU, before the pooling);
            0 for none, as in the files of the segmentation models.
        use_rpb: learn relative biases, and absolute ones in the last stage.
        ssm_ratio: scanned channels as a multiple of the stage's.
        routes: of the scans (`linescan.scans.routes`).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    dense = DenseForm(norms=None, trunk={"projection": 0})
    checkpoint_nesting = ("state_dict_ema",)  # the weights that the authors evaluate and start from

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: Sequence[int] = (32, 64, 144, 192),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        windows: Sequence[int] = (11, 9, 9, 7),
        mlp_ratios: Sequence[float] = (4, 4, 3, 3),
        init_layer_scale: float | Sequence[float] = 0.0,
        projection: int = 1024,
        use_rpb: bool = True,
        ssm_ratio: float = 1.0,
        routes: str = CROSS,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        count = len(depths)
        scales = init_layer_scale if isinstance(init_layer_scale, Sequence) else [init_layer_scale] * count
        for name, values in (
            ("dims", dims),
            ("num_heads", num_heads),
            ("windows", windows),
            ("mlp_ratios", mlp_ratios),
            ("init_layer_scale", scales),
        ):
            if len(values) != count:
                raise InputError(f"{name} gives {len(values)} stages, depths {count}")
        for dim, heads in zip(dims, num_heads):
            if dim % (4 * heads):
                raise InputError(f"{dim} channels do not divide into {heads} heads of a multiple of 4 channels")
        for window in windows:
            if window < 1 or window % 2 == 0:
                raise InputError(f"windows are odd, got {window}")
        self.in_chans = in_chans
        self.dims = list(dims)
        strides = [4 * 2**i for i in range(count)]
        self.min_size = smallest_side(windows)
        tokens = math.prod(math.ceil(n / strides[-1]) for n in to_2tuple(img_size))

        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.patch_embed = ConvStem(in_chans, dims[0])
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            if i < count - 1:
                mixer = partial(ScanMixer, ssm_ratio=ssm_ratio, routes=routes)
            else:
                mixer = partial(AttentionMixer, tokens=tokens)
            blocks = [
                segman_block(
                    dim,
                    mixer(dim, num_heads[i], windows[i], use_rpb),
                    int(mlp_ratios[i] * dim),
                    scales[i],
                    next(rates),
                )
                for _ in range(depths[i])
            ]
            downsample = None
            if i:
                downsample = ChannelsFirst(nn.Conv2d(dims[i - 1], dim, 3, 2, 1, bias=False), nn.BatchNorm2d(dim))
            self.stages.append(SegMANStage(downsample, blocks))
        self.num_features = projection or dims[-1]
        self.norm = Projection(dims[-1], projection) if projection else nn.Identity()
        self.init_head(num_classes, global_pool, drop_rate)
        for part in (self.patch_embed, *(stage.downsample for stage in self.stages), self.norm, self.head):
            part.apply(init_weights)

    # -- weights ----------------------------------------------------------------------------------------------------

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The official code's keys to linescan's, for files of the encoder and of the segmentation models."""
        if not any(key.startswith("layers.") for key in state):
            return state
        return from_official({k: v for k, v in state.items() if not k.endswith(".rope.angle")}, self)  # computed

    @classmethod
    def timm_sizes(cls, height: int, width: int, args: Mapping) -> dict:
        side = smallest_side(args["windows"])
        return {**super().timm_sizes(height, width, args), "min_input_size": (3, side, side)}

    def fit_positions(self, state: dict[str, Tensor], img_size=None) -> dict[str, Tensor]:
        """As the authors do it: the last stage's bias for another size is resized as an image."""
        own = {k: len(v[0]) for k, v in self.state_dict().items() if k.endswith(".global_bias") and k in state}
        return state | {key: resize_bias(state[key], tokens) for key, tokens in own.items()}


@opaque
def pixel_rope(x: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Rotary tables (H, W, C / num_heads) of a map (B, H, W, C) by raw pixel indices; at least float32.

    The frequencies fall geometrically from 1 to 1 / 10000, both included.
    """
    head_dim = x.shape[-1] // num_heads
    dtype = torch.promote_types(x.dtype, torch.float32)
    freqs = 1.0 / 10000 ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float32, device=x.device)
    rows, columns = (torch.arange(n, dtype=dtype, device=x.device) for n in x.shape[1:3])
    return axial_rope(rows, columns, freqs.to(dtype))


OFFICIAL_NAMES = (
    (r"^layers\.(\d+)\.(?=\d)", lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample."),
    (r"^layers\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}."),
    (r"\.token_mixer\.", ".mixer."),
    (r"\.dwconv\.0\.", ".conv."),
    (r"\.dwconv\.1\.", ".conv_norm."),
    (r"\.rpb\.0$", ".local_bias"),
    (r"\.rpb\.1$", ".global_bias"),
    (r"\.layer_scale([12])\.", r".scale\1."),
    (r"\.ssm\.proj\.", ".ssm.in_proj."),
    (r"\.ssm\.yproj\.", ".ssm.out_proj."),
    (r"\.x_proj_weight$", ".x_proj"),
    (r"\.dt_projs_weight$", ".dt_proj"),
    (r"\.dt_projs_bias$", ".dt_bias"),
    (r"\.A_logs$", ".A_log"),
    (r"\.Ds$", ".D"),
    (r"^classifier\.([01])\.", r"norm.\1."),
    (r"^classifier\.4\.", "head."),
)


def from_official(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The official keys to linescan's; scans' tensors get an axis of routes, 1x1 convolutions become matrices."""
    own = model.state_dict()
    state = rename(state, OFFICIAL_NAMES)
    for key in state.keys() & own.keys():
        value, shape = state[key], own[key].shape
        stacked = key.rpartition(".")[2] in ("x_proj", "A_log", "D")  # routes are the slowest axis
        matrix = value.ndim == 4 and len(shape) == 2
        if (stacked or matrix) and value.numel() == shape.numel():
            state[key] = value.reshape(shape)
    return state


# -- models -----------------------------------------------------------------------------------------------------------

VARIANTS = {
    "segman_tiny": {
        "depths": (2, 2, 4, 2), "dims": (32, 64, 144, 192), "num_heads": (1, 2, 4, 8), "windows": (11, 9, 9, 7),
        "mlp_ratios": (4, 4, 3, 3),
    },
    "segman_small": {
        "depths": (2, 2, 10, 4), "dims": (64, 144, 288, 512), "num_heads": (2, 4, 8, 16), "windows": (11, 9, 7, 7),
        "mlp_ratios": (4, 4, 3.4, 3.4),
    },
    "segman_base": {
        "depths": (4, 4, 18, 4), "dims": (96, 160, 364, 560), "num_heads": (4, 8, 13, 20), "windows": (11, 9, 7, 7),
        "mlp_ratios": (4, 4, 3, 3), "init_layer_scale": 1e-6,
    },
    "segman_large": {
        "depths": (4, 4, 28, 4), "dims": (96, 192, 432, 640), "num_heads": (4, 8, 12, 20), "windows": (11, 9, 7, 7),
        "mlp_ratios": (4, 4, 3, 3), "init_layer_scale": 1e-6,
    },
}  # fmt: skip

PUBLISHED = {
    "paper": "CVPR 2025, arXiv 2412.11890",
    "code": "https://github.com/yunxiangfu2001/SegMAN",
    "licence": "Apache-2.0",
}

register(
    SegMANEncoder,
    **PUBLISHED,
    data="ImageNet-1K",
    page="https://drive.google.com/drive/folders/1QYU7nhpe0ddH7bPxI7VH4drc__07uEHs",
    first_conv="patch_embed.0",
    models={
        "segman_tiny": {
            "args": VARIANTS["segman_tiny"],
            "preprocess": {"crop_pct": 0.9},
            "params": 3.506,
            "weights": {"in1k": {"metrics": {"top1": 76.2}}},
        },
        "segman_small": {
            "args": VARIANTS["segman_small"],
            "preprocess": {"crop_pct": 0.9},
            "params": 25.508,
            "weights": {"in1k": {"metrics": {"top1": 84.0}}},
        },
        "segman_base": {
            "args": VARIANTS["segman_base"],
            "preprocess": {"crop_pct": 0.95},
            "params": 45.021,
            "weights": {"in1k": {"metrics": {"top1": 85.1}}},
        },
        "segman_large": {
            "args": VARIANTS["segman_large"],
            "preprocess": {"crop_pct": 0.95},
            "params": 80.985,
            "weights": {"in1k": {"metrics": {"top1": 85.5}}},
        },
    },
)
