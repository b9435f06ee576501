"""VideoMamba: a plain bidirectional Mamba backbone for images and for video, where a clip is a longer sequence.

Paper: "VideoMamba: State Space Model for Efficient Video Understanding", Li et al., ECCV 2024, arXiv 2403.06977.
Official code: github.com/OpenGVLab/VideoMamba (Apache-2.0).

Patches (tubelets in a clip) follow a class token, frame after frame, row-major in each; a spatial and a temporal
position embedding are added; pre-norm Mamba blocks without MLP read the sequence forward and backward and add both.
Also here: the student of masked pretraining, the visual encoder of the video-text models, and the student of
self-distillation.
"""

from math import prod
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from .. import zoo
from ..checkpoint import rename, strip_prefix
from ..errors import InputError, known
from ..layers.blocks import Block
from ..layers.linear import init_linear, trunc_normal_
from ..layers.mamba import MambaMixer, stack_routes
from ..layers.norm import LayerNorm, RMSNorm, at_least_float32
from ..layers.pos_embed import resample_frames, sinusoid_table
from ..layers.stems import PatchConv2d, PatchConv3d
from .contract import IMAGENET, PlainBackbone, check_clips, check_images, register

__all__ = ["VideoMamba", "VideoMambaDistilled", "VideoMambaPretrain"]


