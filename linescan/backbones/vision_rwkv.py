"""Vision-RWKV: plain backbones of RWKV mixing to both sides, with the work of attention done in linear time.

Paper: "Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures", Duan et al., ICLR 2025,
arXiv 2403.02308. Official code: github.com/OpenGVLab/Vision-RWKV (Apache-2.0). Written from the paper and the published
weights.

Blocks of a spatial mix over tokens and a channel mix; both blend every token with its four neighbours first
(`QuadShift`). VRWKV mixes tokens by Bi-WKV, weights that fall with distance; VRWKV6 by the matrix states of RWKV-6, run
forward and backward. Bi-WKV is the paper's equation; the official CUDA kernel departs from it by 0.01 to 1 % (it counts
some distances one too long). `VisionRWKVAdapter` is the form for segmentation and detection.
"""

import re
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..checkpoint import rename, strip_prefix
from ..layers.adapter import ViTAdapter
from ..layers.pos_embed import resample_pos_embed
from ..layers.rwkv import HEAD_DIM, QuadShift, RWKVBlock, SpatialMix, SpatialMix6
from .contract import PlainBackbone, register

__all__ = ["VisionRWKV", "VisionRWKVAdapter"]


class VisionRWKV(PlainBackbone):
    """Vision-RWKV.

    Args:
        img_size: size (or height and width) that the position embedding is built for; other sizes run too. Sides that
            `patch_size` does not divide are padded by zeros at the bottom and the right.
        patch_size: side of the square patches.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: "avg" (of the grid), or "" for the tokens as they are.
        embed_dim: channels of the stream.
        depth: number of blocks.
        version: of RWKV: 4 (VRWKV) or 6 (VRWKV6, where the neighbours are of each head of 64 channels).
        post_norm: norms after the mixes, not before.
        key_norm: a norm of what is read of the keys, in both mixes.
        init_values: initial value of a learned factor on each branch; None for none.
        shift_gamma, shift_pixels: of `QuadShift`.
        class_token: a class token as the last one; it has no position and no neighbours.
        head_hidden: hidden channels of a classifier with tanh between; None for a single Linear.
        drop_rate: dropout before the classifier and after the position embedding.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        version: int = 4,
        post_norm: bool = False,
        key_norm: bool = False,
        init_values: float | None = None,
        shift_gamma: float = 0.25,
        shift_pixels: int = 1,
        class_token: bool = False,
        head_hidden: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if version not in (4, 6):
            raise ValueError(f"version is 4 or 6, not {version!r}")
        if version == 6 and embed_dim % HEAD_DIM:
            raise ValueError(f"version 6 has heads of {HEAD_DIM} channels: embed_dim is a multiple, not {embed_dim}")
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.patch_size = self.min_size = patch_size
        self.native_grid = self.grid_of(*((img_size, img_size) if isinstance(img_size, int) else img_size))
        self.head_hidden = head_hidden

        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.native_grid[0] * self.native_grid[1], embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            RWKVBlock(
                embed_dim,
                QuadShift(embed_dim // HEAD_DIM if version == 6 else 1, shift_gamma, shift_pixels),
                SpatialMix6 if version == 6 else SpatialMix,
                i / max(depth - 1, 1),
                post_norm,
                key_norm,
                init_values,
                rate,
            )
            for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation of Linear layers; the mixes' own parameters have theirs by channel and depth."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    # -- tokens -----------------------------------------------------------------------------------------------------

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across for an image of this size."""
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        self.check_input(x, self.in_chans)
        height, width = x.shape[-2:]
        x = self.patch_embed(F.pad(x, (0, -width % self.patch_size, 0, -height % self.patch_size)))
        grid = tuple(x.shape[-2:])
        x = x.flatten(2).mT + resample_pos_embed(self.pos_embed, self.native_grid, grid)
        if self.cls_token is not None:
            x = torch.cat([x, self.cls_token.expand(len(x), -1, -1)], 1)
        return self.pos_drop(x), grid, (grid,)

    def patch_tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x[:, : grid[0] * grid[1]]

    # -- classifier -------------------------------------------------------------------------------------------------

    def init_head(self, num_classes: int, global_pool: str, drop_rate: float) -> None:
        super().init_head(num_classes, global_pool, drop_rate)
        self._add_hidden()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier, its hidden layer included, for `num_classes` (0: none)."""
        super().reset_classifier(num_classes, global_pool)
        self._add_hidden()

    def _add_hidden(self) -> None:
        self.head_inner = nn.Identity()
        if self.head_hidden and self.num_classes:
            place = self.head.weight
            self.head_inner = nn.Sequential(nn.Linear(self.num_features, self.head_hidden), nn.Tanh()).to(place)
            self.head = nn.Linear(self.head_hidden, self.num_classes).to(place)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(self.head_inner(x))

    def pool(self, x: Tensor) -> Tensor:
        """Mean over the grid, without the class token, or all tokens as they are without `global_pool`."""
        if not self.global_pool:
            return x
        return (x if self.cls_token is None else x[:, :-1]).mean(1)

    # -- weights ----------------------------------------------------------------------------------------------------

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to ours, of any of the three trainers; a position embedding of another grid is resampled."""
        out = rename(state, OFFICIAL_KEYS)
        for key, value in out.items():
            if key.endswith((".decay", ".first")) and value.ndim == 1:
                out[key] = value[None]
        for i in range(len(self.blocks)):
            mix = f"blocks.{i}.spatial_mix"
            if f"{mix}.time_maa_w" in out:
                out[f"{mix}.mix"] = torch.cat([out.pop(f"{mix}.time_maa_{name}") for name in "wkvrg"])
        positions = out.get("pos_embed")
        if positions is not None and positions.shape[1] != self.pos_embed.shape[1]:
            side = int(positions.shape[1] ** 0.5)
            out["pos_embed"] = resample_pos_embed(positions, (side, side), self.native_grid)
        return out


