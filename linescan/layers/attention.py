"""Softmax attention to all tokens, within windows of a map, and along a route.

`neighborhood.py` has the windows around each token.
"""

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..errors import InputError
from ..scans import routes
from .blocks import TokenMixer
from .linear import linear, trunc_normal_
from .neighborhood import neighborhood_attention

__all__ = ["SelfAttention", "ShiftedWindowAttention", "fit_window", "sliding_attention", "window_attention"]


class SelfAttention(TokenMixer):
    """Softmax attention of every token to all, blind to where they stand: proj(softmax(q k / sqrt(d)) v).

    Args:
        dim: channels in and out.
        num_heads: heads.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = _dividing(num_heads, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], **options) -> tuple[Tensor, None]:
        q, k, v = linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return linear(self.proj, y.transpose(1, 2).flatten(2)), None


def _dividing(num_heads: int, dim: int) -> int:
    if dim % num_heads:
        raise InputError(f"num_heads divides the channels: {dim} is not a multiple of {num_heads}")
    return num_heads


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | tuple[int, int], shift: int = 0, bias: Tensor | None = None
) -> Tensor:
    """Attention within windows that tile a map, as Swin has it (Liu et al., 2021, arXiv 2103.14030).

    Windows that reach over the bottom or the right have fewer keys. With a shift the map is a torus whose windows start
    at (shift, shift); in the last row and column of them, tokens see those from the same side of the seam alone.

    Args:
        q, k, v: (B, H, W, heads, d).
        window: side of the windows, in tokens, or their height and width.
        shift: less than `window`.
        bias: (heads, N, N) for windows of N tokens, added to the logits of every window.

    Returns:
        (B, H, W, heads, d).
    """
    height, width = grid = tuple(q.shape[1:3])
    rows, columns = to_2tuple(window)
    order = routes.table(f"w{rows}x{columns}", grid, q.device)[0].long()  # window by window, -1 where one reaches over
    if shift:
        cells = torch.arange(height * width, device=q.device).view(grid).roll((-shift, -shift), (0, 1)).flatten()
        order = torch.where(order < 0, order, cells[order.clamp_min(0)])
    order = order.view(-(-height // rows), -(-width // columns), rows * columns)
    masked = shift or height % rows or width % columns
    parts = [order[:-1, :-1].flatten(0, 1), order[-1], order[:-1, -1]] if masked else [order.flatten(0, 1)]

    def attend(tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Windows (n, N) of tokens -> (B, n * N, heads, d)."""
        # Four axes, (B * n, heads, N, d): what fast kernels and ONNX know.
        q_, k_, v_ = (x.flatten(1, 2)[:, tokens.clamp_min(0)].transpose(2, 3).flatten(0, 1) for x in (q, k, v))
        if mask is not None:
            mask = mask.expand(q.shape[0], *mask.shape).flatten(0, 1) if mask.ndim == 4 else mask[None]
        y = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask)
        return y.transpose(1, 2).unflatten(0, (q.shape[0], tokens.shape[0])).flatten(1, 2)

    outputs = [attend(parts[0], bias)]
    for tokens in parts[1:]:
        side = 2 * (tokens // width < shift) + (tokens % width < shift)  # of the seam
        seen = (side[:, :, None] == side[:, None]) | (tokens < 0)[:, :, None]  # padding sees all: its output is dropped
        seen = (seen & (tokens >= 0)[:, None])[:, None]  # (n, 1, N, N)
        outputs.append(attend(tokens, seen if bias is None else bias.masked_fill(~seen, -torch.inf)))
    step = routes.inverse(torch.cat(parts).flatten(), height * width).long()
    return torch.cat(outputs, 1)[:, step].unflatten(1, grid)


class ShiftedWindowAttention(TokenMixer):
    """Softmax attention within (shifted) windows, with a learned bias for each offset: Swin's (arXiv 2103.14030).

    Args:
        dim: channels in and out.
        num_heads: heads.
        window: side of the windows, in tokens.
        shift: of `window_attention`.
    """

    def __init__(self, dim: int, num_heads: int, window: int, shift: int = 0):
        super().__init__()
        self.num_heads, self.window, self.shift = _dividing(num_heads, dim), window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias_table = nn.Parameter(trunc_normal_(torch.zeros((2 * window - 1) ** 2, num_heads), std=0.02))
        self.proj = nn.Linear(dim, dim)

    def no_weight_decay(self) -> set[str]:
        return {"bias_table"}

    def bias(self) -> Tensor:
        """The bias of each query and key of a window, (heads, window^2, window^2)."""
        side = torch.arange(self.window, device=self.bias_table.device)
        offset = side[:, None] - side + self.window - 1  # (window, window), of the query from the key
        index = offset[:, None, :, None] * (2 * self.window - 1) + offset[None, :, None]
        return self.bias_table[index.flatten(2).flatten(0, 1)].permute(2, 0, 1)

    def shift_on(self, grid: tuple[int, int]) -> int:
        """The shift on a map of this size."""
        return self.shift

    def mix_tokens(self, x: Tensor, grid: tuple[int, int], **options) -> tuple[Tensor, None]:
        qkv = linear(self.qkv, x).unflatten(1, grid).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.unbind(-3)
        y = window_attention(q, k, v, self.window, self.shift_on(grid), self.bias().to(q.dtype))
        return linear(self.proj, y.flatten(-2).flatten(1, 2)), None


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
    y = neighborhood_attention(*lines, window=(1, fit_window(window, length)), scale=q.shape[-1] ** -0.5)
    y = y.view(*order.shape, *y.shape[3:])
    y = y.gather(2, order.argsort(-1)[..., None, None].expand_as(y))
    return y.sum(1) if merge else y


def fit_window(window: int, size: int) -> int:
    """The largest odd window that is no larger than wanted and fits an axis."""
    return min(window, size - (size + 1) % 2)
