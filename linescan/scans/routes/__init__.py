"""Routes: the orders in which a recurrence visits the tokens of an image, a video or a cloud of points.

A route is a small immutable object that gives a table of token indices for any grid, and a short text, its *spec*:

    row  col  snake  diagonal  zigzag  spiral  hilbert  zorder      curves over (H, W), or over (T, H, W)
    shuffle  shuffle(7)                 one of all orders, drawn from a seed
    -R                                  R backwards
    T:R  rot90:R  rot180:R  rot270:R    R over the map transposed, turned counter-clockwise, or mirrored;
    flipud:R  fliplr:R  antiT:R         several are applied from left to right: rot90:T:hilbert
    w7  w4x2  window(7, inside=R, between=R)    window after window, padded at the bottom and the right
    spatial_first(R)  temporal_first(R)         videos: R in every frame in turn; all frames at every place of R
    twh  twh:R  twh(R)                  videos: axes in this order, slowest first; R over all of them; over the last two
    cls(R, at=middle, stored=head)      class tokens: each head, middle, half, tail or an index; several: head+tail

    table("row, -row, col, -col", (14, 14))     # (4, 196): the four routes of VMamba and of Mamba-ND
    table(["w2", "-w2"], (7, 7))                # LocalMamba, with 15 padding steps each
    table(parse("hilbert")[0].turn("T").reverse(), (14, 14))

Tables are int32 (K, S) as `linescan.scans.recurrence` reads them: entry [k, t] is the token that route k visits at
step t, -1 is a padding step. They are made once for a grid and device, and are constants under torch.compile and
torch.export.
"""

from .class_tokens import insert_tokens
from .orders import Route, RouteLike, as_grid
from .points import point_table
from .spec import parse, spatial_first, temporal_first, window
from .tables import cache_limit, inverse, inverse_table, pad_slots, redrawn, table
from .voxels import group_table, window_order

__all__ = [
    "Route",
    "RouteLike",
    "as_grid",
    "cache_limit",
    "group_table",
    "insert_tokens",
    "inverse",
    "inverse_table",
    "pad_slots",
    "parse",
    "point_table",
    "redrawn",
    "spatial_first",
    "table",
    "temporal_first",
    "window",
    "window_order",
]
