"""Sigma: segmentation of an RGB image together with a thermal or depth image of the same scene.

Paper: "Sigma: Siamese Mamba Network for Multi-Modal Semantic Segmentation", Wan et al., WACV 2025, arXiv 2404.04256.
Official code: github.com/zifuwan/Sigma (MIT). Written from the paper and the published weights.

One VMamba of the first generation reads both images. At each of its four scales two scans that exchange C
(`CrossMamba`) and one scan over the tokens of both (`ConcatMamba`) fuse the two maps. The decoder's blocks have scans
and a gate per channel. Any size will do.
"""

import math
import re
from functools import partial
from pathlib import Path
from typing import Sequence

import torch
from timm.layers import calculate_drop_path_rates
from timm.layers.cbam import ChannelAttn
from torch import Tensor, nn

from ..backbones.feature_maps import DenseBackbone
from ..backbones.vmamba import VANILLA, VMamba
from ..checkpoint import fit, fit_shapes, read_state_dict, readable, rename
from ..errors import InputError
from ..layers.blocks import Stage
from ..layers.channel_attention import ResidualStateSpaceBlock
from ..layers.linear import init_linear, linear
from ..layers.norm import LayerNorm
from ..layers.pyramid import resize
from ..layers.s6 import S6Scan
from ..layers.ss2d import SS2D_NAMES
from ..layers.stems import channels_first, depthwise
from ..zoo import register

__all__ = ["ConcatMamba", "CrossMamba", "DecoderBlock", "Sigma", "SigmaDecoder", "SigmaEncoder"]


# -- fusion, over maps (B, H, W, dim) of both images ------------------------------------------------------------------


