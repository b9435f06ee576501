"""Vision-RWKV: plain backbones of RWKV mixing to both sides, with the work of attention done in linear time.

Paper: "Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures", Duan et al., ICLR 2025,
arXiv 2403.02308. Official code: github.com/OpenGVLab/Vision-RWKV (Apache-2.0). Written from the paper and the published
weights.

Blocks of a spatial mix over tokens and a channel mix; both blend every token with its four neighbours first
(`QuadShift`). VRWKV mixes tokens by Bi-WKV, weights that fall with distance; VRWKV6 by the matrix states of RWKV-6, run
forward and backward. Bi-WKV is the paper's equation; the official CUDA kernel departs from it by 0.01 to 1 % (it counts
some distances one too long). For segmentation and detection it works with a `ViTAdapter`.
"""

from functools import partial

from timm.layers import LayerScale, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..checkpoint import rename
from ..errors import InputError, known
from ..layers.linear import init_linear, trunc_normal_
from ..layers.norm import LayerNorm
from ..layers.rwkv import HEAD_DIM, ChannelMix, Place, QuadShift, RWKVBlock, SpatialMix, SpatialMix6, from_official
from ..layers.stems import PatchConv2d, pad_to_multiple
from .contract import DenseForm, PlainBackbone, check_images, register

__all__ = ["VisionRWKV"]


class VisionRWKV(PlainBackbone):
    """Vision-RWKV.

    Args:
        img_size: size (or height and width) that the position embedding is built for; other sizes run too. Sides that
            `patch_size` does not divide are padded by zeros at the bottom and the right.
        patch_size: side of the square patches.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling of the grid, "token" (the class token), or "" for the tokens as they are.
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

    dense = DenseForm(norms=None, neck="adapter", new_keys=r"\.scale[12]\.")
    class_positions = False
    pools_class_tokens = False

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
        known("version", version, (4, 6))
        if version == 6 and embed_dim % HEAD_DIM:
            raise InputError(f"version 6 has heads of {HEAD_DIM} channels: embed_dim is a multiple, not {embed_dim}")
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.patch_size = self.stride = self.min_size = patch_size
        self.head_hidden = head_hidden

        self.patch_embed = PatchConv2d(in_chans, embed_dim, patch_size, patch_size)
        self.init_positions(self.grid_of(*to_2tuple(img_size)), "tail" if class_token else None)
        self.pos_drop = nn.Dropout(drop_rate)
        mixer = SpatialMix6 if version == 6 else SpatialMix
        shift = partial(QuadShift, embed_dim // HEAD_DIM if version == 6 else 1, shift_gamma, shift_pixels)
        places = [Place(i, depth) for i in range(depth)]
        self.blocks = nn.ModuleList(
            RWKVBlock(
                embed_dim,
                mixer(embed_dim, shift(), place, key_norm),
                ChannelMix(embed_dim, shift(), place, key_norm),
                post_norm=post_norm,
                scale_layer=None if init_values is None else partial(LayerScale, init_values=init_values),
                drop_path=rate,
                pre_norm=place.index == 0,
            )
            for place, rate in zip(places, calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.norm = LayerNorm(embed_dim)
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation of Linear layers; the mixes' own parameters have theirs by channel and depth."""
        self.apply(init_linear)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    # -- tokens -----------------------------------------------------------------------------------------------------

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        x = self.patch_embed(pad_to_multiple(x, self.patch_size)).permute(0, 2, 3, 1)
        grid = x.shape[1:3]
        x = self.add_class_tokens((x + self.positions(grid)).flatten(1, 2))
        return self.pos_drop(x), grid, (grid,)

    # -- classifier -------------------------------------------------------------------------------------------------

    def set_classifier(self, num_classes: int, **factory) -> None:
        """A new, untrained classifier, its hidden layer included, for `num_classes` (0: none)."""
        super().set_classifier(num_classes, **factory)
        self.head_inner = nn.Identity()
        if self.head_hidden and num_classes:
            hidden = nn.Linear(self.head_hidden_size, self.head_hidden, **factory)
            self.head_inner = nn.Sequential(hidden, nn.Tanh())
            self.head = nn.Linear(self.head_hidden, num_classes, **factory)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(self.head_inner(x))

    # -- weights ----------------------------------------------------------------------------------------------------

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's, of any of the three trainers."""
        return from_official(rename(state, OFFICIAL_KEYS))


OFFICIAL_KEYS = (
    (r"^patch_embed\.projection\.", "patch_embed."),
    (r"^ln1\.", "norm."),
    (r"^head\.0\.", "head_inner.0."),
    (r"^head\.(fc|2)\.", "head."),
    (r"^layers\.", "blocks."),
)


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
