"""Delta rules: a matrix state per head that corrects what it answers to a key, instead of only adding to it.

    P_t = diag(exp(g_t)) S_{t-1}      S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T      o_t = scale * S_t^T q_t

- `delta_rule`: no decay. Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
  2024, arXiv 2406.06484.
- `gated_delta_rule`: one log decay a head. Yang et al., "Gated Delta Networks", 2024, arXiv 2412.06464.
- `kda`: a log decay for every key channel. Kimi Team, "Kimi Linear", 2025, arXiv 2510.26692.
- `dplr`: any diagonal plus rank one, S_t = diag(exp(g_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T.
- `rwkv7`: the mixer of RWKV-7 as such a one. Peng et al., "RWKV-7 Goose", 2025, arXiv 2503.14456.

Inside a chunk the corrections of all tokens solve one triangular system (the WY form of the first paper). What is left
of a chunk is an affine map of the state that enters it.
"""

import torch
from torch import Tensor

from ..chunks import decayed_scores, empty_state, head_shapes, join, split
from ..recurrence import call, check_shapes, recurrence

__all__ = ["delta_rule", "gated_delta_rule", "kda", "dplr", "rwkv7"]


def _through_chunks(transition, added, readout, output, state, length) -> tuple[Tensor, Tensor]:
    """Output and final state, where chunk n maps S to transition_n S + added_n and outputs readout_n S + output_n.

    Args:
        transition, added: (B, K, H, N, dk, dk) and (B, K, H, N, dk, dv).
        readout, output: (B, K, H, N, C, dk) and (B, K, H, N, C, dv).
    """
    entering = []
    for kept, new in zip(transition.unbind(3), added.unbind(3)):
        entering.append(state)
        state = kept @ state + new
    return join(output + readout @ torch.stack(entering, 3), length), state


def _solve(lower: Tensor, *sides: Tensor) -> tuple[Tensor, ...]:
    """(I + the strictly lower part of `lower`)^-1 times each of `sides`."""
    solution = torch.linalg.solve_triangular(lower, torch.cat(sides, -1), upper=False, unitriangular=True)
    return solution.split([x.shape[-1] for x in sides], -1)


# -- gated delta rule: one decay a head or one a key channel -----------------------------------------------------------


def _delta_flops(q, k, v, *_):
    """Decay of a dk x dv state (1 operation an element), its answer, the update and the readout (2 each)."""
    return 7 * q[0] * max(q[1], k[1], v[1]) * q[2] * q[3] * q[4] * v[4]


@recurrence(tokens=("q", "k", "v", "g", "beta"), shapes=head_shapes, flops=_delta_flops)
def _gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For g (B, K, T, H, dk) or (B, K, T, H, 1)."""
    state = empty_state(q, v, initial_state)
    outputs = []
    for q_t, k_t, v_t, g_t, beta_t in zip(*(x.unbind(2) for x in (q, k, v, g, beta))):
        state = g_t.exp()[..., None] * state
        error = v_t[..., None, :] - k_t[..., None, :] @ state
        state = state + (beta_t[..., None] * k_t)[..., None] * error
        outputs.append(scale * (q_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 2), state


@_gated_delta_rule.chunked
def _gated_delta_rule_chunked(q, k, v, g, beta, scale, initial_state):
    length, state = q.shape[2], empty_state(q, v, initial_state)
    q, k, v, g, beta = split(scale * q, k, v, g, beta[..., None])
    if g.shape[-1] == 1:  # the decay comes out of the sum over channels
        decay, before, after = decayed_scores(torch.ones_like(g), torch.ones_like(g), g)
        scores, overlap = q @ k.mT * decay, k @ k.mT * decay
    else:
        (scores, overlap), before, after = decayed_scores(torch.stack((q, k)), k, g)
    # The corrections of a chunk that S enters are `fixed` - `by_state` S.
    fixed, by_state = _solve(beta * overlap, beta * v, beta * k * before.exp())
    keys = (k * after.exp()).mT
    transition = torch.diag_embed(before[..., -1, :].exp().expand_as(k[..., -1, :])) - keys @ by_state
    readout = q * before.exp() - scores @ by_state
    return _through_chunks(transition, keys @ fixed, readout, scores @ fixed, state, length)


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
    """Gated delta rule: P_t = exp(g_t) S_{t-1}, S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T, o_t = scale S_t^T q_t.

    Yang et al., 2024, arXiv 2412.06464. The state is float32 under half precision. It stays bounded for keys of norm 1
    and beta in [0, 2].

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        g: log decays <= 0 of the heads (B, K or 1, L, H).
        beta: how much of an error is corrected (B, K or 1, L, H).
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
    return _delta("gated_delta_rule", q, k, v, g, beta, scale, initial_state, route, merge, return_final_state)


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
    """Kimi delta attention: `gated_delta_rule` with P_t = diag(exp(g_t)) S_{t-1}, a decay for every key channel.

    Kimi Team, 2025, arXiv 2510.26692.

    Args:
        g: log decays <= 0 of the key channels (B, K or 1, L, H, dk).

    All else as in `gated_delta_rule`.
    """
    return _delta("kda", q, k, v, g, beta, scale, initial_state, route, merge, return_final_state)


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
    """Delta rule: S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, o_t = scale S_t^T q_t.

    Yang et al., 2024, arXiv 2406.06484. All arguments as in `gated_delta_rule`, which it is without decay.
    """
    return _delta("delta_rule", q, k, v, None, beta, scale, initial_state, route, merge, return_final_state)


