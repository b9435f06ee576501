"""VMamba: a hierarchical backbone that scans each map along rows and columns, forward and backward (SS2D).

Paper: "VMamba: Visual State Space Model", Liu et al., NeurIPS 2024, arXiv 2401.10166. Official code:
github.com/MzeroMiko/VMamba (MIT). Written from the paper and the published weights.

Four stages of pre-norm blocks: SS2D, and from the second generation on an MLP. The first generation ("vanilla") has a
gate, 16 states per channel and patch merging; the current one has no gate, one state, and convolutions as stem and
downsampling. No position embedding, so any image size will do.
"""

import re
from functools import partial
from typing import Any, Callable, Iterator, Sequence

import torch
from timm.layers import calculate_drop_path_rates, get_act_layer, to_2tuple
from torch import Tensor, nn

from ..errors import InputError, known
from ..layers.blocks import Block, Stage
from ..layers.linear import init_linear, trunc_normal_
from ..layers.mlp import GatedMlp, Mlp
from ..layers.norm import LayerNorm
from ..layers.s6 import CROSS, S6Scan
from ..layers.ss2d import SS2D, SS2D_NAMES, CascadeSS2D, SSDScan
from ..layers.stems import ConvDownsample, ConvStem, PatchMerging, PatchStem
from .contract import HierarchicalBackbone, register

__all__ = ["VMamba", "parse_forward_type"]


# -- forward types ---------------------------------------------------------------------------------------------------

# What the first word of a forward type says about the scans. The versions of the cross-scan compute the same function.
CORES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("v0", "v0seq", "v01", "v02", "v03", "v04", "v05", "v2", "v3"), {"routes": CROSS}),
    "v051d": {"routes": "row, row, row, row"},
    "v052d": {"routes": "row, row, -row, -row"},
    "v052dc": {"mixer_layer": CascadeSS2D},
    "m0": {"routes": CROSS, "scan_layer": SSDScan},
}
OUT_NORM_TAGS = {f"_on{name}": name for name in ("none", "dwconv3", "cnorm", "softmax", "sigmoid")}


def parse_forward_type(text: str) -> dict:
    """Options of SS2D from the official code's word for them: a core, then tags in this order.

        v05[_onnone|_ondwconv3|_oncnorm|_onsoftmax|_onsigmoid][_nozact][_noz][_oact][_no32]

    Raises:
        ValueError: the core is unknown, or a tag is unknown or out of order.
    """
    rest = text
    options: dict[str, Any] = {}
    tags: tuple[tuple[str, dict[str, Any]], ...] = (
        ("_no32", {}),  # in which precision a kernel reads its inputs
        ("_oact", {"out_act": True}),
        ("_noz", {"gate": None}),
        ("_nozact", {"gate": "linear"}),
        *((tag, {"out_norm": name}) for tag, name in OUT_NORM_TAGS.items()),
    )
    for tag, option in tags:
        if rest.endswith(tag) and not options.keys() & option.keys():
            rest, options = rest.removesuffix(tag), options | option
    if rest not in CORES:
        raise InputError(
            f"unknown forward_type {text!r}: a core ({', '.join(CORES)}), then in this order "
            f"[{'|'.join(OUT_NORM_TAGS)}][_nozact][_noz][_oact][_no32]"
        )
    if rest == "m0" and options.get("gate", "act") is not None:
        raise InputError(f"forward_type {text!r}: m0 has no gate, so it is written m0_noz")
    if rest in ("v0", "v0seq"):  # the first release's class, before these were options
        options |= {"act_layer": nn.SiLU, "d_conv": 3, "conv_bias": True}
    return CORES[rest] | options


# -- model -----------------------------------------------------------------------------------------------------------


STEMS = {"v1": PatchStem, "v2": ConvStem}
DOWNSAMPLES: dict[str, Callable] = {
    "v1": PatchMerging,
    "v2": partial(ConvDownsample, kernel_size=2),
    "v3": ConvDownsample,
}


