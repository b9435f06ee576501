"""InLine: linear attention whose weights add up to one, and a convolution predicted from the mean, in four hosts.

Paper: "Bridging the Divide: Reconsidering Softmax and Linear Attention", Han et al., NeurIPS 2024, arXiv 2412.06590.
Official code: github.com/LeapLabTHU/InLine (no licence is given). Written from the paper and the published weights.

The hosts are DeiT (arXiv 2012.12877), PVT (2102.12122), Swin (2103.14030) and CSWin (2107.00652). A letter for each
stage says what its blocks attend with (`attn_type`): I for InLine, S for the host's own softmax, M for InLine in the
first blocks and softmax in the others. The published InLine blocks read the whole map.
"""

import re
from functools import partial
from math import isqrt
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, resize_rel_pos_bias_table_simple, to_2tuple
from timm.models.swin_transformer_v2 import window_partition, window_reverse
from torch import Tensor, nn

from ..checkpoint import rename
from ..errors import InputError
from ..layers.attention import ShiftedWindowAttention, window_attention
from ..layers.blocks import Block, Stage, TokenMixer
from ..layers.linear import init_linear, linear, trunc_normal_
from ..layers.mlp import Mlp
from ..layers.norm import LayerNorm
from ..layers.pos_embed import resample_pos_embed
from ..layers.stems import ConvDownsample, MapConv2d, PatchConv2d, PatchMerging, PatchStem, depthwise, up_to_multiple
from .contract import HierarchicalBackbone, PlainBackbone, check_images, register

__all__ = ["InLineAttention", "InLineCSwin", "InLineDeiT", "InLinePVT", "InLineSwin", "injective_attention"]


# -- attention --------------------------------------------------------------------------------------------------------


def injective_attention(q: Tensor, k: Tensor, v: Tensor, count: Tensor | int | None = None) -> Tensor:
    """InLine attention: the weights of a query over the N keys are s q.k_j / N minus their mean, plus 1 / N.

    They add up to one without a division, and no two queries have the same. What comes out is the values' mean and the
    query through the covariance of keys and values: y_i = mean(v) + s cov(k, v)^T q_i, with s = d^-1/2.

    Args:
        q, k, v: (B, N, heads, d).
        count: tokens of each sample, (B, 1, 1, 1) or one number, where the others' k and v are zero; by default N.

    Returns:
        (B, N, heads, d).
    """
    count = k.shape[1] if count is None else count
    mean_k, mean_v = (x.sum(1, keepdim=True) / count for x in (k, v))
    covariance = torch.einsum("bnhd,bnhe->bhde", (k - mean_k) / count, v)
    return mean_v + torch.einsum("bnhd,bhde->bnhe", q * q.shape[-1] ** -0.5, covariance)


def cut_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """A map (B, H, W, C) -> its windows, sample by sample (B * n, *window, C); zeros where one reaches over the map."""
    bottom, right = up_to_multiple(x.shape[1], window[0]), up_to_multiple(x.shape[2], window[1])
    return window_partition(F.pad(x, (0, 0, 0, right, 0, bottom)), window)


def join_windows(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Undoes `cut_windows` for a map of this size."""
    window = tuple(x.shape[1:3])
    padded = tuple(-(-side // w) * w for side, w in zip(grid, window))
    return window_reverse(x, window, padded)[:, : grid[0], : grid[1]]


class PredictedConv(nn.Module):
    """A depthwise 3x3 convolution of a map (B, H, W, dim), whose taps are made of one vector (B, dim) a sample.

    Args:
        dim: channels.
        num_heads: groups of the two linear maps that make the taps.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.taps = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=num_heads)
        )

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        taps = self.taps(mean[..., None]).unflatten(1, (-1, 9)).to(x.dtype)  # (B, dim, 9, 1), rows first
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        return sum(
            padded[:, row : row + height, column : column + width] * taps[:, None, None, :, 3 * row + column, 0]
            for row in range(3)
            for column in range(3)
        )


