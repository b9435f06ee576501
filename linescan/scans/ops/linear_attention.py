"""Linear attention: its kernel is a product of features, so that a sum of outer products stands for the past.

Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", 2020,
arXiv 2006.16236. Feature maps are the caller's: q and k come in as features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import empty_state, head_flops, join, split
from ..recurrence import call, check_shapes, recurrence

__all__ = ["linear_attention", "global_linear_attention"]

EPS = 1e-10  # added to the normaliser


def _shapes(batch, routes, length, q, k, v, scale, normalize, *_):
    return (batch, routes, length, *v.shape[3:]), (batch, routes, *q.shape[3:], v.shape[4] + int(normalize))


def _counted(v: Tensor, normalize: bool) -> Tensor:
    """Values with a column of ones, whose readout is the normaliser q . sum k."""
    return F.pad(v, (0, 1), value=1.0) if normalize else v


def _normalized(o: Tensor, normalize: bool) -> Tensor:
    return o[..., :-1] / (o[..., -1:] + EPS) if normalize else o


@recurrence(tokens=("q", "k", "v"), shapes=_shapes, flops=lambda q, k, v, *_: 4 * head_flops(q, k, v) // 5)
def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, normalize: bool, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    v = _counted(v, normalize)
    state, outputs = empty_state(q, v, initial_state), []
    for q_t, k_t, v_t in zip(*(x.unbind(2) for x in (q, k, v))):
        state = state + k_t[..., None] * v_t[..., None, :]
        outputs.append(scale * (q_t[..., None, :] @ state).squeeze(-2))
    return _normalized(torch.stack(outputs, 2), normalize), state


@_linear_attention.chunked
def _linear_attention_chunked(q, k, v, scale, normalize, initial_state):
    v = _counted(v, normalize)
    length, state = q.shape[2], empty_state(q, v, initial_state)
    q, k, v = split(scale * q, k, v)
    states = torch.cat((state.unsqueeze(3), k.mT @ v), 3).cumsum(3)
    o = join((q @ k.mT).tril() @ v + q @ states[:, :, :, :-1], length)
    return _normalized(o, normalize), states[:, :, :, -1]


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
    """Causal linear attention: S_t = S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

    With `normalize`, o_t is divided by scale q_t . (k_1 + ... + k_t) + 1e-10, which wants positive features
    (Katharopoulos et al., 2020, equation 9). The state is float32 under half precision.

    Args:
        q, k: features of queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        normalize: divide by the sum of the weights.
        scale: of the queries; dk ** -0.5 by default.
        initial_state: (B, K, H, dk, dv), or with `normalize` (B, K, H, dk, dv + 1) with the sum of the keys as last
            column; zeros by default.
        route: table (K, S) or (B, K, S), see `linescan.scans.recurrence`. A padding token leaves the state as it is.
        merge: None, or "sum" to add up the outputs of the routes.
        return_final_state: also return the state after the last step.

    Returns:
        (B, K, L, H, dv) in q's dtype, or (B, L, H, dv) with `merge`; with `return_final_state`, a pair of that and the
        state, shaped like `initial_state`.

    Raises:
        ValueError: a shape that does not fit the others, or an unknown `merge`.
    """
    check_shapes(
        "linear_attention",
        route,
        q=(q, "B K L H dk"),
        k=(k, "B K L H dk"),
        v=(v, "B K L H dv"),
        initial_state=(initial_state, f"B R H dk {v.shape[-1] + normalize}"),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return call(
        _linear_attention,
        q,
        k,
        v,
        scale,
        normalize,
        initial_state,
        route=route,
        merge=merge,
        return_final_state=return_final_state,
    )


def global_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, normalize: bool = True, scale: float | None = None
) -> Tensor:
    """Non-causal linear attention: every token reads S = sum_j k_j v_j^T of the whole sequence, o_t = scale S^T q_t.

    With `normalize`, o_t is divided by scale q_t . sum_j k_j + 1e-10 (Katharopoulos et al., 2020, equation 6). The
    order of the tokens has no part in it, so there is no route and no state. Keys times a weight a token give the
    decay-free non-causal form of SSD. Sums are float32 under half precision.

    Args:
        q, k: features of queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        normalize: divide by the sum of the weights.
        scale: of the queries; dk ** -0.5 by default.

    Returns:
        (B, K, L, H, dv) in q's dtype.

    Raises:
        ValueError: a shape that does not fit the others.
    """
    check_shapes("global_linear_attention", None, q=(q, "B K L H dk"), k=(k, "B K L H dk"), v=(v, "B K L H dv"))
    scale, dtype = q.shape[-1] ** -0.5 if scale is None else scale, q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)).transpose(2, 3) for x in (q, k, v))
        o = scale * q @ (k.mT @ _counted(v, normalize))
        return _normalized(o, normalize).transpose(2, 3).to(dtype)
