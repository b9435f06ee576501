"""ViT^3's test-time training: one gradient step on all tokens of an image, which then read the new weights.

Han et al., "ViT^3: Unlocking Test-Time Training in Vision", 2025, arXiv 2512.01643. The inner loss over T tokens is
-(1/3T) sum_t v_t . M(k_t); a column of the weights takes the step -G / (1 + |G|), G its gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recurrence import check_arguments, precise, public

__all__ = ["vittt_conv", "vittt_glu"]


def _step(weight: Tensor, gradient: Tensor, axes) -> Tensor:
    return weight - gradient / (1 + gradient.norm(dim=axes, keepdim=True))


def _glu(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return (x @ w1) * F.silu(x @ w2)


@public(None, "q k v: B K L H D; w1 w2: H D D")
def vittt_glu(q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, return_weights: bool = False):
    """ViT^3's inner model of two linear maps, one the gate of the other, for every head.

        M(x; W) = (x W1) * silu(x W2)
        W' = W - G / (1 + |G|),   G = d/dW -(1/3T) sum_t v_t . M(k_t; W),   |.| over a column
        o_t = M(q_t; W')

    Han et al., "ViT^3: Unlocking Test-Time Training in Vision", 2025, arXiv 2512.01643. The order of the tokens has no
    part in it, so there is no route and no state.

    Args:
        q, k, v: queries, keys and values (B, K or 1, L, H, D).
        w1, w2: the weights before the step, as (in, out) (H, D, D).
        return_weights: also return those after it.

    Returns:
        (B, K, L, H, D); with `return_weights` a pair of that and (W1', W2'), each (B, K, H, D, D).
    """
    check_arguments("vittt_glu", q, k, v, w1, w2, return_weights)
    dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (precise(x).transpose(2, 3) for x in (q, k, v))
        w1, w2 = precise(w1), precise(w2)
        value, gate = k @ w1, k @ w2
        share = gate.sigmoid()
        error = v / (-3 * v.shape[3])
        step1 = k.mT @ (error * gate * share)
        step2 = k.mT @ (error * value * share * (1 + gate * (1 - share)))
        w1, w2 = _step(w1, step1, -2), _step(w2, step2, -2)
        o = _glu(q, w1, w2).transpose(2, 3).to(dtype)
    return (o, (w1, w2)) if return_weights else o


def _windows(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, K, L, D) of a map -> the 3 x 3 tokens around each, zeros outside (B, K, 9, L, D)."""
    x = F.pad(x.unflatten(2, grid), (0, 0, 1, 1, 1, 1))
    rows, columns = grid
    shifts = [x[:, :, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return torch.stack(shifts, 2).flatten(3, 4)


@public(None, "q k v: B K L D; w: D 3 3")
def vittt_conv(q: Tensor, k: Tensor, v: Tensor, w: Tensor, grid: tuple[int, int], return_weights: bool = False):
    """ViT^3's inner model of a depthwise convolution, with a kernel for every image and channel after the step.

        M(x; w) = the 3x3 cross-correlation of x with w, zeros outside the map
        w' = w - G / (1 + |G|),   G = d/dw -(1/3T) sum_t v_t . M(k; w)_t,   |.| over the nine
        o = M(q; w')

    Han et al., "ViT^3: Unlocking Test-Time Training in Vision", 2025, arXiv 2512.01643. All tokens of the map count, so
    there is no route and no state.

    Args:
        q, k, v: queries, keys and values of a map, row by row (B, K or 1, L, D).
        w: the kernels before the step (D, 3, 3).
        grid: rows and columns of the map.
        return_weights: also return the kernels after it.

    Returns:
        (B, K, L, D); with `return_weights` a pair of that and w' (B, K, D, 3, 3).
    """
    _, _, length = check_arguments("vittt_conv", q, k, v, w, grid, return_weights)
    if len(grid) != 2 or grid[0] * grid[1] != length:
        raise ValueError(f"vittt_conv: the grid {tuple(grid)} is not that of {length} tokens")
    dtype, (q, k, v, w) = q.dtype, map(precise, (q, k, v, w))
    gradient = (_windows(k, grid) * (v / (-3 * v.shape[2]))[:, :, None]).sum(3)  # (B, K, 9, D)
    kernel = _step(w.flatten(1).mT, gradient, 2)
    o = (_windows(q, grid) * kernel.unsqueeze(3)).sum(2).to(dtype)
    return (o, kernel.mT.unflatten(-1, (3, 3))) if return_weights else o
