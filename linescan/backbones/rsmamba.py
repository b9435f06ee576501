"""RSMamba: a plain Mamba classifier of remote-sensing scenes whose blocks read the tokens along three paths.

Paper: "RSMamba: Remote Sensing Image Classification with State Space Model", Chen et al., IEEE GRSL 2024,
arXiv 2403.19654. Official code: github.com/KyanChen/RSMamba (Apache-2.0).

Overlapping patches; blocks without MLP, each with one Mamba mixer that reads the tokens forward, backward and shuffled,
and weights the three for every image. All blocks share one norm.

The official code draws the shuffles anew in every forward pass, in evaluation too, so that two runs on one image
differ. Here they are drawn in training, and in evaluation only with `draw_in_eval`; otherwise every block has a fixed
one.
"""

from functools import partial
from typing import Sequence

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..checkpoint import rename
from ..errors import InputError, known
from ..layers.blocks import Block
from ..layers.linear import linear, trunc_normal_
from ..layers.mamba import MambaMixer, stack_routes
from ..layers.norm import LayerNorm
from ..layers.pos_embed import sinusoid_2d
from ..layers.stems import PatchConv2d, pad_for_patches
from ..scans.multi_route import PathActivation
from ..scans.routes import RouteLike, parse, redrawn
from .contract import PlainBackbone, check_images, register

__all__ = ["RSMamba"]


class PathMixer(MambaMixer):
    """One Mamba mixer that reads along every route, with the same parameters.

    Args:
        dim: channels of the stream.
        routes: of `MambaMixer`; shuffles are drawn anew for each call in training.
        merge: of `MambaMixer`. "path_activation" goes by the means of what each route gives after out_proj, so its
            weight is (K, K * dim). (The mean of projections is the projection of the mean: out_proj runs once.)
        draw_in_eval: draw shuffles anew in evaluation, too.
        kwargs: of `MambaMixer`.
    """

    def __init__(
        self, dim: int, routes: RouteLike | Sequence[RouteLike], merge: str, draw_in_eval: bool = False, **kwargs
    ):
        activation = merge == "path_activation"
        super().__init__(
            dim, routes, shared="all", merge=(lambda *sizes: nn.Identity()) if activation else merge, **kwargs
        )
        self.activation = PathActivation(dim, self.along.n_routes) if activation else None
        self.draw_in_eval = draw_in_eval

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], route: Tensor | None = None, **options):
        if route is None and (self.training or self.draw_in_eval):
            route = redrawn(self.along.routes, grid, x.device)
        return super().mix_tokens(x, grid, route, **options)

    def scan(self, *inputs: Tensor, return_final_state: bool = False, **options):
        y, state = super().scan(*inputs, return_final_state=True, **options)
        if self.activation is not None:
            y = self.activation.mix(y, linear(self.out_proj, y.mean(2)))
        return (y, state) if return_final_state else y


