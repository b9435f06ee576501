"""Windows and groups of voxels: against loops, and read by recurrences in place of sorted copies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linescan.scans import backend, gla, selective_scan
from linescan.scans.routes import group_table, window_order


@st.composite
def voxels(draw):
    """Sites (N, 4) of several samples in any order, some of them empty; the number in each."""
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    cells = [torch.randperm(8 * 10 * 12, generator=generator)[:n] for n in lengths]
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    cells = torch.cat(cells)
    coords = torch.stack((sample, cells // 120, cells // 12 % 10, cells % 12), 1)
    return coords[torch.randperm(len(coords), generator=generator)], lengths


@settings(deadline=None, max_examples=60)
@given(voxels(), st.sampled_from(["xyz", "yxz", "zyx", "yzx"]), st.booleans(), st.integers(1, 5), st.integers(1, 12))
def test_window_order_is_a_sort_by_window_and_place(batch, axes, shift, side, height):
    coords, _ = batch
    window = dict(z=height, y=side, x=side + 1)

    def key(i):
        b, z, y, x = coords[i].tolist()
        place = {n: v + (window[n] // 2 if shift else 0) for n, v in dict(z=z, y=y, x=x).items()}
        return b, *(place[n] // window[n] for n in axes), *(place[n] % window[n] for n in axes)

    order = window_order(coords, (height, side, side + 1), axes, shift)
    assert order.tolist() == sorted(range(len(coords)), key=key)


def test_window_order_in_two_dimensions():
    coords = torch.tensor([[0, y, x] for y in range(4) for x in range(4)])
    assert window_order(coords, (2, 2), "yx").tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert window_order(coords, (4, 4), "xy").tolist() == torch.arange(16).reshape(4, 4).T.flatten().tolist()


@settings(deadline=None, max_examples=60)
@given(voxels(), st.integers(1, 50), st.sampled_from(["repeat", "padding"]))
def test_groups_are_pieces_of_the_order(batch, size, fill):
    coords, lengths = batch
    order = window_order(coords, (4, 4, 4))
    rows, first = [], 0
    for count in lengths:
        padded = -(-count // size) * size
        mine = order[first : first + count].tolist()
        for step in range(padded):
            if step < count:
                rows.append(mine[step])
            elif fill == "padding":
                rows.append(-1)
            else:
                rows.append(-2 - mine[step - size if padded > size else (step - count) % count])
        first += count
    table = group_table(order, torch.tensor(lengths), size, fill)
    assert table.dtype == torch.int32 and table.shape[1] == size
    assert table.flatten().tolist() == rows


@pytest.mark.parametrize("fill", ["repeat", "padding"])
@pytest.mark.parametrize("form", ["", "chunked", "reference"])
def test_recurrences_read_groups_without_moving_a_feature(form, fill):
    """One route a group, merged: the same as sorted copies, cut into sequences, and put back; gradients too."""
    generator = torch.Generator().manual_seed(0)
    coords = torch.stack([torch.arange(90) // 50, *torch.randint(0, 12, (3, 90), generator=generator)], 1)
    table = group_table(window_order(coords, (4, 4, 4), "yxz", shift=True), [50, 40], 16, fill)
    assert len(table) == 4 + 3
    read = torch.where(table < -1, -2 - table, table).long()
    written = (table >= 0).flatten()

    def by_copies(run, *tokens):
        """Groups as samples of a batch."""
        sorted_ = [
            x[0, 0][read.clamp_min(0)].masked_fill((read < 0)[(...,) + (None,) * (x.ndim - 3)], 0) for x in tokens
        ]
        y = run(*(x[:, None] for x in sorted_))[:, 0].flatten(0, 1)
        return torch.zeros(90, *y.shape[1:], dtype=y.dtype).index_copy(0, read.flatten()[written], y[written])[None]

    def normal(*shape):
        return torch.randn(1, 1, 90, *shape, generator=generator, dtype=torch.float64).requires_grad_()

    A = -torch.rand(1, 8, 4, generator=generator, dtype=torch.float64)
    scan = normal(8), normal(8), normal(4), normal(4)
    heads = normal(2, 4), normal(2, 4), normal(2, 6), normal(2, 4)

    def selective(u, delta, B, C, **route):
        return selective_scan(
            u, delta, A.expand(len(table) if route else 1, -1, -1), B, C, delta_softplus=True, **route
        )

    def gated(q, k, v, g, **route):
        return gla(q, k, v, -g.square(), **route)

    for run, tokens in ((selective, scan), (gated, heads)):
        if form:
            with backend(form):
                in_place = run(*tokens, route=table, merge="sum")
        else:
            in_place = run(*(x.float() for x in tokens), route=table, merge="sum").double()
        copies = by_copies(run, *tokens)
        assert torch.allclose(in_place, copies, atol=1e-5 if form == "" else 1e-10)
        weight = torch.randn(copies.shape, generator=generator, dtype=torch.float64)
        with backend(form or "chunked"):
            mine = torch.autograd.grad((run(*tokens, route=table, merge="sum") * weight).sum(), tokens)
        theirs = torch.autograd.grad((copies * weight).sum(), tokens)
        assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(mine, theirs))


@pytest.mark.parametrize("form", ["chunked", "reference"])
def test_samples_of_a_batch_may_share_a_table_or_have_their_own(form):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 1, 20, 2, 4, generator=generator, dtype=torch.float64).unbind()
    g = -torch.rand(2, 1, 20, 2, 4, generator=generator, dtype=torch.float64)
    tables = torch.stack([group_table(torch.randperm(20, generator=generator), [20], 8) for _ in range(2)])
    for table in (tables[0], tables):
        with backend(form):
            both = gla(q, k, v, g, route=table, merge="sum")
            for b in range(2):
                own = table if table.ndim == 2 else table[b]
                alone = gla(*(x[b : b + 1] for x in (q, k, v, g)), route=own, merge="sum")
                assert torch.allclose(both[b], alone[0])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda c: window_order(c, (4, 4, 4), "xyy"), "in the order 'xyy'"),
        (lambda c: window_order(c, (4, 4), "xy"), "2 sides of a window for coordinates"),
        (lambda c: window_order(c, (4, 0, 4)), r"sides of at least 1, got \(4, 0, 4\)"),
        (lambda c: window_order(c.float(), (4, 4, 4)), r"float32 \(5, 4\)"),
        (lambda c: group_table(c[:, 0], [2, 2], 4), "5 tokens, lengths that sum to 4"),
        (lambda c: group_table(c[:, 0], [5], 0), "groups of 0"),
        (lambda c: group_table(c[:, 0], [5], 2, "copies"), "fill 'copies'"),
    ],
)
def test_what_does_not_fit_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(5, 4, dtype=torch.int64))
