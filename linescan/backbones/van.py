"""VAN (Visual Attention Network): every block gates its input by a large depthwise kernel, factored into three parts.

Paper: "Visual Attention Network", Guo et al., Computational Visual Media 2023, arXiv 2202.09741. Official code:
github.com/Visual-Attention-Network/VAN-Classification (Apache-2.0). Written from the paper and the published weights.

Four stages of convolutions alone: no sequence, no attention matrix, no position embedding, so any image size will do
and cost is linear in the pixels. Every stage ends with a LayerNorm, which the next stage reads.
"""

from functools import partial
from typing import Iterable, Sequence

from timm.layers import LayerScale, calculate_drop_path_rates
from torch import Tensor, nn

from ..checkpoint import fit_shapes, rename
from ..errors import InputError
from ..layers.blocks import Block, Stage, TokenMixer
from ..layers.linear import init_linear, linear
from ..layers.mlp import DepthwiseMlp
from ..layers.norm import LayerNorm
from ..layers.stems import ChannelsFirst, ImageStem, PatchConv2d, batch_norm, depthwise
from .contract import DenseForm, HierarchicalBackbone, register

__all__ = ["VAN", "LargeKernelAttention"]


class LargeKernelAttention(TokenMixer):
    """proj2(y * gate(y)) + x, y = GELU(proj1(x)). The gate is linear and not bounded.

    It stands for a 21x21 kernel: a depthwise 5x5 convolution, a depthwise 7x7 one that takes every third pixel, and a
    Linear over the channels, with nothing between.

    Args:
        dim: channels in and out.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.proj1 = nn.Linear(dim, dim)
        self.act = nn.GELU()
        self.conv = depthwise(dim, 5)
        self.dilated = depthwise(dim, 7, dilation=3)
        self.gate = nn.Linear(dim, dim)
        self.proj2 = nn.Linear(dim, dim)

    def mix_tokens(self, x: Tensor, grid: tuple[int, int], **options) -> tuple[Tensor, None]:
        y = self.act(linear(self.proj1, x))
        gate = self.dilated(self.conv(y.unflatten(1, grid))).flatten(1, 2)
        return linear(self.proj2, y * linear(self.gate, gate)) + x, None


class NormedStage(Stage):
    """A stage that ends with a LayerNorm.

    Args:
        downsample, blocks: of `Stage`.
        dim: channels of the blocks.
    """

    def __init__(self, downsample: nn.Module | None, blocks: Iterable[nn.Module], dim: int):
        super().__init__(downsample, blocks)
        self.norm = LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class VAN(HierarchicalBackbone):
    """VAN.

    Args:
        img_size: accepted for timm; every size runs.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the map as it is.
        dims, depths: channels and blocks of the stages.
        mlp_ratios: hidden channels of the MLPs as a multiple of the stage's.
        init_layer_scale: initial value of the learned factor on each branch's output.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    dense = DenseForm(norms=None)
    min_size = 4  # the stem's stride

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 3, 12, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        init_layer_scale: float = 1e-2,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if not len(dims) == len(depths) == len(mlp_ratios):
            raise InputError(f"dims, depths and mlp_ratios are for the same stages, got {dims}, {depths}, {mlp_ratios}")
        self.in_chans = in_chans
        self.dims = list(dims)
        self.num_features = dims[-1]
        self.patch_embed = ImageStem(PatchConv2d(in_chans, dims[0], 7, 4, 3), nn.BatchNorm2d(dims[0]))
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList(
            NormedStage(
                ChannelsFirst(nn.Conv2d(dims[i - 1], dim, 3, 2, 1), nn.BatchNorm2d(dim)) if i else None,
                [
                    Block(
                        dim,
                        LargeKernelAttention(dim),
                        DepthwiseMlp(dim, int(mlp_ratios[i] * dim), drop=proj_drop_rate),
                        norm_layer=batch_norm,
                        scale_layer=partial(LayerScale, init_values=init_layer_scale),
                        drop_path=next(rates),
                    )
                    for _ in range(depths[i])
                ],
                dim,
            )
            for i, dim in enumerate(dims)
        )
        self.norm = nn.Identity()  # the last stage's is its own
        self.apply(init_convolutions)
        self.init_head(num_classes, global_pool, drop_rate)
        init_linear(self.head)

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's; 1x1 convolutions become matrices."""
        return fit_shapes(rename(state, OFFICIAL_NAMES), self)


