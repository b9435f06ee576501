"""Mamba-ND with UNETR's decoder: organs in volumes.

Papers: "Mamba-ND: Selective State Space Modeling for Multi-Dimensional Data", Li et al., ECCV 2024, arXiv 2402.05892;
the decoder is that of "UNETR: Transformers for 3D Medical Image Segmentation", Hatamizadeh et al., WACV 2022,
arXiv 2103.10504. Official code: github.com/jacklishufan/Mamba-ND, folder btcv (no licence is given). Written from the
papers and the published weights.

The encoder's tokens stand every 16 voxels. After a quarter, a half and three quarters of its layers they are enlarged
by transposed convolutions, and joined on the way up from the last.
"""

import torch
from torch import Tensor, nn

from ..backbones.mamband import MambaND3D
from ..checkpoint import rename
from ..errors import InputError
from ..layers.stems import pad_to_multiple
from ..zoo import register

__all__ = ["MambaNDUNETR"]


def enlarge(dim: int, out_dim: int, times: int) -> nn.Sequential:
    """(B, dim, D, H, W) -> (B, out_dim, 2^times D, ...): transposed convolutions with nothing between."""
    widths = [dim, *[out_dim] * times]
    return nn.Sequential(*(nn.ConvTranspose3d(a, b, 2, 2, bias=False) for a, b in zip(widths, widths[1:])))


class ResidualConv(nn.Module):
    """(B, dim, D, H, W) -> (B, out_dim, D, H, W): two convolutions with instance norms, and a shortcut.

    Where the widths differ, the shortcut is a 1x1x1 convolution with a norm.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv1 = nn.Conv3d(dim, out_dim, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(out_dim, out_dim, 3, padding=1, bias=False)
        self.conv3 = nn.Conv3d(dim, out_dim, 1, bias=False) if dim != out_dim else None
        self.norm = nn.InstanceNorm3d(out_dim)
        self.act = nn.LeakyReLU(0.01)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv2(self.act(self.norm(self.conv1(x)))))
        return self.act(y + (x if self.conv3 is None else self.norm(self.conv3(x))))


class Join(nn.Module):
    """A map (B, dim, D, H, W), enlarged twice, and one of that size, (B, out_dim, 2 D, 2 H, 2 W) -> as the latter."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.up = enlarge(dim, out_dim, 1)
        self.conv = ResidualConv(2 * out_dim, out_dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([self.up(x), skip], 1))