class RSMambaBlock(Block):
    """x + mixer(norm(x)), where `norm` is the one that all blocks share."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float):
        super().__init__(dim, mixer, norm_layer=nn.Identity, drop_path=drop_path)

    def branch(self, x: Tensor, norm: nn.Module, layer: nn.Module, scale: nn.Module | None, *context, **options):
        (shared,) = context
        return super().branch(x, shared, layer, scale, **options)


class RSMamba(PlainBackbone):
    """RSMamba.

    Args:
        img_size: size (or height and width) that the position embedding is built for; other sizes run too. Images are
            padded by zeros at the bottom and the right, so that there are sides / stride patches, rounded up.
        patch_size: side of the square patches.
        stride: step between patches.
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: a pooling of the patches, "token" (the class token), or "" for the tokens as they are. A norm
            follows, but for "token" and "".
        embed_dim: channels of the stream.
        depth: number of blocks.
        paths: the routes of every block; `shuffle` stands for one of its own in each.
        merge: how their outputs become one: "path_activation", "mean", or any other of `create_merge`.
        draw_in_eval: draw the shuffles anew in evaluation, too, as the official code does.
        class_token: where a class token stands: "head", "middle", "tail" or None.
        pos_embed: "learned"; "sine", fixed sines and cosines, the first half of the channels by row, the second by
            column, without one for a class token; or None.
        d_state, d_conv, expand: of the Mamba mixer.
        drop_rate: dropout before the classifier and after the position embedding.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
    """

    pools_class_tokens = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int = 8,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 24,
        paths: RouteLike | Sequence[RouteLike] = "row, -row, shuffle",
        merge: str = "path_activation",
        draw_in_eval: bool = False,
        class_token: str | None = None,
        pos_embed: str | None = "learned",
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        known("class_token", class_token, ("head", "middle", "tail", None))
        known("pos_embed", pos_embed, ("learned", "sine", None))
        if pos_embed == "sine" and embed_dim % 4:
            raise InputError(f"sines and cosines of two coordinates need a multiple of 4 channels, not {embed_dim}")
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.patch_size = self.min_size = patch_size
        self.stride = stride
        self.pooled_norm = partial(LayerNorm, eps=1e-6)

        self.patch_embed = PatchConv2d(in_chans, embed_dim, patch_size, stride, bias=False)
        self.init_positions(self.grid_of(*to_2tuple(img_size)), class_token)
        self.sine = pos_embed == "sine"
        if pos_embed != "learned":
            self.pos_embed = self.cls_pos_embed = None
        self.pos_drop = nn.Dropout(drop_rate)
        self.pre_norm = LayerNorm(embed_dim, eps=1e-6)
        paths = parse(paths)
        options = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        self.blocks = nn.ModuleList(
            RSMambaBlock(
                embed_dim,
                PathMixer(
                    embed_dim,
                    [f"shuffle({i})" if path.spec == "shuffle(0)" else path for path in paths],
                    merge,
                    draw_in_eval,
                    **options,
                ),
                drop_path=rate,
            )
            for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.norm = LayerNorm(embed_dim, eps=1e-6)
        self.init_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The published initialisation: the step sizes' projections as any Linear, without Mamba's own."""
        nn.init.kaiming_normal_(self.patch_embed.weight, nonlinearity="linear")
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            bound = block.mixer.dt_proj.shape[-1] ** -0.5
            nn.init.uniform_(block.mixer.dt_bias, -bound, bound)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.stride), -(-width // self.stride)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        if self.pos_embed is not None:
            return super().positions(grid)
        like = self.patch_embed.weight
        if not self.sine:
            return like.new_zeros(1)
        return sinusoid_2d((grid[1], grid[0]), self.embed_dim).transpose(1, 2).to(like)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple]:
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        x = self.patch_embed(pad_for_patches(x, self.patch_size, self.stride)).permute(0, 2, 3, 1)
        grid = x.shape[1:3]
        x = self.add_class_tokens((x + self.positions(grid)).flatten(1, 2))
        return self.pos_drop(x), grid, (self.pre_norm,)  # tokens in a line, a class token among them

    # -- training utilities -----------------------------------------------------------------------------------------

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning-rate decay; the norm of all blocks goes with the stem."""
        groups = super().group_matcher(coarse)
        return groups | {"stem": groups["stem"] + "|^pre_norm"}

    # -- weights ----------------------------------------------------------------------------------------------------

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to linescan's; the mixers' parameters get an axis of routes."""
        state, out = dict(state), {}
        official = any(key.startswith("layers.") for key in state)
        for i, block in enumerate(self.blocks if official else ()):
            for name, rows in stack_routes(state, f"layers.{i}.", block.mixer).items():
                out[f"blocks.{i}.mixer.{name}"] = rows
        return out | rename(state, OFFICIAL_NAMES)


OFFICIAL_NAMES = (
    (r"^layers\.(\d+)\.", r"blocks.\1.mixer."),
    (r"^gate_layers\.(\d+)\.0\.", r"blocks.\1.mixer.activation.gate."),
    (r"^patch_embed\.projection\.", "patch_embed."),
    (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."),
    (r"^head\.fc\.", "head."),
)


# -- models -----------------------------------------------------------------------------------------------------------

# Of each data set: its name, classes, and the mean and deviation of its pixels, of 255.
SETS = {
    "uc_merced": ("UC Merced", 21, (123.770241, 125.412817, 115.357376), (44.173143, 41.635893, 39.573793)),
    "aid": ("AID", 30, (101.026087, 103.999699, 93.501577), (40.367289, 37.111323, 35.906500)),
    "resisc45": ("NWPU-RESISC45", 45, (93.847266, 97.201288, 87.665479), (37.102167, 34.616501, 33.701918)),
}


def _weights(*results: tuple[float, float]) -> dict:
    """The files of a model, one for each data set: the macro F1 of each, and its parameters in millions."""
    return {
        tag: {
            "args": {"num_classes": classes},
            "data": data,
            "preprocess": {"mean": tuple(x / 255 for x in mean), "std": tuple(x / 255 for x in std)},
            "metrics": {"F1": score},
            "params": params,
        }
        for (tag, (data, classes, mean, std)), (score, params) in zip(SETS.items(), results, strict=True)
    }


register(
    RSMamba,
    paper="IEEE GRSL 2024, arXiv 2403.19654",
    code="https://github.com/KyanChen/RSMamba",
    page="https://huggingface.co/KyanChen/RSMamba/tree/main",
    licence="Apache-2.0",
    first_conv="patch_embed",
    models={
        "rsmamba_small": {"args": {"embed_dim": 192, "depth": 16}},
        "rsmamba_base": {
            "args": {"embed_dim": 192, "depth": 24},
            "weights": _weights((93.88, 6.381), (91.66, 6.383), (94.84, 6.386)),
        },
        "rsmamba_large": {
            "args": {"embed_dim": 256, "depth": 36},
            "weights": _weights((94.74, 16.247), (91.90, 16.249), (95.02, 16.253)),
        },
        "rsmamba_huge": {
            "args": {"embed_dim": 320, "depth": 48},
            "weights": _weights((95.25, 33.053), (92.63, 33.056), (95.18, 33.061)),
        },
    },
)
