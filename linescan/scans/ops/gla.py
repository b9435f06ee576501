"""Gated linear attention and its relatives: a matrix state per head that decays and takes in one outer product a token.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T          o_t = scale * S_t^T q_t

- `gla`: a log decay for every key channel. Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient
  Training", 2023, arXiv 2312.06635, equation 3.
- `simple_gla`: one log decay a head. The same paper, table 1; the core of Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060).
- `retention`: one constant decay a head. Sun et al., "Retentive Network", 2023, arXiv 2307.08621, equations 5 to 8.
- `hgrn2`: keys tied to the forget gate. Qin et al., "HGRN2: Gated Linear RNNs with State Expansion", 2024,
  arXiv 2404.07904, equation 5.

Bidirectional forms are two routes, a row order and its reverse, over the same q, k, v with one set of gates a route.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import empty_state, gated_outer_products, head_flops, head_shapes
from ..recurrence import call, check_shapes, recurrence

__all__ = ["gla", "simple_gla", "retention", "hgrn2"]


def _sequential(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None):
    """The definition, for g (B, K, T, H, dk) or (B, K, T, H, 1)."""
    state = empty_state(q, v, initial_state)
    outputs = []
    for q_t, k_t, v_t, g_t in zip(*(x.unbind(2) for x in (q, k, v, g))):
        state = g_t.exp()[..., None] * state + k_t[..., None] * v_t[..., None, :]
        outputs.append(scale * (q_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 2), state


@recurrence(tokens=("q", "k", "v", "g"), shapes=head_shapes, flops=head_flops)
def _gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _sequential(q, k, v, g, scale, initial_state)


@_gla.chunked
def _gla_chunked(q, k, v, g, scale, initial_state):
    return gated_outer_products(q, k, v, g, scale, initial_state)


@recurrence(tokens=("q", "k", "v", "g"), shapes=head_shapes, flops=head_flops)
def _simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _sequential(q, k, v, g[..., None], scale, initial_state)


@_simple_gla.chunked
def _simple_gla_chunked(q, k, v, g, scale, initial_state):
    return gated_outer_products(q, k, v, g[..., None], scale, initial_state)


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
    """Gated linear attention: S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

    Yang et al., 2023, arXiv 2312.06635, equation 3. The state is float32 under half precision.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        g: log decays <= 0 of the key channels (B, K or 1, L, H, dk); -inf forgets everything before the token.
        scale: of the queries; dk ** -0.5 by default.
        initial_state: (B, K, H, dk, dv); zeros by default.
        route: table (K, S) or (B, K, S), see `linescan.scans.recurrence`. A padding token leaves the state as it is.
        merge: None, or "sum" to add up the outputs of the routes.
        return_final_state: also return the state after the last step.

    Returns:
        (B, K, L, H, dv) in q's dtype, or (B, L, H, dv) with `merge`; with `return_final_state`, a pair of that and the
        state (B, K, H, dk, dv).

    Raises:
        ValueError: a shape that does not fit the others, or an unknown `merge`.
    """
    check_shapes(
        "gla",
        route,
        q=(q, "B K L H dk"),
        k=(k, "B K L H dk"),
        v=(v, "B K L H dv"),
        g=(g, "B K L H dk"),
        initial_state=(initial_state, "B R H dk dv"),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return call(_gla, q, k, v, g, scale, initial_state, route=route, merge=merge, return_final_state=return_final_state)


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
    """Linear attention with one gate a head: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

    Yang et al., 2023, arXiv 2312.06635, table 1; with q = C, k = B, v = dt x, g = dt A the core of SSD (Dao and Gu,
    2024, arXiv 2405.21060).

    Args:
        g: log decays <= 0 of the heads (B, K or 1, L, H).

    All else as in `gla`.
    """
    check_shapes(
        "simple_gla",
        route,
        q=(q, "B K L H dk"),
        k=(k, "B K L H dk"),
        v=(v, "B K L H dv"),
        g=(g, "B K L H"),
        initial_state=(initial_state, "B R H dk dv"),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return call(
        _simple_gla, q, k, v, g, scale, initial_state, route=route, merge=merge, return_final_state=return_final_state
    )


def retention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor | tuple[Tensor, Tensor]:
    """Retention: S_t = gamma_h S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, gamma_h = 1 - 2^(-5-h) for head h from 0.

    Sun et al., 2023, arXiv 2307.08621, equations 5 to 8, without the rotation of q and k and the norm after it.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        options: those of `gla`.
    """
    batch, _, length, heads = q.shape[:4] if q.ndim == 5 else (0, 0, 0, 0)
    g = torch.log1p(-(2.0 ** (-5 - torch.arange(heads, device=q.device, dtype=torch.float64))))
    g = g.to(torch.promote_types(q.dtype, torch.float32)).expand(batch, 1, length, heads)
    return simple_gla(q, k, v, g, **options)


def hgrn2(
    q: Tensor, f: Tensor, v: Tensor, lower_bound: float | Tensor = 0.0, **options
) -> Tensor | tuple[Tensor, Tensor]:
    """HGRN2: a_t = lb + (1 - lb) sigmoid(f_t), S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T, o_t = scale S_t^T silu(q_t).

    Qin et al., 2024, arXiv 2404.07904, equation 5. The key 1 - a and the log decay are both taken from f itself, so
    neither loses digits where the gate saturates.

    Args:
        q: output gates before their activation (B, K or 1, L, H, dk).
        f: forget gates before their activation (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        lower_bound: of the forget gates, in [0, 1): a number, or a tensor that broadcasts with f.
        options: those of `gla`.
    """
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    bound = torch.as_tensor(lower_bound, dtype=f.dtype, device=f.device)
    k = (1 - bound) * torch.sigmoid(-f)
    floor = bound.clamp_min(torch.finfo(f.dtype).tiny).log()
    g = torch.logaddexp(floor, torch.log1p(-bound) + F.logsigmoid(f))
    return gla(F.silu(q), k, v, g, **options)
