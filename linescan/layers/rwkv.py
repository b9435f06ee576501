"""The blocks of Vision-RWKV: shifts, spatial mixes of versions 4 and 6, channel mix (arXiv 2403.02308)."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from ..scans import bi_wkv, bi_wkv6

__all__ = ["ChannelMix", "QuadShift", "RWKVBlock", "SpatialMix", "SpatialMix6"]

HEAD_DIM = 64  # channels of a head of VRWKV6


class QuadShift(nn.Module):
    """Each token's channels in five groups: those of its left, right, upper and lower neighbour, and its own.

    Where there is no neighbour stand zeros. Tokens after those of the grid (class tokens) pass as they are.

    Args:
        num_heads: the groups are formed in each head.
        gamma: share of the channels in each of the first four groups.
        pixels: distance of the neighbours.
    """

    def __init__(self, num_heads: int = 1, gamma: float = 0.25, pixels: int = 1):
        super().__init__()
        self.num_heads, self.gamma, self.pixels = num_heads, gamma, pixels

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, H * W + classes, C), grid (H, W) -> the same shape."""
        patches = grid[0] * grid[1]
        down, across = (min(self.pixels, size) for size in grid)
        y = x[:, :patches].unflatten(1, grid).unflatten(-1, (self.num_heads, -1))
        ends = [int(y.shape[-1] * self.gamma * k) for k in range(1, 5)]
        left, right, above, below, own = y.tensor_split(ends, -1)
        y = torch.cat(
            [
                F.pad(left, (0, 0, 0, 0, across, -across)),
                F.pad(right, (0, 0, 0, 0, -across, across)),
                F.pad(above, (0, 0, 0, 0, 0, 0, down, -down)),
                F.pad(below, (0, 0, 0, 0, 0, 0, -down, down)),
                own,
            ],
            -1,
        )
        y = y.flatten(3).flatten(1, 2)
        return y if x.shape[1] == patches else torch.cat([y, x[:, patches:]], 1)


def ramp(dim: int, power: float) -> Tensor:
    """(h / dim) ** power for channels h = 0..dim - 1."""
    return (torch.arange(dim, dtype=torch.float32) / dim) ** power


def decay_ramp(dim: int, depth: float) -> Tensor:
    """From 0 at the first channel to 1 at the last, the steeper the deeper; `depth` is 0 in the first block, 1 last."""
    return (torch.arange(dim, dtype=torch.float32) / max(dim - 1, 1)) ** (0.7 + 1.3 * depth)


def ripple(dim: int) -> Tensor:
    """0, 0.5, -0.5 times two, channel by channel: what tells neighbouring channels' bonuses apart."""
    return (torch.arange(dim) + 1) % 3 - 1.0


class SpatialMix(nn.Module):
    """Token mixer of VRWKV: y = W_o (sigmoid(r) * BiWKV(k, v)), with r, k, v from tokens blended with their neighbours.

    Decay and bonus are divided by the number of tokens, so that weights fall alike over grids of any size.

    Args:
        dim: channels.
        shift: the neighbours.
        depth: place of the block from 0 to 1, for the initialisation.
        key_norm: LayerNorm of Bi-WKV's output.
    """

    def __init__(self, dim: int, shift: QuadShift, depth: float, key_norm: bool = False):
        super().__init__()
        self.shift = shift
        self.decay = nn.Parameter(-5 + 8 * decay_ramp(dim, depth)[None])  # (routes, dim), as the first below
        self.first = nn.Parameter(torch.full((1, dim), 0.3).log() + 0.5 * ripple(dim))
        self.mix_k = nn.Parameter(ramp(dim, 1 - depth)[None, None])
        self.mix_v = nn.Parameter(self.mix_k.detach() + 0.3 * depth)
        self.mix_r = nn.Parameter(ramp(dim, 0.5 * (1 - depth))[None, None])
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key_norm = nn.LayerNorm(dim) if key_norm else nn.Identity()
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        near = self.shift(x, grid)
        k, v, r = (
            layer(torch.lerp(near, x, mix.to(x.dtype)))
            for layer, mix in ((self.key, self.mix_k), (self.value, self.mix_v), (self.receptance, self.mix_r))
        )
        length = x.shape[1]
        y = bi_wkv(k[:, None], v[:, None], self.decay / length, self.first / length)[:, 0]
        return self.output(torch.sigmoid(r) * self.key_norm(y))


