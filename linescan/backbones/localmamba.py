"""LocalMamba: Vim and VMamba with windowed scans, other directions in every layer, found by a differentiable search.

Paper: "LocalMamba: Visual State Space Model with Windowed Selective Scan", Huang et al., 2024, arXiv 2403.09338.
Official code: github.com/hunto/LocalMamba (Apache-2.0). Written from the paper and the published weights.

LocalVim is plain: Mamba blocks over 16-pixel patches, four directions each, whose outputs are gated by channel and
added. LocalVMamba is the vanilla VMamba with the same change. A model without directions is the search's super-net: it
scans all eight candidates and learns their weights; `searched_directions` makes the final model of it.
"""

from typing import Sequence

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, lecun_normal_, to_2tuple
from torch import Tensor, nn

from .._compat import known_equal
from ..checkpoint import rename
from ..errors import InputError, known
from ..layers.linear import init_linear, trunc_normal_
from ..layers.mamba import MambaMixer, TurnedBlock, stack_routes
from ..layers.norm import LayerNorm, RMSNorm, at_least_float32
from ..layers.pos_embed import grid_rope, resample_pos_embed
from ..layers.s6 import S6Scan
from ..layers.stems import PatchConv2d, pad_to_multiple
from ..layers.tracing import opaque
from ..scans import routes
from ..scans.multi_route import ChannelAttention, MultiRoute
from .contract import DenseForm, PlainBackbone, check_images, register
from .vmamba import VANILLA, VMamba

__all__ = ["LocalVMamba", "LocalVim", "searched_directions"]


# -- directions ------------------------------------------------------------------------------------------------------

# The candidates of the search in their order: the paper's names and the routes.
CANDIDATES = {
    "h": "row",
    "h_flip": "-row",
    "v": "col",
    "v_flip": "-col",
    "w2": "w2",
    "w2_flip": "-w2",
    "w7": "w7",
    "w7_flip": "-w7",
}

Directions = str | Sequence[str | Sequence[str]]


def _table(text: str) -> list[list[str]]:
    """Parses the directions of each layer from shorthand: h hF v vF 2 2F 7 7F, layers separated by bars."""
    short = {name.removeprefix("w").replace("_flip", "F"): name for name in CANDIDATES}
    return [[short[word] for word in layer.split()] for layer in text.split("|")]


WITHOUT_SEARCH = _table("h hF 2 2F")[0]
LOCAL_VIM = _table(
    "h vF 7 7F | hF 2F 7 7F | h hF v 7 | h hF v vF | h hF v vF | h hF v vF | hF v vF 7 | hF v vF 2F | h hF v vF |"
    "h hF v vF | h v vF 2 | h v vF 2F | h hF vF 7 | hF v vF 2 | h hF v vF | h v 2 2F | v vF 2 7 | h hF v 2 |"
    "h hF 2F 7 | v vF 2 2F"
)
LOCAL_VMAMBA_TINY = _table(
    "h hF 7 7F | hF vF 2 2F | hF vF 2F 7 | hF v vF 2 | h hF vF 2F | hF vF 2 2F | h 2F 7 7F | h hF v vF | h vF 7 7F |"
    "hF v 2 7F | v vF 2 7F | h hF vF 2F | vF 2F 7 7F | hF vF 2F 7F | hF v 7 7F"
)
LOCAL_VMAMBA_SMALL = _table(
    "h v vF 7F | h hF v 7 | hF v vF 7 | hF v 2F 7 | hF v 2F 7 | hF vF 2 7F | hF v vF 7 | h v vF 7 | h v vF 7 |"
    "h v vF 7F | h hF v vF | h v vF 2 | v vF 2F 7 | h hF v 2 | hF v vF 7F | h hF v vF | h v vF 7F | h v vF 7F |"
    "h hF vF 7 | hF vF 2F 7 | hF v vF 7F | v vF 7 7F | h v vF 7F | hF v vF 2 | h v vF 2F | h hF v 7 | h hF 7 7F |"
    "h vF 2 2F | h vF 2 7 | h v vF 7F | hF v 2F 7 | hF vF 7 7F | h v 7 7F"
)