def _delta(name, q, k, v, g, beta, scale, initial_state, route, merge, return_final_state):
    """Checks the arguments of the three and calls their operator."""
    check_shapes(
        name,
        route,
        q=(q, "B K L H dk"),
        k=(k, "B K L H dk"),
        v=(v, "B K L H dv"),
        g=(g, "B K L H dk" if name == "kda" else "B K L H"),
        beta=(beta, "B K L H"),
        initial_state=(initial_state, "B R H dk dv"),
    )
    g = torch.zeros_like(beta) if g is None else g
    g = g if name == "kda" else g[..., None]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = q, k, v, g, beta, scale, initial_state
    return call(_gated_delta_rule, *inputs, route=route, merge=merge, return_final_state=return_final_state)


# -- diagonal plus low rank --------------------------------------------------------------------------------------------


def _dplr_flops(q, k, v, *_):
    """Decay of a dk x dv state (1 operation an element), what `a` reads of it, two updates and the readout (2 each)."""
    return 9 * q[0] * max(q[1], k[1], v[1]) * q[2] * q[3] * q[4] * v[4]


@recurrence(tokens=("q", "k", "v", "a", "b", "g"), shapes=head_shapes, flops=_dplr_flops)
def _dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    state = empty_state(q, v, initial_state)
    outputs = []
    for q_t, k_t, v_t, a_t, b_t, g_t in zip(*(x.unbind(2) for x in (q, k, v, a, b, g))):
        removed = b_t[..., None] * (a_t[..., None, :] @ state)
        state = g_t.exp()[..., None] * state + removed + k_t[..., None] * v_t[..., None, :]
        outputs.append(scale * (q_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 2), state


def _later(x: Tensor) -> Tensor:
    """Rows of a chunk moved down by one, zeros first: what a token sees is what the token before it left."""
    return torch.cat((torch.zeros_like(x[..., :1, :]), x[..., :-1, :]), -2)


@_dplr.chunked
def _dplr_chunked(q, k, v, a, b, g, scale, initial_state):
    length, state = q.shape[2], empty_state(q, v, initial_state)
    q, k, v, a, b, g = split(scale * q, k, v, a, b, g)
    # `a` reads the state before the token's own decay: as a query, it belongs to the token before.
    early = torch.cat((a[..., 1:, :], torch.zeros_like(a[..., :1, :])), -2)
    scores, before, after = decayed_scores(torch.stack((q, early))[:, None], torch.stack((k, b)), g)
    (q_k, q_b), (a_k, a_b) = scores[0], _later(scores[1])
    # What `a` reads in a chunk that S enters is `fixed` + `by_state` S.
    fixed, by_state = _solve(-a_b, a_k @ v, a * _later(before).exp())
    keys, others = (k * after.exp()).mT, (b * after.exp()).mT
    transition = torch.diag_embed(before[..., -1, :].exp()) + others @ by_state
    readout = q * before.exp() + q_b @ by_state
    return _through_chunks(transition, keys @ v + others @ fixed, readout, q_k @ v + q_b @ fixed, state, length)


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
    """Diagonal plus low rank: S_t = (diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

    Peng et al., 2025, arXiv 2503.14456. The state is float32 under half precision. It stays bounded only where
    diag(exp(g)) + b a^T does not enlarge it, as in `rwkv7`.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        a: reads the state before its decay (B, K or 1, L, H, dk).
        b: writes what `a` read (B, K or 1, L, H, dk).
        g: log decays <= 0 of the key channels (B, K or 1, L, H, dk).
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
        "dplr",
        route,
        q=(q, "B K L H dk"),
        k=(k, "B K L H dk"),
        v=(v, "B K L H dv"),
        a=(a, "B K L H dk"),
        b=(b, "B K L H dk"),
        g=(g, "B K L H dk"),
        initial_state=(initial_state, "B R H dk dv"),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = q, k, v, a, b, g, scale, initial_state
    return call(_dplr, *inputs, route=route, merge=merge, return_final_state=return_final_state)


def rwkv7(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, kk: Tensor, a: Tensor, *, scale: float | None = None, **options
) -> Tensor | tuple[Tensor, Tensor]:
    """The mixer of RWKV-7: S_t = (diag(exp(w_t)) - (kk_t a_t) kk_t^T) S_{t-1} + k_t v_t^T, o_t = scale S_t^T r_t.

    Peng et al., 2025, arXiv 2503.14456. It is `dplr` with a = -kk and b = kk a.

    Args:
        r, k: receptances and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        w: log decays of the key channels (B, K or 1, L, H, dk); RWKV-7 has them in (-0.607, 0).
        kk: keys of what is removed, of norm 1 (B, K or 1, L, H, dk).
        a: how much of it is removed, in [0, 1] (B, K or 1, L, H, dk).
        scale: of the receptances; 1 by default, as in RWKV-7.
        options: `initial_state`, `route`, `merge` and `return_final_state`, as in `dplr`.
    """
    check_shapes("rwkv7", options.get("route"), r=(r, "B K L H dk"), kk=(kk, "B K L H dk"), a=(a, "B K L H dk"))
    exact = torch.promote_types(kk.dtype, torch.float32)
    return dplr(r, k, v, -kk, kk.to(exact) * a.to(exact), w, scale=1.0 if scale is None else scale, **options)
