"""Test-time training: the state is the weights of a model that takes a gradient step at every token.

The inner model is LN(k W + b). The tokens of a mini-batch take their gradients at the weights that entered it, which
makes a mini-batch a few matrix products. The bias is one more row of the weights, read by a 1 behind every key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._compat import plain_shape
from ..exported import in_pieces
from ..recurrence import check_arguments, given_states, public, recurrence

__all__ = ["ttt_linear", "ttt_linear_fla"]

EPS = 1e-6  # of the layer norm

VALUES = dict(lr=lambda x: x.sigmoid() / 4, token=torch.sigmoid, eta=lambda x: x.sigmoid() / 4)


def _normalized(z: Tensor) -> tuple[Tensor, Tensor]:
    """z over its last axis with mean 0 and variance 1, and 1 / standard deviation."""
    z = z - z.mean(-1, keepdim=True)
    factor = (z.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return z * factor, factor


def _slope(z: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Gradient of 1/2 |LN(z) - target|^2 in z."""
    normal, factor = _normalized(z)
    inner = weight * (weight * normal + bias - target)
    return factor * (inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True))


def _output(q: Tensor, y: Tensor, weight: Tensor, bias: Tensor, residual: bool) -> Tensor:
    return (y if residual else q) + weight * _normalized(y)[0] + bias


def _wrong(mini_batch) -> str | None:
    return None if mini_batch >= 1 else f"a mini-batch has at least 1 token, got {mini_batch}"


def _with_one(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=1.0)


@recurrence(
    "q k v: B K L H D; lr: B K L H; eta?: B K L H; token?: mini_batch; weight bias: H D",
    "B K L H D",
    state="start: B R H D+1 D; pending: B R H D+1 D",
    requires=_wrong,
    flops="8 * B * R * S * H * D * D",  # per element of the weights: two reads, an update and a step of 2 each
    values=VALUES,
    sizes=dict(mini_batch=3),
)
def _ttt_linear(
    q, k, v, lr, eta, token, weight, bias, mini_batch: int, scale: float, residual: bool, start, pending, position: int
):
    """The weights are `start`, which entered the mini-batch, less the rate times `pending`, its sum of gradients."""
    outputs = []
    for t, (q_t, k_t, v_t, lr_t) in enumerate(zip(*(x.unbind(2) for x in (q, k, v, lr)))):
        place = (position + t) % mini_batch
        key, query = _with_one(k_t)[..., None], _with_one(scale * q_t)[..., None]
        slope = _slope((key * start).sum(-2), v_t - k_t, weight, bias)
        pending = pending + key * (lr_t[..., None] * slope)[..., None, :]
        rate = 1.0 if token is None else token[place].clamp_min(0)
        weights = start - (rate if eta is None else rate * eta[:, :, t, :, None, None]) * pending
        outputs.append(_output(q_t, (query * weights).sum(-2), weight, bias, residual))
        if place == mini_batch - 1:
            start, pending = weights, torch.zeros_like(pending)
    return torch.stack(outputs, 2), (start, pending)


