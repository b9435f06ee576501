"""The Mamba mixer over routes: an S6 layer whose convolution and scan read the tokens in any order; and Mamba-2's.

Gu and Dao, arXiv 2312.00752; scanned forward and backward as in Vim (arXiv 2401.09417), or along any set of routes.
Mamba-2: Dao and Gu, arXiv 2405.21060.
"""

import math
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..scans import causal_conv1d, ssd
from ..scans.routes import RouteLike, pad_slots
from ..scans.visits import first_routes
from .blocks import Block, TokenMixer
from .linear import linear
from .norm import RMSNorm, at_least_float32
from .pos_embed import rotate_pairs
from .s6 import S6Scan, init_dt_bias

__all__ = ["Mamba2Mixer", "MambaMixer", "TurnedBlock", "stack_routes"]


class MambaMixer(S6Scan):
    """Token mixer over tokens or maps: in_proj, then per route causal conv, SiLU and S6, gate, merge, out_proj.

    Every route has its own convolution, x_proj, dt_proj, A and D, stacked on the first axis of one parameter; in_proj,
    the gate and out_proj are shared. The state is that of the convolution (B, K, D, d_conv - 1), and of the scan
    (B, K, D, d_state).

    Args:
        dim: channels of the stream.
        routes: of the K scans, see `MultiRoute`.
        d_state: N, state size per channel.
        d_conv: taps of the causal convolution.
        expand: inner channels D as a multiple of `dim`.
        dt_rank: R, rank of the step-size projection; None for ceil(dim / 16).
        shared: what the routes have in common, see `S6Scan`. With "inputs" ("v1" of Vim) there is one convolution,
            along the first route; with "all" every route has its own, of the same parameters (RSMamba).
        scale: factor on the merged output.
        init_layer_scale: initial value of a learned factor per output channel; None for none.
        merge: how the routes' outputs become one, see `MultiRoute`.
    """

    def __init__(
        self,
        dim: int,
        routes: RouteLike | Sequence[RouteLike] | int = "row, -row",
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        shared: str = "",
        scale: float = 1.0,
        init_layer_scale: float | None = None,
        merge: str | Callable[[int, int], nn.Module] = "sum",
    ):
        inner = int(expand * dim)
        super().__init__(inner, routes, d_state, dt_rank or math.ceil(dim / 16), shared=shared, merge=merge)
        self.scale = scale
        self.convolutions = 1 if shared == "inputs" else self.along.n_routes
        sets, bound = len(self.D), d_conv**-0.5
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(sets, inner, d_conv).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(sets, inner).uniform_(-bound, bound))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.gamma = nn.Parameter(torch.full((dim,), init_layer_scale)) if init_layer_scale is not None else None

    def no_weight_decay(self) -> set[str]:
        """Biases and D: one value per channel, stacked over routes, so that their rank does not tell."""
        return {"conv_bias", "dt_bias", "D"}

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What in_proj gave, (B, L, 2 D) -> what is scanned and what gates it, (B, K or 1, L, D) each."""
        return x.unsqueeze(1).chunk(2, -1)

    def mix_tokens(
        self,
        x: Tensor,
        grid: tuple[int, ...],
        route: Tensor | None = None,
        initial_state: tuple[Tensor, Tensor] | None = None,
        **options,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        length, keep = x.shape[1], None
        before_conv, before_scan = initial_state or (None, None)
        route = self.along.table(grid, x.device) if route is None else route
        x = linear(self.in_proj, x)
        if route.shape[-1] > length:  # padding is no longer zero after the convolution, so it needs tokens of its own
            route, slots = pad_slots(route, length)
            x, keep = F.pad(x, (0, 0, 0, slots)), length
        u, z = self.branches(x)
        n_convs, weight, bias = self.convolutions, self.conv_weight, self.conv_bias
        if weight.shape[0] != n_convs:  # one set for all of them
            weight, bias = weight.expand(n_convs, -1, -1), bias.expand(n_convs, -1)
        u, after_conv = causal_conv1d(
            u,
            weight,
            bias,
            activation="silu",
            route=first_routes(route, n_convs),
            initial_state=before_conv,
            **options,
        )
        options |= {"grid": grid, "route": route, "initial_state": before_scan, "keep": keep}
        y, after_scan = self.scan(u, *self.project(u), z, **options)
        y = linear(self.out_proj, y)
        y = y * self.scale if self.scale != 1.0 else y  # here there are fewer channels
        return y if self.gamma is None else y * self.gamma, (after_conv, after_scan)


class Mamba2Mixer(TokenMixer):
    """Token mixer along one route: in_proj, causal convolution of x, B and C, SSD, gate, RMSNorm, out_proj.

        z, xBC, dt = in_proj(u);    x, B, C = silu(conv(xBC))
        y = SSD(x, softplus(dt + dt_bias), -exp(A_log), B, C) + D x;    out = out_proj(norm(y silu(z)))

    One group of B and C serves all heads. The state is that of the convolution (B, 1, channels, d_conv - 1), and of the
    scan (B, 1, heads, d_state, head_dim).

    Args:
        dim: channels of the stream.
        d_state: N, state size per channel.
        d_conv: taps of the causal convolution.
        expand: inner channels as a multiple of `dim`.
        head_dim: channels of a head.

    Raises:
        InputError: the inner channels do not divide into heads.
    """

    def __init__(self, dim: int, d_state: int = 64, d_conv: int = 4, expand: float = 2, head_dim: int = 64):
        super().__init__()
        inner = int(expand * dim)
        if inner % head_dim:
            raise InputError(f"{inner} channels do not divide into heads of {head_dim}")
        heads, scanned = inner // head_dim, inner + 2 * d_state
        self.split, self.head_dim, bound = (inner, d_state, d_state), head_dim, d_conv**-0.5
        self.in_proj = nn.Linear(dim, inner + scanned + heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(1, scanned, d_conv).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(1, scanned).uniform_(-bound, bound))
        self.dt_bias = nn.Parameter(init_dt_bias((1, heads)))
        self.A_log = nn.Parameter(torch.empty(1, heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(1, heads))
        self.norm = RMSNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def no_weight_decay(self) -> set[str]:
        """What has one value per channel or head."""
        return {"conv_bias", "dt_bias", "A_log", "D"}

    def mix_tokens(
        self,
        x: Tensor,
        grid: tuple[int, ...],
        route: Tensor | None = None,
        initial_state: tuple[Tensor, Tensor] | None = None,
        **options,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        before_conv, before_scan = initial_state or (None, None)
        z, scanned, dt = linear(self.in_proj, x).split((self.split[0], sum(self.split), self.dt_bias.shape[1]), -1)
        u, after_conv = causal_conv1d(
            scanned[:, None], self.conv_weight, self.conv_bias, activation="silu", route=route,
            initial_state=before_conv, **options,
        )  # fmt: skip
        u, B, C = u.split(self.split, -1)
        A = -at_least_float32(self.A_log).exp()
        y, after_scan = ssd(
            u.unflatten(-1, (-1, self.head_dim)), dt[:, None], A, B.unsqueeze(-2), C.unsqueeze(-2), self.D,
            dt_bias=self.dt_bias, dt_softplus=True, route=route, initial_state=before_scan, **options,
        )  # fmt: skip
        y = self.norm(y.flatten(-2).squeeze(1) * F.silu(z))
        return linear(self.out_proj, y), (after_conv, after_scan)


class TurnedBlock(Block):
    """A `Block` that first turns the stream by rotary tables, where they are given (`rotate_pairs`)."""

    def forward(self, x: Tensor, grid: tuple[int, ...] | None = None, rope: tuple | None = None, **options):
        """x (B, L, dim), the grid of the tokens if they stand on one, rotary tables (L, dim) -> (B, L, dim)."""
        if rope is not None:
            cos, sin = rope
            x = rotate_pairs(x, cos, sin)
        return super().forward(x, grid, **options)


# Our parameters, stacked over routes, and what published files call the row of one route.
ROWS = {
    "conv_weight": "conv1d{}.weight",
    "conv_bias": "conv1d{}.bias",
    "x_proj": "x_proj{}.weight",
    "dt_proj": "dt_proj{}.weight",
    "dt_bias": "dt_proj{}.bias",
    "A_log": "A{}_log",
    "D": "D{}",
}


def stack_routes(
    state: dict[str, Tensor], prefix: str, mixer: MambaMixer, suffixes: Sequence[str] = ("", "_b"), **names: str
) -> dict[str, Tensor]:
    """Takes the tensors of all routes below `prefix` out of `state`; returns them stacked, by the mixer's own names.

    Args:
        state: tensors of a file; what is taken is removed.
        prefix: of the file's keys.
        mixer: which parameters there are, for how many routes.
        suffixes: what stands for {} in `ROWS`, route by route; by default as in Vim's files.
        names: names that depart from `ROWS`.

    Raises:
        KeyError: a tensor is missing.
    """
    out = {}
    for name, pattern in {**ROWS, **names}.items():
        count = len(getattr(mixer, name))
        rows = [state.pop(prefix + pattern.format(suffix)) for suffix in suffixes[:count]]
        out[name] = torch.stack([row.squeeze(1) if row.ndim == 3 else row for row in rows])
    return out
