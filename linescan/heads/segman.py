"""SegMAN: the decoder that scans three resolutions of the fused features at once (MMSCopE), and the whole model.

Paper: Fu, Lou and Yu, CVPR 2025, arXiv 2412.11890; see `linescan.backbones.segman`. Nothing here needs OpenMMLab: for
mmseg's configs the same decoder is a decode head in `linescan.openmmlab.segman`.
"""

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.feature_maps import DenseBackbone
from ..backbones.segman import PUBLISHED, VARIANTS, SegMANEncoder, from_official, segman_block
from ..errors import InputError
from ..layers.conv_module import conv_module as conv_bn_relu
from ..layers.linear import linear
from ..layers.pyramid import resize
from ..layers.s6 import CROSS
from ..layers.ss2d import MapScan
from ..layers.stems import pad_to_multiple
from ..zoo import register

__all__ = ["MMSCopE", "SegMAN", "SegMANDecoder"]


def conv_module(*args) -> nn.Module:
    """Convolution without bias, BatchNorm, ReLU; with mmcv's initialisation. Arguments as for `layers.conv_module`."""
    module = conv_bn_relu(*args)
    nn.init.kaiming_normal_(module.conv.weight, mode="fan_out", nonlinearity="relu")
    return module


class Projection(nn.Module):
    """Each position of a map through one Linear layer, named as published."""

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__()
        self.proj = nn.Linear(in_chans, out_chans)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.proj, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MMSCopE:
    """What SegMAN's decoder and its head for mmseg share: the fusion of the encoder's maps, on top of an nn.Module.

    Everything happens at stride 8. The fused map x is read at strides 8, 16 and 32, all folded to stride 32 without
    losing a pixel (pixel_unshuffle), and one block scans the three together. A map whose sides 4 does not divide is
    padded by zeros for that, and the result cut to its size.
    """

    def init_fusion(self, in_channels: Sequence[int], channels: int, feat_proj_dim: int, routes: str = CROSS) -> None:
        """Makes the layers; arguments as for `SegMANDecoder`."""
        e, f = channels, feat_proj_dim
        self.conv_downsample_2 = conv_module(e, 2 * e, 3, 2, 1)
        self.conv_downsample_4 = conv_module(e, 4 * e, 5, 4, 1)
        self.linear_c4, self.linear_c3, self.linear_c2 = (Projection(c, f) for c in reversed(in_channels[1:]))
        self.linear_fuse = conv_module(3 * f, e)
        self.reduce_channels = nn.ModuleList(conv_module(n * e, e) for n in (4, 8, 16))
        self.vssm = segman_block(3 * e, MapScan(3 * e, routes=routes), 4 * 3 * e)
        self.short_path = conv_module(e, e)
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_module(e, e))
        self.proj_out = conv_module(3 * e, f)
        self.cat = conv_module(5 * e + 3 * f, e)

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H / s, W / s) of strides s = 4, 8, 16, 32 -> (B, channels, H / 8, W / 8); the first is not used.

        Raises:
            InputError: not four maps.
        """
        if len(maps) != 4:
            raise InputError(f"{type(self).__name__} expects four maps, of strides 4, 8, 16 and 32, got {len(maps)}")
        size = maps[1].shape[-2:]
        c2, c3, c4 = self.linear_c2(maps[1]), self.linear_c3(maps[2]), self.linear_c4(maps[3])
        c3, c4 = resize(c3, size), resize(c4, size)
        x = self.linear_fuse(torch.cat([c4, c3, c2], 1))

        y = pad_to_multiple(x, 4)
        scales = self.conv_downsample_4(y), F.pixel_unshuffle(self.conv_downsample_2(y), 2), F.pixel_unshuffle(y, 4)
        by_4, by_2, full = (reduce(scale) for reduce, scale in zip(self.reduce_channels, scales))
        m = self.vssm(torch.cat([full, by_2, by_4], 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        m = resize(m, y.shape[-2:])[..., : size[0], : size[1]]
        p = self.proj_out(m)
        pooled = self.image_pool(x).expand(-1, -1, *size)
        return self.cat(torch.cat([self.short_path(x), pooled, m, c2 + p, c3 + p, c4 + p], 1))

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The official code's keys to linescan's."""
        return from_official(state, self)


