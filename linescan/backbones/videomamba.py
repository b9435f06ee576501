"""VideoMamba: a plain bidirectional Mamba backbone for images and for video, where a clip is a longer sequence.

Paper: "VideoMamba: State Space Model for Efficient Video Understanding", Li et al., ECCV 2024, arXiv 2403.06977.
Official code: github.com/OpenGVLab/VideoMamba (Apache-2.0).

Patches (tubelets in a clip) follow a class token, frame after frame, row-major in each; a spatial and a temporal
position embedding are added; pre-norm Mamba blocks without MLP read the sequence forward and backward and add both.
Also here: the student of masked pretraining, the visual encoder of the video-text models, and the student of
self-distillation.
"""

from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..checkpoint import strip_prefix
from ..layers.mamba import MambaBlock, stack_directions
from ..layers.norm import RMSNorm
from ..layers.pos_embed import resample_pos_embed, sinusoid_table
from ..scans import routes
from .contract import PlainBackbone, register

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
        global_pool: "token" (the class token) or "avg" (all tokens).
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
            raise ValueError(f"num_frames ({num_frames}) is a multiple of tubelet_size ({tubelet_size})")
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.patch_size = self.min_size = patch_size
        self.stride = stride or patch_size
        self.num_frames, self.tubelet_size = num_frames, tubelet_size
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.native_grid = tuple((side - patch_size) // self.stride + 1 for side in (height, width))

        if num_frames:
            kernel = (tubelet_size, patch_size, patch_size)
            self.patch_embed = nn.Conv3d(in_chans, embed_dim, kernel, (tubelet_size, self.stride, self.stride))
            self.temporal_pos_embed = nn.Parameter(torch.zeros(1, num_frames // tubelet_size, embed_dim))
        else:
            self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, self.stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.native_grid[0] * self.native_grid[1], embed_dim))
        self.blocks = nn.ModuleList(
            MambaBlock(
                embed_dim,
                rate,
                norm_layer,
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
            )
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm = norm_layer(embed_dim)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": self.stride, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.init_head(num_classes, global_pool or "token", drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation: every linear map is normal (0.02), also the step sizes', whose biases are 0."""
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            trunc_normal_(block.mixer.x_proj, std=0.02)
            trunc_normal_(block.mixer.dt_proj, std=0.02)
            nn.init.zeros_(block.mixer.dt_bias)
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=5**0.5)
            with torch.no_grad():
                block.mixer.out_proj.weight /= len(self.blocks) ** 0.5

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | ({"temporal_pos_embed"} if self.num_frames else set())

    def check_input(self, x: Tensor, in_chans: int) -> None:
        """As `Backbone`; a clip has a time axis of at least one tubelet."""
        if not self.num_frames:
            return super().check_input(x, in_chans)
        if x.ndim != 5:
            raise ValueError(
                f"{type(self).__name__} expects clips (B, {in_chans}, T, H, W), got shape {tuple(x.shape)}"
            )
        if x.shape[2] < self.tubelet_size:
            raise ValueError(f"a clip has at least {self.tubelet_size} frames, got {x.shape[2]}")
        super().check_input(x[:, :, 0], in_chans)

    # -- tokens -----------------------------------------------------------------------------------------------------

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Images or clips -> class token and patches with their positions (B, 1 + patches, dim), and the grid."""
        self.check_input(x, self.in_chans)
        x = self.patch_embed(x)
        grid = tuple(x.shape[2:])
        positions = resample_pos_embed(self.pos_embed, self.native_grid, grid[-2:], class_rows=[0])
        first, positions = self.cls_token + positions[:, :1], positions[:, 1:]
        if self.num_frames:
            time = self.temporal_pos_embed
            if time.shape[1] != grid[0]:
                time = resample_frames(time, grid[0])
            positions = (positions[:, None] + time[:, :, None]).flatten(1, 2)
        x = x.flatten(2).transpose(1, 2) + positions
        return torch.cat([first.expand(x.shape[0], -1, -1), x], 1), grid

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple]:
        x, grid = self.tokens(x)
        route = routes.table("row,-row", (1, x.shape[1]), x.device)
        return x.to(torch.promote_types(x.dtype, torch.float32)), grid, (route,)

    def patch_tokens(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return x[:, 1:]

    def pool(self, x: Tensor) -> Tensor:
        """The class token, or the mean over all tokens, by `global_pool`."""
        if self.global_pool == "token":
            return x[:, 0]
        return x.mean(1) if self.global_pool else x

    # -- weights ----------------------------------------------------------------------------------------------------

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to ours. An image checkpoint is inflated into a video model: each kernel in the middle of its
        tubelet, the temporal embedding as it is; positions are resampled to this model's grid and frames."""
        state = {k: v for k, v in state.items() if not k.startswith(("distill_head.", "clip_decoder."))}
        if any(key.startswith("layers.") for key in state):
            state = self._from_official(state)
        if self.num_frames and state["patch_embed.weight"].ndim == 4:
            kernel = state["patch_embed.weight"]
            inflated = kernel.new_zeros(*kernel.shape[:2], self.tubelet_size, *kernel.shape[2:])
            inflated[:, :, self.tubelet_size // 2] = kernel
            state["patch_embed.weight"] = inflated
            state["temporal_pos_embed"] = self.temporal_pos_embed.detach()
        rows = state["pos_embed"].shape[1]
        if rows != self.pos_embed.shape[1]:
            side = int((rows - 1) ** 0.5)
            state["pos_embed"] = resample_pos_embed(state["pos_embed"], (side, side), self.native_grid, class_rows=[0])
        if self.num_frames and state["temporal_pos_embed"].shape[1] != self.temporal_pos_embed.shape[1]:
            state["temporal_pos_embed"] = resample_frames(state["temporal_pos_embed"], self.temporal_pos_embed.shape[1])
        return state

    def _from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state, out = dict(state), {}
        for i, block in enumerate(self.blocks):
            for name, rows in stack_directions(state, f"layers.{i}.mixer.", block.mixer).items():
                out[f"blocks.{i}.mixer.{name}"] = rows
        for key, value in state.items():
            key = key.replace("layers.", "blocks.", 1).replace("norm_f.", "norm.")
            key = key.replace("patch_embed.proj.", "patch_embed.")
            out[key.replace("temporal_pos_embedding", "temporal_pos_embed")] = value
        return out


def resample_frames(table: Tensor, frames: int) -> Tensor:
    """A temporal table (1, T, D) at another number of frames: linear, align_corners=False."""
    compute = torch.promote_types(table.dtype, torch.float32)
    table_t = table.to(compute).transpose(1, 2)
    return F.interpolate(table_t, size=frames, mode="linear", align_corners=False).transpose(1, 2).to(table.dtype)


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

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `VideoMamba`, keeping the distillation head."""
        extra = {k: v for k, v in state.items() if k.startswith("distill_head.")}
        return super().checkpoint_filter(state) | extra


class Decoder(nn.Module):
    """From the student's visible tokens to the teacher's space: linear, LayerNorm, unit length if `normalize`."""

    def __init__(self, dim: int, output_dim: int, normalize: bool):
        super().__init__()
        self.head = nn.Linear(dim, output_dim)
        self.norm = nn.LayerNorm(output_dim)
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
        if pool_type not in ("cls+avg", "cls", "avg", "cls_cat_avg", None):
            raise ValueError(f"pool_type is 'cls+avg', 'cls', 'avg', 'cls_cat_avg' or None, not {pool_type!r}")
        depth = len(self.blocks)
        self.taps = [depth - 1 - i * return_interval for i in reversed(range(return_layers))]
        self.include_last = include_last
        self.decoders = nn.ModuleList(Decoder(self.embed_dim, output_dim, normalize) for _ in self.taps)
        self.pool_type = pool_type
        self.pool_norm = nn.LayerNorm(self.embed_dim) if pool_type else None
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
        route = routes.table("row,-row", (1, x.shape[1]), x.device)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        streams = []
        for i, block in enumerate(self.blocks):
            before, x = x, self.run(block, x, route)
            if i == len(self.blocks) - 1:
                streams.append(x if self.include_last else before)
            elif i in self.taps:
                streams.append(self.norm(x))
        return self.norm(x), streams

    def forward_decoded(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clips and mask -> (decoded (layers, B, V, output_dim), the streams with their fixed positions (.., dim))."""
        _, streams = self.forward_streams(x, mask)
        table = sinusoid_table(1 + self._patches(x), self.embed_dim).to(streams[0])
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

    def _patches(self, x: Tensor) -> int:
        kernels = (self.tubelet_size, self.patch_size, self.patch_size)
        steps = (self.tubelet_size, self.stride, self.stride)
        count = 1
        for size, kernel, step in zip(x.shape[2:], kernels, steps):
            count *= (size - kernel) // step + 1
        return count

    def _check_mask(self, mask: Tensor, x: Tensor) -> None:
        if mask.dtype != torch.bool or tuple(mask.shape) != tuple(x.shape[:2]):
            raise ValueError(f"mask is bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
        if (mask.sum(1) != mask[0].sum()).any():
            raise ValueError("every sample of a batch hides the same number of tokens")

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `VideoMamba`, keeping the decoders; a video-text file's visual part is taken out of the whole."""
        state = strip_prefix(state, "vision_encoder.")
        extra = {k.replace("clip_decoder.", "decoders."): v for k, v in state.items() if k.startswith("clip_decoder.")}
        return super().checkpoint_filter(state) | extra


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
    preprocess={"crop_pct": 1.0, "interpolation": "bilinear"},  # as published: crops as high as the short side
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
