"""The BiGLA mixer: gated linear attention forward and backward over a map, blended with its own local convolution.

Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention", arXiv 2405.18425; the
attention itself is Yang et al., arXiv 2312.06635.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scans import gla, routes
from .norm import RMSNorm
from .stems import MapConv2d

__all__ = ["BiGLA"]


class BiGLA(nn.Module):
    """Token mixer (B, H, W, dim) -> (B, H, W, dim).

    A 3x3 depthwise convolution reads the map; everything else reads the convolution. The two directions of the row
    order share queries, keys and values and have each their own forget gates ("direction-wise gating"). Their sum,
    normalised per head, and the convolution, normalised alike, are blended by a learned sigmoid gate a channel.

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

    Raises:
        ValueError: `num_heads` does not divide the channels of values and keys.
    """

    directions = "row,-row"

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
    ):
        super().__init__()
        key_dim = int(dim * expand_k)
        if dim % num_heads or key_dim % num_heads:
            raise ValueError(f"num_heads has to divide dim {dim} and the keys' {key_dim}, got {num_heads}")
        self.num_heads = num_heads
        self.split = key_dim, key_dim, dim
        self.scale = scale * (key_dim // num_heads) ** -0.5
        self.gate_normalizer = gate_normalizer
        self.conv = MapConv2d(dim, dim, 3, padding=1, groups=dim, bias=conv_bias)
        self.conv_act = nn.SiLU() if conv_act else nn.Identity()
        self.qkv = nn.Linear(dim, sum(self.split), bias=False)
        self.forget = nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, 2 * key_dim))
        self.gate = nn.Linear(dim, dim)
        self.norm = RMSNorm(dim // num_heads, eps=1e-6)
        self.local_norm = RMSNorm(dim // num_heads, eps=1e-6)
        self.out_act = nn.SiLU() if out_act else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier with gain 2^-2.5; gates start at logsigmoid(0) / 16, a decay of 0.958 a token."""
        for layer in (self.conv, self.qkv, *self.forget, self.gate, self.proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[1:3]
        local = self.conv_act(self.conv(x)).flatten(1, 2)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1))[:, None] for t in self.qkv(local).split(self.split, -1))
        forget = self.forget(local)
        forget = F.logsigmoid(forget.to(torch.promote_types(forget.dtype, torch.float32))) / self.gate_normalizer
        forget = forget.unflatten(-1, (2, self.num_heads, -1)).transpose(1, 2)  # (B, 2, L, heads, dk)
        route = routes.table(self.directions, tuple(grid), x.device)
        mixed = self.norm(gla(q, k, v, forget, scale=self.scale, route=route, merge="sum"))
        gate = torch.sigmoid(self.gate(local)).unflatten(-1, (self.num_heads, -1))
        local = self.local_norm(local.unflatten(-1, (self.num_heads, -1)))
        y = self.out_act(gate * mixed + (1 - gate) * local)
        return self.proj(y.flatten(2)).unflatten(1, grid)
