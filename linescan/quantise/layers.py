"""Linear layers, convolutions and selective scans whose weights are integers and whose inputs are quantised.

A module is quantised in place: it keeps its class, with one of the mixins here before it, so that a quantised Linear is
still an `nn.Linear`, and a quantised mixer runs the code of its system. Weights become properties that read `Weight`s;
`acts` holds a `Quantiser` for each point where activations are quantised.
"""

from functools import cache
from itertools import repeat
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat import has_int8_products
from ..scans import selective_scan
from ..scans.matmul import project_routes
from ..scans.routes import RouteLike
from .hadamard import rotate, rotate_back
from .quantisers import Quantiser, Weight

__all__ = [
    "QuantisedConv", "QuantisedLinear", "QuantisedMamba", "QuantisedModule", "QuantisedScan", "ScaledGate",
    "StatesTimesC", "Turned", "become", "integer_product",
]  # fmt: skip


class QuantisedModule(nn.Module):
    """Base of the mixins.

    Attributes:
        weights: a `Weight` for each parameter that is kept as integers, by its name.
        acts: what activations pass, by the name of the point: a `Quantiser`, or an Identity.
    """

    weights: nn.ModuleDict
    acts: nn.ModuleDict

    def quantisers(self) -> list[Quantiser]:
        """All that activations pass."""
        return [act for act in self.acts.values() if isinstance(act, Quantiser)]


def become(module: nn.Module, mixin: type[QuantisedModule], weights: dict[str, Weight], acts: dict[str, Quantiser]):
    """Makes `module` quantised in place; what `weights` names are its parameters no more."""
    for name in weights:
        del module._parameters[name]
    module.__class__ = _quantised_class(type(module), mixin, tuple(weights))
    module.weights = nn.ModuleDict(weights)
    module.acts = nn.ModuleDict(acts)
    return module


@cache
def _quantised_class(cls: type, mixin: type, weights: tuple[str, ...]) -> type:
    def read(name: str) -> property:
        return property(lambda self: self.weights[name]())

    return type(f"Quantised{cls.__name__}", (mixin, cls), {name: read(name) for name in weights})


# -- linear layers and convolutions ------------------------------------------------------------------------------------


def integer_product(x: Tensor, act: Quantiser, weight: Weight) -> Tensor | None:
    """x (..., in) times a weight (out, in) in int8 arithmetic with int32 sums: (..., out); None where it cannot be.

    It takes 8-bit activations with one scale, or one for each token, weights with a scale for each row or for all, and
    a CPU with instructions for int8 products. Elsewhere float32 products of the same integers stand for it.
    """
    fits = act.bits == 8 and act.scales in ("static", "token") and not weight.group
    if not (fits and x.is_cpu and x.dtype == torch.float32 and x.numel() and has_int8_products()):
        return None
    grid = act.grid(x)
    middle = 0 if act.symmetric else 128
    codes = (grid.codes(x) - middle).to(torch.int8)
    of_weight, scale, zero = weight.integers()
    of_weight = of_weight.view(weight.shape)
    y = torch._int_mm(codes.flatten(0, -2), of_weight.T).float().unflatten(0, x.shape[:-1])
    shift = grid.zero - middle  # 0 stands for 0 in neither: (q - a) (w - b) = q w - b q - a w + a b
    if not weight.symmetric:
        y -= codes.sum(-1, keepdim=True, dtype=torch.int32) * zero.view(-1)
    if not act.symmetric:
        sums = of_weight.sum(-1, dtype=torch.int32) - zero.view(-1) * of_weight.shape[-1]
        y -= shift * sums
    return y * grid.scale * scale.view(-1)


class QuantisedLinear(QuantisedModule):
    """Mixin of an `nn.Linear`: y = W Q(H(x / s)) + b, with what is not needed left out.

    Attributes:
        turned: the input is rotated (`hadamard.rotate`) before it is quantised; the weight is made for that.
    """

    turned = False

    def forward(self, x: Tensor) -> Tensor:
        if "smooth" in self._buffers:
            x = x / self.smooth
        if self.turned:
            x = rotate(x)
        act, weight = self.acts["x"], self.weights["weight"]
        y = integer_product(x, act, weight) if act.mode == weight.mode == "on" else None
        if y is None:
            y = F.linear(act(x), weight())
        return self.acts["y"](y if self.bias is None else y + self.bias)