def _routes(directions: Directions | None, depth: int) -> list[str]:
    """A routes spec for each of `depth` blocks; all candidates for None."""
    if directions is None:
        directions = list(CANDIDATES)
    if isinstance(directions, str) or all(isinstance(name, str) and name in CANDIDATES for name in directions):
        directions = [directions] * depth
    if len(directions) < depth:
        raise InputError(f"directions are given for {len(directions)} blocks, the model has {depth}")
    return [
        layer if isinstance(layer, str) else ", ".join(CANDIDATES.get(name, name) for name in layer)
        for layer in directions[:depth]
    ]


class DirectionSearch(ChannelAttention):
    """(B, K, L, D) -> (B, L, D): the routes' outputs, gated by channel and normalised, weighted by a learned softmax.

        y = sum_k softmax(weights)[k] LN(a_k y_k)

    with the gates a_k of `ChannelAttention` and a LayerNorm without parameters (arXiv 2403.09338, section 4.3).
    """

    def __init__(self, dim: int, n_routes: int):
        super().__init__(dim, n_routes)
        self.weights = nn.Parameter(1e-3 * torch.randn(n_routes, 1, 1))

    def forward(self, y: Tensor) -> Tensor:
        gated = super().forward(y.flatten(0, 1).unsqueeze(1)).view_as(y)  # every route by itself
        return (F.layer_norm(gated, gated.shape[-1:]) * self.weights.softmax(0)).sum(1)


def searched_directions(model: nn.Module, keep: int = 4, **changes) -> tuple[list[list[str]], nn.Module]:
    """Ends a search: the table of the best directions in every block, which is printed, and a new model with them.

    Args:
        model: a trained super-net (`LocalVim` or `LocalVMamba` without directions).
        keep: directions that stay in every block; they keep the candidates' order.
        changes: arguments in which the new model differs from the super-net, such as `embed_dim` or `dims`.

    Returns:
        the table and the new model, untrained: it is trained from scratch.

    Raises:
        ValueError: `model` is no super-net.
    """
    searches = [module for module in model.modules() if isinstance(module, DirectionSearch)]
    if not searches:
        raise InputError(f"this {type(model).__name__} has its directions; a super-net is built with directions=None")
    names, table = list(CANDIDATES), []
    for i, search in enumerate(searches):
        best = search.weights.flatten().topk(keep).indices.sort().values.tolist()
        table.append([names[k] for k in best])
        print(f"{i}: {' '.join(table[-1])}")
    return table, type(model)(**{**model.options, "directions": table, **changes})


def _merge_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a search's routes in our layout."""
    return {k: v.reshape(-1, 1, 1) if k.endswith(".multi_scan.weights") else v for k, v in state.items()}


