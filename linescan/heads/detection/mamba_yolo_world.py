"""Mamba-YOLO-World: detection of whatever words name, where image and text meet in the final states of Mamba-2 scans.

Paper: "Mamba-YOLO-World: Marrying YOLO-World with Mamba for Open-Vocabulary Detection", Wang et al., ICASSP 2025,
arXiv 2409.08513. Official code: github.com/Xuan-World/Mamba-YOLO-World (GPL-3.0). Written from the paper and the
published weights. The backbone is that of YOLOv8, head and text encoder (CLIP's, which is not part of the network) are
those of YOLO-World (Cheng et al., CVPR 2024, arXiv 2401.17270).

    image --YOLOv8Backbone--> three maps --MambaFusionPAN--> three maps --YOLOWorldHead--> logits and boxes
    prompts --CLIP--> embeddings -------------^     \\-----> embeddings --------^

A scan over the prompts ends in a state of `d_state` tokens, however many prompts there are. Its tokens stand before
those of the image on every route (PGSS, parallel-guided selective scan), and the states of these scans before the
prompts in the next scan over them (SGSS, serial-guided). All of it takes time linear in pixels and prompts.
"""

import math
from functools import partial
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint import fit_shapes, rename
from ...errors import InputError
from ...layers.conv_module import conv_module
from ...layers.linear import linear
from ...layers.mamba import Mamba2Mixer
from ...layers.mlp import GatedMlp
from ...layers.norm import LayerNorm
from ...layers.ss2d import SS2D, SS2D_NAMES, SSDScan
from ...layers.stems import batch_norm, depthwise
from ...scans.matmul import project_routes
from ...scans.recurrence import without_autocast
from ...zoo import register

__all__ = ["Levels", "MambaFusionPAN", "MambaYOLOWorld", "YOLOWorldHead", "YOLOv8Backbone", "official_names"]

STRIDES = (8, 16, 32)
NORM = {"eps": 1e-3, "momentum": 0.03}

conv = partial(conv_module, act_layer=nn.SiLU, **NORM)


# -- backbone: YOLOv8 -------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """(B, dim, H, W) -> the same: two 3 x 3 convolutions, with a shortcut around them if `add`."""

    def __init__(self, dim: int, add: bool):
        super().__init__()
        self.conv1, self.conv2, self.add = conv(dim, dim, 3), conv(dim, dim, 3), add

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        return x + y if self.add else y


class CSPLayer(nn.Module):
    """(B, in_chans, H, W) -> (B, out_chans, H, W): a chain of bottlenecks, of which every link goes into the output.

    Args:
        in_chans, out_chans: channels; half of the latter go through the chain.
        blocks: bottlenecks.
        add: whether they have shortcuts.
        links: maps beside those of the chain that the output is made of.
    """

    def __init__(self, in_chans: int, out_chans: int, blocks: int, add: bool = True, links: int = 0):
        super().__init__()
        mid = out_chans // 2
        self.main_conv = conv(in_chans, 2 * mid)
        self.blocks = nn.ModuleList(Bottleneck(mid, add) for _ in range(blocks))
        self.final_conv = conv((2 + blocks + links) * mid, out_chans)

    def chain(self, x: Tensor) -> list[Tensor]:
        """Maps (B, out_chans / 2, H, W): the two halves of the input, and what each bottleneck makes."""
        maps = list(self.main_conv(x).chunk(2, 1))
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.final_conv(torch.cat(self.chain(x), 1))


