"""PointMamba: patches of a cloud along two Hilbert curves, one after the other, through plain Mamba blocks.

Paper: "PointMamba: A Simple State Space Model for Point Cloud Analysis", Liang et al., NeurIPS 2024, arXiv 2402.10739.
Official code: github.com/LMD0311/PointMamba (Apache-2.0).

Every curve has a copy of the tokens, marked by a learned scale and shift, and one scan reads the copies in turn: each
along its own curve. The copies stay in stored order; the scan reads them through a table. Also here: the first release
(branch "old"), which sorts by each coordinate instead, marks nothing, and ends with two norms.
"""

from typing import Sequence

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from ...checkpoint import rename
from ...errors import InputError
from ...layers.blocks import Block, run
from ...layers.mamba import MambaMixer, stack_routes
from ...layers.norm import LayerNorm
from ...layers.points import Lengths, Patches
from ...scans.routes import point_table
from .contract import PatchBackbone, as_linear, encoder_of, register

__all__ = ["PointMamba", "in_turn"]


def in_turn(tables: Tensor) -> Tensor:
    """Routes (B, K, G) over one set of tokens -> one route (B, 1, K * G) over K copies of it: route k over copy k."""
    copies, tokens = tables.shape[1:]
    first = torch.arange(0, copies * tokens, tokens, dtype=tables.dtype, device=tables.device)
    return (tables + first[:, None]).flatten(1)[:, None]


