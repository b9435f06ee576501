"""The token mixers of RWKV: WKV of RWKV-4, causal and bidirectional, and WKV of RWKV-6.

- `wkv4`: a sum of values normalised by its weights, which fall with distance. Peng et al., "RWKV: Reinventing RNNs for
  the Transformer Era", 2023, arXiv 2305.13048.
- `bi_wkv`: the same with weights that fall to both sides. Duan et al., "Vision-RWKV: Efficient and Scalable Visual
  Perception with RWKV-Like Architectures", 2024, arXiv 2403.02308.
- `wkv6`: a matrix state a head with a decay for every key channel. Peng et al., "Eagle and Finch: RWKV with
  Matrix-Valued States and Dynamic Recurrence", 2024, arXiv 2404.05892.
- `bi_wkv6`: wkv6 over the tokens before and after. The kernel of VRWKV6, in Vision-RWKV.

In RWKV-4 weights are e^k, so a sum is kept as (num, den, top): both its parts relative to e^top, where top is the
largest exponent in it.
"""

import torch
from torch import Tensor

from ..chunks import empty_state, gated_outer_products, head_shapes, linear_scan, running_max, steps_at_a_time
from ..recurrence import call, check_shapes, recurrence, visited

__all__ = ["wkv4", "bi_wkv", "wkv6", "bi_wkv6"]

EMPTY = -1e38  # the top of a sum without terms: finite, so that differences of tops are never nan


def _a_route(parameter: Tensor, axes: int, tokens: tuple[Tensor, ...], route: Tensor | None) -> Tensor:
    """A parameter of `axes` axes, or one that has a leading route axis already, as (K, ...)."""
    return parameter.expand(visited(tokens, route)[1], *parameter.shape) if parameter.ndim == axes else parameter


# -- RWKV-4 ------------------------------------------------------------------------------------------------------------


