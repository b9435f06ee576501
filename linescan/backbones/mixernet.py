"""scan_* and scanh_*: backbones to compare mixers, routes and merges on equal terms.

linescan's own: no paper, no published weights. A plain one, of DeiT's shape (Touvron et al., arXiv 2012.12877), and a
hierarchical one, of Swin's (Liu et al., arXiv 2103.14030). Blocks are pre-norm, mixer then MLP; what the mixer is,
along which routes it reads, and how their outputs are merged are arguments:

    timm.create_model("scan_tiny", mixer="gla", routes=("row", "-row", "col", "-col"), merge="gate")
"""

from typing import Sequence

from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..layers.mixers import Mixer
from ..layers.pos_embed import resample_pos_embed
from ..layers.stems import ConvDownsample, ConvStem
from .contract import HierarchicalBackbone, PlainBackbone, register

__all__ = ["PlainScanNet", "HierarchicalScanNet"]


class Block(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)), over a map (B, H, W, dim)."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, **mixer):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = Mixer(dim, **mixer)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SequenceBlock(Block):
    """`Block` over the tokens of a map (B, H * W, dim)."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return super().forward(x.unflatten(1, grid)).flatten(1, 2)


def init_linear(module: nn.Module) -> None:
    """Linear weights trunc-normal (0.02), biases 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class PlainScanNet(PlainBackbone):
    """Equal blocks over 16-pixel patches; the mean of all tokens is classified.

    Args:
        img_size: size (or height and width) that the position embedding is built for; other sizes run too.
        patch_size: side of the patches.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: "avg", or "" for the tokens as they are.
        embed_dim, depth: width and number of blocks.
        mlp_ratio: hidden channels of the MLP as a multiple of `embed_dim`.
        mixer, routes, merge, head_dim: of `linescan.layers.mixers.Mixer`.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        mixer: str = "s6",
        routes: str | Sequence[str] = "row,-row,col,-col",
        merge: str = "mean",
        head_dim: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.min_size = patch_size
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.native_grid = tuple(side // patch_size for side in sides)
        options = dict(mixer=mixer, routes=routes, merge=merge, head_dim=head_dim)

        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.pos_embed = nn.Parameter(trunc_normal_(self._positions(), std=0.02))
        self.blocks = nn.ModuleList(
            SequenceBlock(embed_dim, mlp_ratio, rate, **options)
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.init_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def _positions(self) -> Tensor:
        return self.patch_embed.weight.new_empty(1, self.native_grid[0] * self.native_grid[1], self.embed_dim)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        self.check_input(x, self.in_chans)
        x = self.patch_embed(x)
        grid = tuple(x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        return x + resample_pos_embed(self.pos_embed, self.native_grid, grid), grid, (grid,)

    def pool(self, x: Tensor) -> Tensor:
        return x.mean(1) if self.global_pool else x


class Stage(nn.Module):
    """Downsampling (none in the first stage), then blocks."""

    def __init__(self, dim: int, previous: int | None, mlp_ratio: float, rates: Sequence[float], **mixer):
        super().__init__()
        self.downsample = ConvDownsample(previous, dim) if previous else nn.Identity()
        self.blocks = nn.Sequential(*(Block(dim, mlp_ratio, rate, **mixer) for rate in rates))


class HierarchicalScanNet(HierarchicalBackbone):
    """Four stages at strides 4, 8, 16, 32, without position embedding.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: "avg", or "" for the map as it is.
        dims, depths: width and number of blocks of each stage.
        img_size: accepted for timm; every size runs.
        mlp_ratio, mixer, routes, merge, head_dim, drop_rate, drop_path_rate: as in `PlainScanNet`.
    """

    min_size = 4

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        img_size: int | tuple[int, int] | None = None,
        mlp_ratio: float = 4.0,
        mixer: str = "s6",
        routes: str | Sequence[str] = "row,-row,col,-col",
        merge: str = "mean",
        head_dim: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_features = dims[-1]
        options = dict(mixer=mixer, routes=routes, merge=merge, head_dim=head_dim)
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        self.patch_embed = ConvStem(in_chans, dims[0])
        self.stages = nn.ModuleList(
            Stage(dim, previous, mlp_ratio, [next(rates) for _ in range(depth)], **options)
            for dim, previous, depth in zip(dims, (None, *dims), depths)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.init_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def pool(self, x: Tensor) -> Tensor:
        return x.mean((1, 2)) if self.global_pool else x


# -- models -----------------------------------------------------------------------------------------------------------

OWN = {"paper": "linescan's own", "licence": "Apache-2.0"}

register(
    PlainScanNet,
    **OWN,
    first_conv="patch_embed",
    models={
        "scan_tiny": {"args": {"embed_dim": 192}},
        "scan_small": {"args": {"embed_dim": 384}},
        "scan_base": {"args": {"embed_dim": 768}},
    },
)

register(
    HierarchicalScanNet,
    **OWN,
    first_conv="patch_embed.conv1",
    models={
        "scanh_tiny": {"args": {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2)}},
        "scanh_small": {"args": {"dims": (96, 192, 384, 768), "depths": (2, 2, 18, 2)}},
        "scanh_base": {"args": {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2)}},
    },
)
