"""Linear attention: its kernel is a product of features, so that a sum of outer products stands for the past.

Feature maps are the caller's: q and k come in as features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import join, split
from ..recurrence import check_arguments, public, recurrence

__all__ = ["linear_attention", "global_linear_attention"]

EPS = 1e-10  # added to the normaliser


def _counted(v: Tensor, normalize: bool) -> Tensor:
    """Values with a column of ones, whose readout is the normaliser q . sum k."""
    return F.pad(v, (0, 1), value=1.0) if normalize else v


def _normalized(o: Tensor, normalize: bool) -> Tensor:
    return o[..., :-1] / (o[..., -1:] + EPS) if normalize else o


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
    q: Tensor, k: Tensor, v: Tensor, *, normalize: bool = True, scale: float | None = None
) -> Tensor:
    """Linear attention of every token to all tokens.

        S = sum_j k_j v_j^T
        o_t = scale * S^T q_t              (normalised: / (scale * q_t . sum_j k_j + 1e-10))

    Katharopoulos et al., 2020, arXiv 2006.16236, equation 6. The order of the tokens has no part in it, so there is no
    route and no state. Keys times a weight per token give the decay-free non-causal form of SSD. Sums are float32 under
    half precision.

    Args:
        q, k: features of queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        normalize: divide by the sum of the weights.
        scale: of the queries; dk ** -0.5 by default.

    Returns:
        (B, K, L, H, dv).
    """
    check_arguments("global_linear_attention", q, k, v, normalize, scale)
    scale, dtype = q.shape[-1] ** -0.5 if scale is None else scale, q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)).transpose(2, 3) for x in (q, k, v))
        o = scale * q @ (k.mT @ _counted(v, normalize))
        return _normalized(o, normalize).transpose(2, 3).to(dtype)
