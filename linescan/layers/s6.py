"""The S6 scan as a module: input-dependent steps, B and C from the tokens, one set of parameters a route.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv 2312.00752.
"""

import math

import torch
from torch import Tensor, nn

from ..scans import selective_scan
from ..scans.matmul import project_routes

__all__ = ["S6Scan", "init_dt_bias"]


def init_dt_bias(shape: tuple[int, ...], dt_min: float = 1e-3, dt_max: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """Biases whose softplus is log-uniform in [dt_min, dt_max]: the inverse softplus of such steps."""
    dt = torch.exp(torch.rand(shape) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp_min(floor)
    return dt + torch.log(-torch.expm1(-dt))


class S6Scan(nn.Module):
    """Tokens (B, L, D) through an S6 recurrence along K routes, each with its own projections, A, D and steps.

        dt, B, C = x_proj[k] u;    y[k] = S6(u, softplus(dt_proj[k] dt + dt_bias[k]), -exp(A_log[k]), B, C, D[k])

    Args:
        dim: D, channels.
        n_routes: K.
        d_state: N, state size per channel.
        dt_rank: R, rank of the step-size projection; None for ceil(dim / 16).
        n_sets: 1 if all routes share x_proj, dt_proj, dt_bias and D and differ in A alone; K by default.
        init: "v0" (Mamba's: steps log-uniform in [1e-3, 1e-1], A = -1..-N), "v1" (A_log normal, dt_proj and dt_bias
            0.1 normal) or "v2" (A = -1, dt_proj and dt_bias 0.1 uniform).
    """

    def __init__(
        self,
        dim: int,
        n_routes: int = 4,
        d_state: int = 16,
        dt_rank: int | None = None,
        init: str = "v0",
        n_sets: int | None = None,
    ):
        super().__init__()
        rank, sets = dt_rank or math.ceil(dim / 16), n_sets or n_routes
        self.split = rank, d_state, d_state
        self.x_proj = nn.Parameter(torch.empty(sets, rank + 2 * d_state, dim))
        self.dt_proj = nn.Parameter(torch.empty(sets, dim, rank))
        self.dt_bias = nn.Parameter(torch.empty(sets, dim))
        self.A_log = nn.Parameter(torch.empty(n_routes, dim, d_state))
        self.D = nn.Parameter(torch.ones(sets, dim))
        self.init = known("init", init, ("v0", "v1", "v2"))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialisation `init`."""
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

    def scan(self, u: Tensor, route: Tensor, z: Tensor | None = None, merge: str | None = "sum") -> Tensor:
        """u and gate z (B, K or 1, L, D), route table (K, S) -> (B, L, D) summed, or (B, K, L, D) with merge=None."""
        dt, B, C = project_routes(u, self.x_proj).split(self.split, -1)
        routes = self.A_log.shape[0]
        return selective_scan(
            u,
            dt,
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            B,
            C,
            self.D.expand(routes, -1),
            z,
            self.dt_bias.expand(routes, -1),
            delta_softplus=True,
            delta_weight=self.dt_proj,
            route=route,
            merge=merge,
        )

    def forward(self, u: Tensor, route: Tensor, merge: str | None = "sum") -> Tensor:
        """u (B, L, D), route table (K, S) -> (B, L, D) summed over routes, or (B, K, L, D) with merge=None."""
        return self.scan(u[:, None], route, merge=merge)


def simple_init(init: str, A_log: Tensor, *steps: Tensor) -> None:
    """The initialisations "v1" and "v2" of VMamba, in place."""
    if init == "v1":
        nn.init.normal_(A_log)
    else:
        nn.init.zeros_(A_log)
    for x in steps:
        x.copy_(0.1 * (torch.randn(x.shape) if init == "v1" else torch.rand(x.shape)))


def known(what: str, value, choices):
    """`value`, if it is one of `choices`; else one clear ValueError."""
    if value not in choices:
        raise ValueError(f"{what} is one of {', '.join(map(repr, choices))}, not {value!r}")
    return value
