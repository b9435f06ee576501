"""VM-UNet with MHS-VM's multi-head scans: segmentation of lesions, one class or more.

Papers: Ji, "MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba", 2024, arXiv 2406.05992, inside the
network of Ruan and Xiang, "VM-UNet: Vision Mamba UNet for Medical Image Segmentation", 2024, arXiv 2402.02491. Official
code: github.com/PixDeep/MHS-VM (Apache-2.0). Written from the papers and the published code's facts.
"""

import math
from functools import partial
from typing import Sequence

from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from ..checkpoint import fit_shapes, rename, strip_prefix
from ..errors import InputError
from ..layers.blocks import Block, Stage
from ..layers.linear import init_linear
from ..layers.ss2d import ROUTE_FAMILIES, SS2D, MultiHeadScan
from ..layers.stems import PatchExpand, PatchMerging, PatchStem, mirror_to_multiple
from ..scans.multi_route import RouteAttention
from ..zoo import register

__all__ = ["VMUNet", "multi_head_ss2d"]


def multi_head_ss2d(
    dim: int,
    heads: str = "CXSZ",
    d_state: int = 16,
    threshold: float = 0.4,
    project: bool = True,
    gated: bool = True,
) -> SS2D:
    """MHS-VM's mixer over maps (B, H, W, dim): `SS2D` around `MultiHeadScan`, without an output projection.

    Args:
        heads: letters of `ROUTE_FAMILIES`.
        d_state: of the scans.
        threshold: of `RouteAttention`.
        project: of `MultiHeadScan`.
        gated: a projection to what is scanned and to a gate of the output; without it neither.

    Raises:
        InputError: an unknown letter.
    """
    if not heads or set(heads) - set(ROUTE_FAMILIES):
        raise InputError(f"heads are letters of {''.join(ROUTE_FAMILIES)}, not {heads!r}")
    return SS2D(
        dim,
        [ROUTE_FAMILIES[letter] for letter in heads],
        expand=1,
        d_state=d_state,
        dt_rank=math.ceil(dim // len(heads) / 16),
        gate="act" if gated else None,
        scan_layer=partial(MultiHeadScan, project=project),
        merge=partial(RouteAttention, threshold=threshold),
        project_in=gated,
        project_out=False,
    )


class VMUNet(nn.Module):
    """Images (B, 1 or 3, H, W) -> logits (B, num_classes, H, W), of any size.

    A side that 32 does not divide is mirrored at the bottom or the right up to it, and the result cut. One channel is
    repeated to three. With one class the sigmoid of the logits is its probability.

    Args:
        num_classes: channels of the logits.
        dims: channels of the encoder's stages; the decoder's are the same, backwards.
        depths, depths_decoder: blocks of the stages.
        heads, d_state, threshold, project: of `multi_head_ss2d`. The published results have a threshold of 0.4; the
            published trainings one of 0.5 (ISIC 2018) and 0 (ISIC 2017).
        drop_path_rate: stochastic depth, rising from 0 to this in the encoder and falling again in the decoder.
    """

    classifiers = ("head",)

    def __init__(
        self,
        num_classes: int = 1,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 2, 2),
        depths_decoder: Sequence[int] = (2, 2, 2, 1),
        heads: str = "CXSZ",
        d_state: int = 16,
        threshold: float = 0.4,
        project: bool = True,
        drop_path_rate: float = 0.2,
    ):
        super().__init__()
        self.num_classes, self.heads = num_classes, heads

        def stages(dims: Sequence[int], depths: Sequence[int], rates: Sequence[float]) -> nn.ModuleList:
            of_block = iter(rates)

            def block(dim: int) -> nn.Module:
                return Block(dim, multi_head_ss2d(dim, heads, d_state, threshold, project), drop_path=next(of_block))

            return nn.ModuleList(Stage(None, [block(dim) for _ in range(n)]) for dim, n in zip(dims, depths))

        def rates(depths: Sequence[int]) -> list[float]:
            return calculate_drop_path_rates(drop_path_rate, sum(depths))

        self.patch_embed = PatchStem(3, dims[0])
        self.encoder = stages(dims, depths, rates(depths))
        self.merges = nn.ModuleList(PatchMerging(dim, 2 * dim) for dim in dims[:-1])
        self.decoder = stages(dims[::-1], depths_decoder, rates(depths_decoder)[::-1])
        self.expands = nn.ModuleList(PatchExpand(dim, dim // 2) for dim in dims[:0:-1])
        self.final_expand = PatchExpand(dims[0], dims[0] // 4, 4)
        self.head = nn.Conv2d(dims[0] // 4, num_classes, 1)
        self.apply(init_linear)

    def forward_features(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Images (B, 3, H, W) whose sides 32 divides -> the inputs of the encoder's stages, the bottleneck, and the
        decoder's map of stride 4, all (B, h, w, C)."""
        x, inputs = self.patch_embed(x), []
        for stage, merge in zip(self.encoder, [*self.merges, nn.Identity()]):
            inputs.append(x)
            x = stage(x)
            x = merge(x)
        bottleneck, skips = x, list(inputs)
        x = self.decoder[0](x)
        for expand, stage in zip(self.expands, self.decoder[1:]):  # as published, a skip is added before the expansion
            x = stage(expand(x + skips.pop()))
        return inputs, bottleneck, x

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = mirror_to_multiple(x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x, 32)
        _, _, decoded = self.forward_features(x)
        return self.head(self.final_expand(decoded).permute(0, 3, 1, 2))[..., :height, :width]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, block by block."""
        for stage in (*self.encoder, *self.decoder):
            stage.grad_checkpointing = enable

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The official code's keys to linescan's: see `from_official`."""
        return from_official(strip_prefix(state, "vmunet."), self, self.heads)


def from_official(state: dict[str, Tensor], model: nn.Module, heads: str) -> dict[str, Tensor]:
    """Official keys of a network, or of its mixer, to ours.

    Files hold the scans' parameters twice, of which `seq2seq_engine` counts, and the projection to the heads twice, of
    which `x_ssproj.weight` counts; they may hold counters of operations, which are left out.
    """
    kept = {key: value for key, value in state.items() if not key.endswith((".total_ops", ".total_params"))}
    kept = {key: value for key, value in kept.items() if key not in ("total_ops", "total_params")}
    for old, new in ((".scanning.seq2seq_engine.", ".mambaeng."), ("x_ssproj_W", "x_ssproj.weight")):
        for key in [key for key in kept if old in key]:
            value, other = kept.pop(key), key.replace(old, new)
            if old != "x_ssproj_W" or other not in kept:
                kept[other] = value
    number = {letter: str(i) for i, letter in enumerate(heads)}
    names = (
        (r"^patch_embed\.proj\.", "patch_embed.conv."),
        (r"^layers\.(\d+)\.downsample\.", r"merges.\1."),
        (r"^layers\.", "encoder."),
        (r"^layers_up\.(\d+)\.upsample\.", lambda m: f"expands.{int(m[1]) - 1}."),
        (r"^layers_up\.", "decoder."),
        (r"^final_up\.", "final_expand."),
        (r"^final_conv\.", "head."),
        (r"\.ln_1\.", ".norm1."),
        (r"\.self_attention\.", ".mixer."),
        (r"(^|\.)conv2d\.", r"\1conv."),
        (r"(^|\.)mhs\.", r"\1ssm."),
        (r"(^|\.)x_ssproj\.", r"\1in_proj."),
        (r"(^|\.)cat_norm\.", r"\1norm."),
        (r"(^|\.)y_proj\.", r"\1out_proj."),
        (r"(^|\.)scanhead_(\w)\.mambaeng\.", lambda m: f"{m[1]}heads.{number.get(m[2], m[2])}."),
        (r"\.x_proj_weight$", ".x_proj"),
        (r"\.dt_projs_weight$", ".dt_proj"),
        (r"\.dt_projs_bias$", ".dt_bias"),
        (r"\.A_logs$", ".A_log"),
        (r"\.Ds$", ".D"),
    )
    return fit_shapes(rename(kept, names), model)


register(
    VMUNet,
    {
        "mhsvm_vmunet_4h": {
            "params": 17.257,
            "weights": {"isic18": {"data": "ISIC 2018", "metrics": {"miou": 80.85, "dice": 89.41}}},
        },
        "mhsvm_vmunet_3h": {"args": {"heads": "CXS"}, "params": 17.386},
    },
    task="segmentation",
    page="https://github.com/PixDeep/MHS-VM/tree/main/pretrained",
    inputs=((3, 256, 256),),
    preprocess={"stretch": True, "size": (256, 256)},
    first_conv="patch_embed.conv",
    classifier="head",
    paper="preprint 2024, arXiv 2406.05992",
    code="https://github.com/PixDeep/MHS-VM",
    licence="Apache-2.0",
)
