"""State space duality (SSD), the recurrence of Mamba-2.

Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
2024, arXiv 2405.21060, equation 1 with a scalar decay a head; the chunked form is that of its section 6.
"""

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import running
from ..recurrence import call, check_shapes, recurrence

__all__ = ["ssd"]

CHUNK = 32  # tokens that one matrix product covers


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
    """SSD along routes: every head carries a state of N x P numbers under one scalar decay.

        s_t = clamp(softplus(dt_t + dt_bias), *dt_limit)           (or without the softplus)
        S_t = exp(A s_t) S_{t-1} + s_t B_t x_t^T
        y_t = (S_t^T C_t + D x_t) silu(z_t)

    Args:
        x: (B, K or 1, L, H, P) input. Any of the token inputs may have 1 on the route axis: all routes share it.
        dt: (B, K or 1, L, H) step sizes.
        A: (K, H) negative decay rates.
        B: (B, K or 1, L, G, N), one row for each of G groups of H / G neighbouring heads.
        C: as B.
        D: (K, H) weight of the input in the output.
        z: (B, K or 1, L, H, P) gate of the output.
        dt_bias: (K, H) added to dt.
        dt_softplus: pass the step sizes through softplus.
        dt_limit: smallest and largest step size.
        initial_state: (B, K, H, N, P), zeros if None; the authors' code keeps (H, P, N).
        route: integer table (K, S) or (B, K, S), see `recurrence`.
        merge: None, or "sum" to add the routes' outputs.
        return_final_state: also return the state after the last step.

    Returns:
        y: (B, K, L, H, P), or (B, L, H, P) merged; the dtype of x.
        final state: (B, K, H, N, P), float32 (float64 for float64 inputs), if `return_final_state`.

    Raises:
        ValueError: a shape does not fit, or `merge` is unknown.
    """
    check_shapes(
        "ssd",
        route,
        x=(x, "B K L H P"),
        dt=(dt, "B K L H"),
        A=(A, "R H"),
        B=(B, "B K L G N"),
        C=(C, "B K L G N"),
        D=(D, "R H"),
        z=(z, "B K L H P"),
        dt_bias=(dt_bias, "R H"),
        initial_state=(initial_state, "B R H N P"),
    )
    heads, groups = x.shape[3], B.shape[3]
    if heads % groups:
        raise ValueError(f"ssd: {heads} heads do not divide into the {groups} groups of B and C")
    dt_min, dt_max = dt_limit
    inputs = (x, dt, A, B, C, D, z, dt_bias, dt_softplus, float(dt_min), float(dt_max), initial_state)
    return call(_ssd, *inputs, route=route, merge=merge, return_final_state=return_final_state)


def _shapes(batch, routes, length, x, dt, A, B, *_):
    return (batch, routes, length, *x.shape[3:]), (batch, routes, x.shape[3], B.shape[4], x.shape[4])


def _flops(x, dt, A, B, *_):
    batch, _, length, heads, channels = x
    return 5 * batch * A[0] * length * heads * channels * B[-1]


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


def _first_state(x, B, initial_state):
    if initial_state is not None:
        return initial_state
    return x.new_zeros(*x.shape[:2], x.shape[3], B.shape[4], x.shape[4])


@recurrence(tokens=("x", "dt", "B", "C", "z"), shapes=_shapes, flops=_flops)
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    step = _step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max)
    state = _first_state(x, B, initial_state)
    B, C = (v.repeat_interleave(x.shape[3] // v.shape[3], 3) for v in (B, C))  # (B, K, T, H, N)
    outputs = []
    for s_t, x_t, B_t, C_t in zip(step.unbind(2), x.unbind(2), B.unbind(2), C.unbind(2)):
        decay = torch.exp(A * s_t)[..., None, None]
        state = decay * state + (s_t[..., None] * B_t)[..., None] * x_t[..., None, :]
        outputs.append((C_t[..., None] * state).sum(-2))
    return _output(torch.stack(outputs, 2), x, D, z), state


def _segment_sums(g: Tensor) -> tuple[Tensor, Tensor]:
    """Log decays (..., T) -> their sums over (j, i], (..., T, T) with -inf above the diagonal; their sums up to i.

    Summed for every j by itself: differences of one long sum would lose what a strong decay before j has swallowed.
    """
    above = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu()
    sums = g.unsqueeze(-1).expand(*g.shape, g.shape[-1]).masked_fill(above, 0).cumsum(-2)
    return sums.masked_fill(above.triu(1), -inf), g.cumsum(-1)


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
    first = _first_state(x, B, initial_state)
    B, C = split(B, groups), split(C, groups)  # (B, K, chunk, G, J, N)
    within, before = _segment_sums(g)

    scores = (C @ B.mT).unsqueeze(4) * within.exp()  # (B, K, chunk, G, M, I, J)
    y = (scores @ inputs.transpose(4, 5)).transpose(4, 5)  # (B, K, chunk, G, I, M, P)
    after = within[..., -1, :].exp().mT.unsqueeze(-1)
    added = (B.mT @ (after * inputs).flatten(-2)).unflatten(-1, inputs.shape[-2:])  # (B, K, chunk, G, N, M, P)
    state = first.unflatten(2, (groups, -1)).transpose(3, 4)  # (B, K, G, N, M, P)
    kept = before[..., -1].exp()[..., None, :, None]
    states = running(kept, added, state, 2)
    entered = (C @ states[:, :, :-1].flatten(-2)).unflatten(-1, inputs.shape[-2:])
    y = y + before.exp().mT.unsqueeze(-1) * entered
    y = y.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :length]  # (B, K, T, H, P)
    return _output(y, x, D, z), states[:, :, -1].transpose(3, 4).flatten(2, 3)
