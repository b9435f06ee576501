"""Neighbourhood attention: every position of a map attends to the window of positions around it.

Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, arXiv 2204.07143; dilation: arXiv 2209.15001. The
semantics are those of natten up to 0.17 (`na2d_qk`, softmax, `na2d_av`), which published models were trained with:
at a border the window moves inwards, so that every query has exactly as many keys, without padding or mask.

It is plain torch, for any device, gradients and graphs. On a CPU a C++ kernel serves where no gradient is wanted.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._compat import is_symbol
from ..scans.kernels import cpu
from ..scans.recurrence import is_plain, wants_gradient

__all__ = ["neighborhood_attention", "neighborhood_logits", "neighborhood_keys"]

_TILE = 8  # largest side of the blocks of queries that share the keys around them
_BUDGET = 2**26  # attention weights held at a time


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """softmax(scale * q k^T + bias) v over the window of each position.

    Along an axis of n positions with dilation d, position i is the (i // d)-th of those with the same i mod d; among
    these m positions the window of the p-th has the `window` keys from min(max(p - window // 2, 0), m - window) on.

    In torch, blocks of queries attend to the smallest block of keys that holds all their windows, as one dense
    attention with what is outside of a window masked. So the work is a few times the least possible, but all of it is
    matrix products. Large maps go by rows of blocks, whose weights are made again in the backward pass.

    Args:
        q, k, v: (B, H, W, heads, d).
        window: odd side, or height and width, in positions.
        dilation: distance between neighbouring keys of a window, one or one an axis.
        bias: (heads, 2 * height - 1, 2 * width - 1), added to the logits by the row and column of key minus query in
            steps of `dilation`, counted from -(height - 1) and -(width - 1).
        scale: factor on the logits before the bias.

    Returns:
        (B, H, W, heads, d), of q's dtype.

    Raises:
        ValueError: a window is even, does not fit its axis, or a shape is wrong.
    """
    window, dilation = _check(q, k, v, window, dilation, bias)
    inputs = q, k, v, bias
    if is_plain(inputs) and not wants_gradient(inputs):
        out = cpu.neighborhood_attention(q, k, v, window, dilation, bias, scale)
        if out is not None:
            return out
    if dilation == (1, 1):
        return _attend(q, k, v, window, bias, scale)
    out = torch.empty_like(v)
    for row in range(dilation[0]):
        for column in range(dilation[1]):
            group = slice(None), slice(row, None, dilation[0]), slice(column, None, dilation[1])
            out[group] = _attend(q[group], k[group], v[group], window, bias, scale)
    return out


def neighborhood_keys(size: int, window: int, dilation: int = 1) -> tuple[Tensor, Tensor]:
    """The definition along one axis: the keys of every query, and where in the bias table each is.

    Returns:
        positions of the keys (size, window), and their distances from the query in steps of `dilation`, plus
        window - 1 (size, window); both int64.
    """
    position = torch.arange(size)
    group, p = position % dilation, position // dilation
    members = (size - group + dilation - 1) // dilation
    start = torch.minimum((p - window // 2).clamp_min(0), members - window)
    key = start[:, None] + torch.arange(window)
    return key * dilation + group[:, None], key - p[:, None] + window - 1


def neighborhood_logits(
    q: Tensor,
    k: Tensor,
    window: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
) -> Tensor:
    """q k^T + bias over each window, written down as it is defined; gathers `height * width` copies of k.

    Args:
        q, k, window, dilation, bias: as for `neighborhood_attention`.

    Returns:
        (B, H, W, heads, height * width), keys of a window row-major.
    """
    window, dilation = _check(q, k, k, window, dilation, bias)
    (rows, row_bias), (columns, column_bias) = map(neighborhood_keys, q.shape[1:3], window, dilation)
    keys = k[:, rows[:, None, :, None], columns[None, :, None, :]]  # (B, H, W, height, width, heads, d)
    logits = torch.einsum("bhwnd, bhwyxnd -> bhwnyx", q, keys)
    if bias is not None:
        logits = logits + bias[:, row_bias[:, None, :, None], column_bias[None, :, None, :]].movedim(0, 2)
    return logits.flatten(-2)


def _check(q, k, v, window, dilation, bias) -> tuple[tuple[int, int], tuple[int, int]]:
    window = (window, window) if isinstance(window, int) else tuple(window)
    dilation = (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)
    if q.ndim != 5 or q.shape != k.shape or q.shape[:4] != v.shape[:4]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"neighborhood_attention expects q, k, v of shape (B, H, W, heads, d), got {shapes}")
    for side, size, step in zip(window, q.shape[1:3], dilation):
        if side < 1 or side % 2 == 0:
            raise ValueError(f"neighborhood_attention needs odd windows, got {window[0]}x{window[1]}")
        if step < 1 or side * step > size:
            raise ValueError(
                f"a window of {window[0]}x{window[1]} with dilation {dilation[0]}x{dilation[1]} does not fit a map of "
                f"{q.shape[1]}x{q.shape[2]} positions"
            )
    if bias is not None and bias.shape != (q.shape[3], 2 * window[0] - 1, 2 * window[1] - 1):
        wanted = (q.shape[3], 2 * window[0] - 1, 2 * window[1] - 1)
        raise ValueError(f"neighborhood_attention expects a bias of shape {wanted}, got {tuple(bias.shape)}")
    return window, dilation


class _Tiles(NamedTuple):
    """Blocks of `queries` neighbouring queries along an axis, each with the `keys` keys that hold their windows."""

    query: Tensor  # (tiles, queries): positions; the last block repeats the last one
    key: Tensor  # (tiles, keys): positions
    bias: Tensor  # (tiles, queries, keys): where in the bias table; 2 * window - 1 outside of the query's window

    @classmethod
    def along(cls, size: int, window: int, device: torch.device) -> "_Tiles":
        # As even as can be; where the size is a symbol, all of one shape: nested divisions of it take minutes to trace.
        symbol = is_symbol(size)
        queries = _TILE if symbol else -(-size // -(-size // _TILE))
        keys = queries + window - 1 if symbol else min(size, queries + window - 1)
        first = torch.arange(0, size, queries, device=device)[:, None]
        query = (first + torch.arange(queries, device=device)).clamp_max(size - 1)
        key = (first - window // 2).clamp_max(size - keys).clamp_min(0) + torch.arange(keys, device=device)
        start = (query - window // 2).clamp(0, size - window)[..., None]
        inside = (start <= key[:, None]) & (key[:, None] < start + window)
        distance = key[:, None] - query[..., None] + window - 1
        return cls(query, key.clamp_max(size - 1), torch.where(inside, distance, 2 * window - 1))

    def part(self, tiles: slice) -> "_Tiles":
        return _Tiles(*(x[tiles] for x in self))


def _attend(q, k, v, window, bias, scale) -> Tensor:
    """Neighbourhood attention without dilation."""
    height, width, heads = q.shape[1:4]
    if bias is None:
        bias = q.new_zeros(1, 2 * window[0] - 1, 2 * window[1] - 1)
    bias = F.pad(bias.to(q.dtype), (0, 1, 0, 1), value=float("-inf"))
    rows, columns = (_Tiles.along(n, side, q.device) for n, side in zip((height, width), window))
    if is_symbol(height) or is_symbol(width):  # the number of strips would be a constant of the graph
        return _strip(q, k, v, bias, rows, columns, scale)[:, :height]
    batch = 1 if torch.compiler.is_compiling() else len(q)  # a graph serves every batch
    weights = max(1, batch) * heads * rows.bias[0].numel() * columns.bias.numel()  # of one row of blocks
    step = max(1, _BUDGET // weights)
    strips = [rows.part(slice(i, i + step)) for i in range(0, len(rows.query), step)]
    if len(strips) == 1:
        return _strip(q, k, v, bias, rows, columns, scale)[:, :height]
    if torch.is_grad_enabled():
        parts = [checkpoint(_strip, q, k, v, bias, strip, columns, scale, use_reentrant=False) for strip in strips]
    else:
        parts = [_strip(q, k, v, bias, strip, columns, scale) for strip in strips]
    return torch.cat(parts, 1)[:, :height]


def _strip(q, k, v, bias, rows: _Tiles, columns: _Tiles, scale) -> Tensor:
    """The queries of whole rows of blocks: (B, rows, W, heads, d)."""
    batch, height, width, heads = q.shape[:4]
    grid = len(rows.query), len(columns.query)
    side = rows.query.shape[1], columns.query.shape[1]

    def lookup(table: Tensor, index: Tensor) -> Tensor:  # rows of a table
        return table.index_select(0, index.flatten()).unflatten(0, index.shape)

    def blocks(x: Tensor, down: Tensor, across: Tensor) -> Tensor:  # -> (B, heads * blocks, positions, d)
        places = (down[:, None, :, None] * width + across[:, None]).flatten(2).flatten(0, 1)
        of_heads = torch.arange(heads, device=x.device)[:, None, None]
        of_images = torch.arange(batch, device=x.device)[:, None, None] * (height * width * heads)
        return lookup(x.flatten(0, 3), of_images + (places * heads + of_heads).flatten(0, 1))

    # Columns first, of the small table; what is then looked up are rows of keys.
    kinds = bias.shape[1]  # rows of the table
    across = bias.index_select(2, columns.bias.flatten()).unflatten(2, columns.bias.shape)
    table = across.movedim(1, 3).flatten(0, 3)  # (heads or 1, blocks across, queries, kinds) by keys
    first = torch.arange(len(bias) * grid[1] * side[1], device=q.device).view(len(bias), 1, grid[1], 1, side[1], 1)
    mask = lookup(table, first * kinds + rows.bias[:, None, :, None])  # (heads or 1, *grid, *queries, *keys)
    mask = mask.flatten(5, 6).flatten(3, 4)
    mask = mask.expand(heads, -1, -1, -1, -1).flatten(0, 2)[None]

    q = blocks(q, rows.query, columns.query)
    k, v = (blocks(x, rows.key, columns.key) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    out = out.unflatten(2, side).unflatten(1, (heads, *grid))
    return out.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)[:, :, :width]