class SpatialMix6(nn.Module):
    """Token mixer of VRWKV6: matrix states forward and backward, with decays and blends that depend on the token.

    Args:
        dim: channels, a multiple of 64.
        shift: the neighbours.
        depth: place of the block from 0 to 1, for the initialisation.
        key_norm: LayerNorm of the states' readout, before the norm of the heads.
        mix_rank: rank of the blends' dependence on the token.
        decay_rank: rank of the decays' dependence.
    """

    def __init__(
        self,
        dim: int,
        shift: QuadShift,
        depth: float,
        key_norm: bool = False,
        mix_rank: int = 32,
        decay_rank: int = 64,
    ):
        super().__init__()
        self.shift = shift
        self.num_heads = dim // HEAD_DIM
        near = 1 - ramp(dim, 1 - depth)
        gates = 1 - ramp(dim, 0.5 * (1 - depth))
        self.mix_x = nn.Parameter(near[None, None].clone())
        self.mix = nn.Parameter(torch.stack([near, near, near - 0.3 * depth, gates, gates])[:, None])  # w, k, v, r, g
        self.mix_w1 = nn.Parameter(torch.empty(dim, 5 * mix_rank).uniform_(-1e-4, 1e-4))
        self.mix_w2 = nn.Parameter(torch.empty(5, mix_rank, dim).uniform_(-1e-4, 1e-4))
        self.decay = nn.Parameter(-6 + 5 * decay_ramp(dim, depth)[None, None])
        self.decay_w1 = nn.Parameter(torch.empty(dim, decay_rank).uniform_(-1e-4, 1e-4))
        self.decay_w2 = nn.Parameter(torch.empty(decay_rank, dim).uniform_(-1e-4, 1e-4))
        bonus = depth * (1 - torch.arange(dim) / max(dim - 1, 1)) + 0.1 * ripple(dim)
        self.bonus = nn.Parameter(bonus.unflatten(0, (self.num_heads, HEAD_DIM)))
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.key_norm = nn.LayerNorm(dim) if key_norm else nn.Identity()
        self.head_norm = nn.GroupNorm(self.num_heads, dim)
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        step = self.shift(x, grid) - x
        mix = torch.tanh((x + step * self.mix_x) @ self.mix_w1).unflatten(-1, (5, -1))
        mix = self.mix[:, None] + torch.einsum("blgr,grc->gblc", mix, self.mix_w2)
        w, k, v, r, g = x + step * mix
        w = self.decay + torch.tanh(w @ self.decay_w1) @ self.decay_w2
        w = -torch.exp(w.to(torch.promote_types(w.dtype, torch.float32)))
        r, k, v, w = (
            t.unflatten(-1, (self.num_heads, HEAD_DIM))[:, None]
            for t in (self.receptance(r), self.key(k), self.value(v), w)
        )
        y = self.key_norm(bi_wkv6(r, k, v, w, self.bonus)[:, 0].flatten(2))
        y = self.head_norm(y.flatten(0, 1)).view_as(y)
        return self.output(y * F.silu(self.gate(g)))


class ChannelMix(nn.Module):
    """The MLP of RWKV: y = sigmoid(r) * W_v relu(W_k x_k)^2, from tokens blended with their neighbours.

    Args:
        dim: channels.
        shift: the neighbours.
        depth: place of the block from 0 to 1, for the initialisation.
        key_norm: LayerNorm of the hidden channels.
    """

    def __init__(self, dim: int, shift: QuadShift, depth: float, key_norm: bool = False):
        super().__init__()
        self.shift = shift
        self.mix_k = nn.Parameter(ramp(dim, 1 - depth)[None, None])
        self.mix_r = nn.Parameter(ramp(dim, 1 - depth)[None, None])
        self.key = nn.Linear(dim, 4 * dim, bias=False)
        self.key_norm = nn.LayerNorm(4 * dim) if key_norm else nn.Identity()
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        near = self.shift(x, grid)
        k = self.key(torch.lerp(near, x, self.mix_k.to(x.dtype)))
        r = self.receptance(torch.lerp(near, x, self.mix_r.to(x.dtype)))
        return torch.sigmoid(r) * self.value(self.key_norm(F.relu(k).square()))


class RWKVBlock(nn.Module):
    """Spatial mix, then channel mix: each x + scale * mix(norm(x)), or x + scale * norm(mix(x)) with `post_norm`.

    The first block normalises the stream itself before (`pre_norm`).
    """

    def __init__(
        self,
        dim: int,
        shift: QuadShift,
        spatial_mix: type,
        depth: float,
        post_norm: bool,
        key_norm: bool,
        init_values: float | None,
        drop_path: float,
    ):
        super().__init__()
        self.post_norm = post_norm
        self.pre_norm = nn.LayerNorm(dim) if depth == 0 else nn.Identity()
        self.norm1 = nn.LayerNorm(dim)
        self.spatial_mix = spatial_mix(dim, shift, depth, key_norm)
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.channel_mix = ChannelMix(dim, shift, depth, key_norm)
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.pre_norm(x)
        for norm, mix, scale in (
            (self.norm1, self.spatial_mix, self.ls1),
            (self.norm2, self.channel_mix, self.ls2),
        ):
            y = norm(mix(x, grid)) if self.post_norm else mix(norm(x), grid)
            x = x + self.drop_path(scale(y))
        return x
