"""Linear attention: its kernel is a product of features, so that a sum of outer products stands for the past.

`linear_attention` takes features; `based` and `hedgehog` make them of queries and keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._compat import plain_shape
from ..chunks import join, split
from ..matmul import matmul
from ..recurrence import check_arguments, check_merge, precise, public, recurrence

__all__ = ["based", "global_linear_attention", "hedgehog", "hedgehog_features", "linear_attention"]

EPS = 1e-10  # added to the normaliser
LEAST = 1e-12  # the smallest of Hedgehog's features


def _counted(v: Tensor, normalize: bool) -> Tensor:
    """Values with a column of ones, whose readout is the normaliser q . sum k."""
    return F.pad(v, (0, 1), value=1.0) if normalize else v


def _normalized(o: Tensor, normalize: bool, eps: float = EPS) -> Tensor:
    return o[..., :-1] / (o[..., -1:] + eps) if normalize else o


@recurrence(
    "q k: B K L H dk; v: B K L H dv",
    "B K L H dv",
    state="B R H dk dv+normalize",
    scale=lambda dk: dk**-0.5,
    flops="4 * B * R * S * H * dk * (dv + normalize)",
    values=dict(q=torch.sigmoid, k=torch.sigmoid, initial_state=torch.sigmoid),
)
def _linear_attention(q, k, v, scale: float, normalize: bool, initial_state):
    state, outputs = initial_state, []
    for q_t, k_t, v_t in zip(*(x.unbind(2) for x in (q, k, _counted(v, normalize)))):
        state = state + k_t[..., None] * v_t[..., None, :]
        outputs.append(scale * (q_t[..., None] * state).sum(-2))
    return _normalized(torch.stack(outputs, 2), normalize), state


@_linear_attention.chunked
def _linear_attention_chunked(q, k, v, scale, normalize, initial_state):
    length = q.shape[2]
    q, k, v = split(scale * q, k, _counted(v, normalize))
    states = torch.cat((initial_state.unsqueeze(3), k.mT @ v), 3).cumsum(3)
    o = join((q @ k.mT).tril() @ v + q @ states[:, :, :, :-1], length)
    return _normalized(o, normalize), states[:, :, :, -1]


@public(_linear_attention)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalize: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention.

        S_t = S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t            (normalised: / (scale * q_t . (k_1 + ... + k_t) + 1e-10))

    Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", 2020,
    arXiv 2006.16236, equation 9.

    Args:
        q, k: features of queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        normalize: divide by the sum of the weights, which wants positive features.
        scale: of the queries; dk ** -0.5 by default.
        initial_state: (B, K, H, dk, dv+normalize): with `normalize`, the last column is the sum of the keys.
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token leaves the state
            as it is.

    Returns:
        (B, K, L, H, dv), merged (B, L, H, dv).
    """
    inputs = q, k, v, scale, normalize, initial_state
    return _linear_attention(*inputs, route=route, merge=merge, return_final_state=return_final_state)


@public(None, "q k: B K L H dk; v: B K L H dv", values=dict(q=torch.sigmoid, k=torch.sigmoid))
def global_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, normalize: bool = True, scale: float | None = None, eps: float = EPS
) -> Tensor:
    """Linear attention of every token to all tokens.

        S = sum_j k_j v_j^T
        o_t = scale * S^T q_t              (normalised: / (scale * q_t . sum_j k_j + eps))

    Katharopoulos et al., 2020, arXiv 2006.16236, equation 6. The order of the tokens has no part in it, so there is no
    route and no state. Keys times a weight per token give the decay-free non-causal form of SSD. Sums are float32 under
    half precision.

    Args:
        q, k: features of queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        normalize: divide by the sum of the weights.
        scale: of the queries; dk ** -0.5 by default.
        eps: added to the sum of the weights.

    Returns:
        (B, K, L, H, dv).
    """
    check_arguments("global_linear_attention", q, k, v, normalize, scale, eps)
    scale, dtype = q.shape[-1] ** -0.5 if scale is None else scale, q.dtype
    q, k, v = (precise(x).transpose(2, 3) for x in (q, k, v))
    o = matmul(scale * q, matmul(k.mT, _counted(v, normalize)))
    return _normalized(o, normalize, eps).transpose(2, 3).to(dtype)


def _of_features(q, k, v, normalize, eps, dtype, initial_state, route, merge, return_final_state):
    """Linear attention of features, in float32 at least, to an output of the caller's dtype."""
    check_merge("linear_attention", merge)
    inputs = q, k, _counted(v, normalize), 1.0, False, initial_state
    o, state = _linear_attention(*inputs, route=route, return_final_state=True)
    o = _normalized(o, normalize, eps)
    o = (o.sum(1) if merge else o).to(dtype)
    return (o, state) if return_final_state else o


