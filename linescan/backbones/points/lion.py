"""LION: voxels of a LiDAR scan in long groups, each mixed by a linear-time operator, as the height shrinks.

Paper: "LION: Linear Group RNN for 3D Object Detection in Point Clouds", Liu et al., NeurIPS 2024, arXiv 2407.18232.
Official code: github.com/happinesslz/LION (Apache-2.0). The block of xLSTM is written from its papers ("xLSTM", Beck et
al., arXiv 2405.04517; "Vision-LSTM", Alkin et al., arXiv 2406.04303): the authors' file of it is AGPL-3.0.

Voxels are ordered window after window, along x first and then along y (`window_order`), and cut into groups of up to
4,096 (`group_table`), which a layer reads as sequences and writes back to their places. A submanifold convolution
restores what is local, voxels are merged and taken apart again as in a small U-Net, and between two blocks the height
is halved and empty voxels are added around the strongest ones, so that features spread over the ground.
"""

from functools import partial
from typing import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn

from ...checkpoint import rename
from ...errors import InputError, known
from ...layers.blocks import Block, TokenMixer, run
from ...layers.linear import linear
from ...layers.mamba import MambaMixer, stack_routes
from ...layers.mlp import GatedMlp, Mlp
from ...layers.norm import LayerNorm, RMSNorm, RowNorm
from ...layers.pos_embed import rotate_pairs
from ...layers.rwkv import ChannelMix, Place, RWKVBlock, SpatialMix6, TokenShift, from_official
from ...layers.sparse import Sites, SparseTensor, SubmanifoldConv, from_spconv, scatter, unique_cells
from ...scans import causal_conv1d, mlstm, retention, ttt_linear
from ...scans.routes import group_table, table, window_order
from ...scans.visits import read, write

__all__ = ["LION", "OPERATORS", "LIONBlock", "LIONLayer", "MLSTMMixer", "PositionMLP", "RetentionMixer", "TTTMixer",
           "VoxelMerging"]  # fmt: skip

# -- operators: what mixes a group (groups, size, dim) -> the same -----------------------------------------------------