OFFICIAL_KEYS = (
    (r"^backbone\.", ""),
    (r"^patch_embed\.projection\.", "patch_embed."),
    (r"^ln1\.", "norm."),
    (r"^head\.0\.", "head_inner.0."),
    (r"^head\.(fc|2)\.", "head."),
    (r"^layers\.", "blocks."),
    (r"\.ln0\.", ".pre_norm."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"\.att\.", ".spatial_mix."),
    (r"\.ffn\.", ".channel_mix."),
    (r"\.spatial_(decay|first|mix_[kvr])$", r".\1"),
    (r"\.time_maa_(x|w1|w2)$", r".mix_\1"),
    (r"\.time_(decay|decay_w1|decay_w2)$", r".\1"),
    (r"\.time_faaaa$", ".bonus"),
    (r"\.ln_x\.", ".head_norm."),
)


class VisionRWKVAdapter(VisionRWKV):
    """Vision-RWKV with a `ViTAdapter` for segmentation and detection: images -> four maps at strides 4, 8, 16, 32.

    The published UperNet (`features="each"`) and Mask R-CNN ("last") files have:

        tiny    embed_dim=192, init_values=1.0
        small   embed_dim=384, post_norm=True, init_values=1e-5
        base    embed_dim=768, post_norm=True, init_values=1e-5, deform_heads=12, deform_ratio=0.5
        large   embed_dim=1024, depth=24, post_norm=True, key_norm=True, init_values=1e-5, deform_heads=16,
                deform_ratio=0.5

    Args:
        features: tokens added to the maps: after "each" part of the backbone (segmentation), or the "last" (detection).
        deform_heads, deform_ratio, deform_points: of the adapter's attention.
        conv_width: channels of the adapter's convolutional stem.
        kwargs: of `VisionRWKV`; `patch_size` is 16 and `depth` a multiple of four.
    """

    def __init__(
        self,
        features: str = "each",
        deform_heads: int = 6,
        deform_ratio: float = 1.0,
        deform_points: int = 4,
        conv_width: int = 64,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        super().__init__(in_chans=in_chans, drop_path_rate=drop_path_rate, num_classes=0, **kwargs)
        if self.patch_size != 16 or len(self.blocks) % 4 or self.cls_token is not None:
            raise ValueError("an adapter needs patches of 16 pixels, a depth that 4 divides, and no class token")
        self.norm = nn.Identity()
        self.adapter = ViTAdapter(
            self.embed_dim,
            deform_heads,
            deform_ratio,
            deform_points,
            in_chans,
            conv_width,
            drop_path_rate=drop_path_rate,
            features=features,
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        tokens, grid, context = self.embed(x)
        quarter = len(self.blocks) // 4

        def part(start: int, tokens: Tensor) -> Tensor:
            for block in self.blocks[start : start + quarter]:
                tokens = self.run(block, tokens, *context)
            return tokens

        return self.adapter(x, tokens, grid, [partial(part, i * quarter) for i in range(4)])

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `VisionRWKV`, of a whole segmentor or detector too; a classification file leaves the adapter as it is."""
        state = strip_prefix(state, "backbone.")
        adapter = {k: v for k, v in state.items() if k.startswith(("level_embed", "spm.", "interactions.", "up."))}
        adapter |= {k: v for k, v in state.items() if re.match(r"norm[1-4]\.|adapter\.", k)}
        state = super().checkpoint_filter({k: v for k, v in state.items() if k not in adapter})
        state |= {f"adapter.{k.removeprefix('adapter.')}": v for k, v in adapter.items()}
        if not any(k.startswith("adapter.") for k in state):
            own = {k: v for k, v in self.state_dict().items() if k.startswith("adapter.") or ".ls" in k}
            state = own | {k: v for k, v in state.items() if not k.startswith(("norm.", "head"))}
        return state


# -- models -----------------------------------------------------------------------------------------------------------

register(
    VisionRWKV,
    paper="ICLR 2025, arXiv 2403.02308",
    code="https://github.com/OpenGVLab/Vision-RWKV",
    licence="Apache-2.0",
    data="ImageNet-1K",
    hub="OpenGVLab/Vision-RWKV",
    first_conv="patch_embed",
    models={
        "vrwkv_tiny": {
            "params": 6.155,
            "gmacs": 1.2,
            "weights": {"in1k": {"file": "vrwkv_t_in1k_224.pth", "metrics": {"top1": 75.1}}},
        },
        "vrwkv_small": {
            "args": {"embed_dim": 384, "post_norm": True, "init_values": 1.0},
            "params": 23.820,
            "gmacs": 4.6,
            "weights": {"in1k": {"file": "vrwkv_s_in1k_224.pth", "metrics": {"top1": 80.1}}},
        },
        "vrwkv_base": {
            "args": {"embed_dim": 768, "post_norm": True, "init_values": 1e-5},
            "params": 93.646,
            "gmacs": 18.2,
            "weights": {"in1k": {"file": "vrwkv_b_in1k_224.pth", "metrics": {"top1": 82.0}}},
        },
        # Fine-tuned at 384 pixels after ImageNet-22K; its positions are of 192 pixels.
        "vrwkv_large": {
            "args": {
                "img_size": 192,
                "embed_dim": 1024,
                "depth": 24,
                "post_norm": True,
                "key_norm": True,
                "init_values": 1e-5,
                "head_hidden": 3072,
            },
            "inputs": ((3, 384, 384),),
            "classifier": ("head", "head_inner.0"),
            "params": 334.882,
            "gmacs": 189.5,
            "weights": {"in22k_ft_in1k": {"file": "vrwkv_l_22kto1k_384.pth", "metrics": {"top1": 86.0}}},
        },  # fmt: skip
        "vrwkv6_tiny": {
            "args": {"version": 6},
            "params": 7.641,
            "gmacs": 1.6,
            "weights": {"in1k": {"file": "vrwkv6_t_in1k_224.pth", "metrics": {"top1": 76.6}}},
        },
        "vrwkv6_small": {
            "args": {"version": 6, "embed_dim": 384, "post_norm": True, "init_values": 1e-5},
            "params": 27.677,
            "gmacs": 5.6,
            "weights": {"in1k": {"file": "vrwkv6_s_in1k_224.pth", "metrics": {"top1": 81.1}}},
        },
        "vrwkv6_base": {
            "args": {"version": 6, "embed_dim": 768, "post_norm": True, "init_values": 1e-5},
            "params": 104.898,
            "gmacs": 20.9,
            "weights": {"in1k": {"file": "vrwkv6_b_in1k_224.pth", "metrics": {"top1": 82.6}}},
        },
    },
)
