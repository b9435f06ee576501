"""Operators on clouds against their definitions in numpy: both forms of a batch; missing, broken, repeated points."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from linescan.layers import points as module
from linescan.layers.points import (
    PointPatchEmbed,
    ball_query,
    chamfer,
    farthest_points,
    gather,
    interpolate,
    knn,
    pack,
    pad,
    patches,
)
from linescan.scans.kernels import cpu

needs_kernel = pytest.mark.skipif(cpu.missing() is not None, reason=f"CPU kernels {cpu.missing()}")


@st.composite
def clouds(draw, most=40):
    """Padded clouds (B, N, 3) on a coarse grid, so that many points coincide and many distances are equal; lengths."""
    lengths = draw(st.lists(st.integers(0, most), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    step = draw(st.sampled_from([0.0, 0.25, 1.0]))
    points = torch.randn(len(lengths), max(lengths) + draw(st.integers(0, 2)), 3, generator=generator)
    points = (points / step).round() * step if step else points
    if points.shape[1] and draw(st.booleans()):
        points[draw(st.integers(0, len(lengths) - 1)), draw(st.integers(0, points.shape[1] - 1))] = float("nan")
    return points, lengths


def squares(points, queries):
    """(M, N) squared distances as they are defined, infinite for what is no point."""
    total = 0
    for axis in range(points.shape[-1]):
        total = total + (queries[:, None, axis] - points[None, :, axis]) ** 2
    return np.where(np.isfinite(points).all(-1), total, np.inf)


def both_forms(function, rows, lengths):
    """function(padded, lengths), after making sure that packed clouds give the same."""
    lengths = list(lengths)
    padded = function(rows, lengths)
    packed = function(pack(rows, lengths), torch.tensor(lengths))
    first = torch.tensor([0, *lengths]).cumsum(0)[:-1].reshape(-1, *[1] * (padded.ndim - 1))
    as_packed = torch.where(padded < 0, padded, padded + first)
    assert torch.equal(packed, as_packed if packed.ndim == padded.ndim else pack(as_packed, lengths))
    return padded


# -- the two forms of a batch -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(clouds())
def test_pack_undoes_pad(batch):
    rows, lengths = batch
    packed = pack(rows, lengths)
    padded = pad(packed, lengths)
    assert padded.shape == (len(lengths), max(lengths), 3)
    for cloud, rows_of_it, length in zip(padded, rows, lengths):
        assert torch.equal(cloud[:length].nan_to_num(), rows_of_it[:length].nan_to_num())
        assert not cloud[length:].any()
    assert torch.equal(pack(padded, lengths).nan_to_num(), packed.nan_to_num())


def test_pad_of_clouds_of_one_size_copies_nothing():
    rows = torch.randn(6, 3)
    assert pad(rows, [2, 2, 2]).data_ptr() == rows.data_ptr()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: pad(torch.zeros(5, 3), [2, 2]), "5 packed rows cannot be clouds of 2, 2, which sum to 4"),
        (lambda: farthest_points(torch.zeros(2, 5, 3), 2, [5, 6]), "padded to 5 rows cannot have the lengths 5, 6"),
        (lambda: farthest_points(torch.zeros(2, 5, 3), 2, [5]), "2 clouds padded to 5 rows cannot have the lengths 5"),
        (lambda: farthest_points(torch.zeros(2, 5, 3), 2, [5, -1]), "not negative, got 5, -1"),
        (lambda: farthest_points(torch.zeros(5), 2), r"\(B, N, D\), or \(N, D\) with lengths; got float32 \(5,\)"),
        (lambda: farthest_points(torch.zeros(5, 3, dtype=torch.int32), 2), "got int32"),
        (lambda: farthest_points(torch.zeros(5, 3), 2, rule="random"), "plain or pointnet2, got 'random'"),
        (lambda: farthest_points(torch.zeros(5, 3), -1), "cannot choose -1 points"),
        (lambda: knn(torch.zeros(1, 5, 3), torch.zeros(1, 5, 3), 0), "k is at least 1, got 0"),
        (
            lambda: knn(torch.zeros(1, 5, 3), torch.zeros(2, 5, 3), 1),
            "1 clouds with 3 coordinates cannot be asked by 2",
        ),
        (lambda: knn(torch.zeros(1, 5, 3), torch.zeros(1, 5, 2), 1), "cannot be asked by 1 with 2"),
        (lambda: ball_query(torch.zeros(1, 5, 3), torch.zeros(1, 5, 3), 1.0, 0), "k is at least 1, got 0"),
        (lambda: chamfer(torch.zeros(1, 5, 3), torch.zeros(1, 5, 3), norm="l3"), "l1 or l2, got 'l3'"),
        (lambda: patches(torch.zeros(1, 5, 3), 2, 8), "a cloud has 5 points, fewer than a group of 8"),
        (lambda: patches(torch.zeros(2, 9, 3), 2, 8, [9, 7]), "a cloud has 7 points, fewer than a group of 8"),
        (
            lambda: interpolate(torch.zeros(1, 4, 2), torch.zeros(1, 5, 3), torch.zeros(1, 5, 3)),
            r"features \(1, 4, 2\) are not those of points \(1, 5, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# -- farthest point sampling ------------------------------------------------------------------------------------------


def farthest_by_definition(points, count, rule):
    """One cloud, in numpy; the ties of pointnet2 by its threads as they are."""
    points = points[:0] if not len(points) else points
    alive = np.isfinite(points).all(-1)
    if not alive.any():
        return [-1] * count
    start = int(alive.argmax())
    limit = np.inf
    order = np.arange(len(points))
    if rule == "pointnet2":
        limit = 1e10
        alive &= (points**2).sum(-1, dtype=points.dtype).astype(float) > 1e-3
        threads = 1
        while threads * 2 <= min(512, len(points)):
            threads *= 2
        bits = threads.bit_length() - 1
        order = np.array(
            sorted(order, key=lambda i: (int(f"{i % threads:0{bits}b}"[::-1] if bits else "0", 2), i // threads))
        )
    far = np.where(alive, limit, -1.0)
    chosen = [start]
    while len(chosen) < count:
        far = np.minimum(far, squares(points, points[chosen[-1:]])[0])
        far[~alive] = -1
        best = order[np.argmax(far[order])]
        chosen.append(int(best) if alive.any() else start)
    return chosen[:count]


@pytest.mark.parametrize("rule", ["plain", "pointnet2"])
@settings(max_examples=60, deadline=None)
@given(batch=clouds(), count=st.integers(0, 50))
def test_farthest_points_is_its_definition(rule, batch, count):
    points, lengths = batch
    chosen = both_forms(lambda x, n: farthest_points(x, count, n, rule), points, lengths)
    assert chosen.dtype == torch.int64
    for cloud, length, rows in zip(points.numpy(), lengths, chosen.tolist()):
        assert rows == farthest_by_definition(cloud[:length], count, rule)


@pytest.mark.parametrize("count", [511, 512, 1100])
def test_pointnet2_has_at_most_512_threads(count):
    points = torch.randn(1, count, 3, generator=torch.Generator().manual_seed(count)).round() + 5
    rows = farthest_points(points, 150, rule="pointnet2").tolist()[0]
    assert rows == farthest_by_definition(points[0].numpy(), 150, "pointnet2")


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["plain", "pointnet2"])
def test_the_kernel_gives_what_the_loop_gives(monkeypatch, dtype, rule):
    """Large enough for many boxes: scattered, on a grid, in a plane, far from the origin, many times the same."""
    generator = torch.Generator().manual_seed(3)
    scattered = torch.randn(2, 3000, 3, generator=generator, dtype=dtype)
    flat = scattered * torch.tensor([1.0, 1.0, 0.0])
    shapes = [
        scattered,
        (scattered * 4).round() / 4,
        flat,
        scattered + 1e4,
        scattered * 1e6,
        scattered[:, :1].repeat(1, 500, 1),
    ]
    for points in shapes:
        lengths = [points.shape[1], points.shape[1] // 3]
        fast = farthest_points(points, 300, lengths, rule)
        with monkeypatch.context() as patch:
            patch.setattr(module.cpu, "missing", lambda: "turned off")
            assert torch.equal(fast, farthest_points(points, 300, lengths, rule))


def test_pointnet2_never_chooses_near_the_origin_but_starts_there():
    points = torch.cat((torch.full((1, 1, 3), 0.01), torch.randn(1, 60, 3) + 2, torch.full((1, 1, 3), 0.018)), 1)
    assert farthest_points(points, 62, rule="pointnet2").tolist()[0].count(61) == 0
    assert farthest_points(points, 62, rule="plain").unique().numel() == 62
    assert farthest_points(points * 1e-3, 4, rule="pointnet2").tolist() == [[0, 0, 0, 0]]
    border = torch.tensor([[5.0, 5, 5], [0.02, 0.0244949, 0]])  # float32's 0.001 is above the double 1e-3
    assert farthest_points(border, 2, rule="pointnet2").tolist() == [[0, 1]]


def test_pointnet2_knows_no_distance_above_a_hundred_thousand():
    points = torch.tensor([[0.0, 0, 0], [3e5, 0, 0], [-2e5, 0, 0], [1, 1, 1]])
    assert farthest_points(points, 2).tolist() == [[0, 1]]
    assert farthest_points(points, 2, rule="pointnet2").tolist() == [[0, 2]]


def test_float64_points_are_told_apart_by_more_digits():
    """Nearly the same place: in float32 rows 1 and 3 tie, and the lower one wins."""
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0.5, 0, 0], [1 + 1e-12, 0, 0]], dtype=torch.float64)
    assert farthest_points(points, 2).tolist() == [[0, 3]]
    assert farthest_points(points.float(), 2).tolist() == [[0, 1]]
    assert farthest_points(points, 2, rule="pointnet2").tolist() == [[0, 1]]


# -- neighbours -------------------------------------------------------------------------------------------------------


def check_neighbours(points, queries, k, lengths, query_lengths):
    distance, index = knn(points, queries, k, lengths, query_lengths)
    for cloud, asked, length, count, d, i in zip(points, queries, lengths, query_lengths, distance, index):
        square = squares(cloud[:length].numpy(), asked[:count].numpy())
        order = np.argsort(square, axis=1, kind="stable")[:, :k]
        nearest = np.take_along_axis(square, order, 1)
        want, far = np.full((count, k), -1), np.full((count, k), np.inf)
        there = np.isfinite(nearest) & np.isfinite(asked[:count].numpy()).all(-1)[:, None]
        want[:, : order.shape[1]] = np.where(there, order, -1)
        far[:, : order.shape[1]] = np.where(there, np.sqrt(nearest), np.inf)
        assert np.array_equal(i[:count].numpy(), want)
        assert np.allclose(d[:count].numpy(), far, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(clouds(), clouds(), st.integers(1, 12))
def test_knn_is_its_definition(batch, asked, k):
    (points, lengths), (queries, query_lengths) = batch, asked
    size = min(len(lengths), len(query_lengths))
    points, lengths, queries, query_lengths = points[:size], lengths[:size], queries[:size], query_lengths[:size]
    check_neighbours(points, queries, k, lengths, query_lengths)
    distance, index = knn(points, queries, k, lengths, query_lengths)
    packed = knn(pack(points, lengths), pack(queries, query_lengths), k, lengths, query_lengths)
    assert torch.equal(packed[0], pack(distance, query_lengths))
    first = torch.tensor([0, *lengths]).cumsum(0)[:-1, None, None]
    assert torch.equal(packed[1], pack(torch.where(index < 0, index, index + first), query_lengths))


@settings(max_examples=30, deadline=None)
@given(clouds(most=60), st.integers(1, 12))
def test_the_tree_gives_what_all_distances_give(batch, k):
    points, lengths = batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TREE", 0)
        check_neighbours(points, points, k, lengths, lengths)
        patch.setattr(module, "_tree", lambda: None)
        check_neighbours(points, points, k, lengths, lengths)


def test_large_clouds_are_searched_by_the_tree(monkeypatch):
    pytest.importorskip("scipy")
    points = torch.randn(6000, 3, generator=torch.Generator().manual_seed(0))
    near = (points * 20).round() / 20  # thousands of equal distances
    for cloud in (points, near, points.double() + 1e5):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_ask_all", None)  # nothing may be left to it, but for ties
            if cloud is not near:
                by_tree = knn(cloud, cloud, 4)[1]
        by_tree = knn(cloud, cloud, 4)[1]
        with monkeypatch.context() as patch:
            patch.setattr(module, "_tree", lambda: None)
            assert torch.equal(by_tree, knn(cloud, cloud, 4)[1])


def test_pieces_of_the_work_make_the_same_whole(monkeypatch):
    points, queries = torch.randn(3, 50, 3), torch.randn(3, 41, 3)
    whole = [*knn(points, queries, 5), ball_query(points, queries, 0.7, 6), *knn(points, queries, 1)]
    for budget in (1, 60, 50 * 41, 2 * 50 * 41):
        monkeypatch.setattr(module, "_BUDGET", budget)
        pieces = [*knn(points, queries, 5), ball_query(points, queries, 0.7, 6), *knn(points, queries, 1)]
        assert all(map(torch.equal, whole, pieces))


def test_half_precision_and_mixed_dtypes():
    points = torch.randn(1, 30, 3).half()
    distance, index = knn(points, points.double(), 3)
    assert distance.dtype == torch.float64
    assert torch.equal(index, knn(points.double(), points.double(), 3)[1])


@settings(max_examples=60, deadline=None)
@given(clouds(), st.integers(1, 9), st.sampled_from([0.25, 0.6, 1.0]))
def test_ball_query_is_its_definition(batch, k, radius):
    points, lengths = batch
    found = both_forms(lambda x, n: ball_query(x, x, radius, k, n, n), points, lengths)
    for cloud, length, rows in zip(points.numpy(), lengths, found.tolist()):
        for q in range(length):
            near = np.flatnonzero(squares(cloud[:length], cloud[q : q + 1])[0] < np.float32(radius) ** 2).tolist()[:k]
            near = near if np.isfinite(cloud[q]).all() else []
            assert rows[q] == (near + [near[0]] * (k - len(near)) if near else [-1] * k)


# -- features and distances -------------------------------------------------------------------------------------------


def test_gather_reads_rows_and_gives_zero_where_there_are_none():
    features = torch.randn(2, 4, 5)
    index = torch.tensor([[[0, 3], [-1, 1]], [[2, 2], [0, -1]]])
    got = gather(features, index)
    assert torch.equal(got[0, 0, 1], features[0, 3]) and torch.equal(got[1, 0, 0], features[1, 2])
    assert not got[0, 1, 0].any() and not got[1, 1, 1].any()
    assert torch.equal(gather(features[1], index[1]), got[1])
    assert gather(torch.zeros(2, 0, 5), torch.full((2, 3), -1)).shape == (2, 3, 5)


def test_interpolation_is_the_weighted_mean_of_three():
    points, queries = torch.randn(2, 20, 3).double(), torch.randn(2, 11, 3).double()
    features = torch.randn(2, 20, 4).double()
    got = interpolate(features, points, queries)
    for b in range(2):
        square = squares(points[b].numpy(), queries[b].numpy())
        three = np.argsort(square, 1)[:, :3]
        weight = 1 / (np.take_along_axis(square, three, 1) + 1e-8)
        want = (features[b].numpy()[three] * (weight / weight.sum(1, keepdims=True))[..., None]).sum(1)
        assert np.allclose(got[b], want)
    at_points = interpolate(features, points, points)
    assert torch.allclose(at_points, features, atol=1e-5)


@settings(deadline=None)
@given(clouds(), st.integers(1, 4))
def test_interpolation_packed_and_padded(batch, k):
    points, lengths = batch
    features = torch.randn(*points.shape[:2], 2)
    padded = interpolate(features, points, points.flip(0), lengths, lengths[::-1], k)
    packed = interpolate(
        pack(features, lengths), pack(points, lengths), pack(points.flip(0), lengths[::-1]), lengths, lengths[::-1], k
    )
    assert torch.equal(packed, pack(padded, lengths[::-1]))
    assert padded.isfinite().all()


def test_a_cloud_of_two_points_is_interpolated_from_two():
    points, features = torch.tensor([[0.0, 0, 0], [3, 0, 0]]), torch.tensor([[0.0], [1.0]])
    got = interpolate(features, points, torch.tensor([[1.0, 0, 0]]))
    assert got.item() == pytest.approx(0.2)
    assert interpolate(features[:0], points[:0], points, [0], [2]).tolist() == [[0.0], [0.0]]
    assert interpolate(features.bfloat16(), points, points).dtype == torch.bfloat16


def test_chamfer_is_its_definition():
    a, b = torch.randn(3, 20, 3).double(), torch.randn(3, 15, 3).double()
    for norm in ("l1", "l2"):
        got = chamfer(a, b, [20, 7, 1], [15, 15, 3], norm)
        for i, (n, m) in enumerate([(20, 15), (7, 15), (1, 3)]):
            square = torch.cdist(a[i, :n], b[i, :m]) ** (2 if norm == "l2" else 1)
            want = square.amin(1).mean() + square.amin(0).mean()
            assert got[i].item() == pytest.approx(want.item() * (1 if norm == "l2" else 0.5))
        packed = chamfer(pack(a, [20, 7, 1]), pack(b, [15, 15, 3]), [20, 7, 1], [15, 15, 3], norm)
        assert torch.equal(packed, got)


def test_chamfer_of_nothing_is_infinite_and_of_nan_is_nan():
    a = torch.randn(3, 5, 3)
    far = chamfer(a, a, [5, 0, 5], [5, 5, 0])
    assert far.tolist() == [0, float("inf"), float("inf")]
    b = a.clone()
    b[1, 2, 0] = float("nan")
    for nan in (chamfer(a, b), chamfer(b, a)):
        assert nan.isnan().tolist() == [False, True, False]
    assert not chamfer(a, b, None, [5, 2, 5]).isnan().any()  # a row that does not count


def test_gradients():
    a = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)
    lengths = dict(lengths=[6, 2], query_lengths=[5, 4])

    def distances(a, b):
        return knn(a, b, 3, **lengths)[0].nan_to_num(posinf=0)

    assert torch.autograd.gradcheck(distances, (a, b))
    assert torch.autograd.gradcheck(partial(interpolate, **lengths), (features, a, b))
    for norm in ("l1", "l2"):
        assert torch.autograd.gradcheck(partial(chamfer, a_lengths=[6, 2], b_lengths=[5, 4], norm=norm), (a, b))


def test_the_gradient_of_a_zero_distance_is_zero():
    points = torch.randn(1, 9, 3, requires_grad=True)
    knn(points, points, 1)[0].sum().backward()
    assert torch.equal(points.grad, torch.zeros_like(points))
    chamfer(points, points.detach().clone(), norm="l1").sum().backward()
    assert torch.equal(points.grad, torch.zeros_like(points))


# -- patches ----------------------------------------------------------------------------------------------------------


def test_patches_are_neighbours_around_centres():
    points = torch.randn(2, 80, 3)
    centres, relative, index = patches(points, 10, 8, [80, 50])
    packed = patches(pack(points, [80, 50]), 10, 8, [80, 50])
    assert torch.equal(packed.centres, centres) and torch.equal(packed.points, relative)
    assert torch.equal(packed.index, index + torch.tensor([0, 80])[:, None, None])
    assert torch.equal(centres, gather(points, farthest_points(points, 10, [80, 50], "pointnet2")))
    assert torch.allclose(relative + centres[:, :, None], gather(points, index), atol=1e-6)
    assert not relative[:, :, 0].any()  # a centre is its own nearest neighbour
    assert index[1].max() < 50


def test_patch_embedding_is_a_pointnet():
    """Against the layers as the papers draw them, in training mode, with gradients."""
    torch.manual_seed(0)
    embed = PointPatchEmbed(24).double()
    points = torch.randn(2, 5, 8, 3).double()

    def plain(x):
        x = embed.first_conv(x.flatten(0, 2)).reshape(10, 8, 256)
        x = torch.cat((x.amax(1, keepdim=True).expand(-1, 8, -1), x), -1)
        return embed.second_conv(x.flatten(0, 1)).reshape(2, 5, 8, 24).amax(2)

    got, want = embed(points), plain(points)
    assert got.shape == (2, 5, 24)
    assert torch.allclose(got, want)
    weight = torch.randn_like(got)
    mine, theirs = ([*torch.autograd.grad((y * weight).sum(), [*embed.parameters()])] for y in (got, want))
    assert all(torch.allclose(a, b) for a, b in zip(mine, theirs))
    assert isinstance(embed.second_conv[-1], nn.Linear)