class QuantisedConv(QuantisedModule):
    """Mixin of a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.acts["conv"](x))


class Turned(nn.Module):
    """x R^T, for the end of a stream that runs in a basis R (dim, dim) of its own."""

    basis: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("basis", torch.eye(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.basis.T.to(x.dtype)


class ScaledGate(nn.Module):
    """act(s z) / s: the gate of z that was divided by s, divided by s itself. Of SiLU: z sigmoid(s z)."""

    s: Tensor

    def __init__(self, act: Callable[[Tensor], Tensor], dim: int):
        super().__init__()
        self.act = act
        self.register_buffer("s", torch.ones(dim))

    def forward(self, z: Tensor) -> Tensor:
        return self.act(z * self.s) / self.s


# -- scans -------------------------------------------------------------------------------------------------------------


class StatesTimesC(nn.Module):
    """`selective_scan` in two steps, with the states of all tokens between them: both factors of h C are quantised.

        h'[t, d, n] = turned(h / s)        y[t, d] = s turned back(sum_n Q(h')[t, d, n] Q(C)[t, n]) + D u

    A recurrence for `MultiRoute`. The states come from the same kernel, one channel for each state of a channel.

    Args:
        states, C: quantise them.

    Attributes:
        turned_states: h is rotated over n; C is made for that.
        turned_channels: h is rotated over d, and y back.
        gate: what is multiplied by the output is gate(z).
    """

    NUMBERS = 2**24  # that states are made of at a time
    turned_states = False
    turned_channels = False

    def __init__(self, dim: int, states: nn.Module, C: nn.Module):
        super().__init__()
        self.states, self.C = states, C
        self.gate = ScaledGate(F.silu, dim)
        self.register_buffer("smooth", torch.ones(dim))

    def forward(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor,
        *, route: RouteLike, merge: str | None, delta_softplus: bool, initial_state: Tensor | None = None,
        return_final_state: bool = False,
    ):  # fmt: skip
        """As `selective_scan`, of tokens (B, K or 1, L, D); B and C without groups. Samples take turns, for memory."""
        size = max(1, self.NUMBERS // (len(A) * u.shape[2] * A[0].numel()))
        own = route if route is not None and route.ndim == 3 else None
        parts = [repeat(None) if x is None else x.split(size) for x in (u, delta, B, C, z, own, initial_state)]
        outputs, states = [], []
        for u_i, delta_i, B_i, C_i, z_i, route_i, state_i in zip(*parts):
            table = route if route_i is None else route_i
            y, state = self.some(u_i, delta_i, A, B_i, C_i, D, z_i, dt_bias, delta_softplus, table, merge, state_i)
            outputs.append(y)
            states.append(state)
        return (torch.cat(outputs), torch.cat(states)) if return_final_state else torch.cat(outputs)

    def some(self, u, delta, A, B, C, D, z, dt_bias, delta_softplus, route, merge, initial_state):
        """The output and the last states of a few samples."""
        dim, n = A.shape[-2:]
        one = torch.ones_like(delta[..., :1])
        h, last = selective_scan(
            (u[..., None] * B[..., None, :]).flatten(-2), delta.repeat_interleave(n, -1), A.flatten(-2)[..., None],
            one, one, delta_bias=dt_bias.repeat_interleave(n, -1), delta_softplus=delta_softplus, route=route,
            initial_state=None if initial_state is None else initial_state.flatten(-2)[..., None],
            return_final_state=True,
        )  # fmt: skip
        h = h.unflatten(-1, (dim, n)) / self.smooth[:, None].to(h)
        if self.turned_channels:
            h = rotate(h.mT).mT
        if self.turned_states:
            h = rotate(h)
        y = (self.quantise(self.states, h) * self.C(C)[..., None, :]).sum(-1)
        if self.turned_channels:
            y = rotate_back(y)
        y = y * self.smooth.to(y) + D[:, None] * u
        y = y if z is None else y * self.gate(z)
        return y.sum(1) if merge == "sum" else y, last.squeeze(-1).unflatten(-1, (dim, n))

    @staticmethod
    def quantise(act: nn.Module, h: Tensor) -> Tensor:
        """h (B, K, L, D, N) through a quantiser that sees the states of a token as its channels."""
        return act(h.flatten(-2)).view_as(h)


class QuantisedScan(QuantisedModule):
    """Mixin of an `S6Scan`: x_proj and dt_proj are integers.

    Points of `acts`: "u" what is scanned; "x" the input of x_proj; "dbc" its output; "dt" the input of dt_proj and
    "delta" its output. With "states" and "C" the recurrence is `StatesTimesC`.

    Attributes:
        turned: the input of x_proj is rotated; the weight is made for that.
    """

    turned = False

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.acts["u"](u)
        x = self.acts["x"](rotate(x) if self.turned else x)
        dt, B, C = self.acts["dbc"](project_routes(x, self.x_proj)).split(self.split, -1)
        return dt, B, C

    def steps(self, u: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        delta = project_routes(self.acts["dt"](dt - self.dt_middle.to(dt)), self.dt_proj)
        delta = self.acts["delta"](delta + self.dt_offset.to(dt))  # not in the bias, which padding tokens have too
        return self.acts["u"](u), delta, {}


class QuantisedMamba(QuantisedScan):
    """Mixin of a `MambaMixer`: its convolutions, too, are integers; "conv" is the point before them."""

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, z = super().branches(x)
        return self.acts["conv"](u), z
