"""WKV of RWKV-6, causal and to both sides: a matrix state per head, a decay for every key channel, a bonus."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._compat import is_watched, plain_shape
from ..chunks import gated_outer_products
from ..recurrence import check_arguments, public, recurrence
from ..routes import table
from ..visits import declare, known

__all__ = ["wkv6", "bi_wkv6"]

TOKENS = "r k w: B K L H dk; v: B K L H dv; u: [K] H dk"
VALUES = dict(w=F.logsigmoid)


@recurrence(
    TOKENS,
    "B K L H dv",
    state="B R H dk dv",
    scale=1.0,
    flops="B * R * S * H * (5 * dk * dv + 3 * dk + 2 * dv)",  # decay, update and readout of a state; the bonus
    values=VALUES,
)
def _wkv6(r, k, v, w, u, scale: float, initial_state):
    state, outputs = initial_state, []
    for r_t, k_t, v_t, w_t in zip(*(x.unbind(2) for x in (r, k, v, w))):
        own = (r_t * u * k_t).sum(-1, keepdim=True) * v_t
        outputs.append(scale * ((r_t[..., None] * state).sum(-2) + own))
        state = w_t.exp()[..., None] * state + k_t[..., None] * v_t[..., None, :]
    return torch.stack(outputs, 2), state


@_wkv6.chunked
def _wkv6_chunked(r, k, v, w, u, scale, initial_state):
    """Gated linear attention one step late: what a token reads is the state that the token before it left."""
    late = [torch.cat((torch.zeros_like(x[:, :, :1]), x[:, :, :-1]), 2) for x in (k, v, w)]
    y, state = gated_outer_products(r, *late, scale, initial_state)
    y = y + scale * (r * u[:, None] * k).sum(-1, keepdim=True) * v
    return y, w[:, :, -1].exp()[..., None] * state + k[:, :, -1, :, :, None] * v[:, :, -1, :, None]


@public(_wkv6)
def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """WKV of RWKV-6: gated linear attention whose own token has a weight of its own.

        o_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T r_t
        S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T

    Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", 2024, arXiv 2404.05892.

    Args:
        r, k: receptances and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        w: log decays <= 0 of the key channels (B, K or 1, L, H, dk).
        u: bonus of the token itself (H, dk) or (K, H, dk), one per route.
        scale: of the receptances; 1 by default, as in RWKV-6.
        initial_state: (B, K, H, dk, dv).
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token leaves the state
            as it is.

    Returns:
        (B, K, L, H, dv), merged (B, L, H, dv).
    """
    inputs = r, k, v, w, u, scale, initial_state
    return _wkv6(*inputs, route=route, merge=merge, return_final_state=return_final_state)


@public(_wkv6, TOKENS, values=VALUES)
def bi_wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    scale: float | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
) -> Tensor:
    """WKV of RWKV-6 over the tokens on both sides, as VRWKV6 has it.

        o_t = scale * (S_{t-1} + diag(u) k_t v_t^T + R_{t+1})^T r_t
        S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T,    R_t = diag(exp(w_t)) R_{t+1} + k_t v_t^T

    Duan et al., "Vision-RWKV", 2024, arXiv 2403.02308, in the official repository's VRWKV6. What lies between two
    tokens are the decays of those strictly between them. It is `wkv6` along every route and along its reverse, with the
    bonus on one.

    Args:
        r, k, v, w, u, scale, route, merge: as of `wkv6`.

    Returns:
        (B, K, L, H, dv), merged (B, L, H, dv).
    """
    _, routes, length = check_arguments("bi_wkv6", r, k, v, w, u, scale, route=route)
    u = u.expand(routes, *u.shape[-2:])
    both = _both_ways(route, routes, length, r.device)
    tokens = [torch.cat((x, x), 1) if plain_shape(x)[1] > 1 else x for x in (r, k, v, w)]
    y = wkv6(*tokens, torch.cat((u, torch.zeros_like(u))), scale=scale, route=both, merge=merge)
    return y if merge else y.unflatten(1, (2, routes)).sum(1)


def _both_ways(route: Tensor | None, routes: int, length: int, device: torch.device) -> Tensor:
    """The table of a table's routes, or of `routes` stored orders, and then of their reverses."""
    if route is None and routes == 1 and length and not is_watched():
        return table("row, -row", (1, length), device)  # which is kept
    there = torch.arange(length, device=device).expand(routes, length) if route is None else route
    both, visits = torch.cat((there, there.flip(-1)), -2), known(route)
    if route is None:
        declare(both, length, permutation=True, padding=False)
    elif visits is not None:
        declare(both, visits.length, visits.permutation, visits.padding)
    return both
