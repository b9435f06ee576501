"""MambaAD: a decoder of state-space and convolution branches rebuilds the features of a frozen teacher.

Paper: "MambaAD: Exploring State Space Models for Multi-class Unsupervised Anomaly Detection", He et al., NeurIPS 2024,
arXiv 2404.06564. Official code: github.com/lewandofskee/MambaAD, without a licence. Written from the paper and the
published weights.

    image -> teacher (frozen) -> three maps -> bottleneck -> decoder -> the three maps again

Trained on normal images, the decoder rebuilds what is normal; the anomaly map is the distance between the two. The
bottleneck has few cells, so that a defect does not get through it.
"""

from typing import Iterable, Sequence

import timm
import torch
from timm.layers import calculate_drop_path_rates
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from ...checkpoint import fit, fit_shapes, rename
from ...errors import InputError, known
from ...layers.blocks import Block, Stage
from ...layers.linear import init_linear, linear
from ...layers.ss2d import SS2D, SS2D_NAMES
from ...layers.stems import ChannelsFirst, PatchExpand
from ...zoo import register
from .maps import distance_map, gaussian_blur

__all__ = ["Decoder", "HybridStage", "MambaAD", "routes_of"]


# -- the decoder, over maps (B, H, W, C) ------------------------------------------------------------------------------


