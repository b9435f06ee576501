"""Selective scan (S6), the recurrence of Mamba.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv 2312.00752, equations 2 and 4
with the zero-order hold for A and the Euler rule for B, as the authors' implementation has it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .recurrence import recurrence

__all__ = ["selective_scan"]


def _shapes(batch, routes, length, u, delta, A, *_):
    return (batch, routes, length, u.shape[-1]), (batch, routes, u.shape[-1], A.shape[-1])


def _flops(u, delta, A, *_):
    batch, routes, length, channels = delta
    return 9 * batch * routes * length * channels * A[-1]


def _prepare(delta, B, C, D, delta_bias, delta_softplus, channels):
    """Step sizes after bias and softplus; B and C repeated from groups to (B, K, T, channels, N) by a view."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    return delta


def _groups(x: Tensor, channels: int) -> Tensor:
    """(..., G, N) -> (..., D, N): each group of channels shares one row."""
    return x.repeat_interleave(channels // x.shape[-2], -2)


@recurrence(tokens=("u", "delta", "B", "C", "z"), shapes=_shapes, flops=_flops)
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    channels = u.shape[-1]
    delta = _prepare(delta, B, C, D, delta_bias, delta_softplus, channels)
    B, C = _groups(B, channels), _groups(C, channels)
    state = initial_state
    if state is None:
        state = torch.zeros_like(A).expand(*u.shape[:2], *A.shape[1:])
    outputs = []
    for t in range(u.shape[2]):
        step = delta[:, :, t, :, None]
        state = torch.exp(step * A) * state + step * B[:, :, t] * u[:, :, t, :, None]
        outputs.append((state * C[:, :, t]).sum(-1))
    y = torch.stack(outputs, 2)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return y, state
