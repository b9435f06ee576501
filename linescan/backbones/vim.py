"""Vim (Vision Mamba): a plain backbone whose only mixer is a Mamba layer scanned forward and backward.

Paper: "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model", Zhu et al.,
ICML 2024, arXiv 2401.09417. Official code: github.com/hustvl/Vim (Apache-2.0).

A strided convolution makes patches; a class token stands in the middle of the sequence; pre-norm blocks without MLP add
the mixer's output to the stream. Also here: the first release (rotary embedding of the stream, mean pooling) and the
dense forms for segmentation and detection.
"""

from typing import Sequence

import torch
from timm.layers import calculate_drop_path_rates, lecun_normal_, trunc_normal_
from torch import Tensor, nn

from ..checkpoint import strip_prefix
from ..layers.mamba import MambaBlock, stack_directions
from ..layers.norm import RMSNorm
from ..layers.pos_embed import grid_rope, resample_pos_embed
from ..layers.pyramid import RescaledFeatures, SimpleFeaturePyramid
from ..scans import routes
from .contract import PlainBackbone, register

__all__ = ["Vim", "VimDense"]


class Vim(PlainBackbone):
    """Vision Mamba.

    Args:
        img_size: size (or height and width) that the position embedding is built for; other sizes run too.
        patch_size: side of the square patches.
        stride: step between patches; default `patch_size`, smaller for the finer "+" models.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: "token" (the class token), "avg" (all tokens), "max", or "" for the tokens as they are.
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
        if class_token not in ("middle", "head", "double", None):
            raise ValueError(f"class_token is 'middle', 'head', 'double' or None, not {class_token!r}")
        if bimamba_type not in ("v1", "v2", "none"):
            raise ValueError(f"bimamba_type is 'v2', 'v1' or 'none', not {bimamba_type!r}")
        if rope and class_token is not None:
            raise ValueError("rope turns grid tokens only: use class_token=None with it")
        self.in_chans = in_chans
        self.class_token = class_token
        self.num_features = self.embed_dim = embed_dim
        self.patch_size = self.min_size = patch_size
        self.stride = stride or patch_size
        self.rope = rope
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width) < patch_size:
            raise ValueError(f"img_size is at least {patch_size}x{patch_size} pixels, not {height}x{width}: one patch")
        self.native_grid = self.grid_of(height, width)
        self.directions = "row" if bimamba_type == "none" else "row,-row"

        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, self.stride)
        classes = {None: 0, "double": 2}.get(class_token, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, classes, embed_dim)) if classes else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.native_grid[0] * self.native_grid[1] + classes, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            MambaBlock(
                embed_dim,
                rate,
                n_routes=1 if bimamba_type == "none" else 2,
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
                shared_inputs=bimamba_type == "v1",
                scale=0.5 if divide_out and bimamba_type == "v2" else 1.0,
                init_layer_scale=init_layer_scale,
            )
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm = RMSNorm(embed_dim)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": self.stride, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.init_head(num_classes, global_pool or ("token" if classes else "avg"), drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation: only the forward steps start log-uniform, the backward ones at softplus(0)."""
        lecun_normal_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        for block in self.blocks:
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=5**0.5)
            with torch.no_grad():
                block.mixer.out_proj.weight /= len(self.blocks) ** 0.5
                block.mixer.dt_bias[1:].zero_()
        if self.num_classes:
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    # -- tokens -----------------------------------------------------------------------------------------------------

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across for an image of this size."""
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    def class_rows(self, grid: tuple[int, int]) -> list[int]:
        """Where the class tokens stand in the sequence."""
        patches = grid[0] * grid[1]
        return {None: [], "head": [0], "middle": [patches // 2], "double": [0, patches + 1]}[self.class_token]

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        self.check_input(x, self.in_chans)
        x = self.patch_embed(x)
        grid = tuple(x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        rows = self.class_rows(grid)
        for i, row in enumerate(rows):
            token = self.cls_token[:, i : i + 1].expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :row], token, x[:, row:]], 1)
        x = x + resample_pos_embed(self.pos_embed, self.native_grid, grid, self.class_rows(self.native_grid), rows)
        route = routes.table(self.directions, (1, x.shape[1]), x.device)
        rope = None
        if self.rope:
            rope = tuple(t.to(x) for t in grid_rope(grid, self.embed_dim))
        x = self.pos_drop(x)
        return x.to(torch.promote_types(x.dtype, torch.float32)), grid, (route, rope)

    def patch_tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        rows = self.class_rows(grid)
        if not rows:
            return x
        if self.class_token == "middle":
            return torch.cat([x[:, : rows[0]], x[:, rows[0] + 1 :]], 1)
        return x[:, 1 : 1 + grid[0] * grid[1]]

    def pool(self, x: Tensor) -> Tensor:
        """Class token(s), mean or maximum over all tokens, by `global_pool`."""
        if self.global_pool == "token" and self.class_token is not None:
            if self.class_token == "double":
                return (x[:, 0] + x[:, -1]) / 2
            return x[:, 0 if self.class_token == "head" else (x.shape[1] - 1) // 2]
        if self.global_pool == "max":
            return x.amax(1)
        return x.mean(1) if self.global_pool else x

    # -- weights ----------------------------------------------------------------------------------------------------

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to ours: the two directions' parameters stacked, rotary tables dropped (they are computed)."""
        state = strip_prefix(state, "backbone.")
        if any(key.startswith("layers.") for key in state):
            state = self._from_official(state)
        positions = state.get("pos_embed")
        if positions is not None and positions.shape[1] != self.pos_embed.shape[1]:
            side = int((positions.shape[1] - len(self.class_rows((1, 1)))) ** 0.5)
            rows = self.class_rows((side, side)), self.class_rows(self.native_grid)
            state["pos_embed"] = resample_pos_embed(positions, (side, side), self.native_grid, *rows)
        return state

    def _from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state, out = dict(state), {}
        for i, block in enumerate(self.blocks):
            for name, rows in stack_directions(state, f"layers.{i}.mixer.", block.mixer).items():
                out[f"blocks.{i}.mixer.{name}"] = rows
        if "cls_token_head" in state:
            out["cls_token"] = torch.cat([state.pop("cls_token_head"), state.pop("cls_token_tail")], 1)
        for key, value in state.items():
            if not key.startswith("rope."):
                key = key.replace("layers.", "blocks.", 1).replace("norm_f.", "norm.")
                out[key.replace("patch_embed.proj.", "patch_embed.")] = value
        return out


