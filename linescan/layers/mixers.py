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
from ..scans import gates
from ..scans.multi_route import MultiRoute, create_merge
from ..scans.recurrence import precise
from ..scans.routes import RouteLike
from .attention import fit_window, sliding_attention, window_attention
from .blocks import TokenMixer
from .linear import linear
from .neighborhood import neighborhood_attention
from .norm import RMSNorm
from .s6 import S6Scan, init_dt_bias
from .ss2d import SSDScan
from .stems import depthwise

__all__ = ["MIXERS", "Core", "Mixer"]

MEMORIES = 4  # of mixtures of memories, of which a token is sent to two


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
    low_rank: dict[str, str | int] = {}  # of these, those that are made through so many numbers, or "channel" numbers
    bent = ""  # of these, those with a tanh between both maps

    def __init__(self, dim: int, n_routes: int, head_dim: int, window: int):
        super().__init__()
        if dim % head_dim:
            raise InputError(f"head_dim divides the channels: {dim} is not a multiple of {head_dim}")
        if window < 1 or window % 2 == 0:
            raise InputError(f"windows are odd, got {window}")
        self.n_routes, self.head_dim, self.n_heads, self.window = n_routes, head_dim, dim // head_dim, window
        self.proj = nn.Linear(dim, dim * len(self.shared.split()), bias=False)
        sizes = {"channel": head_dim, "head": 1, "memory": MEMORIES, "channel of each memory": MEMORIES * head_dim}

        def projection(name: str, size: str | int) -> nn.Module:
            rank, out = self.low_rank.get(name), n_routes * self.n_heads * sizes.get(size, size)
            if rank is None:
                return nn.Linear(dim, out)
            rank = sizes.get(rank, rank)
            between = [nn.Tanh()] if name in self.bent.split() else []
            return nn.Sequential(nn.Linear(dim, rank, bias=False), *between, nn.Linear(rank, out))

        self.own = nn.ModuleDict({name: projection(name, size) for name, size in self.per_route.items()})

    def tokens(self, u: Tensor) -> list[Tensor]:
        """The shared projections, (B, 1, L, heads, head_dim) each."""
        parts = linear(self.proj, u)[:, None].chunk(len(self.shared.split()), -1)
        return [x.unflatten(-1, (self.n_heads, self.head_dim)) for x in parts]

    def values(self, name: str, u: Tensor) -> Tensor:
        """A projection of each route in float32: (B, K, L, heads, values), or (B, K, L, heads) for one per head."""
        own, x = self.own[name], u
        for layer in own if name in self.low_rank else [own]:
            x = linear(layer, x)
        x = precise(x).unflatten(-1, (self.n_routes, self.n_heads, -1))
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
    """Gated linear attention (`gla`): a decay per key channel, sigmoid(.)^(1/16) of a map of rank 16."""

    recurrence = staticmethod(scans.gla)
    per_route = {"forget": "channel"}
    low_rank: dict[str, str | int] = {"forget": 16}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        return *self.tokens(u), gates.log_sigmoid(self.values("forget", u), 1 / 16)


class SimpleGLA(GLA):
    """Gated linear attention with a decay per head (`simple_gla`)."""

    recurrence = staticmethod(scans.simple_gla)
    per_route = {"forget": "head"}
    low_rank = {}


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
        return tuple(x.flatten(-2) for x in gates.blend(F.silu(v), self.values("forget", u), 1 / 16))


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
        return *self.tokens(u), gates.log_sigmoid(self.values("forget", u), 1 / 16), weights

    def scan(self, *inputs: Tensor, grid: tuple[int, ...] | None = None, route: Tensor | None = None, **options):
        *inputs, weights = inputs
        route = self.along.table(grid, weights.device) if route is None else route
        last = options.get("position", 0) + route.shape[-1] - 1
        level = torch.arange(last.bit_length() + 1, device=weights.device).clamp_max(weights.shape[-1] - 1)
        return super().scan(*inputs, weights[..., level], grid=grid, route=route, **options)


