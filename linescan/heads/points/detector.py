"""Boxes around objects in LiDAR scans: LION's detectors, from points to boxes.

Paper: "LION: Linear Group RNN for 3D Object Detection in Point Clouds", Liu et al., NeurIPS 2024, arXiv 2407.18232.
Official code: github.com/happinesslz/LION (Apache-2.0), a fork of OpenPCDet (Apache-2.0), whose encoder of voxels and
networks on maps of the ground are restated here. The heads are in `linescan.heads.points.box_heads`.

    points --VoxelEncoder--> voxels --LION--> voxels of two heights --GroundNet--> a map of the ground --head--> boxes
"""

from typing import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.points.contract import check_clouds
from ...backbones.points.lion import LION
from ...checkpoint import rename
from ...errors import InputError, known
from ...layers.boxes import Boxes
from ...layers.norm import RowNorm
from ...layers.points import Lengths
from ...layers.sparse import SparseTensor, from_spconv, scatter, voxelize
from ...zoo import register
from .box_heads import HEADS, Grid, Targets, in_float32

__all__ = ["GroundNet", "VoxelDetector", "VoxelEncoder"]

NORM = {"eps": 1e-3, "momentum": 0.01}


class VoxelEncoder(nn.Module):
    """Points into voxels, without a limit on either; a small PointNet makes the features of a voxel.

    A point is its row, and how far it is from the mean of its voxel's points and from the voxel's centre. It goes
    through two layers; after the first, the maximum over its voxel joins it, after the second the maximum is the voxel.

    Args:
        in_chans: channels of a point, x y z first.
        dim: channels of a voxel.
        low, high, cells: the grid, x first (`linescan.layers.sparse.voxelize`).
    """

    def __init__(self, in_chans: int, dim: int, low: Sequence[float], high: Sequence[float], cells: Sequence[int]):
        super().__init__()
        self.low, self.high, self.cells = tuple(low), tuple(high), tuple(cells)
        self.linear1, self.norm1 = nn.Linear(in_chans + 6, dim // 2, bias=False), RowNorm(dim // 2, **NORM)
        self.linear2, self.norm2 = nn.Linear(dim, dim, bias=False), RowNorm(dim, **NORM)

    def forward(self, points: Tensor, lengths: Lengths = None) -> SparseTensor:
        """Clouds (B, N, in_chans), or packed (N, in_chans) with lengths -> the voxels that hold points."""
        sites, index = voxelize(points, self.low, self.high, self.cells, lengths)
        index = index.flatten()
        inside = index >= 0
        rows, index = points.flatten(0, -2)[inside], index[inside]
        size = rows.new_tensor([(b - a) / n for a, b, n in zip(self.low, self.high, self.cells)])
        centre = (sites.coords[:, [3, 2, 1]] + 0.5) * size + rows.new_tensor(self.low)
        mean = scatter(rows[:, :3], index, len(sites), "mean")
        x = torch.cat([rows, rows[:, :3] - mean[index], rows[:, :3] - centre[index]], 1).to(self.linear1.weight.dtype)
        x = F.relu(self.norm1(self.linear1(x)))
        x = torch.cat([x, scatter(x, index, len(sites), "max")[index]], 1)
        x = F.relu(self.norm2(self.linear2(x)))
        return SparseTensor(scatter(x, index, len(sites), "max"), sites)


class ResidualConv(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, through a 1 x 1 convolution at the beginning of a stage."""

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1, first: bool = False):
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(in_chans, out_chans, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_chans, **NORM),
        )
        self.conv2, self.bn2 = nn.Conv2d(out_chans, out_chans, 3, 1, 1, bias=False), nn.BatchNorm2d(out_chans, **NORM)
        self.shortcut = None
        if first:
            conv = nn.Conv2d(in_chans, out_chans, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_chans, **NORM))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class GroundNet(nn.Module):
    """A map of the ground at several scales, brought to one and joined.

    Args:
        in_chans: channels of the map.
        depths: layers of each scale, after a first one.
        strides: of the first one.
        widths: channels.
        scales: by which each scale is enlarged, or made smaller below 1.
        out_widths: channels of each after that.
        residual: residual blocks, as LION has it for nuScenes and Waymo; or plain convolutions.
    """

    def __init__(
        self,
        in_chans: int,
        depths: Sequence[int] = (5, 5),
        strides: Sequence[int] = (1, 2),
        widths: Sequence[int] = (128, 256),
        scales: Sequence[float] = (1, 2),
        out_widths: Sequence[int] = (256, 256),
        residual: bool = False,
    ):
        super().__init__()
        self.num_features = sum(out_widths)
        self.stages, self.ups = nn.ModuleList(), nn.ModuleList()
        for depth, stride, width, scale, out in zip(depths, strides, widths, scales, out_widths):
            blocks: list[nn.Module] = []
            if residual:
                blocks = [ResidualConv(in_chans, width, stride, first=True)]
                blocks += [ResidualConv(width, width) for _ in range(depth)]
            else:
                for i in range(depth + 1):
                    conv = nn.Conv2d(width if i else in_chans, width, 3, 1 if i else stride, 1, bias=False)
                    blocks += [conv, nn.BatchNorm2d(width, **NORM), nn.ReLU()]
            self.stages.append(nn.Sequential(*blocks))
            if scale >= 1:
                change = nn.ConvTranspose2d(width, out, int(scale), int(scale), bias=False)
            else:
                change = nn.Conv2d(width, out, round(1 / scale), round(1 / scale), bias=False)
            self.ups.append(nn.Sequential(change, nn.BatchNorm2d(out, **NORM), nn.ReLU()))
            in_chans = width

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, Y, X) -> (B, sum of out_widths, Y / stride, X / stride)."""
        found = []
        for stage, up in zip(self.stages, self.ups):
            x = stage(x)
            found.append(up(x))
        return torch.cat(found, 1)


class VoxelDetector(nn.Module):
    """Points of a scan -> boxes.

    `forward` gives the raw answer of the head, `detect` boxes, `losses` what is minimised in training.

    Args:
        num_classes: how many.
        in_chans: channels of a point: x, y, z and what the scanner measured.
        low, high: corners of the space that is searched, x first, in metres.
        cells: voxels along each axis; along z, 2 for each halving of the height, 32.
        backbone: arguments of `linescan.backbones.points.lion.LION`.
        neck: arguments of `GroundNet`; None for a head that reads voxels.
        head: a name of `HEADS`.
        head_args: its arguments.
        stride: voxels along an axis of a cell of the head's map.
        drop_path_rate: stochastic depth of the backbone; None for what `backbone` says.

    Raises:
        InputError: there is no such head, or the grid does not suit the backbone.
    """

    classifiers = ("head",)
    unit = "scans"

    def __init__(
        self,
        num_classes: int = 3,
        in_chans: int = 4,
        low: Sequence[float] = (0.0, -40.0, -3.0),
        high: Sequence[float] = (70.4, 40.0, 1.0),
        cells: Sequence[int] = (352, 400, 32),
        backbone: Mapping | None = None,
        neck: Mapping | None = None,
        head: str = "anchor",
        head_args: Mapping | None = None,
        stride: int = 1,
        drop_path_rate: float | None = None,
    ):
        super().__init__()
        if in_chans < 3:
            raise InputError(f"points have at least 3 channels, their coordinates, not {in_chans}")
        args = dict(backbone or {})
        if drop_path_rate is not None:
            args["drop_path_rate"] = drop_path_rate
        self.backbone = LION(**args)
        height = 2 ** (len(self.backbone.blocks) + 1)
        if len(cells) != 3 or cells[2] != height or cells[0] % 4 or cells[1] % 4:
            raise InputError(
                f"a grid for this backbone is {height} voxels high, and 4 divides its other sides; it is "
                f"{'x'.join(map(str, cells))}"
            )
        if any(a >= b for a, b in zip(low, high)):
            raise InputError(f"a space from {tuple(low)} to {tuple(high)} is empty")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.low, self.high, self.cells = tuple(low), tuple(high), tuple(cells)
        self.encoder = VoxelEncoder(in_chans, self.backbone.dim, low, high, cells)
        sparse = self.backbone.flatten is not None
        self.neck = None if sparse else GroundNet(2 * self.backbone.dim, **(neck or {}))
        size = tuple((b - a) / n * stride for a, b, n in zip(low, high, cells))[:2]
        grid = Grid(self.low[:2], size, (cells[0] // stride, cells[1] // stride))
        chans = self.backbone.dim if sparse else self.neck.num_features
        self.head = HEADS[known("head", head, HEADS)](chans, num_classes, grid, **(head_args or {}))

    def features(self, points: Tensor, lengths: Lengths = None) -> Tensor | SparseTensor:
        """Clouds -> what the head reads: a map (B, C, Y, X), or voxels on the ground.

        Raises:
            InputError: not clouds of `in_chans` channels.
        """
        check_clouds(points, self.in_chans, type(self).__name__)
        x = self.backbone(self.encoder(points, lengths))
        return x if self.neck is None else self.neck(x.dense().flatten(1, 2))

    def forward(self, points: Tensor, lengths: Lengths = None):
        """Clouds (B, N, in_chans), or packed (N, in_chans) with lengths -> the raw answer of the head."""
        return self.head(self.features(points, lengths))

    def detect(self, points: Tensor, lengths: Lengths = None) -> list[Boxes]:
        """Clouds -> the boxes of each, best first; in float32 at least, whatever the network computes in."""
        raw = self(points, lengths)
        with torch.autocast(points.device.type, enabled=False):
            return self.head.decode(in_float32(raw))

    def losses(self, raw, targets: Targets) -> dict[str, Tensor]:
        """Of a raw answer, against the boxes of each cloud (M, 7 or 9) and their classes (M,)."""
        with torch.autocast(targets[0][0].device.type, enabled=False):
            return self.head.losses(in_float32(raw), targets)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute what the operators keep in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    # -- weights ----------------------------------------------------------------------------------------------------

    checkpoint_nesting = ("model_state",)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keys of an official file to ours; own keys pass."""
        if not any(key.startswith("backbone_3d.") for key in state):
            return state
        parts = self.backbone.checkpoint_filter(state)
        out = {f"backbone.{key}": value for key, value in parts.items()}
        rest = {key: x for key, x in state.items() if not key.startswith("backbone_3d.") and key != "global_step"}
        for key, value in rename(rest, OFFICIAL_KEYS).items():
            if key.startswith("stages.") and not self.neck_is_residual():
                key = key.replace(*_without_padding(key))
            key = f"neck.{key}" if key.startswith(("stages.", "ups.")) else key
            if value.ndim == 3 and value.shape[-1] == 1:
                value = value.squeeze(-1)
            out[key] = value
        return from_spconv(out, self)

    def neck_is_residual(self) -> bool:
        """Whether the map goes through residual blocks."""
        return self.neck is not None and any(isinstance(part, ResidualConv) for part in self.neck.modules())


def _without_padding(key: str) -> tuple[str, str]:
    """Plain stages of the authors begin with a layer of zeros, so that all others have numbers of one more."""
    stage, number = key.split(".")[1:3]
    return f"stages.{stage}.{number}.", f"stages.{stage}.{int(number) - 1}."


OFFICIAL_KEYS = (
    (r"^vfe\.pfn_layers\.(\d)\.", lambda found: f"encoder.{int(found[1]) + 1}."),
    (r"^encoder\.(\d)\.(linear|norm)\.", r"encoder.\2\1."),
    (r"^backbone_2d\.blocks\.", "stages."),
    (r"^backbone_2d\.deblocks\.", "ups."),
    (r"\.downsample_layer\.", ".shortcut."),
    (r"^dense_head\.", "head."),
    (r"^head\.shared_conv\.", "head.shared."),
    (r"^head\.heads_list\.(\d)\.heatmap\.", r"head.heads.\1.hm."),
    (r"^head\.heads_list\.", "head.heads."),
    (r"^head\.heatmap_head\.0\.conv\.", "head.heat.0."),
    (r"^head\.heatmap_head\.0\.bn\.", "head.heat.1."),
    (r"^head\.heatmap_head\.1\.", "head.heat.3."),
    (r"^head\.decoder\.multihead_attn\.", "head.cross_attn."),
    (r"^head\.decoder\.self_posembed\.position_embedding_head\.", "head.query_place."),
    (r"^head\.decoder\.cross_posembed\.position_embedding_head\.", "head.key_place."),
    (r"^head\.decoder\.", "head."),
    (r"\.in_proj_(weight|bias)$", r".in_proj.\1"),
    (r"^head\.prediction_head\.(\w+)\.0\.(\d)\.", r"head.predict.\1.\2."),
    (r"^head\.prediction_head\.(\w+)\.1\.", r"head.predict.\1.3."),
)


# -- models -----------------------------------------------------------------------------------------------------------

DRIVE = "https://drive.google.com/file/d/"
RESIDUAL = {
    "depths": (1, 2, 2), "strides": (1, 2, 2), "widths": (128, 128, 256), "out_widths": (128, 128, 128),
    "residual": True,
}  # fmt: skip


FLAT = (25, 37, 51)  # windows on the map of one height
LION_PAPER = {
    "family": "lion",
    "paper": "NeurIPS 2024, arXiv 2407.18232",
    "code": "https://github.com/happinesslz/LION",
    "licence": "Apache-2.0",
}


def published(data: str, operator: str, dim: int, params: float, metrics: Mapping, file: str = "", **backbone) -> dict:
    """Facts of a model: operator and width, million parameters, results, and its file on `DRIVE`, if there is one."""
    heads = {"num_heads": 2 if dim == 64 else 4} if operator == "retnet" else {}
    args = {"backbone": {"dim": dim, "operator": operator, "operator_args": heads, **backbone}}
    weights = {data: {"metrics": metrics, **({"page": DRIVE + file} if file else {})}}
    return {"args": args, "params": params, "weights": weights}


register(
    VoxelDetector,
    task="point-detection",
    **LION_PAPER,
    models={
        "lion_mamba_nuscenes": published(
            "nuscenes", "mamba", 128, 16.124, {"nds": 72.1, "map": 68.0}, "1bBzZcZUukt7B5aD3bmKlM2mT7SL8q3Fv"
        ),
        "lion_retnet_nuscenes": published(
            "nuscenes", "retnet", 128, 19.375, {"nds": 71.9, "map": 67.3}, "1LDM6Iq91muZhzFMMa0WqKtjzJwYVadF6"
        ),
        "lion_rwkv_nuscenes": published("nuscenes", "rwkv", 128, 21.364, {"nds": 71.7, "map": 66.8}),
    },
    data="nuScenes",
    classifier="head.predict.heatmap.3",
    inputs=((30000, 5),),
    preprocess={"scan_features": ("intensity", "time")},
    args={
        "num_classes": 10,
        "in_chans": 5,
        "low": (-54.0, -54.0, -5.0),
        "high": (54.0, 54.0, 3.0),
        "cells": (360, 360, 32),
        "stride": 2,
        "neck": {**RESIDUAL, "scales": (0.5, 1, 2)},
        "head": "transfusion",
        "head_args": {"limits": (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)},
    },
)
register(
    VoxelDetector,
    task="point-detection",
    **LION_PAPER,
    models={
        "lion_mamba_waymo": published(
            "waymo", "mamba", 64, 8.608, {"map_l2": 75.1, "maph_l2": 73.2}, drop_path_rate=0.0
        ),
        "lion_retnet_waymo": published(
            "waymo", "retnet", 64, 9.189, {"map_l2": 74.6, "maph_l2": 72.7}, drop_path_rate=0.0
        ),
        "lion_rwkv_waymo": published(
            "waymo", "rwkv", 64, 10.184, {"map_l2": 74.7, "maph_l2": 72.8}, drop_path_rate=0.0
        ),
        "lion_mamba_large_waymo": published("waymo", "mamba", 128, 16.071, {"map_l2": 75.9, "maph_l2": 74.0}),
    },
    data="Waymo",
    classifier="head.heads.0.hm.1",
    inputs=((180000, 5),),
    preprocess={"scan_features": ("intensity", "elongation")},
    args={
        "num_classes": 3,
        "in_chans": 5,
        "low": (-75.52, -75.52, -2.0),
        "high": (75.52, 75.52, 4.0),
        "cells": (472, 472, 32),
        "neck": {**RESIDUAL, "scales": (1, 2, 4)},
        "head": "center",
        "head_args": {
            "with_iou": True,
            "rectify": (0.68, 0.71, 0.65),
            "iou": (0.75, 0.6, 0.55),
            "limits": (-80.0, -80.0, -10.0, 80.0, 80.0, 10.0),
        },
    },
)
register(
    VoxelDetector,
    task="point-detection",
    **LION_PAPER,
    models={
        "lion_mamba_once": published("once", "mamba", 128, 15.124, {"map": 66.6}),
        "lion_retnet_once": published("once", "retnet", 128, 18.375, {"map": 66.3}),
        "lion_rwkv_once": published("once", "rwkv", 128, 20.364, {"map": 65.8}),
    },
    data="ONCE",
    classifier="head.heads.0.hm.1",
    inputs=((70000, 4),),
    preprocess={"scan_features": ("intensity",)},
    args={
        "num_classes": 5,
        "in_chans": 4,
        "low": (-75.2, -75.2, -5.0),
        "high": (75.2, 75.2, 3.0),
        "cells": (376, 376, 32),
        "head": "center",
        "head_args": {"bias": True, "eps": 1e-5, "weight": 1.0, "limits": (-75.2, -75.2, -5.0, 75.2, 75.2, 3.0)},
    },
)
register(
    VoxelDetector,
    task="point-detection",
    **LION_PAPER,
    models={
        "lion_mamba_argoverse2": published(
            "argoverse2", "mamba", 128, 15.753, {"map": 41.5}, "1NfgKZZZJDodhWnp-Yi3Bi-yXHWM9mW1U", flat_windows=FLAT
        ),
        "lion_rwkv_argoverse2": published(
            "argoverse2", "rwkv", 128, 21.917, {"map": 41.1}, "15zX5OFvd0WkdE8jsqRXMJ9JdM16gfGkM", flat_windows=FLAT
        ),
        "lion_retnet_argoverse2": published(
            "argoverse2", "retnet", 128, 19.577, {"map": 40.7}, "17ZTdThUvK2tnsz0ZhVUrCuJf3bvxQDTl", flat_windows=FLAT
        ),
    },
    data="Argoverse 2",
    classifier="head.heads.0.hm.1",
    inputs=((90000, 4),),
    preprocess={"scan_features": ("intensity",)},
    args={
        "num_classes": 26,
        "in_chans": 4,
        "low": (-200.0, -200.0, -4.0),
        "high": (200.0, 200.0, 4.0),
        "cells": (1000, 1000, 32),
        "head": "center",
        "head_args": {
            "groups": ((0,), (1, 2, 3, 4), (5, 6, 7, 8, 9, 10), tuple(range(11, 20)), (20, 21, 22, 23, 24), (25,)),
            "shared": 0,
            "sparse": True,
            "weight": 0.25,
            "iou": 0.2,
            "most_before": 1000,
            "most": 83,
            "limits": (-200.0, -200.0, -20.0, 200.0, 200.0, 20.0),
        },
    },
)
register(
    VoxelDetector,
    task="point-detection",
    **LION_PAPER,
    models={
        "lion_mamba_kitti": published("kitti", "mamba", 64, 7.227, {"car": 78.3, "pedestrian": 60.2, "cyclist": 68.6}),
        "lion_rwkv_kitti": published("kitti", "rwkv", 64, 8.802, {"car": 78.3, "pedestrian": 62.2, "cyclist": 71.2}),
        "lion_retnet_kitti": published(
            "kitti", "retnet", 64, 7.808, {"car": 77.9, "pedestrian": 60.2, "cyclist": 69.6}
        ),
        "lion_xlstm_kitti": published("kitti", "xlstm", 64, 7.95, {"car": 77.9, "pedestrian": 59.3, "cyclist": 67.4}),
        "lion_ttt_kitti": published("kitti", "ttt", 64, 7.29, {"car": 78.0, "pedestrian": 58.6, "cyclist": 69.6}),
    },
    data="KITTI",
    classifier="head.conv_cls",
    inputs=((18000, 4),),
    preprocess={"scan_features": ("intensity",)},
    args={
        "head_args": {
            "anchors": (
                {"size": (3.9, 1.6, 1.56), "bottom": -1.78, "matched": 0.6, "unmatched": 0.45},
                {"size": (0.8, 0.6, 1.73), "bottom": -0.6, "matched": 0.5, "unmatched": 0.35},
                {"size": (1.76, 0.6, 1.73), "bottom": -0.6, "matched": 0.5, "unmatched": 0.35},
            ),
        },
    },
)
