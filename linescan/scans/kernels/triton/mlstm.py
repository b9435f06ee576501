"""mLSTM in Triton, on the kernels of `gla`: sums relative to their largest exponent have gates and weights up to 1.

Exponents are one number a head and step, found in time order, in plain torch, and in float64, since gates are small
differences of large ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.linear_attention import _counted
from ...ops.mlstm import EMPTY, _normalized
from ...visits import visited, write
from .common import again, in_time
from .gla import Scan, merged


def _largest(i: Tensor, forget: Tensor, top: Tensor) -> Tensor:
    """m_t = max(m_{t-1} + forget_t, i_t) after every step (B, K, S, H), from `top` (B, K, H), by doubling windows."""
    gates, span = forget, 1
    while span < i.shape[2]:
        i, gates = (
            torch.cat((i[:, :, :span], torch.maximum(i[:, :, span:], i[:, :, :-span] + gates[:, :, span:])), 2),
            torch.cat((gates[:, :, :span], gates[:, :, span:] + gates[:, :, :-span]), 2),
        )
        span *= 2
    return torch.maximum(i, top[:, :, None] + gates)


def forward(q, k, v, i, f, scale, memory, top, route, merge) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    batch, routes, length = visited((q, k, v, i, f), route)
    i, f = (in_time(x, route).double().expand(batch, routes, -1, -1) for x in (i, f))
    top = torch.full_like(i[:, :, 0], EMPTY) if top is None else top.double()
    forget = F.logsigmoid(f)
    after = _largest(i, forget, top)
    before = torch.cat((top[:, :, None], after[:, :, :-1]), 2)
    gates, weights, tops = before + forget - after, (i - after).exp(), after.float()
    sums, memory = Scan.apply(q, k, _counted(v, True), gates.float(), weights.float(), memory, scale, route)
    return merged(_normalized(sums, write(tops, route, length)), merge, q.dtype), (memory, tops[:, :, -1])


backward = again(forward)