class RetentionMixer(TokenMixer):
    """Retention over all tokens before, and over those behind in the same chunk of 64, with the decay of the distance.

    Sun et al., "Retentive Network", arXiv 2307.08621, as LION's kernel has it: without rotation, norm and gate.

    Args:
        dim: channels.
        num_heads: heads of dim / num_heads keys and twice as many values.
        chunk: tokens of a chunk.
    """

    def __init__(self, dim: int, num_heads: int, chunk: int = 64):
        super().__init__()
        self.num_heads, self.chunk = num_heads, chunk
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.o_proj = nn.Linear(2 * dim, dim, bias=False)

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], **options) -> tuple[Tensor, None]:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (linear(layer, x).unflatten(-1, (self.num_heads, -1))[:, None] for layer in projections)
        y = retention(q, k, v)[:, 0] + self.behind(q[:, 0], k[:, 0], v[:, 0])
        return linear(self.o_proj, y.flatten(2)), None

    def behind(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the tokens behind in a chunk add; (B, L, H, d) each -> that of v."""
        length = q.shape[1]
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -length % self.chunk)).unflatten(1, (-1, self.chunk)) for x in (q, k, v))
        place = torch.arange(self.chunk, device=q.device)
        distance = (place - place[:, None]).clamp_min(0)
        gamma = 1 - 2.0 ** (-5 - torch.arange(self.num_heads, device=q.device, dtype=torch.float64))
        decay = torch.triu(gamma[:, None, None] ** distance, 1).to(q.dtype) * q.shape[-1] ** -0.5
        weights = torch.einsum("bcthd,bcshd->bchts", q, k) * decay
        return torch.einsum("bchts,bcshd->bcthd", weights, v).flatten(1, 2)[:, :length]


class GroupMamba(MambaMixer):
    """Mamba along a group and back, whose decays are computed in float32 whatever the dtype, as published."""

    def decays(self) -> Tensor:
        return -torch.exp(self.A_log.float()).to(self.A_log.dtype)


class PlainRMSNorm(RMSNorm):
    """Root-mean-square norm that divides in float32 whatever the dtype, as published."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


class OffsetNorm(nn.Module):
    """Layer norm, or with several heads one for each, whose weight is kept as what it has more than 1.

    Args:
        dim: channels.
        num_heads: heads that are normalised by themselves.
    """

    def __init__(self, dim: int, num_heads: int = 1):
        super().__init__()
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.unflatten(-1, (self.num_heads, -1)), (x.shape[-1] // self.num_heads,)).flatten(-2)
        return x * (1 + self.weight) + self.bias


class BlockLinear(nn.Module):
    """A linear map of each block of four neighbouring channels: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, block: int = 4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim // block, block, block) * (2 / (5 * block)) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, self.weight.shape[:2])
        return torch.einsum("...bi,boi->...bo", blocks, self.weight).flatten(-2) + self.bias


class MLSTMMixer(TokenMixer):
    """The layer of Vision-LSTM around an mLSTM, along one route.

        u, z = proj_up(x);    c = silu(conv(u));    q, k, v = Q c, K c, V u;    i, f = gates(q, k, v)
        y = proj_down((norm(mLSTM(q, k, v, i, f)) + skip * c) * silu(z))

    Args:
        dim: channels; inside there are twice as many.
        route: of convolution and recurrence, as `linescan.scans.routes` names it.
        num_heads: heads of the mLSTM.
    """

    def __init__(self, dim: int, route: str, num_heads: int = 4):
        super().__init__()
        inner = 2 * dim
        self.route, self.num_heads = route, num_heads
        self.proj_up = nn.Linear(dim, 2 * inner)
        self.conv_weight = nn.Parameter(torch.empty(1, inner, 4).uniform_(-0.5, 0.5))
        self.conv_bias = nn.Parameter(torch.zeros(1, inner))
        self.q_proj, self.k_proj, self.v_proj = BlockLinear(inner), BlockLinear(inner), BlockLinear(inner)
        self.input_gate = nn.Linear(3 * inner, num_heads)
        self.forget_gate = nn.Linear(3 * inner, num_heads)
        self.norm = OffsetNorm(inner, num_heads)
        self.skip = nn.Parameter(torch.ones(inner))
        self.proj_down = nn.Linear(inner, dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """That of Vision-LSTM: gates start from their biases alone, and forget little."""
        for gate in (self.input_gate, self.forget_gate):
            nn.init.zeros_(gate.weight)
        nn.init.normal_(self.input_gate.bias, std=0.1)
        self.forget_gate.bias.copy_(torch.linspace(3, 6, self.num_heads))
        nn.init.zeros_(self.proj_up.bias)
        nn.init.zeros_(self.proj_down.bias)

    def no_weight_decay(self) -> set[str]:
        """One value per channel, with a route's axis before it."""
        return {"conv_bias"}

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], route: Tensor | None = None, **options):
        route = table(self.route, grid, x.device) if route is None else route
        u, z = linear(self.proj_up, x).chunk(2, -1)
        c = causal_conv1d(u[:, None], self.conv_weight, self.conv_bias, activation="silu", route=route, merge="sum")
        q, k, v = self.q_proj(c), self.k_proj(c), self.v_proj(u)
        both = torch.cat([q, k, v], -1)
        gates = (linear(gate, both)[:, None] for gate in (self.input_gate, self.forget_gate))
        q, k, v = (y.unflatten(-1, (self.num_heads, -1))[:, None] for y in (q, k, v))
        y = mlstm(q, k, v, *gates, route=route, merge="sum").flatten(-2)
        return linear(self.proj_down, (self.norm(y) + self.skip * c) * F.silu(z)), None


