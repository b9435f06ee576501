"""SS2D: selective scans over a map along several routes, between two projections (VMamba, arXiv 2401.10166).

`S6Scan` is the core that many systems share: tokens in place, one set of S6 parameters a route, any routes. `SSDScan`
is its counterpart with Mamba-2's scalar decays. `SS2D` puts projections, convolution, norm and gate around either.
"""

import copy
import math
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scans import ssd
from ..scans.matmul import project_routes
from ..scans.multi_route import create_merge
from ..scans.routes import parse, table
from .s6 import S6Scan, init_dt_bias, known, simple_init
from .stems import MapConv2d

__all__ = ["CROSS", "SSDScan", "SS2D", "CascadeSS2D"]

CROSS = "row, col, -row, -col"  # VMamba's cross-scan, in the order of its parameters


class SSDScan(nn.Module):
    """Tokens (B, L, D) through Mamba-2's recurrence along K routes: a scalar decay a head (SSD, arXiv 2405.21060).

        dt, B, C = x_proj[k] u;    y[k] = SSD(u, softplus(dt + dt_bias[k]), -exp(A_log[k]), B, C) + D[k] u

    Args:
        dim: D, channels; divided evenly into heads.
        n_routes: K.
        d_state: N, state size per channel.
        dt_rank: number of heads, by the name that it has in `S6Scan`; None for ceil(dim / 16).
        init: as in `S6Scan`.
    """

    def __init__(self, dim: int, n_routes: int = 4, d_state: int = 64, dt_rank: int | None = None, init: str = "v0"):
        super().__init__()
        heads = dt_rank or math.ceil(dim / 16)
        if dim % heads:
            raise ValueError(f"{dim} channels do not divide into {heads} heads")
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

    def forward(self, u: Tensor, route: Tensor, merge: str | None = "sum") -> Tensor:
        """u (B, L, D), route table (K, S) -> (B, L, D) summed over routes, or (B, K, L, D) with merge=None."""
        u = u[:, None]
        dt, B, C = project_routes(u, self.x_proj).split(self.split, -1)
        heads = u.unflatten(-1, (self.split[0], -1))
        y = ssd(
            heads,
            dt,
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            B.unsqueeze(-2),
            C.unsqueeze(-2),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            route=route,
            merge=merge,
        )
        if merge:
            return (y + self.D.sum(0) * heads[:, 0]).flatten(-2)
        return (y + self.D[:, None] * heads).flatten(-2)


class _OverPositions(nn.Module):
    """Softmax over all positions of a map (B, H, W, C), a channel at a time."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).softmax(1).unflatten(1, x.shape[1:3])


OUT_NORMS: dict[str | None, Callable[[int], nn.Module]] = {
    "norm": nn.LayerNorm,
    "none": lambda dim: nn.Identity(),
    "dwconv3": lambda dim: MapConv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
    "cnorm": lambda dim: nn.Sequential(nn.LayerNorm(dim), MapConv2d(dim, dim, 3, padding=1, groups=dim, bias=False)),
    "softmax": lambda dim: _OverPositions(),
    "sigmoid": lambda dim: nn.Sigmoid(),
}


class SS2D(nn.Module):
    """Token mixer over a map (B, H, W, dim): in_proj, depthwise convolution, scans along routes, norm, gate, out_proj.

    Args:
        dim: channels in and out.
        routes: spec of the K routes (`linescan.scans.routes.parse`); parameters of the scan stand in their order.
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
        merge: how the routes' outputs become one: a name for `linescan.scans.multi_route.create_merge`, or a function
            from D and K to a module (B, K, L, D) -> (B, L, D).
        init: of the scan.
        drop_rate: dropout after out_proj.
    """

    def __init__(
        self,
        dim: int,
        routes: str = CROSS,
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
    ):
        super().__init__()
        inner = int(expand * dim)
        known("gate", gate, ("act", "linear", None))
        known("out_norm", out_norm, tuple(OUT_NORMS))
        self.routes = parse(routes)
        self.in_proj = nn.Linear(dim, inner if gate is None else 2 * inner, bias=False)
        self.gate = {"act": act_layer, "linear": nn.Identity, None: lambda: None}[gate]()
        self.conv = None
        if d_conv > 1:
            self.conv = MapConv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=conv_bias)
        self.act = act_layer()
        self.ssm = scan_layer(inner, len(self.routes), d_state, dt_rank or math.ceil(dim / 16), init)
        self.merge = None  # the scan adds up by itself
        if merge != "sum":
            make = partial(create_merge, merge) if isinstance(merge, str) else merge
            self.merge = make(inner, len(self.routes))
        self.out_norm = OUT_NORMS[out_norm](inner)
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.drop = nn.Dropout(drop_rate)

    def scan(self, u: Tensor) -> Tensor:
        """The merged scans of a map: (B, H, W, D) -> (B, H, W, D)."""
        grid = u.shape[1:3]
        route = table(self.routes, grid, u.device)
        u = u.flatten(1, 2)
        y = self.ssm(u, route) if self.merge is None else self.merge(self.ssm(u, route, merge=None))
        return y.unflatten(1, grid)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        x = self.in_proj(x)
        if self.gate is not None:
            x, z = x.chunk(2, -1)
        x = self.act(x if self.conv is None else self.conv(x))
        x = self.out_act(self.out_norm(self.scan(x)))
        if self.gate is not None:
            x = x * self.gate(z)
        return self.drop(self.out_proj(x))


class CascadeSS2D(SS2D):
    """SS2D whose scans run within each row, and then within each column of the result (VMamba's "v052dc").

    Rows are scanned forward with the first route's parameters and backward with the second's, columns with the third's
    and fourth's. As published, the backward scan's output stays in the order of its steps when the two are added.
    """

    def __init__(self, dim: int, routes: str = "row, -row", **kwargs):
        super().__init__(dim, routes, **kwargs)
        if len(self.routes) != 2:
            raise ValueError(f"a cascade scans every line along 2 routes, got {routes!r}")
        self.ssm = nn.ModuleList([self.ssm, copy.deepcopy(self.ssm)])
        self.ssm[1].reset_parameters()

    def scan(self, u: Tensor) -> Tensor:
        for ssm in self.ssm:
            lines = F.layer_norm(u, u.shape[-1:])
            route = table(self.routes, (1, lines.shape[2]), u.device)
            y = ssm(lines.flatten(0, 1), route, merge=None)
            y = y[:, 0] + y[:, 1].flip(1)
            u = y.unflatten(0, lines.shape[:2]).transpose(1, 2)  # to the columns, and back to the rows
        return u