def routes_of(curve: str, directions: int) -> str:
    """The routes of the hybrid scan, in the order of their parameters.

    The curve over the map, over its transpose, over the map turned counter-clockwise, and over the transpose of that;
    then the same backwards. Of fewer directions there are the first ones and their reverses.

    Args:
        curve: of `linescan.scans.routes`: the paper's sweep is "row", its scan "snake"; the others are "zigzag",
            "zorder" and "hilbert".
        directions: 2, 4 or 8.

    Raises:
        InputError: another number.
    """
    turns = ["", "T:", "rot90:", "rot90:T:"][: known("directions", directions, (2, 4, 8)) // 2]
    return ", ".join(f"{sign}{turn}{curve}" for sign in ("", "-") for turn in turns)


def _normed(conv: nn.Conv2d) -> tuple[nn.Module, ...]:
    return conv, nn.InstanceNorm2d(conv.out_channels), nn.SiLU()


class LocalBranch(ChannelsFirst):
    """A depthwise convolution between two of 1x1, each with InstanceNorm and SiLU.

    Args:
        dim: channels in and out.
        kernel_size: side of the depthwise convolution.
    """

    def __init__(self, dim: int, kernel_size: int):
        inner = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        super().__init__(*_normed(nn.Conv2d(dim, dim, 1)), *_normed(inner), *_normed(nn.Conv2d(dim, dim, 1)))


class _Official(nn.Module):
    """Loads files with the official names of its parts."""

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The official code's keys to linescan's, in both of its spellings; without the tables of its scans, which are
        computed, and a convolution that it never uses."""
        kept = {key: value for key, value in state.items() if ".scans.index_flat" not in key and "conv33." not in key}
        return fit_shapes(rename(kept, OFFICIAL_NAMES), self)


class HybridStage(_Official):
    """Scans of the whole map, beside two branches of convolutions ("locality-enhanced state space module").

        y = x + fuse(cat[scans(x), local5(x), local7(x)])

    Args:
        dim: channels C.
        depth: blocks of scans, one after the other.
        routes: of each, see `routes_of`.
        d_state: N, states per channel.
        drop_path: rate of stochastic depth, of all blocks.
    """

    def __init__(self, dim: int, depth: int, routes: str, d_state: int = 16, drop_path: float = 0.0):
        super().__init__()
        mixers = (SS2D(dim, routes, d_state=d_state) for _ in range(depth))
        self.scans = Stage(None, (Block(dim, mixer, drop_path=drop_path) for mixer in mixers))
        self.local5, self.local7 = LocalBranch(dim, 5), LocalBranch(dim, 7)
        self.fuse = nn.Linear(3 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + linear(self.fuse, torch.cat([self.scans(x), self.local5(x), self.local7(x)], -1))


class Decoder(_Official):
    """Features (B, dims[0], h, w) -> maps (B, C, 2^i h, 2^i w) of the stages but the first, the largest one first.

    Args:
        dims: channels of the stages.
        depths: blocks of scans in each: in stages of three where three divides them, else of two, else of one.
        routes: of the scans.
        d_state: states per channel.
        drop_path_rate: stochastic depth, from this at the first stage to 0 at the last.
    """

    def __init__(
        self,
        dims: Sequence[int] = (512, 256, 128, 64),
        depths: Sequence[int] = (3, 4, 6, 3),
        routes: str = routes_of("hilbert", 8),
        d_state: int = 16,
        drop_path_rate: float = 0.2,
    ):
        super().__init__()
        rates = calculate_drop_path_rates(drop_path_rate, sum(depths))[::-1]

        def stages(level: int) -> Iterable[nn.Module]:
            depth = depths[level]
            each = next(size for size in (3, 2, 1) if depth % size == 0)
            first = sum(depths[:level])
            return (HybridStage(dims[level], each, routes, d_state, rates[first + i]) for i in range(depth // each))

        self.levels = nn.ModuleList(
            Stage(PatchExpand(dims[i - 1], dims[i]) if i else None, stages(i)) for i in range(len(dims))
        )
        self.apply(init_linear)
        for branch in self.modules():
            for conv in branch if isinstance(branch, LocalBranch) else ():
                if isinstance(conv, nn.Conv2d):
                    fan_out = conv.out_channels // conv.groups * conv.kernel_size[0] ** 2
                    nn.init.normal_(conv.weight, std=(2 / fan_out) ** 0.5)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = x.permute(0, 2, 3, 1), []
        for level in self.levels:
            x = level(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps[:0:-1]


# -- the whole --------------------------------------------------------------------------------------------------------


class _ConvNorm(nn.Sequential):
    def __init__(self, dim: int, out_dim: int, stride: int = 1):
        conv = nn.Conv2d(dim, out_dim, 3, 2, 1, bias=False) if stride == 2 else nn.Conv2d(dim, out_dim, 1)
        super().__init__(conv, nn.BatchNorm2d(out_dim), nn.ReLU())


class Bottleneck3(nn.Module):
    """Three maps, each of half the side of the one before, to one of half the side of the last, of twice its channels.

    "Half-FPN": level by level, a map is halved and added to the next; then residual bottlenecks.

    Args:
        dims: channels of the maps.
        depth: residual bottlenecks.
    """

    def __init__(self, dims: Sequence[int], depth: int = 3):
        super().__init__()
        first, second, third = dims
        self.down1, self.down2 = _ConvNorm(first, second, 2), _ConvNorm(second, third, 2)
        self.lateral1, self.lateral2 = _ConvNorm(second, second), _ConvNorm(third, third)
        self.fuse = _ConvNorm(third, third)
        out = 2 * third
        shortcut = nn.Sequential(nn.Conv2d(third, out, 1, 2, bias=False), nn.BatchNorm2d(out))
        halve = Bottleneck(third, out // 4, stride=2, downsample=shortcut)
        self.blocks = nn.Sequential(halve, *(Bottleneck(out, out // 4) for _ in range(depth - 1)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        first, second, third = maps
        x = self.lateral1(second) + self.down1(first)
        x = self.lateral2(third) + self.down2(x)
        return self.blocks(self.fuse(x))


class MambaAD(_Official):
    """Images (B, 3, H, W) -> a frozen teacher's maps, and what was rebuilt of them; sides are multiples of 32.

    `anomaly_maps` makes one map of the two. Only bottleneck and decoder want gradients; the teacher stays in evaluation
    mode, and its weights are part of the model's files.

    Args:
        teacher: a model of timm with maps of strides 4, 8 and 16; those of the zoo have a ResNet-34.
        curve, directions: of the scans, see `routes_of`.
        depths: blocks of scans at each level, from the smallest map to the largest.
        d_state: states per channel of the scans.
        drop_path_rate: stochastic depth of the decoder.
        sigma: of the Gaussian, in pixels, that blurs anomaly maps.
        mean, std: of the channels, by which images are normalised; by default as timm has them for the teacher.

    Raises:
        InputError: no such teacher, or one with other strides.
    """

    in_chans = 3
    pretrained_cfg = {
        "input_size": (3, 256, 256), "interpolation": "bilinear", "crop_pct": 1.0,
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    }  # fmt: skip

    def __init__(
        self,
        teacher: str = "resnet34.bt_in1k",
        curve: str = "hilbert",
        directions: int = 8,
        depths: Sequence[int] = (3, 4, 6, 3),
        d_state: int = 16,
        drop_path_rate: float = 0.2,
        sigma: float = 4.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        self.sigma, self.teacher_name = sigma, teacher
        self.teacher = _frozen(teacher)
        told = self.teacher.pretrained_cfg
        normalised = {"mean": tuple(mean or told["mean"]), "std": tuple(std or told["std"])}
        self.pretrained_cfg = {**self.pretrained_cfg, **normalised}
        dims = self.teacher.feature_info.channels()
        self.bottleneck = Bottleneck3(dims)
        self.decoder = Decoder(
            (2 * dims[-1], *dims[::-1]), depths, routes_of(curve, directions), d_state, drop_path_rate
        )

    def load_teacher(self, state: dict[str, Tensor], source: str) -> None:
        """The teacher's weights, out of those of a whole classifier; what lies above its maps is left out.

        Raises:
            CheckpointError: they are of another model.
        """
        fit(self.teacher, state, source, dropped=lambda key: True, name="teacher")

    def train(self, mode: bool = True) -> "MambaAD":
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's maps, of strides 4, 8 and 16, and the rebuilt ones.

        Raises:
            InputError: a side that 32 does not divide, or of less than 64 pixels.
        """
        height, width = x.shape[-2:]
        if height % 32 or width % 32 or min(height, width) < 64:
            raise InputError(f"MambaAD reads images whose sides are multiples of 32, from 64 on, not {height}x{width}")
        with torch.no_grad():
            maps = self.teacher(x)
        return maps, self.decoder(self.bottleneck(maps))

    def anomaly_maps(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> blurred anomaly maps (B, H, W), at least float32; an image's score is its maximum."""
        targets, rebuilt = self(x)
        return gaussian_blur(distance_map(targets, rebuilt, x.shape[-2:]), self.sigma)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the decoder's activations in the backward pass, block by block."""
        for level in self.decoder.levels:
            for stage in level.blocks:
                stage.scans.grad_checkpointing = enable


def _frozen(name: str) -> nn.Module:
    """A model of timm that gives maps of strides 4, 8 and 16, without its weights."""
    for levels in ((1, 2, 3), (0, 1, 2)):  # of networks with a stem of stride 2, and of stride 4
        try:
            teacher = timm.create_model(name, features_only=True, pretrained=False, out_indices=levels)
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise InputError(f"{name} cannot be a teacher: {error}") from None
        if teacher.feature_info.reduction() == [4, 8, 16]:
            return teacher.eval().requires_grad_(False)
    raise InputError(f"{name} cannot be a teacher: it gives no maps of strides 4, 8 and 16")


OFFICIAL_NAMES = (
    (r"^net_t\.", "teacher."),
    (r"^net_s\.", "decoder."),
    (r"^mff_oce\.", "bottleneck."),
    (r"^bottleneck\.conv(1|21|31|2|f)\.", r"bottleneck.\1.0."),
    (r"^bottleneck\.bn(1|21|31|2|f)\.", r"bottleneck.\1.1."),
    (r"^bottleneck\.([12])\.", r"bottleneck.down\1."),
    (r"^bottleneck\.([23])1\.", lambda m: f"bottleneck.lateral{int(m[1]) - 1}."),
    (r"^bottleneck\.f\.", "bottleneck.fuse."),
    (r"^bottleneck\.bn_layer\.", "bottleneck.blocks."),
    (r"(^|\.)layers_up\.", r"\1levels."),
    (r"\.upsample\.", ".downsample."),
    (r"(^|\.)smm_blocks\.", r"\1scans.blocks."),
    (r"\.ln_1\.", ".norm1."),
    (r"\.self_attention\.", ".mixer."),
    (r"(^|\.)conv1b([357])\.", lambda m: f"{m[1]}local{m[2].replace('3', '7')}.0."),
    (r"(^|\.)conv1a([357])\.", lambda m: f"{m[1]}local{m[2].replace('3', '7')}.6."),
    (r"(^|\.)conv([57])\2\.", r"\1local\2.3."),
    (r"(local[57]\.\d)\.0\.", r"\1."),
    (r"(^|\.)finalconv11\.", r"\1fuse."),
    *SS2D_NAMES,
)


# -- the zoo ----------------------------------------------------------------------------------------------------------


def _weights(data: str, *results: float, **where: str) -> dict:
    """Weights of a data set, and their image and pixel AUROC, AP and F1, and AUPRO, in per cent."""
    names = "image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_f1_steps", "aupro"
    return {"data": data, "metrics": dict(zip(names, results)), **where}


HUB = "https://huggingface.co/Lewandofski/MambaAD/tree/main/"

register(
    MambaAD,
    {
        "mambaad_resnet34": {
            "params": 25.615,
            "weights": {
                "mvtec": _weights("MVTec-AD", 98.6, 99.6, 97.8, 97.7, 56.3, 59.2, 93.1, file="mvtec/mambaad_mvtec.pth"),
                "visa": _weights("VisA", 94.3, 94.5, 89.4, 98.5, 39.4, 44.0, 91.0, file="visa/mambaad_visa.pth"),
                "realiad": _weights("Real-IAD", 86.3, 84.6, 77.0, 98.5, 33.0, 38.7, 90.5, page=HUB + "realiad"),
                "medical": _weights("Uni-Medical", 83.7, 80.1, 82.0, 96.9, 45.4, 47.3, 87.5, page=HUB + "medical"),
                "cocoad": _weights("COCO-AD", 63.9, 56.2, 63.2, 69.3, 16.9, 22.2, 40.5, page=HUB + "cocoad/coco0"),
                "mvtec3d": _weights("MVTec-3D", 86.2, 95.8, 92.8, 98.6, 37.5, 41.1, 93.6, page=HUB + "mvtec3d"),
            },
        },
    },
    task="anomaly",
    hub="Lewandofski/MambaAD",
    inputs=((3, 256, 256),),
    paper="NeurIPS 2024, arXiv 2404.06564",
    code="https://github.com/lewandofskee/MambaAD",
    licence="none",
)