class SpatialPyramidPooling(nn.Module):
    """(B, dim, H, W) -> the same, of it and its maxima over 5 x 5, 9 x 9 and 13 x 13 ("SPPF")."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.conv2 = conv(dim, dim // 2), conv(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.conv1(x)]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 5, 1, 2))
        return self.conv2(torch.cat(maps, 1))


class YOLOv8Backbone(nn.Module):
    """Images (B, 3, H, W) in 0..1 -> maps of strides 8, 16 and 32, sizes rounded up.

    Args:
        depth: factor on the bottlenecks of the stages, 3, 6, 6 and 3.
        width: factor on the channels, 64, 128, 256, 512 and `last_chans`, rounded up to multiples of 8.
        last_chans: of the last map, before `width`.

    Attributes:
        out_channels: of the maps.
    """

    def __init__(self, depth: float = 0.33, width: float = 0.5, last_chans: int = 1024):
        super().__init__()
        dims = [8 * math.ceil(c * width / 8) for c in (64, 128, 256, 512, last_chans)]
        self.stem = conv(3, dims[0], 3, 2)
        self.stages = nn.ModuleList()
        for i, (before, dim, blocks) in enumerate(zip(dims, dims[1:], (3, 6, 6, 3))):
            layers = [conv(before, dim, 3, 2), CSPLayer(dim, dim, max(round(blocks * depth), 1))]
            self.stages.append(nn.Sequential(*layers, *([SpatialPyramidPooling(dim)] if i == 3 else [])))
        self.out_channels = dims[2:]

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


# -- neck: MambaFusion-PAN --------------------------------------------------------------------------------------------


def as_guide(state: Tensor) -> Tensor:
    """The final state (B, routes, heads, N, P) of a scan -> N tokens (B, routes * heads * P, N), without gradient."""
    return state.detach().transpose(-1, -2).flatten(1, 3)


class GuidedScan(SSDScan):
    """`SSDScan` whose routes all begin with the tokens of a guide, projected by weights of their own (PGSS).

    Called as `scan(x, grid, guide)`, with x (B, L, D) or a map, and the guide (B, G, D); the guide has no output.

    Args: as for `SSDScan`.
    """

    def __init__(self, dim: int, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        bound = dim**-0.5
        self.guide_proj = nn.Parameter(torch.empty_like(self.x_proj).uniform_(-bound, bound))

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], guide: Tensor, route: Tensor | None = None, **options):
        length = x.shape[1]  # the guide is stored behind the image, and visited before it
        route = self.along.table(grid, x.device) if route is None else route
        first = torch.arange(length, length + guide.shape[1], dtype=route.dtype, device=route.device)
        route = torch.cat([first.expand(*route.shape[:-1], -1), route], -1)
        of_guide = project_routes(guide[:, None], self.guide_proj).split(self.split, -1)
        dt, B, C = (torch.cat(pair, 2) for pair in zip(self.project(x[:, None]), of_guide))
        return self.scan(torch.cat([x, guide], 1)[:, None], dt, B, C, route=route, keep=length, **options)


class LocalConv(nn.Module):
    """Maps (B, H, W, dim) -> the same: x + fc2(gelu(fc1(norm(conv(x))))), with a depthwise convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv, self.norm = depthwise(dim, 3), batch_norm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + linear(self.fc2, F.gelu(linear(self.fc1, self.norm(self.conv(x)))))


