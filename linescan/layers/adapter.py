"""ViT-Adapter: a pyramid of maps at strides 4 to 32 from a plain backbone, by exchange with a convolutional prior.

Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023, arXiv 2205.08534. The exchange is
multi-scale deformable attention: Zhu et al., "Deformable DETR", ICLR 2021, arXiv 2010.04159; here in plain torch.

`ViTAdapter` knows nothing of the backbone but its width and that its tokens are those of a stride-16 grid. Parameter
names below it are the published ones.
"""

import math
from operator import attrgetter
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..errors import InputError, known
from .linear import linear, trunc_normal_
from .norm import LayerNorm

__all__ = ["MSDeformableAttention", "SpatialPrior", "ViTAdapter", "deformable_attention", "reference_points"]

Grids = Sequence[tuple[int, int]]


def reference_points(grids: Grids, device: torch.device | str | None = None) -> Tensor:
    """Centres of the cells of all grids, one after the other, as (x, y) in [0, 1]: (sum of H * W, 2), float32."""
    points = []
    for height, width in grids:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        points.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1))
    return torch.cat(points)


def deformable_attention(value: Tensor, grids: Grids, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of values read at given places of several maps: bilinear, zero outside.

    Zhu et al., 2021, equation 3.

    Args:
        value: tokens of all maps, one map after the other (B, sum of H * W, heads, d).
        grids: (H, W) of the maps.
        locations: (B, Q, heads, maps, points, 2), (x, y) with the map from 0 to 1.
        weights: (B, Q, heads, maps, points).

    Returns:
        (B, Q, heads * d).
    """
    batch, queries, heads = locations.shape[:3]
    places = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, Q, maps, points, 2) in [-1, 1]
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([height * width for height, width in grids], -1)
    total = 0
    for i, (tokens, grid) in enumerate(zip(maps, grids)):
        read = F.grid_sample(tokens.unflatten(-1, grid), places[:, :, i], align_corners=False)
        total = total + (read * weights[:, :, :, i]).sum(-1)  # (B * heads, d, Q)
    return total.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)


class MSDeformableAttention(nn.Module):
    """Multi-scale deformable attention: each query reads few points near its own place from every map.

    Args:
        dim: channels of queries and values.
        num_heads: heads.
        n_levels: maps read.
        n_points: points that a head reads of a map.
        ratio: inner channels as a multiple of `dim`.

    Raises:
        ValueError: `num_heads` does not divide the inner channels.
    """

    def __init__(self, dim: int, num_heads: int, n_levels: int, n_points: int = 4, ratio: float = 1.0):
        super().__init__()
        inner = int(dim * ratio)
        if inner % num_heads:
            raise InputError(f"num_heads has to divide {inner} inner channels, got {num_heads}")
        self.points = num_heads, n_levels, n_points
        self.sampling_offsets = nn.Linear(dim, 2 * math.prod(self.points))
        self.attention_weights = nn.Linear(dim, math.prod(self.points))
        self.value_proj = nn.Linear(dim, inner)
        self.output_proj = nn.Linear(inner, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each head has its own direction, each point a longer distance, all the same weight."""
        heads, levels, points = self.points
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.attention_weights.bias)
        angle = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = direction[:, None, None] * torch.arange(1, points + 1)[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(steps.expand(heads, levels, points, 2).flatten())

    def forward(self, query: Tensor, query_grids: Grids, feat: Tensor, feat_grids: Grids) -> Tensor:
        """Queries (B, Q, dim) at the cells of their grids, tokens to read (B, F, dim) at theirs -> (B, Q, dim)."""
        offsets = linear(self.sampling_offsets, query).unflatten(-1, (*self.points, 2))
        weights = linear(self.attention_weights, query).unflatten(-1, (self.points[0], -1)).softmax(-1)
        # Places are kept in at least float32: half precision cannot tell neighbouring pixels apart.
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        sizes = offsets.new_tensor([(width, height) for height, width in feat_grids])
        places = reference_points(query_grids, query.device).to(offsets.dtype)[:, None, None, None]
        value = linear(self.value_proj, feat).unflatten(-1, (self.points[0], -1))
        y = deformable_attention(
            value.to(offsets.dtype),
            feat_grids,
            places + offsets / sizes[:, None],
            weights.unflatten(-1, self.points[1:]),
        )
        return linear(self.output_proj, y.to(value.dtype))


class Injector(nn.Module):
    """Tokens of the backbone read the pyramid: x + gamma * attention(norm(x), norm(c)); gamma starts at zero."""

    def __init__(self, dim: int, **attention):
        super().__init__()
        self.query_norm = LayerNorm(dim, eps=1e-6)
        self.feat_norm = LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformableAttention(dim, n_levels=3, **attention)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, grid: tuple[int, int], c: Tensor, grids: Grids) -> Tensor:
        return x + self.gamma * self.attn(self.query_norm(x), [grid], self.feat_norm(c), grids)


