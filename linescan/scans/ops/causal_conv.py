"""Causal depthwise convolution along a route, the short memory in front of a Mamba layer's scan."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recurrence import public, recurrence

__all__ = ["causal_conv1d"]


@recurrence("x: B K L D; weight: R D W; bias?: R D", "B K L D", state="B R D W-1", flops="2 * B * R * S * D * W")
def _causal_conv1d(x, weight, bias, silu: bool, initial_state):
    outputs, state = [], initial_state
    for x_t in x.unbind(2):
        window = torch.cat((state, x_t.unsqueeze(-1)), -1)
        outputs.append((weight * window).sum(-1))
        state = window[..., 1:]
    y = torch.stack(outputs, 2)
    if bias is not None:
        y = y + bias[:, None]
    return F.silu(y) if silu else y, state


# The chunked form: one shifted multiply-add per tap over all tokens.


def _windows(x: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """x with the W - 1 inputs before it (B, K, W - 1 + T, D); its W views (B, K, T, D); the taps (W, K, 1, D)."""
    width = weight.shape[-1]
    x = torch.cat((before.mT, x), 2)
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
    return [*grads, grad_x[:, :, :before].mT]


@_causal_conv1d.exported
def _exported(x, weight, bias, silu, initial_state):
    length = x.shape[2]
    x, views, taps = _windows(x, weight, initial_state)
    y = sum([view * tap for view, tap in zip(views, taps)])
    if bias is not None:
        y = y + bias[:, None]
    return F.silu(y) if silu else y, x[:, :, length:].mT


@public(_causal_conv1d)
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
    """Causal depthwise convolution over the W tokens last visited on a route.

        y_t = activation(bias + sum_{j=0}^{W-1} weight[..., W-1-j] x_{t-j})

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv 2312.00752, section 3.4.
    Without a route it is `torch.nn.Conv1d(D, D, W, groups=D, padding=W - 1)` cut to the first L outputs, on tokens with
    channels last.

    Args:
        x: tokens (B, K or 1, L, D).
        weight: taps (K, D, W), the last of which meets the token itself.
        bias: (K, D).
        activation: None or "silu".
        initial_state: the last W - 1 inputs of what came before, oldest first (B, K, D, W-1).
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token is read as
            zeros.

    Returns:
        (B, K, L, D), merged (B, L, D).

    Raises:
        ValueError: `activation` is unknown.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation is None or 'silu', got {activation!r}")
    inputs = x, weight, bias, activation == "silu", initial_state
    return _causal_conv1d(*inputs, route=route, merge=merge, return_final_state=return_final_state)