class GatedConvMlp(GatedMlp):
    """Maps (B, H, W, dim) -> the same: fc2(gelu(conv(a) + a) * b), where fc1(x) = (a, b)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__(dim, hidden, gate_first=True)
        self.dwconv = depthwise(hidden, 3)

    def activate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return self.act(self.dwconv(a) + a) * b


class GuidedBlock(nn.Module):
    """A map (B, H, W, dim) and a guide (B, G, dim) -> the map with what PGSS and an MLP add, and the scans' state.

    As published, what is added to the block's input is the scan of `local` of it.
    """

    def __init__(self, dim: int, d_state: int, head_dim: int):
        super().__init__()
        heads = math.ceil(dim / head_dim)
        self.local = LocalConv(dim)
        self.norm1 = LayerNorm(dim)
        self.mixer = SS2D(
            dim, expand=1, d_state=d_state, dt_rank=heads, act_layer=nn.GELU, scan_layer=GuidedScan, init="v2"
        )
        self.norm2 = LayerNorm(dim)
        self.mlp = GatedConvMlp(dim, int(4 * dim / 3))

    def forward(self, x: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.mixer(self.norm1(self.local(x)), None, F.gelu(guide), return_final_state=True)
        x = x + y
        return x + self.mlp(self.norm2(x)), state


def channel_mix(in_chans: int, out_chans: int, groups: int = 1) -> nn.Sequential:
    """Tokens (B, in_chans, N) -> (B, out_chans, N)."""
    return nn.Sequential(nn.Conv1d(in_chans, out_chans, 1, groups=groups), nn.BatchNorm1d(out_chans), nn.SiLU())


class GuidedCSPLayer(CSPLayer):
    """A `CSPLayer` with a `GuidedBlock` at the end of its chain.

    Args:
        in_chans, out_chans, blocks: of `CSPLayer`.
        text_dim: channels of the guide.
        d_state, head_dim: of the scans.
        gives_guide: whether the scans' state becomes a guide in turn.
    """

    def __init__(
        self, in_chans: int, out_chans: int, blocks: int, text_dim: int, d_state: int, head_dim: int, gives_guide: bool
    ):
        super().__init__(in_chans, out_chans, blocks, add=False, links=1)
        mid = out_chans // 2
        self.guide2img = channel_mix(text_dim, mid)
        self.fusion = GuidedBlock(mid, d_state, head_dim)
        self.img2guide = channel_mix(4 * mid, text_dim, groups=4) if gives_guide else None

    def forward(self, x: Tensor, guide: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps (B, in_chans, H, W) and a guide (B, text_dim, G) -> the maps, and a guide (B, text_dim, d_state)."""
        maps = self.chain(x)
        y, state = self.fusion(maps[-1].permute(0, 2, 3, 1), self.guide2img(guide).mT)
        y = self.final_conv(torch.cat([*maps, y.permute(0, 3, 1, 2)], 1))
        return y, self.img2guide(as_guide(state).to(guide.dtype)) if self.img2guide is not None else None


