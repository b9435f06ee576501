"""Gated linear attention and its relatives: a matrix state per head that decays and takes in one product per token.

`gla` has a log decay for every key channel, `simple_gla` one per head, `retention` a constant one; `hgrn2` ties the
keys to the forget gate. Bidirectional forms are two routes, a row order and its reverse, over the same q, k, v with one
set of gates per route.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import gates
from ..chunks import gated_outer_products
from ..recurrence import check_arguments, precise, public, recurrence

__all__ = ["gla", "simple_gla", "retention", "hgrn2"]

HEADS = dict(
    output="B K L H dv",
    state="B R H dk dv",
    scale=lambda dk: dk**-0.5,
    flops="5 * B * R * S * H * dk * dv",  # per element of a state: decay and update 3, readout 2
)


def _sequential(q, k, v, g, scale, state):
    """The definition, for g (B, K, T, H, dk) or (B, K, T, H, 1)."""
    outputs = []
    for q_t, k_t, v_t, g_t in zip(*(x.unbind(2) for x in (q, k, v, g))):
        state = g_t.exp()[..., None] * state + k_t[..., None] * v_t[..., None, :]
        outputs.append(scale * (q_t[..., None] * state).sum(-2))
    return torch.stack(outputs, 2), state


@recurrence("q k: B K L H dk; v: B K L H dv; g: B K L H dk", values=dict(g=F.logsigmoid), **HEADS)
def _gla(q, k, v, g, scale: float, initial_state):
    return _sequential(q, k, v, g, scale, initial_state)


@_gla.chunked
def _gla_chunked(q, k, v, g, scale, initial_state):
    return gated_outer_products(q, k, v, g, scale, initial_state)


@recurrence("q k: B K L H dk; v: B K L H dv; g: B K L H", values=dict(g=F.logsigmoid), **HEADS)
def _simple_gla(q, k, v, g, scale: float, initial_state):
    return _sequential(q, k, v, g[..., None], scale, initial_state)


@_simple_gla.chunked
def _simple_gla_chunked(q, k, v, g, scale, initial_state):
    return gated_outer_products(q, k, v, g[..., None], scale, initial_state)


@public(_gla)
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated linear attention: a decay for every key channel.

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023, arXiv 2312.06635,
    equation 3.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        g: log decays <= 0 of the key channels (B, K or 1, L, H, dk); -inf forgets everything before the token.
        scale: of the queries; dk ** -0.5 by default.
        initial_state: (B, K, H, dk, dv).
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token leaves the state
            as it is.

    Returns:
        (B, K, L, H, dv), merged (B, L, H, dv).
    """
    inputs = q, k, v, g, scale, initial_state
    return _gla(*inputs, route=route, merge=merge, return_final_state=return_final_state)


@public(_simple_gla)
def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated linear attention with one decay per head.

        S_t = exp(g_t) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Yang et al., 2023, arXiv 2312.06635, table 1. With q = C, k = B, v = dt x and g = dt A it is the core of SSD (Dao
    and Gu, 2024, arXiv 2405.21060).

    Args:
        g: log decays <= 0 of the heads (B, K or 1, L, H).

    All else as of `gla`.
    """
    inputs = q, k, v, g, scale, initial_state
    return _simple_gla(*inputs, route=route, merge=merge, return_final_state=return_final_state)


@public(_simple_gla, "q k: B K L H dk; v: B K L H dv", state="B R H dk dv")
def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Retention: a constant decay per head, gamma_h = 1 - 2^(-5-h) for head h from 0.

        S_t = gamma_h S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023, arXiv 2307.08621,
    equations 5 to 8, without the rotation of q and k and the norm after it.

    All arguments as of `gla`.
    """
    batch, _, length = check_arguments("retention", q, k, v, scale, initial_state, route=route)
    g = torch.log1p(-(2.0 ** (-5 - torch.arange(q.shape[3], device=q.device, dtype=torch.float64))))
    g = g.to(torch.promote_types(q.dtype, torch.float32)).expand(batch, 1, length, -1)
    inputs = q, k, v, g, scale, initial_state
    return _simple_gla(*inputs, route=route, merge=merge, return_final_state=return_final_state)


@public(_gla, "q f: B K L H dk; v: B K L H dv", state="B R H dk dv")
def hgrn2(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    lower_bound: float | Tensor = 0.0,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """HGRN-2: keys are what the gate forgets.

        a_t = lb + (1 - lb) sigmoid(f_t)
        S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T
        o_t = scale * S_t^T silu(q_t)

    Qin et al., "HGRN2: Gated Linear RNNs with State Expansion", 2024, arXiv 2404.07904, equation 5. The key 1 - a and
    the log decay are both taken from f itself, so that neither loses digits where the gate saturates.

    Args:
        q: output gates before their activation (B, K or 1, L, H, dk).
        f: forget gates before their activation (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        lower_bound: lb, of the forget gates, in [0, 1): a number, or a tensor that broadcasts with f.

    All else as of `gla`.
    """
    check_arguments("hgrn2", q, f, v, None, scale, initial_state, route=route)
    k, g = gates.forget(precise(f))
    if isinstance(lower_bound, Tensor) or lower_bound:
        bound = lower_bound.to(g) if isinstance(lower_bound, Tensor) else g.new_full((), lower_bound)
        floor = bound.clamp_min(torch.finfo(g.dtype).tiny).log()
        k, g = (1 - bound) * k, torch.logaddexp(floor, torch.log1p(-bound) + g)
    inputs = F.silu(q), k, v, g, scale, initial_state
    return _gla(*inputs, route=route, merge=merge, return_final_state=return_final_state)
