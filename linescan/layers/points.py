"""Operators on clouds of points: sampling, neighbours, patches, interpolation, distances between clouds.

A batch of clouds comes in one of two forms, and every operator takes both and gives the same answer for both:

    padded    (B, N, D) with `lengths`, the number of leading rows of each cloud that count (None: all N)
    packed    (N, D) with `lengths`, the sizes of the clouds that stand one after the other (None: a single cloud)

`pad` and `pack` go from one to the other. Row numbers in results count as the input does: within the cloud where it is
padded, within all rows where it is packed. -1 stands where there is no row to name. A row with a NaN or infinite
coordinate is no point: it is never sampled, is no neighbour of any, and has no neighbours.

Distances are sums of squared differences, computed in float64 for float64 points and in float32 otherwise: the expanded
form |a|^2 - 2ab + |b|^2 loses so many digits in float32 that neighbours change. Every operator is plain torch and runs
on any device; on "meta" only shapes count. Farthest point sampling has a C++ kernel on a CPU and a Triton kernel on a
GPU, and on a CPU neighbours in large clouds are found by SciPy's k-d tree where SciPy is installed. The answers are the
same.
"""

from functools import cached_property, lru_cache
from importlib import import_module
from itertools import accumulate
from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scans.kernels import cpu, triton

__all__ = [
    "CentreMLP",
    "Patches",
    "PointPatchEmbed",
    "ball_query",
    "chamfer",
    "farthest_points",
    "gather",
    "interpolate",
    "knn",
    "pack",
    "pad",
    "patches",
]

Lengths = Sequence[int] | Tensor | None

_BUDGET = 2**22  # distances held at a time
_TREE = 2**18  # distances in a cloud from which on a k-d tree is faster


# -- batches of clouds ------------------------------------------------------------------------------------------------


def pad(rows: Tensor, lengths: Lengths) -> Tensor:
    """From packed to padded: rows (N, ...) and lengths (B) -> (B, longest, ...), zero where a cloud has ended."""
    lengths = _lengths(lengths)
    if sum(lengths) != len(rows):
        raise ValueError(f"{len(rows)} packed rows cannot be clouds of {_few(lengths)}, which sum to {sum(lengths)}")
    longest = max(lengths, default=0)
    if all(length == longest for length in lengths):
        return rows.reshape(len(lengths), longest, *rows.shape[1:])
    step = torch.arange(longest, device=rows.device)
    first = torch.tensor(_firsts(lengths), device=rows.device)[:, None]
    counted = step < torch.tensor(lengths, device=rows.device)[:, None]
    padded = rows[torch.where(counted, first + step, 0)]
    return padded.masked_fill(~counted.reshape(*counted.shape, *[1] * (rows.ndim - 1)), 0)


def pack(padded: Tensor, lengths: Lengths) -> Tensor:
    """From padded to packed: padded (B, N, ...) and lengths (B) -> (sum of lengths, ...)."""
    lengths = _lengths(lengths)
    return torch.cat([cloud[:length] for cloud, length in zip(padded, lengths, strict=True)])


def _lengths(lengths: Sequence[int] | Tensor) -> list[int]:
    lengths = lengths.tolist() if isinstance(lengths, Tensor) else list(map(int, lengths))
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths of clouds are not negative, got {_few(lengths)}")
    return lengths


def _firsts(lengths: list[int]) -> list[int]:
    """The first row of each of the packed clouds."""
    return [0, *accumulate(lengths)][:-1]


def _few(values: Sequence) -> str:
    return ", ".join(map(str, values[:4])) + (", ..." if len(values) > 4 else "")