class MambaFusionPAN(nn.Module):
    """Three maps and the prompts' embeddings -> the same, each having read the other. In float32 at least.

    Args:
        dims: channels of the maps, finest first.
        blocks: bottlenecks of each layer.
        text_dim: channels of the embeddings.
        d_state: of all scans.
        head_dim: channels of a head in the scans over prompts.
        map_head_dim: the same in those over maps.
    """

    def __init__(
        self,
        dims: Sequence[int],
        blocks: int = 1,
        text_dim: int = 512,
        d_state: int = 64,
        head_dim: int = 64,
        map_head_dim: int = 16,
    ):
        super().__init__()
        small, middle, large = dims

        def layer(in_chans: int, out_chans: int, gives_guide: bool) -> GuidedCSPLayer:
            return GuidedCSPLayer(in_chans, out_chans, blocks, text_dim, d_state, map_head_dim, gives_guide)

        self.text_top_down, self.text_bottom_up = (
            Mamba2Mixer(text_dim, d_state, d_conv=3, expand=1, head_dim=head_dim) for _ in range(2)
        )
        self.top_down_layers = nn.ModuleList([layer(large + middle, middle, True), layer(middle + small, small, True)])
        self.downsample_layers = nn.ModuleList([conv(small, small, 3, 2), conv(middle, middle, 3, 2)])
        self.bottom_up_layers = nn.ModuleList(
            [layer(small + middle, middle, False), layer(middle + large, large, False)]
        )

    def forward(self, maps: Sequence[Tensor], text: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps (B, C, H, W) of strides 8, 16, 32 and embeddings (B, n, text_dim) -> the same."""
        with without_autocast(text.device.type):
            dtype = self.text_top_down.in_proj.weight.dtype
            return self.fuse([x.to(dtype) for x in maps], text.to(dtype))

    def fuse(self, maps: Sequence[Tensor], text: Tensor) -> tuple[list[Tensor], Tensor]:
        """As `forward`, in the parameters' precision."""
        added, state = self.text_top_down(text, return_final_state=True)
        text, guide = text + added, as_guide(state[1]).to(text.dtype)
        x, inner, guides = maps[-1], [maps[-1]], []
        for layer, lower in zip(self.top_down_layers, maps[-2::-1]):
            x = torch.cat([F.interpolate(x, lower.shape[-2:]), lower], 1)
            x, of_maps = layer(x, guide)
            inner.append(x)
            guides.append(of_maps.mT)

        tokens = torch.cat([*guides, text], 1)
        added, state = self.text_bottom_up(tokens, return_final_state=True)
        text, guide = (tokens + added)[:, -text.shape[1] :], as_guide(state[1]).to(text.dtype)
        outputs = [x]
        for down, layer, upper in zip(self.downsample_layers, self.bottom_up_layers, inner[-2::-1]):
            x, _ = layer(torch.cat([down(x), upper], 1), guide)
            outputs.append(x)
        return outputs, text


# -- head -------------------------------------------------------------------------------------------------------------


class Levels(NamedTuple):
    """What a detector answers on maps of strides 8, 16 and 32.

    Attributes:
        logits: of each map (B, n, H, W), for n prompts.
        bins: of each map (B, 4 * bins, H, W): logits of the distance to the left, upper, right and lower side of the
            box around the middle of a cell, in bins of one stride.
    """

    logits: list[Tensor]
    bins: list[Tensor]

    @property
    def distances(self) -> list[Tensor]:
        """The expected distances of each map, (B, 4, H, W), in strides."""
        every = []
        for x in self.bins:
            shares = x.unflatten(1, (4, -1)).softmax(2)
            at = torch.arange(shares.shape[2], dtype=x.dtype, device=x.device)
            every.append(torch.einsum("bsnhw,n->bshw", shares, at))
        return every


class Contrast(nn.Module):
    """How alike a map's features are to embeddings: <norm(x), t / |t|> exp(logit_scale) + bias."""

    def __init__(self, dim: int, bias: float):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, **NORM)
        self.logit_scale = nn.Parameter(torch.tensor(-1.0))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Features (B, dim, H, W) and embeddings (B, n, dim) -> logits (B, n, H, W)."""
        alike = torch.einsum("bchw,bnc->bnhw", self.norm(x), F.normalize(text, dim=-1))
        return alike * self.logit_scale.exp() + self.bias


class YOLOWorldHead(nn.Module):
    """Three maps and embeddings -> `Levels`.

    Args:
        dims: channels of the maps, finest first.
        text_dim: channels of the embeddings.
        num_classes: what the branch of classes is at least as wide as, and for which its biases are initialised. How
            many prompts there are is free.
        bins: for a distance.
    """

    def __init__(self, dims: Sequence[int], text_dim: int = 512, num_classes: int = 80, bins: int = 16):
        super().__init__()
        of_class, of_box = max(dims[0], num_classes), max(16, dims[0] // 4, 4 * bins)

        def branch(dim: int, width: int, out_chans: int) -> nn.Sequential:
            return nn.Sequential(conv(dim, width, 3), conv(width, width, 3), nn.Conv2d(width, out_chans, 1))

        self.cls_preds = nn.ModuleList(branch(dim, of_class, text_dim) for dim in dims)
        self.reg_preds = nn.ModuleList(branch(dim, of_box, 4 * bins) for dim in dims)
        rare = (math.log(5 / num_classes / (640 / stride) ** 2) for stride in STRIDES)
        self.cls_contrasts = nn.ModuleList(Contrast(text_dim, bias) for bias in rare)
        for cls, box in zip(self.cls_preds, self.reg_preds):
            nn.init.zeros_(cls.get_submodule("2").bias)
            nn.init.ones_(box.get_submodule("2").bias)

    def forward(self, maps: Sequence[Tensor], text: Tensor) -> Levels:
        """Maps (B, C, H, W) of strides 8, 16, 32 and embeddings (B, n, text_dim) -> logits and boxes."""
        features = (branch(x) for branch, x in zip(self.cls_preds, maps))
        logits = [contrast(x, text) for contrast, x in zip(self.cls_contrasts, features)]
        return Levels(logits, [branch(x) for branch, x in zip(self.reg_preds, maps)])


# -- the detector -----------------------------------------------------------------------------------------------------


class MambaYOLOWorld(nn.Module):
    """Images and prompts -> logits and boxes, with the prompts given as embeddings of CLIP's text encoder.

    The prompts are scanned in their order: another order, or another prompt more, gives other results. What an image
    shows changes the embeddings, so only those of CLIP can be kept: in `vocabulary`, from where they are read if no
    others are given.

    Args:
        depth, width, last_chans: of `YOLOv8Backbone`.
        text_dim: channels of the embeddings.
        d_state: of all scans.
        head_dim, map_head_dim: of `MambaFusionPAN`.
        num_classes, bins: of `YOLOWorldHead`.
        num_prompts: embeddings that the model keeps, zeros at first; None for none.

    Attributes:
        strides: of the maps.
        vocabulary: embeddings (num_prompts, text_dim), or None.

    Raises:
        InputError: channels that do not divide into heads.
    """

    strides = STRIDES

    def __init__(
        self,
        depth: float = 0.33,
        width: float = 0.5,
        last_chans: int = 1024,
        text_dim: int = 512,
        d_state: int = 64,
        head_dim: int = 64,
        map_head_dim: int = 16,
        num_classes: int = 80,
        bins: int = 16,
        num_prompts: int | None = None,
    ):
        super().__init__()
        self.text_dim = text_dim
        self.backbone = YOLOv8Backbone(depth, width, last_chans)
        dims = self.backbone.out_channels
        blocks = max(round(3 * depth), 1)
        self.neck = MambaFusionPAN(dims, blocks, text_dim, d_state, head_dim, map_head_dim)
        self.bbox_head = YOLOWorldHead(dims, text_dim, num_classes, bins)
        self.vocabulary: Tensor | None
        self.register_buffer("vocabulary", None if num_prompts is None else torch.zeros(num_prompts, text_dim))

    def set_vocabulary(self, text: Tensor) -> None:
        """Keeps the embeddings (n, text_dim) of n prompts in the model, and so in its checkpoints.

        Raises:
            InputError: embeddings of another shape.
        """
        if text.ndim != 2 or text.shape[1] != self.text_dim or not len(text):
            raise InputError(
                f"a vocabulary is (prompts, {self.text_dim}), the embeddings are {tuple(text.shape)}: those of another "
                "text encoder"
            )
        like = self.bbox_head.cls_contrasts[0].bias
        self.register_buffer("vocabulary", F.normalize(text.to(like), dim=-1))

    def embeddings(self, text: Tensor | None, batch: int) -> Tensor:
        """`text`, else the vocabulary, as (batch, n, text_dim).

        Raises:
            InputError: there is neither, or they are of another shape.
        """
        text = self.vocabulary if text is None else text  # of which `len` would fix the batch of a graph
        if text is None:
            raise InputError("the model keeps no vocabulary: give the embeddings of the prompts")
        if text.ndim == 2 or (text.ndim == 3 and text.shape[0] != batch and text.shape[0] == 1):
            text = text.expand(batch, -1, -1)
        if text.ndim != 3 or text.shape[0] != batch or not text.shape[1] or text.shape[2] != self.text_dim:
            raise InputError(
                f"embeddings of prompts are (prompts, {self.text_dim}), or ({batch}, prompts, {self.text_dim}) for a "
                f"batch of {batch}, not {tuple(text.shape)}"
            )
        return text

    def forward_features(self, x: Tensor, text: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """As `forward`, to the neck's maps (B, C, H / s, W / s), s = 8, 16, 32, and its embeddings (B, n, text_dim)."""
        return self.neck(self.backbone(x), self.embeddings(text, x.shape[0]))

    def forward(self, x: Tensor, text: Tensor | None = None) -> Levels:
        """Logits and boxes; `linescan.heads.detection.dense_boxes.decode` makes them detections.

        Args:
            x: images (B, 3, H, W), RGB in 0..1, of any size; 640 x 640 and 114 / 255 around as published.
            text: embeddings (n, text_dim) of unit length, or (B, n, text_dim) for other prompts with each image;
                by default the vocabulary.

        Raises:
            InputError: no embeddings, or of another shape.
        """
        return self.bbox_head(*self.forward_features(x, text))

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The official code's keys to linescan's, without CLIP's text encoder, which comes from CLIP's own files."""
        return fit_shapes(official_names(state), self)


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official code's keys, of the detector or a part of it, to linescan's."""
    kept = {key: value for key, value in state.items() if not key.startswith(("backbone.text_model.", "data_preproc"))}
    return rename(
        kept,
        (
            (r"^backbone\.image_model\.", "backbone."),
            (r"^backbone\.stage(\d)\.", lambda m: f"backbone.stages.{int(m[1]) - 1}."),
            (r"^bbox_head\.head_module\.", "bbox_head."),
            (r"\.textGuidedVSSBlock\.", ".fusion."),
            (r"\.fusion\.norm\.", ".fusion.norm1."),
            (r"\.fusion\.lsblock\.norm\.", ".fusion.local.norm.0."),
            (r"\.fusion\.lsblock\.fc1\.", ".fusion.local.conv."),
            (r"\.fusion\.lsblock\.fc([23])\.", lambda m: f".fusion.local.fc{int(m[1]) - 1}."),
            (r"\.fusion\.ss2d\.0\.", ".fusion.mixer."),
            (r"\.guide_hidden_proj_weight$", ".ssm.guide_proj"),
            *SS2D_NAMES,
            (r"(^|\.)conv1d\.(weight|bias)$", r"\1conv_\2"),
        ),
    )


