"""Mamba-FCS: semantic change detection. Two images of a place, of two dates -> what has changed, from what, to what.

Paper: "Mamba-FCS: Joint Spatio-Frequency Feature Fusion, Change-Guided Attention, and SeK-Inspired Loss for Enhanced
Semantic Change Detection in Remote Sensing", Wijenayake et al., IEEE JSTARS 2026, arXiv 2508.08232. Official code:
github.com/Buddhi19/MambaFCS (MIT), which goes on from ChangeMamba (arXiv 2404.03425). Written from the paper and the
published weights.

One VMamba reads both images. At each of its four scales the two maps are fused with the amplitudes of their Fourier
transforms, and a decoder makes change features of the fused maps, from coarse to fine. These gate the maps of each
date (`sigmoid`), from which a decoder per date makes semantic features. The head of the classes is shared by both
dates. Any size will do.
"""

import re
from typing import NamedTuple, Sequence

import torch
from timm.layers import EcaModule, SqueezeExcite
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from ..backbones.feature_maps import DenseBackbone
from ..backbones.vmamba import VMamba
from ..checkpoint import fit_shapes, rename
from ..errors import InputError
from ..layers.blocks import Block, run
from ..layers.mlp import Mlp
from ..layers.norm import at_least_float32
from ..layers.pyramid import resize
from ..layers.ss2d import SS2D, SS2D_NAMES
from ..zoo import register

__all__ = ["Changes", "FrequencyFusion", "MambaFCS", "PyramidFusion", "ResidualBlock", "TopDownDecoder"]


# -- parts, over maps (B, C, H, W) ------------------------------------------------------------------------------------


