"""Mixture of memories: a router sends each token to a few of several states, each a recurrence of its own.

A memory sees its tokens, in order, and is left as it is by all others: it is a route through those tokens. So the
memories are further routes of a recurrence, with a table for every sample.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._compat import is_watched, plain_shape
from ..recurrence import Recurrence, check_arguments, check_merge, precise, public
from ..visits import declare, is_recording
from .delta import VALUES, _gated_delta_rule
from .gla import _gla

__all__ = ["mom_gated_delta_rule", "mom_gla"]


def _wrong(E, M, top) -> str | None:
    if E not in (M, M + 1):
        return f"k has {E} memories, logits {M}: give as many, or one more that every token is sent to"
    return None if 1 <= top <= M else f"top is 1 to {M}, the number of memories, got {top}"


def _chosen(logits: Tensor, top: int, memories: int) -> Tensor:
    """Weights (..., memories) that sum to 1 over the `top` chosen ones, -1 at all others; shared memories have 1."""
    weights, which = precise(logits).softmax(-1).topk(top, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    weights = torch.full_like(logits, -1, dtype=weights.dtype).scatter(-1, which, weights)
    return F.pad(weights, (0, memories - logits.shape[-1]), value=1.0)


def _table(chosen: Tensor, route: Tensor | None, batch: int, routes: int, length: int) -> Tensor:
    """The table (B, K * memories, S) of the memories, from which tokens they get: chosen (B, K or 1, L, memories)."""
    route = torch.arange(length, device=chosen.device) if route is None else route.long()
    route = route.expand(batch, routes, route.shape[-1])
    if length == 0:
        return route[:, :, None].expand(-1, -1, chosen.shape[-1], -1).flatten(1, 2)
    token = torch.where(route < 0, (-2 - route).clamp_min(0), route)
    there = chosen.expand(-1, routes, -1, -1).gather(2, token[..., None].expand(-1, -1, -1, chosen.shape[-1]))
    table = torch.where(there, route[..., None], -1).movedim(-1, 2).flatten(1, 2)
    # Steps that no memory takes are left out, where their number may be asked for.
    if not (is_watched() or table.is_meta or is_recording(table)) and table.numel():
        absent = table == -1
        table = table.gather(-1, absent.int().argsort(dim=-1, stable=True))[..., : int((~absent).sum(-1).amax())]
    return declare(table, length, permutation=False)


def _routed(core: Recurrence, q, others, logits, top, scale, state, sizes, route, merge, return_final_state):
    """The core's output over all memories; q (B, K or 1, L, ...), others (B, K or 1, L, memories, ...)."""
    check_merge(core.name, merge)
    batch, routes, length = sizes
    memories, dtype = plain_shape(others[0])[3], q.dtype
    weights = _chosen(logits, top, memories)
    table = _table(weights >= 0, route, batch, routes, length)
    if plain_shape(q)[1] > 1:
        q = q.repeat_interleave(memories, 1)
    others = [x.movedim(3, 2) for x in others]
    others = [x.expand(-1, routes, *x.shape[2:]).flatten(1, 2) for x in others]
    state = None if state is None else state.flatten(1, 2)
    y, state = core(precise(q), *others, scale, state, route=table, return_final_state=True)
    y = y.unflatten(1, (routes, memories)) * weights.clamp_min(0).movedim(-1, 2)[..., None, None]
    y = (y.sum((1, 2)) if merge else y.sum(2)).to(dtype)
    return (y, state.unflatten(1, (routes, memories))) if return_final_state else y


MEMORIES = dict(state="B R E H dk dv", requires=_wrong, sizes=dict(M=3, E=4))


@public(
    _gated_delta_rule,
    "q: B K L H dk; logits: B K L M; k: B K L E H dk; v: B K L E H dv; g beta: B K L E H",
    values=VALUES,
    **MEMORIES,
)
def mom_gated_delta_rule(
    q: Tensor,
    logits: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    top: int = 2,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mixture of memories over the gated delta rule: a token reads and writes the few memories it is sent to.

        E_t = the `top` largest of p_t = softmax(logits_t),    w_te = p_te / sum_{e in E_t} p_te
        S_te = a step of `gated_delta_rule` with (k, v, g, beta)_te    for e in E_t, otherwise S_{t-1,e}
        o_t = scale * sum_{e in E_t} w_te S_te^T q_t                   (and a shared memory's S_t^T q_t)

    Du et al., "MoM: Linear Sequence Modeling with Mixture-of-Memories", 2025, arXiv 2502.13685. With one memory more
    than there are logits, the last is a shared one that every token reads and writes. No token is dropped.

    Args:
        q: queries (B, K or 1, L, H, dk).
        logits: of the router (B, K or 1, L, M).
        k: keys, for every memory (B, K or 1, L, E, H, dk), E = M or M + 1.
        v: values, for every memory (B, K or 1, L, E, H, dv).
        g: log decays <= 0, for every memory (B, K or 1, L, E, H).
        beta: how much of an error is corrected, for every memory (B, K or 1, L, E, H).
        top: memories that a token is sent to.
        scale: of the queries; dk ** -0.5 by default.
        initial_state: (B, K, E, H, dk, dv).
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token leaves all
            states as they are.

    Returns:
        (B, K, L, H, dv), merged (B, L, H, dv).
    """
    sizes = check_arguments("mom_gated_delta_rule", q, logits, k, v, g, beta, top, scale, initial_state, route=route)
    call = q, (k, v, g[..., None], beta), logits, top, scale, initial_state, sizes
    return _routed(_gated_delta_rule, *call, route, merge, return_final_state)


@public(_gla, "q: B K L H dk; logits: B K L M; k g: B K L E H dk; v: B K L E H dv", values=VALUES, **MEMORIES)
def mom_gla(
    q: Tensor,
    logits: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    top: int = 2,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mixture of memories over gated linear attention.

        S_te = diag(exp(g_te)) S_{t-1,e} + k_te v_te^T    for e in E_t, otherwise S_{t-1,e}
        o_t = scale * sum_{e in E_t} w_te S_te^T q_t      with E_t and w_te as of `mom_gated_delta_rule`

    Du et al., 2025, arXiv 2502.13685.

    Args:
        g: log decays <= 0 of the key channels, for every memory (B, K or 1, L, E, H, dk).

    All else as of `mom_gated_delta_rule`.
    """
    sizes = check_arguments("mom_gla", q, logits, k, v, g, top, scale, initial_state, route=route)
    return _routed(_gla, q, (k, v, g), logits, top, scale, initial_state, sizes, route, merge, return_final_state)