class InLineAttention(TokenMixer):
    """`injective_attention` with heads, and a `PredictedConv` of the values, between projections.

    Class tokens may stand before those of the grid: they take part in everything but the convolution.

    Args:
        dim: channels.
        num_heads: heads.
        window: side of the windows that are read apart, in tokens; None for one, the whole map.
        shifted: move the windows by half of one, where there are several. The map is a torus then: tokens of a window
            that come from both sides of the seam read each other.
        lepe: another depthwise 3x3 convolution of the values, with learned taps (CSWin's "LePE").
    """

    def __init__(self, dim: int, num_heads: int, window: int | None = None, shifted: bool = False, lepe: bool = False):
        super().__init__()
        if dim % num_heads:
            raise InputError(f"num_heads divides the channels: {dim} is not a multiple of {num_heads}")
        self.num_heads, self.window, self.shifted = num_heads, window, shifted
        self.qkv = nn.Linear(dim, 3 * dim)
        self.conv = PredictedConv(dim, num_heads)
        self.lepe = depthwise(dim, 3) if lepe else None
        self.proj = nn.Linear(dim, dim)

    def attend(self, qkv: Tensor, mean: Tensor, grid: tuple[int, int], count: Tensor | None = None) -> Tensor:
        """Tokens qkv (B, [n +] H * W, 3 dim) and what the taps are made of, (B, dim) -> (B, [n +] H * W, dim)."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        y, v = injective_attention(q, k, v, count).flatten(-2), v.flatten(-2)
        others = v.shape[1] - grid[0] * grid[1]
        cells = v[:, others:].unflatten(1, grid)
        local = self.conv(cells, mean)
        if self.lepe is not None:
            local = local + self.lepe(cells)
        return y + F.pad(local.flatten(1, 2), (0, 0, others, 0))

    def mix_tokens(self, x: Tensor, grid: tuple[int, int], mean: Tensor | None = None, **options):
        """As `TokenMixer`; `mean` (B, dim) is what the taps are made of, by default the tokens' mean."""
        qkv = linear(self.qkv, x)
        window = tuple(min(self.window or side, side) for side in grid)
        if window == tuple(grid):
            return linear(self.proj, self.attend(qkv, x.mean(1) if mean is None else mean, grid)), None
        shift = [w // 2 if self.shifted and w < side else 0 for w, side in zip(window, grid)]
        one = x.new_ones(1, *grid, 1)
        maps = [y.unflatten(1, grid).roll([-n for n in shift], (1, 2)) for y in (qkv, x)]
        qkv, x, one = (cut_windows(y, window).flatten(1, 2) for y in (*maps, one))
        count = one.sum(1).repeat(len(x) // len(one), 1)  # tokens of each window, (B * n, 1)
        y = self.attend(qkv, x.sum(1) / count, window, count[..., None, None])
        y = join_windows(y.unflatten(1, window), grid).roll(shift, (1, 2))
        return linear(self.proj, y.flatten(1, 2)), None


# -- the hosts' softmax -----------------------------------------------------------------------------------------------


class ReducedAttention(TokenMixer):
    """Softmax attention to keys of a map that a strided convolution made smaller (PVT).

    Args:
        dim: channels.
        num_heads: heads.
        ratio: side of the squares that become one key; 1 for none.
    """

    def __init__(self, dim: int, num_heads: int, ratio: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.reduce = nn.Sequential(MapConv2d(dim, dim, ratio, ratio), LayerNorm(dim)) if ratio > 1 else None
        self.proj = nn.Linear(dim, dim)

    def mix_tokens(self, x: Tensor, grid: tuple[int, int], **options) -> tuple[Tensor, None]:
        keys = x if self.reduce is None else self.reduce(x.unflatten(1, grid)).flatten(1, 2)
        q = linear(self.q, x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = linear(self.kv, keys).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return linear(self.proj, y.transpose(1, 2).flatten(2)), None


class SwinAttention(ShiftedWindowAttention):
    """Swin's attention: windows are not shifted on a map that one of them covers from side to side."""

    def shift_on(self, grid: tuple[int, int]) -> int:
        return self.shift if min(grid) > self.window else 0


class StripeAttention(TokenMixer):
    """Softmax attention within upright stripes for half of the heads, and lying ones for the others (CSWin).

    A depthwise 3x3 convolution of the values within each stripe is added ("LePE").

    Args:
        dim: channels.
        num_heads: heads; an even number for stripes.
        stripe: width of the stripes, in tokens; 0 for one group of all heads over the whole map.
    """

    def __init__(self, dim: int, num_heads: int, stripe: int):
        super().__init__()
        self.groups = 2 if stripe else 1
        if num_heads % self.groups or dim % num_heads:
            raise InputError(f"{dim} channels do not divide into {num_heads} heads for {self.groups} kinds of stripes")
        self.num_heads, self.stripe = num_heads, stripe
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = nn.ModuleList(depthwise(dim // self.groups, 3) for _ in range(self.groups))
        self.proj = nn.Linear(dim, dim)

    def mix_tokens(self, x: Tensor, grid: tuple[int, int], mean: Tensor | None = None, **options):
        qkv = linear(self.qkv, x).unflatten(1, grid).unflatten(-1, (3, self.num_heads, -1))
        height, width = grid
        stripes = (height, min(self.stripe, width)), (min(self.stripe, height), width)
        outputs = []
        for conv, window, part in zip(self.lepe, stripes if self.stripe else (grid,), qkv.chunk(self.groups, -2)):
            q, k, v = part.unbind(-3)
            local = join_windows(conv(cut_windows(v.flatten(-2), window)), grid)
            outputs.append(window_attention(q, k, v, window).flatten(-2) + local)
        return linear(self.proj, torch.cat(outputs, -1).flatten(1, 2)), None


# -- DeiT -------------------------------------------------------------------------------------------------------------


class InLineDeiT(PlainBackbone):
    """InLine-DeiT: InLine attention in every block of a vision transformer.

    Args:
        img_size: size (or height and width) that the position embedding is built for; other sizes run too.
        patch_size: side of the square patches.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: "token" (the class token), a pooling of all tokens, or "" for the tokens as they are.
        embed_dim, depth, num_heads: channels of the stream, blocks, and heads of each.
        mlp_ratio: hidden channels of the MLP as a multiple of `embed_dim`.
        drop_rate: dropout before the classifier and after the position embedding.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.stride = self.min_size = patch_size
        self.patch_embed = PatchConv2d(in_chans, embed_dim, patch_size, patch_size)
        self.init_positions(self.grid_of(*to_2tuple(img_size)), "head")
        self.pos_drop = nn.Dropout(drop_rate)
        norm_layer = partial(LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                InLineAttention(embed_dim, num_heads),
                Mlp(embed_dim, int(mlp_ratio * embed_dim)),
                norm_layer=norm_layer,
                drop_path=rate,
            )
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm = norm_layer(embed_dim)
        self.init_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)
        for table in (self.pos_embed, self.cls_token):
            trunc_normal_(table, std=0.02)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return height // self.stride, width // self.stride

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        grid = x.shape[1:3]
        return self.pos_drop(self.add_class_tokens((x + self.positions(grid)).flatten(1, 2))), grid, (grid,)

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return rename(state, OFFICIAL_NAMES)


# -- hierarchical hosts -----------------------------------------------------------------------------------------------


def attention_kinds(attn_type: str, depths: Sequence[int]) -> list[str]:
    """The letters of each stage's blocks, "I" or "S": "IIMS2" has two blocks I in the third stage, and then S.

    Raises:
        InputError: it is not a letter I, S or M for each stage, with a number where there is an M.
    """
    match = re.fullmatch(r"([ISM]+)(\d*)", attn_type)
    if not match or len(match[1]) != len(depths) or ("M" in match[1]) != bool(match[2]):
        raise InputError(
            f"attn_type has a letter I, S or M for each of the {len(depths)} stages, and after an M the number of its "
            f"blocks that are I (IIMS2), not {attn_type!r}"
        )
    first = {"I": max(depths), "S": 0, "M": int(match[2] or 0)}
    return ["I" * min(first[letter], depth) + "S" * (depth - first[letter]) for letter, depth in zip(match[1], depths)]


class InLineStages(HierarchicalBackbone):
    """What the hierarchical hosts share: stages of pre-norm blocks with MLPs."""

    block_layer: Callable = Block

    def init_stages(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        attn_type: str,
        drop_path_rate: float,
        downsample: Callable[[int, int], nn.Module],
        mixer: Callable[[str, int, int, int, int], nn.Module],
        norm_layer: Callable = LayerNorm,
    ) -> None:
        """Makes the stages; `mixer(letter, dim, heads, stage, block)` is the mixer of a block."""
        if not len(dims) == len(depths) == len(num_heads) == len(mlp_ratios):
            raise InputError(f"dims, depths and num_heads are for the same stages, got {dims}, {depths}, {num_heads}")
        self.dims = list(dims)
        self.num_features = dims[-1]
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList(
            Stage(
                downsample(dims[i - 1], dim) if i else None,
                [
                    self.block_layer(
                        dim,
                        mixer(letter, dim, num_heads[i], i, j),
                        Mlp(dim, int(mlp_ratios[i] * dim)),
                        norm_layer=norm_layer,
                        drop_path=next(rates),
                    )
                    for j, letter in enumerate(kinds)
                ],
            )
            for i, (dim, kinds) in enumerate(zip(dims, attention_kinds(attn_type, depths)))
        )


class Positioned(nn.Module):
    """A layer that makes a map (B, H, W, dim), and a learned position embedding added to it.

    Args:
        layer: the layer.
        dim: its channels.
        grid: height and width that the embedding is built for; for other maps it is resampled, bilinearly.
    """

    def __init__(self, layer: nn.Module, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.layer = layer
        self.pos_embed = nn.Parameter(trunc_normal_(torch.zeros(1, *grid, dim), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x + resample_pos_embed(self.pos_embed, x.shape[1:3], mode="bilinear")


class InLinePVT(InLineStages):
    """InLine-PVT: the first pyramid vision transformer, with InLine attention to all tokens of a stage's map.

    Args:
        img_size: size (or height and width) that the position embeddings are built for; other sizes run too.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the map as it is. There is no norm before it.
        dims, depths, num_heads, mlp_ratios: channels, blocks, heads and width of the MLPs of each stage.
        attn_type: what each stage attends with, see `attention_kinds`.
        sr_ratios: of each stage's softmax blocks, see `ReducedAttention`.
        norm_eps: of the norms in the blocks.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (2, 4, 10, 16),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        attn_type: str = "IIII",
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.in_chans = in_chans
        strides = [4 * 2**stage for stage in range(len(depths))]
        ratios = [sr_ratios[i] if "S" in kinds else 1 for i, kinds in enumerate(attention_kinds(attn_type, depths))]
        self.min_size = max(stride * ratio for stride, ratio in zip(strides, ratios))
        height, width = to_2tuple(img_size)
        grids = [self.grid_of(height, width, stage) for stage in range(len(depths))]
        stages = iter(enumerate(grids[1:], 1))

        def downsample(dim: int, out_dim: int) -> Positioned:
            return Positioned(ConvDownsample(dim, out_dim, 2), out_dim, next(stages)[1])

        def mixer(letter: str, dim: int, heads: int, stage: int, block: int) -> TokenMixer:
            return InLineAttention(dim, heads) if letter == "I" else ReducedAttention(dim, heads, sr_ratios[stage])

        self.patch_embed = Positioned(PatchStem(in_chans, dims[0], 4), dims[0], grids[0])
        norm_layer = partial(LayerNorm, eps=norm_eps)
        self.init_stages(dims, depths, num_heads, mlp_ratios, attn_type, drop_path_rate, downsample, mixer, norm_layer)
        self.norm = nn.Identity()
        self.init_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def grid_of(self, height: int, width: int, stage: int = 0) -> tuple[int, int]:
        return height // (4 * 2**stage), width // (4 * 2**stage)

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's; queries, keys and values of InLine blocks are projected together."""
        state = rename(state, PVT_NAMES)
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(stage.blocks):
                for part in ("weight", "bias") if isinstance(block.mixer, InLineAttention) else ():
                    q, kv, qkv = (f"stages.{i}.blocks.{j}.mixer.{name}.{part}" for name in ("q", "kv", "qkv"))
                    if q in state:
                        state[qkv] = torch.cat([state.pop(q), state.pop(kv)])
        return state

    def fit_positions(self, state: dict[str, Tensor], img_size=None) -> dict[str, Tensor]:
        """As `Backbone`, for the table of each stage."""
        out = dict(state)
        for name, own in self.named_parameters():
            table = state.get(name)
            if not name.endswith("pos_embed") or table is None:
                continue
            if table.ndim == 3:
                stage = 0 if name.startswith("patch_embed") else int(name.split(".")[1])
                grid_of = partial(self.grid_of, stage=stage)
                table = table.unflatten(1, self.file_grid(table.shape[1], img_size, grid_of, own.shape[1:3]))
            out[name] = resample_pos_embed(table, own.shape[1:3])
        return out


class InLineSwin(InLineStages):
    """InLine-Swin: Swin with InLine attention over the whole map, or large windows, in its first stages.

    Args:
        img_size: accepted for timm; every size runs.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the map as it is.
        dims, depths, num_heads: channels, blocks and heads of each stage.
        attn_type: what each stage attends with, see `attention_kinds`.
        window: side of the windows of InLine blocks; None for the whole map at any size. Softmax blocks have an eighth
            of it, but at least 7. In every other block the windows are shifted by half of one.
        mlp_ratio: hidden channels of the MLPs as a multiple of the stage's.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    min_size = 4

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attn_type: str = "IIIS",
        window: int | None = 56,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.in_chans = in_chans
        small = max(7, (window or 0) // 8)

        def mixer(letter: str, dim: int, heads: int, stage: int, block: int) -> TokenMixer:
            if letter == "I":
                return InLineAttention(dim, heads, window, shifted=block % 2 == 1)
            return SwinAttention(dim, heads, small, small // 2 * (block % 2))

        self.patch_embed = PatchStem(in_chans, dims[0], 4)
        mlp_ratios = [mlp_ratio] * len(depths)
        self.init_stages(dims, depths, num_heads, mlp_ratios, attn_type, drop_path_rate, PatchMerging, mixer)
        self.norm = LayerNorm(self.num_features)
        self.init_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's, without computed tables; biases of windows are resampled to this model's."""
        computed = (".relative_position_index", ".attn_mask")
        out = rename({k: v for k, v in state.items() if not k.endswith(computed)}, SWIN_NAMES)
        own = self.state_dict()
        for key in [key for key in out if key.endswith(".bias_table") and key in own]:
            side = (isqrt(len(own[key])) + 1) // 2
            out[key] = resize_rel_pos_bias_table_simple(out[key], (side, side), own[key].shape)
        return out


class CSwinBlock(Block):
    """A block whose mixer also gets the mean of what is not normed yet."""

    def branch(self, x: Tensor, norm: nn.Module, layer: nn.Module, scale: nn.Module | None, *context, **options):
        if layer is self.mixer:
            context = None, x.mean((1, 2))
        return super().branch(x, norm, layer, scale, *context, **options)


class InLineCSwin(InLineStages):
    """InLine-CSwin: CSWin with InLine attention over the whole map in its first stages.

    Args:
        img_size: accepted for timm; every size runs.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the map as it is.
        dims, depths, num_heads: channels, blocks and heads of each stage.
        attn_type: what each stage attends with, see `attention_kinds`.
        stripes: width of the stripes of each stage's softmax blocks; 0 for the whole map.
        mlp_ratio: hidden channels of the MLPs as a multiple of the stage's.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    checkpoint_nesting = ("state_dict_ema",)  # the averaged weights, which the authors evaluate
    min_size = 4
    block_layer = CSwinBlock

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        attn_type: str = "IISS",
        stripes: Sequence[int] = (1, 2, 7, 0),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.in_chans = in_chans

        def mixer(letter: str, dim: int, heads: int, stage: int, block: int) -> TokenMixer:
            if letter == "I":
                return InLineAttention(dim, heads, lepe=True)
            return StripeAttention(dim, heads, stripes[stage])

        self.patch_embed = PatchStem(in_chans, dims[0], 4, kernel_size=7, padding=2)
        mlp_ratios = [mlp_ratio] * len(depths)
        self.init_stages(dims, depths, num_heads, mlp_ratios, attn_type, drop_path_rate, ConvDownsample, mixer)
        self.norm = LayerNorm(self.num_features)
        self.init_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's; InLine blocks have one group of heads."""
        state = rename(state, CSWIN_NAMES)
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(stage.blocks):
                for part in ("weight", "bias") if isinstance(block.mixer, InLineAttention) else ():
                    lepe = f"stages.{i}.blocks.{j}.mixer.lepe"
                    if f"{lepe}.0.{part}" in state:
                        state[f"{lepe}.{part}"] = state.pop(f"{lepe}.0.{part}")
        return state


def _earlier(match: re.Match) -> str:
    """A stage that is counted from 1, by its number from 0."""
    return f"stages.{int(match[1]) - 1}."


OFFICIAL_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"\.attn\.residual\.", ".mixer.conv.taps."),
    (r"\.attn\.", ".mixer."),
)

PVT_NAMES = (
    (r"^pos_embed1$", "patch_embed.pos_embed"),
    (r"^pos_embed(\d+)$", lambda match: _earlier(match) + "downsample.pos_embed"),
    (r"^patch_embed1\.", "patch_embed.layer."),
    (r"^patch_embed(\d+)\.", lambda match: _earlier(match) + "downsample.layer."),
    (r"\.layer\.proj\.", ".layer.conv."),
    (r"^block(\d+)\.", lambda match: _earlier(match) + "blocks."),
    (r"\.attn\.sr\.", ".mixer.reduce.0."),
    (r"\.attn\.norm\.", ".mixer.reduce.1."),
    *OFFICIAL_NAMES,
)

SWIN_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.conv."),
    (r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
    (r"^layers\.", "stages."),
    (r"\.relative_position_bias_table$", ".bias_table"),
    *OFFICIAL_NAMES,
)

CSWIN_NAMES = (
    (r"^stage1_conv_embed\.0\.", "patch_embed.conv."),
    (r"^stage1_conv_embed\.2\.", "patch_embed.norm."),
    (r"^merge(\d+)\.", r"stages.\1.downsample."),
    (r"^stage(\d+)\.", lambda match: _earlier(match) + "blocks."),
    (r"(blocks\.\d+)\.(qkv|proj)\.", r"\1.mixer.\2."),
    (r"\.attns\.0\.residual\.", ".mixer.conv.taps."),
    (r"\.attns\.(\d+)\.get_v\.", r".mixer.lepe.\1."),
)


# -- models -----------------------------------------------------------------------------------------------------------


def _weights(file: str, top1: float) -> dict:
    return {"in1k": {"url": f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1", "metrics": {"top1": top1}}}


def _inputs(side: int) -> dict:
    return {"inputs": ((3, side, side),)}


PUBLISHED = {
    "paper": "NeurIPS 2024, arXiv 2412.06590",
    "code": "https://github.com/LeapLabTHU/InLine",
    "licence": "none",
    "data": "ImageNet-1K",
    "preprocess": {"crop_mode": "squash"},  # resized to 256 x 256 whatever their shape, or as much of other sizes
}

register(
    InLineDeiT,
    **PUBLISHED,
    first_conv="patch_embed",
    models={
        "inline_deit_tiny": {
            "args": {"embed_dim": 192, "num_heads": 6},
            "params": 6.478,
            "gmacs": 1.1,
            "weights": _weights("1d6b8191ad6d4114b291", 74.5),
        },
        "inline_deit_small": {
            "args": {"img_size": 288, "embed_dim": 320, "num_heads": 10},
            **_inputs(288),
            "params": 16.735,
            "gmacs": 5.0,
            "weights": _weights("2f3898b07e9247f3beb3", 80.2),
        },
        "inline_deit_base": {
            "args": {"img_size": 448, "embed_dim": 384, "num_heads": 12},
            **_inputs(448),
            "params": 23.797,
            "gmacs": 17.2,
            "weights": _weights("10bdd726d4b0435eb34e", 82.3),
        },
    },
)

register(
    InLinePVT,
    **PUBLISHED,
    first_conv="patch_embed.layer.conv",
    models={
        "inline_pvt_tiny": {
            "args": {"depths": (2, 2, 2, 2)},
            "params": 12.032,
            "gmacs": 2.0,
            "weights": _weights("90ac52b1555b401eb5e6", 78.2),
        },
        "inline_pvt_small": {
            "args": {"depths": (3, 4, 6, 3)},
            "params": 21.556,
            "gmacs": 3.9,
            "weights": _weights("1ab953b2479d433080a3", 82.0),
        },
        "inline_pvt_medium": {
            "args": {"depths": (3, 4, 18, 3)},
            "params": 37.619,
            "gmacs": 6.9,
            "weights": _weights("a72aec31e6084bc0a280", 83.2),
        },
        "inline_pvt_large": {
            "args": {"depths": (3, 8, 27, 3)},
            "params": 51.154,
            "gmacs": 10.2,
            "weights": _weights("efd91318ba964f01b288", 83.6),
        },
    },
)

SWIN_BASE = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "attn_type": "IIMS2"}
CSWIN_BASE = {"dims": (96, 192, 384, 768), "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}

register(
    InLineSwin,
    **PUBLISHED,
    first_conv="patch_embed.conv",
    models={
        "inline_swin_tiny": {
            "params": 29.224,
            "gmacs": 4.5,
            "weights": _weights("32810869fcc34410966b", 82.4),
        },
        "inline_swin_small": {
            "args": {"depths": (2, 2, 18, 2), "attn_type": "IISS"},
            "params": 49.793,
            "gmacs": 8.7,
            "weights": _weights("e9657fd247c04c7cb1a1", 83.6),
        },
        "inline_swin_base": {
            "args": SWIN_BASE,
            "params": 88.350,
            "gmacs": 15.4,
            "weights": _weights("bf23564bb64c420aafe1", 84.1),
        },
        # A published configuration without results.
        "inline_swin_base_384": {
            "args": SWIN_BASE | {"window": 96},
            **_inputs(384),
            "preprocess": {"crop_pct": 1.0},
        },
    },
)

register(
    InLineCSwin,
    **PUBLISHED,
    first_conv="patch_embed.conv",
    models={
        "inline_cswin_tiny": {
            "params": 20.605,
            "gmacs": 4.3,
            "weights": _weights("49fa2ecc543647c4b970", 83.2),
        },
        "inline_cswin_small": {
            "args": {"depths": (3, 6, 29, 2)},
            "params": 33.033,
            "gmacs": 6.8,
            "weights": _weights("59f4e65f776f4052b93c", 83.8),
        },
        "inline_cswin_base": {
            "args": CSWIN_BASE,
            "params": 73.414,
            "gmacs": 14.9,
            "weights": _weights("91e17121df284ae38521", 84.5),
        },
        # A published configuration without results.
        "inline_cswin_base_384": {"args": CSWIN_BASE | {"stripes": (1, 2, 12, 0)}, **_inputs(384)},
    },
)
