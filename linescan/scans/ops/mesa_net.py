"""MesaNet: the readout solves, at every token, the ridge regression of all values on all keys so far."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import gated_outer_products, linear_scan, steps_at_a_time
from ..recurrence import given_states, public, recurrence

__all__ = ["mesa_net"]


def _solved(matrix: Tensor, side: Tensor) -> Tensor:
    """matrix (..., n, n), positive definite, ^-1 side (..., n), by elimination."""
    rest, rows, solution = torch.cat((matrix, side[..., None]), -1), [], []
    while rest.shape[-2]:
        first, others = rest[..., :1, :], rest[..., 1:, :]
        rows.append(first.squeeze(-2))
        rest = (others - others[..., :1] / first[..., :1] * first)[..., 1:]
    for row in reversed(rows):
        known = sum([a * x for a, x in zip(row[..., 1:-1].unbind(-1), solution)])
        solution.insert(0, (row[..., -1] - known) / row[..., 0])
    return torch.stack(solution, -1)


@recurrence(
    "q k: B K L H dk; v: B K L H dv; g beta: B K L H; lamb: H dk",
    "B K L H dv",
    state="memory: B R H dk dv; keys: B R H dk dk",
    # Per element of the states: decay and update 3, readout 2; and an elimination with one right-hand side.
    flops="B * R * S * H * (5 * dk * dv + 3 * dk * dk + 2 * dk * dk * dk // 3 + 2 * dk * dk)",
    values=dict(
        q=lambda x: F.normalize(x, dim=-1),
        k=lambda x: F.normalize(x, dim=-1),
        g=F.logsigmoid,
        beta=torch.sigmoid,
        lamb=lambda x: F.softplus(x) + 0.25,
        keys=lambda x: 0.1 * x @ x.mT,
    ),
)
def _mesa_net(q, k, v, g, beta, lamb, memory, keys):
    outputs, ridge = [], torch.diag_embed(lamb)
    for q_t, k_t, v_t, g_t, beta_t in zip(*(x.unbind(2) for x in (q, k, v, g, beta))):
        decay, written = g_t.exp()[..., None, None], (beta_t[..., None] * k_t)[..., None]
        memory = decay * memory + written * v_t[..., None, :]
        keys = decay * keys + written * k_t[..., None, :]
        outputs.append((_solved(keys + ridge, q_t)[..., None] * memory).sum(-2))
    return torch.stack(outputs, 2), (memory, keys)


@_mesa_net.chunked
def _mesa_net_chunked(q, k, v, g, beta, lamb, memory, keys):
    """All solutions at once, a few tokens at a time: a system is smaller than the steps of an iteration would be."""
    written, solutions, ridge = beta[..., None] * k, [], torch.diag_embed(lamb)[:, None]
    size = k.shape[-1]
    for piece in zip(*(x.split(steps_at_a_time(k, size), 2) for x in (q, k, written, g))):
        q_p, k_p, written_p, g_p = (x.transpose(2, 3) for x in piece)
        added = (written_p[..., None] * k_p[..., None, :]).flatten(-2)
        sums = linear_scan(g_p.exp()[..., None], added, keys.flatten(-2)).unflatten(-1, (size, size))
        keys = sums[..., -1, :, :]
        solved = torch.linalg.solve(sums[..., 1:, :, :] + ridge, q_p[..., None])
        solutions.append(solved.squeeze(-1).transpose(2, 3))
    output, memory = gated_outer_products(torch.cat(solutions, 2), written, v, g[..., None], 1.0, memory)
    return output, (memory, keys)


@public(_mesa_net)
def mesa_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """MesaNet: linear attention whose queries are first solved for the keys, so that the readout is a regression.

        A_t = exp(g_t) A_{t-1} + beta_t k_t k_t^T
        S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T
        o_t = S_t^T (A_t + diag(lamb))^{-1} q_t

    von Oswald et al., "MesaNet: Sequence Modeling by Locally Optimal Test-Time Training", 2025, arXiv 2506.05233. The
    systems are solved exactly; the authors' kernels take 30 steps of conjugate gradients, which end 3e-4 from that.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk), of norm 1 in MesaNet.
        v: values (B, K or 1, L, H, dv).
        g: log decays <= 0 of the heads (B, K or 1, L, H).
        beta: weights of the tokens >= 0 (B, K or 1, L, H).
        lamb: ridge of the key channels > 0 (H, dk); MesaNet keeps it above 0.25.
        initial_state: a pair. memory: S (B, K, H, dk, dv); keys: A, symmetric and not negative (B, K, H, dk, dk).
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token leaves the state
            as it is.

    Returns:
        (B, K, L, H, dv), merged (B, L, H, dv).
    """
    inputs = q, k, v, g, beta, lamb, *given_states("mesa_net", initial_state)
    return _mesa_net(*inputs, route=route, merge=merge, return_final_state=return_final_state)