class SegMANDecoder(MMSCopE, nn.Module):
    """SegMAN's decoder: four maps of an encoder -> logits (B, num_classes, H / 8, W / 8).

    Args:
        in_channels: channels of the maps of strides 4, 8, 16 and 32.
        channels: e, of the fused map.
        feat_proj_dim: f, that each map is projected to.
        num_classes: classes.
        dropout_ratio: of whole channels before the classifier.
        routes: of the scan (`linescan.scans.routes`).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        feat_proj_dim: int,
        num_classes: int = 150,
        dropout_ratio: float = 0.1,
        routes: str = CROSS,
    ):
        super().__init__()
        self.init_fusion(in_channels, channels, feat_proj_dim, routes)
        self.dropout = nn.Dropout2d(dropout_ratio)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.conv_seg(self.dropout(self.fuse(maps)))


class SegMAN(nn.Module):
    """The segmentation model: encoder and decoder. Published mmcv files load with `linescan.load_checkpoint`.

    `forward` gives logits of the image's size; losses are usually taken on these, too.

    Args:
        backbone: arguments of the encoder, a `SegMANEncoder`.
        channels, feat_proj_dim, num_classes, dropout_ratio, routes: of `SegMANDecoder`.
    """

    classifiers = ("decode_head.conv_seg",)

    def __init__(
        self,
        backbone: dict,
        channels: int,
        feat_proj_dim: int,
        num_classes: int = 150,
        dropout_ratio: float = 0.1,
        routes: str = CROSS,
    ):
        super().__init__()
        self.backbone = DenseBackbone(SegMANEncoder(**{**backbone, "num_classes": 0, "projection": 0}))
        widths = self.backbone.out_channels
        self.decode_head = SegMANDecoder(widths, channels, feat_proj_dim, num_classes, dropout_ratio, routes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) -> the encoder's maps (B, C, H / s, W / s), strides s = 4, 8, 16, 32."""
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes, H, W)."""
        return resize(self.decode_head(self.forward_features(x)), x.shape[-2:])

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys, `backbone.` and `decode_head.`, to linescan's."""
        out = dict(state)
        for name, part in self.named_children():
            inner = {key: out.pop(key) for key in list(out) if key.startswith(f"{name}.")}
            inner = part.checkpoint_filter({key[len(name) + 1 :]: value for key, value in inner.items()})
            out |= {f"{name}.{key}": value for key, value in inner.items()}
        return out


# -- models ----------------------------------------------------------------------------------------------------------


def _weights(miou: tuple[float, float, float], cityscapes: dict) -> dict:
    """The published files: mIoU on ADE20K, Cityscapes and COCO-Stuff; what else differs for Cityscapes."""
    ade20k, city, coco = miou
    args = {"num_classes": 19, **cityscapes.pop("args", {})}
    shape = {"inputs": ((3, 1024, 2048),), "args": args, **cityscapes}
    return {
        "ade20k": {"data": "ADE20K", "metrics": {"mIoU": ade20k}},
        "cityscapes": {"data": "Cityscapes", "metrics": {"mIoU": city}, **shape},
        "coco_stuff": {"data": "COCO-Stuff", "metrics": {"mIoU": coco}, "args": {"num_classes": 171}},
    }


register(
    SegMAN,
    {
        "segman_seg_tiny": {
            "args": {"backbone": VARIANTS["segman_tiny"], "channels": 128, "feat_proj_dim": 192},
            "params": 6.397,
            "gmacs": 6.2,
            # The published file for Cityscapes has 150 classes, too.
            "weights": _weights((43.0, 80.3, 41.3), {"gmacs": 52.5, "args": {"num_classes": 150}}),
        },
        "segman_seg_small": {
            "args": {"backbone": VARIANTS["segman_small"], "channels": 144, "feat_proj_dim": 288},
            "params": 29.425,
            "gmacs": 25.3,
            "weights": _weights((51.3, 83.2, 47.5), {"gmacs": 218.4, "params": 29.97, "args": {"channels": 152}}),
        },
        "segman_seg_base": {
            "args": {"backbone": VARIANTS["segman_base"], "channels": 180, "feat_proj_dim": 320},
            "params": 51.803,
            "gmacs": 58.1,
            "weights": _weights((52.6, 83.8, 48.4), {"gmacs": 479.0}),
        },
        "segman_seg_large": {
            "args": {"backbone": VARIANTS["segman_large"], "channels": 224, "feat_proj_dim": 432},
            "params": 92.336,
            "gmacs": 97.1,
            "weights": _weights((53.2, 84.2, 48.8), {"gmacs": 769.0}),
        },
    },
    **PUBLISHED,
    task="segmentation",
    page="https://drive.google.com/drive/folders/1C2bmb7KP7mECm9c04NCrUAJQGsEf_bQ4",
    first_conv="backbone.trunk.patch_embed.0",
    classifier="decode_head.conv_seg",
    inputs=((3, 512, 512),),
    # As published for ADE20K: the shorter side 512, the longer 2048 at most, both multiples of 32.
    preprocess={
        "scale": (2048, 512),
        "divisor": 32,
        "min_size": 224,  # what its neighbourhoods fit into
        "mean": (123.675, 116.28, 103.53),
        "std": (58.395, 57.12, 57.375),
    },
)
