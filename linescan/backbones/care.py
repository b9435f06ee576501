"""CARE Transformer: channels part into a memory, a global and two local branches, and are mixed again by two MLPs.

Paper: "CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction", Zhou et al., CVPR
2025, arXiv 2411.16170. Official code: github.com/zhouyuan888888/CARE-Transformer (no licence; the weights are MIT).
Written from the paper and the published weights.

Linear attention is the global branch of the last two stages, strips of convolutions that of the first two. No position
embedding, so any image size will do that survives five halvings. Two classifiers are trained, one by a teacher
(`CARE.set_distilled_training`); the answer is the mean of both.
"""

from typing import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, calculate_drop_path_rates
from torch import Tensor, nn

from .._compat import plain_shape
from ..checkpoint import fit_shapes, rename
from ..errors import InputError
from ..layers.blocks import Block, Stage, TokenMixer
from ..layers.linear import linear, trunc_normal_
from ..layers.mlp import DepthwiseMlp
from ..layers.norm import LayerNorm, at_least_float32
from ..layers.stems import ChannelsFirst, ImageStem, PatchConv2d, batch_norm, depthwise
from ..scans import global_linear_attention
from .contract import DenseForm, HierarchicalBackbone, register

__all__ = ["CARE", "CareMixer"]


# -- blocks ----------------------------------------------------------------------------------------------------------


class Strips(nn.Module):
    """Global branch of the first stages: a column of 11 pixels and a row of 11, each a depthwise convolution, added."""

    def __init__(self, dim: int):
        super().__init__()
        self.column = depthwise(dim, (11, 1))
        self.row = depthwise(dim, (1, 11))

    def forward(self, x: Tensor) -> Tensor:
        return self.column(x) + self.row(x)


class MeanKeyAttention(nn.Module):
    """Global branch of the last stages: linear attention with features elu + 1, its sums over tokens being means.

    The values are the inputs themselves, and nothing follows. Features are float32 at least.

    Args:
        dim: channels in and out.
        head_dim: channels per head.
    """

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        if dim % head_dim:
            raise InputError(f"head_dims divide a quarter of the channels: {dim} is not a multiple of {head_dim}")
        self.heads = dim // head_dim, head_dim
        self.qk = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[1:3]
        v = x.flatten(1, 2)[:, None]
        q, k = (F.elu(at_least_float32(y)) + 1 for y in linear(self.qk, v).chunk(2, -1))
        q, k, v = (y.unflatten(-1, self.heads) for y in (q, k, v))
        y = global_linear_attention(q, k, v.to(q.dtype), scale=1 / plain_shape(v)[2], eps=1e-6)
        return y[:, 0].flatten(-2).unflatten(1, grid).to(x.dtype)


class Interaction(nn.Module):
    """x + mlp(BN(x)) over maps (B, H, W, dim); `expands`: the MLP's hidden channels alone, which nothing is added to.

    Args:
        dim: channels in.
        hidden: hidden channels of the MLP.
        expands: of a classifier's last block.
    """

    def __init__(self, dim: int, hidden: int, expands: bool = False):
        super().__init__()
        self.norm = batch_norm(dim)
        self.mlp = DepthwiseMlp(dim, hidden, act_first=True)
        self.expands = expands
        if expands:
            self.mlp.fc2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(x))
        return y if self.expands else x + y


