"""The Mamba mixer over routes: an S6 layer whose convolution and scan read the tokens in any order.

Gu and Dao, arXiv 2312.00752; scanned forward and backward as in Vim (arXiv 2401.09417), or along any set of routes.
"""

import math
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..scans import causal_conv1d
from ..scans.multi_route import create_merge
from ..scans.routes import pad_slots
from .norm import RMSNorm
from .pos_embed import rotate_pairs
from .s6 import S6Scan

__all__ = ["MambaBlock", "MambaMixer", "stack_directions", "take_places"]


class MambaMixer(S6Scan):
    """Token mixer (B, L, dim) -> (B, L, dim): in_proj, then per route causal conv, SiLU and S6, gate, merge, out_proj.

    Every route has its own convolution, x_proj, dt_proj, A and D, stacked on the first axis of one parameter; in_proj,
    the gate and out_proj are shared.

    Args:
        dim: channels of the stream.
        n_routes: K, routes scanned.
        d_state: N, state size per channel.
        d_conv: taps of the causal convolution.
        expand: inner channels as a multiple of `dim`.
        dt_rank: R, rank of the step-size projection; None for ceil(dim / 16).
        shared_inputs: all routes share convolution (along the first route), x_proj, dt_proj and D, and differ in A
            alone ("v1" of Vim).
        scale: factor on the merged output, before out_proj.
        init_layer_scale: initial value of a learned factor per output channel; None for none.
        merge: how the routes' outputs become one: a name for `linescan.scans.multi_route.create_merge`, or a function
            from the inner channels and K to a module (B, K, L, D) -> (B, L, D).
    """

    def __init__(
        self,
        dim: int,
        n_routes: int = 2,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        shared_inputs: bool = False,
        scale: float = 1.0,
        init_layer_scale: float | None = None,
        merge: str | Callable[[int, int], nn.Module] = "sum",
    ):
        inner, sets = int(expand * dim), 1 if shared_inputs else n_routes
        super().__init__(inner, n_routes, d_state, dt_rank or math.ceil(dim / 16), n_sets=sets)
        self.scale = scale
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(sets, inner, d_conv).uniform_(-(d_conv**-0.5), d_conv**-0.5))
        self.conv_bias = nn.Parameter(torch.empty(sets, inner).uniform_(-(d_conv**-0.5), d_conv**-0.5))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.gamma = nn.Parameter(torch.full((dim,), init_layer_scale)) if init_layer_scale is not None else None
        self.merge = None  # the scan adds up by itself
        if merge != "sum":
            self.merge = (partial(create_merge, merge) if isinstance(merge, str) else merge)(inner, n_routes)

    def no_weight_decay(self) -> set[str]:
        """Biases and D: one value a channel, stacked over routes, so that their rank does not tell."""
        return {"conv_bias", "dt_bias", "D"}

    def forward(self, x: Tensor, route: Tensor, place: Tensor | None = None) -> Tensor:
        """x (B, L, dim), route (K, S) over the L tokens -> (B, L, dim).

        `place` (K, L), for systems that put outputs elsewhere than they read: the token whose output each place takes.
        """
        length, slots = x.shape[1], 0
        x = self.in_proj(x)
        if route.shape[-1] > length:  # padding is no longer zero after the convolution, so it needs tokens of its own
            route, slots = pad_slots(route, length)
            x = F.pad(x, (0, 0, 0, slots))
        u, z = x[:, None].chunk(2, -1)
        own = route[: len(self.conv_weight)]
        u = causal_conv1d(u, self.conv_weight, self.conv_bias, activation="silu", route=own)
        y = self.scan(u, route, z, merge="sum" if self.merge is None else None)
        y = y[..., :length, :] if slots else y
        if self.merge is not None:
            y = self.merge(y if place is None else take_places(y, place))
        y = self.out_proj(y * self.scale if self.scale != 1.0 else y)
        return y if self.gamma is None else y * self.gamma


def take_places(y: Tensor, place: Tensor) -> Tensor:
    """Exchanges tokens within each route: y (B, K, L, C), place (K, L) -> y[:, k, place[k, i]] at place i."""
    return y[:, torch.arange(len(place), device=y.device)[:, None], place]


class MambaBlock(nn.Module):
    """A pre-norm block without MLP: x + drop_path(mixer(norm(x))).

    Args:
        dim: channels of the stream.
        drop_path: probability of dropping the mixer's output for a sample.
        norm_layer: dim -> norm.
        mixer: arguments of `MambaMixer`.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, norm_layer: Callable = RMSNorm, **mixer):
        super().__init__()
        self.norm = norm_layer(dim)
        self.mixer = MambaMixer(dim, **mixer)
        self.drop_path = DropPath(drop_path)

    def branch(self, x: Tensor, route: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The stream as the block reads it (turned, where there are rotary tables), and the mixer's output."""
        if rope is not None:
            x = rotate_pairs(x, *rope)
        return x, self.mixer(self.norm(x), route)

    def forward(self, x: Tensor, route: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, L, dim), route (K, S) -> (B, L, dim)."""
        x, h = self.branch(x, route, rope)
        return x + self.drop_path(h)


# Our parameter, stacked over routes: the names of its forward and backward rows in the files of Vim and VideoMamba.
DIRECTIONS = {
    "conv_weight": ("conv1d.weight", "conv1d_b.weight"),
    "conv_bias": ("conv1d.bias", "conv1d_b.bias"),
    "x_proj": ("x_proj.weight", "x_proj_b.weight"),
    "dt_proj": ("dt_proj.weight", "dt_proj_b.weight"),
    "dt_bias": ("dt_proj.bias", "dt_proj_b.bias"),
    "A_log": ("A_log", "A_b_log"),
    "D": ("D", "D_b"),
}


def stack_directions(state: dict[str, Tensor], prefix: str, mixer: MambaMixer) -> dict[str, Tensor]:
    """Takes the two directions' tensors under `prefix` out of `state`; returns them under the mixer's own names."""
    out = {}
    for name, keys in DIRECTIONS.items():
        rows = [state.pop(prefix + key) for key in keys[: getattr(mixer, name).shape[0]]]
        out[name] = torch.stack([row.squeeze(1) if row.ndim == 3 else row for row in rows])
    return out