class VideoMamba(PlainBackbone):
    """VideoMamba for images (B, C, H, W), or with `num_frames` for clips (B, C, T, H, W).

    Args:
        img_size: size (or height and width) that the position embedding is built for; other sizes run too.
        patch_size: side of the square patches.
        stride: step between patches of an image; default `patch_size`.
        num_frames: frames that the temporal embedding is built for (others run too); 0 for images.
        tubelet_size: frames in a patch of a clip.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: "token" (the class token), a pooling of all tokens, or "" for the tokens as they are.
        embed_dim: channels of the stream.
        depth: number of blocks.
        d_state, d_conv, expand: of the Mamba mixer.
        norm_layer: dim -> norm; RMSNorm in all published models.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        num_frames: int = 0,
        tubelet_size: int = 1,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        norm_layer: Callable = RMSNorm,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if num_frames % tubelet_size:
            raise InputError(f"num_frames ({num_frames}) is a multiple of tubelet_size ({tubelet_size})")
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.patch_size = self.min_size = patch_size
        self.stride = stride or patch_size
        self.num_frames, self.tubelet_size = num_frames, tubelet_size

        if num_frames:
            kernel = (tubelet_size, patch_size, patch_size)
            self.patch_embed = PatchConv3d(in_chans, embed_dim, kernel, (tubelet_size, self.stride, self.stride))
            self.temporal_pos_embed = nn.Parameter(torch.zeros(1, num_frames // tubelet_size, embed_dim))
        else:
            self.patch_embed = PatchConv2d(in_chans, embed_dim, patch_size, self.stride)
        self.init_positions(self.grid_of(*to_2tuple(img_size)), "head")
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                MambaMixer(embed_dim, d_state=d_state, d_conv=d_conv, expand=expand),
                norm_layer=norm_layer,
                drop_path=rate,
            )
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm = norm_layer(embed_dim)
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The published initialisation: every linear map is normal (0.02), also the step sizes', whose biases are 0."""
        self.apply(init_linear)
        for table in (self.pos_embed, self.cls_pos_embed):
            trunc_normal_(table, std=0.02)
        for block in self.blocks:
            trunc_normal_(block.mixer.x_proj, std=0.02)
            trunc_normal_(block.mixer.dt_proj, std=0.02)
            nn.init.zeros_(block.mixer.dt_bias)
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=5**0.5)
            block.mixer.out_proj.weight /= len(self.blocks) ** 0.5

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    # -- tokens -----------------------------------------------------------------------------------------------------

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Images or clips -> class token and patches with their positions (B, 1 + patches, dim), and the grid."""
        name = type(self).__name__
        if self.num_frames:
            check_clips(x, self.in_chans, self.tubelet_size, self.min_size, name)
            x = self.patch_embed(x).permute(0, 2, 3, 4, 1)  # (B, T, H, W, dim)
            time = resample_frames(self.temporal_pos_embed, x.shape[1])
            positions = self.positions(x.shape[2:4])[:, None] + time[:, :, None, None]
        else:
            check_images(x, self.in_chans, self.min_size, name)
            x = self.patch_embed(x).permute(0, 2, 3, 1)
            positions = self.positions(x.shape[1:3])
        return self.add_class_tokens((x + positions).flatten(1, -2)), x.shape[1:-1]

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple]:
        x, grid = self.tokens(x)
        return at_least_float32(x), grid, ()

    # -- weights ----------------------------------------------------------------------------------------------------

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's; what only other forms of the model have is left out."""
        state = {k: v for k, v in state.items() if not k.startswith(("distill_head.", "clip_decoder."))}
        if not any(key.startswith("layers.") for key in state):
            return state
        out = {}
        for i, block in enumerate(self.blocks):
            for name, rows in stack_routes(state, f"layers.{i}.mixer.", block.mixer).items():
                out[f"blocks.{i}.mixer.{name}"] = rows
        return out | rename(state, OFFICIAL_NAMES)

    def fit_positions(self, state: dict[str, Tensor], img_size=None) -> dict[str, Tensor]:
        """As `Backbone`, and the temporal table to this model's frames.

        An image checkpoint is inflated into a video model: each kernel in the middle of its tubelet, the temporal
        table as it is.
        """
        state = dict(super().fit_positions(state, img_size))
        if not self.num_frames:
            return state
        kernel = state["patch_embed.weight"]
        if kernel.ndim == 4:
            inflated = kernel.new_zeros(*kernel.shape[:2], self.tubelet_size, *kernel.shape[2:])
            inflated[:, :, self.tubelet_size // 2] = kernel
            state["patch_embed.weight"] = inflated
            state["temporal_pos_embed"] = self.temporal_pos_embed.detach()
        frames = self.temporal_pos_embed.shape[1]
        return state | {"temporal_pos_embed": resample_frames(state["temporal_pos_embed"], frames)}


OFFICIAL_NAMES = (
    (r"^layers\.(\d+)\.norm\.", r"blocks.\1.norm1."),
    (r"^layers\.", "blocks."),
    (r"^norm_f\.", "norm."),
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^temporal_pos_embedding$", "temporal_pos_embed"),
)


class VideoMambaDistilled(VideoMamba):
    """The student of self-distillation: its tokens, through one more head, follow a smaller teacher's.

    Args:
        teacher_dim: channels of the teacher's tokens.
        kwargs: of `VideoMamba`.
    """

    def __init__(self, teacher_dim: int = 384, **kwargs):
        super().__init__(**kwargs)
        self.distill_head = nn.Sequential(type(self.norm)(self.embed_dim), nn.Linear(self.embed_dim, teacher_dim))
        trunc_normal_(self.distill_head[1].weight, std=0.02)
        nn.init.zeros_(self.distill_head[1].bias)

    def forward_distill(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> logits, and unit-length tokens (B, L, teacher_dim) for a loss of 2 - 2 cos against the teacher's.

        The distillation head reads the stream after the final norm.
        """
        x = self.forward_features(x)
        return self.forward_head(x), F.normalize(self.distill_head(x), dim=-1)

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `VideoMamba`, keeping the distillation head."""
        extra = {k: v for k, v in state.items() if k.startswith("distill_head.")}
        return super().translate(state) | extra


class Decoder(nn.Module):
    """From the student's visible tokens to the teacher's space: linear, LayerNorm, unit length if `normalize`."""

    def __init__(self, dim: int, output_dim: int, normalize: bool):
        super().__init__()
        self.head = nn.Linear(dim, output_dim)
        self.norm = LayerNorm(output_dim)
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.head(x))
        return F.normalize(x, dim=-1) if self.normalize else x


class VideoMambaPretrain(VideoMamba):
    """The student of masked pretraining against CLIP tokens, and the visual encoder of the video-text models.

    Args:
        output_dim: channels of the teacher's tokens.
        return_layers: streams decoded, from the deepest backward.
        return_interval: blocks between them.
        include_last: whether the deepest stream has the last block's output in it. The published training left it out
            (its fused norm returned the residual before the addition), so that block learned nothing there.
        normalize: scale decoded tokens to unit length (masked pretraining; not in video-text).
        pool_type: for `forward_pooled`: "cls+avg", "cls", "avg" or "cls_cat_avg"; None for no pooling norm.
        kwargs: of `VideoMamba`.
    """

    def __init__(
        self,
        output_dim: int = 512,
        return_layers: int = 1,
        return_interval: int = 1,
        include_last: bool = False,
        normalize: bool = True,
        pool_type: str | None = None,
        num_frames: int = 8,
        **kwargs,
    ):
        super().__init__(num_classes=0, num_frames=num_frames, **kwargs)
        known("pool_type", pool_type, ("cls+avg", "cls", "avg", "cls_cat_avg", None))
        depth = len(self.blocks)
        self.taps = [depth - 1 - i * return_interval for i in reversed(range(return_layers))]
        self.include_last = include_last
        self.decoders = nn.ModuleList(Decoder(self.embed_dim, output_dim, normalize) for _ in self.taps)
        self.pool_type = pool_type
        self.pool_norm = LayerNorm(self.embed_dim) if pool_type else None
        for decoder in self.decoders:
            trunc_normal_(decoder.head.weight, std=0.02)
            nn.init.zeros_(decoder.head.bias)

    def forward_streams(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Runs the visible tokens: -> (final stream after the norm (B, V, dim), the tapped streams, shallow to deep).

        Args:
            x: clips (B, C, T, H, W).
            mask: bool (B, 1 + patches), True where a token is hidden; as many visible tokens in every sample. The class
                token comes first and is visible.
        """
        x, _ = self.tokens(x)
        if mask is not None:
            self._check_mask(mask, x)
            x = x[~mask].reshape(x.shape[0], -1, x.shape[2])
        x, streams = at_least_float32(x), []
        for i, block in enumerate(self.blocks):
            before, x = x, self.run_unit(block, x, ())
            if i == len(self.blocks) - 1:
                streams.append(x if self.include_last else before)
            elif i in self.taps:
                streams.append(self.norm(x))
        return self.norm(x), streams

    def forward_decoded(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clips and mask -> (decoded (layers, B, V, output_dim), the streams with their fixed positions (.., dim))."""
        _, streams = self.forward_streams(x, mask)
        patches = prod((x.shape[2] // self.tubelet_size, *self.grid_of(*x.shape[-2:])))
        table = sinusoid_table(1 + patches, self.embed_dim).to(streams[0])
        table = table.expand(x.shape[0], -1, -1)
        if mask is not None:
            table = table[~mask].reshape(x.shape[0], -1, self.embed_dim)
        decoded = [decoder(stream + table) for decoder, stream in zip(self.decoders, streams)]
        return torch.stack(decoded), torch.stack(streams)

    def forward_pooled(self, x: Tensor, mask: Tensor | None = None, keep_temporal: bool = False):
        """Clips -> (patch tokens after the norm (B, V - 1, dim), pooled (B, 1 or frames, dim)).

        With `keep_temporal` the patches are averaged frame by frame and the class token is added to each.
        """
        tokens, _ = self.forward_streams(x, mask)
        first, patches = tokens[:, :1], tokens[:, 1:]
        mean = patches.mean(1, keepdim=True)
        if keep_temporal:
            mean = patches.unflatten(1, (self.temporal_pos_embed.shape[1], -1)).mean(2)
        pooled = {
            "cls": lambda: first,
            "avg": lambda: mean,
            "cls+avg": lambda: first + mean,
            "cls_cat_avg": lambda: torch.cat([first, mean], 1),
        }[self.pool_type or "cls+avg"]()
        return patches, self.pool_norm(pooled) if self.pool_norm is not None else pooled

    def _check_mask(self, mask: Tensor, x: Tensor) -> None:
        if mask.dtype != torch.bool or tuple(mask.shape) != tuple(x.shape[:2]):
            raise InputError(f"mask is bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
        if (mask.sum(1) != mask[0].sum()).any():
            raise InputError("every sample of a batch hides the same number of tokens")

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `VideoMamba`, keeping the decoders; a video-text file's visual part is taken out of the whole."""
        state = strip_prefix(state, "vision_encoder.")
        extra = {k.replace("clip_decoder.", "decoders."): v for k, v in state.items() if k.startswith("clip_decoder.")}
        return super().translate(state) | extra


# -- models -----------------------------------------------------------------------------------------------------------

WIDTHS = {
    "tiny": {"embed_dim": 192, "depth": 24},
    "small": {"embed_dim": 384, "depth": 24},
    "middle": {"embed_dim": 576, "depth": 32},
    "base": {"embed_dim": 768, "depth": 24},
}
PUBLISHED = {
    "paper": "ECCV 2024, arXiv 2403.06977",
    "code": "https://github.com/OpenGVLab/VideoMamba",
    "licence": "Apache-2.0",
    "hub": "OpenGVLab/VideoMamba",
    "first_conv": "patch_embed",
}


def _image_weights(letter: str, top1: float, larger: Sequence[tuple[int, float, float]] = ()) -> dict:
    """The files for images: of 224 pixels, and fine-tuned at each larger side (side, top-1, GMACs) in turn."""
    name = f"videomamba_{letter}16_in1k_res224"
    weights = {"in1k": {"file": f"{name}.pth", "metrics": {"top1": top1}}}
    for side, accuracy, gmacs in larger:
        name += f"to{side}"
        weights[f"in1k_{side}"] = {
            "file": f"{name}.pth",
            "args": {"img_size": side},
            "inputs": ((3, side, side),),
            "metrics": {"top1": accuracy},
            "gmacs": gmacs,
        }
    return weights


register(
    VideoMamba,
    **PUBLISHED,
    data="ImageNet-1K",
    models={
        "videomamba_tiny_patch16_224": {
            "args": WIDTHS["tiny"],
            "params": 7.148,
            "gmacs": 1.1,
            "weights": _image_weights("t", 76.9, ((448, 79.3, 4.3), (576, 79.6, 7.1))),
        },
        "videomamba_small_patch16_224": {
            "args": WIDTHS["small"],
            "params": 25.797,
            "gmacs": 4.3,
            "weights": _image_weights("s", 81.2, ((448, 83.2, 16.9), (576, 83.5, 28.0))),
        },
        # Middle and base: distilled from a smaller VideoMamba.
        "videomamba_middle_patch16_224": {
            "args": WIDTHS["middle"],
            "params": 74.217,
            "gmacs": 12.7,
            "weights": _image_weights("m", 82.8, ((448, 83.8, 50.4), (576, 84.0, 83.1))),
        },
        "videomamba_base_patch16_224": {
            "args": WIDTHS["base"],
            "params": 97.598,
            "gmacs": 16.9,
            "weights": _image_weights("b", 82.7),
        },
    },
)

AS_EVALUATED = {"crop_pct": 1.0, "interpolation": "bilinear"}  # crops as high as the short side

# Of each data set: its classes, and the (frames, side) of the published files, in the order of the results below.
VIDEO_SETS = {
    "k400": ("Kinetics-400", 400, ((8, 224), (16, 224), (32, 224), (64, 224), (64, 384))),
    "ssv2": ("Something-Something V2", 174, ((8, 224), (16, 224), (16, 288))),
    "breakfast": ("Breakfast", 10, ((32, 224), (64, 224))),
    "coin": ("COIN", 180, ((32, 224), (64, 224))),
}


def _video_weights(letter: str, results: dict[str, Sequence[float]]) -> dict:
    """The files for clips, by tags such as `ssv2_f16_res288`; `results` has the top-1 of each file of a data set.

    "mask_ft" in a tag: fine-tuned after masked pretraining.
    """
    weights = {}
    for start, accuracies in results.items():
        data, classes, shapes = VIDEO_SETS[start.partition("_")[0]]
        for (frames, side), top1 in zip(shapes, accuracies, strict=True):
            tag = f"{start}_f{frames}" + (f"_res{side}" if side != 224 else "")
            size = "res224" if side == 224 else f"res224to{side}"
            weights[tag] = {
                "file": f"videomamba_{letter}16_{start}_f{frames}_{size}.pth",
                "args": {"num_frames": frames, "img_size": side, "num_classes": classes},
                "inputs": ((3, frames, side, side),),
                "data": data,
                "metrics": {"top1": top1},
            }
    return weights


register(
    VideoMamba,
    **PUBLISHED,
    preprocess=AS_EVALUATED,
    models={
        "videomamba_video_tiny_patch16_224": {
            "args": WIDTHS["tiny"],
            "params": 7.034,
            "weights": _video_weights("t", {
                "k400": (76.9, 78.1, 78.8, 79.6, 80.3),
                "ssv2": (65.1, 66.0, 66.2),
                "breakfast": (94.3, 94.3),
                "coin": (86.2, 87.0),
            }),
        },
        "videomamba_video_small_patch16_224": {
            "args": WIDTHS["small"],
            "weights": _video_weights("s", {
                "k400": (79.3, 80.8, 81.5, 81.8, 82.7),
                "ssv2": (66.6, 67.7, 68.1),
                "breakfast": (95.3, 97.4),
                "coin": (88.4, 88.7),
            }),
        },
        "videomamba_video_middle_patch16_224": {
            "args": WIDTHS["middle"],
            "params": 73.876,
            "weights": _video_weights("m", {
                "k400": (80.6, 81.9, 82.4, 82.8, 83.3),
                "k400_mask_ft": (82.0, 83.4, 83.9, 84.3, 85.0),
                "ssv2": (67.3, 68.3, 68.4),
                "ssv2_mask_ft": (70.2, 71.0, 71.4),
                "breakfast": (94.8, 95.8),
                "breakfast_mask_ft": (97.9, 96.9),
                "coin": (88.3, 89.5),
                "coin_mask_ft": (89.6, 90.4),
            }),
        },
    },
)  # fmt: skip

PRETRAINED = {**PUBLISHED, "inputs": ((3, 8, 224, 224),), "preprocess": {**IMAGENET, **AS_EVALUATED}}

# The students of masked pretraining against CLIP's tokens, with their decoder.
zoo.register(
    VideoMambaPretrain,
    {
        "videomamba_pretrain_middle_patch16_224": {
            "args": WIDTHS["middle"],
            "weights": {
                "k400_f8": {"file": "videomamba_m16_k400_mask_pt_f8_res224.pth", "data": "Kinetics-400"},
                "ssv2_f8": {"file": "videomamba_m16_ssv2_mask_pt_f8_res224.pth", "data": "Something-Something V2"},
            },
        },
    },
    **PRETRAINED,
    task="pretraining",
)

# The visual encoders of the video-text models; results are zero-shot text-to-video retrieval.
zoo.register(
    VideoMambaPretrain,
    {
        "videomamba_text_middle_patch16_224": {
            "args": {**WIDTHS["middle"], "normalize": False, "pool_type": "cls+avg"},
            "weights": {
                f"{pairs}m_f8": {
                    "file": f"videomamba_m16_{pairs}M_f8_res224.pth",
                    "data": f"{pairs} M video-text pairs",
                    "metrics": {"MSRVTT R@1": recall},
                }
                for pairs, recall in ((5, 32.0), (17, 34.7), (25, 35.6))
            },
        },
    },
    **PRETRAINED,
    task="video-text",
)