class CareMixer(TokenMixer):
    """The quarters of the channels: the first is the memory, the others get a global branch, 3x3 and 7x7 convolutions.

    Two interactions follow: among the three new quarters, and between these and the memory.

    Args:
        dim: channels in, and out unless it expands.
        ratios: hidden channels of the two interactions as a multiple of theirs.
        head_dim: of linear attention; None for strips.
        expands: the hidden channels of the second interaction are the output.
    """

    def __init__(self, dim: int, ratios: tuple[int, int], head_dim: int | None = None, expands: bool = False):
        super().__init__()
        if dim % 4:
            raise InputError(f"channels part into quarters: {dim} is not a multiple of 4")
        part = dim // 4
        self.wide = Strips(part) if head_dim is None else MeanKeyAttention(part, head_dim)
        self.local = nn.ModuleList([depthwise(part, 3), depthwise(part, 7)])
        self.inter1 = Interaction(3 * part, 3 * part * ratios[0])
        self.inter2 = Interaction(dim, dim * ratios[1], expands)

    def mix_tokens(self, x: Tensor, grid: tuple[int, int], **options) -> tuple[Tensor, None]:
        memory, wide, near, far = x.unflatten(1, grid).chunk(4, -1)
        new = self.inter1(torch.cat([self.wide(wide), self.local[0](near), self.local[1](far)], -1))
        return self.inter2(torch.cat([memory, new], -1)).flatten(1, 2), None


class ExpandingBlock(Block):
    """A classifier's last block: its mixer's output, which is wider than the stream, takes the stream's place."""

    def forward(self, x: Tensor, *context, **options) -> Tensor:
        return self.drop_path(self.mixer(x, *context, **options))


# -- model -----------------------------------------------------------------------------------------------------------


class CARE(HierarchicalBackbone):
    """CARE Transformer.

    The last block makes the channels of its MLP's hidden layer, so that the last map is wider than its stage.

    Args:
        img_size: accepted for timm; every size runs.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the map as it is.
        dims, depths: channels and blocks of the stages.
        ratios: hidden channels of the two interactions in each stage, as a multiple of theirs.
        head_dims: channels per head of linear attention in the last stages; those before have strips of convolutions.
        init_layer_scale: initial value of the learned factor on each block's output.
        drop_rate: dropout before each classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    dense = DenseForm(norms=None)
    classifiers = ("head_norm", "dist_norm", "head", "dist_head")

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (3, 6, 10, 6),
        ratios: Sequence[Sequence[int]] = ((2, 4), (2, 4), (4, 4), (4, 4)),
        head_dims: Sequence[int] = (16, 32),
        init_layer_scale: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        count = len(depths)
        for name, values in (("dims", dims), ("ratios", ratios)):
            if len(values) != count:
                raise InputError(f"{name} gives {len(values)} stages, depths {count}")
        if len(head_dims) > count:
            raise InputError(f"head_dims are for {len(head_dims)} of {count} stages")
        self.in_chans = in_chans
        self.min_size = 4 * 2 ** (count - 1)
        self.dims = [*dims[:-1], dims[-1] * ratios[-1][1]]
        self.num_features = self.dims[-1]
        self.distilled_training = False
        self.patch_embed = ImageStem(PatchConv2d(in_chans, dims[0], 4, 4), nn.BatchNorm2d(dims[0]))
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        heads = [None] * (count - len(head_dims)) + list(head_dims)

        def block(i: int, is_last: bool) -> Block:
            mixer = CareMixer(dims[i], ratios[i], heads[i], expands=is_last)
            if is_last:
                return ExpandingBlock(dims[i], mixer, norm_layer=nn.Identity, drop_path=next(rates))
            return Block(
                dims[i],
                mixer,
                norm_layer=nn.Identity,
                scale_layer=lambda dim: LayerScale(dim, init_layer_scale),
                drop_path=next(rates),
            )

        self.stages = nn.ModuleList(
            Stage(
                ChannelsFirst(nn.BatchNorm2d(dims[i - 1]), nn.Conv2d(dims[i - 1], dim, 2, 2)) if i else None,
                [block(i, is_last=(i, j) == (count - 1, depth - 1)) for j in range(depth)],
            )
            for i, (dim, depth) in enumerate(zip(dims, depths))
        )
        self.norm = nn.Identity()  # each classifier has its own
        self.init_head(num_classes, global_pool, drop_rate)
        self.apply(init_weights)

    # -- classifiers ------------------------------------------------------------------------------------------------

    def set_classifier(self, num_classes: int, **factory) -> None:
        """Two new, untrained classifiers of `num_classes`, each behind a norm; none for 0."""
        width = self.head_hidden_size
        self.head_norm, self.dist_norm = (
            LayerNorm(width, eps=1e-6, **factory) if num_classes else nn.Identity() for _ in range(2)
        )
        super().set_classifier(num_classes, **factory)
        self.dist_head = nn.Linear(width, num_classes, **factory) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.ModuleList:
        """Both final Linear layers, or Identities: that of the labels, and that of the teacher."""
        return nn.ModuleList([self.head, self.dist_head])

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, give the logits of the two classifiers as a pair, for a loss with labels and one with a teacher.

        As published, the second is trained on a teacher's likeliest class.
        """
        self.distilled_training = enable

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Features of `forward_features` -> pooled if `pre_logits`, else the mean of both classifiers' logits.

        In training after `set_distilled_training`, the logits of both.
        """
        if pre_logits or not self.num_classes:
            return super().forward_head(x, pre_logits=True)
        x = F.gelu(self.pool(x))
        logits = self.head(self.head_drop(self.head_norm(x)))
        distilled = self.dist_head(self.head_drop(self.dist_norm(x)))
        return (logits, distilled) if self.distilled_training and self.training else (logits + distilled) / 2

    # -- weights ----------------------------------------------------------------------------------------------------

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's; 1x1 convolutions become matrices."""
        return fit_shapes(rename(state, OFFICIAL_NAMES), self)