def _empty_sum(k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zero = torch.zeros_like(k[:, :, 0])
    return zero, zero, torch.full_like(zero, EMPTY)


def _add_token(total: tuple[Tensor, Tensor, Tensor], k: Tensor, v: Tensor, w: Tensor):
    """The sum one token later: decayed by e^-w, and with that token in it."""
    num, den, top = total
    new = torch.maximum(top - w, k)
    keep, add = torch.exp(top - w - new), torch.exp(k - new)
    return keep * num + add * v, keep * den + add, new


def _read(k: Tensor, v: Tensor, *sums: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """num / den of the sums and of one more term, e^k v, together."""
    top = k.detach()
    for _, _, other in sums:
        top = torch.maximum(top, other.detach())
    own = (k - top).exp_()
    num, den = own * v, own
    for sum_num, sum_den, exponent in sums:
        weight = (exponent - top).exp_()
        num, den = num.addcmul_(weight, sum_num), torch.addcmul(den, weight, sum_den)
    return num / den


def _running_sum(k, v, w, initial: tuple | None, reverse: bool = False, chunk: int | None = None):
    """All T + 1 sums from none of the tokens to all of them (from the end if `reverse`), k, v (B, K, T, D), w (K, D).

    Tops only set the scale, so no gradient runs through them, and the sums become one linear scan.
    """
    w = w[:, None]
    num, den, top = initial or _empty_sum(k)
    tops = running_max(-w, k, top, reverse, chunk)
    before, after = (tops[..., 1:, :], tops[..., :-1, :]) if reverse else (tops[..., :-1, :], tops[..., 1:, :])
    keep, add = (before - after).sub_(w).exp_(), (k - after).exp_()
    start = torch.stack((num, den)) * torch.exp(top - top.detach())
    num, den = linear_scan(keep, torch.stack((add * v, add)), start, reverse, chunk)
    return num, den, tops


def _channel_shapes(batch, routes, length, k, v, *_):
    return (batch, routes, length, k.shape[-1]), (batch, routes, k.shape[-1], 3)


def _channel_flops(k, v, *_):
    """Two decayed sums and their quotient, with 4 exponentials."""
    return 14 * k[0] * max(k[1], v[1]) * k[2] * k[3]


@recurrence(tokens=("k", "v"), shapes=_channel_shapes, flops=_channel_flops)
def _wkv4(k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    total = _empty_sum(k) if initial_state is None else initial_state.unbind(-1)
    outputs = []
    for k_t, v_t in zip(k.unbind(2), v.unbind(2)):
        outputs.append(_read(u + k_t, v_t, total))
        total = _add_token(total, k_t, v_t, w)
    return torch.stack(outputs, 2), torch.stack(total, -1)


@_wkv4.chunked
def _wkv4_chunked(k, v, w, u, initial_state, chunk=None):
    total = None if initial_state is None else initial_state.unbind(-1)
    # The top is part of the state, so here it has a gradient.
    top = torch.full_like(k[:, :, 0], EMPTY) if initial_state is None else total[2]
    outputs = []
    for k_p, v_p in zip(*(x.split(steps_at_a_time(k), 2) for x in (k, v))):
        sums = _running_sum(k_p, v_p, w, total, chunk=chunk)
        outputs.append(_read(u[:, None] + k_p, v_p, [x[..., :-1, :] for x in sums]))
        total = [x[..., -1, :] for x in sums]
        age = torch.arange(k_p.shape[2] - 1, -1, -1, dtype=k.dtype, device=k.device)
        top = torch.maximum(top - k_p.shape[2] * w, (k_p - age[:, None] * w[:, None]).amax(2))
    num, den, last = total
    scale = torch.exp(last - top)
    return torch.cat(outputs, 2), torch.stack((num * scale, den * scale, top), -1)


def _both_sides_shapes(batch, routes, length, k, *_):
    return (batch, routes, length, k.shape[-1]), (batch, routes, 0)  # a sum to both sides leaves no state


def _both_sides_flops(k, v, *_):
    """Two decayed sums to either side and one quotient, with 7 exponentials."""
    return 27 * k[0] * max(k[1], v[1]) * k[2] * k[3]


@recurrence(tokens=("k", "v"), shapes=_both_sides_shapes, flops=_both_sides_flops)
def _bi_wkv(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    tokens = list(zip(k.unbind(2), v.unbind(2)))
    past, future = [_empty_sum(k)], [_empty_sum(k)]
    for first, last in zip(tokens[:-1], tokens[:0:-1]):
        past.append(_add_token(past[-1], *first, w))
        future.append(_add_token(future[-1], *last, w))
    outputs = [_read(u + k_t, v_t, a, b) for a, (k_t, v_t), b in zip(past, tokens, reversed(future))]
    return torch.stack(outputs, 2), k.new_zeros(*k.shape[:2], 0)


@_bi_wkv.chunked
def _bi_wkv_chunked(k, v, w, u, chunk=None):
    past = [x[..., :-1, :] for x in _running_sum(k, v, w, None, chunk=chunk)]
    future = [x[..., 1:, :] for x in _running_sum(k, v, w, None, reverse=True, chunk=chunk)]
    return _read(u[:, None] + k, v, past, future), k.new_zeros(*k.shape[:2], 0)


def wkv4(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """WKV of RWKV-4, for every channel:

        o_t = (sum_{j<t} e^{k_j - (t-1-j) w} v_j + e^{u + k_t} v_t) / (the same with v = 1)

    Peng et al., 2023, arXiv 2305.13048. The state is float32 under half precision. Keys of any size are
    safe: sums are kept relative to their largest term.

    Args:
        k, v: keys and values (B, K or 1, L, D).
        w: decay of a step (D,), or (K, D) one a route. RWKV-4 stores its logarithm: w = exp(time_decay).
        u: bonus of the token itself (D,) or (K, D).
        initial_state: (B, K, D, 3), the sums before the first token as (num, den, top): num e^top, den e^top. Of two
            sums with another top, the quotient is what counts. (0, 0, -1e38) is empty, the default.
        route: table (K, S) or (B, K, S), see `linescan.scans.recurrence`. A padding token has weight e^0 and value 0.
        merge: None, or "sum" to add up the outputs of the routes.
        return_final_state: also return the state after the last step.

    Returns:
        (B, K, L, D) in k's dtype, or (B, L, D) with `merge`; with `return_final_state`, a pair of that and the state.

    Raises:
        ValueError: a shape that does not fit the others, or an unknown `merge`.
    """
    w, u = (_a_route(x, 1, (k, v), route) for x in (w, u))
    check_shapes(
        "wkv4",
        route,
        k=(k, "B K L D"),
        v=(v, "B K L D"),
        w=(w, "R D"),
        u=(u, "R D"),
        initial_state=(initial_state, "B R D 3"),
    )
    return call(_wkv4, k, v, w, u, initial_state, route=route, merge=merge, return_final_state=return_final_state)


def bi_wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    route: Tensor | None = None,
    merge: str | None = None,
) -> Tensor:
    """Bi-WKV of Vision-RWKV, for every channel, in linear time:

        o_t = (sum_{j != t} e^{k_j - (|t-j|-1) w} v_j + e^{u + k_t} v_t) / (the same with v = 1)

    Duan et al., 2024, arXiv 2403.02308. Vision-RWKV divides w and u by the number of tokens before. Keys of
    any size are safe: sums are kept relative to their largest term.

    Args:
        k, v: keys and values (B, K or 1, L, D).
        w: decay of a step (D,), or (K, D) one a route; may be negative.
        u: bonus of the token itself (D,) or (K, D).
        route: table (K, S) or (B, K, S), see `linescan.scans.recurrence`. A padding token has weight e^0 and value 0.
        merge: None, or "sum" to add up the outputs of the routes.

    Returns:
        (B, K, L, D) in k's dtype, or (B, L, D) with `merge`.

    Raises:
        ValueError: a shape that does not fit the others, or an unknown `merge`.
    """
    w, u = (_a_route(x, 1, (k, v), route) for x in (w, u))
    check_shapes("bi_wkv", route, k=(k, "B K L D"), v=(v, "B K L D"), w=(w, "R D"), u=(u, "R D"))
    return call(_bi_wkv, k, v, w, u, route=route, merge=merge, return_final_state=False)


# -- RWKV-6 ------------------------------------------------------------------------------------------------------------


def _wkv6_flops(r, k, v, *_):
    """Decay, update and readout of a dk x dv state; the bonus."""
    return r[0] * max(r[1], k[1], v[1]) * r[2] * r[3] * (5 * r[4] * v[4] + 3 * r[4] + 2 * v[4])


@recurrence(tokens=("r", "k", "v", "w"), shapes=head_shapes, flops=_wkv6_flops)
def _wkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    state = empty_state(r, v, initial_state)
    outputs = []
    for r_t, k_t, v_t, w_t in zip(*(x.unbind(2) for x in (r, k, v, w))):
        update = k_t[..., None] * v_t[..., None, :]
        outputs.append(scale * (r_t[..., None, :] @ (state + u[..., None] * update)).squeeze(-2))
        state = w_t.exp()[..., None] * state + update
    return torch.stack(outputs, 2), state


@_wkv6.chunked
def _wkv6_chunked(r, k, v, w, u, scale, initial_state):
    """Gated linear attention one step late: what a token reads is the state that the token before it left."""
    late = [torch.cat((torch.zeros_like(x[:, :, :1]), x[:, :, :-1]), 2) for x in (k, v, w)]
    y, state = gated_outer_products(r, *late, scale, initial_state)
    y = y + scale * (r * u[:, None] * k).sum(-1, keepdim=True) * v
    return y, w[:, :, -1].exp()[..., None] * state + k[:, :, -1, :, :, None] * v[:, :, -1, :, None]


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
    """WKV of RWKV-6: o_t = scale (S_{t-1} + diag(u) k_t v_t^T)^T r_t, S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T.

    Peng et al., 2024, arXiv 2404.05892. The state is float32 under half precision.

    Args:
        r, k: receptances and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        w: log decays <= 0 of the key channels (B, K or 1, L, H, dk).
        u: bonus of the token itself (H, dk), or (K, H, dk) one a route.
        scale: of the receptances; 1 by default, as in RWKV-6.
        initial_state: (B, K, H, dk, dv); zeros by default.
        route: table (K, S) or (B, K, S), see `linescan.scans.recurrence`. A padding token leaves the state as it is.
        merge: None, or "sum" to add up the outputs of the routes.
        return_final_state: also return the state after the last step.

    Returns:
        (B, K, L, H, dv) in r's dtype, or (B, L, H, dv) with `merge`; with `return_final_state`, a pair of that and the
        state (B, K, H, dk, dv).

    Raises:
        ValueError: a shape that does not fit the others, or an unknown `merge`.
    """
    u = _a_route(u, 2, (r, k, v, w), route)
    check_shapes(
        "wkv6",
        route,
        r=(r, "B K L H dk"),
        k=(k, "B K L H dk"),
        v=(v, "B K L H dv"),
        w=(w, "B K L H dk"),
        u=(u, "R H dk"),
        initial_state=(initial_state, "B R H dk dv"),
    )
    scale = 1.0 if scale is None else scale
    return call(
        _wkv6, r, k, v, w, u, scale, initial_state, route=route, merge=merge, return_final_state=return_final_state
    )


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
    """WKV of RWKV-6 over the tokens on both sides, as VRWKV6 has it:

        o_t = scale (S_{t-1} + diag(u) k_t v_t^T + R_{t+1})^T r_t

    with S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T and R_t = diag(exp(w_t)) R_{t+1} + k_t v_t^T: what lies between two
    tokens are the decays of those strictly between them. It is `wkv6` along every route and along its reverse, with the
    bonus on one.

    Args:
        r, k, v, w, u, scale, route, merge: those of `wkv6`.

    Returns:
        (B, K, L, H, dv) in r's dtype, or (B, L, H, dv) with `merge`.

    Raises:
        ValueError: a shape that does not fit the others, or an unknown `merge`.
    """
    tokens = r, k, v, w
    _, routes, length = visited(tokens, route)
    u = _a_route(u, 2, tokens, route)
    there = torch.arange(length, device=r.device).expand(routes, length) if route is None else route
    both = torch.cat((there, there.flip(-1)), -2)
    tokens = [torch.cat((x, x), 1) if x.shape[1] > 1 else x for x in tokens]
    y = wkv6(*tokens, torch.cat((u, torch.zeros_like(u))), scale=scale, route=both, merge=merge)
    return y if merge else y.unflatten(1, (2, routes)).sum(1)
