"""Delta rules: a matrix state per head that corrects what it answers to a key, instead of only adding to it.

    P_t = diag(exp(g_t)) S_{t-1}      S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T      o_t = scale * S_t^T q_t

`delta_rule` has no decay, `gated_delta_rule` one per head, `kda` one for every key channel; `gated_delta_product` takes
several steps per token. All of them are one operator.

Inside a chunk the corrections of all tokens solve one triangular system (the WY form of Yang et al., arXiv 2406.06484).
What is left of a chunk is an affine map of the state that enters it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._compat import plain_shape
from ..chunks import decayed_scores, solve_unit_lower, split, through_chunks
from ..recurrence import check_arguments, public, recurrence
from ..visits import Visits, declare, known

__all__ = ["delta_rule", "gated_delta_product", "gated_delta_rule", "kda"]

VALUES = dict(k=lambda x: F.normalize(x, dim=-1), g=F.logsigmoid, beta=lambda x: 2 * x.sigmoid())


@recurrence(
    "q k: B K L H dk; v: B K L H dv; g?: B K L H gates; beta: B K L H",
    "B K L H dv",
    state="B R H dk dv",
    scale=lambda dk: dk**-0.5,
    requires=lambda dk, gates: None if gates in (1, dk, None) else f"g has one gate per head or {dk}, got {gates}",
    flops="(6 + with_g) * B * R * S * H * dk * dv",  # per element of a state: decay; its answer, update and readout
    values=VALUES,
    sizes=dict(gates=4),
)
def _gated_delta_rule(q, k, v, g, beta, scale: float, initial_state):
    state, outputs = initial_state, []
    gates = [None] * q.shape[2] if g is None else g.unbind(2)
    for q_t, k_t, v_t, g_t, beta_t in zip(q.unbind(2), k.unbind(2), v.unbind(2), gates, beta.unbind(2)):
        state = state if g_t is None else g_t.exp()[..., None] * state
        error = v_t[..., None, :] - (k_t[..., None] * state).sum(-2, keepdim=True)
        state = state + (beta_t[..., None] * k_t)[..., None] * error
        outputs.append(scale * (q_t[..., None] * state).sum(-2))
    return torch.stack(outputs, 2), state


@_gated_delta_rule.chunked
def _gated_delta_rule_chunked(q, k, v, g, beta, scale, initial_state):
    length = q.shape[2]
    g = torch.zeros_like(beta)[..., None] if g is None else g
    q, k, v, g, beta = split(scale * q, k, v, g, beta[..., None])
    if g.shape[-1] == 1:  # the decay comes out of the sum over channels
        decay, before, after = decayed_scores(torch.ones_like(g), torch.ones_like(g), g)
        scores, overlap = q @ k.mT * decay, k @ k.mT * decay
    else:
        (scores, overlap), before, after = decayed_scores(torch.stack((q, k)), k, g)
    # The corrections of a chunk that S enters are `fixed` - `by_state` S.
    fixed, by_state = solve_unit_lower(beta * overlap, beta * v, beta * k * before.exp())
    keys = (k * after.exp()).mT
    transition = torch.diag_embed(before[..., -1, :].exp().expand_as(k[..., -1, :])) - keys @ by_state
    readout = q * before.exp() - scores @ by_state
    return through_chunks(transition, keys @ fixed, readout, scores @ fixed, initial_state, length)


@public(
    _gated_delta_rule,
    "q k: B K L H dk; v: B K L H dv; g beta: B K L H",
    state="B R H dk dv",
    values=VALUES,
)
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated delta rule: a correction of the decayed state, with one decay per head.

        P_t = exp(g_t) S_{t-1}
        S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T
        o_t = scale * S_t^T q_t

    Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024, arXiv 2412.06464. The state stays
    bounded for keys of norm 1 and beta in [0, 2].

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        g: log decays <= 0 of the heads (B, K or 1, L, H).
        beta: how much of an error is corrected (B, K or 1, L, H).
        scale: of the queries; dk ** -0.5 by default.
        initial_state: (B, K, H, dk, dv).
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token leaves the state
            as it is.

    Returns:
        (B, K, L, H, dv), merged (B, L, H, dv).
    """
    check_arguments("gated_delta_rule", q, k, v, g, beta, scale, initial_state, route=route)
    inputs = q, k, v, g[..., None], beta, scale, initial_state
    return _gated_delta_rule(*inputs, route=route, merge=merge, return_final_state=return_final_state)


