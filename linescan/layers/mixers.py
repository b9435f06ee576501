"""Token mixers on equal terms: any recurrence or attention, any routes, any merge, inside the same frame.

    u = silu(conv3x3(x));   y = merge_k(core(u) along route k);   out = proj(norm(y) * silu(gate(x)))

Only the core differs between two mixers, so what differs between two models is the recurrence. A core's `project` makes
the recurrence's inputs of tokens (B, L, dim): projections of queries, keys and values are shared by the routes, each
route has its own decays and gates. Its `scan` runs the recurrence along the K routes and merges.
"""

import math
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import scans
from ..errors import InputError, known
from ..scans.multi_route import MultiRoute, create_merge
from ..scans.routes import RouteLike
from .attention import fit_window, sliding_attention, window_attention
from .blocks import TokenMixer
from .linear import linear
from .neighborhood import neighborhood_attention
from .norm import RMSNorm
from .s6 import S6Scan
from .ss2d import SSDScan
from .stems import depthwise

__all__ = ["MIXERS", "Core", "Mixer"]


class Heads(TokenMixer):
    """Base of the cores with heads: their projections of the tokens.

    Args:
        dim: channels in and out.
        n_routes: K.
        head_dim: channels per head.
        window: odd side of the windows of attentions.

    Raises:
        InputError: heads do not divide the channels, or the window is even.
    """

    shared = "q k v"  # projections that all routes share, dim wide
    per_route: dict[str, str | int] = {}  # those of each route: a value per "channel", per "head", or so many per head

    def __init__(self, dim: int, n_routes: int, head_dim: int, window: int):
        super().__init__()
        if dim % head_dim:
            raise InputError(f"head_dim divides the channels: {dim} is not a multiple of {head_dim}")
        if window < 1 or window % 2 == 0:
            raise InputError(f"windows are odd, got {window}")
        self.n_routes, self.head_dim, self.n_heads, self.window = n_routes, head_dim, dim // head_dim, window
        self.proj = nn.Linear(dim, dim * len(self.shared.split()), bias=False)
        sizes = {"channel": head_dim, "head": 1}
        self.own = nn.ModuleDict(
            {k: nn.Linear(dim, n_routes * self.n_heads * sizes.get(size, size)) for k, size in self.per_route.items()}
        )

    def tokens(self, u: Tensor) -> list[Tensor]:
        """The shared projections, (B, 1, L, heads, head_dim) each."""
        parts = linear(self.proj, u)[:, None].chunk(len(self.shared.split()), -1)
        return [x.unflatten(-1, (self.n_heads, self.head_dim)) for x in parts]

    def values(self, name: str, u: Tensor) -> Tensor:
        """A projection of each route in float32: (B, K, L, heads, values), or (B, K, L, heads) for one per head."""
        x = linear(self.own[name], u)
        x = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.n_routes, self.n_heads, -1))
        return x.movedim(2, 1).squeeze(-1) if self.per_route[name] == "head" else x.movedim(2, 1)

    def project(self, u: Tensor) -> Sequence[Tensor]:
        """Tokens (B, L, dim) -> the inputs of the recurrence."""
        return self.tokens(u)


class Core(Heads):
    """Base of the cores that are a recurrence.

    Args:
        dim, head_dim, window: of `Heads`.
        routes, merge: of `MultiRoute`.
    """

    recurrence: Callable
    joins_heads = True

    def __init__(
        self,
        dim: int,
        routes: RouteLike | Sequence[RouteLike] | int,
        merge: str,
        head_dim: int,
        window: int,
    ):
        along = MultiRoute(self.recurrence, routes, merge, dim, join_heads=self.joins_heads)
        super().__init__(dim, along.n_routes, head_dim, window)
        self.along = along

    def scan(self, *inputs: Tensor, **options):
        """The recurrence over what `project` made, and the merge: (B, L, merge.out_dim); options of `MultiRoute`."""
        return self.along(*inputs, **options)

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], **options) -> tuple[Tensor, Tensor | None]:
        return self.scan(*self.project(x), grid=grid, **options)


