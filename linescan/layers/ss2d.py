"""SS2D: selective scans over a map along several routes, between two projections (VMamba, arXiv 2401.10166).

`SS2D` puts projections, convolution, norm and gate around `S6Scan`, or around `SSDScan`, its counterpart with Mamba-2's
scalar decays. `MapScan` is `S6Scan` between two projections alone.
"""

import copy
import math
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, known
from ..scans import ssd
from ..scans.matmul import project_routes
from ..scans.multi_route import MultiRoute
from ..scans.routes import RouteLike
from .blocks import TokenMixer
from .linear import linear
from .norm import LayerNorm
from .s6 import CROSS, S6Scan, init_dt_bias, simple_init
from .stems import depthwise

__all__ = ["ROUTE_FAMILIES", "SS2D_NAMES", "CascadeSS2D", "MapScan", "MultiHeadScan", "SS2D", "SSDScan"]

# What the files of VMamba, and of all that was made from it, call the parameters of an SS2D: for `checkpoint.rename`.
SS2D_NAMES = (
    (r"\.conv2d\.(1\.)?", ".conv."),
    (r"\.x_proj[._]weight", ".ssm.x_proj"),
    (r"\.dt_projs[._]weight", ".ssm.dt_proj"),
    (r"\.dt_projs[._]bias", ".ssm.dt_bias"),
    (r"\.A_logs", ".ssm.A_log"),
    (r"\.Ds", ".ssm.D"),
)


def _ssd_and_skip(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, merge: str | None, **options):
    """`ssd` with a weight D (K, H, P) of the input in the output for every channel."""
    y, state = ssd(x, dt, A, B, C, dt_softplus=True, merge=merge, **options)
    if merge and x.shape[1] == 1:
        return y + D.sum(0) * x[:, 0], state
    skip = D[:, None] * x
    return y + (skip.sum(1) if merge else skip), state


class SSDScan(TokenMixer):
    """Tokens (B, L, D) through Mamba-2's recurrence along K routes: a scalar decay per head (SSD, arXiv 2405.21060).

        dt, B, C = x_proj[k] u;    y[k] = SSD(u, softplus(dt + dt_bias[k]), -exp(A_log[k]), B, C) + D[k] u

    Args:
        dim: D, channels; divided evenly into heads.
        routes: what `MultiRoute` takes.
        d_state: N, state size per channel.
        dt_rank: number of heads, by the name that it has in `S6Scan`; None for ceil(dim / 16).
        init, merge: as in `S6Scan`.
    """

    multi_route = MultiRoute

    def __init__(
        self,
        dim: int,
        routes: RouteLike | Sequence[RouteLike] | int = CROSS,
        d_state: int = 64,
        dt_rank: int | None = None,
        init: str = "v0",
        merge: str | Callable[[int, int], nn.Module] = "sum",
    ):
        super().__init__()
        heads = dt_rank or math.ceil(dim / 16)
        if dim % heads:
            raise InputError(f"{dim} channels do not divide into {heads} heads")
        self.along = self.multi_route(_ssd_and_skip, routes, merge, dim, join_heads=True)
        n_routes = self.along.n_routes
        self.split = heads, d_state, d_state
        self.x_proj = nn.Parameter(torch.empty(n_routes, heads + 2 * d_state, dim))
        self.dt_bias = nn.Parameter(torch.empty(n_routes, heads))
        self.A_log = nn.Parameter(torch.empty(n_routes, heads))
        self.D = nn.Parameter(torch.ones(n_routes, heads, dim // heads))
        self.init = known("init", init, ("v0", "v1", "v2"))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialisation `init`."""
        bound = self.x_proj.shape[-1] ** -0.5
        nn.init.uniform_(self.x_proj, -bound, bound)
        nn.init.ones_(self.D)
        if self.init == "v0":
            self.dt_bias.copy_(init_dt_bias(self.dt_bias.shape))
            nn.init.zeros_(self.A_log)
        else:
            simple_init(self.init, self.A_log, self.dt_bias)

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens u (B, K or 1, L, D) -> dt (B, K, L, heads), B and C (B, K, L, N)."""
        return project_routes(u, self.x_proj).split(self.split, -1)

    def scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, **options):
        """Runs the recurrence over what `project` made and merges the routes; as `S6Scan.scan`, without gate."""
        return self.along(
            u.unflatten(-1, (self.split[0], -1)),
            dt,
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            B.unsqueeze(-2),
            C.unsqueeze(-2),
            self.D,
            dt_bias=self.dt_bias,
            **options,
        )

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], **options) -> tuple[Tensor, Tensor]:
        u = x[:, None]
        return self.scan(u, *self.project(u), grid=grid, **options)