class VimDense(Vim):
    """Vim as a backbone for segmentation and detection: images -> a list of maps.

    Args:
        out_indices: blocks whose features are taken.
        features: "mixer" for each mixer's output alone, before it joins the stream (Vim-Ti segmentation), or "stream"
            for the stream after the block, as the next block reads it (Vim-S segmentation, detection).
        last: the last feature in "stream" mode: "add" (the stream), "add & norm", or "none" (the mixer's output).
        neck: "rescaled" (strides 4 to 32, `RescaledFeatures`), "simple" (p2 to p6, `SimpleFeaturePyramid`, from the
            last feature alone), or None for the raw maps.
        out_channels: channels of the "simple" neck.
        kwargs: of `Vim`; the class token is dropped from the features.
    """

    def __init__(
        self,
        out_indices: Sequence[int] = (5, 11, 17, 23),
        features: str = "stream",
        last: str = "add",
        neck: str | None = "rescaled",
        out_channels: int = 256,
        class_token: str | None = None,
        **kwargs,
    ):
        super().__init__(class_token=class_token, num_classes=0, **kwargs)
        for name, value, known in (
            ("features", features, ("mixer", "stream")),
            ("last", last, ("add", "add & norm", "none")),
            ("neck", neck, ("rescaled", "simple", None)),
        ):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(map(repr, known))}, not {value!r}")
        depth = len(self.blocks)
        self.out_indices = sorted(i % depth for i in out_indices)
        self.features, self.last = features, last
        self.neck = {
            "rescaled": lambda: RescaledFeatures(self.embed_dim, self.stride),
            "simple": lambda: SimpleFeaturePyramid(self.embed_dim, out_channels),
            None: nn.Identity,
        }[neck]()
        self.single = neck == "simple"
        if self.single and last != "add & norm":
            self.norm = nn.Identity()

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Images -> the chosen blocks' features (B, dim, H, W), before the neck."""
        x, grid, context = self.embed(x)
        kept = []
        for i, block in enumerate(self.blocks):
            x, h = self.run(block.branch, x, *context)
            if self.features == "stream" and i - 1 in self.out_indices:
                kept.append(x)  # the stream after the block before, turned once more where there is a rotary embedding
            if self.features == "mixer" and i in self.out_indices:
                kept.append(h)
            x = x + block.drop_path(h)
        if self.features == "stream" and len(self.blocks) - 1 in self.out_indices:
            kept.append({"add": lambda: x, "add & norm": lambda: self.norm(x), "none": lambda: h}[self.last]())
        kept = [self.patch_tokens(tokens, grid).to(self.pos_embed.dtype) for tokens in kept]
        return [tokens.transpose(1, 2).unflatten(2, grid) for tokens in kept]

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.forward_maps(x)
        return self.neck(maps[-1] if self.single else maps)

    def _from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        out = super()._from_official(state)
        return {f"neck.{k}" if k.startswith(("fpn", "simfp_")) else k: v for k, v in out.items()}

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Vim`; detectron2's `net.` prefix is removed and the neck's keys are kept.

        A classification file's middle class token goes where this model has none, and its position with it.
        """
        state = strip_prefix({key.removeprefix("net."): value for key, value in state.items()}, "backbone.")
        if self.cls_token is None and state.pop("cls_token", None) is not None:
            before, after = state["pos_embed"].tensor_split([(state["pos_embed"].shape[1] - 1) // 2], 1)
            state["pos_embed"] = torch.cat([before, after[:, 1:]], 1)
        return super().checkpoint_filter(state)


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
