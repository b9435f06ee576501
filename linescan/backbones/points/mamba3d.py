"""Mamba3D: patches of a cloud, pooled among neighbours and scanned in stored order, twice over all channels.

Paper: "Mamba3D: Enhancing Local Features for 3D Point Cloud Analysis via State Space Model", Han et al., ACM MM 2024,
arXiv 2404.14966. Official code: github.com/xhanxu/Mamba3D (no licence).

A block first gives each patch what its neighbours have and it has not (local norm pooling), then mixes all patches by
two scans over one projection, in the same order: what is scanned in one gates the other. The positions are added again
before every block.
"""

import re
from typing import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from ...checkpoint import rename
from ...errors import InputError, known
from ...layers.linear import linear
from ...layers.mamba import MambaMixer, stack_routes
from ...layers.norm import LayerNorm
from ...layers.points import Lengths, Patches, gather, knn
from .contract import PatchBackbone, as_linear, encoder_of, register

__all__ = ["LocalNormPool", "Mamba3D", "SwappedMamba"]


class LocalNormPool(nn.Module):
    """Tokens (B, 1 + G, dim), a class token first, and the k neighbours of each patch, (B, G, k) -> the same shape.

        d = neighbours - itself;    u = (d / (std(d) + 1e-5), itself) * weight + bias       K-norm
        p = sum_k u exp(u) / sum_k exp(u)                                                   K-pooling
        y = silu(proj(norm(p)))

    The class token stays as it is.

    Args:
        dim: channels.
        together: one standard deviation for the whole batch, as published, with which a cloud's answer depends on its
            batch mates; or one for each cloud.
    """

    def __init__(self, dim: int, together: bool):
        super().__init__()
        self.together = together
        self.weight = nn.Parameter(torch.ones(2, dim))  # of what neighbours have more, and of the token itself
        self.bias = nn.Parameter(torch.zeros(2, dim))
        self.norm = LayerNorm(2 * dim)
        self.proj = nn.Linear(2 * dim, dim)

    def no_weight_decay(self) -> set[str]:
        """One value per channel, for each half."""
        return {"weight", "bias"}

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        token, x = x[:, :1], x[:, 1:]
        more = gather(x, neighbours) - x[:, :, None]
        std = more.std() if self.together else more.std((1, 2, 3), keepdim=True)
        more = more / (std + 1e-5) * self.weight[0] + self.bias[0]
        pooled = (more * more.softmax(2)).sum(2)
        # Itself is the same for all neighbours: pooling leaves it as it is.
        y = torch.cat([pooled, x * self.weight[1] + self.bias[1]], -1)
        return torch.cat([token, F.silu(linear(self.proj, self.norm(y)))], 1)


class SwappedMamba(MambaMixer):
    """Two scans over one projection in the same order of tokens: the half that is scanned in one gates the other.

    The authors flip the channels for the second scan and flip its output back. Here the weights of that scan are
    flipped once, as a file is loaded.
    """

    def __init__(self, dim: int, d_state: int = 16, d_conv: int = 4, expand: float = 2):
        super().__init__(dim, "row, row", d_state, d_conv, expand)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        halves = x.unflatten(-1, (2, -1)).movedim(2, 1)
        return halves, halves.flip(1)


class Mamba3DBlock(nn.Module):
    """Tokens (B, 1 + G, dim) -> the same: positions, local pooling and a mixer are added to the stream.

    Args:
        dim: channels.
        mixer: of tokens.
        together: of `LocalNormPool`.
        drop_path: rate of stochastic depth, for both branches.
    """

    def __init__(self, dim: int, mixer: nn.Module, together: bool, drop_path: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.local = LocalNormPool(dim, together)
        self.norm2 = LayerNorm(dim)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, positions: Tensor, neighbours: Tensor) -> Tensor:
        """The stream, positions (B, 1 + G, dim), neighbours (B, G, k) -> the stream after the block."""
        x = x + positions
        x = x + self.drop_path(self.local(self.norm1(x), neighbours))
        return x + self.drop_path(self.mixer(self.norm2(x)))


