"""The S6 scan as a module: input-dependent steps, B and C from the tokens, one set of parameters a route.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv 2312.00752.
"""

import math
from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import known
from ..scans import selective_scan
from ..scans.matmul import project_routes
from ..scans.multi_route import MultiRoute
from ..scans.recurrence import precise
from ..scans.routes import RouteLike
from .blocks import TokenMixer

__all__ = ["CROSS", "S6Scan", "init_dt_bias"]

CROSS = "row, col, -row, -col"  # VMamba's cross-scan, in the order of its parameters


def init_dt_bias(shape: tuple[int, ...], dt_min: float = 1e-3, dt_max: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """Biases whose softplus is log-uniform in [dt_min, dt_max]: the inverse softplus of such steps."""
    dt = torch.exp(torch.rand(shape) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp_min(floor)
    return dt + torch.log(-torch.expm1(-dt))


class S6Scan(TokenMixer):
    """Tokens (B, L, D) through an S6 recurrence along K routes, each with its own projections, A, D and steps.

        dt, B, C = x_proj[k] u;    y[k] = S6(u, softplus(dt_proj[k] dt + dt_bias[k]), -exp(A_log[k]), B, C, D[k])

    `project` makes dt, B and C of the tokens, `scan` runs the recurrence and merges, for systems that change them
    between: exchange C, add a prompt to it, or pass states.

    Args:
        dim: D, channels.
        routes: what `MultiRoute` takes.
        d_state: N, state size per channel.
        dt_rank: R, rank of the step-size projection; None for ceil(dim / 16).
        init: "v0" (Mamba's: steps log-uniform in [1e-3, 1e-1], A = -1..-N), "v1" (A_log normal, dt_proj and dt_bias
            0.1 normal) or "v2" (A = -1, dt_proj and dt_bias 0.1 uniform).
        shared: "" (every route its own parameters), "inputs" (all routes share x_proj, dt_proj, dt_bias and D and
            differ in A alone), or "all".
        merge: how the routes' outputs become one, see `MultiRoute`.
    """

    multi_route = MultiRoute

    def __init__(
        self,
        dim: int,
        routes: RouteLike | Sequence[RouteLike] | int = CROSS,
        d_state: int = 16,
        dt_rank: int | None = None,
        init: str = "v0",
        shared: str = "",
        merge: str | Callable[[int, int], nn.Module] = "sum",
    ):
        super().__init__()
        self.along = self.multi_route(selective_scan, routes, merge, dim)
        n_routes = self.along.n_routes
        rank = dt_rank or math.ceil(dim / 16)
        sets = 1 if known("shared", shared, ("", "inputs", "all")) else n_routes
        self.split = rank, d_state, d_state
        self.x_proj = nn.Parameter(torch.empty(sets, rank + 2 * d_state, dim))
        self.dt_proj = nn.Parameter(torch.empty(sets, dim, rank))
        self.dt_bias = nn.Parameter(torch.empty(sets, dim))
        self.A_log = nn.Parameter(torch.empty(1 if shared == "all" else n_routes, dim, d_state))
        self.D = nn.Parameter(torch.ones(sets, dim))
        self.init = known("init", init, ("v0", "v1", "v2"))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialisation `init`; nothing on the meta device."""
        if self.x_proj.is_meta:
            return
        bound = self.x_proj.shape[-1] ** -0.5
        nn.init.uniform_(self.x_proj, -bound, bound)
        nn.init.ones_(self.D)
        if self.init == "v0":
            rank, d_state = self.split[:2]
            nn.init.uniform_(self.dt_proj, -(rank**-0.5), rank**-0.5)
            self.dt_bias.copy_(init_dt_bias(self.dt_bias.shape))
            self.A_log.copy_(torch.arange(1, d_state + 1, dtype=torch.float32).log().expand_as(self.A_log))
        else:
            simple_init(self.init, self.A_log, self.dt_proj, self.dt_bias)

    def no_weight_decay(self) -> set[str]:
        """D; the steps' biases are decayed as the authors do (their rank, too, is two)."""
        return {"D"}

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens u (B, K or 1, L, D) -> dt (B, K, L, R), B and C (B, K, L, N); with shared inputs K may be 1."""
        return project_routes(u, self.x_proj).split(self.split, -1)

    def scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None = None, **options):
        """Runs the recurrence over what `project` made and merges the routes.

        Args:
            u: tokens (B, K or 1, L, D).
            dt, B, C: of `project`, or what became of them.
            z: gate (B, K or 1, L, D) of the output.
            options: `grid` or `route`, `initial_state` (B, K, D, N), `return_final_state`; of `MultiRoute`.

        Returns:
            (B, L, D), or a pair of that and the state (B, K, D, N).
        """
        u, delta, projection = self.steps(u, dt)
        A, D, dt_bias = map(self._per_route, (self.decays(), self.D, self.added_to_dt()))
        return self.along(u, delta, A, B, C, D, z, dt_bias, delta_softplus=True, **projection, **options)

    def steps(self, u: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the recurrence reads: tokens, and step sizes before bias and softplus, which it may project itself."""
        return u, dt, {"delta_weight": self.dt_proj}

    def decays(self) -> Tensor:
        """A, (K or 1, D, N), in float32 at least."""
        return -torch.exp(precise(self.A_log))

    def added_to_dt(self) -> Tensor:
        """What is added to dt_proj dt before softplus, (K or 1, D)."""
        return self.dt_bias

    def _per_route(self, x: Tensor) -> Tensor:
        n_routes = self.along.n_routes
        return x if x.shape[0] == n_routes else x.repeat(n_routes, *[1] * (x.ndim - 1))

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], **options) -> tuple[Tensor, Tensor]:
        u = x[:, None]
        return self.scan(u, *self.project(u), grid=grid, **options)


def simple_init(init: str, A_log: Tensor, *steps: Tensor) -> None:
    """The initialisations "v1" and "v2" of VMamba, in place."""
    if init == "v1":
        nn.init.normal_(A_log)
    else:
        nn.init.zeros_(A_log)
    for x in steps:
        x.copy_(0.1 * (torch.randn(x.shape) if init == "v1" else torch.rand(x.shape)))