class MambaNDUNETR(nn.Module):
    """Volumes (B, in_chans, D, H, W) -> logits of every voxel (B, num_classes, D, H, W).

    Args:
        img_size: sides that the position embedding is built for, or one for all; other sizes run too. A side that 16
            does not divide is padded by zeros at its end.
        in_chans: input channels.
        num_classes: classes, with the background.
        embed_dim: channels of the encoder.
        depth: layers of the published encoder, a multiple of 4 from 12 on. The last has no part in the output, and is
            not built.
        feature_size: channels of the decoder at full size.
        drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the encoder, from 0 at the first layer to this at the last.

    Raises:
        InputError: `depth` is not of these numbers, or `forward` gets no volumes of these channels.
    """

    classifiers = ("out",)

    def __init__(
        self,
        img_size: int | tuple[int, int, int] = 96,
        in_chans: int = 1,
        num_classes: int = 14,
        embed_dim: int = 384,
        depth: int = 24,
        feature_size: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if depth % 4 or depth < 12:
            raise InputError(f"depth is a multiple of 4 from 12 on, not {depth}")
        size = 3 * (img_size,) if isinstance(img_size, int) else img_size
        self.in_chans, self.patch_size, self.depth = in_chans, 16, depth
        self.taps = [depth // 4 * quarter for quarter in (1, 2, 3)] + [depth - 2]
        self.encoder = MambaND3D(
            size[1:],
            self.patch_size,
            size[0],
            self.patch_size,
            in_chans,
            num_classes=0,
            global_pool="",
            embed_dim=embed_dim,
            depth=depth - 1,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        f = feature_size
        self.encoder1 = ResidualConv(in_chans, f)
        self.encoder2, self.encoder3, self.encoder4 = (
            enlarge(embed_dim, 2 ** (4 - times) * f, times) for times in (3, 2, 1)
        )
        self.decoder5 = Join(embed_dim, 8 * f)
        self.decoder4, self.decoder3, self.decoder2 = Join(8 * f, 4 * f), Join(4 * f, 2 * f), Join(2 * f, f)
        self.out = nn.Conv3d(f, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise InputError(
                f"{type(self).__name__} expects volumes (B, {self.in_chans}, D, H, W), got shape {tuple(x.shape)}"
            )
        sides = x.shape[2:]
        x = pad_to_multiple(x, self.patch_size)
        maps = self.encoder.forward_intermediates(x, self.taps, intermediates_only=True)
        quarter, half, three_quarters, last = maps
        y = self.decoder5(last, self.encoder4(three_quarters))
        y = self.decoder4(y, self.encoder3(half))
        y = self.decoder3(y, self.encoder2(quarter))
        y = self.out(self.decoder2(y, self.encoder1(x)))
        return y[..., : sides[0], : sides[1], : sides[2]]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each layer of the encoder in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay skips, as the encoder says."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's; the last layer, which no output reads, is left out."""
        state = rename(state, OFFICIAL_NAMES)
        unread = (f"encoder.layers.{self.depth - 1}.", f"encoder.blocks.{self.depth - 1}.")
        inner = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
        inner = {k: v for k, v in inner.items() if not f"encoder.{k}".startswith(unread)}
        behind = {k: v for k, v in state.items() if not k.startswith("encoder.")}
        return behind | {f"encoder.{k}": v for k, v in self.encoder.checkpoint_filter(inner).items()}


OFFICIAL_NAMES = (
    (r"^vit\.", "encoder."),
    (r"^encoder1\.layer\.", "encoder1."),
    (r"\.transp_conv_init\.conv\.", ".0."),
    (r"^(encoder\d)\.blocks\.(\d+)\.conv\.", lambda match: f"{match[1]}.{int(match[2]) + 1}."),
    (r"\.transp_conv\.conv\.", ".up.0."),
    (r"\.conv_block\.", ".conv."),
    (r"(\.conv[123])\.conv\.", r"\1."),
    (r"^out\.conv\.conv\.", "out."),
)

# -- models -----------------------------------------------------------------------------------------------------------


def _btcv(name: str, embed_dim: int, feature_size: int, dice: float) -> dict:
    """A model and its file."""
    return {
        "args": {"embed_dim": embed_dim, "feature_size": feature_size},
        "weights": {"btcv": {"file": f"btcv/mamband-{name}.pt", "metrics": {"Dice": dice}}},
    }


register(
    MambaNDUNETR,
    {
        "mamband_unetr_small": _btcv("s", 384, 32, 83.1),
        "mamband_unetr_small_plus": _btcv("s_plus", 512, 32, 83.9),
        "mamband_unetr_base_32": _btcv("b-32", 768, 32, 82.7),
        "mamband_unetr_base_64": _btcv("b-64", 768, 64, 84.7),
    },
    task="volume-segmentation",
    preprocess={"spacing": (1.5, 1.5, 2.0), "intensity": (-175.0, 250.0), "window": 96},
    inputs=((1, 96, 96, 96),),
    first_conv=("encoder.patch_embed", "encoder1.conv1", "encoder1.conv3"),
    classifier="out",
    paper="ECCV 2024, arXiv 2402.05892",
    code="https://github.com/jacklishufan/Mamba-ND",
    licence="none",
    hub="jacklishufan/Mamba-ND",
    data="BTCV",
    family="mamband",
)