class VMamba(HierarchicalBackbone):
    """VMamba.

    Args:
        img_size: size (or height and width) that the position embedding is built for, where there is one.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling, or "" for the map as it is.
        depths: blocks in each stage.
        dims: channels of the first stage, doubled from stage to stage; or of every stage.
        d_state: states per channel.
        expand: inner channels of SS2D as a multiple of the stage's.
        dt_rank: rank of the step-size projection; None for ceil(channels / 16).
        d_conv: side of SS2D's depthwise convolution; below 2 there is none.
        conv_bias: whether that has a bias.
        act_layer: SS2D's activation, by timm's name for it.
        ssm_init: initialisation of the scans, "v0", "v1" or "v2"; see `S6Scan`.
        forward_type: routes, gate and output norm of SS2D, in the official code's words; see `parse_forward_type`.
        routes: other routes than the forward type's (`linescan.scans.routes`): one spec for all blocks, or one each.
        merge: how the routes' outputs become one, see `SS2D`.
        mlp_ratio: hidden channels of the MLP as a multiple of the stage's; 0 for blocks without MLP.
        gmlp: gated MLP.
        post_norm: norms after the branches instead of before.
        pos_embed: add a learned position embedding after the stem.
        patch_embed: "v1" (one 4x4 convolution) or "v2" (two 3x3 convolutions).
        downsample: "v1" (patch merging), "v2" (2x2 convolution) or "v3" (3x3 convolution).
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after SS2D and in the MLP.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    scan_layer = S6Scan

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: int | Sequence[int] = 96,
        d_state: int = 1,
        expand: float = 1.0,
        dt_rank: int | None = None,
        d_conv: int = 3,
        conv_bias: bool = False,
        act_layer: str = "silu",
        ssm_init: str = "v0",
        forward_type: str = "v05_noz",
        routes: str | Sequence[str] | None = None,
        merge: str | Callable[[int, int], nn.Module] = "sum",
        mlp_ratio: float = 4.0,
        gmlp: bool = False,
        post_norm: bool = False,
        pos_embed: bool = False,
        patch_embed: str = "v2",
        downsample: str = "v3",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        known("patch_embed", patch_embed, tuple(STEMS))
        known("downsample", downsample, tuple(DOWNSAMPLES))
        self.in_chans = in_chans
        self.dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(self.dims) != len(depths):
            raise InputError(f"dims gives {len(self.dims)} stages, depths {len(depths)}")
        self.num_features = self.dims[-1]
        self.min_size = 4 * 2 ** (len(depths) - 1) if downsample == "v2" else 4
        self.patch_embed = STEMS[patch_embed](in_chans, self.dims[0])
        if pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(1, *self.grid_of(*to_2tuple(img_size)), self.dims[0]))

        options: dict[str, Any] = {
            "scan_layer": self.scan_layer,
            "expand": expand,
            "d_state": d_state,
            "dt_rank": dt_rank,
            "d_conv": d_conv,
            "conv_bias": conv_bias,
            "act_layer": get_act_layer(act_layer),
            "init": ssm_init,
            "drop_rate": proj_drop_rate,
            "merge": merge,
            **parse_forward_type(forward_type),
        }
        mixer_layer: Callable = partial(options.pop("mixer_layer", SS2D), **options)
        per_block = [routes] * sum(depths) if routes is None or isinstance(routes, str) else list(routes)
        if len(per_block) != sum(depths):
            raise InputError(f"routes are given for {len(per_block)} blocks, depths has {sum(depths)}")
        mixers: Iterator[Callable] = iter(
            [mixer_layer if own is None else partial(mixer_layer, routes=own) for own in per_block]
        )
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        mlp_layer = GatedMlp if gmlp else Mlp

        def block(dim: int) -> Block:
            mlp = mlp_layer(dim, int(mlp_ratio * dim), drop=proj_drop_rate) if mlp_ratio > 0 else None
            return Block(dim, next(mixers)(dim), mlp, post_norm=post_norm, drop_path=next(rates))

        self.stages = nn.ModuleList(
            Stage(
                DOWNSAMPLES[downsample](self.dims[i - 1], dim) if i else None,
                [block(dim) for _ in range(depth)],
            )
            for i, (dim, depth) in enumerate(zip(self.dims, depths))
        )
        self.norm = LayerNorm(self.num_features)
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation: Linear layers truncated normal; convolutions and scans keep their own."""
        self.apply(init_linear)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return height // 4, width // 4

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        x, grid, context = super().embed(x)
        return x if self.pos_embed is None else x + self.positions(grid), grid, context

    # -- weights ----------------------------------------------------------------------------------------------------

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys of any generation to linescan's; the scans' parameters get an axis of routes."""
        if not any(key.startswith("layers.") for key in state):
            return state
        own, out = self.state_dict(), {}
        stem = SEQUENCES[type(self.patch_embed)]
        downsample = SEQUENCES[type(self.stages[-1].downsample)]
        for key, value in state.items():
            key = re.sub(r"^patch_embed\.(\d+)", lambda m: f"patch_embed.{stem.get(m[1], m[1])}", key)
            key = re.sub(r"downsample\.(\d+)", lambda m: f"downsample.{downsample.get(m[1], m[1])}", key)
            key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", key)
            for pattern, name in OFFICIAL_NAMES:
                key = re.sub(pattern, name, key)
            if ".ssm." in key:  # routes are the slowest axis in every layout
                parts = [k for k in (key, key.replace("ssm", "ssm.0"), key.replace("ssm", "ssm.1")) if k in own]
                sizes = [own[k].numel() for k in parts]
                if parts and sum(sizes) == value.numel():
                    out |= {k: part.view_as(own[k]) for k, part in zip(parts, value.flatten().split(sizes))}
                    continue
            if value.ndim == 4 and key in own and own[key].ndim == 2:  # a Linear kept as a 1x1 convolution
                value = value.flatten(1)
            if key == "pos_embed":  # (1, dim, H, W)
                value = value.permute(0, 2, 3, 1)
            out[key] = value
        return out


# Our names of what the official code numbers inside Sequentials.
SEQUENCES = {
    PatchStem: {"0": "conv", "2": "norm"},
    ConvStem: {"0": "conv1", "2": "norm1", "5": "conv2", "7": "norm2"},
    PatchMerging: {"1": "norm", "2": "reduction"},
    ConvDownsample: {"1": "conv", "3": "norm"},
    nn.Identity: {},
}

# Official names, first those of the vanilla files, and ours.
OFFICIAL_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.conv."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^classifier\.", ""),
    (r"^layers\.", "stages."),
    (r"(blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"\.op\.", ".mixer."),
    *SS2D_NAMES,
    (r"\.out_norm\.1\.", ".out_norm."),
    (r"\.out_norm\.2\.", ".out_norm.1."),
)


# -- models -----------------------------------------------------------------------------------------------------------

# The three generations; what they share is the default of `VMamba`.
CURRENT = {"forward_type": "v05_noz"}
GATED = {"forward_type": "v3", "expand": 2.0}  # of February 2024, with the gate
VANILLA = {
    "forward_type": "v0", "expand": 2.0, "d_state": 16, "conv_bias": True, "mlp_ratio": 0.0,
    "patch_embed": "v1", "downsample": "v1",
}  # fmt: skip

RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/%23"

# s2l15: scans twice as wide as the stream, 15 blocks in the third stage.
register(
    VMamba,
    paper="NeurIPS 2024, arXiv 2401.10166",
    code="https://github.com/MzeroMiko/VMamba",
    licence="MIT",
    data="ImageNet-1K",
    first_conv="patch_embed.conv1",
    models={
        "vmamba_tiny_s1l8": {
            "args": CURRENT | {"depths": (2, 2, 8, 2), "dims": 96, "expand": 1.0},
            "params": 30.249,
            "gmacs": 4.9,
            "weights": {
                "in1k": {"url": RELEASES + "v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth", "metrics": {"top1": 82.6}}
            },
        },
        "vmamba_small_s2l15": {
            "args": CURRENT | {"depths": (2, 2, 15, 2), "dims": 96, "expand": 2.0},
            "params": 50.148,
            "gmacs": 8.7,
            "weights": {
                "in1k": {"url": RELEASES + "v2cls/vssm_small_0229_ckpt_epoch_222.pth", "metrics": {"top1": 83.6}}
            },
        },
        "vmamba_base_s2l15": {
            "args": CURRENT | {"depths": (2, 2, 15, 2), "dims": 128, "expand": 2.0},
            "params": 88.558,
            "gmacs": 15.4,
            "weights": {
                "in1k": {"url": RELEASES + "v2cls/vssm_base_0229_ckpt_epoch_237.pth", "metrics": {"top1": 83.9}}
            },
        },
        "vmamba_tiny_s2l5": {
            "args": CURRENT | {"depths": (2, 2, 5, 2), "dims": 96, "expand": 2.0},
            "params": 30.706,
            "gmacs": 4.9,
            "weights": {
                "in1k": {"url": RELEASES + "v2cls/vssm_tiny_0230_ckpt_epoch_262.pth", "metrics": {"top1": 82.5}}
            },
        },
        "vmamba_small_s1l20": {
            "args": CURRENT | {"depths": (2, 2, 20, 2), "dims": 96, "expand": 1.0},
            "params": 49.013,
            "gmacs": 8.6,
            "weights": {
                "in1k": {"url": RELEASES + "v2cls/vssm1_small_0229s_ckpt_epoch_240.pth", "metrics": {"top1": 83.3}}
            },
        },
        "vmamba_base_s1l20": {
            "args": CURRENT | {"depths": (2, 2, 20, 2), "dims": 128, "expand": 1.0},
            "params": 86.615,
            "gmacs": 15.2,
            "weights": {
                "in1k": {"url": RELEASES + "v2cls/vssm1_base_0229s_ckpt_epoch_225.pth", "metrics": {"top1": 83.8}}
            },
        },
        "vmamba_tiny_0220": {
            "args": GATED | {"depths": (2, 2, 4, 2), "dims": 96},
            "params": 32.485,
            "gmacs": 5.0,
            "weights": {
                "in1k": {"url": RELEASES + "20240220/vssmtiny_dp02_ckpt_epoch_258.pth", "metrics": {"top1": 82.5}}
            },
        },
        "vmamba_vanilla_tiny": {
            "args": VANILLA | {"depths": (2, 2, 9, 2), "dims": 96},
            "first_conv": "patch_embed.conv",
            "params": 22.893,
            "gmacs": 5.6,
            "weights": {
                "in1k": {"url": RELEASES + "v0cls/vssmtiny_dp01_ckpt_epoch_292.pth", "metrics": {"top1": 82.2}}
            },
        },
        "vmamba_vanilla_small": {
            "args": VANILLA | {"depths": (2, 2, 27, 2), "dims": 96},
            "first_conv": "patch_embed.conv",
            "params": 44.417,
            "gmacs": 11.2,
            "weights": {
                "in1k": {"url": RELEASES + "v0cls/vssmsmall_dp03_ckpt_epoch_238.pth", "metrics": {"top1": 83.5}}
            },
        },
        "vmamba_vanilla_base": {
            "args": VANILLA | {"depths": (2, 2, 27, 2), "dims": 128},
            "first_conv": "patch_embed.conv",
            "params": 76.254,
            "gmacs": 18.0,
            "weights": {
                "in1k": {"url": RELEASES + "v0cls/vssmbase_dp06_ckpt_epoch_241.pth", "metrics": {"top1": 83.7}}
            },
        },
    },
)
