"""scan_* and scanh_*: backbones to compare mixers, routes and merges on equal terms.

linescan's own: no paper, no published weights. A plain one, of DeiT's shape (Touvron et al., arXiv 2012.12877), and a
hierarchical one, of Swin's (Liu et al., arXiv 2103.14030). Blocks are pre-norm, mixer then MLP; what the mixer is,
along which routes it reads, and how their outputs are merged are arguments. Blocks may have different mixers:

    timm.create_model("scan_tiny", mixer="gla", routes=("row", "-row", "col", "-col"), merge="gate")
    timm.create_model("scan_tiny", mixer=("s6", "s6", "window"))                      # every third block attends
    timm.create_model("scanh_tiny", mixer=("s6", "s6", ("s6", "softmax"), "softmax"))            # stage by stage
"""

from typing import Sequence

from timm.layers import calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..errors import InputError, known
from ..layers.blocks import Block, Stage
from ..layers.linear import init_linear, trunc_normal_
from ..layers.mixers import MIXERS, Mixer
from ..layers.mlp import Mlp
from ..layers.norm import LayerNorm
from ..layers.stems import ConvDownsample, ConvStem, PatchConv2d
from .contract import HierarchicalBackbone, PlainBackbone, check_images, register

__all__ = ["HierarchicalScanNet", "PlainScanNet"]

Mixers = str | Sequence[str | Sequence[str]]


def mixer_names(mixer: Mixers, depths: Sequence[int]) -> list[list[str]]:
    """The mixer of every block, stage by stage.

    Args:
        mixer: one name for all blocks; one entry per stage, each a name or names that repeat over its blocks; or names
            that repeat over all blocks.
        depths: blocks of each stage.

    Raises:
        InputError: an unknown name, or more entries than blocks to take them.
    """

    def repeat(names: str | Sequence[str], depth: int, where: str) -> list[str]:
        names = [names] if isinstance(names, str) else list(names)
        if not 1 <= len(names) <= depth:
            raise InputError(f"mixer gives {len(names)} names for {where}, which has {depth} blocks")
        return [known("mixer", names[i % len(names)], MIXERS) for i in range(depth)]

    if len(depths) > 1 and not isinstance(mixer, str) and len(mixer) == len(depths):
        return [repeat(names, depth, f"stage {i}") for i, (names, depth) in enumerate(zip(mixer, depths))]
    names = iter(repeat(mixer, sum(depths), "the model"))
    return [[next(names) for _ in range(depth)] for depth in depths]


def scan_block(dim: int, mixer: str, mlp_ratio: float, drop_path: float, options: dict) -> Block:
    """A block of either network; `options` are those of `Mixer`."""
    return Block(dim, Mixer(dim, mixer, **options), Mlp(dim, int(mlp_ratio * dim)), drop_path=drop_path)


class PlainScanNet(PlainBackbone):
    """Equal blocks over 16-pixel patches; the mean of all tokens is classified.

    Args:
        img_size: size (or height and width) that the position embedding is built for; other sizes run too.
        patch_size: side of the patches.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the tokens as they are.
        embed_dim, depth: width and number of blocks.
        mlp_ratio: hidden channels of the MLP as a multiple of `embed_dim`.
        mixer: name of the mixer (`linescan.layers.mixers.MIXERS`), or names that repeat over the blocks.
        routes, merge, head_dim, window: of `linescan.layers.mixers.Mixer`.
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
        mixer: str | Sequence[str] = "s6",
        routes: str | Sequence[str] = "row, -row, col, -col",
        merge: str = "mean",
        head_dim: int = 32,
        window: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.stride = self.min_size = patch_size
        options = {"routes": routes, "merge": merge, "head_dim": head_dim, "window": window}

        self.patch_embed = PatchConv2d(in_chans, embed_dim, patch_size, patch_size)
        self.init_positions(self.grid_of(*to_2tuple(img_size)))
        (names,) = mixer_names(mixer, [depth])
        self.blocks = nn.ModuleList(
            scan_block(embed_dim, name, mlp_ratio, rate, options)
            for name, rate in zip(names, calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.norm = LayerNorm(embed_dim)
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers and positions truncated normal; the recurrences' parameters have their own initialisation."""
        self.apply(init_linear)
        trunc_normal_(self.pos_embed, std=0.02)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return height // self.stride, width // self.stride

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        grid = x.shape[1:3]
        return x + self.positions(grid), grid, ()


class HierarchicalScanNet(HierarchicalBackbone):
    """Four stages at strides 4, 8, 16, 32, without position embedding.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the map as it is.
        dims, depths: width and number of blocks of each stage.
        img_size: accepted for timm; every size runs.
        mixer: name of the mixer (`linescan.layers.mixers.MIXERS`); or one entry per stage, a name or names that repeat
            over its blocks; or names that repeat over all blocks.
        mlp_ratio, routes, merge, head_dim, window, drop_rate, drop_path_rate: as in `PlainScanNet`.
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
        mixer: Mixers = "s6",
        routes: str | Sequence[str] = "row, -row, col, -col",
        merge: str = "mean",
        head_dim: int = 32,
        window: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if len(dims) != len(depths):
            raise InputError(f"dims gives {len(dims)} stages, depths {len(depths)}")
        self.in_chans = in_chans
        self.dims = list(dims)
        self.num_features = dims[-1]
        options = {"routes": routes, "merge": merge, "head_dim": head_dim, "window": window}
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        self.patch_embed = ConvStem(in_chans, dims[0])
        self.stages = nn.ModuleList(
            Stage(
                ConvDownsample(dims[i - 1], dim) if i else None,
                [scan_block(dim, name, mlp_ratio, next(rates), options) for name in names],
            )
            for i, (dim, names) in enumerate(zip(dims, mixer_names(mixer, depths)))
        )
        self.norm = LayerNorm(dims[-1])
        self.init_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)


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