class Clouds:
    """A batch of clouds in padded form, whatever form it came in.

    Attributes:
        points: (B, N, D), float32 or float64; zeros where there is no point.
        present: (B, N) bool: which rows are points.
        lengths: of the clouds.
    """

    def __init__(self, what: str, points: Tensor, lengths: Lengths):
        if points.ndim not in (2, 3) or not points.is_floating_point():
            raise ValueError(
                f"{what}: a batch of clouds is a floating tensor (B, N, D), or (N, D) with lengths; "
                f"got {str(points.dtype)[6:]} {tuple(points.shape)}"
            )
        self.packed = points.ndim == 2
        points = points if points.dtype == torch.float64 else points.float()
        if self.packed:
            self.lengths = [len(points)] if lengths is None else _lengths(lengths)
            points = pad(points, self.lengths)
        elif lengths is not None:
            self.lengths = _lengths(lengths)
            if len(self.lengths) != len(points) or max(self.lengths, default=0) > points.shape[1]:
                raise ValueError(
                    f"{what}: {len(points)} clouds padded to {points.shape[1]} rows cannot have the lengths "
                    + _few(self.lengths)
                )
        self.counted = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
        if self.packed or lengths is not None:
            ends = torch.tensor(self.lengths, device=points.device)[:, None]
            self.counted = torch.arange(points.shape[1], device=points.device) < ends
        self.present = self.counted & points.isfinite().all(-1)
        self.points = points.masked_fill(~self.present[..., None], 0)

    @cached_property
    def lengths(self) -> list[int]:
        return [self.points.shape[1]] * len(self.points)

    @property
    def first(self) -> Tensor:
        """(B,) what to add to a row's number within its cloud: nothing unless the clouds came packed."""
        if not self.packed:
            return self.points.new_zeros(self.points.shape[0], dtype=torch.int64)
        return torch.tensor(_firsts(self.lengths), device=self.points.device)

    def number(self, row: Tensor) -> Tensor:
        """Row numbers (B, ...) as those of the input; -1 stays."""
        first = self.first.reshape(-1, *[1] * (row.ndim - 1))
        return torch.where(row < 0, row, row + first) if self.packed else row

    def answer(self, per_row: Tensor) -> Tensor:
        """A result (B, N, ...) in the form that the clouds came in."""
        return pack(per_row, self.lengths) if self.packed else per_row


# -- farthest point sampling ------------------------------------------------------------------------------------------


def farthest_points(points: Tensor, count: int, lengths: Lengths = None, rule: str = "plain") -> Tensor:
    """Farthest point sampling: rows of `count` points, each as far as can be from those before it -> (B, count) int64.

    The first is the cloud's first point. Each further one has the largest distance to the nearest of those chosen. When
    a cloud has fewer distinct points than `count`, all distances are 0 in the end, and one point is repeated; an empty
    cloud gives -1.

    Args:
        points: (B, N, 3) or packed (N, 3), with `lengths`.
        count: number of points to choose in each cloud.
        rule: "plain": among points at the same distance, the lowest row. "pointnet2": as the CUDA kernel
            `furthest_point_sample` of pointnet2_ops (Qi et al., arXiv 1706.02413), which most published weights were
            trained with: float32; a point with x^2 + y^2 + z^2 <= 1e-3 is never chosen except as the first; no distance
            counts for more than 1e5; among equal distances, the kernel's own order of its threads.

    Raises:
        ValueError: a shape is wrong, or there is no such rule.
    """
    if rule not in ("plain", "pointnet2"):
        raise ValueError(f"farthest_points: the rule is plain or pointnet2, got {rule!r}")
    if count < 0:
        raise ValueError(f"farthest_points: cannot choose {count} points")
    clouds = Clouds("farthest_points", points.detach(), lengths)
    xyz, present = clouds.points, clouds.present
    batch, longest = present.shape
    if not (batch and longest and count) or xyz.is_meta:
        return torch.full((batch, count), -1, device=xyz.device)
    limit, order, live = float("inf"), None, present
    first = present.int().argmax(1)  # the first that is one
    if rule == "pointnet2":
        xyz, limit = xyz.float(), 1e10
        x, y, z = (axis.square() for axis in xyz.unbind(-1))
        live = present & ((x + y + z).double() > 1e-3)  # CUDA compares in double precision
        order = torch.stack([_thread_order(n, longest) for n in clouds.lengths]).to(xyz.device)
        xyz = xyz.gather(1, order[..., None].expand_as(xyz))
        live = live.gather(1, order)
        first = (order == first[:, None]).int().argmax(1)
    chosen = _farthest(xyz, live, first, count, limit)
    if order is not None:
        chosen = order.gather(1, chosen)
    return clouds.number(chosen.masked_fill(~present.any(1, keepdim=True), -1))


@lru_cache(maxsize=64)
def _thread_order(count: int, length: int) -> Tensor:
    """Rows in the order in which pointnet2_ops prefers them at equal distances; `count` of them, then the others.

    The kernel has T threads, the largest power of two up to min(512, count). Thread t owns rows t, t + T, ... and keeps
    the lowest of its best rows; then the thread wins whose number, read backwards in binary, is lowest.
    """
    bits = min(max(count, 1).bit_length() - 1, 9)
    row = torch.arange(length)
    thread, turn = row % 2**bits, row >> bits
    backwards = sum((thread >> b & 1) << (bits - 1 - b) for b in range(bits)) if bits else thread
    return torch.where(row < count, (backwards << 32) + turn, (1 << 62) + row).argsort()