class _OverPositions(nn.Module):
    """Softmax over all positions of a map (B, H, W, C), per channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).softmax(1).unflatten(1, x.shape[1:3])


OUT_NORMS: dict[str | None, Callable[[int], nn.Module]] = {
    "norm": LayerNorm,
    "none": lambda dim: nn.Identity(),
    "dwconv3": lambda dim: depthwise(dim, 3, bias=False),
    "cnorm": lambda dim: nn.Sequential(LayerNorm(dim), depthwise(dim, 3, bias=False)),
    "softmax": lambda dim: _OverPositions(),
    "sigmoid": lambda dim: nn.Sigmoid(),
}


class SS2D(TokenMixer):
    """Token mixer over a map (B, H, W, dim): in_proj, depthwise convolution, scans along routes, norm, gate, out_proj.

    Args:
        dim: channels in and out.
        routes: of the K scans (`MultiRoute`); parameters of the scan stand in their order.
        expand: inner channels D as a multiple of `dim`.
        d_state: N, state size per channel.
        dt_rank: R; None for ceil(dim / 16).
        d_conv: side of the depthwise convolution; below 2 there is none (the activation stays).
        conv_bias: whether it has a bias.
        act_layer: activation after it, and of the gate.
        gate: "act" (the scan's output times act(z), z the second half of in_proj), "linear" (times z) or None.
        out_norm: between scan and gate: "norm" (LayerNorm), "none", "dwconv3" (3x3 depthwise convolution), "cnorm"
            (both), "softmax" (over positions) or "sigmoid".
        out_act: GELU after `out_norm`.
        scan_layer: `S6Scan` or `SSDScan`.
        merge: how the routes' outputs become one, see `MultiRoute`.
        init: of the scan.
        drop_rate: dropout after out_proj.
        project_in, project_out: whether there are in_proj and out_proj; without the former neither gate nor expansion,
            without the latter no expansion.
    """

    def __init__(
        self,
        dim: int,
        routes: RouteLike | Sequence[RouteLike] | int = CROSS,
        expand: float = 2.0,
        d_state: int = 16,
        dt_rank: int | None = None,
        d_conv: int = 3,
        conv_bias: bool = True,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        gate: str | None = "act",
        out_norm: str = "norm",
        out_act: bool = False,
        scan_layer: Callable[..., nn.Module] = S6Scan,
        merge: str | Callable[[int, int], nn.Module] = "sum",
        init: str = "v0",
        drop_rate: float = 0.0,
        project_in: bool = True,
        project_out: bool = True,
    ):
        super().__init__()
        inner = int(expand * dim)
        known("gate", gate, ("act", "linear", None))
        if inner != dim and not (project_in and project_out) or (gate and not project_in):
            raise InputError("SS2D without a projection has as many inner channels as outer ones, and without in_proj "
                             "no gate")  # fmt: skip
        known("out_norm", out_norm, tuple(OUT_NORMS))
        width = inner if gate is None else 2 * inner
        self.in_proj = nn.Linear(dim, width, bias=False) if project_in else nn.Identity()
        self.gate = {"act": act_layer, "linear": nn.Identity, None: lambda: None}[gate]()
        self.conv = depthwise(inner, d_conv, bias=conv_bias) if d_conv > 1 else nn.Identity()
        self.act = act_layer()
        self.ssm = scan_layer(inner, routes, d_state, dt_rank or math.ceil(dim / 16), init, merge=merge)
        self.out_norm = OUT_NORMS[out_norm](inner)
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = nn.Linear(inner, dim, bias=False) if project_out else nn.Identity()
        self.drop = nn.Dropout(drop_rate)

    def scan(self, u: Tensor, *context, **options) -> tuple[Tensor, Tensor | None]:
        """The merged scans of a map: (B, H, W, D) -> (B, H, W, D), and the final state."""
        return self.ssm(u, None, *context, **options)

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], *context, **options) -> tuple[Tensor, Tensor | None]:
        x, z = linear(self.in_proj, x).unflatten(1, grid), None
        if self.gate is not None:
            x, z = x.chunk(2, -1)
        y, state = self.scan(self.act(self.conv(x)), *context, **options)
        y = self.out_act(self.out_norm(y))
        if z is not None:
            y = y * self.gate(z)
        return self.drop(linear(self.out_proj, y)).flatten(1, 2), state


class _AddInOrderOfSteps(nn.Module):
    """Two routes (B, 2, L, D) -> (B, L, D): the second is added in the order of its steps."""

    def forward(self, y: Tensor) -> Tensor:
        return y[:, 0] + y[:, 1].flip(1)


class CascadeSS2D(SS2D):
    """SS2D whose scans run within each row, and then within each column of the result (VMamba's "v052dc").

    Rows are scanned forward with the first route's parameters and backward with the second's, columns with the third's
    and fourth's. As published, the backward scan's output stays in the order of its steps when the two are added. There
    is no state to pass on.
    """

    ssm: nn.ModuleList

    def __init__(self, dim: int, routes: RouteLike | Sequence[RouteLike] | int = "row, -row", **kwargs):
        super().__init__(dim, routes, **{**kwargs, "merge": lambda dim, n_routes: _AddInOrderOfSteps()})
        if self.ssm.along.n_routes != 2:
            raise InputError(f"a cascade scans every line along 2 routes, got {routes!r}")
        self.ssm = nn.ModuleList([self.ssm, copy.deepcopy(self.ssm)])
        self.ssm[1].reset_parameters()

    def scan(self, u: Tensor, route: Tensor | None = None, **options) -> tuple[Tensor, None]:
        for ssm in self.ssm:
            lines = F.layer_norm(u, u.shape[-1:])
            y = ssm(lines.flatten(0, 1), route=route)
            u = y.unflatten(0, lines.shape[:2]).transpose(1, 2)  # to the columns, and back to the rows
        return u, None


ROUTE_FAMILIES = {
    "C": "snake, -snake, T:snake, -T:snake",
    "X": "zigzag, -zigzag, fliplr:zigzag, -fliplr:zigzag",
    "S": "spiral, -spiral, flipud:spiral, -flipud:spiral",
    "Z": "row, -row, col, -col",
}
"""The routes of MHS-VM's heads, by their letters: continuous, diagonal, spiral and raster."""


class MultiHeadScan(TokenMixer):
    """Tokens (B, L, dim) in heads of dim // n channels, each scanned along routes of its own, side by side again.

        h_1, ..., h_n = in_proj(x);    y = out_proj(norm(cat[merge(S6_i(h_i))]))

    Ji, "MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba", 2024, arXiv 2406.05992. A `scan_layer` of
    `SS2D`.

    Args:
        dim: channels in and out.
        routes: of each head; as many heads as there are.
        d_state: N, state size per channel.
        dt_rank: R, of each head; None for ceil(dim // n / 16).
        init: of the scans, see `S6Scan`.
        merge: how the routes of a head become one; as published "route_attention" with a threshold.
        project: False for heads that are only put side by side; n divides dim then.

    Raises:
        InputError: more heads than channels, or n does not divide dim where it must.
    """

    def __init__(
        self,
        dim: int,
        routes: Sequence[RouteLike | Sequence[RouteLike]] = tuple(ROUTE_FAMILIES.values()),
        d_state: int = 16,
        dt_rank: int | None = None,
        init: str = "v0",
        merge: str | Callable[[int, int], nn.Module] = "route_attention",
        project: bool = True,
    ):
        super().__init__()
        width = dim // len(routes)
        if not width or (width * len(routes) != dim and not project):
            raise InputError(f"{dim} channels do not divide into {len(routes)} heads")
        self.in_proj = nn.Linear(dim, width * len(routes), bias=False)
        self.heads = nn.ModuleList(S6Scan(width, own, d_state, dt_rank, init, merge=merge) for own in routes)
        self.norm = LayerNorm(width * len(routes)) if project else nn.Identity()
        self.out_proj = nn.Linear(width * len(routes), dim, bias=False) if project else nn.Identity()

    def mix_tokens(
        self,
        x: Tensor,
        grid: tuple[int, ...],
        *,
        route: Tensor | None = None,
        initial_state: Tensor | None = None,
        **options,
    ) -> tuple[Tensor, Tensor]:
        """As of all mixers; routes and states are those of the heads one after the other."""
        counts = [head.along.n_routes for head in self.heads]
        inputs = linear(self.in_proj, x).chunk(len(self.heads), -1)
        tables = [None] * len(counts) if route is None else route.split(counts, -2)
        states = [None] * len(counts) if initial_state is None else initial_state.split(counts, 1)
        each = [
            head.mix_tokens(one, grid, route=table, initial_state=state, **options)
            for head, one, table, state in zip(self.heads, inputs, tables, states)
        ]
        merged, last = zip(*each)
        return linear(self.out_proj, self.norm(torch.cat(merged, -1))), torch.cat(last, 1)


class MapScan(S6Scan):
    """Tokens or maps through S6 with one state per channel, alone or between two Linear layers.

    Args:
        dim: channels in and out.
        ratio: scanned channels as a multiple of `dim`; if not 1, between two Linear layers.
        routes: of `S6Scan`.
    """

    def __init__(self, dim: int, ratio: float = 1.0, routes: RouteLike | Sequence[RouteLike] | int = CROSS):
        inner = int(ratio * dim)
        super().__init__(inner, routes, d_state=1, dt_rank=math.ceil(dim / 16))
        self.in_proj = nn.Linear(dim, inner) if ratio != 1 else nn.Identity()
        self.out_proj = nn.Linear(inner, dim) if ratio != 1 else nn.Identity()

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], **options) -> tuple[Tensor, Tensor]:
        y, state = super().mix_tokens(linear(self.in_proj, x), grid, **options)
        return linear(self.out_proj, y), state
