"""Token mixers on equal terms: any recurrence, any routes, any merge, inside the same frame.

    u = silu(conv3x3(x));   y = merge_k(core(u) along route k);   out = proj(norm(y) * silu(gate(x)))

Only the core differs between two mixers, so what differs between two models is the recurrence. A core turns tokens
(B, L, dim) and a route table (K, S) into the K routes' outputs (B, K, L, dim); projections of queries, keys and values
are shared by the routes, decays and gates are each route's own.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scans import (
    bi_wkv,
    delta_rule,
    gated_delta_rule,
    gla,
    hgrn2,
    kda,
    linear_attention,
    retention,
    rwkv7,
    wkv4,
    wkv6,
)
from ..scans.multi_route import create_merge
from ..scans.routes import parse, table
from .norm import RMSNorm
from .s6 import S6Scan
from .ss2d import SSDScan
from .stems import MapConv2d

__all__ = ["MIXERS", "Mixer"]


class Core(nn.Module):
    """Base of the cores with heads: shared projections of the tokens, and values of every route.

    Args:
        dim: channels in and out.
        n_routes: K.
        head_dim: channels of a head.
        shared: names of the shared projections, each dim wide ("q k v").
        per_route: name -> number of channels, of projections that every route has for itself.
    """

    ordered = True  # whether the order of the tokens matters

    def __init__(self, dim: int, n_routes: int, head_dim: int, shared: str = "q k v", **per_route: int):
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"head_dim divides the channels: {dim} is not a multiple of {head_dim}")
        self.n_routes, self.head_dim, self.n_heads = n_routes, head_dim, dim // head_dim
        self.shared, self.per_route = shared.split(), per_route
        self.proj = nn.Linear(dim, dim * len(self.shared), bias=False)
        self.own = nn.ModuleDict({name: nn.Linear(dim, n_routes * size) for name, size in per_route.items()})

    def tokens(self, u: Tensor) -> list[Tensor]:
        """The shared projections, (B, 1, L, heads, head_dim) each."""
        return [x.unflatten(-1, (self.n_heads, -1)) for x in self.proj(u)[:, None].chunk(len(self.shared), -1)]

    def values(self, name: str, u: Tensor) -> Tensor:
        """A route's own projection in float32: (B, K, L, heads, head_dim), or (B, K, L, heads) if it has one a head."""
        x = self.own[name](u)
        x = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.n_routes, -1)).transpose(1, 2)
        return x if x.shape[-1] == self.n_heads else x.unflatten(-1, (self.n_heads, -1))


class S6(S6Scan):
    """Mamba's selective scan (`selective_scan`), 16 states a channel."""

    ordered = True

    def __init__(self, dim: int, n_routes: int, head_dim: int):
        super().__init__(dim, n_routes)
        self.n_routes = n_routes

    def forward(self, u: Tensor, route: Tensor) -> Tensor:
        return super().forward(u, route, merge=None)