def _farthest(points: Tensor, live: Tensor, first: Tensor, count: int, limit: float) -> Tensor:
    """`_farthest_loop` by the fastest of the ways that give the same."""
    if points.is_cpu and cpu.missing() is None:
        chosen = torch.empty(len(points), count, dtype=torch.int64)
        torch.ops.linescan_cpu.farthest_points(points.contiguous(), live.contiguous(), first, limit == 1e10, chosen)
        return chosen
    if points.is_cuda and triton.info().startswith("Triton"):
        with torch.cuda.device(points.device):
            kernel = import_module("linescan.scans.kernels.triton.farthest")
            return kernel.farthest(points, live, first, count, limit)
    return _farthest_loop(points, live, first, count, limit)


def _farthest_loop(points: Tensor, live: Tensor, first: Tensor, count: int, limit: float) -> Tensor:
    """(B, count) rows of points (B, N, 3): `first`, then always the live point that is farthest, the lowest of several.

    No distance counts for more than sqrt(limit). Where no point is live, `first` is repeated.
    """
    axes = [axis.contiguous() for axis in points.unbind(-1)]
    far = torch.where(live, limit, -1.0).to(points.dtype)  # squared distance to the nearest of those chosen
    chosen, last = [first], first
    for _ in range(count - 1):
        squares = [(x - x.gather(1, last[:, None])).square_() for x in axes]
        far = torch.minimum(far, squares[0].add_(squares[1]).add_(squares[2]))
        best, last = far.max(1)
        last = torch.where(best < 0, first, last)
        chosen.append(last)
    return torch.stack(chosen, 1)


# -- neighbours -------------------------------------------------------------------------------------------------------


def knn(
    points: Tensor, queries: Tensor, k: int, lengths: Lengths = None, query_lengths: Lengths = None
) -> tuple[Tensor, Tensor]:
    """The k nearest points of each query, nearest first; of several at the same distance, the lowest row first.

    A query that is one of the points is its own neighbour.

    Args:
        points: (B, N, D) or packed (N, D), with `lengths`.
        queries: (B, M, D) or packed (M, D), with `query_lengths`; query b asks in cloud b.
        k: number of neighbours.

    Returns:
        distance: (B, M, k), or (M, k) for packed queries; differentiable (the gradient of a zero distance is zero).
        index: int64, of the same shape: rows of `points`.
        A cloud with fewer than k points fills what remains with infinity and -1.

    Raises:
        ValueError: a shape is wrong.
    """
    clouds, asked = Clouds("knn", points, lengths), Clouds("knn", queries, query_lengths)
    row = _neighbours("knn", clouds, asked, k)
    difference = asked.points[:, :, None] - _take(clouds.points, row)
    distance = torch.linalg.vector_norm(difference, dim=-1).masked_fill(row < 0, float("inf"))
    return asked.answer(distance), asked.answer(clouds.number(row))


@torch.no_grad()
def _neighbours(what: str, clouds: Clouds, asked: Clouds, k: int) -> Tensor:
    """Rows (B, M, k) of the padded clouds, nearest first; -1 where there are no more."""
    points, queries = clouds.points.detach(), asked.points.detach()
    if points.shape[0] != queries.shape[0] or points.shape[-1] != queries.shape[-1]:
        raise ValueError(
            f"{what}: {len(points)} clouds with {points.shape[-1]} coordinates cannot be asked by "
            f"{len(queries)} with {queries.shape[-1]}"
        )
    if k < 1:
        raise ValueError(f"{what}: k is at least 1, got {k}")
    if points.is_meta:
        return torch.full((*queries.shape[:2], k), -1, device=points.device)
    dtype = torch.promote_types(points.dtype, queries.dtype)
    points, queries = points.to(dtype), queries.to(dtype)
    size = points.shape[1] * queries.shape[1]
    eager = points.is_cpu and not torch.compiler.is_compiling()
    if size >= _TREE and eager and points.shape[-1] <= 8 and (tree := _tree()):
        row = torch.stack(
            [
                _ask_tree(tree, p[there], q, there.nonzero()[:, 0], k)
                for p, there, q in zip(points, clouds.present, queries)
            ]
        )
    else:
        row = _ask_all(points, clouds.present, queries, k)
    return row.masked_fill(~asked.present[..., None], -1)


