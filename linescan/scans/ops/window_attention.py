"""Softmax attention to the last tokens of a route and linear attention to all older ones, under one normaliser."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recurrence import check_arguments, given_states, precise, public, recurrence
from .linear_attention import _linear_attention_chunked, hedgehog_features

__all__ = ["hedgehog_window"]


def _weighed(scores: Tensor, values: Tensor, share: Tensor) -> Tensor:
    """The window's part of numerator and denominator: scores (..., W), values (..., W, dv + 1), 0 where no token is."""
    scores = scores.masked_fill(values[..., -1] == 0, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return share * (weights[..., None] * values).sum(-2)


def _wrong(window) -> str | None:
    return None if window >= 1 else f"window is at least 1, got {window}"


def _split(recent: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Keys, their features, and values with a 1 behind them."""
    return recent.split(sizes, -1)


@recurrence(
    "q k: B K L H dk; q_features k_features: B K L H F; v: B K L H dv; share: H",
    "B K L H dv",
    state="memory: B R H F dv+1; recent: B R H window dk+F+dv+1",
    scale=lambda dk: dk**-0.5,
    requires=_wrong,
    flops="B * R * S * H * (4 * F * (dv + 1) + 2 * window * (dk + dv + 1))",
    values=dict(share=torch.sigmoid, q_features=torch.sigmoid, k_features=torch.sigmoid),
    sizes=dict(F=4, window=4),
)
def _window_attention(q, k, q_features, k_features, v, share, window: int, scale: float, memory, recent):
    sizes, outputs = (k.shape[-1], k_features.shape[-1], v.shape[-1] + 1), []
    share = share[:, None]
    tokens = torch.cat((k, k_features, F.pad(v, (0, 1), value=1.0)), -1)
    for q_t, features_t, token_t in zip(q.unbind(2), q_features.unbind(2), tokens.unbind(2)):
        _, features, values = _split(recent[:, :, :, 0], *sizes)
        memory = memory + features[..., None] * values[..., None, :]
        recent = torch.cat((recent[:, :, :, 1:], token_t[:, :, :, None]), 3)
        keys, _, values = _split(recent, *sizes)
        near = _weighed(scale * (q_t[..., None, :] * keys).sum(-1), values, share)
        o = near + (1 - share) * (features_t[..., None] * memory).sum(-2)
        outputs.append(o[..., :-1] / o[..., -1:])
    return torch.stack(outputs, 2), (memory, recent)


@_window_attention.chunked
def _window_attention_chunked(q, k, q_features, k_features, v, share, window, scale, memory, recent):
    length, sizes = q.shape[2], (k.shape[-1], k_features.shape[-1], v.shape[-1] + 1)
    tokens = torch.cat((k, k_features, F.pad(v, (0, 1), value=1.0)), -1)
    tokens = torch.cat((recent.transpose(2, 3), tokens), 2)  # token t reads those at t + 1 to t + W

    # The window: each block of W queries meets two blocks of W keys.
    keys, _, values = _split(F.pad(tokens, (0, 0, 0, 0, 0, -length % window)).transpose(2, 3), *sizes)
    keys, values = (x.unfold(3, 2 * window, window).mT for x in (keys, values))
    queries = F.pad(scale * q, (0, 0, 0, 0, 0, -length % window)).transpose(2, 3).unflatten(3, (-1, window))
    place = torch.arange(2 * window, device=q.device) - torch.arange(window, device=q.device)[:, None]
    outside = (place < 1) | (place > window) | (values[..., None, :, -1] == 0)
    scores = (queries @ keys.mT).masked_fill(outside, -torch.inf)
    # A row behind the last token may have no key, and so no largest score.
    largest = scores.amax(-1, keepdim=True)
    near = ((scores - largest.clamp_min(torch.finfo(q.dtype).min)).exp() @ values).flatten(3, 4)[:, :, :, :length]

    _, late, values = _split(tokens[:, :, :length], *sizes)
    far, memory = _linear_attention_chunked(q_features, late, values, 1.0, False, memory)
    share = share[:, None]
    o = share * near.transpose(2, 3) + (1 - share) * far
    return o[..., :-1] / o[..., -1:], (memory, tokens[:, :, length:].transpose(2, 3))


@public(
    _window_attention,
    "q k: B K L H dk; v: B K L H dv; q_weight k_weight: H dk F; factor: H",
    state="memory: B R H 2*F dv+1; recent: B R H window dk+2*F+dv+1",
    requires=_wrong,
    values=dict(memory=torch.sigmoid, recent=torch.sigmoid),
    sizes=dict(F=3, window=4),
)
def hedgehog_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    factor: Tensor,
    window: int = 64,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """LoLCATs' hybrid: softmax attention to the last W tokens, Hedgehog's linear attention to all older ones.

        p_tj = w e^{s_tj - max_j s_tj}, s_tj = scale * q_t . k_j      for t - W < j <= t, w = sigmoid(factor)
        p_tj = (1 - w) phi(q_t) . phi(k_j)                            for j <= t - W
        o_t = sum_j p_tj v_j / sum_j p_tj

    Zhang et al., "LoLCATs: On Low-Rank Linearizing of Large Language Models", 2024, arXiv 2410.10254, section 3.3. phi
    is that of `hedgehog`. The window alone is divided by the exponential of its maximum, so that the mix depends on it.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        q_weight, k_weight: W of the features of queries and of keys (H, dk, F).
        factor: of the heads (H,).
        window: W.
        scale: of the queries in the window; dk ** -0.5 by default.
        initial_state: a pair. memory: sum of the features times values, with a last column for the sum of the features,
            over all but the last W tokens (B, K, H, 2*F, dv+1); recent: these W tokens, as their key, its features, the
            value and a 1, or zeros where there is no token (B, K, H, window, dk+2*F+dv+1).
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token has score 0 and
            value 0 in the window, and features 0.

    Returns:
        (B, K, L, H, dv), merged (B, L, H, dv).
    """
    states = given_states("hedgehog_window", initial_state)
    check_arguments("hedgehog_window", q, k, v, q_weight, k_weight, factor, window, scale, *states, route=route)
    features = hedgehog_features(q, q_weight), hedgehog_features(k, k_weight)
    inputs = q, k, *features, v, precise(factor).sigmoid(), window, scale, *states
    return _window_attention(*inputs, route=route, merge=merge, return_final_state=return_final_state)