class LogLinearDelta(LogLinear):
    """Log-linear attention with the gated delta rule (`log_linear_gated_delta_rule`)."""

    recurrence = staticmethod(scans.log_linear_gated_delta_rule)
    per_route = {"forget": "head", "beta": "head", "weights": 12}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        q, k, v, forget, weights = super().project(u)
        return gates.unit(q), gates.unit(k), v, forget, self.values("beta", u).sigmoid(), weights


class RGLRU(Core):
    """The RG-LRU (`rg_lru`): every channel a gated sum of scaled inputs, without queries and keys."""

    recurrence = staticmethod(scans.rg_lru)
    joins_heads = False
    shared = "v"
    per_route = {"gate_x": "channel", "gate_a": "channel"}

    def __init__(self, dim: int, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        radius = torch.linspace(0.9**2, 0.999**2, dim).sqrt()  # of exp(-softplus(a_param)): even by area
        self.a_param = nn.Parameter(torch.log(torch.expm1(-radius.log())))

    def project(self, u: Tensor) -> Sequence[Tensor]:
        (v,) = self.tokens(u)
        return *(x.flatten(-2) for x in (v, self.values("gate_x", u), self.values("gate_a", u))), self.a_param


class MLSTM(Core):
    """mLSTM (`mlstm`): exponential input gates and sigmoid forget gates per head, normalised."""

    recurrence = staticmethod(scans.mlstm)
    per_route = {"gates": 2}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        i, f = self.values("gates", u).unbind(-1)
        return *self.tokens(u), i, f + 3  # starts with little forgetting


class Mamba3(Core):
    """Mamba-3 (`mamba3`): 16 states per channel, half of them turned by angles that add up."""

    recurrence = staticmethod(scans.mamba3)
    shared = "v"
    per_route = {"steps": 3, "angle": 4}
    ranks: tuple[int, ...] = ()

    def __init__(self, dim: int, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.split = *self.ranks, 1, 16  # ranks, groups and states of queries and keys
        self.qk = nn.Linear(dim, 2 * math.prod(self.split), bias=False)
        self.q_bias, self.k_bias = (nn.Parameter(torch.ones(self.n_heads, *self.ranks, 16)) for _ in "qk")
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.dt_bias = nn.Parameter(init_dt_bias((self.n_heads,)))

    def no_weight_decay(self) -> set[str]:
        return {"q_bias", "k_bias", "D", "dt_bias"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        (v,) = self.tokens(u)
        q, k = (x.unflatten(-1, self.split) for x in linear(self.qk, u)[:, None].chunk(2, -1))
        q, k = (F.rms_norm(x, x.shape[-1:], eps=1e-5) for x in (q, k))
        a, dt, trap = self.values("steps", u).unbind(-1)
        rates = -F.softplus(a).clamp_min(1e-4), F.softplus(dt + self.dt_bias), trap, self.values("angle", u)
        return q, k, v, *rates, self.q_bias, self.k_bias, self.D


class Mamba3MIMO(Mamba3):
    """Mamba-3 with two inputs and outputs per channel (`mamba3_mimo`), on the same states."""

    recurrence = staticmethod(scans.mamba3_mimo)
    ranks = (2,)

    def __init__(self, dim: int, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        shape = self.n_heads, *self.ranks, self.head_dim
        self.mimo_v, self.mimo_o = (nn.Parameter(torch.full(shape, 0.5)) for _ in "vo")

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"mimo_v", "mimo_o"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        return *super().project(u), None, self.mimo_v, None, self.mimo_o


# -- learned features --------------------------------------------------------------------------------------------------


class LinearAttention(Core):
    """Normalised linear attention (`linear_attention`) with features elu + 1: no decay."""

    recurrence = staticmethod(scans.linear_attention)

    def project(self, u: Tensor) -> Sequence[Tensor]:
        q, k, v = self.tokens(u)
        return F.elu(q) + 1, F.elu(k) + 1, v

    def scan(self, *inputs: Tensor, **options):
        return super().scan(*inputs, normalize=True, **options)


class Based(Core):
    """Based (`based`): linear attention by the Taylor series of the exponential, of at most 16 channels per head."""

    recurrence = staticmethod(scans.based)
    shared = "v"

    def __init__(self, dim: int, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.qk = nn.Linear(dim, 2 * self.n_heads * min(16, self.head_dim), bias=False)

    def project(self, u: Tensor) -> Sequence[Tensor]:
        qk = linear(self.qk, u)[:, None].chunk(2, -1)
        return *(x.unflatten(-1, (self.n_heads, -1)) for x in qk), *self.tokens(u)


def identities(core: Heads) -> Tensor:
    """An identity for every head, from which Hedgehog's features start."""
    return torch.eye(core.head_dim).repeat(core.n_heads, 1, 1)


class Hedgehog(Core):
    """Hedgehog (`hedgehog`): linear attention of learned features, a softmax over each of their halves."""

    recurrence = staticmethod(scans.hedgehog)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.q_weight, self.k_weight = (nn.Parameter(identities(self)) for _ in "qk")

    def project(self, u: Tensor) -> Sequence[Tensor]:
        return *self.tokens(u), self.q_weight, self.k_weight


class HedgehogJoint(Hedgehog):
    """Hedgehog (`hedgehog`) with one softmax over both halves of the features, and biases."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.q_bias, self.k_bias = (nn.Parameter(torch.zeros(self.n_heads, self.head_dim)) for _ in "qk")

    def no_weight_decay(self) -> set[str]:
        return {"q_bias", "k_bias"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        return *super().project(u), self.q_bias, self.k_bias

    def scan(self, *inputs: Tensor, **options):
        return super().scan(*inputs, joint=True, **options)


class HedgehogWindow(Hedgehog):
    """LoLCATs (`hedgehog_window`): softmax to the last `window` squared tokens of a route, Hedgehog to all older."""

    recurrence = staticmethod(scans.hedgehog_window)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = nn.Parameter(torch.zeros(self.n_heads))

    def project(self, u: Tensor) -> Sequence[Tensor]:
        return *super().project(u), self.factor

    def scan(self, *inputs: Tensor, **options):
        return super().scan(*inputs, window=self.window**2, **options)


# -- delta rules -------------------------------------------------------------------------------------------------------


class DeltaNet(Core):
    """The delta rule (`delta_rule`): a token corrects what the state says of its key."""

    recurrence = staticmethod(scans.delta_rule)
    per_route = {"beta": "head"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        q, k, v = self.tokens(u)
        decays = [gates.log_sigmoid(self.values("forget", u), 1 / 16)] if "forget" in self.own else []
        return gates.unit(q), gates.unit(k), v, *decays, self.values("beta", u).sigmoid()


class GatedDeltaNet(DeltaNet):
    """The gated delta rule (`gated_delta_rule`): with a decay per head."""

    recurrence = staticmethod(scans.gated_delta_rule)
    per_route = {"beta": "head", "forget": "head"}


class KDA(DeltaNet):
    """Kimi delta attention (`kda`): the gated delta rule with a decay per key channel, of a map as wide as a head."""

    recurrence = staticmethod(scans.kda)
    per_route = {"beta": "head", "forget": "channel"}
    low_rank = {"forget": "channel"}


class GatedDeltaNet2(DeltaNet):
    """Gated DeltaNet-2 (`gated_delta_rule_2`): gates of erasing and of writing per channel."""

    recurrence = staticmethod(scans.gated_delta_rule_2)
    per_route = {"forget": "channel", "erase": "channel", "write": "channel"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        q, k, v = self.tokens(u)
        decay, erase, write = (self.values(name, u) for name in self.per_route)
        q, k = gates.unit(q), gates.unit(k)
        return q, k, v, gates.log_sigmoid(decay, 1 / 16), erase.sigmoid(), write.sigmoid()


class DeltaProduct(Core):
    """Gated DeltaProduct (`gated_delta_product`): two steps of the delta rule per token."""

    recurrence = staticmethod(scans.gated_delta_product)
    shared = "q k1 v1 k2 v2"
    per_route = {"forget": "head", "beta": 2}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        q, k1, v1, k2, v2 = self.tokens(u)
        k, v = F.normalize(torch.stack((k1, k2), 3), dim=-1), torch.stack((v1, v2), 3)
        beta = 2 * self.values("beta", u).sigmoid().transpose(-1, -2)
        return gates.unit(q), k, v, gates.log_sigmoid(self.values("forget", u), 1 / 16), beta


class Comba(Core):
    """Comba (`comba`): the delta rule with an error that is read before the decay, by a shorter key."""

    recurrence = staticmethod(scans.comba)
    per_route = {"forget": "head", "beta": "head"}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shorter, self.D = nn.Parameter(torch.zeros(self.n_heads)), nn.Parameter(torch.full((self.n_heads,), 0.02))

    def project(self, u: Tensor) -> Sequence[Tensor]:
        q, k, v = self.tokens(u)
        q, k = gates.unit(q), gates.unit(k)
        p = self.shorter.sigmoid()[:, None] * k
        forget = gates.log_sigmoid(self.values("forget", u), 1 / 16)
        return q - self.D[:, None] * p, k, v, p, forget, self.values("beta", u).sigmoid()


class Mesa(Core):
    """MesaNet (`mesa_net`): queries are solved for the keys so far."""

    recurrence = staticmethod(scans.mesa_net)
    per_route = {"forget": "head", "beta": "head"}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ridge = nn.Parameter(torch.zeros(self.n_heads, self.head_dim))

    def no_weight_decay(self) -> set[str]:
        return {"ridge"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        q, k, v = self.tokens(u)
        forget, beta = gates.log_sigmoid(self.values("forget", u), 1 / 16), self.values("beta", u).sigmoid()
        return gates.unit(q), gates.unit(k), v, forget, beta, F.softplus(self.ridge) + 0.25


class MoMDelta(Core):
    """A mixture of memories (`mom_gated_delta_rule`): a token is sent to two of four, gated delta rules each."""

    recurrence = staticmethod(scans.mom_gated_delta_rule)
    shared = "q"
    per_route = {"forget": "memory", "beta": "memory"}

    def __init__(self, dim: int, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.router = nn.Linear(dim, MEMORIES, bias=False)
        self.kv = nn.Linear(dim, 2 * MEMORIES * dim, bias=False)

    def sent(self, u: Tensor) -> list[Tensor]:
        """Logits of the router; keys and values of the memories (B, 1, L, memories, heads, head_dim)."""
        kv = linear(self.kv, u)[:, None].unflatten(-1, (2, MEMORIES, self.n_heads, self.head_dim))
        return [linear(self.router, u)[:, None], *kv.unbind(3)]

    def project(self, u: Tensor) -> Sequence[Tensor]:
        (q,), (logits, k, v) = self.tokens(u), self.sent(u)
        forget, beta = (self.values(name, u).transpose(-1, -2) for name in self.per_route)
        return gates.unit(q), logits, gates.unit(k), v, gates.log_sigmoid(forget, 1 / 16), beta.sigmoid()


class MoMGLA(MoMDelta):
    """A mixture of memories (`mom_gla`): a token is sent to two of four, gated linear attentions each."""

    recurrence = staticmethod(scans.mom_gla)
    per_route = {"forget": "channel of each memory"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        forget = self.values("forget", u).unflatten(-1, (MEMORIES, -1)).transpose(3, 4)
        return *self.tokens(u), *self.sent(u), gates.log_sigmoid(forget, 1 / 16)


class DPLR(Core):
    """A diagonal plus a low-rank transition (`dplr`): what a learned key reads of the state is removed.

    Decays and keys come from maps as wide as a head.
    """

    recurrence = staticmethod(scans.dplr)
    per_route = {"forget": "channel", "remove": "channel", "strength": "head"}
    low_rank = {"forget": "channel", "remove": "channel"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        removed = gates.erase(self.values("remove", u), self.values("strength", u).sigmoid())
        return *self.tokens(u), *removed, gates.log_sigmoid(self.values("forget", u), 1 / 16)


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
    """RWKV-6's attention (`wkv6`): a decay per token and key channel, of rank 64, and a bonus for the own token."""

    recurrence = staticmethod(scans.wkv6)
    shared = "r k v"
    per_route = {"decay": "channel"}
    low_rank = {"decay": 64}
    bent = "decay"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bonus = nn.Parameter(torch.zeros(self.n_routes, self.n_heads, self.head_dim))

    def no_weight_decay(self) -> set[str]:
        return {"bonus"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        decay = gates.exponential(self.values("decay", u), -math.exp(-3))  # starts near exp(-0.05) per token
        return *self.tokens(u), decay, self.bonus

    def scan(self, *inputs: Tensor, **options):
        return super().scan(*inputs, scale=self.head_dim**-0.5, **options)


class BiWKV6(WKV6):
    """VRWKV6's attention (`bi_wkv6`): that of RWKV-6 over the tokens on both sides."""

    recurrence = staticmethod(scans.bi_wkv6)


class WKV7(Core):
    """RWKV-7's attention (`rwkv7`, as `dplr`): decay, removal and writing by the token, the first two of rank 32."""

    recurrence = staticmethod(scans.dplr)
    shared = "r k v"
    per_route = {"decay": "channel", "remove": "channel"}
    low_rank = {"decay": 32, "remove": 32}
    bent = "decay"

    def project(self, u: Tensor) -> Sequence[Tensor]:
        r, k, v = self.tokens(u)
        decay = gates.sigmoid(self.values("decay", u), -math.exp(-0.5))
        removed = gates.unit(k)
        written, given_back = gates.share(k, removed, self.values("remove", u))
        return r, written, v, -removed, given_back, decay

    def scan(self, *inputs: Tensor, **options):
        return super().scan(*inputs, scale=1.0, **options)


# -- test-time training ------------------------------------------------------------------------------------------------


class Trained(Core):
    """Base of the cores whose state is a model that learns from the tokens, and starts from learned weights `start`."""

    def begin(self, batch: int) -> tuple[Tensor, ...]:
        """The states before the first token, for so many samples."""
        start = self.start.expand(batch, self.n_routes, *self.start.shape)
        return start, torch.zeros_like(start)

    def scan(self, *inputs: Tensor, initial_state: tuple[Tensor, ...] | None = None, **options):
        state = self.begin(len(inputs[0])) if initial_state is None else initial_state
        return super().scan(*inputs, initial_state=state, **options)


class TTT(Trained):
    """TTT-Linear (`ttt_linear`): a linear map under a layer norm, trained on mini-batches of 16 tokens."""

    recurrence = staticmethod(scans.ttt_linear)
    per_route = {"rate": "head"}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.start = nn.Parameter(0.02 * torch.randn(self.n_heads, self.head_dim + 1, self.head_dim))
        self.weight = nn.Parameter(torch.ones(self.n_heads, self.head_dim))
        self.bias = nn.Parameter(torch.zeros(self.n_heads, self.head_dim))
        self.place = nn.Parameter(torch.zeros(16))

    def no_weight_decay(self) -> set[str]:
        return {"start", "weight", "bias"}

    def project(self, u: Tensor) -> Sequence[Tensor]:
        q, k, v = self.tokens(u)
        token = self.place + 1 / torch.arange(1, 17, device=u.device)
        rate = self.values("rate", u).sigmoid() / self.head_dim
        return gates.unit(q), gates.unit(k), v, rate, token, self.weight, self.bias


class TTTByReader(TTT):
    """TTT-Linear in the form of flash-linear-attention (`ttt_linear_fla`): rates belong to the tokens that read."""

    recurrence = staticmethod(scans.ttt_linear_fla)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.place

    def project(self, u: Tensor) -> Sequence[Tensor]:
        q, k, v = self.tokens(u)
        rate = self.values("rate", u).sigmoid() / self.head_dim
        return gates.unit(q), gates.unit(k), v, rate, self.weight, self.bias


class Titans(Trained):
    """Titans' memory (`titans_memory`): a linear map, trained with momentum and weight decay on chunks of 4 tokens."""

    recurrence = staticmethod(scans.titans_memory)
    per_route = {"gates": 3}
    hidden = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        numbers = 2 * self.head_dim * self.hidden or self.head_dim**2
        self.start = nn.Parameter(self.head_dim**-0.5 * torch.randn(self.n_heads, numbers))

    def no_weight_decay(self) -> set[str]:
        return {"start"}

    def begin(self, batch: int) -> tuple[Tensor, ...]:
        start, zeros = super().begin(batch)
        return start, zeros, zeros, zeros, zeros.new_zeros(*zeros.shape[:3], 2)

    def project(self, u: Tensor) -> Sequence[Tensor]:
        q, k, v = self.tokens(u)
        lr, mom, dec = self.values("gates", u).unbind(-1)
        return gates.unit(q), gates.unit(k), v, lr, mom, dec - 3  # starts with little decay

    def scan(self, *inputs: Tensor, **options):
        return super().scan(*inputs, chunk=4, hidden=self.hidden, clip=1.0, **options)


class TitansMLP(Titans):
    """Titans' memory (`titans_memory`) as an MLP with 64 hidden channels."""

    hidden = 64


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


class GlobalAttention(Attention):
    """Base of the attentions that need no grid: subclasses define `attend_tokens` over (B, 1, L, heads, head_dim)."""

    def attend_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = self.attend_tokens(*(x.flatten(1, -3)[:, None] for x in (q, k, v)))
        return y[:, 0].unflatten(1, q.shape[1:-2])


class GlobalLinearAttention(GlobalAttention):
    """Linear attention to all tokens (`global_linear_attention`) with features elu + 1: no order, no decay."""

    def attend_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scans.global_linear_attention(F.elu(q) + 1, F.elu(k) + 1, v)


class GlobalHedgehog(GlobalAttention):
    """Linear attention to all tokens with Hedgehog's learned features, as its authors convert vision transformers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.q_weight, self.k_weight = (nn.Parameter(identities(self)) for _ in "qk")

    def attend_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = scans.hedgehog_features(q, self.q_weight), scans.hedgehog_features(k, self.k_weight)
        return scans.global_linear_attention(q, k, v, scale=1.0)


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


class ViTTTGLU(GlobalAttention):
    """ViT^3's gated linear unit (`vittt_glu`): weights that take one step on all tokens, which then read them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        shape = self.n_heads, self.head_dim, self.head_dim
        self.w1, self.w2 = (nn.Parameter(0.02 * torch.randn(shape)) for _ in range(2))

    def attend_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scans.vittt_glu(q, k, v, self.w1, self.w2)


class ViTTTConv(Attention):
    """ViT^3's depthwise convolution (`vittt_conv`), with kernels that take one step on all tokens of the map."""

    def __init__(self, dim: int, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.w = nn.Parameter(0.02 * torch.randn(dim, 3, 3))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = q.shape[1:-2]
        q, k, v = (x.flatten(1, -3).flatten(2)[:, None] for x in (q, k, v))
        return scans.vittt_conv(q, k, v, self.w, grid)[:, 0].unflatten(1, grid).unflatten(-1, (self.n_heads, -1))


MIXERS: dict[str, type[TokenMixer]] = {
    "s6": S6,
    "ssd": SSD,
    "mamba3": Mamba3,
    "mamba3_mimo": Mamba3MIMO,
    "gla": GLA,
    "simple_gla": SimpleGLA,
    "retention": Retention,
    "hgrn": HGRN,
    "hgrn2": HGRN2,
    "rg_lru": RGLRU,
    "mlstm": MLSTM,
    "log_linear": LogLinear,
    "log_linear_delta": LogLinearDelta,
    "linear": LinearAttention,
    "based": Based,
    "hedgehog": Hedgehog,
    "hedgehog_joint": HedgehogJoint,
    "hedgehog_window": HedgehogWindow,
    "global_linear": GlobalLinearAttention,
    "global_hedgehog": GlobalHedgehog,
    "delta": DeltaNet,
    "gated_delta": GatedDeltaNet,
    "gated_delta_2": GatedDeltaNet2,
    "delta_product": DeltaProduct,
    "kda": KDA,
    "comba": Comba,
    "mesa": Mesa,
    "mom_delta": MoMDelta,
    "mom_gla": MoMGLA,
    "dplr": DPLR,
    "wkv4": WKV4,
    "bi_wkv4": BiWKV4,
    "wkv6": WKV6,
    "bi_wkv6": BiWKV6,
    "wkv7": WKV7,
    "ttt": TTT,
    "ttt_fla": TTTByReader,
    "titans": Titans,
    "titans_mlp": TitansMLP,
    "vittt_glu": ViTTTGLU,
    "vittt_conv": ViTTTConv,
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
        merge: name for `linescan.scans.multi_route.create_merge`: "sum", "mean", "gate", ...
        head_dim: channels per head.
        window: odd side of the windows of "window", "neighborhood", "dilated", "sliding" and "hedgehog_window".

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
