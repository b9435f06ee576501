"""WKV of RWKV-4, causal and to both sides: a sum of values normalised by its weights, which fall with distance.

Weights are e^k, so a sum is kept as (num, den, top): both its parts relative to e^top, where top is the largest
exponent in it.
"""

import torch
from torch import Tensor

from ..chunks import linear_scan, running_max, steps_at_a_time
from ..exported import loop
from ..recurrence import public, recurrence

__all__ = ["wkv4", "bi_wkv"]

EMPTY = -1e38  # the top of a sum without terms: finite, so that differences of tops are never nan
VALUES = dict(
    w=lambda x: 0.3 * x.exp(), initial_state=lambda x: torch.stack((x[..., 0], x[..., 1].exp(), x[..., 2]), -1)
)


def _empty_sum(k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zero = torch.zeros_like(k[:, :, 0])
    return zero, zero, torch.full_like(zero, EMPTY)


def _without_terms(state: Tensor) -> tuple[Tensor]:
    return (state + state.new_tensor((0, 0, EMPTY)),)


def _add_token(total: tuple[Tensor, Tensor, Tensor], k: Tensor, v: Tensor, w: Tensor):
    """The sum one token later: decayed by e^-w, and with that token in it."""
    num, den, top = total
    new = torch.maximum(top - w, k)
    keep, add = torch.exp(top - w - new), torch.exp(k - new)
    return keep * num + add * v, keep * den + add, new


def _mean(k: Tensor, v: Tensor, *sums: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """num / den of the sums and of one more term, e^k v, together."""
    most = torch.stack([k, *(top for _, _, top in sums)]).detach().amax(0)
    den = torch.exp(k - most)
    num = den * v
    for sum_num, sum_den, top in sums:
        weight = torch.exp(top - most)
        num, den = num + weight * sum_num, den + weight * sum_den
    return num / den


# The chunked form: all sums at once, by scans.


def _running_sum(k, v, w, initial: tuple | None = None, reverse: bool = False, chunk: int | None = None):
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


def _quotient(k: Tensor, v: Tensor, *sums: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """`_mean`, in few operations."""
    top = k.detach()
    for _, _, other in sums:
        top = torch.maximum(top, other.detach())
    own = (k - top).exp_()
    num, den = own * v, own
    for sum_num, sum_den, exponent in sums:
        weight = (exponent - top).exp_()
        num, den = num.addcmul_(weight, sum_num), torch.addcmul(den, weight, sum_den)
    return num / den


@recurrence(
    "k v: B K L D; w u: [K] D",
    "B K L D",
    state="B R D 3",
    empty=_without_terms,
    flops="18 * B * R * S * D",  # two decayed sums and their quotient, and the differences of exponents
    values=VALUES,
)
def _wkv4(k, v, w, u, initial_state):
    total, outputs = initial_state.unbind(-1), []
    for k_t, v_t in zip(k.unbind(2), v.unbind(2)):
        outputs.append(_mean(u + k_t, v_t, total))
        total = _add_token(total, k_t, v_t, w)
    return torch.stack(outputs, 2), torch.stack(total, -1)


@_wkv4.chunked
def _wkv4_chunked(k, v, w, u, initial_state, chunk=None):
    total, outputs = initial_state.unbind(-1), []
    top = total[2]  # the top is part of the state, so here it has a gradient
    for k_p, v_p in zip(*(x.split(steps_at_a_time(k), 2) for x in (k, v))):
        sums = _running_sum(k_p, v_p, w, total, chunk=chunk)
        outputs.append(_quotient(u[:, None] + k_p, v_p, [x[..., :-1, :] for x in sums]))
        total = [x[..., -1, :] for x in sums]
        age = torch.arange(k_p.shape[2] - 1, -1, -1, dtype=k.dtype, device=k.device)
        top = torch.maximum(top - k_p.shape[2] * w, (k_p - age[:, None] * w[:, None]).amax(2))
    num, den, last = total
    scale = torch.exp(last - top)
    return torch.cat(outputs, 2), torch.stack((num * scale, den * scale, top), -1)


@recurrence(
    "k v: B K L D; w u: [K] D",
    "B K L D",
    flops="27 * B * R * S * D",  # two decayed sums to either side and one quotient, with 7 exponentials
    values=VALUES,
)
def _bi_wkv(k, v, w, u):
    tokens = list(zip(k.unbind(2), v.unbind(2)))
    past, future = [_empty_sum(k)], [_empty_sum(k)]
    for first, last in zip(tokens[:-1], tokens[:0:-1]):
        past.append(_add_token(past[-1], *first, w))
        future.append(_add_token(future[-1], *last, w))
    outputs = [_mean(u + k_t, v_t, a, b) for a, (k_t, v_t), b in zip(past, tokens, reversed(future))]
    return torch.stack(outputs, 2), None


@_bi_wkv.chunked
def _bi_wkv_chunked(k, v, w, u, chunk=None):
    past = [x[..., :-1, :] for x in _running_sum(k, v, w, chunk=chunk)]
    future = [x[..., 1:, :] for x in _running_sum(k, v, w, reverse=True, chunk=chunk)]
    return _quotient(u[:, None] + k, v, past, future), None


@_bi_wkv.exported
def _bi_wkv_exported(k, v, w, u):
    def body(states, tokens, others):  # puts out the sum before each token
        sums, total = [], states
        for k_t, v_t in zip(*(x.unbind(2) for x in tokens)):
            sums.append(total)
            total = _add_token(total, k_t, v_t, *others)
        return total, [torch.stack(parts, 2) for parts in zip(*sums)]

    (_, past), (_, future) = (loop(body, _empty_sum(k), (k, v), (w,), reverse=reverse) for reverse in (False, True))
    return _mean(u[:, None] + k, v, past, future), None


@public(_wkv4)
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
    """WKV of RWKV-4, for every channel.

        o_t = (sum_{j<t} e^{k_j - (t-1-j) w} v_j + e^{u + k_t} v_t) / (the same with v = 1)

    Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", 2023, arXiv 2305.13048. Keys of any size are safe:
    sums are kept relative to their largest term.

    Args:
        k, v: keys and values (B, K or 1, L, D).
        w: decay of a step (D,) or (K, D), one per route. RWKV-4 stores its logarithm: w = exp(time_decay).
        u: bonus of the token itself, as w.
        initial_state: the sums before the first token (B, K, D, 3) as (num, den, top): num e^top, den e^top. Of two
            sums with another top, the quotient is what counts. (0, 0, -1e38) is empty, the default.
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token has weight e^0
            and value 0.

    Returns:
        (B, K, L, D), merged (B, L, D).
    """
    return _wkv4(k, v, w, u, initial_state, route=route, merge=merge, return_final_state=return_final_state)


@public(_bi_wkv)
def bi_wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    route: Tensor | None = None,
    merge: str | None = None,
) -> Tensor:
    """Bi-WKV of Vision-RWKV: WKV over the tokens on both sides, for every channel, in linear time.

        o_t = (sum_{j != t} e^{k_j - (|t-j|-1) w} v_j + e^{u + k_t} v_t) / (the same with v = 1)

    Duan et al., "Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures", 2024,
    arXiv 2403.02308. Vision-RWKV divides w and u by the number of tokens before. Keys of any size are safe: sums are
    kept relative to their largest term.

    Args:
        k, v: keys and values (B, K or 1, L, D).
        w: decay of a step (D,) or (K, D), one per route; may be negative.
        u: bonus of the token itself, as w.
        route, merge: as of every recurrence (docs/recurrences.md). A padding token has weight e^0 and value 0.

    Returns:
        (B, K, L, D), merged (B, L, D).
    """
    return _bi_wkv(k, v, w, u, route=route, merge=merge)
