"""A class for every point: the tokens of a patch backbone after several blocks, taken to the points.

PointMamba's part segmentation (first release): "PointMamba: A Simple State Space Model for Point Cloud Analysis", Liang
et al., NeurIPS 2024, arXiv 2402.10739. Official code: github.com/LMD0311/PointMamba, branch "old" (Apache-2.0). The
decoder is that of Point-MAE (arXiv 2203.06604), after PointNet++'s feature propagation (arXiv 1706.02413).
"""

from typing import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import zoo
from ...backbones.points.contract import PatchBackbone, as_linear, register
from ...checkpoint import rename
from ...errors import InputError
from ...layers.points import Lengths, interpolate, pack, pad

__all__ = ["PointSegmenter"]


class PointSegmenter(nn.Module):
    """Clouds, and what kind of object each shows, -> the classes of all points.

    Tokens after some blocks, side by side, say what a patch is; their maximum and mean what the cloud is. Each point
    gets what its nearest patches are, joins its coordinates, what the cloud is, and its category.

    Args:
        num_classes: of points, of all categories together.
        num_categories: kinds of objects; 0: not told.
        backbone: the name of a backbone of patches.
        backbone_args: its arguments.
        taps: blocks whose tokens are taken.
        neighbours: patches that a point's features are interpolated from. The published weights were trained with 1:
            three neighbours are sought among the three copies of each patch, and found in those of the nearest.
        widths: channels of a point before and after it joins what the cloud is; of the classifier's hidden layers.
        drop_rate: dropout in the classifier.
        drop_path_rate: of the backbone.

    Raises:
        InputError: the backbone is not one of patches, or has no such blocks.
    """

    classifiers = ("category", "spread", "head")
    unit = "points"

    def __init__(
        self,
        num_classes: int = 50,
        num_categories: int = 16,
        backbone: str = "pointmamba_old_modelnet40",
        backbone_args: Mapping | None = None,
        taps: Sequence[int] = (3, 7, 11),
        neighbours: int = 1,
        widths: Sequence[int] = (1536, 1024, 512, 256),
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if not issubclass(zoo.find(backbone).cls, PatchBackbone):
            raise InputError(f"points are segmented by a backbone of patches, which {backbone} is not")
        args = {"drop_path_rate": drop_path_rate, **(backbone_args or {}), "num_classes": 0}
        trunk = zoo.create_model(backbone, **args)
        if trunk.class_token == "tail":
            raise InputError("no patch reads a class token at the end of the stream: build the backbone without")
        self.taps = trunk.prune_intermediate_layers(list(taps))
        self.trunk, self.in_chans = trunk, trunk.in_chans
        self.num_classes, self.num_categories, self.neighbours = num_classes, num_categories, neighbours
        wide, narrow, hidden, last = widths
        tokens = len(self.taps) * trunk.embed_dim
        of_cloud = 2 * tokens
        self.category = None
        if num_categories:
            of_cloud += 64
            self.category = nn.Sequential(
                nn.Linear(num_categories, 64, bias=False), nn.BatchNorm1d(64), nn.LeakyReLU(0.2)
            )
        self.spread = nn.Sequential(
            nn.Linear(3 + tokens, wide), nn.BatchNorm1d(wide), nn.ReLU(inplace=True),
            nn.Linear(wide, narrow), nn.BatchNorm1d(narrow), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Linear(narrow + of_cloud, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Dropout(drop_rate),
            nn.Linear(hidden, last), nn.BatchNorm1d(last), nn.ReLU(inplace=True), nn.Linear(last, num_classes),
        )  # fmt: skip

    def forward(self, points: Tensor, category: Tensor | None = None, lengths: Lengths = None) -> Tensor:
        """The logits of all points.

        Args:
            points: (B, N, in_chans) or packed (N, in_chans), with `lengths`.
            category: (B,) indices, or (B, num_categories) with a weight for each; None without categories.

        Returns:
            (B, N, num_classes), or (N, num_classes) for packed points; zeros where a padded cloud has ended.

        Raises:
            InputError: not such clouds, or a category is missing or unknown.
        """
        found = self.trunk.group(points, lengths)
        tokens = torch.cat(self.trunk.forward_intermediates(found, self.taps, norm=True)[1], -1)
        of_cloud = [tokens.amax(1), tokens.mean(1)]
        if self.category is not None:
            of_cloud.append(self.category(self.weights_of(category, len(tokens), tokens)))
        of_cloud = torch.cat(of_cloud, -1)

        padded = points.ndim == 3
        clouds = len(tokens)
        sizes = [points.shape[-2]] * clouds if lengths is None else [int(n) for n in lengths]
        xyz = (pack(points, sizes) if padded else points)[:, :3]
        # Linear maps of what all points of a patch, or of a cloud, have in common are computed once for all of them.
        layer, *rest = self.spread
        patches = tokens.unflatten(1, (-1, found.centres.shape[1])).mean(1)  # a patch may have several copies
        patches = F.linear(patches, layer.weight[:, 3:])
        x = interpolate(patches, found.centres, xyz, None, sizes, self.neighbours)
        x = x + F.linear(xyz.to(layer.weight.dtype), layer.weight[:, :3], layer.bias)
        x = nn.Sequential(*rest)(x)
        layer, *rest = self.head
        of_cloud = F.linear(of_cloud, layer.weight[:, x.shape[1] :], layer.bias)
        each = torch.tensor(sizes, device=x.device)
        which = torch.arange(clouds, device=x.device).repeat_interleave(each, output_size=len(x))
        x = F.linear(x, layer.weight[:, : x.shape[1]]) + of_cloud[which]
        x = nn.Sequential(*rest)(x)
        return F.pad(pad(x, sizes), (0, 0, 0, points.shape[1] - max(sizes))) if padded else x

    def weights_of(self, category: Tensor | None, clouds: int, like: Tensor) -> Tensor:
        """Categories as weights (B, num_categories)."""
        if category is None or category.shape[:1] != (clouds,):
            raise InputError(f"{clouds} clouds are segmented by their {clouds} categories, which are not given")
        if category.ndim == 2:
            return category.to(like.dtype)
        if not bool(((category >= 0) & (category < self.num_categories)).all()):
            raise InputError(f"categories are numbers from 0 to {self.num_categories - 1}, got {category.tolist()}")
        return F.one_hot(category.long(), self.num_categories).to(like.dtype)

    # -- training ---------------------------------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.trunk.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Those of the backbone."""
        return {f"trunk.{name}" for name in self.trunk.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning-rate decay: the backbone's, then all else."""
        own = self.trunk.group_matcher(coarse)
        blocks = [(pattern.replace("^", r"^trunk\."), order) for pattern, order in own["blocks"]]
        return {"stem": own["stem"].replace("^", r"^trunk\."), "blocks": blocks}

    # -- weights ----------------------------------------------------------------------------------------------------

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keys of an official file, of our own, or of a backbone alone (a classifier's, or pre-trained), to ours."""
        if any(key.startswith("trunk.") for key in state):
            return state
        state = as_linear(state)
        own = rename({key: x for key, x in state.items() if key.startswith(DECODER)}, OFFICIAL_NAMES)
        trunk = self.trunk.checkpoint_filter({key: x for key, x in state.items() if not key.startswith(DECODER)})
        there = {key: x for key, x in trunk.items() if not key.startswith("head.")}
        return {f"trunk.{key}": x for key, x in there.items()} | own


DECODER = ("label_conv.", "propagation_0.", "convs", "bns")
OFFICIAL_NAMES = (
    (r"^label_conv\.", "category."),
    (r"^propagation_0\.mlp_convs\.0", "spread.0"),
    (r"^propagation_0\.mlp_bns\.0", "spread.1"),
    (r"^propagation_0\.mlp_convs\.1", "spread.3"),
    (r"^propagation_0\.mlp_bns\.1", "spread.4"),
    (r"^convs1", "head.0"),
    (r"^bns1", "head.1"),
    (r"^convs2", "head.4"),
    (r"^bns2", "head.5"),
    (r"^convs3", "head.7"),
)


# -- models -----------------------------------------------------------------------------------------------------------

FILES = "https://github.com/LMD0311/PointMamba/releases/download/ckpts/"

register(
    PointSegmenter,
    task="point-segmentation",
    family="pointmamba",
    paper="NeurIPS 2024, arXiv 2402.10739",
    code="https://github.com/LMD0311/PointMamba",
    licence="Apache-2.0",
    data="ShapeNetPart",
    classifier="head.7",
    inputs=((2048, 3), (16,)),
    models={
        "pointmamba_old_shapenetpart": {
            "args": {"backbone_args": {"groups": 128}},
            "params": 17.360,
            "preprocess": {"up": "y"},
            "weights": {
                "shapenet55_ft": {"url": FILES + "part_seg_pretrain.pth", "metrics": {"instance_miou": 86.0}},
                "scratch": {"url": FILES + "part_seg_scratch.pth", "metrics": {"instance_miou": 85.8}},
            },
        },
    },
)
