"""The blocks of Vision-RWKV: shifts, spatial mixes of versions 4 and 6, channel mix (arXiv 2403.02308)."""

from typing import Iterable, Mapping, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from .._compat import is_observed
from ..checkpoint import rename
from ..scans import bi_wkv, bi_wkv6, matmul
from ..scans.kernels import cpu
from ..scans.multi_route import MultiRoute
from ..scans.ops.published import bi_wkv_kernel
from ..scans.recurrence import is_plain, precise, wants_gradient
from .blocks import Block, TokenMixer
from .linear import linear
from .norm import LayerNorm

__all__ = [
    "ChannelMix",
    "KernelMix",
    "Place",
    "QuadShift",
    "RWKVBlock",
    "SpatialMix",
    "SpatialMix6",
    "TokenShift",
    "from_official",
]

HEAD_DIM = 64  # channels per head of VRWKV6


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
        (height, width), patches = grid, grid[0] * grid[1]
        down, across = (min(self.pixels, size) for size in grid)
        y = x[:, :patches].unflatten(1, grid).unflatten(-1, (self.num_heads, -1))
        ends = [int(y.shape[-1] * self.gamma * k) for k in range(1, 5)]
        around = F.pad(y, (0, 0, 0, 0, across, across, down, down)).tensor_split(ends, -1)
        places = (down, 0), (down, 2 * across), (0, across), (2 * down, across), (down, across)
        y = torch.cat(
            [part[:, top : top + height, left : left + width] for part, (top, left) in zip(around, places)], -1
        )
        y = y.flatten(3).flatten(1, 2)
        return y if x.shape[1] == patches else torch.cat([y, x[:, patches:]], 1)


