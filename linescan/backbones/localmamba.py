"""LocalMamba: Vim and VMamba with windowed scans, other directions in every layer, found by a differentiable search.

Paper: "LocalMamba: Visual State Space Model with Windowed Selective Scan", Huang et al., 2024, arXiv 2403.09338.
Official code: github.com/hunto/LocalMamba (Apache-2.0). Written from the paper and the published weights.

LocalVim is plain: Mamba blocks over 16-pixel patches, four directions each, whose outputs are gated by channel and
added. LocalVMamba is the vanilla VMamba with the same change. A model without directions is the search's super-net: it
scans all eight candidates and learns their weights; `searched_directions` makes the final model of it.
"""

import re
from typing import Sequence

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, lecun_normal_, trunc_normal_
from torch import Tensor, nn

from ..checkpoint import strip_prefix
from ..layers.mamba import MambaBlock, take_places
from ..layers.norm import RMSNorm
from ..layers.pos_embed import grid_rope, resample_pos_embed, rotate_pairs
from ..layers.ss2d import SS2D
from ..scans import routes
from ..scans.multi_route import ChannelAttention
from .contract import PlainBackbone, register
from .vmamba import VANILLA, VMamba, VMambaDense

__all__ = ["LocalVMamba", "LocalVMambaDense", "LocalVim", "LocalVimDense", "searched_directions"]


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
    """Directions a layer, written short: h hF v vF 2 2F 7 7F, with layers between bars."""
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
        raise ValueError(f"directions are given for {len(directions)} blocks, the model has {depth}")
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
        raise ValueError(f"this {type(model).__name__} has its directions; a super-net is built with directions=None")
    names, table = list(CANDIDATES), []
    for i, search in enumerate(searches):
        best = search.weights.flatten().topk(keep).indices.sort().values.tolist()
        table.append([names[k] for k in best])
        print(f"{i}: {' '.join(table[-1])}")
    return table, type(model)(**{**model.options, "directions": table, **changes})


