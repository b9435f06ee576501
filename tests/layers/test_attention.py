"""Attention in windows and along routes against a loop over queries."""

import pytest
import torch

from linescan.layers.attention import ShiftedWindowAttention, fit_window, sliding_attention, window_attention
from linescan.scans import routes


def qkv(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def attend(q, keys, values):
    """One query (heads, d) to keys and values (n, heads, d)."""
    weights = (torch.einsum("hd,nhd->hn", q, keys) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, values)


@pytest.mark.parametrize("grid", [(6, 9), (4, 7), (2, 2)])
def test_windows_tile_the_map(grid):
    q, k, v = qkv(2, *grid, 2, 4)
    got = window_attention(q, k, v, 3)
    for row in range(grid[0]):
        for column in range(grid[1]):
            window = slice(row // 3 * 3, row // 3 * 3 + 3), slice(column // 3 * 3, column // 3 * 3 + 3)
            for sample in range(2):
                keys, values = (x[sample][window].flatten(0, 1) for x in (k, v))
                assert torch.allclose(got[sample, row, column], attend(q[sample, row, column], keys, values))


@pytest.mark.parametrize("grid", [(6, 9), (3, 3), (7, 8), (4, 2)])
def test_shifted_windows_stay_on_their_side_of_the_seam(grid):
    """Against a loop: on the torus, but neighbours across the border of the map are not seen."""
    window, shift, (q, k, v) = 3, 1, qkv(1, *grid, 2, 4)
    bias = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = window_attention(q, k, v, window, shift, bias)[0]
    cells = [(y, x) for y in range(grid[0]) for x in range(grid[1])]

    def place(cell):
        """Of the shifted map: the window, the place in it, and the side of the seam."""
        at = [(side - shift) % size for side, size in zip(cell, grid)]
        return tuple(a // window for a in at), at[0] % window * window + at[1] % window, tuple(c < shift for c in cell)

    for cell in cells:
        mine, row, side = place(cell)
        near = [c for c in cells if place(c)[0] == mine and place(c)[2] == side]
        keys, values = (torch.stack([x[0][c] for c in near]) for x in (k, v))
        logits = torch.einsum("hd,nhd->hn", q[0][cell], keys) / 2 + bias[:, row, [place(c)[1] for c in near]]
        want = torch.einsum("hn,nhd->hd", logits.softmax(-1), values)
        assert torch.allclose(got[cell], want)


def test_relative_positions_index_the_bias():
    attention = ShiftedWindowAttention(4, 2, 3)
    bias = attention.bias()
    for query in range(9):
        for key in range(9):
            down, right = query // 3 - key // 3, query % 3 - key % 3
            assert torch.equal(bias[:, query, key], attention.bias_table[(down + 2) * 5 + right + 2])
    with pytest.raises(ValueError, match="4 is not a multiple of 3"):
        ShiftedWindowAttention(4, 3, 3)


@pytest.mark.parametrize("spec, per_sample", [("row, -col", False), ("hilbert", True), ("w2, -w2", False)])
def test_sliding_windows_follow_the_routes(spec, per_sample):
    route = routes.table(spec, (3, 5))
    if per_sample:
        route = torch.stack([route, route.flip(-1)])
    q, k, v = qkv(2, 1, 15, 2, 4)
    got = sliding_attention(q, k, v, 5, route=route)
    assert torch.allclose(sliding_attention(q, k, v, 5, route=route, merge="sum"), got.sum(1))
    for sample in range(2):
        for i, row in enumerate(route[sample] if per_sample else route):
            order = [token for token in row.tolist() if token >= 0]
            for step, token in enumerate(order):
                start = min(max(step - 2, 0), len(order) - 5)
                near = order[start : start + 5]
                want = attend(q[sample, 0, token], k[sample, 0, near], v[sample, 0, near])
                assert torch.allclose(got[sample, i, token], want)
    with pytest.raises(ValueError, match="a route of 14 steps cannot visit 15 tokens"):
        sliding_attention(q, k, v, 5, route=route[..., :14])


def test_windows_fit_their_axis():
    assert [fit_window(7, size) for size in (1, 2, 3, 6, 7, 8)] == [1, 1, 3, 5, 7, 7]