class TokenShift(nn.Module):
    """The token before, of all channels; zeros before the first: the shift of RWKV's language models."""

    def forward(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """x (B, L, C) -> the same shape; the grid does not matter."""
        return F.pad(x[:, :-1], (0, 0, 1, 0))


class Neighbours:
    """Tokens x (B, L, C) on a grid and what `shift` gives for them, to be blended; without gradients by a kernel."""

    def __init__(self, shift: nn.Module, x: Tensor, grid: tuple[int, int]):
        self.shift, self.x, self.grid = shift, x, grid
        self.step: Tensor | None = None

    def keeping(self, *mixes: Tensor) -> Iterable[Tensor]:
        """Blends near + mix (x - near) with each of `mixes` (1, 1, C): what a token keeps of itself."""
        blends = self._by_kernel(mixes, own=True)
        if blends is not None:
            return blends
        near = self.shift(self.x, self.grid)
        return [torch.lerp(near, self.x, mix.to(self.x.dtype)) for mix in mixes]

    def stepping(self, mixes: Tensor, added: Tensor | None = None) -> Iterable[Tensor]:
        """Blends x + mix (near - x): how far a token goes.

        Args:
            mixes: (K, 1, C).
            added: to the mixes, (K, B, L, C); it is used up.
        """
        blends = self._by_kernel((mixes,), own=False, added=added)
        if blends is not None:
            return blends
        if self.step is None:
            self.step = self.shift(self.x, self.grid) - self.x
        sums = mixes if added is None else (mix + more for mix, more in zip(mixes, added))
        return [torch.addcmul(self.x, self.step, mix) for mix in sums]

    def _by_kernel(self, mixes: tuple[Tensor, ...], own: bool, added: Tensor | None = None) -> Iterable[Tensor] | None:
        shift, inputs = self.shift, (self.x, added, *mixes)
        if not is_plain(inputs) or wants_gradient(inputs) or type(shift) is not QuadShift or is_observed(shift):
            return None
        mix = torch.cat(mixes) if len(mixes) > 1 else mixes[0]
        blends = cpu.shift_blend(self.x, mix, self.grid, shift.num_heads, shift.gamma, shift.pixels, own, added)
        return None if blends is None else blends.unbind()


class Place(NamedTuple):
    """Where a block stands, of how many: what RWKV starts from depends on it.

    Attributes:
        index: its number.
        total: how many blocks there are.
    """

    index: int
    total: int

    @property
    def depth(self) -> float:
        """0 for the first block, 1 for the last."""
        return self.index / max(self.total - 1, 1)

    @property
    def left(self) -> float:
        """1 for the first block, 1 / total for the last."""
        return 1 - self.index / self.total


def ramp(dim: int, power: float) -> Tensor:
    """(h / dim) ** power for channels h = 0..dim - 1."""
    return (torch.arange(dim, dtype=torch.float32) / dim) ** power


def decay_ramp(dim: int, depth: float) -> Tensor:
    """From 0 at the first channel to 1 at the last, the steeper the deeper; `depth` is 0 in the first block, 1 last."""
    return (torch.arange(dim, dtype=torch.float32) / max(dim - 1, 1)) ** (0.7 + 1.3 * depth)


def ripple(dim: int) -> Tensor:
    """0, 1, -1 over and over along the channels: what tells neighbouring channels' bonuses apart."""
    return (torch.arange(dim) + 1) % 3 - 1.0


class SpatialMix(TokenMixer):
    """Token mixer of VRWKV: y = W_o (sigmoid(r) * BiWKV(k, v)), with r, k, v from tokens blended with their neighbours.

    Decay and bonus are divided by the number of tokens, so that weights fall alike over grids of any size. Class tokens
    come after those of the grid.

    Args:
        dim: channels.
        shift: the neighbours.
        place: of the block, for the initialisation.
        key_norm: LayerNorm of Bi-WKV's output.
    """

    def __init__(self, dim: int, shift: QuadShift, place: Place, key_norm: bool = False):
        super().__init__()
        self.shift = shift
        self.along = MultiRoute(bi_wkv, None)  # the weights fall with the distance on both sides: one route is enough
        self.decay = nn.Parameter(-5 + 8 * decay_ramp(dim, place.depth)[None])  # (routes, dim), as the first below
        self.first = nn.Parameter(torch.full((1, dim), 0.3).log() + 0.5 * ripple(dim))
        self.mix_k = nn.Parameter(ramp(dim, place.left)[None, None])
        self.mix_v = nn.Parameter(self.mix_k.detach() + 0.3 * place.depth)
        self.mix_r = nn.Parameter(ramp(dim, 0.5 * place.left)[None, None])
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key_norm = LayerNorm(dim) if key_norm else nn.Identity()
        self.output = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, L, dim) on a grid -> keys, values and receptance, alike."""
        blends = Neighbours(self.shift, x, grid).keeping(self.mix_k, self.mix_v, self.mix_r)
        return tuple(linear(layer, blend) for layer, blend in zip((self.key, self.value, self.receptance), blends))

    def scan(self, k: Tensor, v: Tensor, **options):
        """Bi-WKV of keys and values (B, L, dim) -> (B, L, dim); options of `MultiRoute`."""
        length = k.shape[1]
        return self.along(k[:, None], v[:, None], self.decay / length, self.first / length, **options)

    def mix_tokens(self, x: Tensor, grid: tuple[int, int], **options) -> tuple[Tensor, None]:
        k, v, r = self.project(x, grid)
        y, state = self.scan(k, v, **options)
        return linear(self.output, torch.sigmoid(r) * self.key_norm(y)), state


class KernelMix(SpatialMix):
    """`SpatialMix` whose Bi-WKV is that of the published kernel, which departs a little from the paper's equation."""

    def scan(self, k: Tensor, v: Tensor, **options):
        return bi_wkv_kernel(k, v, self.decay[0] / k.shape[1], self.first[0] / k.shape[1]), None