@public(
    _gated_delta_rule,
    "q k g: B K L H dk; v: B K L H dv; beta: B K L H",
    state="B R H dk dv",
    values=VALUES,
)
def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Kimi delta attention: the gated delta rule with a decay for every key channel.

        P_t = diag(exp(g_t)) S_{t-1}
        S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T
        o_t = scale * S_t^T q_t

    Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025, arXiv 2510.26692.

    Args:
        g: log decays <= 0 of the key channels (B, K or 1, L, H, dk).

    All else as of `gated_delta_rule`.
    """
    check_arguments("kda", q, k, v, g, beta, scale, initial_state, route=route)
    inputs = q, k, v, g, beta, scale, initial_state
    return _gated_delta_rule(*inputs, route=route, merge=merge, return_final_state=return_final_state)


@public(_gated_delta_rule, "q k: B K L H dk; v: B K L H dv; beta: B K L H", state="B R H dk dv", values=VALUES)
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Delta rule: a correction of the state, without decay.

        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
        o_t = scale * S_t^T q_t

    Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024, arXiv 2406.06484.

    All arguments as of `gated_delta_rule`.
    """
    check_arguments("delta_rule", q, k, v, beta, scale, initial_state, route=route)
    inputs = q, k, v, None, beta, scale, initial_state
    return _gated_delta_rule(*inputs, route=route, merge=merge, return_final_state=return_final_state)


def _in_parts(route: Tensor | None, times: int, routes: int, length: int, device: torch.device) -> Tensor:
    """The table that visits the `times` parts of each token one after another; part j of token i stands at j L + i."""
    visits = Visits(length, True, False) if route is None else known(route)
    route = torch.arange(length, device=device).expand(routes, -1) if route is None else route
    table, offset = route[..., None], length * torch.arange(times, device=device, dtype=route.dtype)
    table = torch.where(table == -1, -1, torch.where(table >= 0, table + offset, table - offset)).flatten(-2)
    if visits is not None:
        declare(table, length * times, visits.permutation, visits.padding)
    return table


@public(
    _gated_delta_rule,
    "q: B K L H dk; k: B K L N H dk; v: B K L N H dv; g: B K L H; beta: B K L N H",
    state="B R H dk dv",
    values=VALUES,
    sizes=dict(N=2),
)
def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated DeltaProduct: several steps of the delta rule at every token, after one decay.

        S_{t,0} = exp(g_t) S_{t-1,N}
        S_{t,j} = S_{t,j-1} + beta_{t,j} k_{t,j} (v_{t,j} - S_{t,j-1}^T k_{t,j})^T    for j = 1..N
        o_t = scale * S_{t,N}^T q_t

    Siems et al., "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", 2025,
    arXiv 2502.10297. It is `gated_delta_rule` on N tokens for each; g = 0 gives DeltaProduct. Two steps with beta = 2
    make a rotation of two reflections.

    Args:
        q: queries (B, K or 1, L, H, dk).
        k: keys (B, K or 1, L, N, H, dk).
        v: values (B, K or 1, L, N, H, dv).
        g: log decays <= 0 of the heads (B, K or 1, L, H).
        beta: how much of an error is corrected (B, K or 1, L, N, H).

    All else as of `gated_delta_rule`.
    """
    _, routes, length = check_arguments("gated_delta_product", q, k, v, g, beta, scale, initial_state, route=route)
    steps = plain_shape(k)[3]
    q = F.pad(q[:, :, None], (0, 0, 0, 0, 0, 0, steps - 1, 0))  # the last step is read
    g = F.pad(g[:, :, None], (0, 0, 0, 0, 0, steps - 1))  # the first one decays
    k, v, beta = (x.transpose(2, 3) for x in (k, v, beta))
    q, k, v, g, beta = (x.flatten(2, 3) for x in (q, k, v, g, beta))
    table = _in_parts(route, steps, routes, length, q.device)
    inputs = q, k, v, g[..., None], beta, scale, initial_state
    result = _gated_delta_rule(*inputs, route=table, merge=merge, return_final_state=return_final_state)
    o, *state = result if return_final_state else (result,)
    o = o.narrow(1 if merge else 2, (steps - 1) * length, length)
    return (o, *state) if return_final_state else o