class PointMamba(PatchBackbone):
    """PointMamba.

    Args:
        num_classes: classes; 0 for none.
        global_pool: "avg", "max", "avg+max", "token+avg" (as published with a class token), or "" for the tokens.
        embed_dim: channels of the stream.
        depth: number of blocks.
        groups, group_size, in_chans, sampling, patch_widths: of `PatchBackbone`.
        curves: see `point_table`; default: "hilbert, hilbert-trans", in the first release "axis0, axis1, axis2".
        cell: side of the cells that the curves are drawn through, in the unit of the coordinates.
        together: whether the curves are as deep as the largest cloud of the batch needs, as published, so that a
            cloud's answer can change with its batch mates; or as each cloud needs, with which it does not.
        class_token: append a class token at the end of the stream.
        first_release: build the model of the first release.
        d_state, d_conv, expand: of the Mamba mixer.
        drop_rate: dropout in the classifier.
        stream_drop_rate: dropout of the stream after each block.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last; in the first release the same
            at all but the last.
    """

    def __init__(
        self,
        num_classes: int = 40,
        global_pool: str | None = None,
        embed_dim: int = 384,
        depth: int = 12,
        groups: int = 64,
        group_size: int = 32,
        in_chans: int = 3,
        curves: str | None = None,
        cell: float = 0.02,
        together: bool = True,
        class_token: bool = False,
        first_release: bool = False,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_rate: float = 0.5,
        stream_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        sampling: str = "pointnet2",
        patch_widths: Sequence[int] = (128, 256, 512),
    ):
        super().__init__(embed_dim, groups, group_size, in_chans, nn.GELU, sampling, patch_widths)
        if not cell > 0:
            raise InputError(f"the side of a cell is more than 0, not {cell}")
        self.curves = curves or ("axis0, axis1, axis2" if first_release else "hilbert, hilbert-trans")
        self.cell, self.together = cell, together
        self.copies = point_table(torch.zeros(1, 1, 3), self.curves).shape[1]
        self.init_class_token("tail" if class_token else None)
        self.register_parameter("order_scale", None)
        self.register_parameter("order_shift", None)
        if not first_release:
            self.order_scale = nn.Parameter(1 + 0.02 * torch.randn(self.copies, embed_dim))
            self.order_shift = nn.Parameter(0.02 * torch.randn(self.copies, embed_dim))
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        if first_release:
            rates = [drop_path_rate] * (depth - 1) + [0.0]
        self.blocks = nn.ModuleList(
            Block(embed_dim, MambaMixer(embed_dim, 1, d_state, d_conv, expand), drop_path=rate) for rate in rates
        )
        self.stream_drop = nn.Dropout(stream_drop_rate)
        norm = LayerNorm(embed_dim)
        self.norm = nn.Sequential(norm, LayerNorm(embed_dim)) if first_release else norm
        self.init_head(num_classes, global_pool or ("token+avg" if class_token else "avg"), drop_rate)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """PyTorch's and Mamba's own, as published; what a block adds to the stream starts smaller in deep models."""
        for block in self.blocks:
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=5**0.5)
            block.mixer.out_proj.weight /= len(self.blocks) ** 0.5

    def no_weight_decay(self) -> set[str]:
        """Scales and shifts too: one value per channel, stacked over curves."""
        return super().no_weight_decay() | {"order_scale", "order_shift"}

    def routes(self, centres: Tensor) -> Tensor:
        """The orders of patches along the curves: centres (B, G, 3) -> (B, K, G)."""
        return point_table(centres, self.curves, cell=self.cell, together=self.together)

    def mark(self, tokens: Tensor, curve: int | slice = slice(None)) -> Tensor:
        """Tokens (B, K or 1, G, dim), marked for their curves."""
        if self.order_scale is None:
            return tokens
        return tokens * self.order_scale[curve].unsqueeze(-2) + self.order_shift[curve].unsqueeze(-2)

    def embed(self, points: Tensor | Patches, lengths: Lengths = None) -> tuple[Tensor, tuple[int, ...], tuple]:
        found = self.group(points, lengths)
        x = self.mark(self.patch_embed(found.points)[:, None]) + self.pos_mlp(found.centres)[:, None]
        x = self.add_class_tokens(x.expand(-1, self.copies, -1, -1).flatten(1, 2))
        route = in_turn(self.routes(found.centres))
        if self.has_class_token:
            route = torch.cat([route, torch.full_like(route[..., :1], x.shape[1] - 1)], -1)
        return self.as_stream(x), x.shape[1:2], (route,)

    def run_unit(self, unit: nn.Module, x: Tensor, context: tuple, **options) -> Tensor:
        return self.stream_drop(run(unit, x, checkpointing=self.grad_checkpointing, route=context[0], **options))

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to ours, of classifiers and of the encoders in files of pre-training."""
        state = encoder_of(state)
        if not any(key.startswith("blocks.layers.") for key in state):
            return state
        state = as_linear(state)
        out = translate_blocks(state, self.blocks, "blocks.")
        for name, official in (("order_scale", "OrderScale_gamma_{}"), ("order_shift", "OrderScale_beta_{}")):
            if getattr(self, name) is not None:
                out[name] = torch.stack([state.pop(official.format(k + 1)) for k in range(self.copies)])
        two = isinstance(self.norm, nn.Sequential)
        return out | rename(state, (*TWO_NORMS * two, *OFFICIAL_NAMES))


def translate_blocks(state: dict[str, Tensor], blocks: nn.ModuleList, prefix: str = "") -> dict[str, Tensor]:
    """Takes mixers and norms of blocks, `{prefix}layers.N`, out of an official state; returns them as `blocks.N`."""
    out = {}
    for i, block in enumerate(blocks):
        for name, rows in stack_routes(state, f"{prefix}layers.{i}.mixer.", block.mixer, ("",)).items():
            out[f"blocks.{i}.mixer.{name}"] = rows
        for key in [key for key in state if key.startswith(f"{prefix}layers.{i}.")]:
            out[key.replace(f"{prefix}layers.", "blocks.").replace(".norm.", ".norm1.")] = state.pop(key)
    return out


OFFICIAL_NAMES = (
    (r"^encoder\.", "patch_embed."),
    (r"^pos_embed\.", "pos_mlp."),
    (r"^blocks\.norm_f\.", "norm."),
    (r"^cls_head_finetune\.", "head."),
    (r"^cls_pos$", "cls_pos_embed"),
)
TWO_NORMS = (r"^norm\.", "norm.1."), (r"^blocks\.norm_f\.", "norm.0.")


# -- models -----------------------------------------------------------------------------------------------------------

MODELNET = {"data": "ModelNet40", "preprocess": {"up": "y"}}
SCANOBJECTNN = {"inputs": ((2048, 3),), "data": "ScanObjectNN", "preprocess": {"up": "y", "normalise": False}}
CURRENT = "https://github.com/LMD0311/PointMamba/releases/download/ckpts-2/"
FIRST = "https://github.com/LMD0311/PointMamba/releases/download/ckpts/"

register(
    PointMamba,
    task="point-classification",
    paper="NeurIPS 2024, arXiv 2402.10739",
    code="https://github.com/LMD0311/PointMamba",
    licence="Apache-2.0",
    models={
        "pointmamba_modelnet40": {
            **MODELNET,
            "params": 12.298,
            "weights": {"shapenet55_ft": {"url": CURRENT + "finetune_modelnet.pth", "metrics": {"top1": 93.6}}},
        },
        "pointmamba_scanobjectnn": {
            **SCANOBJECTNN,
            "args": {"num_classes": 15, "groups": 128},
            "params": 12.291,
            "weights": {
                "hardest": {"url": CURRENT + "finetune_scan_hardest.pth", "metrics": {"top1": 89.31}},
                "objbg": {"url": CURRENT + "finetune_scan_objbg.pth", "metrics": {"top1": 94.32}},
                "objonly": {"url": CURRENT + "finetune_scan_only.pth", "metrics": {"top1": 92.60}},
            },
        },
        # The first release. Of two files for one data set, the second was fine-tuned with rotations.
        "pointmamba_old_modelnet40": {
            **MODELNET,
            "args": {"first_release": True},
            "params": 12.297,
            "weights": {
                "shapenet55_ft": {"url": FIRST + "modelnet_pretrain.pth", "metrics": {"top1": 93.6}},
                "scratch": {"url": FIRST + "modelnet_scratch.pth", "metrics": {"top1": 92.4}},
            },
        },
        "pointmamba_old_scanobjectnn": {
            **SCANOBJECTNN,
            "args": {"num_classes": 15, "groups": 128, "first_release": True},
            "params": 12.291,
            "weights": {
                "hardest_ft2": {"url": FIRST + "scan_hardest_pretrain2.pth", "metrics": {"top1": 88.17}},
                "hardest_ft": {"url": FIRST + "scan_hardest_pretrain.pth", "metrics": {"top1": 84.87}},
                "hardest_scratch": {"url": FIRST + "scan_hardest_scratch.pth", "metrics": {"top1": 82.48}},
                "objbg_ft2": {"url": FIRST + "scan_objbg_pretrain2.pth", "metrics": {"top1": 93.29}},
                "objbg_ft": {"url": FIRST + "scan_objbg_pretrain.pth", "metrics": {"top1": 90.71}},
                "objbg_scratch": {"url": FIRST + "scan_objbg_scratch.pth", "metrics": {"top1": 88.30}},
                "objonly_ft2": {"url": FIRST + "scan_objonly_pretrain2.pth", "metrics": {"top1": 91.91}},
                "objonly_ft": {"url": FIRST + "scan_objonly_pretrain.pth", "metrics": {"top1": 88.47}},
                "objonly_scratch": {"url": FIRST + "scan_objonly_scratch.pth", "metrics": {"top1": 87.78}},
            },
        },
    },
)
