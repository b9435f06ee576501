"""State space duality (SSD), the recurrence of Mamba-2, with a scalar decay per head."""

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import running, segment_sums
from ..recurrence import public, recurrence
from .gla import _simple_gla

__all__ = ["ssd"]

CHUNK = 32  # tokens that one matrix product covers


def _step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max):
    if dt_bias is not None:
        dt = dt + dt_bias[:, None]
    if dt_softplus:
        dt = F.softplus(dt)
    return dt.clamp(dt_min, dt_max)


def _output(y, x, D, z):
    if D is not None:
        y = y + D[:, None, :, None] * x
    return y if z is None else y * F.silu(z)


@recurrence(
    "x z?: B K L H P; dt: B K L H; A: R H; B C: B K L G N; D? dt_bias?: R H",
    "B K L H P",
    state="B R H N P",
    requires=lambda H, G: f"{H} heads do not divide into the {G} groups of B and C" if H % G else None,
    flops="5 * B * R * S * H * P * N",
    values=dict(A=lambda x: -x.exp(), dt=lambda x: x - 2),
    sizes=dict(H=4, G=2),
    dt_max=inf,
)
def _ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus: bool, dt_min: float, dt_max: float, initial_state):
    step, state = _step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max), initial_state
    B, C = (v.repeat_interleave(x.shape[3] // v.shape[3], 3) for v in (B, C))  # (B, K, T, H, N)
    outputs = []
    for s_t, x_t, B_t, C_t in zip(step.unbind(2), x.unbind(2), B.unbind(2), C.unbind(2)):
        decay = torch.exp(A * s_t)[..., None, None]
        state = decay * state + (s_t[..., None] * B_t)[..., None] * x_t[..., None, :]
        outputs.append((C_t[..., None] * state).sum(-2))
    return _output(torch.stack(outputs, 2), x, D, z), state


@_ssd.chunked
def _chunked(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state):
    # (B, K, chunk, G, ...): tokens of a chunk I, J; the M = H/G heads of a group.
    length, groups = x.shape[2], B.shape[3]
    size = min(CHUNK, length)
    step = _step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max)

    def split(tokens, *inner):  # steps of size zero fill the last chunk: they leave the state alone
        tokens = F.pad(tokens, (0, 0) * (tokens.ndim - 3) + (0, -length % size))
        return tokens.unflatten(2, (-1, size)).unflatten(4, inner).transpose(3, 4)

    inputs = split(step.unsqueeze(-1) * x, groups, -1)  # (B, K, chunk, G, J, M, P)
    g = split(A[:, None] * step, groups, -1).transpose(-1, -2)  # (B, K, chunk, G, M, J)
    B, C = split(B, groups), split(C, groups)  # (B, K, chunk, G, J, N)
    within, before = segment_sums(g)

    scores = (C @ B.mT).unsqueeze(4) * within.exp()  # (B, K, chunk, G, M, I, J)
    y = (scores @ inputs.transpose(4, 5)).transpose(4, 5)  # (B, K, chunk, G, I, M, P)
    after = within[..., -1, :].exp().mT.unsqueeze(-1)
    added = (B.mT @ (after * inputs).flatten(-2)).unflatten(-1, inputs.shape[-2:])  # (B, K, chunk, G, N, M, P)
    state = initial_state.unflatten(2, (groups, -1)).transpose(3, 4)  # (B, K, G, N, M, P)
    kept = before[..., -1].exp()[..., None, :, None]
    states = running(kept, added, state, 2)
    entered = (C @ states[:, :, :-1].flatten(-2)).unflatten(-1, inputs.shape[-2:])
    y = y + before.exp().mT.unsqueeze(-1) * entered
    y = y.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :length]  # (B, K, T, H, P)
    return _output(y, x, D, z), states[:, :, -1].transpose(3, 4).flatten(2, 3)


@_ssd.exported
def _in_graphs(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state):
    """As gated linear attention, which has a kernel there."""
    step = _step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max)
    q, k = (v.repeat_interleave(x.shape[3] // v.shape[3], 3) for v in (C, B))
    inputs = q, k, step[..., None] * x, A[:, None] * step, 1.0, initial_state
    y, state = _simple_gla(*inputs, return_final_state=True)
    return _output(y, x, D, z), state


@public(_ssd)
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
    *,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """State space duality: every head carries a state of N x P numbers under one scalar decay.

        s_t = clamp(softplus(dt_t + dt_bias), *dt_limit)           (or without the softplus)
        S_t = exp(A s_t) S_{t-1} + s_t B_t x_t^T
        y_t = (S_t^T C_t + D x_t) silu(z_t)

    Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
    Duality", 2024, arXiv 2405.21060, equation 1; the chunked form is that of its section 6.

    Args:
        x: inputs (B, K or 1, L, H, P).
        dt: step sizes (B, K or 1, L, H).
        A: negative decay rates (K, H).
        B, C: (B, K or 1, L, G, N), one row for each of G groups of H / G neighbouring heads.
        D: weight of the input in the output (K, H).
        z: gate of the output (B, K or 1, L, H, P).
        dt_bias: added to dt (K, H).
        dt_softplus: pass the step sizes through softplus.
        dt_limit: smallest and largest step size.
        initial_state: (B, K, H, N, P); the authors' code keeps (H, P, N).
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token takes a step of
            the size that `dt_bias` alone gives.

    Returns:
        (B, K, L, H, P), merged (B, L, H, P).
    """
    dt_min, dt_max = map(float, dt_limit)
    most = None if dt_max == inf else dt_max  # AOTInductor reads no infinity from a file
    inputs = x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, most, initial_state
    return _ssd(*inputs, route=route, merge=merge, return_final_state=return_final_state)