# -- the zoo ----------------------------------------------------------------------------------------------------------


def _weights(lvis: Sequence[float], zero_shot: Sequence[float], tuned: Sequence[float]) -> dict:
    """The published files. AP on LVIS minival: of all, rare, common and frequent classes; on COCO: AP, AP50, AP75."""
    names = "box_ap", "box_ap50", "box_ap75"
    rarities = "lvis_minival_ap", "lvis_minival_ap_rare", "lvis_minival_ap_common", "lvis_minival_ap_frequent"
    of_coco = {f"coco_zero_shot_{name}": value for name, value in zip(names, zero_shot)}
    return {
        "o365_goldg": {"data": "Objects365 v1, GoldG", "metrics": dict(zip(rarities, lvis)) | of_coco},
        "coco": {"data": "Objects365 v1, GoldG, COCO", "metrics": dict(zip(names, tuned))},
    }


register(
    MambaYOLOWorld,
    {
        "mamba_yolo_world_small": {
            "params": 15.249,
            "weights": _weights((27.7, 19.5, 27.0, 29.9), (38.0, 52.9, 41.0), (46.4, 62.5, 50.5)),
        },
        "mamba_yolo_world_medium": {
            "args": {"depth": 0.67, "width": 0.75, "last_chans": 768},
            "params": 31.154,
            "weights": _weights((32.8, 27.0, 31.9, 34.8), (43.2, 58.8, 46.6), (51.4, 68.2, 56.1)),
        },
        "mamba_yolo_world_large": {
            "args": {"depth": 1.0, "width": 1.0, "last_chans": 512},
            "params": 49.819,
            "weights": _weights((35.0, 29.3, 34.2, 36.8), (45.4, 61.3, 49.4), (54.1, 71.1, 59.0)),
        },
    },
    task="detection",
    page="https://huggingface.co/Xuan-World/Mamba-YOLO-World",
    inputs=((3, 640, 640), (80, 512)),  # an image and the embeddings of its prompts
    preprocess={"size": (640, 640), "fill": 114, "mean": (0.0, 0.0, 0.0), "std": (255.0, 255.0, 255.0)},
    first_conv="backbone.stem.conv",
    paper="ICASSP 2025, arXiv 2409.08513",
    code="https://github.com/Xuan-World/Mamba-YOLO-World",
    licence="GPL-3.0",
)