def _merge_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames what merges the directions, to lie in `merge` of each mixer."""
    out = {}
    for key, value in state.items():
        if key.endswith(".multi_scan.weights"):
            value = value.reshape(-1, 1, 1)
        out[re.sub(r"\.(multi_scan\.attn|multi_scan|attn)\.", ".merge.", key)] = value
    return out


def _published_places(directions: Sequence[routes.Route], grid: tuple[int, int], device) -> Tensor | None:
    """(K, L): the token whose output the official code puts at each place; None where that is the token itself.

    It reads columns rightly, but puts their outputs back as if the map were as high as it is wide, and the other way
    round. On maps that are not square that exchanges tokens; the published dense results are made so.
    """
    if grid[0] == grid[1]:
        return None
    row, col = routes.table("row, col", grid, device).long()
    return torch.stack([col[col] if route.spec in ("col", "-col") else row for route in directions])


# -- LocalVim --------------------------------------------------------------------------------------------------------


class LocalVimBlock(MambaBlock):
    """`MambaBlock` along routes of its own: called with the grid of the tokens instead of a table.

    Args:
        dim: channels of the stream.
        directions: spec of its routes.
        class_token: a token more stands in the middle, in storage and in every route.
        kwargs: of `MambaBlock`.
    """

    def __init__(self, dim: int, directions: str, class_token: bool = False, **kwargs):
        self.routes = routes.parse(directions)
        super().__init__(dim, n_routes=len(self.routes), **kwargs)
        self.class_token = class_token

    def branch(self, x: Tensor, grid: tuple[int, int], rope: tuple[Tensor, Tensor] | None = None):
        route, place = routes.table(self.routes, grid, x.device), None
        if self.class_token:  # in the middle by the number of tokens, whatever padding a route has
            middle = grid[0] * grid[1] // 2
            route = routes.insert_tokens(route, at=[middle], stored=[middle], length=grid[0] * grid[1])
        else:
            place = _published_places(self.routes, grid, x.device)
        if rope is not None:
            x = rotate_pairs(x, *rope)
        return x, self.mixer(self.norm(x), route, place)


class LocalVim(PlainBackbone):
    """LocalVim.

    Args:
        img_size: size (or height and width) that the position embedding and the rotary tables are built for; other
            sizes run too, padded by zeros at the bottom and right to whole patches.
        patch_size: side of the square patches.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: "token" (the class token), "avg" (all tokens), "max", or "" for the tokens as they are.
        embed_dim: channels of the stream.
        depth: number of blocks.
        directions: routes of the blocks: a list of the paper's names, or one a block (more than `depth` are left
            out); or specs of `linescan.scans.routes`. None: the search's super-net.
        d_state, d_conv, expand: of the Mamba mixer.
        class_token: classify a token in the middle of the sequence; then without rotary embedding, as published.
        norm_layer: "rms" or, for the dense models, "layer".
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

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
        if norm_layer not in NORMS:
            raise ValueError(f"norm_layer is 'rms' or 'layer', not {norm_layer!r}")
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.patch_size = self.min_size = patch_size
        self.native_grid = self.grid_of(*((img_size, img_size) if isinstance(img_size, int) else img_size))
        patches = self.native_grid[0] * self.native_grid[1]

        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + class_token, embed_dim))
        self.blocks = nn.ModuleList(
            LocalVimBlock(
                embed_dim,
                spec,
                class_token,
                drop_path=rate,
                norm_layer=NORMS[norm_layer],
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
                merge=DirectionSearch if directions is None else "channel_attention",
            )
            for spec, rate in zip(_routes(directions, depth), calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.norm = NORMS[norm_layer](embed_dim)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.init_head(num_classes, global_pool or ("token" if class_token else "avg"), drop_rate)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The published initialisation, which overwrites Mamba's steps: they all start at softplus(0)."""
        lecun_normal_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        for table in (self.pos_embed, self.cls_token):
            if table is not None:
                trunc_normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            mixer = block.mixer
            trunc_normal_(mixer.x_proj, std=0.02)
            trunc_normal_(mixer.dt_proj, std=0.02)
            nn.init.zeros_(mixer.dt_bias)
            nn.init.kaiming_uniform_(mixer.out_proj.weight, a=5**0.5)
            mixer.out_proj.weight /= len(self.blocks) ** 0.5

    # -- tokens -----------------------------------------------------------------------------------------------------

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across for an image of this size, the last ones perhaps padded."""
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def class_rows(self, grid: tuple[int, int]) -> list[int]:
        """Where the class token stands in the sequence."""
        return [] if self.cls_token is None else [grid[0] * grid[1] // 2]

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        self.check_input(x, self.in_chans)
        height, width = x.shape[-2:]
        x = self.patch_embed(F.pad(x, (0, -width % self.patch_size, 0, -height % self.patch_size)))
        grid = tuple(x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        rows = self.class_rows(grid)
        for row in rows:
            x = torch.cat([x[:, :row], self.cls_token.expand(len(x), -1, -1), x[:, row:]], 1)
        x = x + resample_pos_embed(self.pos_embed, self.native_grid, grid, self.class_rows(self.native_grid), rows)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rope = None
        if not rows:  # the tables of another grid are resampled, as the position embedding is
            tables = grid_rope(self.native_grid, self.embed_dim)
            rope = tuple(resample_pos_embed(t.to(x)[None], self.native_grid, grid)[0] for t in tables)
        return x, grid, (grid, rope)

    def patch_tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        for row in self.class_rows(grid):
            x = torch.cat([x[:, :row], x[:, row + 1 :]], 1)
        return x

    def pool(self, x: Tensor) -> Tensor:
        """Class token, mean or maximum over all tokens, by `global_pool`."""
        if self.global_pool == "token" and self.cls_token is not None:
            return x[:, (x.shape[1] - 1) // 2]
        if self.global_pool == "max":
            return x.amax(1)
        return x.mean(1) if self.global_pool else x

    # -- weights ----------------------------------------------------------------------------------------------------

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to ours: the directions' parameters stacked, rotary tables dropped (they are computed)."""
        state = strip_prefix(state, "backbone.")
        if any(key.startswith("layers.") for key in state):
            state = self._from_official(_merge_keys(state))
        table = state.get("pos_embed")
        if table is not None and table.shape[1] != self.pos_embed.shape[1]:
            side = int((table.shape[1] - len(self.class_rows((1, 1)))) ** 0.5)
            state["pos_embed"] = resample_pos_embed(
                table, (side, side), self.native_grid, self.class_rows((side, side)), self.class_rows(self.native_grid)
            )
        return state

    def _from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for i, block in enumerate(self.blocks):
            for name, key in PER_DIRECTION.items():
                keys = [f"layers.{i}.mixer.{key.format(k)}" for k in range(len(block.routes))]
                rows = [state.pop(key) for key in keys]
                out[f"blocks.{i}.mixer.{name}"] = torch.stack([r.squeeze(1) if r.ndim == 3 else r for r in rows])
        for key, value in state.items():
            if key not in ("rope.freqs_cos", "rope.freqs_sin"):
                key = key.replace("layers.", "blocks.", 1).replace("norm_f.", "norm.")
                out[key.replace("patch_embed.proj.", "patch_embed.")] = value
        return out


NORMS = {"rms": RMSNorm, "layer": nn.LayerNorm}

# Our stacked parameter, and the official name of the part that belongs to one direction.
PER_DIRECTION = {
    "conv_weight": "conv1d_{}.weight",
    "conv_bias": "conv1d_{}.bias",
    "x_proj": "x_proj_{}.weight",
    "dt_proj": "dt_proj_{}.weight",
    "dt_bias": "dt_proj_{}.bias",
    "A_log": "A_log_{}",
    "D": "D_{}",
}


class LocalVimDense(LocalVim):
    """LocalVim as a backbone for segmentation and detection: images -> maps (B, C, H, W) at the stride of the patches.

    A map is what the block's mixer gives, without the stream, through a LayerNorm of its own, as published.

    Args:
        out_indices: blocks whose maps are taken.
        kwargs: of `LocalVim`. The authors' dense models have norm_layer="layer".
    """

    def __init__(self, out_indices: Sequence[int] = (4, 9, 14, 19), norm_layer: str = "layer", **kwargs):
        super().__init__(**{**kwargs, "norm_layer": norm_layer, "num_classes": 0})
        self.out_indices = sorted(i % len(self.blocks) for i in out_indices)
        self.norm = nn.Identity()
        self.out_norms = nn.ModuleList(nn.LayerNorm(self.embed_dim) for _ in self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, grid, context = self.embed(x)
        hidden = []
        for i, block in enumerate(self.blocks[: self.out_indices[-1] + 1]):
            x, h = self.run(block.branch, x, *context)
            x = x + block.drop_path(h)
            if i in self.out_indices:
                hidden.append(self.patch_tokens(h, grid))
        return [norm(h).transpose(1, 2).unflatten(2, grid).contiguous() for norm, h in zip(self.out_norms, hidden)]

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `LocalVim`; of a classification file, the norms that it lacks stay as they are, the head is dropped."""
        state = super().checkpoint_filter(state)
        state = {re.sub(r"^outnorm_", "out_norms.", key): value for key, value in state.items()}
        if "head.weight" in state:
            new = re.compile(r"^out_norms\.|^blocks\.\d+\.norm\.bias$")
            state = {k: v for k, v in self.state_dict().items() if new.match(k)} | state
            state = {k: v for k, v in state.items() if not k.startswith(("head.", "norm."))}
        return state


# -- LocalVMamba -----------------------------------------------------------------------------------------------------


class LocalSS2D(SS2D):
    """SS2D that puts the columns' outputs where the official code does."""

    def scan(self, u: Tensor) -> Tensor:
        grid = tuple(u.shape[1:3])
        y = self.ssm(u.flatten(1, 2), routes.table(self.routes, grid, u.device), merge=None)
        place = _published_places(self.routes, grid, u.device)
        return self.merge(y if place is None else take_places(y, place)).unflatten(1, grid)


class LocalVMamba(VMamba):
    """LocalVMamba: the vanilla VMamba along other routes, their outputs gated by channel before they are added.

    Args:
        directions: as in `LocalVim`, the blocks counted through all stages.
        depths: blocks in each stage.
        kwargs: of `VMamba`.
    """

    mixer_layer = LocalSS2D

    def __init__(
        self, directions: Directions | None = LOCAL_VMAMBA_TINY, depths: Sequence[int] = (2, 2, 9, 2), **kwargs
    ):
        merge = DirectionSearch if directions is None else "channel_attention"
        options = VANILLA | {"routes": _routes(directions, sum(depths)), "merge": merge} | kwargs
        super().__init__(depths=depths, **options)
        self.options = {"directions": directions, "depths": depths, **kwargs}

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `VMamba`, and the keys of what merges the directions."""
        return super().checkpoint_filter(_merge_keys(state))


class LocalVMambaDense(VMambaDense, LocalVMamba):
    """LocalVMamba as a backbone for segmentation and detection; see `VMambaDense`."""


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
