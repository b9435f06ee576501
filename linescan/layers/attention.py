"""Softmax attention within windows of a map, and along a route; `neighborhood.py` has the windows around each token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..scans import routes
from .neighborhood import neighborhood_attention

__all__ = ["fit_window", "sliding_attention", "window_attention"]


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention within windows that tile a map, as Swin has it (Liu et al., 2021, arXiv 2103.14030), without shift.

    Windows that reach over the bottom or the right have fewer keys.

    Args:
        q, k, v: (B, H, W, heads, d).
        window: side of the windows, in tokens.

    Returns:
        (B, H, W, heads, d).
    """
    grid = tuple(q.shape[1:3])
    order = routes.table(f"w{window}", grid, q.device)[0]  # window after window, -1 where one reaches over
    token = order.long().clamp_min(0)

    def windows(x: Tensor) -> Tensor:  # -> (B, windows, heads, keys, d)
        return x.flatten(1, 2)[:, token].unflatten(1, (-1, window**2)).transpose(2, 3)

    mask = None
    if grid[0] % window or grid[1] % window:
        mask = (order >= 0).view(-1, 1, 1, window**2)
    y = F.scaled_dot_product_attention(windows(q), windows(k), windows(v), attn_mask=mask)
    step = routes.inverse_table(f"w{window}", grid, q.device)[0].long()
    return y.transpose(2, 3).flatten(1, 2)[:, step].unflatten(1, grid)


def sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, *, route: Tensor, merge: str | None = None
) -> Tensor:
    """Attention of every token to the `window` tokens around it on each route, as Longformer's (arXiv 2004.05150).

    At the ends of a route the window moves inwards.

    Args:
        q, k, v: tokens (B, 1, L, heads, d).
        window: odd number of tokens.
        route: table (K, S) or (B, K, S) that visits every token once; padding steps are left out.
        merge: None, or "sum" to add up the outputs of the routes.

    Returns:
        (B, K, L, heads, d), or (B, L, heads, d) with `merge`.

    Raises:
        InputError: a route has fewer steps than there are tokens.
    """
    batch, _, length = q.shape[:3]
    if route.shape[-1] < length:
        raise InputError(f"sliding_attention: a route of {route.shape[-1]} steps cannot visit {length} tokens")
    table = route.long().expand(batch, *route.shape[-2:])
    order = table.gather(-1, (table < 0).int().argsort(dim=-1, stable=True))[..., :length]  # padding goes to the end
    sample = torch.arange(batch, device=q.device)[:, None, None]
    lines = (x[sample, 0, order].flatten(0, 1).unsqueeze(1) for x in (q, k, v))  # (B * K, 1, L, heads, d)
    y = neighborhood_attention(*lines, (1, fit_window(window, length)), scale=q.shape[-1] ** -0.5)
    y = y.view(*order.shape, *y.shape[3:])
    y = y.gather(2, order.argsort(-1)[..., None, None].expand_as(y))
    return y.sum(1) if merge else y


def fit_window(window: int, size: int) -> int:
    """The largest odd window that is no larger than wanted and fits an axis."""
    return min(window, size - (size + 1) % 2)
