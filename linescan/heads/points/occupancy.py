"""OccRWKV: a scan of points and the cells that it hits, completed to a volume in which every cell has a class.

Paper: "OccRWKV: Rethinking Efficient 3D Semantic Occupancy Prediction with Linear Complexity", Wang et al., ICRA 2025,
arXiv 2409.19987. Official code: github.com/jmwang0117/OccRWKV (no licence). It is SSC-RS (Mei et al., arXiv 2306.15349)
with blocks of Vision-RWKV (arXiv 2403.02308) on its maps of the ground.

Three branches: `SemanticBranch` sees the points, on ever coarser voxels; `GeometricBranch` sees which cells are hit;
`GroundUNet` reads both from above at three scales, and its channels are the heights of the volume.
"""

from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.points.contract import check_clouds
from ...checkpoint import rename
from ...errors import InputError
from ...layers.norm import RowNorm, at_least_float32
from ...layers.points import Lengths
from ...layers.rwkv import ChannelMix, KernelMix, Place, QuadShift, RWKVBlock, SpatialMix, from_official
from ...layers.sparse import Sites, SparseTensor, SubmanifoldConv, from_spconv, scatter, unique_cells, voxelize
from ...zoo import register

__all__ = ["OccRWKV", "Volume", "lovasz_softmax"]

SLOPE = 0.1  # of leaky ReLUs, below 0


# -- blocks on maps ----------------------------------------------------------------------------------------------------


class MapRWKV(RWKVBlock):
    """A block of Vision-RWKV over the cells of a map (B, C, Y, X), which it normalises first.

    Args:
        dim: channels.
        kernel: compute Bi-WKV as the published kernel does, not as the paper's equation says.
    """

    def __init__(self, dim: int, kernel: bool):
        mixer = (KernelMix if kernel else SpatialMix)(dim, QuadShift(), Place(0, 1))
        super().__init__(dim, mixer, ChannelMix(dim, QuadShift(), Place(0, 1)), pre_norm=True)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[-2:]
        return super().forward(x.flatten(2).mT, grid).mT.unflatten(2, grid)


class ResidualConv3d(nn.Module):
    """relu(a + conv(relu(a))), a = conv(x), in three dimensions."""

    def __init__(self, in_chans: int, out_chans: int, dilation: int = 1):
        super().__init__()
        self.reduction = nn.Conv3d(in_chans, out_chans, 3, 1, dilation, dilation)
        self.layer = nn.Conv3d(out_chans, out_chans, 3, 1, dilation, dilation)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduction(x)
        return F.relu(x + self.layer(F.relu(x)))