class CrossMamba(nn.Module):
    """CroMB: a scan of each map that reads its state with the other's C; both are added to their maps.

        y1 = S6(u1, dt1, A1, B1, C2, D1);    y2 = S6(u2, dt2, A2, B2, C1, D2)

    u = silu(conv(in_proj x)), with one convolution for both. Tokens are scanned row by row, forward alone.

    Args:
        dim: channels of both maps.
        d_state: states per channel of the scans.
        expand: scanned channels as a multiple of `dim`.
    """

    def __init__(self, dim: int, d_state: int = 4, expand: float = 2.0):
        super().__init__()
        inner = int(expand * dim)
        self.in_proj = nn.ModuleList(nn.Linear(dim, inner, bias=False) for _ in range(2))
        self.conv = depthwise(inner, 3)
        self.act = nn.SiLU()
        self.ssm = nn.ModuleList(S6Scan(inner, "row", d_state, math.ceil(dim / 16)) for _ in range(2))
        self.out_norm = nn.ModuleList(LayerNorm(inner) for _ in range(2))
        self.out_proj = nn.ModuleList(nn.Linear(inner, dim, bias=False) for _ in range(2))

    def forward(self, rgb: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Two maps (B, H, W, dim) -> the same, each with what it read of the other."""
        maps, grid = (rgb, extra), rgb.shape[1:3]
        tokens = [
            self.act(self.conv(linear(project, x))).flatten(1, 2)[:, None] for project, x in zip(self.in_proj, maps)
        ]
        projected = [ssm.project(u) for ssm, u in zip(self.ssm, tokens)]
        outputs = []
        for i, (x, ssm, u, norm, project) in enumerate(zip(maps, self.ssm, tokens, self.out_norm, self.out_proj)):
            (dt, B, _), (_, _, C) = projected[i], projected[1 - i]
            y = ssm.scan(u, dt, B, C, grid=grid)
            outputs.append(x + linear(project, norm(y)).unflatten(1, grid))
        return outputs[0], outputs[1]

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys, `op.`, to linescan's."""
        return fit_shapes(rename(state, CROSS_NAMES), self)


class ConcatMamba(nn.Module):
    """ConMB: one scan, forward and backward, over the tokens of the first map and then of the second.

        fused = x1 + x2 + out_proj([norm1(y1) * g2, norm2(y2) * g1]);    g = sigmoid(W2 silu(W1 mean(in_proj x)))

    Args:
        dim, d_state, expand: of `CrossMamba`.
        reduction: scanned channels over the width between W1 and W2.
    """

    def __init__(self, dim: int, d_state: int = 4, expand: float = 2.0, reduction: int = 16):
        super().__init__()
        inner = int(expand * dim)
        self.in_proj = nn.ModuleList(nn.Linear(dim, inner, bias=False) for _ in range(2))
        self.conv = nn.ModuleList(depthwise(inner, 3) for _ in range(2))
        self.act = nn.SiLU()
        self.ssm = S6Scan(inner, "row, -row", d_state, math.ceil(dim / 16))
        self.out_norm = nn.ModuleList(LayerNorm(inner) for _ in range(2))
        self.gate = nn.ModuleList(
            nn.Sequential(
                nn.Linear(inner, inner // reduction, bias=False),
                nn.SiLU(),
                nn.Linear(inner // reduction, inner, bias=False),
                nn.Sigmoid(),
            )
            for _ in range(2)
        )
        self.out_proj = nn.Linear(2 * inner, dim, bias=False)

    def forward(self, rgb: Tensor, extra: Tensor) -> Tensor:
        """Two maps (B, H, W, dim) -> one (B, H, W, dim)."""
        grid = rgb.shape[1:3]
        projected = [linear(project, x) for project, x in zip(self.in_proj, (rgb, extra))]
        tokens = torch.cat([self.act(conv(x)).flatten(1, 2) for conv, x in zip(self.conv, projected)], 1)
        outputs = self.ssm(tokens).unflatten(1, (2, -1)).unbind(1)  # in a line, whatever the grid
        gates = [gate(x.mean((1, 2)))[:, None] for gate, x in zip(self.gate, projected)]
        y = torch.cat([norm(y) * g for norm, y, g in zip(self.out_norm, outputs, reversed(gates))], -1)
        return rgb + extra + linear(self.out_proj, y).unflatten(1, grid)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys, `op.`, to linescan's."""
        return fit_shapes(rename(state, CONCAT_NAMES), self)


# What published files call the parts of both.
CROSS_NAMES = (
    (r"^op\.in_proj\.", "in_proj.0."),
    (r"^op\.in_proj_modalx\.", "in_proj.1."),
    (r"^op\.conv2d\.", "conv."),
    (r"^op\.out_proj_rgb\.", "out_proj.0."),
    (r"^op\.out_proj_e\.", "out_proj.1."),
    *(
        rule
        for i in range(2)
        for rule in (
            (rf"^op\.CMA_ssm\.out_norm_{i + 1}\.", f"out_norm.{i}."),
            (rf"^op\.CMA_ssm\.dt_proj_{i + 1}\.bias$", f"ssm.{i}.dt_bias"),
            (rf"^op\.CMA_ssm\.(\w+)_{i + 1}(\.weight)?$", rf"ssm.{i}.\1"),
        )
    ),
)
CONCAT_NAMES = (
    (r"^op\.(in_proj|conv2d)\.", r"op.\1.0."),
    (r"^op\.(in_proj|conv2d)_modalx\.", r"op.\1.1."),
    (r"^op\.out_norm1\.", "op.out_norm.0."),
    (r"^op\.out_norm2\.", "op.out_norm.1."),
    (r"^op\.fc1\.", "op.gate.0."),
    (r"^op\.fc2\.", "op.gate.1."),
    (r"^op\.conv2d\.", "op.conv."),
    *SS2D_NAMES,
    (r"^op\.", ""),
)


# -- decoder ----------------------------------------------------------------------------------------------------------


class DecoderBlock(ResidualStateSpaceBlock):
    """A scan, then convolutions gated by the mean and the maximum of each channel ("CVSS").

    Args:
        dim: channels, at least 30.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, dim: int, drop_path: float = 0.0):
        super().__init__(dim, 4, 2.0, drop_path=drop_path, gate_layer=partial(ChannelAttn, act_layer=nn.SiLU))

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's."""
        return fit_shapes(rename(state, BLOCK_NAMES), self)


BLOCK_NAMES = (
    (r"^scale([12])$", r"skip\1"),
    (r"^op\.", "mixer."),
    *SS2D_NAMES,
    (r"^conv_blk\.cab\.3\.fc\.0\.", "attention.3.fc1."),
    (r"^conv_blk\.cab\.3\.fc\.2\.", "attention.3.fc2."),
    (r"^conv_blk\.cab\.", "attention."),
)


def double(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, 2H, 2W, C), bilinear."""
    return channels_first(partial(resize, size=[2 * side for side in x.shape[1:3]]), x)


class PatchExpand(nn.Module):
    """(B, H, W, dim) -> (B, 2H, 2W, dim / 2): a Linear layer makes the four pixels of each, then LayerNorm."""

    def __init__(self, dim: int):
        super().__init__()
        self.expand = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = LayerNorm(dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = linear(self.expand, x).unflatten(-1, (2, 2, -1))  # (B, H, W, 2, 2, dim / 2)
        return self.norm(x.transpose(2, 3).flatten(3, 4).flatten(1, 2))


class Upsample(nn.Module):
    """(B, H, W, dim) -> (B, 2H, 2W, dim / 2): Linear, bilinear, LayerNorm."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim // 2, bias=False)
        self.norm = LayerNorm(dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(double(linear(self.linear, x)))


class FinalUpsample(nn.Module):
    """(B, H, W, dim) -> (B, 4H, 4W, dim): Linear and bilinear, twice, then LayerNorm."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear1 = nn.Linear(dim, dim, bias=False)
        self.linear2 = nn.Linear(dim, dim, bias=False)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(double(linear(self.linear2, double(linear(self.linear1, x)))))


class SigmaDecoder(nn.Module):
    """The channel-aware decoder: four maps (B, C, H / s, W / s), s = 4, 8, 16, 32 -> logits (B, num_classes, H, W).

    H and W are four times the sides of the first map.

    Args:
        dim: channels of the map of stride 4; the others have 2, 4 and 8 times as many.
        num_classes: classes.
        depths: blocks at strides 4, 8 and 16.
        drop_path_rate: stochastic depth, from 0 at the first block of stride 4 to this at the last of stride 16. By
            default as published: up to 0.1 over 16 blocks, of which the last four do not exist.
    """

    def __init__(
        self, dim: int, num_classes: int, depths: Sequence[int] = (4, 4, 4), drop_path_rate: float = 0.1 * 11 / 15
    ):
        super().__init__()
        if len(depths) != 3:
            raise InputError(f"the decoder has blocks at three strides, depths gives {len(depths)}")
        self.expand = PatchExpand(8 * dim)
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList(
            Stage(None, [DecoderBlock(2**i * dim, drop_path=next(rates)) for _ in range(depth)])
            for i, depth in enumerate(depths)
        )
        self.upsamples = nn.ModuleList(Upsample(2 * 2**i * dim) for i in range(2))
        self.norm = LayerNorm(dim)
        self.up = FinalUpsample(dim)
        self.output = nn.Conv2d(dim, num_classes, 1, bias=False)
        self.apply(init_linear)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        skips = [x.permute(0, 2, 3, 1) for x in maps]
        x = self.expand(skips[3])
        for i in (2, 1, 0):
            if x.shape != skips[i].shape:  # sides that were odd
                x = channels_first(partial(resize, size=skips[i].shape[1:3]), x)
            x = self.stages[i](x + skips[i])
            if i:
                x = self.upsamples[i - 1](x)
        return self.output(self.up(self.norm(x)).permute(0, 3, 1, 2))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys, those behind `decode_head.`, to linescan's."""
        return filter_parts(rename(state, DECODER_NAMES), self, DecoderBlock)


def _stage_name(match: re.Match) -> str:
    """Their `layers_up.I` works at stride 2 ** (5 - I), our `stages.I` at 2 ** (2 + I)."""
    stage = 3 - int(match[1])
    return f"upsamples.{stage - 1}." if match[2] == "upsample" else f"stages.{stage}.blocks."


DECODER_NAMES = (
    (r"^layers_up\.0\.", "expand."),
    (r"^layers_up\.(\d)\.(upsample|blocks)\.", _stage_name),
    (r"^norm_up\.", "norm."),
)


def filter_parts(state: dict[str, Tensor], module: nn.Module, *kinds: type[nn.Module]) -> dict[str, Tensor]:
    """`state` with the keys of each part of `module` that is of these kinds as the part's own filter has them."""
    out = dict(state)
    for name, part in module.named_modules():
        if name and isinstance(part, kinds):
            inner = {key[len(name) + 1 :]: out.pop(key) for key in list(out) if key.startswith(f"{name}.")}
            out |= {f"{name}.{key}": value for key, value in part.checkpoint_filter(inner).items()}
    return out


# -- model ------------------------------------------------------------------------------------------------------------


class SigmaEncoder(nn.Module):
    """Two images of a scene -> four fused maps (B, C, H / s, W / s), s = 4, 8, 16, 32.

    Args:
        depths: blocks in each stage of the encoder.
        dim: channels of its first stage, doubled from stage to stage.
        fusion_state: states per channel of the scans of the fusion.
        drop_path_rate: stochastic depth of the encoder.

    Attributes:
        out_channels: of the four maps.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 9, 2),
        dim: int = 96,
        fusion_state: int = 4,
        drop_path_rate: float = 0.2,
    ):
        super().__init__()
        trunk = VMamba(**VANILLA, depths=depths, dims=dim, num_classes=0, drop_path_rate=drop_path_rate)
        self.encoder = DenseBackbone(trunk, norms="each")
        self.out_channels = widths = self.encoder.out_channels
        self.cross = nn.ModuleList(CrossMamba(width, fusion_state) for width in widths)
        self.concat = nn.ModuleList(ConcatMamba(width, fusion_state) for width in widths)
        self.cross.apply(init_linear)
        self.concat.apply(init_linear)

    def forward(self, rgb: Tensor, extra: Tensor) -> list[Tensor]:
        """Four maps; arguments as for `Sigma.forward`.

        Raises:
            InputError: the two differ in size.
        """
        if rgb.shape != extra.shape:
            raise InputError(f"both images are of one size, got {tuple(rgb.shape)} and {tuple(extra.shape)}")
        maps = self.encoder(torch.cat([rgb, extra]))
        return self.fuse(*zip(*(x.unflatten(0, (2, -1)).unbind() for x in maps)))

    def fuse(self, rgb: Sequence[Tensor], extra: Sequence[Tensor]) -> list[Tensor]:
        """The encoder's four maps (B, C, H, W) of both images -> four of the same sizes."""
        fused = []
        for cross, concat, x, e in zip(self.cross, self.concat, rgb, extra):
            x, e = cross(x.permute(0, 2, 3, 1), e.permute(0, 2, 3, 1))
            fused.append(concat(x, e).permute(0, 3, 1, 2))
        return fused

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys, those behind `backbone.`, to linescan's."""
        return filter_parts(rename(state, ENCODER_NAMES), self, DenseBackbone, CrossMamba, ConcatMamba)

    def load_pretrained(self, path: str | Path) -> None:
        """Starts from a file: a Sigma's, without its decoder, or a classifier's, of which the encoder is made.

        Raises:
            CheckpointError: the file cannot be read, or is of another model.
        """
        state = {key.removeprefix("backbone."): value for key, value in read_state_dict(path).items()}
        if not any(key.startswith(("cross.", "cross_mamba.")) for key in state):
            self.encoder.load_pretrained(path)
            return
        state = {key: value for key, value in state.items() if not key.startswith("decode_head.")}
        own = {key: value for key, value in self.state_dict().items() if key.startswith("decode_head.")}
        with readable(path, type(self).__name__):
            state = SigmaEncoder.checkpoint_filter(self, state)
        fit(self, state | own, path)


ENCODER_NAMES = (
    (r"^vssm\.", "encoder."),
    (r"^cross_mamba\.", "cross."),
    (r"^channel_attn_mamba\.", "concat."),
)


class Sigma(SigmaEncoder):
    """Sigma: an RGB image and another of the same scene -> logits of their size.

    Args:
        depths, dim, fusion_state, drop_path_rate: of `SigmaEncoder`.
        num_classes: classes.
        decoder_depths: `depths` of `SigmaDecoder`.
    """

    classifiers = ("decode_head.output",)

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 9, 2),
        dim: int = 96,
        num_classes: int = 9,
        fusion_state: int = 4,
        decoder_depths: Sequence[int] = (4, 4, 4),
        drop_path_rate: float = 0.2,
    ):
        super().__init__(depths, dim, fusion_state, drop_path_rate)
        self.decode_head = SigmaDecoder(dim, num_classes, decoder_depths)

    def forward(self, rgb: Tensor, extra: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W).

        Args:
            rgb: images (B, 3, H, W), normalised. The published weights expect the channels in the order BGR, each with
                the mean and the deviation of ImageNet's R, G and B in this order.
            extra: of the same size; thermal and depth images of one channel are repeated three times.

        Raises:
            InputError: the two differ in size.
        """
        return resize(self.decode_head(super().forward(rgb, extra)), rgb.shape[-2:])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        super().set_grad_checkpointing(enable)
        self.decode_head.set_grad_checkpointing(enable)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys, `backbone.` and `decode_head.`, to linescan's."""
        head = {key: value for key, value in state.items() if key.startswith("decode_head.")}
        trunk = {key.removeprefix("backbone."): value for key, value in state.items() if key not in head}
        return super().checkpoint_filter(trunk) | filter_parts(head, self, SigmaDecoder)


# -- models -----------------------------------------------------------------------------------------------------------

SETS = {"mfnet": ("MFNet", 9), "pst900": ("PST900", 5), "nyuv2": ("NYUDepth v2", 40), "sunrgbd": ("SUN RGB-D", 37)}


def _weights(params: float, dim: int, **miou: float) -> dict:
    """The published files: mIoU by data set. `params` are those for 9 classes, in millions."""
    return {
        tag: {
            "data": SETS[tag][0],
            "args": {"num_classes": SETS[tag][1]},
            "params": round(params + (SETS[tag][1] - 9) * dim / 1e6, 3),
            "metrics": {"mIoU": value},
            **({"inputs": ((3, 720, 1280),) * 2} if tag == "pst900" else {}),
        }
        for tag, value in miou.items()
    }


register(
    Sigma,
    {
        "sigma_tiny": {
            "args": {"depths": (2, 2, 9, 2), "dim": 96, "drop_path_rate": 0.2},
            "weights": _weights(48.28736, 96, mfnet=60.2, pst900=88.6, nyuv2=53.9, sunrgbd=50.0),
        },
        "sigma_small": {
            "args": {"depths": (2, 2, 27, 2), "dim": 96, "drop_path_rate": 0.3},
            "weights": _weights(69.811328, 96, mfnet=61.1, pst900=87.8, nyuv2=57.0, sunrgbd=52.4),
        },
        "sigma_base": {
            "args": {"depths": (2, 2, 27, 2), "dim": 128, "drop_path_rate": 0.6},
            "weights": _weights(121.41482, 128, mfnet=61.3),
        },
    },
    paper="WACV 2025, arXiv 2404.04256",
    code="https://github.com/zifuwan/Sigma",
    licence="MIT",
    task="segmentation",
    page="https://github.com/zifuwan/Sigma",
    first_conv="encoder.trunk.patch_embed.conv",
    classifier="decode_head.output",
    inputs=((3, 480, 640), (3, 480, 640)),
    # The published weights read BGR, by an oversight of their loader, with the statistics of RGB.
    preprocess={
        "order": "BGR",
        "grey_extra": True,
        "mean": (123.675, 116.28, 103.53),
        "std": (58.395, 57.12, 57.375),
    },
)