class Mamba3D(PatchBackbone):
    """Mamba3D.

    Args:
        num_classes: classes; 0 for none.
        global_pool: "token+maxavg": the class token beside the sum of maximum and mean of the patches, as published;
            or "" for the tokens.
        embed_dim: channels of the stream.
        depth: number of blocks.
        groups, group_size, in_chans, sampling, patch_widths: of `PatchBackbone`.
        neighbours: k, patches that local pooling reads, the patch itself among them.
        bimamba_type: "v4" (two scans), or "none" (one).
        together: as published, local pooling is normalised over the whole batch, and the mean of the patches in
            `global_pool` is that of the first cloud for all, so that a cloud's answer changes with its batch mates.
            With False each cloud has its own, and the answer is the one that it has alone.
        d_state, d_conv, expand: of the mixer.
        drop_rate: dropout in the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    pools = ("token+maxavg", "")

    def __init__(
        self,
        num_classes: int = 40,
        global_pool: str = "token+maxavg",
        embed_dim: int = 384,
        depth: int = 12,
        groups: int = 128,
        group_size: int = 32,
        in_chans: int = 3,
        neighbours: int = 4,
        bimamba_type: str = "v4",
        together: bool = True,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
        sampling: str = "pointnet2",
        patch_widths: Sequence[int] = (128, 256, 512),
    ):
        super().__init__(embed_dim, groups, group_size, in_chans, nn.SiLU, sampling, patch_widths)
        if not 1 <= neighbours <= groups:
            raise InputError(f"local pooling reads from 1 to {groups} patches, all there are, not {neighbours}")
        known("bimamba_type", bimamba_type, ("v4", "none"))
        self.neighbours, self.together = neighbours, together
        self.init_class_token("head")

        def mixer() -> MambaMixer:
            if bimamba_type == "v4":
                return SwappedMamba(embed_dim, d_state, d_conv, expand)
            return MambaMixer(embed_dim, "row", d_state, d_conv, expand)

        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(Mamba3DBlock(embed_dim, mixer(), together, rate) for rate in rates)
        self.norm = LayerNorm(embed_dim)
        self.init_head(num_classes, global_pool, drop_rate)

    def embed(self, points: Tensor | Patches, lengths: Lengths = None) -> tuple[Tensor, tuple[int, ...], tuple]:
        found = self.group(points, lengths)
        x = self.patch_embed(found.points)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        positions = self.pos_mlp(found.centres)
        positions = torch.cat([self.cls_pos_embed.expand(x.shape[0], -1, -1), positions], 1)
        _, neighbours = knn(found.centres, found.centres, self.neighbours)
        return self.as_stream(x), x.shape[1:2], (positions, neighbours)

    def pool_one(self, x: Tensor, kind: str) -> Tensor:
        if kind == "token":
            return super().pool_one(x, kind)
        x = self.patch_tokens(x)
        mean = x.mean(1)
        return x.amax(1) + (mean[:1] if self.together else mean)

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to ours: the second scan's weights flipped (`SwappedMamba`), and dropped where there is none.

        A file of pre-training has no class token: it stays untrained, as in the authors' fine-tuning.
        """
        state = encoder_of(state)
        if not any(key.startswith("blocks.blocks.") for key in state):
            return state
        state, out = as_linear(state), {}
        for i, block in enumerate(self.blocks):
            for name, rows in stack_routes(state, f"blocks.blocks.{i}.mixer.", block.mixer).items():
                if len(rows) > 1:
                    channels = 1 if name == "x_proj" else 0
                    rows[1] = rows[1].flip(channels)
                out[f"blocks.{i}.mixer.{name}"] = rows
            for name, official in (("weight", "affine_alpha_feat"), ("bias", "affine_beta_feat")):
                halves = state.pop(f"blocks.blocks.{i}.lfa.lga.{official}").flatten().unflatten(0, (2, -1))
                out[f"blocks.{i}.local.{name}"] = halves
        for name, own in (("cls_token", self.cls_token), ("cls_pos", self.cls_pos_embed)):
            state.setdefault(name, own.detach())
        return out | rename({k: v for k, v in state.items() if not SECOND_SCAN.search(k)}, OFFICIAL_NAMES)


SECOND_SCAN = re.compile(r"\.mixer\.(conv1d_b|x_proj_b|dt_proj_b|A_b_log|D_b)\b")  # what is left without one

OFFICIAL_NAMES = (
    (r"^encoder\.", "patch_embed."),
    (r"^pos_embed\.", "pos_mlp."),
    (r"^blocks\.blocks\.", "blocks."),
    (r"\.lfa\.pre_norm_ft\.", ".local.norm."),
    (r"\.lfa\.mlp\.share_mlp\.", ".local.proj."),
    (r"^cls_head_finetune\.", "head."),
    (r"^cls_pos$", "cls_pos_embed"),
)


# -- models -----------------------------------------------------------------------------------------------------------

register(
    Mamba3D,
    task="point-classification",
    paper="ACM MM 2024, arXiv 2404.14966",
    code="https://github.com/xhanxu/Mamba3D",
    licence="none",
    params=16.934,
    gmacs=3.9,
    models={
        "mamba3d_modelnet40": {
            "data": "ModelNet40",
            "preprocess": {"up": "y"},
            "weights": {
                "pointmae_ft": {
                    "hub": "hanx/Mamba3D",
                    "file": "modelnet40_pointmae_94.7/ckpt-best.pth",
                    "metrics": {"top1": 94.7},
                },
                "scratch": {
                    "hub": "hanx/Mamba3D",
                    "file": "modelnet40_scratch_93.4/ckpt-best.pth",
                    "metrics": {"top1": 93.4},
                },
            },
        },
        "mamba3d_modelnet40_8k": {"inputs": ((8192, 3),), "preprocess": {"up": "y"}},
        "mamba3d_scanobjectnn": {
            "args": {"num_classes": 15},
            "inputs": ((2048, 3),),
            "data": "ScanObjectNN",
            "preprocess": {"up": "y", "normalise": False},
            "params": 16.928,
            "weights": {
                "hardest_pointmae_ft": {
                    "hub": "hanx/Mamba3D",
                    "file": "scanobjectnn_hardest_pointmae_92.05/ckpt-best.pth",
                    "metrics": {"top1": 92.05},
                },
                "hardest_scratch": {
                    "hub": "hanx/Mamba3D",
                    "file": "scanobjectnn_hardest_scratch_91.81/ckpt-best-91.8.pth",
                    "metrics": {"top1": 91.81},
                },
            },
        },
    },
)