class SpatialMix6(TokenMixer):
    """Token mixer of VRWKV6: matrix states forward and backward, with decays and blends that depend on the token.

    Args:
        dim: channels, a multiple of `head_dim`.
        shift: the neighbours, a `QuadShift` or a `TokenShift`.
        place: of the block, for the initialisation.
        key_norm: LayerNorm of the states' readout, before the norm of the heads.
        mix_rank: rank of the blends' dependence on the token.
        decay_rank: rank of the decays' dependence.
        head_dim: channels of a head.
    """

    def __init__(
        self,
        dim: int,
        shift: nn.Module,
        place: Place,
        key_norm: bool = False,
        mix_rank: int = 32,
        decay_rank: int = 64,
        head_dim: int = HEAD_DIM,
    ):
        super().__init__()
        self.shift = shift
        self.along = MultiRoute(bi_wkv6, None)
        self.num_heads = dim // head_dim
        near = 1 - ramp(dim, place.left)
        gates = 1 - ramp(dim, 0.5 * place.left)
        self.mix_x = nn.Parameter(near[None, None].clone())
        mixes = near, near, near - 0.3 * place.depth, gates, gates  # of w, k, v, r and g
        self.mix = nn.Parameter(torch.stack(mixes)[:, None])
        self.mix_w1 = nn.Parameter(torch.empty(dim, 5 * mix_rank).uniform_(-1e-4, 1e-4))
        self.mix_w2 = nn.Parameter(torch.empty(5, mix_rank, dim).uniform_(-1e-4, 1e-4))
        self.decay = nn.Parameter(-6 + 5 * decay_ramp(dim, place.depth)[None, None])
        self.decay_w1 = nn.Parameter(torch.empty(dim, decay_rank).uniform_(-1e-4, 1e-4))
        self.decay_w2 = nn.Parameter(torch.empty(decay_rank, dim).uniform_(-1e-4, 1e-4))
        bonus = place.depth * (1 - torch.arange(dim) / max(dim - 1, 1)) + 0.1 * ripple(dim)
        self.bonus = nn.Parameter(bonus.unflatten(0, (self.num_heads, head_dim)))
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.key_norm = LayerNorm(dim) if key_norm else nn.Identity()
        self.head_norm = nn.GroupNorm(self.num_heads, dim)
        self.output = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Tokens (B, L, dim) on a grid -> r, k, v, log decays (B, 1, L, heads, head_dim), and the gate (B, L, dim)."""
        tokens = Neighbours(self.shift, x, grid)
        (blend,) = tokens.stepping(self.mix_x)
        low = torch.tanh(matmul.linear(blend, self.mix_w1.T)).flatten(0, 1).unflatten(-1, (5, -1))
        added = torch.bmm(low.transpose(0, 1), self.mix_w2).unflatten(1, x.shape[:2])
        w, k, v, r, g = tokens.stepping(self.mix, added)
        w = self.decay + matmul.linear(torch.tanh(matmul.linear(w, self.decay_w1.T)), self.decay_w2.T)
        w = torch.exp(precise(w))
        w = -w if w.requires_grad else w.neg_()
        tokens = linear(self.receptance, r), linear(self.key, k), linear(self.value, v), w
        heads = (t.unflatten(-1, (self.num_heads, -1))[:, None] for t in tokens)
        return *heads, linear(self.gate, g)

    def scan(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, **options):
        """Both-sided WKV-6 of what `project` made -> (B, L, heads, head_dim); options of `MultiRoute`."""
        return self.along(r, k, v, w, self.bonus, **options)

    def norm_heads(self, y: Tensor, gate: Tensor) -> Tensor:
        """`head_norm` of every token, gated by SiLU: y, gate (B, L, dim) -> (B, L, dim)."""
        norm = self.head_norm
        if type(norm) is not nn.GroupNorm or is_observed(norm) or not is_plain((y,)) or y.dtype != norm.weight.dtype:
            return norm(y.flatten(0, 1)).view_as(y) * F.silu(gate)
        if not wants_gradient((y, gate, norm.weight, norm.bias)):
            out = cpu.norm(y, norm.weight, norm.bias, norm.eps, norm.num_groups, gate)
            if out is not None:
                return out
        heads = y.unflatten(-1, (norm.num_groups, -1))  # torch's norm of groups goes number by number here
        one = y.new_ones(heads.shape[-1:])
        heads = F.layer_norm(heads, one.shape, one, torch.zeros_like(one), norm.eps)
        return torch.addcmul(norm.bias, heads.view_as(y), norm.weight) * F.silu(gate)

    def mix_tokens(self, x: Tensor, grid: tuple[int, int], **options) -> tuple[Tensor, None]:
        r, k, v, w, gate = self.project(x, grid)
        y, state = self.scan(r, k, v, w, **options)
        return linear(self.output, self.norm_heads(self.key_norm(y.flatten(2)), gate)), state


@register_notrace_module
class ChannelMix(nn.Module):
    """The MLP of RWKV: y = sigmoid(r) * W_v relu(W_k x_k)^2, from tokens blended with their neighbours.

    Args:
        dim: channels.
        shift: the neighbours.
        place: of the block, for the initialisation.
        key_norm: LayerNorm of the hidden channels.
        ratio: hidden channels as a multiple of `dim`.
    """

    def __init__(self, dim: int, shift: nn.Module, place: Place, key_norm: bool = False, ratio: int = 4):
        super().__init__()
        hidden = ratio * dim
        self.shift = shift
        self.mix_k = nn.Parameter(ramp(dim, place.left)[None, None])
        self.mix_r = nn.Parameter(ramp(dim, place.left)[None, None])
        self.key = nn.Linear(dim, hidden, bias=False)
        self.key_norm = LayerNorm(hidden) if key_norm else nn.Identity()
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        k, r = Neighbours(self.shift, x, grid).keeping(self.mix_k, self.mix_r)
        k, r = linear(self.key, k), linear(self.receptance, r)
        own = is_plain((k,)) and not k.requires_grad and type(self.key) is nn.Linear and not is_observed(self.key)
        k = F.relu(k, inplace=own)  # half of the time where nobody else has these numbers
        k = k.square() if k.requires_grad else k.square_()
        return torch.sigmoid(r) * linear(self.value, self.key_norm(k))


class RWKVBlock(Block):
    """A `Block` whose MLP is a `ChannelMix`, which reads the grid as the mixer does.

    Args:
        dim: channels.
        pre_norm: normalise the stream itself first (published: in the first block).
        args, kwargs: of `Block`.
    """

    mlp_reads_context = True

    def __init__(self, dim: int, *args, pre_norm: bool = False, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.pre_norm = LayerNorm(dim) if pre_norm else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None, **options):
        """x (B, H * W + classes, dim), grid (H, W) -> the stream after the block; a `TokenShift` needs no grid."""
        return super().forward(self.pre_norm(x), grid, **options)


# -- files of the authors ----------------------------------------------------------------------------------------------

OFFICIAL_KEYS = (
    (r"\.ln0\.", ".pre_norm."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.gamma([12])$", r".scale\1.gamma"),
    (r"\.att\.", ".mixer."),
    (r"\.ffn\.", ".mlp."),
    (r"\.spatial_(decay|first|mix_[kvr])$", r".\1"),
    (r"\.time_maa_(x|w1|w2)$", r".mix_\1"),
    (r"\.time_(decay|decay_w1|decay_w2)$", r".\1"),
    (r"\.time_faaaa$", ".bonus"),
    (r"\.ln_x\.", ".head_norm."),
)
"""What RWKV's blocks are called in published files, and here."""


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with the blocks of RWKV named and shaped as here; own ones pass as they are."""
    out = rename(state, OFFICIAL_KEYS)
    for key in list(out):
        if key.endswith((".decay", ".first")) and out[key].ndim == 1:
            out[key] = out[key][None]
        elif key.endswith(".time_maa_w"):
            mix = key.removesuffix(".time_maa_w")
            out[f"{mix}.mix"] = torch.cat([out.pop(f"{mix}.time_maa_{name}") for name in "wkvrg"])
    return out