@_ttt_linear.chunked
def _ttt_linear_chunked(
    q, k, v, lr, eta, token, weight, bias, mini_batch, scale, residual, start, pending, position
):  # fmt: skip
    rate = torch.ones_like(lr) if eta is None else eta
    if token is not None:
        places = (position + torch.arange(q.shape[2], device=q.device)) % mini_batch
        rate = rate * token.clamp_min(0)[places][:, None]
    weight, bias = weight[:, None], bias[:, None]
    first = min(-position % mini_batch, q.shape[2])  # tokens that are left of a mini-batch begun before
    sizes = [first, *[mini_batch] * ((q.shape[2] - first) // mini_batch), (q.shape[2] - first) % mini_batch]
    tokens = [x.transpose(2, 3).split(sizes, 3) for x in (q, k, v, lr[..., None], rate[..., None])]
    outputs = []
    for q_p, k_p, v_p, lr_p, rate_p in zip(*tokens):
        keys, queries = _with_one(k_p), _with_one(scale * q_p)
        steps = lr_p * _slope(keys @ start, v_p - k_p, weight, bias)
        changes = queries @ pending + (queries @ keys.mT).tril() @ steps
        outputs.append(_output(q_p, queries @ start - rate_p * changes, weight, bias, residual))
        pending = pending + keys.mT @ steps
        position += q_p.shape[3]
        if q_p.shape[3] and position % mini_batch == 0:
            start, pending = start - rate_p[:, :, :, -1:] * pending, torch.zeros_like(pending)
    return torch.cat(outputs, 3).transpose(2, 3), (start, pending)


@_ttt_linear.exported
def _ttt_linear_exported(*inputs):
    return in_pieces(_ttt_linear, inputs, inputs[_ttt_linear.parameters.index("mini_batch")])


@public(
    _ttt_linear,
    "q k v: B K L H D; lr: B K L H; token: mini_batch; weight bias: H D",
    state="start: B R H D+1 D; pending: B R H D+1 D",
    values=VALUES,
    sizes=dict(mini_batch=3),
)
def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    position: int = 0,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """TTT-Linear: a linear model, under a layer norm, that is trained on every token.

        g_j = d/dz 1/2 |LN(z) - (v_j - k_j)|^2   at z = k_j W + b, in mini-batches of M tokens that W, b enter
        W_i = W - max(token_i, 0) sum_{j <= i} lr_j k_j^T g_j     b_i = b - max(token_i, 0) sum_{j <= i} lr_j g_j
        o_i = q_i + LN(q_i W_i + b_i)            with i, j the places in the mini-batch

    Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", 2024, arXiv 2407.04620, sections
    2.4 and 2.5, as its official code computes it. The next mini-batch starts from the weights of the last token.

    Args:
        q, k, v: queries, keys and values (B, K or 1, L, H, D).
        lr: learning rates of the tokens as keys (B, K or 1, L, H); TTT has sigmoid(.) / D times a base rate.
        token: rates of the M places in a mini-batch (mini_batch,); TTT has 1 / (i + 1) and a learned part.
        weight, bias: of the layer norm, whose eps is 1e-6 (H, D).
        initial_state: a pair (B, K, H, D+1, D), in which the bias is the last row. start: the weights that entered the
            mini-batch at hand; pending: the sum of its gradients so far, 0 at its end. After token i the weights are
            start - max(token_i, 0) pending.
        position: tokens before the first one, which says where its mini-batch ends.
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token takes a place in
            a mini-batch and leaves the sum of the gradients as it is.

    Returns:
        (B, K, L, H, D), merged (B, L, H, D).
    """
    states = given_states("ttt_linear", initial_state)
    check_arguments("ttt_linear", q, k, v, lr, token, weight, bias, *states, position, route=route)
    inputs = q, k, v, lr, None, token, weight, bias, plain_shape(token)[0], 1.0, False, *states
    return _ttt_linear(*inputs, position, route=route, merge=merge, return_final_state=return_final_state)


@public(
    _ttt_linear,
    "q k v: B K L H D; eta: B K L H; weight bias: H D",
    state="start: B R H D+1 D; pending: B R H D+1 D",
    requires=_wrong,
    values=VALUES,
)
def ttt_linear_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    weight: Tensor,
    bias: Tensor,
    mini_batch: int = 16,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    position: int = 0,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """TTT-Linear as flash-linear-attention has it: rates belong to the tokens that read.

        g_j = d/dz 1/2 |LN(z) - (v_j - k_j)|^2   at z = k_j W + b, in mini-batches that W, b enter
        W_i = W - eta_i sum_{j <= i} k_j^T g_j           b_i = b - eta_i sum_{j <= i} g_j
        y_i = scale * q_i W_i + b_i                      o_i = y_i + LN(y_i)

    Sun et al., 2024, arXiv 2407.04620, in the form of the `ttt` operator of flash-linear-attention (MIT), which differs
    from `ttt_linear` in the rates, the scale and the residual.

    Args:
        eta: rates of the tokens as readers (B, K or 1, L, H); that of the last token of a mini-batch makes the weights
            that the next one starts from.
        mini_batch: tokens of a mini-batch.
        scale: of the queries; D ** -0.5 by default.
        initial_state: a pair (B, K, H, D+1, D), start and pending. After token i the weights are start - eta_i pending.

    All else as of `ttt_linear`.
    """
    states = given_states("ttt_linear_fla", initial_state)
    check_arguments("ttt_linear_fla", q, k, v, eta, weight, bias, mini_batch, scale, *states, position, route=route)
    scale = plain_shape(q)[-1] ** -0.5 if scale is None else scale
    inputs = q, k, v, torch.ones_like(eta), eta, None, weight, bias, mini_batch, scale, True, *states
    return _ttt_linear(*inputs, position, route=route, merge=merge, return_final_state=return_final_state)