def _taylor(x: Tensor) -> Tensor:
    """(..., d) -> (..., 1 + d + d (d + 1) / 2), whose products are 1 + s + s^2 / 2, s = x . y / sqrt(d)."""
    size = plain_shape(x)[-1]
    x = precise(x) * size**-0.25
    row, column = torch.triu_indices(size, size, device=x.device).unbind()
    weight = torch.where(row == column, 0.5, 1.0).to(x.dtype).sqrt()  # products of two channels stand for both orders
    return torch.cat((torch.ones_like(x[..., :1]), x, x[..., row] * x[..., column] * weight), -1)


@public(
    _linear_attention,
    "q k: B K L H dk; v: B K L H dv",
    state="B R H 1+dk+dk*(dk+1)//2 dv+normalize",
    values=dict(initial_state=torch.sigmoid, q=lambda x: x.abs(), k=lambda x: x.abs()),
)
def based(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalize: bool = True,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Based: linear attention whose weights are the second-order Taylor series of softmax attention's.

        s_tj = q_t . k_j / sqrt(dk)
        o_t = sum_{j <= t} (1 + s_tj + s_tj^2 / 2) v_j / (sum_{j <= t} (1 + s_tj + s_tj^2 / 2) + eps)

    Arora et al., "Simple Linear Attention Language Models Balance the Recall-Throughput Tradeoff", 2024,
    arXiv 2402.18668. It is `linear_attention` on 1 + dk + dk (dk + 1) / 2 features, in float32 at least: 1, the
    channels, and their products row by row of the upper triangle.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk); few channels, 16 in the paper.
        v: values (B, K or 1, L, H, dv).
        normalize: divide by the sum of the weights, which are at least 1/2.
        eps: added to the sum of the weights; the authors' layer has 1e-12.
        initial_state: (B, K, H, 1+dk+dk*(dk+1)//2, dv+normalize), as of `linear_attention`.
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token has features 0,
            and leaves the state as it is.

    Returns:
        (B, K, L, H, dv), merged (B, L, H, dv).
    """
    check_arguments("based", q, k, v, normalize, eps, initial_state, route=route)
    call = _taylor(q), _taylor(k), v, normalize, eps, q.dtype, initial_state
    return _of_features(*call, route, merge, return_final_state)


def hedgehog_features(x: Tensor, weight: Tensor, bias: Tensor | None = None, joint: bool = False) -> Tensor:
    """Hedgehog's feature map, y = x W (+ b) -> [softmax(y), softmax(-y)].

    Args:
        x: (..., H, dk).
        weight, bias: (H, dk, F) and (H, F).
        joint: softmax([2 y, -2 y]), one over both halves, instead of one over each, which are at least 1e-12.

    Returns:
        (..., H, 2F), in float32 at least.
    """
    y = matmul(precise(x).unsqueeze(-2), precise(weight)).squeeze(-2)
    y = y if bias is None else y + precise(bias)
    if joint:
        return torch.cat((2 * y, -2 * y), -1).softmax(-1)
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1).clamp_min(LEAST)


@public(
    _linear_attention,
    "q k: B K L H dk; v: B K L H dv; q_weight k_weight: H dk F; q_bias? k_bias?: H F",
    state="B R H 2*F dv+1",
    values=dict(initial_state=torch.sigmoid),
    sizes=dict(F=5),
)
def hedgehog(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    joint: bool = False,
    *,
    eps: float = 1e-12,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Hedgehog: normalised linear attention whose features are learned to resemble softmax attention.

        phi(x) = max([softmax(y), softmax(-y)], 1e-12), y = x W + b      (joint: softmax([2 y, -2 y]))
        o_t = sum_{j <= t} (phi(q_t) . phi(k_j)) v_j / (sum_{j <= t} phi(q_t) . phi(k_j) + eps)

    Zhang et al., "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry", 2024,
    arXiv 2402.04347, as LoLCATs (arXiv 2410.10254) has it, where W starts as the identity and there is no b. With
    `joint` it is the map of flash-linear-attention, another function of the same weights. It is `linear_attention` on
    these features.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        q_weight, k_weight: W of queries and of keys (H, dk, F).
        q_bias, k_bias: b of them (H, F).
        joint: one softmax over both halves.
        eps: added to the sum of the weights.
        initial_state: (B, K, H, 2*F, dv+1), as of `linear_attention`.
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token has features 0,
            and leaves the state as it is.

    Returns:
        (B, K, L, H, dv), merged (B, L, H, dv).
    """
    inputs = q, k, v, q_weight, k_weight, q_bias, k_bias, joint, eps, initial_state
    check_arguments("hedgehog", *inputs, route=route)
    features = hedgehog_features(q, q_weight, q_bias, joint), hedgehog_features(k, k_weight, k_bias, joint)
    return _of_features(*features, v, True, eps, q.dtype, initial_state, route, merge, return_final_state)