class SSD(SSDScan):
    """Mamba-2's scan (`ssd`), 16 states a channel, a decay a head."""

    ordered = True

    def __init__(self, dim: int, n_routes: int, head_dim: int):
        super().__init__(dim, n_routes, d_state=16, dt_rank=dim // head_dim)
        self.n_routes = n_routes

    def forward(self, u: Tensor, route: Tensor) -> Tensor:
        return super().forward(u, route, merge=None)


class GLA(Core):
    """Gated linear attention (`gla`): a decay a key channel, sigmoid(.)^(1/16)."""

    def __init__(self, dim: int, n_routes: int, head_dim: int):
        super().__init__(dim, n_routes, head_dim, forget=dim)

    def forward(self, u: Tensor, route: Tensor) -> Tensor:
        return gla(*self.tokens(u), F.logsigmoid(self.values("forget", u)) / 16, route=route).flatten(-2)


class Retention(Core):
    """Retention (`retention`): a fixed decay a head."""

    def forward(self, u: Tensor, route: Tensor) -> Tensor:
        return retention(*self.tokens(u), route=route).flatten(-2)


class HGRN2(Core):
    """HGRN-2 (`hgrn2`): the key is what is forgotten."""

    def __init__(self, dim: int, n_routes: int, head_dim: int):
        super().__init__(dim, n_routes, head_dim, "q v", forget=dim)

    def forward(self, u: Tensor, route: Tensor) -> Tensor:
        q, v = self.tokens(u)
        return hgrn2(q, self.values("forget", u), v, route=route).flatten(-2)


class LinearAttention(Core):
    """Normalised linear attention (`linear_attention`) with features elu + 1: no decay."""

    def forward(self, u: Tensor, route: Tensor) -> Tensor:
        q, k, v = self.tokens(u)
        return linear_attention(F.elu(q) + 1, F.elu(k) + 1, v, normalize=True, route=route).flatten(-2)


class DeltaNet(Core):
    """The delta rule (`delta_rule`): a token corrects what the state says of its key."""

    def __init__(self, dim: int, n_routes: int, head_dim: int):
        super().__init__(dim, n_routes, head_dim, beta=dim // head_dim)

    def forward(self, u: Tensor, route: Tensor) -> Tensor:
        q, k, v = self.tokens(u)
        beta = self.values("beta", u).sigmoid()
        return delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, route=route).flatten(-2)


class GatedDeltaNet(Core):
    """The gated delta rule (`gated_delta_rule`): with a decay a head."""

    def __init__(self, dim: int, n_routes: int, head_dim: int):
        super().__init__(dim, n_routes, head_dim, beta=dim // head_dim, forget=dim // head_dim)

    def forward(self, u: Tensor, route: Tensor) -> Tensor:
        q, k, v = self.tokens(u)
        forget, beta = F.logsigmoid(self.values("forget", u)) / 16, self.values("beta", u).sigmoid()
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return gated_delta_rule(q, k, v, forget, beta, route=route).flatten(-2)


class KDA(Core):
    """Kimi delta attention (`kda`): the gated delta rule with a decay a key channel."""

    def __init__(self, dim: int, n_routes: int, head_dim: int):
        super().__init__(dim, n_routes, head_dim, beta=dim // head_dim, forget=dim)

    def forward(self, u: Tensor, route: Tensor) -> Tensor:
        q, k, v = self.tokens(u)
        forget, beta = F.logsigmoid(self.values("forget", u)) / 16, self.values("beta", u).sigmoid()
        return kda(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, forget, beta, route=route).flatten(-2)


class WKV4(Core):
    """RWKV-4's attention (`wkv4`): a fixed decay a channel, normalised."""

    recurrence = staticmethod(wkv4)

    def __init__(self, dim: int, n_routes: int, head_dim: int):
        super().__init__(dim, n_routes, head_dim, "k v")
        self.decay = nn.Parameter(torch.linspace(-5, 1, dim).expand(n_routes, -1).clone())
        self.bonus = nn.Parameter(torch.zeros(n_routes, dim))

    def no_weight_decay(self) -> set[str]:
        return {"decay", "bonus"}

    def weights(self, length: int) -> tuple[Tensor, Tensor]:
        """Decay a step and bonus of the own token."""
        return self.decay.exp(), self.bonus

    def forward(self, u: Tensor, route: Tensor) -> Tensor:
        k, v = (x.flatten(-2) for x in self.tokens(u))
        return self.recurrence(k, v, *self.weights(u.shape[1]), route=route)


class BiWKV4(WKV4):
    """Vision-RWKV's attention (`bi_wkv`): both sides of a token at once, decay by distance over length."""

    recurrence = staticmethod(bi_wkv)

    def weights(self, length: int) -> tuple[Tensor, Tensor]:
        return self.decay / length, self.bonus / length


class WKV6(Core):
    """RWKV-6's attention (`wkv6`): a decay a token and key channel, a bonus for the own token."""

    def __init__(self, dim: int, n_routes: int, head_dim: int):
        super().__init__(dim, n_routes, head_dim, "r k v", decay=dim)
        self.bonus = nn.Parameter(torch.zeros(n_routes, self.n_heads, head_dim))

    def no_weight_decay(self) -> set[str]:
        return {"bonus"}

    def forward(self, u: Tensor, route: Tensor) -> Tensor:
        decay = -torch.exp(self.values("decay", u) - 3)  # starts near exp(-0.05) a token
        return wkv6(*self.tokens(u), decay, self.bonus, scale=self.head_dim**-0.5, route=route).flatten(-2)


class WKV7(Core):
    """RWKV-7's attention (`rwkv7`): decay, removal and writing, all by the token."""

    def __init__(self, dim: int, n_routes: int, head_dim: int):
        super().__init__(dim, n_routes, head_dim, "r k v", decay=dim, remove=dim)

    def forward(self, u: Tensor, route: Tensor) -> Tensor:
        r, k, v = self.tokens(u)
        decay = -math.exp(-0.5) * self.values("decay", u).sigmoid()
        remove = self.values("remove", u).sigmoid()
        return rwkv7(r, k * remove, v, decay, F.normalize(k, dim=-1), remove, route=route).flatten(-2)


class SoftmaxAttention(Core):
    """Softmax attention, the control: quadratic, and blind to the order of tokens."""

    ordered = False

    def forward(self, u: Tensor, route: Tensor) -> Tensor:
        q, k, v = (x[:, 0].transpose(1, 2) for x in self.tokens(u))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, None]


MIXERS: dict[str, type] = {
    "s6": S6,
    "ssd": SSD,
    "gla": GLA,
    "retention": Retention,
    "hgrn2": HGRN2,
    "linear": LinearAttention,
    "delta": DeltaNet,
    "gated_delta": GatedDeltaNet,
    "kda": KDA,
    "wkv4": WKV4,
    "bi_wkv4": BiWKV4,
    "wkv6": WKV6,
    "wkv7": WKV7,
    "softmax": SoftmaxAttention,
}


class Mixer(nn.Module):
    """A token mixer over a map (B, H, W, dim) -> (B, H, W, dim), in the frame that all of `MIXERS` share.

    Args:
        dim: channels.
        mixer: a name of `MIXERS`.
        routes: spec of the routes, for `linescan.scans.routes.parse`.
        merge: name for `linescan.scans.multi_route.create_merge`: "sum", "mean", "gate", "concat", "channel_attention".
        head_dim: channels of a head.

    Raises:
        ValueError: unknown mixer, route or merge, or heads that do not divide the channels.
    """

    def __init__(
        self, dim: int, mixer: str = "s6", routes="row,-row,col,-col", merge: str = "mean", head_dim: int = 32
    ):
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"unknown mixer {mixer!r}; there are: {', '.join(MIXERS)}")
        self.routes = parse(routes)
        n_routes = len(self.routes) if MIXERS[mixer].ordered else 1
        self.conv = MapConv2d(dim, dim, 3, padding=1, groups=dim)
        self.core = MIXERS[mixer](dim, n_routes, head_dim)
        self.merge = create_merge(merge, dim, n_routes)
        self.norm = RMSNorm(self.merge.out_dim)
        self.gate = nn.Linear(dim, self.merge.out_dim)
        self.proj = nn.Linear(self.merge.out_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:3])
        u = F.silu(self.conv(x)).flatten(1, 2)
        y = self.merge(self.core(u, table(self.routes, grid, x.device)))
        return self.proj(self.norm(y).unflatten(1, grid) * F.silu(self.gate(x)))