def double_conv(in_chans: int, out_chans: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, each with a batch norm and a leaky ReLU."""
    parts: list[nn.Module] = []
    for chans in (in_chans, out_chans):
        parts += [nn.Conv2d(chans, out_chans, 3, 1, 1), nn.BatchNorm2d(out_chans), nn.LeakyReLU()]
    return nn.Sequential(*parts)


# -- points ------------------------------------------------------------------------------------------------------------


class Level(NamedTuple):
    """The voxels of a scan at one scale.

    Attributes:
        sites: those that hold points, ascending by (b, z, y, x), or at the first scale by (b, x, y, z).
        index: the voxel of each point.
    """

    sites: Sites
    index: Tensor


class PointEncoder(nn.Module):
    """Points -> voxels of the full grid, by what points are in cells of half the size and in their own.

    As published, the centres of the half cells are placed as if they had the full size, and in float32.

    Args:
        in_chans: channels of a point.
        dim: channels of a voxel.
        width: channels of each of the two scales.
    """

    def __init__(self, in_chans: int = 4, dim: int = 32, width: int = 16):
        super().__init__()
        self.point = nn.ModuleList(nn.Linear(in_chans + 6, width) for _ in range(2))
        self.weight = nn.ModuleList(nn.Linear(6, width) for _ in range(2))
        self.gate = nn.Linear(6, dim)
        self.proj = nn.Linear(4 * width, dim)
        self.fusion = nn.Linear(dim, dim)

    def forward(self, points: Tensor, levels: Sequence[Level], low: Tensor, size: Tensor) -> Tensor:
        """Points (N, in_chans) in half cells and cells -> (M, dim)."""
        found, offsets = [], points
        dtype = self.gate.weight.dtype
        for (sites, index), point, weight in zip(levels, self.point, self.weight):
            xyz = points[:, :3]
            mean = scatter(xyz, index, len(sites), "mean")[index]
            centre = (sites.coords[:, [3, 2, 1]].float() + 0.5) * size.float() + low.float()
            offsets = torch.cat([xyz - mean, xyz - centre.to(xyz)[index]], 1).to(dtype)
            x = point(torch.cat([points.to(dtype), offsets], 1)) * weight(offsets)
            found += [x, scatter(x, index, len(sites), "max")[index]]
        x = F.relu(self.gate(offsets)) * F.relu(self.proj(torch.cat(found, 1)))
        sites, index = levels[-1]
        return scatter(self.fusion(x), index, len(sites), "max")


class LocalConv(nn.Module):
    """Voxels -> voxels: two submanifold convolutions, and a shortcut through one of a single cell."""

    def __init__(self, dim: int):
        super().__init__()
        self.shortcut = SubmanifoldConv(dim, dim, 1)
        self.conv1, self.conv2 = SubmanifoldConv(dim, dim), SubmanifoldConv(dim, dim)
        self.norm0, self.norm1, self.norm2 = (RowNorm(dim) for _ in range(3))

    def forward(self, x: SparseTensor) -> SparseTensor:
        y = F.leaky_relu(self.norm1(self.conv1(x).features), SLOPE)
        y = self.norm2(self.conv2(x.replace(y)).features) + self.norm0(self.shortcut(x).features)
        return x.replace(F.leaky_relu(y, SLOPE))


class PyramidPooling(nn.Module):
    """Voxels with what is in blocks of 2, 4, 6 and 8 cells around them, weighed against each other.

    Args:
        dim: channels.
        out_chans: channels of the result.
        sides: of the blocks.
    """

    def __init__(self, dim: int, out_chans: int, sides: Sequence[int] = (2, 4, 6, 8)):
        super().__init__()
        self.sides, half = tuple(sides), dim // 2
        self.reduce = nn.Linear(dim, dim)
        self.each = nn.ModuleList(nn.Linear(dim, half) for _ in sides)
        self.all = nn.Linear(half, half, bias=False)
        self.gates = nn.ModuleList(nn.Linear(half, half) for _ in sides)
        self.out = nn.Linear(half, dim, bias=False)
        self.output = nn.Sequential(nn.Linear(2 * dim, dim, bias=False), nn.ReLU(), nn.Linear(dim, out_chans))

    def forward(self, x: SparseTensor) -> Tensor:
        """Voxels -> features (M, out_chans) of the same."""
        y = F.relu(self.reduce(x.features))
        coords, pooled = x.sites.coords, []
        for side, layer in zip(self.sides, self.each):
            cells, index = unique_cells(torch.cat([coords[:, :1], coords[:, 1:] // side], 1))
            pooled.append(F.relu(layer(scatter(y, index, len(cells), "mean")))[index])
        total = F.relu(self.all(torch.stack(pooled).sum(0)))
        weighed = torch.stack([p * gate(total).sigmoid() for p, gate in zip(pooled, self.gates)]).sum(0)
        return self.output(torch.cat([y, self.out(weighed)], 1))


def from_above(x: SparseTensor) -> Tensor:
    """The maximum of voxels over the height, (B, C, Y, X), 0 where there are none."""
    _, height, width = x.sites.shape
    b, _, row, column = x.sites.coords.unbind(1)
    cells = x.sites.batch_size * height * width
    flat = scatter(x.features, (b * height + row) * width + column, cells, "max")
    return flat.view(x.sites.batch_size, height, width, -1).permute(0, 3, 1, 2)


class SemanticBranch(nn.Module):
    """Voxels of the scan at scales 2, 4 and 8: what they are, and their maps from above.

    Args:
        dim: channels of the voxels.
        classes: that points can have.
        kernel: of `MapRWKV`.
    """

    def __init__(self, dim: int, classes: int, kernel: bool):
        super().__init__()
        widths = [dim * 2**i for i in range(4)]
        self.convs = nn.ModuleList(LocalConv(width) for width in widths[:3])
        self.pools = nn.ModuleList(PyramidPooling(width, 2 * width) for width in widths[:3])
        self.blocks = nn.ModuleList(MapRWKV(width, kernel) for width in widths[1:])
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64, bias=False), RowNorm(64), nn.LeakyReLU(SLOPE), nn.Linear(64, classes))
            for width in widths[1:]
        )

    def forward(self, x: SparseTensor, levels: Sequence[Level]) -> tuple[list[Tensor], list[Tensor]]:
        """Voxels of the full grid, and all scales from it on -> maps, and logits of the voxels of scales 2, 4 and 8."""
        maps, logits = [], []
        for fine, coarse, conv, pool, block, head in zip(
            levels, levels[1:], self.convs, self.pools, self.blocks, self.heads
        ):
            y = pool(conv(x))[fine.index]
            x = SparseTensor(scatter(y, coarse.index, len(coarse.sites), "max"), coarse.sites)
            maps.append(block(from_above(x)))
            logits.append(head(x.features))
        return maps, logits


class GeometricBranch(nn.Module):
    """The cells that are hit, (B, 1, Z, Y, X): maps from above and, at scales 2, 4 and 8, which cells are occupied.

    Args:
        height: cells along z.
        kernel: of `MapRWKV`.
    """

    def __init__(self, height: int, kernel: bool):
        super().__init__()
        flat = 8 * height
        self.stem = nn.Conv3d(1, 16, 7, 2, 3)
        self.stages = nn.ModuleList(
            [ResidualConv3d(16, 16), nn.Sequential(nn.MaxPool3d(2), ResidualConv3d(16, 32)),
             nn.Sequential(nn.MaxPool3d(2), ResidualConv3d(32, 64, 2))]
        )  # fmt: skip
        self.reductions = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(flat, 128, 1), nn.ReLU(), nn.Conv2d(128, 64, 1), nn.ReLU()),
                nn.Sequential(nn.Conv2d(flat, 128, 1), nn.ReLU()),
                nn.Identity(),
            ]
        )
        self.blocks = nn.ModuleList(MapRWKV(width, kernel) for width in (64, 128, flat))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv3d(width, hidden, 1), nn.ReLU(), nn.Conv3d(hidden, 2, 1))
            for width, hidden in ((16, 16), (32, 32), (64, 32))
        )

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The volume -> maps, and logits (B, 2, Z, Y, X) of scales 2, 4 and 8."""
        maps, logits = [], []
        x = F.relu(self.stem(x))
        for stage, reduce, block, head in zip(self.stages, self.reductions, self.blocks, self.heads):
            x = stage(x)
            maps.append(block(reduce(x.flatten(1, 2))))
            logits.append(head(x))
        return maps, logits


class Fusion(nn.Module):
    """Three maps, each weighed by channel, added.

    Args:
        dim: channels of the first map.
        others: those of the others.
    """

    def __init__(self, dim: int, others: Sequence[int]):
        super().__init__()
        self.adapt = nn.ModuleList([nn.Identity(), *(nn.Conv2d(width, dim, 1) for width in others)])
        self.attend = nn.ModuleList(nn.Conv2d(dim, dim, 1) for _ in range(3))

    def forward(self, *maps: Tensor) -> Tensor:
        adapted = [adapt(x) for adapt, x in zip(self.adapt, maps)]
        return sum(x * attend(x.mean((2, 3), keepdim=True)).sigmoid() for x, attend in zip(adapted, self.attend))


class GroundUNet(nn.Module):
    """A U-Net over the map from above, which takes in the maps of the other branches on its way down.

    Args:
        in_chans: channels of the map.
        out_chans: channels of the result.
        others: channels of the other branches' maps at scales 2, 4 and 8, branch after branch.
        kernel: of `MapRWKV`.
        drop_rate: dropout before the last convolution.
    """

    def __init__(self, in_chans: int, out_chans: int, others: Sequence[Sequence[int]], kernel: bool, drop_rate: float):
        super().__init__()
        widths = (64, 128, 256, 512, 512)
        self.norm = nn.BatchNorm2d(in_chans)
        self.stem = double_conv(in_chans, widths[0])
        self.downs = nn.ModuleList(double_conv(a, b) for a, b in zip(widths, widths[1:]))
        self.blocks = nn.ModuleList(MapRWKV(width, kernel) for width in widths[1:])
        self.fusions = nn.ModuleList(Fusion(width, own) for width, own in zip(widths[1:4], zip(*others)))
        ups = ((1024, 512), (768, 256), (384, 128), (192, 128))
        self.ups = nn.ModuleList(double_conv(*pair) for pair in ups)
        self.drop = nn.Dropout(drop_rate)
        self.last = nn.Conv2d(128, out_chans, 1)

    def forward(self, x: Tensor, *others: Sequence[Tensor]) -> Tensor:
        """(B, in_chans, Y, X), and of each other branch its maps -> (B, out_chans, Y, X)."""
        x = self.stem(self.norm(x))
        skips = [x]
        for i, (down, block) in enumerate(zip(self.downs, self.blocks)):
            x = block(down(F.max_pool2d(x, 2)))
            if i < len(self.fusions):
                x = self.fusions[i](x, *(maps[i] for maps in others))
                skips.append(x)
        for up, skip in zip(self.ups, reversed(skips)):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            down, right = (a - b for a, b in zip(skip.shape[-2:], x.shape[-2:]))
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
            x = up(torch.cat([skip, x], 1))
        return self.last(self.drop(x))


# -- the network -------------------------------------------------------------------------------------------------------


class Volume(NamedTuple):
    """The answer for a batch.

    Attributes:
        logits: (B, classes, X, Y, Z), of every cell; class 0 is empty.
        semantic: at scales 2, 4 and 8 the logits (M, classes - 1) of the voxels that hold points.
        occupied: at scales 2, 4 and 8 the logits (B, 2, Z, Y, X) of empty and occupied.
        levels: the voxels of scales 2, 4 and 8, and the voxel of each point.
        inside: which points lie in the space, in packed order.
    """

    logits: Tensor
    semantic: list[Tensor]
    occupied: list[Tensor]
    levels: list[Level]
    inside: Tensor


class OccRWKV(nn.Module):
    """Points -> the class of every cell of a volume.

    Args:
        num_classes: with class 0, empty.
        in_chans: channels of a point: x, y, z, intensity.
        low, high: corners of the volume, x first, in metres.
        cells: of it along x, y and z; 16 divides those along x and y.
        kernel: compute Bi-WKV as the published kernel does, not as the paper's equation says.
        drop_rate: dropout before the last convolution.

    Raises:
        InputError: there is no such volume.
    """

    classifiers = ("unet.last", "semantic.heads")
    unit = "cells"

    def __init__(
        self,
        num_classes: int = 20,
        in_chans: int = 4,
        low: Sequence[float] = (0.0, -25.6, -2.0),
        high: Sequence[float] = (51.2, 25.6, 4.4),
        cells: Sequence[int] = (256, 256, 32),
        kernel: bool = True,
        drop_rate: float = 0.5,
    ):
        super().__init__()
        if len(cells) != 3 or cells[0] % 16 or cells[1] % 16 or cells[2] % 8 or min(cells) < 8:
            raise InputError(
                f"a volume has cells along x and y that 16 divides, and along z that 8 does; it is "
                f"{'x'.join(map(str, cells))}"
            )
        if any(a >= b for a, b in zip(low, high)):
            raise InputError(f"a space from {tuple(low)} to {tuple(high)} is empty")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.low, self.high, self.cells = tuple(low), tuple(high), tuple(cells)
        self.encoder = PointEncoder(in_chans)
        self.semantic = SemanticBranch(32, num_classes - 1, kernel)
        self.geometric = GeometricBranch(cells[2], kernel)
        others = (64, 128, 256), (64, 128, 8 * cells[2])
        self.unet = GroundUNet(cells[2] + 32, num_classes * cells[2], others, kernel, drop_rate)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def levels(self, points: Tensor, lengths: Lengths = None) -> list[Level]:
        """The voxels of half the cells, and of cells of 1, 2, 4 and 8; of points that lie outside the index is -1."""
        found = []
        for scale in (0.5, 1, 2, 4, 8):
            cells = [int(n // scale) for n in self.cells]
            sites, index = voxelize(points, self.low, self.high, cells, lengths)
            if scale > 1 and len(sites):
                order = sites.flat.argsort()
                rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
                sites = Sites(sites.coords[order], sites.shape, sites.batch_size)
                index = torch.where(index < 0, index, rank[index.clamp_min(0)])
            found.append(Level(sites, index.flatten()))
        return found

    def occupancy(self, sites: Sites) -> Tensor:
        """The cells that hold points, (B, X, Y, Z)."""
        full = torch.zeros(sites.batch_size, *self.cells, device=sites.coords.device)
        b, z, y, x = sites.coords.unbind(1)
        full[b, x, y, z] = 1
        return full

    def forward(self, points: Tensor, lengths: Lengths = None, occupancy: Tensor | None = None) -> Volume:
        """The class of every cell.

        Args:
            points: clouds (B, N, in_chans), or packed (N, in_chans) with lengths.
            occupancy: (B, X, Y, Z), 1 for each cell that is hit, as data sets give it; by default, those with points.

        Raises:
            InputError: not such clouds, or a volume of another size.
        """
        check_clouds(points, self.in_chans, type(self).__name__)
        levels = self.levels(points, lengths)
        inside = torch.stack([index for _, index in levels]).ge(0).all(0)  # at the border rounding decides
        levels = [Level(sites, index[inside]) for sites, index in levels]
        rows = points.flatten(0, -2)[inside]
        full = levels[1].sites
        if occupancy is None:
            occupancy = self.occupancy(full)
        elif tuple(occupancy.shape) != (full.batch_size, *self.cells):
            raise InputError(f"the occupancy is {tuple(occupancy.shape)}, not {(full.batch_size, *self.cells)}")
        hit = occupancy.to(self.encoder.gate.weight).permute(0, 3, 2, 1)  # (B, Z, Y, X)
        low = rows.new_tensor(self.low)
        size = (rows.new_tensor(self.high) - low) / rows.new_tensor(self.cells)
        x = SparseTensor(self.encoder(rows, levels[:2], low, size), full)
        maps, semantic = self.semantic(x, levels[1:])
        others, occupied = self.geometric(hit[:, None])
        y = self.unet(torch.cat([hit, from_above(x)], 1), maps, others)
        logits = y.unflatten(1, (self.num_classes, -1)).permute(0, 1, 4, 3, 2)
        return Volume(logits, semantic, occupied, levels[2:], inside)

    def losses(
        self,
        found: Volume,
        target: Tensor,
        labels: Tensor,
        coarse: Sequence[Tensor] = (),
        weights: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Cross entropy and Lovász softmax of the volume, of the voxels with points, and of what is occupied.

        Args:
            found: of `forward`.
            target: (B, X, Y, Z) int64 classes of the cells; 255 for unknown.
            labels: classes of the points, packed, of all that `forward` was given; 0 for none.
            coarse: the targets at scales 2, 4 and 8; by default made of `target`.
            weights: of `class_weights`, in cross entropies; by default equal.

        Returns:
            "loss" and its parts.
        """
        coarse = list(coarse) or [coarser(target, 2**i) for i in (1, 2, 3)]
        of_cells, of_points = weights or (None, None)
        volume = both_losses(found.logits.flatten(2), target.flatten(1), of_cells)
        semantic, occupied = 0, 0
        labels = labels[found.inside]
        for logits, level in zip(found.semantic, found.levels):
            voxel = commonest(labels, level.index, len(level.sites), self.num_classes) - 1
            voxel = voxel.masked_fill(voxel < 0, IGNORED)
            semantic = semantic + both_losses(logits.T[None], voxel[None], of_points)
        for logits, cells in zip(found.occupied, coarse):
            there = ((cells > 0) & (cells < self.num_classes)).long().masked_fill(cells == IGNORED, IGNORED)
            occupied = occupied + both_losses(logits.permute(0, 1, 4, 3, 2).flatten(2), there.flatten(1))
        return {"loss": 3 * volume + semantic + occupied, "volume": volume, "semantic": semantic, "occupied": occupied}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Raises InputError: this network is not recomputed."""
        if enable:
            raise InputError("OccRWKV keeps its activations: it has no gradient checkpointing")

    # -- weights ----------------------------------------------------------------------------------------------------

    checkpoint_nesting = ("model",)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keys of an official file to ours, without the layers that the published network never runs."""
        state = {key: x for key, x in state.items() if "rwkv_block_up" not in key and ".scale_selection." not in key}
        return from_spconv(from_official(rename(state, OFFICIAL_KEYS)), self)


# -- losses ------------------------------------------------------------------------------------------------------------

IGNORED = 255


def lovasz_softmax(probabilities: Tensor, target: Tensor) -> Tensor:
    """The Lovász extension of the Jaccard loss, a mean over the classes that are there (Berman et al., 1705.08790).

    Args:
        probabilities: (N, classes).
        target: (N,).
    """
    losses = []
    for label in target.unique().tolist():
        there = (target == label).to(probabilities)
        errors, order = (there - probabilities[:, label]).abs().sort(descending=True)
        there = there[order]
        total = there.sum()
        jaccard = 1 - (total - there.cumsum(0)) / (total + (1 - there).cumsum(0))
        jaccard = torch.cat([jaccard[:1], jaccard.diff()])
        losses.append((errors * jaccard).sum())
    return torch.stack(losses).mean() if losses else 0 * probabilities.sum()


def both_losses(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross entropy and Lovász softmax of logits (B, classes, N) against (B, N), but for cells that are ignored."""
    counted, logits = target != IGNORED, at_least_float32(logits)
    if not counted.any():
        return 0 * logits.sum()
    weights = None if weights is None else weights.to(logits)
    entropy = F.cross_entropy(logits, target, weights, ignore_index=IGNORED)
    return entropy + lovasz_softmax(logits.softmax(1).mT[counted], target[counted])


CELLS = (
    7632350044, 15783539, 125136, 118809, 646799, 821951, 262978, 283696, 204750, 61688703, 4502961, 44883650, 2269923,
    56840218, 15719652, 158442623, 2061623, 36970522, 1151988, 334146,
)  # fmt: skip
POINTS = (
    55437630, 320797, 541736, 2578735, 3274484, 552662, 184064, 78858, 240942562, 17294618, 170599734, 6369672,
    230413074, 101130274, 476491114, 9833174, 129609852, 4506626, 1168181,
)  # fmt: skip
"""How many cells of SemanticKITTI's training volumes are of each class, and how many points of each but the first."""


def class_weights(cells: Sequence[float] = CELLS, points: Sequence[float] = POINTS) -> tuple[Tensor, Tensor]:
    """Weights of the classes of cells, and of points, float64: the rarer, the heavier, by the logarithm."""
    cells_, points_ = (torch.tensor(counts, dtype=torch.float64) for counts in (cells, points))
    return 1 / torch.log(cells_ + 0.001), 1 / torch.log(points_ + 0.001)


def commonest(labels: Tensor, index: Tensor, size: int, classes: int) -> Tensor:
    """The class that most points of each of `size` voxels have; the lowest of several."""
    votes = torch.zeros(size, classes, dtype=torch.long, device=labels.device)
    return votes.index_put((index, labels), torch.ones_like(labels), accumulate=True).argmax(1)


def coarser(target: Tensor, scale: int) -> Tensor:
    """Cells (B, X, Y, Z) of `scale` to a side: 1 where any is occupied, else 255 where any is unknown, else 0."""
    blocks = target.unflatten(3, (-1, scale)).unflatten(2, (-1, scale)).unflatten(1, (-1, scale))
    blocks = blocks.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
    occupied = ((blocks > 0) & (blocks != IGNORED)).any(-1)
    unknown = (blocks == IGNORED).any(-1)
    return torch.where(occupied, 1, torch.where(unknown, IGNORED, 0))


# -- files of the authors ----------------------------------------------------------------------------------------------

OFFICIAL_KEYS: tuple = (
    (r"^preprocess\.multi_scale_top_layers\.5\.linear\.", "encoder.point.0."),
    (r"^preprocess\.multi_scale_top_layers\.5\.weight_linear\.", "encoder.weight.0."),
    (r"^preprocess\.multi_scale_top_layers\.1\.linear\.", "encoder.point.1."),
    (r"^preprocess\.multi_scale_top_layers\.1\.weight_linear\.", "encoder.weight.1."),
    (r"^preprocess\.aggtopmeanproj\.", "encoder.gate."),
    (r"^preprocess\.aggtopproj\.", "encoder.proj."),
    (r"^preprocess\.aggfusion\.", "encoder.fusion."),
    (r"^sem_branch\.", "semantic."),
    (r"^com_branch\.", "geometric."),
    (r"^bev_model\.", "unet."),
    (r"\.conv(\d)_block\.spconv_layers\.0\.", lambda found: f".convs.{int(found[1]) - 1}."),
    (r"\.layers_in\.0\.", ".shortcut."),
    (r"\.layers_in\.1\.", ".norm0."),
    (r"^(semantic\.convs\.\d)\.layers\.0\.", r"\1.conv1."),
    (r"^(semantic\.convs\.\d)\.layers\.1\.", r"\1.norm1."),
    (r"^(semantic\.convs\.\d)\.layers\.3\.", r"\1.conv2."),
    (r"^(semantic\.convs\.\d)\.layers\.4\.", r"\1.norm2."),
    (r"\.proj(\d)_block\.", lambda found: f".pools.{int(found[1]) - 1}."),
    (r"\.feature_reduce\.", ".reduce."),
    (r"\.fc_list\.(\d)\.0\.", r".each.\1."),
    (r"\.fcs\.(\d)\.0\.", r".gates.\1."),
    (r"\.fc\.0\.", ".all."),
    (r"\.out_fc\.", ".out."),
    (r"\.linear_output\.", ".output."),
    (r"\.rwkv_block(\d)\.", lambda found: f".blocks.{int(found[1]) - 1}."),
    (r"\.out([248])\.", lambda found: f".heads.{int(found[1]).bit_length() - 2}."),
    (r"^geometric\.in_layer\.", "geometric.stem."),
    (r"^geometric\.block_1\.0\.", "geometric.stages.0."),
    (r"^geometric\.block_(\d)\.", lambda found: f"geometric.stages.{int(found[1]) - 1}."),
    (r"^geometric\.reduction_(\d)\.", lambda found: f"geometric.reductions.{int(found[1]) - 1}."),
    (r"^unet\.inc\.conv\.0\.", "unet.norm."),
    (r"^unet\.inc\.conv\.1\.conv\.", "unet.stem."),
    (r"^unet\.down(\d)\.mpconv\.1\.conv\.", lambda found: f"unet.downs.{int(found[1]) - 1}."),
    (r"^unet\.up(\d)\.conv\.conv\.", lambda found: f"unet.ups.{int(found[1]) - 1}."),
    (r"^unet\.outc\.conv\.", "unet.last."),
    (r"\.bev_fusions\.", ".fusions."),
    (r"\.attention_bev\.1\.", ".attend.0."),
    (r"\.attention_sem\.1\.", ".attend.1."),
    (r"\.attention_com\.1\.", ".attend.2."),
    (r"\.adapter_sem\.", ".adapt.1."),
    (r"\.adapter_com\.", ".adapt.2."),
)


# -- models -----------------------------------------------------------------------------------------------------------

register(
    OccRWKV,
    task="point-occupancy",
    family="occrwkv",
    paper="ICRA 2025, arXiv 2409.19987",
    code="https://github.com/jmwang0117/OccRWKV",
    licence="none",
    data="SemanticKITTI",
    classifier="unet.last",
    inputs=((120000, 4),),
    models={
        "occrwkv_semantickitti": {
            "params": 33.173,
            "preprocess": {"scan_features": ("intensity",)},
            "weights": {
                "semantickitti": {
                    "page": "https://github.com/jmwang0117/OccRWKV",
                    "metrics": {"miou": 25.1},
                },
            },
        },
    },
)
