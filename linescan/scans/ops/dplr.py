"""Diagonal plus low rank: a matrix state per head whose transition is a diagonal and one outer product.

`rwkv7`, `comba` and `gated_delta_rule_2` are such recurrences in other terms. The chunked form solves one triangular
system per chunk, as `delta` does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import decayed_scores, solve_unit_lower, split, through_chunks
from ..recurrence import check_arguments, precise, public, recurrence

__all__ = ["comba", "dplr", "gated_delta_rule_2", "rwkv7"]


@recurrence(
    "q k a b g: B K L H dk; v: B K L H dv",
    "B K L H dv",
    state="B R H dk dv",
    scale=lambda dk: dk**-0.5,
    flops="9 * B * R * S * H * dk * dv",  # per element of a state: decay 1, what a reads, two updates, readout 2 each
    values=dict(a=lambda x: F.normalize(x, dim=-1), b=lambda x: 0.3 * x, g=F.logsigmoid),
)
def _dplr(q, k, v, a, b, g, scale: float, initial_state):
    state, outputs = initial_state, []
    for q_t, k_t, v_t, a_t, b_t, g_t in zip(*(x.unbind(2) for x in (q, k, v, a, b, g))):
        removed = b_t[..., None] * (a_t[..., None] * state).sum(-2, keepdim=True)
        state = g_t.exp()[..., None] * state + removed + k_t[..., None] * v_t[..., None, :]
        outputs.append(scale * (q_t[..., None] * state).sum(-2))
    return torch.stack(outputs, 2), state


def _later(x: Tensor) -> Tensor:
    """Rows of a chunk moved down by one, zeros first: what a token sees is what the token before it left."""
    return torch.cat((torch.zeros_like(x[..., :1, :]), x[..., :-1, :]), -2)


@_dplr.chunked
def _dplr_chunked(q, k, v, a, b, g, scale, initial_state):
    length = q.shape[2]
    q, k, v, a, b, g = split(scale * q, k, v, a, b, g)
    # `a` reads the state before the token's own decay: as a query, it belongs to the token before.
    early = torch.cat((a[..., 1:, :], torch.zeros_like(a[..., :1, :])), -2)
    scores, before, after = decayed_scores(torch.stack((q, early))[:, None], torch.stack((k, b)), g)
    (q_k, q_b), (a_k, a_b) = scores[0], _later(scores[1])
    # What `a` reads in a chunk that S enters is `fixed` + `by_state` S.
    fixed, by_state = solve_unit_lower(-a_b, a_k @ v, a * _later(before).exp())
    keys, others = (k * after.exp()).mT, (b * after.exp()).mT
    transition = torch.diag_embed(before[..., -1, :].exp()) + others @ by_state
    readout = q * before.exp() + q_b @ by_state
    return through_chunks(transition, keys @ v + others @ fixed, readout, q_k @ v + q_b @ fixed, initial_state, length)


@public(_dplr)
def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Diagonal plus low rank: any decay and any rank-one change of the state.

        S_t = (diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", 2025, arXiv 2503.14456. The state stays bounded
    only where diag(exp(g)) + b a^T does not enlarge it, as in `rwkv7`.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        a: reads the state before its decay (B, K or 1, L, H, dk).
        b: writes what `a` read (B, K or 1, L, H, dk).
        g: log decays <= 0 of the key channels (B, K or 1, L, H, dk).
        scale: of the queries; dk ** -0.5 by default.
        initial_state: (B, K, H, dk, dv).
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token leaves the state
            as it is.

    Returns:
        (B, K, L, H, dv), merged (B, L, H, dv).
    """
    inputs = q, k, v, a, b, g, scale, initial_state
    return _dplr(*inputs, route=route, merge=merge, return_final_state=return_final_state)