def init_weights(module: nn.Module) -> None:
    """The published initialisation: convolutions and Linear layers truncated normal, biases 0."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


OFFICIAL_NAMES = (
    (r"^stem\.", "patch_embed."),
    (r"\.token_mixer\.dwconvatt_1\.", ".mixer.wide.column."),
    (r"\.token_mixer\.dwconvatt_2\.", ".mixer.wide.row."),
    (r"\.token_mixer\.qk\.", ".mixer.wide.qk."),
    (r"\.token_mixer\.dwconv1\.", ".mixer.local.0."),
    (r"\.token_mixer\.dwconv2\.", ".mixer.local.1."),
    (r"\.inter_layer\.(inter\d)_norm\.", r".mixer.\1.norm.0."),
    (r"\.inter_layer\.(inter\d)_conv\.", r".mixer.\1.mlp.dwconv."),
    (r"\.inter_layer\.(inter\d)_", r".mixer.\1.mlp."),
    (r"(\.blocks\.\d+)\.gamma$", r"\1.scale1.gamma"),
    (r"^(dist_)?head\.fc\.", r"\1head."),
    (r"^head\.norm\.", "head_norm."),
    (r"^dist_head\.norm\.", "dist_norm."),
)


# -- models -----------------------------------------------------------------------------------------------------------

register(
    CARE,
    paper="CVPR 2025, arXiv 2411.16170",
    code="https://github.com/zhouyuan888888/CARE-Transformer",
    licence="MIT",
    data="ImageNet-1K",
    page="https://huggingface.co/YuanZ1995/CARE-Transformer",
    first_conv="patch_embed.0",
    classifier=("head", "dist_head"),
    models={
        "care_s0": {
            "args": {"depths": (2, 4, 8, 4), "ratios": ((2, 2), (2, 4), (4, 4), (4, 4))},
            "params": 7.340,
            "gmacs": 0.7,
            "weights": {"in1k": {"metrics": {"top1": 78.4}}},
        },
        "care_s1": {
            "params": 9.602,
            "gmacs": 1.0,
            "weights": {"in1k": {"metrics": {"top1": 80.1}}},
        },
        "care_s2": {
            "args": {"dims": (32, 64, 192, 384), "ratios": ((4, 4), (4, 4), (4, 4), (4, 4))},
            "params": 19.481,
            "gmacs": 1.9,
            "weights": {"in1k": {"metrics": {"top1": 82.1}}},
        },
    },
)
