"""The BiGLA mixer: gated linear attention forward and backward over a map, blended with its own local convolution.

Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention", arXiv 2405.18425; the
attention itself is Yang et al., arXiv 2312.06635.
"""

from typing import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..scans import gates, gla
from ..scans.multi_route import MultiRoute
from ..scans.recurrence import precise
from ..scans.routes import RouteLike
from .blocks import TokenMixer
from .linear import linear
from .norm import RMSNorm
from .stems import depthwise

__all__ = ["BiGLA"]


class BiGLA(TokenMixer):
    """Token mixer (B, H, W, dim) -> (B, H, W, dim).

    A 3x3 depthwise convolution reads the map; everything else reads the convolution. The two directions of the row
    order share queries, keys and values, and each has its own forget gates ("direction-wise gating"). Their sum,
    normalised per head, and the convolution, normalised alike, are blended by a learned sigmoid gate per channel.

    Args:
        dim: channels of the map, and of the values.
        num_heads: heads; each has dim / num_heads value channels.
        expand_k: channels of queries and keys as a multiple of `dim`.
        conv_act: SiLU after the convolution.
        conv_bias: bias of the convolution.
        out_act: SiLU after the blend.
        scale: factor on the sum of the two directions. The norm that follows takes it out again but for its eps.
        gate_rank: inner channels of the gates' projection.
        gate_normalizer: divides the gates' logarithm.
        routes: of the two scans, see `MultiRoute`.

    Raises:
        ValueError: `num_heads` does not divide the channels of values and keys.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        expand_k: float = 0.5,
        conv_act: bool = False,
        conv_bias: bool = False,
        out_act: bool = False,
        scale: float = 0.5,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        routes: RouteLike | Sequence[RouteLike] | int = "row, -row",
    ):
        super().__init__()
        key_dim = int(dim * expand_k)
        if dim % num_heads or key_dim % num_heads:
            raise InputError(f"num_heads has to divide dim {dim} and the keys' {key_dim}, got {num_heads}")
        self.num_heads = num_heads
        self.split = key_dim, key_dim, dim
        self.scale = scale * (key_dim // num_heads) ** -0.5
        self.gate_normalizer = gate_normalizer
        self.along = MultiRoute(gla, routes)
        self.conv = depthwise(dim, 3, bias=conv_bias)
        self.conv_act = nn.SiLU() if conv_act else nn.Identity()
        self.qkv = nn.Linear(dim, sum(self.split), bias=False)
        self.forget = nn.Sequential(
            nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, self.along.n_routes * key_dim)
        )
        self.gate = nn.Linear(dim, dim)
        self.norm = RMSNorm(dim // num_heads, eps=1e-6)
        self.local_norm = RMSNorm(dim // num_heads, eps=1e-6)
        self.out_act = nn.SiLU() if out_act else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier with gain 2^-2.5; gates start at logsigmoid(0) / 16, a decay of 0.958 per token."""
        for layer in (self.conv, self.qkv, *self.forget, self.gate, self.proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens (B, L, dim) -> q, k (B, 1, L, heads, dk), v (B, 1, L, heads, dv), log decays (B, 2, L, heads, dk)."""
        q, k, v = (t.unflatten(-1, (self.num_heads, -1))[:, None] for t in linear(self.qkv, x).split(self.split, -1))
        forget = linear(self.forget[1], linear(self.forget[0], x))
        forget = forget.unflatten(-1, (self.along.n_routes, self.num_heads, -1)).transpose(1, 2)
        return q, k, v, gates.log_sigmoid(precise(forget), 1 / self.gate_normalizer)

    def scan(self, q: Tensor, k: Tensor, v: Tensor, forget: Tensor, **options):
        """The two scans of what `project` made, added and scaled: (B, L, heads, dv); options of `MultiRoute`."""
        return self.along(q, k, v, forget, scale=self.scale, **options)

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], **options) -> tuple[Tensor, Tensor]:
        local = self.conv_act(self.conv(x.unflatten(1, grid))).flatten(1, 2)
        mixed, state = self.scan(*self.project(local), grid=grid, **options)
        gate = torch.sigmoid(linear(self.gate, local)).unflatten(-1, (self.num_heads, -1))
        local = self.local_norm(local.unflatten(-1, (self.num_heads, -1)))
        y = self.out_act(gate * self.norm(mixed) + (1 - gate) * local)
        return linear(self.proj, y.flatten(2)), state
