"""Causal depthwise convolution along a route, the short memory in front of a Mamba layer's scan."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recurrence import call, check_shapes, recurrence

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise convolution over the W tokens last visited on a route.

        y_t = activation(bias + sum_{j=0}^{W-1} weight[..., W-1-j] x_{t-j})

    Token t is the t-th of the route; before the first stands `initial_state`, or zeros. Without a route it is
    `torch.nn.Conv1d(D, D, W, groups=D, padding=W - 1)` cut to the first L outputs, on channels-last tokens.

    Args:
        x: (B, K or 1, L, D) tokens.
        weight: (K, D, W), the last tap meets the token itself.
        bias: (K, D).
        activation: None or "silu".
        initial_state: (B, K, D, W - 1), the last inputs of what came before, oldest first.
        route: integer table (K, S) or (B, K, S), see `recurrence`. A padding token is read as zeros.
        merge: None, or "sum" to add the routes' outputs.
        return_final_state: also return the last W - 1 inputs.

    Returns:
        y: (B, K, L, D), or (B, L, D) merged; the dtype of x.
        final state: (B, K, D, W - 1), float32 (float64 for float64 inputs), if `return_final_state`.

    Raises:
        ValueError: a shape does not fit, or `activation` or `merge` is unknown.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation is None or 'silu', got {activation!r}")
    check_shapes("causal_conv1d", route, x=(x, "B K L D"), weight=(weight, "R D W"), bias=(bias, "R D"))
    if initial_state is not None:
        state = (x.shape[0], *weight.shape[:2], weight.shape[2] - 1)
        if initial_state.shape != state:
            raise ValueError(
                f"causal_conv1d: initial_state is (B, K, D, W - 1) = {state}, got {tuple(initial_state.shape)}"
            )
    inputs = (x, weight, bias, activation == "silu", initial_state)
    return call(_causal_conv1d, *inputs, route=route, merge=merge, return_final_state=return_final_state)


def _shapes(batch, routes, length, x, weight, *_):
    return (batch, routes, length, x.shape[-1]), (batch, routes, x.shape[-1], weight.shape[-1] - 1)


def _flops(x, weight, *_):
    batch, _, length, channels = x
    return 2 * batch * weight[0] * length * channels * weight[-1]


@recurrence(tokens=("x",), shapes=_shapes, flops=_flops)
def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    state = x.new_zeros(*x.shape[:2], x.shape[-1], weight.shape[-1] - 1) if initial_state is None else initial_state
    outputs = []
    for x_t in x.unbind(2):
        window = torch.cat((state, x_t.unsqueeze(-1)), -1)
        outputs.append((weight * window).sum(-1))
        state = window[..., 1:]
    y = torch.stack(outputs, 2)
    if bias is not None:
        y = y + bias[:, None]
    return F.silu(y) if silu else y, state


# The chunked form: one shifted multiply-add a tap over all tokens.


def _windows(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
    """x with the W - 1 inputs before it (B, K, W - 1 + T, D); its W views (B, K, T, D); the taps (W, K, 1, D)."""
    width = weight.shape[-1]
    if initial_state is None:
        x = F.pad(x, (0, 0, width - 1, 0))
    else:
        x = torch.cat((initial_state.mT, x), 2)
    views = [x[:, :, j : x.shape[2] - width + 1 + j] for j in range(width)]
    return x, views, weight.movedim(-1, 0).unsqueeze(2).contiguous()


def _convolve(views: list[Tensor], taps: Tensor, bias: Tensor | None) -> Tensor:
    y = views[0] * taps[0] if bias is None else torch.addcmul(bias[:, None], views[0], taps[0])
    for view, tap in zip(views[1:], taps[1:]):
        y.addcmul_(view, tap)
    return y


@_causal_conv1d.chunked
def _chunked(x, weight, bias, silu, initial_state):
    length = x.shape[2]
    x, views, taps = _windows(x, weight, initial_state)
    y = _convolve(views, taps, bias)
    return F.silu(y, inplace=True) if silu else y, x[:, :, length:].mT


@_causal_conv1d.chunked_backward
def _chunked_backward(grad, grad_state, x, weight, bias, silu, initial_state):
    length, before = x.shape[2], weight.shape[-1] - 1
    x, views, taps = _windows(x, weight, initial_state)
    if silu:
        grad = torch.ops.aten.silu_backward(grad, _convolve(views, taps, bias))
    grad_x = torch.zeros_like(x)
    grad_x[:, :, length:] = grad_state.mT
    for j, tap in enumerate(taps):
        grad_x[:, :, j : j + length].addcmul_(grad, tap)
    grads = [grad_x[:, :, before:], torch.stack([(grad * view).sum(2).sum(0) for view in views], -1)]
    if bias is not None:
        grads.append(grad.sum(2).sum(0))
    if initial_state is not None:
        grads.append(grad_x[:, :, :before].mT)
    return grads