class PyramidConv(nn.Module):
    """One 3x3 depthwise convolution over each map of a pyramid given as tokens."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        maps = x.mT.split([height * width for height, width in grids], -1)
        return torch.cat([self.dwconv(y.unflatten(-1, grid)).flatten(2) for y, grid in zip(maps, grids)], -1).mT


class PyramidMlp(nn.Module):
    """Linear, `PyramidConv`, GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = PyramidConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        return linear(self.fc2, self.act(self.dwconv(linear(self.fc1, x), grids)))


class Extractor(nn.Module):
    """The pyramid reads the tokens of the backbone: c + attention(norm(c), norm(x)), then c + ffn(norm(c))."""

    def __init__(self, dim: int, ffn_ratio: float, drop_path: float, **attention):
        super().__init__()
        self.query_norm = LayerNorm(dim, eps=1e-6)
        self.feat_norm = LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformableAttention(dim, n_levels=1, **attention)
        self.ffn_norm = LayerNorm(dim, eps=1e-6)
        self.ffn = PyramidMlp(dim, int(dim * ffn_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, c: Tensor, grids: Grids, x: Tensor, grid: tuple[int, int]) -> Tensor:
        c = c + self.attn(self.query_norm(c), grids, self.feat_norm(x), [grid])
        return c + self.drop_path(self.ffn(self.ffn_norm(c), grids))


class Interaction(nn.Module):
    """An injector before a part of the backbone and one or more extractors after it."""

    def __init__(self, dim: int, extra: int, ffn_ratio: float, drop_path: float, **attention):
        super().__init__()
        self.injector = Injector(dim, **attention)
        self.extractor = Extractor(dim, ffn_ratio, drop_path, **attention)
        self.extra_extractors = nn.ModuleList(Extractor(dim, ffn_ratio, drop_path, **attention) for _ in range(extra))

    def forward(
        self, x: Tensor, grid: tuple[int, int], c: Tensor, grids: Grids, blocks: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        x = blocks(self.injector(x, grid, c, grids))
        for extractor in (self.extractor, *self.extra_extractors):
            c = extractor(c, grids, x, grid)
        return x, c


def _conv(in_chans: int, out_chans: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_chans),
        nn.ReLU(inplace=True),
    ]


class SpatialPrior(nn.Module):
    """Images -> four maps (B, dim, ., .) at strides 4, 8, 16, 32, by strided convolutions.

    Args:
        in_chans: input channels.
        width: channels of the stem; twice and four times as many follow.
        dim: channels of the maps.
    """

    def __init__(self, in_chans: int, width: int, dim: int):
        super().__init__()
        self.stem = nn.Sequential(
            *_conv(in_chans, width, 2), *_conv(width, width, 1), *_conv(width, width, 1), nn.MaxPool2d(3, 2, padding=1)
        )
        self.conv2 = nn.Sequential(*_conv(width, 2 * width, 2))
        self.conv3 = nn.Sequential(*_conv(2 * width, 4 * width, 2))
        self.conv4 = nn.Sequential(*_conv(4 * width, 4 * width, 2))
        self.fc1 = nn.Conv2d(width, dim, 1)
        self.fc2 = nn.Conv2d(2 * width, dim, 1)
        self.fc3 = nn.Conv2d(4 * width, dim, 1)
        self.fc4 = nn.Conv2d(4 * width, dim, 1)

    def forward(self, x: Tensor) -> list[Tensor | None]:
        maps = []
        for conv, fc in ((self.stem, self.fc1), (self.conv2, self.fc2), (self.conv3, self.fc3), (self.conv4, self.fc4)):
            x = conv(x)
            maps.append(None if fc is None else fc(x))
        return maps


class ViTAdapter(nn.Module):
    """A plain backbone's tokens and the image -> four maps (B, dim, ., .) at strides 4, 8, 16, 32.

    The backbone runs in four parts. Before each its tokens read the pyramid of strides 8 to 32, after each the pyramid
    reads the tokens; in the end the tokens, resized, are added to the maps, and each map has a BatchNorm.

    Args:
        dim: channels of the backbone.
        num_heads: heads of the deformable attention.
        ratio: its inner channels as a multiple of `dim`.
        n_points: its points per head and map.
        in_chans: channels of the image.
        width: channels of the spatial prior's stem.
        ffn_ratio: hidden channels of the extractors' MLP as a multiple of `dim`.
        drop_path_rate: stochastic depth of that MLP.
        features: which tokens are added to the four maps: those after "each" part (published for segmentation), or
            those after the "last" to all (for detection).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 6,
        ratio: float = 1.0,
        n_points: int = 4,
        in_chans: int = 3,
        width: int = 64,
        ffn_ratio: float = 0.25,
        drop_path_rate: float = 0.0,
        features: str = "each",
    ):
        super().__init__()
        self.features = known("features", features, ("each", "last"))
        self.dim, self.kept = dim, [0, 1, 2, 3]
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.spm = SpatialPrior(in_chans, width, dim)
        attention = dict(num_heads=num_heads, n_points=n_points, ratio=ratio)
        self.interactions = nn.ModuleList(
            Interaction(dim, extra, ffn_ratio, drop_path_rate, **attention) for extra in (0, 0, 0, 2)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norm1 = nn.BatchNorm2d(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.norm3 = nn.BatchNorm2d(dim)
        self.norm4 = nn.BatchNorm2d(dim)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation; the attention keeps its own."""
        nn.init.normal_(self.level_embed)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, PyramidMlp):
                for layer in (module.fc1, module.fc2):
                    trunc_normal_(layer.weight, std=0.02)
                    nn.init.zeros_(layer.bias)

    def keep_maps(self, indices: Sequence[int]) -> None:
        """Removes what makes the maps of other indices, of strides 4, 8, 16 and 32."""
        self.kept = list(indices)
        for i in {0, 1, 2, 3} - set(indices):
            setattr(self, f"norm{i + 1}", None)
        if 0 not in indices:
            self.up = self.spm.fc1 = None

    def is_of_other_map(self, name: str) -> bool:
        """Whether a parameter is of a part that `keep_maps` has removed."""
        part = name.rpartition(".")[0]
        return part in ("norm1", "norm2", "norm3", "norm4", "up", "spm.fc1") and attrgetter(part)(self) is None

    def describe(self) -> tuple[list[int], list[int], list[str]]:
        """Channels, strides and modules of the maps."""
        return [self.dim] * len(self.kept), [4 * 2**i for i in self.kept], [f"norm{i + 1}" for i in self.kept]

    def forward(
        self, image: Tensor, x: Tensor, grid: tuple[int, int], parts: Sequence[Callable[[Tensor], Tensor]]
    ) -> list[Tensor]:
        """Runs the backbone and the exchange with it.

        Args:
            image: (B, in_chans, H, W), sides divisible by 32.
            x: the backbone's tokens before its first block (B, H / 16 * W / 16, dim).
            grid: (H / 16, W / 16).
            parts: the backbone's four parts, each tokens -> tokens.

        Raises:
            InputError: sides that 32 does not divide.
        """
        if image.shape[-2] % 32 or image.shape[-1] % 32:
            raise InputError(f"an adapter needs sides divisible by 32, got {image.shape[-2]}x{image.shape[-1]}")
        finest, *pyramid = self.spm(image)
        grids = [tuple(y.shape[-2:]) for y in pyramid]
        c = torch.cat([y.flatten(2).mT + level for y, level in zip(pyramid, self.level_embed)], 1)
        after = []
        for interaction, part in zip(self.interactions, parts):
            x, c = interaction(x, grid, c, grids, part)
            after.append(x)
        pyramid = [
            y.unflatten(-1, size) for y, size in zip(c.mT.split([height * width for height, width in grids], -1), grids)
        ]
        if self.features == "last":
            after = after[-1:] * 4
        maps = []
        for i in self.kept:
            y = pyramid[i - 1] if i else self.up(pyramid[0]) + finest
            x = F.interpolate(after[i].mT.unflatten(-1, grid), y.shape[-2:], mode="bilinear", align_corners=False)
            maps.append(self.get_submodule(f"norm{i + 1}")(y + x))
        return maps
