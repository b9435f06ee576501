"""Voxels: points into cells, reductions over cells, and convolutions over the cells that hold something. Plain torch.

A `SparseTensor` is features (N, C) and the `Sites` they stand at. Row order is free. Sites keep the neighbour tables of
every convolution that has been applied to them, so that layers over the same sites share one table, and nothing has to
be named for that.

A convolution gathers the rows that each kernel offset reads, multiplies them with that offset's matrix, and adds the
products to the rows they belong to. No step depends on how many cells are empty.

Weights have the layout of spconv 2.x, [out, *kernel, in], so that published files fit; see `from_spconv`.
"""

from functools import cached_property
from itertools import product
from math import prod
from typing import Callable, Hashable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .points import Clouds, Lengths

__all__ = [
    "Neighbours",
    "Sites",
    "SparseConv",
    "SparseTensor",
    "SubmanifoldConv",
    "from_spconv",
    "scatter",
    "sparse_conv",
    "unique_cells",
    "voxelize",
]


# -- cells ------------------------------------------------------------------------------------------------------------


def unique_cells(cells: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of integer cells (N, n), ascending (the first column counts most), and where each row went.

    Returns:
        cells: (M, n), of the dtype given.
        index: (N,) int64: `cells[index]` is what was given.

    Raises:
        ValueError: not an integer table, or its rows span more than 2^63 cells.
    """
    if cells.ndim != 2 or cells.is_floating_point():
        raise ValueError(f"unique_cells: cells are integers (N, n), got {str(cells.dtype)[6:]} {tuple(cells.shape)}")
    if not len(cells):
        return cells, cells.new_zeros(0, dtype=torch.int64)
    low, high = (end.tolist() for end in cells.aminmax(dim=0))
    extents = [b - a + 1 for a, b in zip(low, high)]
    if prod(extents) > 2**63:
        raise ValueError(f"unique_cells: cells span {' x '.join(map(str, extents))}, more than 2^63")
    steps = torch.tensor([prod(extents[i + 1 :]) for i in range(len(extents))], device=cells.device)
    key = ((cells - torch.tensor(low, device=cells.device)) * steps).sum(1)
    key, index = key.unique(return_inverse=True)
    columns = [key // step % extent + a for step, extent, a in zip(steps.tolist(), extents, low)]
    return torch.stack(columns, 1).to(cells.dtype), index


def scatter(values: Tensor, index: Tensor, size: int, reduce: str = "sum") -> Tensor:
    """Reduces the rows that belong together: values (N, C) and index (N,) -> (size, C). Differentiable.

    Args:
        index: the row of the result that each row goes to; -1: to none.
        size: rows of the result. A row that nothing goes to is zero.
        reduce: "sum", "mean" or "max". Rows that share a maximum share its gradient.

    Raises:
        ValueError: unknown `reduce`.
    """
    kinds = {"sum": "sum", "mean": "mean", "max": "amax"}
    if reduce not in kinds:
        raise ValueError(f"scatter: reduce is {', '.join(kinds)}, got {reduce!r}")
    target = torch.where(index < 0, size, index)[:, None].expand_as(values)  # one more row takes what goes nowhere
    out = values.new_zeros(size + 1, values.shape[1])
    return out.scatter_reduce(0, target, values, kinds[reduce], include_self=False)[:size]


class Sites:
    """Cells of a batch of grids, and the neighbour tables over them.

    Args:
        coords: (N, 1 + n) integers: sample, then the cell along each axis, slowest first (b, z, y, x). All rows differ.
        shape: of the grid, in the same order (z, y, x).
        batch_size: number of grids.

    Raises:
        ValueError: the shapes do not belong together. Coordinates outside of the grids, and repeated ones, are noticed
            when the first convolution needs a table.
    """

    def __init__(self, coords: Tensor, shape: Sequence[int], batch_size: int):
        if coords.ndim != 2 or coords.shape[1] != 1 + len(shape) or coords.is_floating_point():
            raise ValueError(
                f"sites of a {len(shape)}-dimensional grid are integers (N, {1 + len(shape)}), "
                f"got {str(coords.dtype)[6:]} {tuple(coords.shape)}"
            )
        self.coords, self.shape, self.batch_size = coords.long(), tuple(shape), batch_size
        self._tables: dict = {}

    def __len__(self) -> int:
        return len(self.coords)

    def cached(self, key: Hashable, make: Callable):
        """What `make()` gives, made once for these sites: a table of neighbours, or a route through them."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]

    @cached_property
    def flat(self) -> Tensor:
        """(N,) index of each site among all cells of all grids, row-major."""
        return self._keys(0)[0]

    def _keys(self, halo: Sequence[int] | int) -> tuple[Tensor, list[int]]:
        """Each site's number in grids with `halo` more cells before each axis, and what a step along an axis adds.

        No site is in a halo, and there ends every step of up to `halo` cells beyond a border, also one that goes on in
        the next row.
        """
        halo = [halo] * len(self.shape) if isinstance(halo, int) else halo
        extents = [n + h for n, h in zip(self.shape, halo)]
        steps = [prod(extents[i:]) for i in range(len(extents) + 1)]
        shifted = self.coords + torch.tensor([0, *halo], device=self.coords.device)
        return (shifted * torch.tensor(steps, device=self.coords.device)).sum(1), steps[1:]

    def _check(self, ascending: Tensor) -> None:
        """Raises a ValueError where sites lie outside of their grids, or agree (from their numbers, sorted)."""
        ends = torch.tensor([self.batch_size, *self.shape], device=self.coords.device)
        outside = ((self.coords < 0) | (self.coords >= ends)).any(1).sum()
        if outside:
            grids = f"{self.batch_size} grids of {'x'.join(map(str, self.shape))}"
            raise ValueError(f"{outside} of {len(self)} sites lie outside of {grids}")
        if (again := (ascending[1:] == ascending[:-1]).sum()) > 0:
            raise ValueError(f"{again} of {len(self)} sites are repeated")

    def neighbours(self, kernel: Sequence[int], dilation: Sequence[int]) -> "Neighbours":
        """The site each kernel offset reads, for outputs at the same sites. Cell k // 2 of the kernel is the site."""
        key = "submanifold", tuple(kernel), tuple(dilation)
        return self.cached(key, lambda: self._find(*key[1:]))

    def _find(self, kernel: Sequence[int], dilation: Sequence[int]) -> "Neighbours":
        numbers, steps = self._keys([k // 2 * d for k, d in zip(kernel, dilation)])
        numbers, order = numbers.sort()
        self._check(numbers)
        centre = [k // 2 for k in kernel]
        offsets = list(product(*map(range, kernel)))
        found: dict[int, tuple] = {}  # by how far a neighbour's number is
        reads, writes = [], []
        for offset in offsets:
            distance = sum((o - c) * d * step for o, c, d, step in zip(offset, centre, dilation, steps))
            if -distance in found and distance:  # the same pairs the other way round
                write, read = found[-distance]
            elif distance == 0 or not len(self):
                read = write = None
            else:
                wanted = numbers + distance
                place = torch.searchsorted(numbers, wanted).clamp_max_(len(self) - 1)
                hit = (numbers[place] == wanted).nonzero()[:, 0]
                read, write = order[place[hit]], order[hit]
            found[distance] = read, write
            reads.append(read)
            writes.append(write)
        return Neighbours(reads, writes, len(self))

    def strided(
        self, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> tuple["Sites", "Neighbours"]:
        """The sites that a strided convolution reaches, ascending (b, z, y, x), and what each offset reads for them."""
        key = "strided", tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)
        return self.cached(key, lambda: self._reach(*key[1:]))

    def _reach(self, kernel, stride, padding, dilation) -> tuple["Sites", "Neighbours"]:
        self._check(self.flat.sort().values)
        shape = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(self.shape, kernel, stride, padding, dilation)
        ]
        if min(shape) < 1:
            raise ValueError(f"a kernel of {kernel} does not fit a grid of {self.shape} with padding {padding}")
        device = self.coords.device
        ends, stride = torch.tensor(shape, device=device), torch.tensor(stride, device=device)
        reads, targets = [], []
        for offset in product(*map(range, kernel)):
            shift = torch.tensor([p - o * d for p, o, d in zip(padding, offset, dilation)], device=device)
            place = self.coords[:, 1:] + shift
            target = place.div(stride, rounding_mode="floor")
            fits = (target * stride == place) & (target >= 0) & (target < ends)
            reads.append(fits.all(1).nonzero()[:, 0])
            targets.append(torch.cat((self.coords[reads[-1], :1], target[reads[-1]]), 1))
        coords, index = unique_cells(torch.cat(targets))
        writes = index.split([len(read) for read in reads])
        return Sites(coords, shape, self.batch_size), Neighbours(reads, list(writes), len(coords))


class Neighbours(NamedTuple):
    """What a convolution reads and writes: for each kernel offset, row-major, pairs of rows.

    Attributes:
        reads, writes: for each offset int64 rows, no row twice; None: all rows, in their order.
        size: number of output rows.
    """

    reads: list[Tensor | None]
    writes: list[Tensor | None]
    size: int


class SparseTensor(NamedTuple):
    """Features at sites.

    Attributes:
        features: (N, C).
        sites: where they stand.
    """

    features: Tensor
    sites: Sites

    def replace(self, features: Tensor) -> "SparseTensor":
        """Other features at the same sites."""
        return SparseTensor(features, self.sites)

    def dense(self) -> Tensor:
        """(B, C, Z, Y, X), zero where there is no site. Differentiable."""
        sites, channels = self.sites, self.features.shape[1]
        cells = self.features.new_zeros(sites.batch_size * prod(sites.shape), channels)
        cells = cells.index_copy(0, sites.flat, self.features)
        return cells.reshape(sites.batch_size, *sites.shape, channels).movedim(-1, 1)


def voxelize(
    points: Tensor, low: Sequence[float], high: Sequence[float], cells: Sequence[int], lengths: Lengths = None
) -> tuple[Sites, Tensor]:
    """Points into the cells of a grid, without a limit on the points of a cell or on the number of cells.

    Args:
        points: (B, N, D) or packed (N, D), with `lengths`; the first columns are the coordinates x, y(, z).
        low, high: corners of the grid, in the points' unit, x first. A point is in cell floor((p - low) / size); one
            outside, or with a NaN, is in none.
        cells: number of cells along each axis, x first.

    Returns:
        sites: the cells that hold points, in the grid (z, y, x), ascending by (b, x, y, z), as OpenPCDet numbers them.
        index: int64 (B, N) or (N,): the row of each point's cell; -1: none.

    Raises:
        ValueError: a shape is wrong, or the grid has no volume.
    """
    axes = len(cells)
    if len(low) != axes or len(high) != axes or min(cells, default=0) < 1 or any(a >= b for a, b in zip(low, high)):
        raise ValueError(f"voxelize: no grid has corners {tuple(low)}, {tuple(high)} and {tuple(cells)} cells")
    if points.shape[-1] < axes:
        raise ValueError(f"voxelize: points of {points.shape[-1]} columns in a {axes}-dimensional grid")
    clouds = Clouds("voxelize", points[..., :axes].detach(), lengths)
    rows = clouds.points
    size = rows.new_tensor([(b - a) / n for a, b, n in zip(low, high, cells)])
    place = ((rows - rows.new_tensor(low)) / size).floor()
    inside = ((place >= 0) & (place < rows.new_tensor(cells))).all(-1) & clouds.present
    sample = inside.nonzero()[:, :1]
    found, which = unique_cells(torch.cat((sample, place[inside].long()), 1))
    index = torch.full(inside.shape, -1, device=rows.device).masked_scatter(inside, which)
    sites = Sites(torch.cat((found[:, :1], found[:, 1:].flip(1)), 1), tuple(cells)[::-1], len(rows))
    return sites, clouds.answer(index)


# -- convolution ------------------------------------------------------------------------------------------------------


def sparse_conv(features: Tensor, weight: Tensor, neighbours: Neighbours) -> Tensor:
    """Convolves features (N, in) with weight (out, *kernel, in) -> (neighbours.size, out).

    Under autocast it computes in the autocast dtype, like a dense convolution.
    """
    device = features.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        features, weight = features.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return _SparseConv.apply(features, weight.flatten(1, -2), neighbours)


class _SparseConv(torch.autograd.Function):
    """Gathered rows are made again in the backward pass: kept, they would be as large as the whole kernel's."""

    @staticmethod
    def forward(ctx, features, weight, neighbours):
        ctx.save_for_backward(features, weight)
        ctx.neighbours = neighbours
        out = features.new_zeros(neighbours.size, len(weight))
        for read, write, matrix in zip(neighbours.reads, neighbours.writes, weight.unbind(1)):
            if read is None:
                out.addmm_(features, matrix.T)
            elif len(read):
                out.index_add_(0, write, features[read] @ matrix.T)
        return out

    @staticmethod
    def backward(ctx, grad):
        features, weight = ctx.saved_tensors
        grad_features = torch.zeros_like(features) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for offset, (read, write) in enumerate(zip(ctx.neighbours.reads, ctx.neighbours.writes)):
            part = grad if write is None else grad[write]
            if grad_features is not None:
                if read is None:
                    grad_features.addmm_(part, weight[:, offset])
                else:
                    grad_features.index_add_(0, read, part @ weight[:, offset])
            if grad_weight is not None:
                grad_weight[:, offset] = part.T @ (features if read is None else features[read])
        return grad_features, grad_weight, None


class _Conv(nn.Module):
    """What both convolutions share: the weight, as spconv 2.x stores it, and the bias."""

    def __init__(self, in_chans: int, out_chans: int, kernel: tuple[int, ...], bias: bool, linear: bool = False):
        super().__init__()
        self.in_chans, self.out_chans, self.kernel = in_chans, out_chans, kernel
        # A linear map's weight has two axes, which tells it from one in a file of spconv.
        self.weight = nn.Parameter(torch.empty(out_chans, *(() if linear else kernel), in_chans))
        self.bias = nn.Parameter(torch.empty(out_chans)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(in_chans * cells of the kernel), as torch's convolutions."""
        bound = (self.in_chans * prod(self.kernel)) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.in_chans}, {self.out_chans}, kernel={self.kernel}"

    def _biased(self, features: Tensor) -> Tensor:
        return features if self.bias is None else features + self.bias.to(features.dtype)


def _sides(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


class SubmanifoldConv(_Conv):
    """Convolution whose outputs stand at the inputs' sites (Graham et al., arXiv 1711.10275); spconv's `SubMConv`.

    A kernel of one cell is a linear map, and its weight (out, in).

    Args:
        in_chans, out_chans: channels.
        kernel_size, dilation: for all axes, or one for each, slowest first.
        bias: whether there is one.
        axes: of the grid.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int | Sequence[int] = 3,
        dilation: int | Sequence[int] = 1,
        bias: bool = False,
        axes: int = 3,
    ):
        kernel = _sides(kernel_size, axes)
        super().__init__(in_chans, out_chans, kernel, bias, linear=prod(kernel) == 1)
        self.dilation = _sides(dilation, axes)

    def forward(self, x: SparseTensor) -> SparseTensor:
        if self.weight.ndim == 2:
            return x.replace(F.linear(x.features, self.weight, self.bias))
        neighbours = x.sites.neighbours(self.kernel, self.dilation)
        return x.replace(self._biased(sparse_conv(x.features, self.weight, neighbours)))


class SparseConv(_Conv):
    """Convolution whose outputs stand wherever its kernel reaches an input; spconv's `SparseConv`.

    Outputs are in ascending order of (b, z, y, x).

    Args:
        in_chans, out_chans: channels.
        kernel_size, stride, padding, dilation: for all axes, or one for each, slowest first; as for torch's.
        bias: whether there is one; added at the outputs' sites only.
        axes: of the grid.

    Raises:
        ValueError: a kernel of one cell without stride and padding, which is a `SubmanifoldConv`.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = False,
        axes: int = 3,
    ):
        super().__init__(in_chans, out_chans, _sides(kernel_size, axes), bias)
        self.stride, self.padding, self.dilation = (_sides(v, axes) for v in (stride, padding, dilation))
        if prod(self.kernel) == prod(self.stride) == 1 and not any(self.padding):
            raise ValueError("a kernel of one cell without stride keeps all sites: use SubmanifoldConv")

    def forward(self, x: SparseTensor) -> SparseTensor:
        sites, neighbours = x.sites.strided(self.kernel, self.stride, self.padding, self.dilation)
        return SparseTensor(self._biased(sparse_conv(x.features, self.weight, neighbours)), sites)


def from_spconv(state: dict[str, Tensor], module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """A checkpoint trained with spconv, with the weights of the convolutions of `module` as they are stored here.

    - spconv 2.x stores [out, *kernel, in], as `module` does; 1.x stored [*kernel, in, out], which is permuted.
    - A submanifold kernel of one cell takes a shortcut in both: the buffer of in * out numbers is read as (in, out),
      whatever the layout says. Files are trained with that (spconv's issue 450), so it is what the numbers mean.

    What is stored as here already passes unchanged, so that own checkpoints load through the same filter.

    Args:
        state: the keys are those of `module`, after `prefix`.

    Returns:
        A new dict with all entries of `state`.
    """
    state = dict(state)
    for name, conv in module.named_modules():
        key = f"{prefix}{name}.weight" if name else f"{prefix}weight"
        if not isinstance(conv, _Conv) or key not in state:
            continue
        weight = state[key]
        own = conv.weight
        if own.ndim == 2 < weight.ndim and weight.numel() == own.numel():
            state[key] = weight.reshape(conv.in_chans, conv.out_chans).T.contiguous()
        elif weight.ndim > 2 and weight.shape != own.shape == weight.movedim(-1, 0).shape:
            state[key] = weight.movedim(-1, 0).contiguous()
    return state