@public(
    _dplr,
    "r k w kk a: B K L H dk; v: B K L H dv",
    state="B R H dk dv",
    values=dict(w=lambda x: -0.6 * x.sigmoid(), a=torch.sigmoid, kk=lambda x: F.normalize(x, dim=-1)),
)
def rwkv7(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    kk: Tensor,
    a: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The mixer of RWKV-7: `dplr` with a = -kk and b = kk a.

        S_t = (diag(exp(w_t)) - (kk_t a_t) kk_t^T) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T r_t

    Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", 2025, arXiv 2503.14456.

    Args:
        r, k: receptances and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        w: log decays of the key channels (B, K or 1, L, H, dk); RWKV-7 has them in (-0.607, 0).
        kk: keys of what is removed, of norm 1 (B, K or 1, L, H, dk).
        a: how much of it is removed, in [0, 1] (B, K or 1, L, H, dk).
        scale: of the receptances; 1 by default, as in RWKV-7.

    All else as of `dplr`.
    """
    check_arguments("rwkv7", r, k, v, w, kk, a, scale, initial_state, route=route)
    inputs = r, k, v, -kk, precise(kk) * precise(a), w, 1.0 if scale is None else scale, initial_state
    return _dplr(*inputs, route=route, merge=merge, return_final_state=return_final_state)


@public(
    _dplr,
    "q k: B K L H dk; v: B K L H dv; p: B K L H dk; g beta: B K L H",
    state="B R H dk dv",
    values=dict(
        k=lambda x: F.normalize(x, dim=-1), p=lambda x: F.normalize(x, dim=-1), g=F.logsigmoid, beta=torch.sigmoid
    ),
)
def comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Comba: a delta rule whose error is what another key read before the decay.

        S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T
        o_t = scale * S_t^T q_t

    Hu et al., "Comba: Improving Bilinear RNNs with Closed-loop Control", 2025, arXiv 2506.02475. It is `dplr` with
    a = p and b = -beta k. Comba's p is k times a factor of the head, its query q - d p with a factor d of the head.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        p: keys that the error is read with (B, K or 1, L, H, dk).
        g: log decays <= 0 of the heads (B, K or 1, L, H).
        beta: how much of an error is corrected (B, K or 1, L, H).

    All else as of `dplr`.
    """
    check_arguments("comba", q, k, v, p, g, beta, scale, initial_state, route=route)
    written = precise(beta)[..., None] * precise(k)
    inputs = q, written, v, p, -written, g[..., None].expand(*g.shape, k.shape[-1]), scale, initial_state
    return _dplr(*inputs, route=route, merge=merge, return_final_state=return_final_state)


@public(
    _dplr,
    "q k: B K L H dk; v: B K L H dv; g b: B K L H dk; w: B K L H dv",
    state="B R H dk dv",
    values=dict(k=lambda x: F.normalize(x, dim=-1), g=F.logsigmoid, b=torch.sigmoid, w=torch.sigmoid),
)
def gated_delta_rule_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The rule of Gated DeltaNet-2: what is erased and what is written have gates of their own, by channel.

        P_t = diag(exp(g_t)) S_{t-1}
        S_t = P_t + k_t (w_t * v_t - P_t^T (b_t * k_t))^T
        o_t = scale * S_t^T q_t

    Hatamizadeh et al., "Gated DeltaNet-2", 2026, arXiv 2605.22791. It is `dplr` with a = exp(g) * b * k and b = -k;
    with b = w = beta it is `kda`.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk); keys of norm 1 keep the state bounded.
        v: values (B, K or 1, L, H, dv).
        g: log decays <= 0 of the key channels (B, K or 1, L, H, dk).
        b: how much of each key channel is erased, in [0, 1], or in [0, 2] (B, K or 1, L, H, dk).
        w: how much of each value channel is written, in [0, 1] (B, K or 1, L, H, dv).

    All else as of `dplr`.
    """
    check_arguments("gated_delta_rule_2", q, k, v, g, b, w, scale, initial_state, route=route)
    read = precise(g).exp() * precise(b) * precise(k)
    inputs = q, k, precise(w) * precise(v), read, -k, g, scale, initial_state
    return _dplr(*inputs, route=route, merge=merge, return_final_state=return_final_state)