class LocalRoutes(MultiRoute):
    """`MultiRoute` that puts the outputs of columns where the official code does, and knows a class token.

    That code reads columns rightly, but puts their outputs back as if the map were as high as it is wide, and the other
    way round. On maps that are not square that exchanges tokens; the published dense results are made so.
    """

    class_token = False  # one more token stands in the middle, in storage and in every route

    def table(self, grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
        if not self.class_token:
            return super().table(grid, device)
        # As text, which torch.compile reads as a constant.
        specs = [f"cls({route.spec}, at=half, stored=middle)" for route in self.routes]
        return routes.table(", ".join(specs), grid, device)

    def merge_routes(self, y: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """Outputs (B, K, L, D) of the routes -> (B, L, D)."""
        if grid is not None and not self.class_token and not known_equal(*grid):
            row, column = routes.table("row, col", grid, y.device).long()
            places = [column[column] if str(route) in ("col", "-col") else row for route in self.routes]
            y = y[:, torch.arange(len(places), device=y.device)[:, None], torch.stack(places)]
        return super().merge_routes(y, grid)


# -- LocalVim --------------------------------------------------------------------------------------------------------


class LocalMixer(MambaMixer):
    """`MambaMixer` along `LocalRoutes`."""

    multi_route = LocalRoutes


@opaque
def resample_rope(pos_embed: Tensor, grid: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables (H * W, dim) made for the grid of the position embedding and resampled to another, as that is."""
    native_grid = pos_embed.shape[1:3]
    tables = (t.unflatten(0, native_grid)[None] for t in grid_rope(native_grid, pos_embed.shape[-1], like=like))
    return tuple(resample_pos_embed(table, grid).flatten(1, 2)[0] for table in tables)


class LocalVim(PlainBackbone):
    """LocalVim.

    Args:
        img_size: size (or height and width) that the position embedding and the rotary tables are built for; other
            sizes run too, padded by zeros at the bottom and right to whole patches.
        patch_size: side of the square patches.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: "token" (the class token), a pooling of all tokens, or "" for the tokens as they are.
        embed_dim: channels of the stream.
        depth: number of blocks.
        directions: routes of the blocks: a list of the paper's names, or one per block (more than `depth` are left
            out); or specs of `linescan.scans.routes`. None: the search's super-net.
        d_state, d_conv, expand: of the Mamba mixer.
        class_token: classify a token in the middle of the sequence; then without rotary embedding, as published.
        norm_layer: "rms" or, for the dense models, "layer".
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    file_class_token = "middle"
    dense = DenseForm(
        out_indices=(4, 9, 14, 19),
        tap="mixer",
        trunk={"norm_layer": "layer"},
        norms_by_place=True,
        new_keys=r"blocks\.\d+\.norm1\.bias$",
    )

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 192,
        depth: int = 20,
        directions: Directions | None = LOCAL_VIM,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        class_token: bool = False,
        norm_layer: str = "rms",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        norm = NORMS[known("norm_layer", norm_layer, tuple(NORMS))]
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.patch_size = self.stride = self.min_size = patch_size

        self.patch_embed = PatchConv2d(in_chans, embed_dim, patch_size, patch_size)
        self.init_positions(self.grid_of(*to_2tuple(img_size)), "middle" if class_token else None)
        merge = DirectionSearch if directions is None else "channel_attention"
        self.blocks = nn.ModuleList(
            TurnedBlock(
                embed_dim,
                LocalMixer(embed_dim, spec, d_state, d_conv, expand, merge=merge),
                norm_layer=norm,
                drop_path=rate,
            )
            for spec, rate in zip(_routes(directions, depth), calculate_drop_path_rates(drop_path_rate, depth))
        )
        for block in self.blocks:
            block.mixer.along.class_token = class_token
        self.norm = norm(embed_dim)
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The published initialisation, which overwrites Mamba's steps: they all start at softplus(0)."""
        lecun_normal_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        for table in (self.pos_embed, self.cls_token, self.cls_pos_embed):
            if table is not None:
                trunc_normal_(table, std=0.02)
        self.apply(init_linear)
        for block in self.blocks:
            mixer = block.mixer
            trunc_normal_(mixer.x_proj, std=0.02)
            trunc_normal_(mixer.dt_proj, std=0.02)
            nn.init.zeros_(mixer.dt_bias)
            nn.init.kaiming_uniform_(mixer.out_proj.weight, a=5**0.5)
            mixer.out_proj.weight /= len(self.blocks) ** 0.5

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.patch_size), -(-width // self.patch_size)  # the last ones perhaps padded

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        x = self.patch_embed(pad_to_multiple(x, self.patch_size)).permute(0, 2, 3, 1)
        grid = x.shape[1:3]
        x = at_least_float32(self.add_class_tokens((x + self.positions(grid)).flatten(1, 2)))
        rope = None if self.has_class_token else resample_rope(self.pos_embed, grid, x)
        return x, grid, (grid, rope)

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's: the directions' parameters stacked, computed tables dropped."""
        if not any(key.startswith("layers.") for key in state):
            return state
        state, out = _merge_weights(state), {}
        for i, block in enumerate(self.blocks):
            suffixes = [f"_{k}" for k in range(block.mixer.along.n_routes)]
            for name, rows in stack_routes(state, f"layers.{i}.mixer.", block.mixer, suffixes, A_log="A_log{}").items():
                out[f"blocks.{i}.mixer.{name}"] = rows
        computed = ("rope.freqs_cos", "rope.freqs_sin")
        return out | rename({k: v for k, v in state.items() if k not in computed}, VIM_NAMES)


VIM_NAMES = (
    (r"\.mixer\.(multi_scan\.attn|multi_scan|attn)\.", ".mixer.along.merge."),
    (r"^layers\.(\d+)\.norm\.", r"blocks.\1.norm1."),
    (r"^layers\.", "blocks."),
    (r"^norm_f\.", "norm."),
    (r"^patch_embed\.proj\.", "patch_embed."),
)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}

# -- LocalVMamba -----------------------------------------------------------------------------------------------------


class LocalScan(S6Scan):
    """`S6Scan` along `LocalRoutes`."""

    multi_route = LocalRoutes


class LocalVMamba(VMamba):
    """LocalVMamba: the vanilla VMamba along other routes, their outputs gated by channel before they are added.

    Args:
        directions: as in `LocalVim`, the blocks counted through all stages.
        depths: blocks in each stage.
        kwargs: of `VMamba`.
    """

    scan_layer = LocalScan

    def __init__(
        self, directions: Directions | None = LOCAL_VMAMBA_TINY, depths: Sequence[int] = (2, 2, 9, 2), **kwargs
    ):
        merge = DirectionSearch if directions is None else "channel_attention"
        options = VANILLA | {"routes": _routes(directions, sum(depths)), "merge": merge} | kwargs
        super().__init__(depths=depths, **options)
        self.options = {"directions": directions, "depths": depths, **kwargs}

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `VMamba`, and the keys of what merges the directions."""
        return super().translate(rename(_merge_weights(state), ((r"\.multi_scan\.(attn\.)?", ".ssm.along.merge."),)))


# -- models -----------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "paper": "2024, arXiv 2403.09338",
    "code": "https://github.com/hunto/LocalMamba",
    "licence": "Apache-2.0",
    "data": "ImageNet-1K",
}
RELEASE = "https://github.com/hunto/LocalMamba/releases/download/v1.0.0/"

register(
    LocalVim,
    **PUBLISHED,
    first_conv="patch_embed",
    models={
        "local_vim_tiny": {
            "args": {"embed_dim": 192},
            "params": 7.994,
            "gmacs": 1.5,
            "weights": {"in1k": {"url": RELEASE + "local_vim_tiny.ckpt", "metrics": {"top1": 76.2}}},
        },
        # A class token in the middle instead of rotary embeddings.
        "local_vim_tiny_middle_cls_token": {
            "args": {"embed_dim": 192, "class_token": True},
            "params": 7.995,
            "gmacs": 1.5,
            "weights": {"in1k": {"url": RELEASE + "local_vim_tiny_middle_cls_token.ckpt", "metrics": {"top1": 77.8}}},
        },
        # Rows and 2x2 windows in every block. In the official code the small one's definition overwrites that of
        # `local_vim_small`, whose name it has.
        "local_vim_tiny_wo_search": {
            "args": {"embed_dim": 192, "directions": WITHOUT_SEARCH},
            "params": 7.994,
            "gmacs": 1.5,
            "weights": {"in1k": {"metrics": {"top1": 75.8}}},
        },
        "local_vim_small": {
            "args": {"embed_dim": 384},
            "params": 27.784,
            "gmacs": 4.8,
            "weights": {"in1k": {"metrics": {"top1": 81.1}}},
        },
        "local_vim_small_wo_search": {
            "args": {"embed_dim": 384, "directions": WITHOUT_SEARCH},
            "params": 27.784,
            "gmacs": 4.8,
            "weights": {"in1k": {"metrics": {"top1": 81.0}}},
        },
        # The super-net of the search, for T and S alike.
        "local_vim_tiny_search": {
            "args": {"embed_dim": 128, "directions": None},
            "params": 5.473,
        },
    },
)

register(
    LocalVMamba,
    **PUBLISHED,
    first_conv="patch_embed.conv",
    models={
        "local_vssm_tiny": {
            "args": {"depths": (2, 2, 9, 2), "directions": LOCAL_VMAMBA_TINY},
            "params": 25.527,
            "gmacs": 5.7,
            "weights": {"in1k": {"metrics": {"top1": 82.7}}},
        },
        "local_vssm_small": {
            "args": {"depths": (2, 2, 27, 2), "directions": LOCAL_VMAMBA_SMALL},
            "params": 49.749,
            "gmacs": 11.4,
            "weights": {"in1k": {"url": RELEASE + "local_vssm_small.ckpt", "metrics": {"top1": 83.7}}},
        },
        # The super-nets of the search.
        "local_vssm_tiny_search": {
            "args": {"depths": (2, 2, 9, 2), "dims": 32, "directions": None},
            "params": 4.577,
        },
        "local_vssm_small_search": {
            "args": {"depths": (2, 2, 27, 2), "dims": 32, "directions": None},
            "params": 9.149,
        },
    },
)
