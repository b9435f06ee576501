"""Routes through voxels: windows, and groups of equal length. Together they are the serialisation of LION.

    order = window_order(coords, (32, 13, 13), "xyz", shift=True)      # (N,): which voxel comes when
    table = group_table(order, counts, 4096)                           # (K, 4096): a route for each group

LION (Liu et al., arXiv 2407.18232) cuts each cloud's voxels, in this order, into groups of equal length, and mixes each
group by a recurrence. Here each group is a route over all voxels of the batch, (1, 1, N, C): with `merge="sum"` every
voxel gets the output of the group that it is in, and no feature has moved.
"""

from typing import Sequence

import torch
from torch import Tensor

from .orders import PADDING

__all__ = ["group_table", "window_order"]

_AXES = "zyx"


def window_order(coords: Tensor, window: Sequence[int], axes: str = "xyz", shift: bool = False) -> Tensor:
    """Voxels window after window, sample after sample: coords (N, 1 + n) -> (N,) int64.

    Args:
        coords: integers, sample and cell (b, z, y, x), or (b, y, x) in 2D; not negative. Equal rows keep their order.
        window: cells along each axis of a window, in the order of the coordinates (z, y, x).
        axes: in which order the axes count, slowest first, both from window to window and within one: "xyz" and "yxz"
            are LION's.
        shift: whether windows begin half a window earlier.

    Raises:
        ValueError: axes, window and coordinates do not belong together.
    """
    names = _AXES[-len(window) :]
    if coords.ndim != 2 or coords.is_floating_point() or sorted(axes) != sorted(names) or len(names) != len(window):
        raise ValueError(
            f"window_order: windows {tuple(window)} in the order {axes!r} over coordinates "
            f"{str(coords.dtype)[6:]} {tuple(coords.shape)}; as in (32, 13, 13), 'xyz' and integers (N, 4)"
        )
    if coords.shape[1] != 1 + len(window):
        raise ValueError(f"window_order: {len(window)} sides of a window for coordinates {tuple(coords.shape)}")
    if min(window) < 1:
        raise ValueError(f"window_order: a window has sides of at least 1, got {tuple(window)}")
    side = torch.tensor(window, device=coords.device)
    place = coords[:, 1:].long() + (side // 2 if shift else 0)
    across, within = place // side, place % side
    key, counts = coords[:, 0].long(), across.amax(0) + 1 if len(coords) else side
    for part, sizes in ((across, counts), (within, side)):
        for axis in map(names.index, axes):
            key = key * sizes[axis] + part[:, axis]
    return key.argsort(stable=True)


def group_table(order: Tensor, lengths: Sequence[int] | Tensor, size: int, fill: str = "repeat") -> Tensor:
    """Groups of `size` steps along an order, none over two samples: order (N,) -> int32 (K, size), a route a group.

    Args:
        order: tokens in the order of their visits, the samples one after the other.
        lengths: number of tokens of each sample; an empty one has no group.
        size: steps of a group.
        fill: what the last group of a sample does when tokens run out. "repeat" is LION's: it reads again, without
            writing, the tokens `size` steps back, or, where a sample has no full group, its tokens from the first on.
            "padding": -1.

    Raises:
        ValueError: the lengths do not sum to N, or a value is none of those above.
    """
    lengths = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if sum(lengths) != len(order) or size < 1 or fill not in ("repeat", "padding"):
        raise ValueError(
            f"group_table: {len(order)} tokens, lengths that sum to {sum(lengths)}, groups of {size}, fill {fill!r}"
        )
    pieces = []
    for tokens, count in zip(order.split(lengths), lengths):
        rest = -count % size
        if not rest:
            pieces.append(tokens)
        elif fill == "padding":
            pieces += [tokens, tokens.new_full((rest,), PADDING)]
        elif count > size:
            pieces += [tokens, -2 - tokens[count - size : count - size + rest]]
        elif count:
            step = torch.arange(rest, device=order.device) % count
            pieces += [tokens, -2 - tokens[step]]
    return torch.cat(pieces).reshape(-1, size).int() if pieces else order.new_zeros(0, size).int()