def conv_norm_act(dim: int, out_dim: int, kernel_size: int = 1, bias: bool = True) -> list[nn.Module]:
    """A convolution that keeps the size, BatchNorm, ReLU."""
    convolution = nn.Conv2d(dim, out_dim, kernel_size, padding=kernel_size // 2, bias=bias)
    return [convolution, nn.BatchNorm2d(out_dim), nn.ReLU()]


class ChannelGate(nn.Module):
    """x * (f(mean of x) + f(maximum of x)), f = sigmoid(MLP): per channel, up to 2.

    Where dim < reduction there is no room between the layers of the MLP, of which its last bias is left.
    """

    def __init__(self, dim: int, reduction: int = 16):
        super().__init__()
        hidden = dim // reduction
        self.mlp = Mlp(dim, hidden, nn.ReLU) if hidden else None
        self.bias = None if hidden else nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.mlp is None:
            return x * (2 * self.bias.sigmoid())[:, None, None]
        gates = (self.mlp(pooled).sigmoid() for pooled in (x.mean((2, 3)), x.amax((2, 3))))
        return x * sum(gates)[..., None, None]


class SpatialGate(nn.Module):
    """x * sigmoid(conv([mean over channels, maximum over channels])): per position."""

    def __init__(self, kernel_size: int = 7, bias: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


class PyramidFusion(nn.Module):
    """Convolutions of three sizes side by side, gated by channel and by position, and a shortcut.

    Args:
        dim: channels in.
        out_dim: channels out.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.shortcut = nn.Conv2d(dim, out_dim, 1) if dim != out_dim else nn.Identity()
        self.branch1 = nn.Sequential(*conv_norm_act(dim, out_dim))
        self.branch3 = nn.Sequential(*conv_norm_act(dim, out_dim, 3))
        self.branch5 = nn.Sequential(nn.Conv2d(dim, dim, 5, padding=2, groups=dim), *conv_norm_act(dim, out_dim))
        self.channel_gate = ChannelGate(3 * out_dim)
        self.spatial_gate = SpatialGate()
        self.output = nn.Sequential(*conv_norm_act(3 * out_dim, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        together = torch.cat([self.branch1(x), self.branch3(x), self.branch5(x)], 1)
        return self.output(self.spatial_gate(self.channel_gate(together))) + self.shortcut(x)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's."""
        return from_official(state, self)


class ResidualBlock(BasicBlock):
    """Two 3x3 convolutions with BatchNorm, then squeeze and excitation, around which the input is added: a ResNet's.

    Args:
        dim: channels in and out, at least 16.
    """

    def __init__(self, dim: int):
        def gate(channels: int, **kwargs) -> nn.Module:
            return SqueezeExcite(channels, rd_channels=channels // 16, **kwargs)

        super().__init__(dim, dim, attn_layer=gate)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's."""
        return from_official(state, self)


class Amplitudes(nn.Module):
    """[1x1 convolution, BatchNorm, ReLU](log(1 + |F x|)), F the two-dimensional Fourier transform of each channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Sequential(*conv_norm_act(dim, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        amplitudes = torch.fft.fft2(at_least_float32(x), norm="ortho").abs().log1p()
        return self.proj(amplitudes.to(self.proj[0].weight.dtype))


class FrequencyFusion(nn.Module):
    """The maps of two dates (B, dim, H, W), their difference and the amplitudes of both -> one map (B, dim, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.amplitudes = nn.ModuleList(Amplitudes(dim) for _ in range(2))
        self.reduce = nn.Sequential(*conv_norm_act(5 * dim, dim, bias=False))
        self.channel_gate = EcaModule(dim)
        self.spatial_gate = SpatialGate(bias=False)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        first, second = (amplitudes(x) for amplitudes, x in zip(self.amplitudes, (before, after)))
        x = self.reduce(torch.cat([before, first, after, second, (before - after).abs()], 1))
        return self.spatial_gate(self.channel_gate(x))

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's."""
        return from_official(state, self)


# -- decoder ----------------------------------------------------------------------------------------------------------


class MapBlock(Block):
    """VMamba's block, over maps (B, dim, H, W)."""

    def __init__(self, dim: int, drop_path: float = 0.0):
        mixer = SS2D(dim, d_state=1, conv_bias=False, gate=None)
        super().__init__(dim, mixer, Mlp(dim, 4 * dim), drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TopDownDecoder(nn.Module):
    """Maps (B, C, H, W) of four scales, fine to coarse -> as many, each with all that is coarser read into it.

    Args:
        dims: channels of each.
        refine: one more residual block at the end of the finest.
        drop_path: rate of stochastic depth in each block.
    """

    def __init__(self, dims: Sequence[int], refine: bool = False, drop_path: float = 0.1):
        super().__init__()
        self.blocks = nn.ModuleList(MapBlock(dim, drop_path) for dim in dims)
        self.coarser = nn.ModuleList(PyramidFusion(below, dim) for dim, below in zip(dims, dims[1:]))
        self.smooth = nn.ModuleList(ResidualBlock(dim) for dim in dims[:-1])
        self.refine = ResidualBlock(dims[0]) if refine else nn.Identity()
        self.grad_checkpointing = False

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        x = run(self.blocks[-1], maps[-1], checkpointing=self.grad_checkpointing)
        made = [x]
        for skip, block, coarser, smooth in reversed([*zip(maps, self.blocks, self.coarser, self.smooth)]):
            x = smooth(skip + resize(coarser(x), skip.shape[-2:]))
            x = run(block, x, checkpointing=self.grad_checkpointing)
            made.insert(0, x)
        made[0] = self.refine(made[0])
        return made


# -- model ------------------------------------------------------------------------------------------------------------


class Changes(NamedTuple):
    """Logits (B, channels, H, W).

    Attributes:
        change: of two classes: unchanged, changed.
        before, after: of what each pixel shows at each date, of `num_classes` classes, of which 0 ("unchanged") is not
            trained; None for a model of changes alone. Where nothing has changed they mean nothing.
    """

    change: Tensor
    before: Tensor | None = None
    after: Tensor | None = None

    def decide(self) -> tuple[Tensor, Tensor, Tensor]:
        """Classes (B, H, W), int64: 1 where something has changed, and what was there before and after, 0 elsewhere.

        A model of changes alone says 1 for both.
        """
        changed = self.change.argmax(1)
        return changed, *(changed if x is None else changed * x.argmax(1) for x in (self.before, self.after))


class MambaFCS(nn.Module):
    """Two images of a place -> `Changes`.

    Args:
        num_classes: classes, "unchanged" among them as 0; 0 for a model of changes alone, without semantic decoders.
        depths: blocks in each stage of the encoder.
        dims: channels of its first stage, at least 16, doubled from stage to stage.
        drop_path_rate: stochastic depth of the encoder.
        decoder_drop_path: the rate of stochastic depth of all blocks of the decoders.
    """

    classifiers = ("semantic_head",)

    def __init__(
        self,
        num_classes: int = 7,
        depths: Sequence[int] = (2, 2, 15, 2),
        dims: int = 128,
        drop_path_rate: float = 0.6,
        decoder_drop_path: float = 0.1,
    ):
        super().__init__()
        if dims < 16:
            raise InputError(f"dims is 16 or more, not {dims}")
        if num_classes < 0 or num_classes == 1:
            raise InputError(f"num_classes counts `unchanged`, so it is 2 or more, or 0 for none, not {num_classes}")
        self.num_classes = num_classes
        trunk = VMamba(depths=depths, dims=dims, expand=2.0, num_classes=0, drop_path_rate=drop_path_rate)
        self.encoder = DenseBackbone(trunk, norms="each")
        widths = self.encoder.out_channels
        self.fusion = nn.ModuleList(FrequencyFusion(width) for width in widths)
        self.change_decoder = TopDownDecoder(widths, drop_path=decoder_drop_path)
        self.change_head = PyramidFusion(dims, 2)
        if num_classes:
            self.semantic_decoders = nn.ModuleList(
                TopDownDecoder(widths, refine=True, drop_path=decoder_drop_path) for _ in range(2)
            )
            self.semantic_head = PyramidFusion(dims, num_classes)

    def encode(self, before: Tensor, after: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The encoder's four maps (B, C, H / s, W / s), s = 4, 8, 16, 32, of each image."""
        maps = self.encoder(torch.cat([before, after]))
        return tuple(list(one) for one in zip(*(x.unflatten(0, (2, -1)).unbind() for x in maps)))

    def decode_changes(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
        """Maps of both dates -> the change features of each scale, of the same shapes."""
        return self.change_decoder([fuse(*pair) for fuse, *pair in zip(self.fusion, before, after)])

    def decode_semantics(self, date: int, maps: Sequence[Tensor], changes: Sequence[Tensor]) -> Tensor:
        """Maps of one date, 0 or 1, gated by the change features -> semantic features (B, dims, H / 4, W / 4)."""
        return self.semantic_decoders[date]([x * change.sigmoid() for x, change in zip(maps, changes)])[0]

    def forward(self, before: Tensor, after: Tensor) -> Changes:
        """Logits.

        Args:
            before, after: images (B, 3, H, W) of one size, normalised.

        Raises:
            InputError: the two differ in size.
        """
        if before.shape != after.shape:
            raise InputError(f"both images are of one size, got {tuple(before.shape)} and {tuple(after.shape)}")
        size, dates = before.shape[-2:], self.encode(before, after)
        changes = self.decode_changes(*dates)
        logits = [self.change_head(changes[0])]
        if self.num_classes:
            logits += [self.semantic_head(self.decode_semantics(i, maps, changes)) for i, maps in enumerate(dates)]
        return Changes(*(resize(x, size) for x in logits))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)
        for module in self.modules():
            if isinstance(module, TopDownDecoder):
                module.grad_checkpointing = enable

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's."""
        encoder = {key[8:]: value for key, value in state.items() if key.startswith("encoder.")}
        others = {key: value for key, value in state.items() if not key.startswith("encoder.")}
        encoder = {f"encoder.{key}": value for key, value in self.encoder.checkpoint_filter(encoder).items()}
        return encoder | from_official(rename(others, WHOLE_NAMES), self)


def from_official(state: dict[str, Tensor], part: nn.Module) -> dict[str, Tensor]:
    """Official keys of a part to ours.

    Left out: an attention that is never run, and what has no values because a gate has no hidden channels. The gate of
    `FrequencyFusion` reads the maximum before the mean.
    """
    kept = {key: value for key, value in state.items() if value.numel() and not re.search(r"\bcross_attn\.", key)}
    for key in kept:
        if re.search(r"\bsp_gate\.conv\.weight$", key):
            kept[key] = kept[key].flip(1)
    kept = rename(kept, PART_NAMES)
    own = part.state_dict().keys()
    kept = {key if key in own else key.replace(".mlp.fc2.bias", ".bias"): value for key, value in kept.items()}
    return fit_shapes(kept, part)


# What published files call the parts of a part.
PART_NAMES = (
    (r"\bfft_pre\.", "amplitudes.0."),
    (r"\bfft_post\.", "amplitudes.1."),
    (r"\breduce_conv\.", "reduce.0."),
    (r"\breduce_bn\.", "reduce.1."),
    (r"\bch_gate\.", "channel_gate."),
    (r"\bsp_gate\.", "spatial_gate."),
    (r"\bchannel_att\.fc\.0\.", "channel_gate.mlp.fc1."),
    (r"\bchannel_att\.fc\.2\.", "channel_gate.mlp.fc2."),
    (r"\bspatial_att\.", "spatial_gate."),
    (r"\bfinal_conv\.", "output."),
    (r"\bse\.excitation\.0\.", "se.fc1."),
    (r"\bse\.excitation\.2\.", "se.fc2."),
    (r"(?<=blocks\.\d)\.1\.norm\.", ".norm1."),
    (r"(?<=blocks\.\d)\.1\.(norm2|mlp)\.", r".\1."),
    (r"(?<=blocks\.\d)\.1\.op\.", ".mixer."),
    *SS2D_NAMES,
)


def _of_decoder(match: re.Match) -> str:
    """Their number of a level is 1 at the finest, in `st_block` before a 1; `down_sample` counts from the coarsest."""
    part, number = match[1], int(match[2][0])
    if part == "smooth_layer":
        return f"smooth.{number - 1}." if number else "refine."
    return f"blocks.{number - 1}." if part == "st_block" else f"coarser.{3 - number}."


# What they call the parts of the whole.
WHOLE_NAMES = (
    (r"^decoder(_bcd)?\.fuse_layer_(\d)\.", lambda match: f"fusion.{4 - int(match[2])}."),
    (r"^decoder(_bcd)?\.", "change_decoder."),
    (r"^decoder_T([12])\.", lambda match: f"semantic_decoders.{int(match[1]) - 1}."),
    (r"\b(st_block|down_sample|smooth_layer)_(\d+)(_semantic)?\.", _of_decoder),
    (r"^main_clf(_cd)?\.", "change_head."),
    (r"^aux_clf\.", "semantic_head."),
)


# -- models -----------------------------------------------------------------------------------------------------------

# Layers of `PyramidFusion` whose shapes follow its outputs.
OF_CLASSES = (
    "shortcut", "branch1.0", "branch1.1", "branch3.0", "branch3.1", "branch5.1", "branch5.2", "output.0", "output.1",
)  # fmt: skip

# Parameters without those of an attention that never runs: the published files have 5.578 million more.
register(
    MambaFCS,
    {
        "mambafcs_base": {
            "weights": {
                "second": {
                    "data": "SECOND",
                    "params": 200.570,
                    "metrics": {"OA": 88.62, "F_SCD": 65.78, "mIoU": 74.07, "SeK": 25.50},
                },
                "landsat_scd": {
                    "data": "Landsat-SCD",
                    "args": {"num_classes": 5},
                    "inputs": ((3, 416, 416),) * 2,
                    "params": 200.567,
                    "metrics": {"OA": 96.25, "F_SCD": 89.27, "mIoU": 88.81, "SeK": 60.26},
                },
            },
        },
        "mambafcs_base_binary": {"args": {"num_classes": 0}, "params": 131.521, "classifier": ()},
    },
    task="change",
    page="https://huggingface.co/buddhi19/MambaFCS",
    inputs=((3, 512, 512),) * 2,
    first_conv="encoder.trunk.patch_embed.conv1",
    classifier=tuple(f"semantic_head.{name}" for name in OF_CLASSES),
    paper="IEEE JSTARS 2026, arXiv 2508.08232",
    code="https://github.com/Buddhi19/MambaFCS",
    licence="MIT",
)
