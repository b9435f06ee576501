"""Vim (Vision Mamba): a plain backbone whose only mixer is a Mamba layer scanned forward and backward.

Paper: "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model", Zhu et al.,
ICML 2024, arXiv 2401.09417. Official code: github.com/hustvl/Vim (Apache-2.0).

A strided convolution makes patches; a class token stands in the middle of the sequence; pre-norm blocks without MLP add
the mixer's output to the stream. Also here: the first release (rotary embedding of the stream, mean pooling) and the
dense forms for segmentation and detection.
"""

import torch
from timm.layers import calculate_drop_path_rates, lecun_normal_, to_2tuple
from torch import Tensor, nn

from ..checkpoint import rename
from ..errors import InputError, known
from ..layers.linear import trunc_normal_
from ..layers.mamba import MambaMixer, TurnedBlock, stack_routes
from ..layers.norm import RMSNorm, at_least_float32
from ..layers.pos_embed import grid_rope, rotate_pairs
from ..layers.stems import PatchConv2d
from .contract import DenseForm, PlainBackbone, check_images, register

__all__ = ["Vim"]


class Vim(PlainBackbone):
    """Vision Mamba.

    Args:
        img_size: size (or height and width) that the position embedding is built for; other sizes run too.
        patch_size: side of the square patches.
        stride: step between patches; default `patch_size`, smaller for the finer "+" models.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: "token" (the class token), a pooling of all tokens, or "" for the tokens as they are.
        embed_dim: channels of the stream.
        depth: number of blocks.
        d_state, d_conv, expand: of the Mamba mixer.
        bimamba_type: "v2" (each direction its own convolution, projections, A and D), "v1" (only A differs), "none"
            (forward only).
        divide_out: halve the sum of the two directions ("v2"; needed by all published class-token models).
        class_token: where the class token stands: "middle", "head", "double" (head and tail, averaged) or None.
        rope: turn the stream by rotary embeddings of the grid before every block (first release; without class token).
        init_layer_scale: initial value of a learned factor on each mixer's output; None for none.
        drop_rate: dropout before the classifier and after the position embedding.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    file_class_token = "middle"
    dense = DenseForm(out_indices=(5, 11, 17, 23), norms=None, neck="rescaled", trunk={"class_token": None})

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        bimamba_type: str = "v2",
        divide_out: bool = True,
        class_token: str | None = "middle",
        rope: bool = False,
        init_layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        known("class_token", class_token, ("middle", "head", "double", None))
        known("bimamba_type", bimamba_type, ("v2", "v1", "none"))
        if rope and class_token is not None:
            raise InputError("rope turns grid tokens only: use class_token=None with it")
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.patch_size = self.min_size = patch_size
        self.stride = stride or patch_size
        self.rope = rope
        height, width = to_2tuple(img_size)
        if min(height, width) < patch_size:
            raise InputError(f"img_size is at least {patch_size}x{patch_size} pixels, not {height}x{width}: one patch")

        self.patch_embed = PatchConv2d(in_chans, embed_dim, patch_size, self.stride)
        self.init_positions(self.grid_of(height, width), class_token)
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            TurnedBlock(
                embed_dim,
                MambaMixer(
                    embed_dim,
                    "row" if bimamba_type == "none" else "row, -row",
                    d_state,
                    d_conv,
                    expand,
                    shared="inputs" if bimamba_type == "v1" else "",
                    scale=0.5 if divide_out and bimamba_type == "v2" else 1.0,
                    init_layer_scale=init_layer_scale,
                ),
                norm_layer=RMSNorm,
                drop_path=rate,
            )
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm = RMSNorm(embed_dim)
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The published initialisation: only the forward steps start log-uniform, the backward ones at softplus(0)."""
        lecun_normal_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        for table in (self.pos_embed, self.cls_token, self.cls_pos_embed):
            if table is not None:
                trunc_normal_(table, std=0.02)
        for block in self.blocks:
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=5**0.5)
            block.mixer.out_proj.weight /= len(self.blocks) ** 0.5
            block.mixer.dt_bias[1:].zero_()
        if self.num_classes:
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        grid = x.shape[1:3]
        x = self.add_class_tokens((x + self.positions(grid)).flatten(1, 2))
        x = at_least_float32(self.pos_drop(x))
        # The mixers read the tokens in a line, as they are stored, class tokens among them.
        return x, grid, (None, grid_rope(grid, self.embed_dim, like=x) if self.rope else None)

    def as_next_reads(self, x: Tensor, unit: int, context: tuple) -> Tensor:
        """Turned once more, where there is a rotary embedding and a next block."""
        rope = context[1]
        return x if rope is None or unit == len(self.feature_info) - 1 else rotate_pairs(x, *rope)

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's: the two directions' parameters stacked, computed tables dropped."""
        if not any(key.startswith("layers.") for key in state):
            return state
        state, out = dict(state), {}
        for i, block in enumerate(self.blocks):
            for name, rows in stack_routes(state, f"layers.{i}.mixer.", block.mixer).items():
                out[f"blocks.{i}.mixer.{name}"] = rows
        if "cls_token_head" in state:
            out["cls_token"] = torch.cat([state.pop("cls_token_head"), state.pop("cls_token_tail")], 1)
        return out | rename({k: v for k, v in state.items() if not k.startswith("rope.")}, OFFICIAL_NAMES)


OFFICIAL_NAMES = (
    (r"^layers\.(\d+)\.norm\.", r"blocks.\1.norm1."),
    (r"^layers\.", "blocks."),
    (r"^norm_f\.", "norm."),
    (r"^patch_embed\.proj\.", "patch_embed."),
)


# -- models -----------------------------------------------------------------------------------------------------------

register(
    Vim,
    paper="ICML 2024, arXiv 2401.09417",
    code="https://github.com/hustvl/Vim",
    licence="Apache-2.0",
    data="ImageNet-1K",
    first_conv="patch_embed",
    models={
        "vim_tiny_patch16_224": {
            "args": {"embed_dim": 192},
            "params": 7.148,
            "weights": {
                "in1k": {
                    "hub": "hustvl/Vim-tiny-midclstok",
                    "file": "vim_t_midclstok_76p1acc.pth",
                    "metrics": {"top1": 76.1},
                },
            },
        },
        "vim_small_patch16_224": {
            "args": {"embed_dim": 384},
            "params": 25.797,
            "weights": {
                "in1k": {
                    "hub": "hustvl/Vim-small-midclstok",
                    "file": "vim_s_midclstok_80p5acc.pth",
                    "metrics": {"top1": 80.5},
                },
            },
        },
        "vim_base_patch16_224": {
            "args": {"embed_dim": 768},
            "params": 97.598,
            "weights": {
                "in1k": {
                    "hub": "hustvl/Vim-base-midclstok",
                    "file": "vim_b_midclstok_81p9acc.pth",
                    "metrics": {"top1": 81.9},
                },
            },
        },
        # Fine-tuned with patches every 8 pixels.
        "vim_tiny_patch16_stride8_224": {
            "args": {"embed_dim": 192, "stride": 8},
            "params": 7.250,
            "weights": {
                "in1k": {
                    "hub": "hustvl/Vim-tiny-midclstok",
                    "file": "vim_t_midclstok_ft_78p3acc.pth",
                    "metrics": {"top1": 78.3},
                },
            },
        },
        "vim_small_patch16_stride8_224": {
            "args": {"embed_dim": 384, "stride": 8},
            "params": 26.001,
            "weights": {
                "in1k": {
                    "hub": "hustvl/Vim-small-midclstok",
                    "file": "vim_s_midclstok_ft_81p6acc.pth",
                    "metrics": {"top1": 81.6},
                },
            },
        },
    },
)