def init_convolutions(module: nn.Module) -> None:
    """The published initialisation: normal, its variance 2 / outputs that an input has a part in; biases 0."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        reached = module.weight[:, 0].numel() / getattr(module, "groups", 1)
        nn.init.normal_(module.weight, std=(2 / reached) ** 0.5)
        nn.init.zeros_(module.bias)


OFFICIAL_NAMES = (
    (r"^patch_embed1\.proj\.", "patch_embed.0."),
    (r"^patch_embed1\.norm\.", "patch_embed.1."),
    (r"^patch_embed(\d+)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.0."),
    (r"^patch_embed(\d+)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.1."),
    (r"^norm(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
    (r"^block(\d+)\.(\d+)\.norm(\d)\.", r"block\1.\2.norm\3.0."),
    (r"^block(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"\.attn\.spatial_gating_unit\.conv0\.", ".mixer.conv."),
    (r"\.attn\.spatial_gating_unit\.conv_spatial\.", ".mixer.dilated."),
    (r"\.attn\.spatial_gating_unit\.conv1\.", ".mixer.gate."),
    (r"\.attn\.proj_", ".mixer.proj"),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    (r"\.layer_scale_(\d)$", r".scale\1.gamma"),
)


# -- models -----------------------------------------------------------------------------------------------------------

register(
    VAN,
    paper="Computational Visual Media 2023, arXiv 2202.09741",
    code="https://github.com/Visual-Attention-Network/VAN-Classification",
    licence="Apache-2.0",
    data="ImageNet-1K",
    first_conv="patch_embed.0",
    preprocess={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 0.9},
    models={
        "van_b0": {
            "args": {"dims": (32, 64, 160, 256), "depths": (3, 3, 5, 2)},
            "params": 4.106,
            "gmacs": 0.9,
            "weights": {
                "in1k": {
                    "hub": "Visual-Attention-Network/VAN-Tiny-original",
                    "file": "van_tiny_754.pth.tar",
                    "metrics": {"top1": 75.4},
                },
            },
        },
        "van_b1": {
            "args": {"depths": (2, 2, 4, 2)},
            "params": 13.862,
            "gmacs": 2.5,
            "weights": {
                "in1k": {
                    "hub": "Visual-Attention-Network/VAN-Small-original",
                    "file": "van_small_811.pth.tar",
                    "metrics": {"top1": 81.1},
                },
            },
        },
        "van_b2": {
            "args": {"depths": (3, 3, 12, 3)},
            "params": 26.578,
            "gmacs": 5.0,
            "weights": {
                "in1k": {
                    "hub": "Visual-Attention-Network/VAN-Base-original",
                    "file": "van_base_828.pth.tar",
                    "metrics": {"top1": 82.8},
                },
            },
        },
        "van_b3": {
            "args": {"depths": (3, 5, 27, 3)},
            "params": 44.766,
            "gmacs": 9.0,
            "weights": {
                "in1k": {
                    "hub": "Visual-Attention-Network/VAN-Large-original",
                    "file": "van_large_839.pth.tar",
                    "metrics": {"top1": 83.9},
                },
            },
        },
        # Without files of their own.
        "van_b4": {"args": {"depths": (3, 6, 40, 3)}, "gmacs": 12.2},
        "van_b5": {"args": {"dims": (96, 192, 480, 768), "depths": (3, 3, 24, 3)}},
        "van_b6": {"args": {"dims": (96, 192, 384, 768), "depths": (6, 6, 90, 6)}},
    },
)
