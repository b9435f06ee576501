"""Voxels against dense grids: torch's own convolutions, loops over points, and files as spconv writes them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from linescan.layers.points import pack
from linescan.layers.sparse import (
    Sites,
    SparseConv,
    SparseTensor,
    SubmanifoldConv,
    from_spconv,
    scatter,
    sparse_conv,
    unique_cells,
    voxelize,
)


def some_sites(shape=(5, 6, 7), batch=2, count=60, seed=0):
    """Sites in any order."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(batch * int(np.prod(shape)), generator=generator)[:count]
    coords = torch.tensor(np.stack(np.unravel_index(cells.numpy(), (batch, *shape)), 1))
    return Sites(coords, shape, batch)


def tensor(sites, channels=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(channels)
    return SparseTensor(torch.randn(len(sites), channels, generator=generator, dtype=dtype), sites)


def dense_weight(conv):
    return conv.weight.movedim(-1, 1)


CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


# -- cells ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 4), st.integers(0, 2**31))
def test_unique_cells_sort_rows(count, columns, seed):
    cells = torch.randint(-3, 4, (count, columns), generator=torch.Generator().manual_seed(seed)).int()
    unique, index = unique_cells(cells)
    want, back = np.unique(cells.numpy(), axis=0, return_inverse=True)
    assert unique.dtype == torch.int32
    assert np.array_equal(unique, want) and np.array_equal(index, back.reshape(-1))


def test_unique_cells_need_a_number_for_each_cell():
    with pytest.raises(ValueError, match=r"span 2147483649 x 2147483649 x 3, more than 2\^63"):
        unique_cells(torch.tensor([[0, 0, 0], [2**31, 2**31, 2]]))
    with pytest.raises(ValueError, match=r"integers \(N, n\), got float32 \(2, 3\)"):
        unique_cells(torch.zeros(2, 3))


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_scatter_reduces_the_rows_that_belong_together(reduce):
    values = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    index = torch.randint(-1, 6, (30,), generator=torch.Generator().manual_seed(0))
    index[index == 2] = 3
    got = scatter(values, index, 7, reduce)
    for row in range(7):
        rows = values[index == row]
        want = {"sum": rows.sum, "mean": rows.mean, "max": rows.amax}[reduce](0) if len(rows) else torch.zeros(4)
        assert torch.allclose(got[row], want.double())
    assert torch.autograd.gradcheck(lambda v: scatter(v, index, 7, reduce), values)
    assert scatter(values[:0], index[:0], 3, reduce).tolist() == [[0] * 4] * 3
    with pytest.raises(ValueError, match="sum, mean, max, got 'min'"):
        scatter(values, index, 7, "min")


def test_rows_that_share_a_maximum_share_its_gradient():
    values = torch.tensor([[1.0], [1.0], [0.0]], requires_grad=True)
    scatter(values, torch.zeros(3, dtype=torch.int64), 1, "max").sum().backward()
    assert values.grad.tolist() == [[0.5], [0.5], [0.0]]


# -- points into cells ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=3), st.integers(2, 3), st.integers(0, 2**31))
def test_voxelize_is_a_loop_over_points(lengths, axes, seed):
    generator = torch.Generator().manual_seed(seed)
    points = 3 * torch.randn(len(lengths), max(lengths), axes + 1, generator=generator)
    if points.numel():
        points[0, 0, 0] = float("nan")
    low, high, cells = (-4.0, -2.0, 0.0)[:axes], (4.0, 2.0, 3.0)[:axes], (8, 5, 2)[:axes]
    sites, index = voxelize(points, low, high, cells, lengths)
    assert sites.shape == cells[::-1] and sites.batch_size == len(lengths)
    held = set()
    for b, length in enumerate(lengths):
        for i in range(points.shape[1]):
            place = [(points[b, i, a].item() - low[a]) / ((high[a] - low[a]) / cells[a]) for a in range(axes)]
            inside = i < length and all(0 <= p < n for p, n in zip(place, cells))
            if not inside:
                assert index[b, i] == -1
            else:
                cell = [b, *(int(p) for p in reversed(place))]
                assert sites.coords[index[b, i]].tolist() == cell
                held.add(tuple(cell))
    rows = [tuple(row) for row in sites.coords.tolist()]
    assert rows == sorted(held, key=lambda row: (row[0], *row[:0:-1]))
    packed, packed_index = voxelize(pack(points, lengths), low, high, cells, lengths)
    assert torch.equal(packed.coords, sites.coords) and torch.equal(packed_index, pack(index, lengths))


@pytest.mark.parametrize(
    "low, high, cells, words",
    [
        ((0, 0), (1, 1, 1), (2, 2, 2), "no grid has corners"),
        ((0, 0, 0), (1, 0, 1), (2, 2, 2), "no grid has corners"),
        ((0, 0, 0), (1, 1, 1), (2, 0, 2), "no grid has corners"),
        ((0,) * 4, (1,) * 4, (2,) * 4, "points of 3 columns in a 4-dimensional grid"),
    ],
)
def test_grids_that_are_none(low, high, cells, words):
    with pytest.raises(ValueError, match=words):
        voxelize(torch.zeros(1, 4, 3), low, high, cells)


# -- convolution ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel, dilation, shape",
    [
        (3, 1, (5, 6, 7)),
        (5, 1, (5, 6, 7)),
        (3, 2, (5, 6, 7)),
        ((1, 3, 3), 1, (5, 6, 7)),
        ((3, 1, 5), (1, 1, 2), (5, 6, 7)),
        (3, 1, (1, 20, 20)),
        (3, 1, (17, 9)),
        (5, 1, (90,)),
    ],
)
def test_submanifold_convolution_is_dense_convolution_at_the_sites(kernel, dilation, shape):
    torch.manual_seed(0)
    sites = some_sites(shape, count=50)
    axes = len(shape)
    conv = SubmanifoldConv(4, 6, kernel, dilation, bias=True, axes=axes).double()
    x = tensor(sites)
    got = conv(x)
    padding = [k // 2 * d for k, d in zip(conv.kernel, conv.dilation)]
    dense = CONV[axes](x.dense(), dense_weight(conv), conv.bias, padding=padding, dilation=conv.dilation)
    want = dense.movedim(1, -1).flatten(0, -2)[sites.flat]
    assert got.sites is sites
    assert torch.allclose(got.features, want)


@pytest.mark.parametrize("kernel", [2, 4, (2, 3, 4)])
def test_even_kernels_are_centred_at_half_their_side(kernel):
    sites = some_sites()
    conv = SubmanifoldConv(4, 6, kernel).double()
    x = tensor(sites)
    padding = [side for k in reversed(conv.kernel) for side in (k // 2, k - 1 - k // 2)]
    dense = F.conv3d(F.pad(x.dense(), padding), dense_weight(conv))
    assert torch.allclose(conv(x).features, dense.movedim(1, -1).flatten(0, -2)[sites.flat])


@pytest.mark.parametrize(
    "kernel, stride, padding, dilation, shape",
    [
        (3, 2, 1, 1, (5, 6, 7)),
        (3, 2, 0, 1, (5, 6, 7)),
        (3, 1, 1, 1, (5, 6, 7)),
        (2, 2, 0, 1, (6, 6, 6)),
        ((3, 1, 1), (2, 1, 1), 0, 1, (5, 6, 7)),
        (3, 1, 2, 2, (5, 6, 7)),
        (1, 2, 0, 1, (5, 6, 7)),
        (3, (1, 2), 1, 1, (11, 12)),
    ],
)
def test_strided_convolution_is_dense_convolution_where_it_reaches(kernel, stride, padding, dilation, shape):
    torch.manual_seed(0)
    axes = len(shape)
    x = tensor(some_sites(shape, count=9))
    conv = SparseConv(4, 6, kernel, stride, padding, dilation, bias=True, axes=axes).double()
    got = conv(x)
    options = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
    dense = CONV[axes](x.dense(), dense_weight(conv), conv.bias, **options)
    ones = x.replace(torch.ones(len(x.sites), 1).double()).dense()
    reached = CONV[axes](ones, torch.ones(1, 1, *conv.kernel).double(), **options)[:, 0] > 0
    assert tuple(dense.shape[2:]) == got.sites.shape
    assert torch.equal(got.sites.coords, reached.nonzero())  # ascending
    assert torch.allclose(got.features, dense.movedim(1, -1)[reached])
    assert torch.allclose(got.dense(), torch.where(reached[:, None], dense, 0))


@pytest.mark.parametrize("make", [lambda: SubmanifoldConv(3, 2, 3), lambda: SparseConv(3, 2, 3, 2, 1)])
def test_gradients_are_those_of_the_definition(make):
    x = tensor(some_sites(count=20), 3)
    conv = make().double()
    features, weight = x.features.requires_grad_(), conv.weight.detach().requires_grad_()

    def run(features, weight):
        if isinstance(conv, SubmanifoldConv):
            neighbours = x.sites.neighbours(conv.kernel, conv.dilation)
        else:
            _, neighbours = x.sites.strided(conv.kernel, conv.stride, conv.padding, conv.dilation)
        return sparse_conv(features, weight, neighbours)

    assert torch.autograd.gradcheck(run, (features, weight))
    assert torch.autograd.gradcheck(lambda f: run(f, weight.detach()), features)
    assert torch.autograd.gradcheck(lambda w: run(features.detach(), w), weight)
    assert torch.autograd.gradcheck(lambda f: x.replace(f).dense(), features)


def test_layers_over_the_same_sites_share_a_table():
    x = tensor(some_sites())
    same = x.sites.neighbours((3, 3, 3), (1, 1, 1))
    assert SubmanifoldConv(4, 4).double()(x).sites.neighbours((3, 3, 3), (1, 1, 1)) is same
    assert x.sites.neighbours((3, 3, 3), (2, 2, 2)) is not same
    down = SparseConv(4, 4, 3, 2, 1).double()
    assert down(x).sites is down(x).sites
    assert SparseConv(4, 4, 3, 2, 0).double()(x).sites is not down(x).sites


def test_a_batch_is_its_samples():
    """No site of one sample is a neighbour of another's, though it stands at the border of its grid."""
    sites = some_sites((4, 4, 4), batch=3, count=150)
    x, conv = tensor(sites), SubmanifoldConv(4, 4, 5).double()
    whole = conv(x).features
    for b in range(3):
        rows = sites.coords[:, 0] == b
        alone = Sites(sites.coords[rows] - torch.tensor([b, 0, 0, 0]), (4, 4, 4), 1)
        assert torch.allclose(conv(SparseTensor(x.features[rows], alone)).features, whole[rows])


def test_nothing_in_nothing_out():
    x = tensor(Sites(torch.zeros(0, 4, dtype=torch.int64), (4, 4, 4), 2))
    for conv in (SubmanifoldConv(4, 6), SubmanifoldConv(4, 6, 1), SparseConv(4, 6, 3, 2, 1, bias=True)):
        y = conv.double()(x)
        assert y.features.shape == (0, 6) and not y.dense().any()
    one = tensor(some_sites(count=1))
    assert SubmanifoldConv(4, 6).double()(one).features.shape == (1, 6)


def test_half_precision_and_autocast():
    x = tensor(some_sites(), dtype=torch.float32)
    conv = SubmanifoldConv(4, 6, bias=True)
    want = conv(x).features
    with torch.autocast("cpu", torch.bfloat16):
        got = conv(x).features
    assert got.dtype == torch.bfloat16 and torch.allclose(got.float(), want, atol=0.1)
    got.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32 and conv.weight.grad.isfinite().all()
    half = conv.bfloat16()(x.replace(x.features.bfloat16())).features
    assert torch.allclose(half.float(), want, atol=0.1)


def test_the_first_weights_are_those_of_a_dense_convolution():
    torch.manual_seed(0)
    ours, dense = SubmanifoldConv(16, 32, bias=True), nn.Conv3d(16, 32, 3)
    assert ours.weight.std().item() == pytest.approx(dense.weight.std().item(), rel=0.02)
    assert ours.bias.abs().max() <= dense.weight.abs().max() + 1e-3


@pytest.mark.parametrize(
    "coords, words",
    [
        ([[0, 0, 0, 0], [0, 0, 0, 4]], "1 of 2 sites lie outside of 2 grids of 4x4x4"),
        ([[2, 0, 0, 0], [0, -1, 0, 0]], "2 of 2 sites lie outside"),
        ([[0, 1, 2, 3], [1, 1, 2, 3], [0, 1, 2, 3]], "1 of 3 sites are repeated"),
    ],
)
def test_sites_that_cannot_be_are_noticed(coords, words):
    for conv in (SubmanifoldConv(4, 4), SparseConv(4, 4, 3, 2)):
        with pytest.raises(ValueError, match=words):
            conv.double()(tensor(Sites(torch.tensor(coords), (4, 4, 4), 2)))


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"sites of a 3-dimensional grid are integers \(N, 4\), got int64 \(2, 3\)"):
        Sites(torch.zeros(2, 3, dtype=torch.int64), (4, 4, 4), 2)
    with pytest.raises(ValueError, match="got float32"):
        Sites(torch.zeros(2, 4), (4, 4, 4), 2)
    with pytest.raises(ValueError, match="use SubmanifoldConv"):
        SparseConv(4, 4, 1)
    with pytest.raises(ValueError, match=r"a kernel of \(9, 9, 9\) does not fit a grid of \(5, 6, 7\)"):
        SparseConv(4, 4, 9).double()(tensor(some_sites()))


# -- spconv's files ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.shortcut = SubmanifoldConv(5, 7, 1, bias=True)
        self.convs = nn.ModuleList([SubmanifoldConv(5, 7, (1, 3, 3)), SparseConv(7, 5, 3, 2)])


def test_spconv_files_mean_what_spconv_computes():
    net = Net().double()
    file = {
        "net.shortcut.weight": torch.randn(7, 1, 1, 1, 5).double(),
        "net.shortcut.bias": torch.randn(7).double(),
        "net.convs.0.weight": torch.randn(7, 1, 3, 3, 5).double(),
        "net.convs.1.weight": torch.randn(3, 3, 3, 7, 5).double(),  # as spconv 1.x
        "other": torch.zeros(1),
    }
    state = from_spconv(file, net, "net.")
    assert state["other"] is file["other"] and file["net.shortcut.weight"].ndim == 5
    own = {key.removeprefix("net."): value for key, value in state.items() if key != "other"}
    net.load_state_dict(own)
    x = tensor(some_sites(), 5)
    want = x.features @ file["net.shortcut.weight"].view(5, 7) + file["net.shortcut.bias"]
    assert torch.allclose(net.shortcut(x).features, want)
    assert torch.equal(net.convs[0].weight, file["net.convs.0.weight"])
    y = net.convs[0](x)
    dense = F.conv3d(y.dense(), file["net.convs.1.weight"].permute(4, 3, 0, 1, 2), stride=2)
    got = net.convs[1](y)
    assert torch.allclose(got.features, dense.movedim(1, -1)[tuple(got.sites.coords.T)])
    again = from_spconv(net.state_dict(), net)
    assert all(torch.equal(again[key], value) for key, value in net.state_dict().items())


def test_square_shortcuts_are_read_transposed():
    conv = SubmanifoldConv(6, 6, 1, axes=2)
    weight = torch.randn(6, 1, 1, 6)
    assert torch.equal(from_spconv({"weight": weight}, conv)["weight"], weight[:, 0, 0].T)