def _ask_all(points: Tensor, present: Tensor, queries: Tensor, k: int) -> Tensor:
    """Rows (B, M, k) of the nearest of points (B, N, D), by all distances."""
    batch, length, _ = points.shape
    count, least = queries.shape[1], min(k, length)
    row = torch.full((batch, count, k), -1, device=points.device)
    if not (batch and count and length):
        return row
    absent = torch.where(present, 0.0, float("inf")).to(points.dtype)
    clouds = max(1, _BUDGET // (count * length))  # so many clouds at a time, or so many queries of one
    if batch <= clouds and count * length <= _BUDGET:
        return F.pad(_smallest(_squares(points, queries) + absent[:, None], least), (0, k - least), value=-1)
    for b in range(0, batch, clouds):
        for m in range(0, count, max(1, _BUDGET // length)):
            part = slice(b, b + clouds), slice(m, m + max(1, _BUDGET // length))
            square = _squares(points[part[0]], queries[part]) + absent[part[0], None]
            row[part][..., :least] = _smallest(square, least)
    return row


def _squares(points: Tensor, queries: Tensor) -> Tensor:
    """Squared distances (B, M, N) of queries (B, M, D) and points (B, N, D)."""
    total = None
    for p, q in zip(points.unbind(-1), queries.unbind(-1)):
        square = (q[:, :, None] - p[:, None]).square_()
        total = square if total is None else total.add_(square)
    return total


def _smallest(values: Tensor, k: int) -> Tensor:
    """Where the k smallest of the last axis are, ascending, the lowest place first among equal ones; -1 for infinity.

    `topk` leaves open which of equal values it takes.
    """
    if k == 1:
        least, place = values.min(-1, keepdim=True)
        return place.masked_fill(least.isinf(), -1)
    least, place = values.topk(min(k + 1, values.shape[-1]), largest=False)
    if least.shape[-1] > k:  # equal values on both sides of the border
        rows = ((least[..., k - 1] == least[..., k]) & least[..., k].isfinite()).nonzero(as_tuple=True)
        place[(*rows, slice(None, k))] = values[rows].sort(dim=-1, stable=True).indices[..., :k]  # type: ignore[index]
    place = place[..., :k].sort(-1).values
    least, order = values.gather(-1, place).sort(dim=-1, stable=True)
    return place.gather(-1, order).masked_fill(least.isinf(), -1)


def _tree():
    """SciPy's k-d tree, or None."""
    try:
        from scipy.spatial import cKDTree
    except ImportError:
        return None
    return cKDTree


def _ask_tree(tree, points: Tensor, queries: Tensor, number: Tensor, k: int) -> Tensor:
    """Rows (M, k) by a k-d tree over points (N, D), which are rows `number` of the cloud.

    The tree finds some more than k in float64; among these the choice is made as `_ask_all` makes it. Queries for which
    a point that was not found could be as near as the k-th are answered by all distances.
    """
    row = torch.full((len(queries), k), -1)
    least = min(k, len(points))
    more = min(k + 8, len(points))
    if not least:
        return row
    radius, found = tree(points.numpy(), balanced_tree=False).query(
        queries.numpy(), range(1, more + 1), workers=torch.get_num_threads()
    )
    found = torch.from_numpy(found).sort(-1).values  # so that the lowest row comes first among equal distances
    square = sum((q[:, None] - p[found]).square_() for p, q in zip(points.unbind(-1), queries.unbind(-1)))
    square, order = square.sort(dim=-1, stable=True)
    row[:, :least] = found.gather(-1, order[:, :least])
    if more < len(points):
        border = torch.from_numpy(radius[:, -1]).square() * (1 - 16 * torch.finfo(points.dtype).eps)
        unsure = (square[:, least - 1].double() >= border).nonzero()[:, 0]
        if len(unsure):
            everywhere = torch.ones(1, len(points), dtype=torch.bool)
            row[unsure] = _ask_all(points[None], everywhere, queries[unsure][None], k)[0]
    return torch.where(row < 0, row, number[row.clamp_min(0)])


@torch.no_grad()
def ball_query(
    points: Tensor, queries: Tensor, radius: float, k: int, lengths: Lengths = None, query_lengths: Lengths = None
) -> Tensor:
    """Points nearer to each query than `radius`: the first k in stored order, not the nearest (pointnet2_ops).

    Args:
        points, queries, lengths, query_lengths: as for `knn`.
        k: number of points of each ball. Where there are fewer, the first one fills the rest; where there are none, -1.

    Returns:
        (B, M, k) int64, or (M, k) for packed queries: rows of `points`.

    Raises:
        ValueError: a shape is wrong.
    """
    if k < 1:
        raise ValueError(f"ball_query: k is at least 1, got {k}")
    clouds, asked = Clouds("ball_query", points, lengths), Clouds("ball_query", queries, query_lengths)
    points, queries = clouds.points, asked.points
    batch, length, _ = points.shape
    row = torch.full((batch, queries.shape[1], k), -1, device=points.device)
    step = max(1, _BUDGET // max(batch * length, 1))
    number, least = torch.arange(length, device=points.device), min(k, length)
    for m in range(0, queries.shape[1] if length else 0, step):
        near = (_squares(points, queries[:, m : m + step]) < radius**2) & clouds.present[:, None]
        first = torch.where(near, number, length).topk(least, largest=False).values
        row[:, m : m + step, :least] = first.masked_fill(first == length, -1)
    row = torch.where(row < 0, row[..., :1], row)
    return asked.answer(clouds.number(row.masked_fill(~asked.present[..., None], -1)))


# -- features of points -----------------------------------------------------------------------------------------------


def gather(features: Tensor, index: Tensor) -> Tensor:
    """Rows by their numbers; differentiable. -1 gives zeros.

    Args:
        features: (B, N, C) with an index of each cloud (B, ...), or packed (N, C) with any index.
        index: int64.

    Returns:
        (*index.shape, C).
    """
    return _take(features, index) if features.ndim == 3 else _take(features[None], index[None])[0]


def _take(rows: Tensor, index: Tensor) -> Tensor:
    batch, length, channels = rows.shape
    if not length:
        return rows.new_zeros(*index.shape, channels)
    first = torch.arange(0, batch * length, length, device=rows.device).reshape(-1, *[1] * (index.ndim - 1))
    taken = rows.reshape(-1, channels)[(index.clamp_min(0) + first).flatten()].reshape(*index.shape, channels)
    return taken.masked_fill((index < 0)[..., None], 0)


def interpolate(
    features: Tensor,
    points: Tensor,
    queries: Tensor,
    lengths: Lengths = None,
    query_lengths: Lengths = None,
    k: int = 3,
) -> Tensor:
    """Features at the queries: the mean of those of the k nearest points, weighted by 1 / (squared distance + 1e-8).

    PointNet++'s feature propagation (arXiv 1706.02413). Differentiable by the features and by all coordinates.

    Args:
        features: (B, N, C), or (N, C) for packed points.
        points, queries, lengths, query_lengths: as for `knn`. A cloud may have fewer than k points.

    Returns:
        (B, M, C), or (M, C) for packed queries, in the features' dtype; zeros where a cloud has no point.

    Raises:
        ValueError: a shape is wrong.
    """
    if features.shape[:-1] != points.shape[:-1]:
        raise ValueError(f"interpolate: features {tuple(features.shape)} are not those of points {tuple(points.shape)}")
    clouds, asked = Clouds("interpolate", points, lengths), Clouds("interpolate", queries, query_lengths)
    row = _neighbours("interpolate", clouds, asked, k)
    square = (asked.points[:, :, None] - _take(clouds.points, row)).square().sum(-1)
    weight = (1 / (square + 1e-8)).masked_fill(row < 0, 0)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    features = pad(features, clouds.lengths) if clouds.packed else features
    dtype = features.dtype
    mean = torch.einsum("bmk,bmkc->bmc", weight, _take(features, row).to(weight.dtype))
    return asked.answer(mean.to(dtype))


def chamfer(a: Tensor, b: Tensor, a_lengths: Lengths = None, b_lengths: Lengths = None, norm: str = "l2") -> Tensor:
    """The distance of two clouds from each other, (B,); its mean over clouds is the usual loss. Differentiable.

    Args:
        a, b: (B, N, D) and (B, M, D), or packed with lengths.
        norm: "l2": the mean over a of the squared distance to the nearest point of b, plus the same from b. "l1": half
            the sum of the means of the distances themselves.

    Returns:
        (B,); infinity where a cloud is empty, NaN where a coordinate is.

    Raises:
        ValueError: a shape is wrong, or there is no such norm.
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"chamfer: the norm is l1 or l2, got {norm!r}")
    first, second = Clouds("chamfer", a, a_lengths), Clouds("chamfer", b, b_lengths)
    means = []
    for clouds, asked in ((second, first), (first, second)):
        row = _neighbours("chamfer", clouds, asked, 1)
        difference = asked.points - _take(clouds.points, row)[:, :, 0]
        far = difference.square().sum(-1) if norm == "l2" else torch.linalg.vector_norm(difference, dim=-1)
        far = far.masked_fill(row[..., 0] < 0, float("inf")).masked_fill(~asked.counted, 0)
        count = asked.counted.sum(1)
        mean = far.sum(1) / count.clamp_min(1)
        mean = mean.masked_fill(count == 0, float("inf"))
        means.append(mean.masked_fill((asked.counted & ~asked.present).any(1), float("nan")))
    return (means[0] + means[1]) * (1 if norm == "l2" else 0.5)


# -- patches ----------------------------------------------------------------------------------------------------------


class Patches(NamedTuple):
    """A cloud as overlapping groups of points.

    Attributes:
        centres: (B, G, 3).
        points: (B, G, K, 3), each relative to its centre.
        index: (B, G, K) int64: rows of the cloud.
    """

    centres: Tensor
    points: Tensor
    index: Tensor


@torch.compiler.disable  # what is a patch is decided by values
def patches(points: Tensor, groups: int, size: int, lengths: Lengths = None, rule: str = "pointnet2") -> Patches:
    """Groups of the `size` points nearest to each of `groups` centres, which are sampled as far apart as can be.

    The patches of Point-BERT and Point-MAE (arXiv 2203.06604), which Mamba3D and PointMamba take over.

    Args:
        points: (B, N, 3) or packed (N, 3), with `lengths`. No gradient goes back to them.
        rule: that of `farthest_points`.

    Raises:
        ValueError: a shape is wrong, or a cloud has fewer than `size` points.
    """
    clouds = Clouds("patches", points.detach(), lengths)
    counts = clouds.present.sum(1)
    fewest = size if counts.is_meta or not len(counts) else int(counts.min())
    if fewest < size:
        raise ValueError(f"a cloud has {fewest} points, fewer than a group of {size}")
    number = farthest_points(points, groups, lengths, rule)
    row = number - clouds.first[:, None]
    centres = _take(clouds.points, row)
    everyone = Clouds("patches", centres, None)
    index = _neighbours("patches", clouds, everyone, size)
    relative = _take(clouds.points, index) - centres[:, :, None]
    return Patches(centres, relative, clouds.number(index))


class CentreMLP(nn.Sequential):
    """Where a patch is, as features: centres (..., 3) -> (..., dim), of the dtype of the weights.

    Args:
        dim: channels.
        act_layer: between the two layers.
    """

    def __init__(self, dim: int, act_layer: Callable = nn.GELU):
        super().__init__(nn.Linear(3, 128), act_layer(), nn.Linear(128, dim))

    def forward(self, centres: Tensor) -> Tensor:
        return super().forward(centres.to(self[0].weight.dtype))


class PointPatchEmbed(nn.Module):
    """A token for each patch: the small PointNet of Point-BERT (arXiv 2111.14819).

    Each point goes through in_chans-128-256; each joins the maximum over its patch, and they go through 512-512-dim;
    the maximum over the patch is the token.

    Args:
        dim: channels of a token.
        in_chans: channels of a point.
        widths: of the hidden layers, 128, 256 and 512 as published.
    """

    def __init__(self, dim: int, in_chans: int = 3, widths: Sequence[int] = (128, 256, 512)):
        super().__init__()
        first, middle, last = widths
        self.first_conv = nn.Sequential(
            nn.Linear(in_chans, first), nn.BatchNorm1d(first), nn.ReLU(inplace=True), nn.Linear(first, middle)
        )
        self.second_conv = nn.Sequential(
            nn.Linear(2 * middle, last), nn.BatchNorm1d(last), nn.ReLU(inplace=True), nn.Linear(last, dim)
        )

    def forward(self, points: Tensor) -> Tensor:
        """(B, G, K, in_chans) -> (B, G, dim)."""
        batch, groups, size, _ = points.shape
        points = points.to(self.first_conv[0].weight.dtype)
        x = self.first_conv(points.flatten(0, 2)).unflatten(0, (-1, size))  # (B G, K, middle)
        # The maximum meets its half of the weights once a patch, not once a point.
        for_all, for_each = self.second_conv[0].weight.chunk(2, 1)
        x = F.linear(x, for_each) + F.linear(x.amax(1), for_all, self.second_conv[0].bias)[:, None]
        x = self.second_conv[1:](x.flatten(0, 1)).unflatten(0, (-1, size)).amax(1)
        return x.unflatten(0, (batch, groups))