class S6(S6Scan):
    """Mamba's selective scan (`selective_scan`), 16 states per channel."""

    def __init__(self, dim: int, routes, merge: str, head_dim: int, window: int):
        super().__init__(dim, routes, merge=merge)


class SSD(SSDScan):
    """Mamba-2's scan (`ssd`), 16 states per channel, a decay per head."""

    def __init__(self, dim: int, routes, merge: str, head_dim: int, window: int):
        super().__init__(dim, routes, d_state=16, dt_rank=dim // head_dim, merge=merge)


# -- decays ------------------------------------------------------------------------------------------------------------


class GLA(Core):
    """Gated linear attention (`gla`): a decay per key channel, sigmoid(.)^(1/16)."""

    recurrence = staticmethod(scans.gla)
    per_route = {"forget": "channel"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        return *self.tokens(u), F.logsigmoid(self.values("forget", u)) / 16


class SimpleGLA(GLA):
    """Gated linear attention with a decay per head (`simple_gla`)."""

    recurrence = staticmethod(scans.simple_gla)
    per_route = {"forget": "head"}


class Retention(Core):
    """Retention (`retention`): a fixed decay per head."""

    recurrence = staticmethod(scans.retention)


class HGRN(Core):
    """HGRN (`hgrn`): every channel a gated sum, without queries and keys."""

    recurrence = staticmethod(scans.hgrn)
    joins_heads = False
    shared = "v"
    per_route = {"forget": "channel"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        (v,) = self.tokens(u)
        forget = F.logsigmoid(self.values("forget", u)) / 16
        return tuple(x.flatten(-2) for x in (-torch.expm1(forget) * F.silu(v), forget))


class HGRN2(Core):
    """HGRN-2 (`hgrn2`): the key is what is forgotten."""

    recurrence = staticmethod(scans.hgrn2)
    shared = "q v"
    per_route = {"forget": "channel"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        q, v = self.tokens(u)
        return q, self.values("forget", u), v


class LogLinear(Core):
    """Log-linear attention (`log_linear_attention`): a decay per head, and a weight per bucket of the past.

    The first 12 levels of buckets have weights of their own, those above share that of the twelfth.
    """

    recurrence = staticmethod(scans.log_linear_attention)
    per_route = {"forget": "head", "weights": 12}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        weights = F.softplus(self.values("weights", u))
        return *self.tokens(u), F.logsigmoid(self.values("forget", u)) / 16, weights

    def scan(self, *inputs: Tensor, grid: tuple[int, ...] | None = None, route: Tensor | None = None, **options):
        *inputs, weights = inputs
        route = self.along.table(grid, weights.device) if route is None else route
        last = options.get("position", 0) + route.shape[-1] - 1
        level = torch.arange(last.bit_length() + 1, device=weights.device).clamp_max(weights.shape[-1] - 1)
        return super().scan(*inputs, weights[..., level], grid=grid, route=route, **options)


class LinearAttention(Core):
    """Normalised linear attention (`linear_attention`) with features elu + 1: no decay."""

    recurrence = staticmethod(scans.linear_attention)

    def project(self, u: Tensor) -> Sequence[Tensor]:
        q, k, v = self.tokens(u)
        return F.elu(q) + 1, F.elu(k) + 1, v

    def scan(self, *inputs: Tensor, **options):
        return super().scan(*inputs, normalize=True, **options)


# -- delta rules -------------------------------------------------------------------------------------------------------


class DeltaNet(Core):
    """The delta rule (`delta_rule`): a token corrects what the state says of its key."""

    recurrence = staticmethod(scans.delta_rule)
    per_route = {"beta": "head"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        q, k, v = self.tokens(u)
        decays = [F.logsigmoid(self.values("forget", u)) / 16] if "forget" in self.own else []
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, *decays, self.values("beta", u).sigmoid()


class GatedDeltaNet(DeltaNet):
    """The gated delta rule (`gated_delta_rule`): with a decay per head."""

    recurrence = staticmethod(scans.gated_delta_rule)
    per_route = {"beta": "head", "forget": "head"}


class KDA(DeltaNet):
    """Kimi delta attention (`kda`): the gated delta rule with a decay per key channel."""

    recurrence = staticmethod(scans.kda)
    per_route = {"beta": "head", "forget": "channel"}


class DPLR(Core):
    """A diagonal plus a low-rank transition (`dplr`): what a learned key reads of the state is removed."""

    recurrence = staticmethod(scans.dplr)
    per_route = {"forget": "channel", "remove": "channel", "strength": "head"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        removed = F.normalize(self.values("remove", u), dim=-1)
        strength = self.values("strength", u).sigmoid().unsqueeze(-1)
        return *self.tokens(u), -removed, removed * strength, F.logsigmoid(self.values("forget", u)) / 16


# -- RWKV --------------------------------------------------------------------------------------------------------------


class WKV4(Core):
    """RWKV-4's attention (`wkv4`): a fixed decay per channel, normalised."""

    recurrence = staticmethod(scans.wkv4)
    joins_heads = False
    shared = "k v"

    def __init__(self, dim: int, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.decay = nn.Parameter(torch.linspace(-5, 1, dim).expand(self.n_routes, -1).clone())
        self.bonus = nn.Parameter(torch.zeros(self.n_routes, dim))

    def no_weight_decay(self) -> set[str]:
        return {"decay", "bonus"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        return *(x.flatten(-2) for x in self.tokens(u)), self.decay.exp(), self.bonus


class BiWKV4(WKV4):
    """Vision-RWKV's attention (`bi_wkv`): both sides of a token at once, decay by distance over length."""

    recurrence = staticmethod(scans.bi_wkv)

    def project(self, u: Tensor) -> Sequence[Tensor]:
        length = u.shape[1]
        return *(x.flatten(-2) for x in self.tokens(u)), self.decay / length, self.bonus / length


class WKV6(Core):
    """RWKV-6's attention (`wkv6`): a decay per token and key channel, a bonus for the own token."""

    recurrence = staticmethod(scans.wkv6)
    shared = "r k v"
    per_route = {"decay": "channel"}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bonus = nn.Parameter(torch.zeros(self.n_routes, self.n_heads, self.head_dim))

    def no_weight_decay(self) -> set[str]:
        return {"bonus"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        decay = -torch.exp(self.values("decay", u) - 3)  # starts near exp(-0.05) per token
        return *self.tokens(u), decay, self.bonus

    def scan(self, *inputs: Tensor, **options):
        return super().scan(*inputs, scale=self.head_dim**-0.5, **options)


class BiWKV6(WKV6):
    """VRWKV6's attention (`bi_wkv6`): that of RWKV-6 over the tokens on both sides."""

    recurrence = staticmethod(scans.bi_wkv6)


class WKV7(Core):
    """RWKV-7's attention (`rwkv7`): decay, removal and writing, all by the token."""

    recurrence = staticmethod(scans.rwkv7)
    shared = "r k v"
    per_route = {"decay": "channel", "remove": "channel"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        r, k, v = self.tokens(u)
        decay = -math.exp(-0.5) * self.values("decay", u).sigmoid()
        remove = self.values("remove", u).sigmoid()
        return r, k * remove, v, decay, F.normalize(k, dim=-1), remove


# -- attention ---------------------------------------------------------------------------------------------------------


class SlidingAttention(Core):
    """Softmax attention to the `window` squared tokens around each on every route (`sliding_attention`)."""

    recurrence = staticmethod(sliding_attention)

    def scan(self, *inputs: Tensor, **options):
        return super().scan(*inputs, window=self.window**2, **options)


class Attention(Heads):
    """Base of the cores that read all tokens of a map, wherever they stand: no routes, no state.

    Subclasses define `attend(q, k, v)` over maps (B, H, W, heads, head_dim).
    """

    def __init__(self, dim: int, routes, merge: str, head_dim: int, window: int):
        super().__init__(dim, 1, head_dim, window)
        self.merge = create_merge(merge, dim, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], **options) -> tuple[Tensor, None]:
        q, k, v = (t[:, 0].unflatten(1, grid) for t in self.project(x))
        y = self.attend(q, k, v).flatten(-2).flatten(1, len(grid))
        return self.merge(y[:, None]), None


class SoftmaxAttention(Attention):
    """Softmax attention, the control: quadratic, and blind to the order of tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = q.shape[1:-2]
        q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, grid)


class GlobalLinearAttention(Attention):
    """Linear attention to all tokens (`global_linear_attention`) with features elu + 1: no order, no decay."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = q.shape[1:-2]
        q, k, v = (x.flatten(1, -3)[:, None] for x in (F.elu(q) + 1, F.elu(k) + 1, v))
        return scans.global_linear_attention(q, k, v)[:, 0].unflatten(1, grid)


class WindowAttention(Attention):
    """Softmax attention within windows that tile the map (`window_attention`)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, self.window)


class NeighborhoodAttention(Attention):
    """Softmax attention to the window around each token (`neighborhood_attention`), as large as the map lets it be."""

    dilation = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sides = q.shape[1:3]
        window = tuple(fit_window(self.window, side) for side in sides)
        dilation = tuple(max(1, min(self.dilation, side // w)) for side, w in zip(sides, window))
        return neighborhood_attention(q, k, v, window, dilation, scale=self.head_dim**-0.5)


class DilatedAttention(NeighborhoodAttention):
    """Neighbourhood attention to every second token, as far as the map lets it be (arXiv 2209.15001)."""

    dilation = 2


MIXERS: dict[str, type[TokenMixer]] = {
    "s6": S6,
    "ssd": SSD,
    "gla": GLA,
    "simple_gla": SimpleGLA,
    "retention": Retention,
    "hgrn": HGRN,
    "hgrn2": HGRN2,
    "log_linear": LogLinear,
    "linear": LinearAttention,
    "global_linear": GlobalLinearAttention,
    "delta": DeltaNet,
    "gated_delta": GatedDeltaNet,
    "kda": KDA,
    "dplr": DPLR,
    "wkv4": WKV4,
    "bi_wkv4": BiWKV4,
    "wkv6": WKV6,
    "bi_wkv6": BiWKV6,
    "wkv7": WKV7,
    "softmax": SoftmaxAttention,
    "window": WindowAttention,
    "neighborhood": NeighborhoodAttention,
    "dilated": DilatedAttention,
    "sliding": SlidingAttention,
}


class Mixer(TokenMixer):
    """A token mixer over a map (B, H, W, dim) -> (B, H, W, dim), in the frame that all of `MIXERS` share.

    Args:
        dim: channels.
        mixer: a name of `MIXERS`.
        routes: of the scans, see `MultiRoute`; attentions that read all tokens at once have none.
        merge: name for `linescan.scans.multi_route.create_merge`: "sum", "mean", "gate", "concat", "channel_attention".
        head_dim: channels per head.
        window: odd side of the windows of "window", "neighborhood", "dilated" and "sliding".

    Raises:
        ValueError: unknown mixer, route or merge, heads that do not divide the channels, or an even window.
    """

    def __init__(
        self,
        dim: int,
        mixer: str = "s6",
        routes: RouteLike | Sequence[RouteLike] | int = "row, -row, col, -col",
        merge: str = "mean",
        head_dim: int = 32,
        window: int = 7,
    ):
        super().__init__()
        core = MIXERS[known("mixer", mixer, MIXERS)]
        self.conv = depthwise(dim, 3)
        self.core = core(dim, routes, merge, head_dim, window=window)
        width = getattr(self.core, "along", self.core).merge.out_dim
        self.norm = RMSNorm(width)
        self.gate = nn.Linear(dim, width)
        self.proj = nn.Linear(width, dim)

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], **options) -> tuple[Tensor, Tensor | None]:
        u = F.silu(self.conv(x.unflatten(1, grid))).flatten(1, 2)
        y, state = self.core.mix_tokens(u, grid, **options)
        return linear(self.proj, self.norm(y) * F.silu(linear(self.gate, x))), state