class TTTMixer(TokenMixer):
    """TTT-Linear: a linear model under a layer norm for each head, trained on mini-batches of 16 tokens as they come.

    Sun et al., arXiv 2407.04620. Queries and keys turn with the place in the mini-batch.

    Args:
        dim: channels.
        num_heads: heads.
        mini_batch: tokens of a mini-batch.
    """

    def __init__(self, dim: int, num_heads: int, mini_batch: int = 16):
        super().__init__()
        self.num_heads, self.head_dim, self.mini_batch = num_heads, dim // num_heads, mini_batch
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in "qkvo")
        self.rate = nn.Linear(dim, num_heads)
        self.token = nn.Parameter(torch.zeros(mini_batch))  # what the rate of a place has more than 1 / place
        self.start = nn.Parameter(0.02 * torch.randn(num_heads, self.head_dim, self.head_dim))
        self.start_bias = nn.Parameter(torch.zeros(num_heads, 1, self.head_dim))
        self.weight = nn.Parameter(torch.ones(num_heads, self.head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, self.head_dim))
        self.norm = LayerNorm(dim, eps=1e-6)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.rate):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.rate.bias)

    def no_weight_decay(self) -> set[str]:
        """What is a value per place or channel of each head."""
        return {"token", "start_bias", "weight", "bias"}

    def turns(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (length, 1, head_dim), of float32 angles as published."""
        place = torch.arange(length, device=like.device) % self.mini_batch
        freqs = 10000.0 ** (-torch.arange(0, self.head_dim, 2, device=like.device) / self.head_dim)
        angle = torch.outer(place.float(), freqs).repeat_interleave(2, -1)[:, None]
        return angle.cos().to(like), angle.sin().to(like)

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], **options) -> tuple[Tensor, None]:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (linear(layer, x).unflatten(-1, (self.num_heads, -1)) for layer in projections)
        turns = self.turns(x.shape[1], q)
        q, k = rotate_pairs(q, *turns), rotate_pairs(k, *turns)
        rate = linear(self.rate, x).sigmoid()[:, None] / self.head_dim
        token = 1 / torch.arange(1, self.mini_batch + 1, device=x.device).to(self.token) + self.token
        start = torch.cat([self.start, self.start_bias], 1).expand(len(x), 1, -1, -1, -1)
        state = start, torch.zeros_like(start)
        q, k, v = (y[:, None] for y in (q, k, v))
        y = ttt_linear(q, k, v, rate, token, self.weight, self.bias, initial_state=state, merge="sum")
        return linear(self.o_proj, self.norm(y.flatten(2))), None


class TokenStep(TokenShift):
    """The step from each token to the one before, in place of that one: what LION's channel mix blends tokens with."""

    def forward(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """x (B, L, C) -> the same shape."""
        return super().forward(x, grid) - x


class TTTBlock(Block):
    """A `Block` without stochastic depth in its MLP."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


def mamba(dim: int, place: Place, drop_path: float, **args) -> nn.Module:
    """Mamba forwards and backwards (arXiv 2312.00752), normalised behind."""
    return Block(dim, GroupMamba(dim, "row, -row", **args), post_norm=True, drop_path=drop_path)


def retnet(dim: int, place: Place, drop_path: float, num_heads: int = 4) -> nn.Module:
    """Retention (arXiv 2307.08621) and an MLP."""
    norm = partial(LayerNorm, eps=1e-6)
    return Block(dim, RetentionMixer(dim, num_heads), Mlp(dim, 4 * dim), norm, drop_path=drop_path)


def rwkv(dim: int, place: Place, drop_path: float, num_heads: int = 4) -> nn.Module:
    """RWKV-6 (arXiv 2404.05892), its recurrence on both sides, its shifts from the token before."""
    return RWKVBlock(
        dim,
        SpatialMix6(dim, TokenShift(), place, head_dim=dim // num_heads),
        ChannelMix(dim, TokenStep(), place),
        scale_layer=partial(LayerScale, init_values=1e-5),
        drop_path=drop_path,
        pre_norm=place.index == 0,
    )


def xlstm(dim: int, place: Place, drop_path: float, num_heads: int = 4) -> nn.Module:
    """mLSTM forwards, then another backwards (arXiv 2406.04303)."""
    return nn.Sequential(
        *(Block(dim, MLSTMMixer(dim, route, num_heads), norm_layer=OffsetNorm, drop_path=drop_path)
          for route in ("row", "-row"))
    )  # fmt: skip


def ttt(dim: int, place: Place, drop_path: float, num_heads: int = 4) -> nn.Module:
    """TTT-Linear (arXiv 2407.04620) and a gated MLP."""
    mlp = GatedMlp(dim, 2 * dim, nn.SiLU, bias=False, gate_first=True)
    return TTTBlock(dim, TTTMixer(dim, num_heads), mlp, partial(PlainRMSNorm, eps=1e-6), drop_path=drop_path)


OPERATORS: dict[str, Callable[..., nn.Module]] = {
    "mamba": mamba, "retnet": retnet, "rwkv": rwkv, "xlstm": xlstm, "ttt": ttt,
}  # fmt: skip
"""By name: (dim, place, drop_path, own arguments) -> a module that mixes sequences (B, L, dim)."""


# -- layers over voxels ------------------------------------------------------------------------------------------------


class LIONLayer(nn.Module):
    """Two operators, one over groups along x, then one over groups along y.

    Args:
        operators: the two.
        window: cells of a window along z, y and x.
        group: voxels of a group.
        shift: whether windows begin half a window earlier.
    """

    def __init__(self, operators: Sequence[nn.Module], window: Sequence[int], group: int, shift: bool):
        super().__init__()
        self.blocks = nn.ModuleList(operators)
        self.window, self.group, self.shift = tuple(window), group, shift
        self.grad_checkpointing = False

    def groups(self, sites: Sites, axes: str) -> Tensor:
        """The table (K, group) of the groups, kept with the sites."""

        def make() -> Tensor:
            order = window_order(sites.coords, self.window, axes, self.shift)
            return group_table(order, sites.coords[:, 0].bincount(minlength=sites.batch_size), self.group)

        return sites.cached(("groups", self.window, self.group, self.shift, axes), make)

    def forward(self, x: SparseTensor) -> SparseTensor:
        if not len(x.sites):  # all parameters have gradients: another process that trains along waits for them
            return x.replace(x.features + 0 * sum(p.sum() for p in self.parameters()))
        features = x.features[None, None]
        for block, axes in zip(self.blocks, ("xyz", "yxz")):
            route = self.groups(x.sites, axes)
            y = run(block, read(features, route)[0], checkpointing=self.grad_checkpointing)
            features = write(y[None], route, len(x.sites), merge=True)[:, None]
        return x.replace(features[0, 0])


class VoxelMerging(nn.Module):
    """Neighbouring voxels become one, after a convolution; before that, voxels may be added.

    Args:
        dim: channels.
        scale: cells along z, y and x that become one.
        share: of the voxels of each sample, those with the largest mean channel, around which others are added in its
            diagonals of x and y, with zeros; 0 for none.
        step: cells along x and y from a voxel to those that are added.
        diagonals: how many are added around each, 4 or 2.
    """

    def __init__(self, dim: int, scale: Sequence[int], share: float = 0.0, step: int = 1, diagonals: int = 4):
        super().__init__()
        self.scale, self.share, self.step, self.diagonals = tuple(scale), share, step, diagonals
        self.conv = SubmanifoldConv(dim, dim)
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)

    def forward(self, x: SparseTensor) -> tuple[SparseTensor, Tensor]:
        """The merged voxels, ascending by (b, x, y, z), and of each voxel, and of each added one, which it went to."""
        sites = x.sites
        y = F.gelu(self.norm1(self.conv(x).features))
        coords = sites.coords
        if self.share:
            added = self.around(sites, y.detach().mean(-1))
            coords = torch.cat([coords, added])
            y = torch.cat([y, y.new_zeros(len(added), y.shape[1])])
        cells = coords.clone()
        cells[:, 1:] = coords[:, 1:].div(coords.new_tensor(self.scale), rounding_mode="floor")
        cells, index = unique_cells(cells[:, [0, 3, 2, 1]])
        shape = [-(-n // s) for n, s in zip(sites.shape, self.scale)]
        y = self.norm2(scatter(y, index, len(cells)))
        return SparseTensor(y, Sites(cells[:, [0, 3, 2, 1]], shape, sites.batch_size)), index

    def around(self, sites: Sites, score: Tensor) -> Tensor:
        """The coordinates of the voxels to add: sample after sample, diagonal after diagonal."""
        found = []
        counts = sites.coords[:, 0].bincount(minlength=sites.batch_size).tolist()
        steps = sites.coords.new_tensor([(0, 0, 1, -1), (0, 0, 1, 1), (0, 0, -1, -1), (0, 0, -1, 1)])
        steps = self.step * steps[: self.diagonals]
        sample = sites.coords[:, 0].argsort(stable=True)
        for coords, own in zip(sites.coords[sample].split(counts), score[sample].split(counts)):
            best = own.topk(int(self.share * len(own))).indices
            found.append((coords[best] + steps[:, None]).flatten(0, 1))
        last = sites.coords.new_tensor([sites.batch_size, *sites.shape]) - 1
        return torch.cat(found).clamp_min(0).minimum(last)


class PositionMLP(nn.Sequential):
    """Where a voxel is in its grid, as features: x, y and z from -pi to pi, through two linear layers."""

    def __init__(self, dim: int):
        super().__init__(nn.Linear(3, dim), RowNorm(dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, x: SparseTensor) -> Tensor:
        size = x.features.new_tensor(x.sites.shape)
        place = (x.sites.coords[:, 1:] - size / 2) / size * 2 * 3.1415
        return super().forward(place.flip(1))


class LIONBlock(nn.Module):
    """A small U-Net: layers on ever coarser voxels, and back.

    Args:
        dim: channels.
        layer: shift -> a `LIONLayer`; called in the order in which the layers run.
        scales: what merges voxels after each layer of the way down.
    """

    def __init__(self, dim: int, layer: Callable[[bool], LIONLayer], scales: Sequence[Sequence[int]]):
        super().__init__()
        levels = range(len(scales))
        self.encoder = nn.ModuleList(layer(i % 2 == 1) for i in levels)
        self.pos = nn.ModuleList(PositionMLP(dim) for _ in levels)
        self.merges = nn.ModuleList(VoxelMerging(dim, scale) for scale in scales)
        self.decoder = nn.ModuleList(layer(i % 2 == 1) for i in levels)
        self.norms = nn.ModuleList(LayerNorm(dim) for _ in levels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        kept = []
        for layer, pos, merge in zip(self.encoder, self.pos, self.merges):
            x = layer(x.replace(x.features + pos(x)))
            merged, index = merge(x)
            kept.append((x, index))
            x = merged
        for layer, norm in zip(self.decoder, self.norms):
            y = layer(x).features
            x, index = kept.pop()
            x = x.replace(norm(x.features + y[index]))
        return x


# -- the backbone ------------------------------------------------------------------------------------------------------


class LION(nn.Module):
    """Voxels of any number -> voxels of two heights, or with `flat_windows` of one.

    Args:
        dim: channels of all voxels, in and out.
        operator: what mixes a group: a name of `OPERATORS`.
        operator_args: its own arguments.
        groups: voxels of a group in each block.
        windows: sides of the windows in each block, along z, y and x.
        scales: what merges voxels inside a block.
        share: of the voxels around which others are added, as the height is halved between two blocks.
        flat_windows: windows of the layers, if any, that follow on a map of one height.
        drop_path_rate: stochastic depth, the same everywhere.

    Raises:
        InputError: no such operator, or windows and groups are not equally many.
    """

    def __init__(
        self,
        dim: int = 128,
        operator: str = "mamba",
        operator_args: Mapping | None = None,
        groups: Sequence[int] = (4096, 2048, 1024, 512),
        windows: Sequence[Sequence[int]] = ((32, 13, 13), (16, 13, 13), (8, 13, 13), (4, 13, 13)),
        scales: Sequence[Sequence[int]] = ((2, 2, 2), (2, 2, 2)),
        share: float = 0.2,
        flat_windows: Sequence[int] = (),
        drop_path_rate: float = 0.2,
    ):
        super().__init__()
        if len(groups) != len(windows):
            raise InputError(f"a block has groups and windows: {len(groups)} and {len(windows)} are given")
        make = OPERATORS[known("operator", operator, OPERATORS)]
        self.num_features = self.dim = dim
        self.operator = operator
        layers = 2 * len(scales) * len(groups) + 1 + len(flat_windows)
        count = iter(range(2 * layers))

        def layer(shift: bool, window: Sequence[int], group: int) -> LIONLayer:
            places = [Place(next(count), 2 * layers) for _ in range(2)]
            args = operator_args or {}
            return LIONLayer([make(dim, place, drop_path_rate, **args) for place in places], window, group, shift)

        self.blocks, self.merges = nn.ModuleList(), nn.ModuleList()
        for window, group in zip(windows, groups):
            self.blocks.append(LIONBlock(dim, partial(layer, window=window, group=group), scales))
            self.merges.append(VoxelMerging(dim, (2, 1, 1), share))
        self.out = layer(True, (2, 13, 13), 256)
        self.flatten = VoxelMerging(dim, (2, 1, 1), share) if flat_windows else None
        self.flat = nn.ModuleList(layer(True, (1, side, side), 512 * 2**i) for i, side in enumerate(flat_windows))

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Voxels with features (N, dim) in a grid (z, y, x), z = 2^(blocks + 1) -> voxels in (2, y, x), or (y, x)."""
        for block, merge in zip(self.blocks, self.merges):
            x, _ = merge(block(x))
        x = self.out(x)
        if self.flatten is None:
            return x
        x, _ = self.flatten(x)
        for layer in self.flat:
            x = layer(x)
        coords = x.sites.coords[:, [0, 2, 3]]
        return SparseTensor(x.features, Sites(coords, x.sites.shape[1:], x.sites.batch_size))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute what each operator keeps in the backward pass, as the authors always do."""
        for module in self.modules():
            if isinstance(module, LIONLayer):
                module.grad_checkpointing = enable

    # -- weights ----------------------------------------------------------------------------------------------------

    checkpoint_nesting = ("model_state",)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keys of an official file, of a whole detector or of the backbone alone, to ours; own keys pass."""
        prefix = "backbone_3d."
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        return from_spconv(operators_from_official(rename(state, OFFICIAL_KEYS), self), self)


def operators_from_official(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The same tensors with the operators named and shaped as in `module`."""
    state = from_official(rename(state, OPERATOR_KEYS))
    for name, part in module.named_modules():
        if isinstance(part, MambaMixer) and f"{name}.A_b_log" in state:
            state |= {f"{name}.{k}": v for k, v in stack_routes(state, f"{name}.", part).items()}
        elif isinstance(part, MLSTMMixer) and f"{name}.conv.weight" in state:
            state[f"{name}.conv_weight"] = state.pop(f"{name}.conv.weight").squeeze(1)[None]
            state[f"{name}.conv_bias"] = state.pop(f"{name}.conv.bias")[None]
        elif isinstance(part, TTTMixer) and f"{name}.learnable_ttt_lr_weight" in state:
            state[f"{name}.rate.weight"] = state.pop(f"{name}.learnable_ttt_lr_weight").squeeze(1)
            state[f"{name}.rate.bias"] = state.pop(f"{name}.learnable_ttt_lr_bias").squeeze(1)
        elif isinstance(part, TTTBlock) and f"{name}.mlp.gate_proj.weight" in state:
            halves = [state.pop(f"{name}.mlp.{half}_proj.weight") for half in ("gate", "up")]
            state[f"{name}.mlp.fc1.weight"] = torch.cat(halves)
    return state


OFFICIAL_KEYS = (
    (r"^linear_(\d)\.", lambda found: f"blocks.{int(found[1]) - 1}."),
    (r"^dow(\d)\.", lambda found: f"merges.{int(found[1]) - 1}."),
    (r"^linear_out\.", "out."),
    (r"^dow_out\.", "flatten."),
    (r"^linear_bev(\d)\.", lambda found: f"flat.{int(found[1]) - 1}."),
    (r"\.pos_emb_list\.(\d)\.position_embedding_head\.", r".pos.\1."),
    (r"\.downsample_list\.", ".merges."),
    (r"\.decoder_norm\.", ".norms."),
    (r"(merges\.\d|flatten)\.sub_conv\.0\.", r"\1.conv."),
    (r"(merges\.\d|flatten)\.sub_conv\.1\.", r"\1.norm1."),
    (r"(merges\.\d|flatten)\.norm\.", r"\1.norm2."),
)
OPERATOR_KEYS = (
    (r"\.mamba\.", ".mixer."),
    (r"\.(blocks\.\d)\.norm\.", r".\1.norm1."),
    (r"\.retention_layer_norm\.", ".norm1."),
    (r"\.multi_scale_retention\.", ".mixer."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.ffn\.fc", ".mlp.fc"),
    (r"\.rowwise_from_top_left\.", ".0."),
    (r"\.rowwise_from_bot_right\.", ".1."),
    (r"\.([01])\.norm\.", r".\1.norm1."),
    (r"\.([01])\.layer\.", r".\1.mixer."),
    (r"\.mixer\.learnable_skip$", ".mixer.skip"),
    (r"\.mixer\.conv\.conv\.", ".mixer.conv."),
    (r"\.mlstm_cell\.igate\.", ".input_gate."),
    (r"\.mlstm_cell\.fgate\.", ".forget_gate."),
    (r"\.mlstm_cell\.outnorm\.", ".norm."),
    (r"\.seq_modeling_block\.", ".mixer."),
    (r"\.seq_norm\.", ".norm1."),
    (r"\.ffn_norm\.", ".norm2."),
    (r"\.mixer\.learnable_token_idx$", ".mixer.token"),
    (r"\.mixer\.ttt_norm_(weight|bias)$", r".mixer.\1"),
    (r"\.mixer\.W1$", ".mixer.start"),
    (r"\.mixer\.b1$", ".mixer.start_bias"),
    (r"\.mixer\.post_norm\.", ".mixer.norm."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
