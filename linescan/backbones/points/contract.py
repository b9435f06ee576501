"""What backbones of point clouds share: clouds in, patches as tokens, positions, pooling and a classifier.

A batch of clouds is padded, (B, N, 3 or more) with `lengths`, or packed, (N, 3 or more) with `lengths`
(`linescan.layers.points`), and a model gives the same answer for both. The first three channels are coordinates.
"""

from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from ... import zoo
from ...errors import InputError, known
from ...layers.points import CentreMLP, Lengths, Patches, PointPatchEmbed, gather, patches
from ..contract import PlainBackbone, take_indices

__all__ = ["PatchBackbone", "as_linear", "check_clouds", "encoder_of", "mlp_head", "register"]


def register(cls: type, models: dict, **common) -> None:
    """Adds a family's models to the zoo (`linescan.zoo.register`), by default with clouds of 1,024 points.

    `preprocess` are arguments of `linescan.media.clouds.PointPreprocess`.
    """
    facts = {"inputs": ((1024, 3),), "classifier": "head.8"}
    zoo.register(cls, models, **facts | common)


def check_clouds(points: Tensor, in_chans: int, name: str) -> None:
    """Raises one clear InputError for what is no batch of clouds with this many channels."""
    if points.ndim not in (2, 3) or not points.is_floating_point() or points.shape[-1] != in_chans:
        raise InputError(
            f"{name} expects clouds (B, N, {in_chans}), or packed (N, {in_chans}) with lengths, of floats; "
            f"got {str(points.dtype)[6:]} {tuple(points.shape)}"
        )


def mlp_head(in_dim: int, num_classes: int, hidden: int = 256, drop_rate: float = 0.5, **factory) -> nn.Module:
    """Features (B, in_dim) -> logits (B, num_classes): the classifier of Point-BERT (arXiv 2111.14819) and after."""
    layers = []
    for width in (in_dim, hidden):
        layers += [nn.Linear(width, hidden, **factory), nn.BatchNorm1d(hidden, **factory)]
        layers += [nn.ReLU(inplace=True), nn.Dropout(drop_rate)]
    return nn.Sequential(*layers, nn.Linear(hidden, num_classes, **factory))


class PatchBackbone(PlainBackbone):
    """Patches of a cloud as tokens (B, L, dim) through equal blocks.

    Farthest point sampling chooses `groups` centres, the `group_size` nearest points of each are a patch, a small
    PointNet makes a token of it, and an MLP a position of its centre. Subclasses define `embed`, `blocks` and `norm`,
    and call `init_head` once, at the end. All methods take clouds, or the `Patches` that `group` has made of them:
    with these, a model is exported, and sampling can be left to the processes that load data.

    Args:
        embed_dim: channels of the stream.
        groups: G, number of patches.
        group_size: K, points of a patch; a cloud needs at least as many.
        in_chans: channels of a point: the coordinates, and what else `in_chans - 3` numbers say of it.
        act_layer: between the layers of the positions' MLP.
        sampling: `rule` of `farthest_points`; published weights were trained with "pointnet2".
        patch_widths: of `PointPatchEmbed`.
    """

    pools: Sequence[str] = ("avg", "max", "avg+max", "token+avg", "")
    classifiers = ("head",)

    def __init__(
        self,
        embed_dim: int,
        groups: int,
        group_size: int,
        in_chans: int,
        act_layer: Callable,
        sampling: str = "pointnet2",
        patch_widths: Sequence[int] = (128, 256, 512),
    ):
        super().__init__()
        if groups < 1 or group_size < 1:
            raise InputError(f"a cloud is cut into at least 1 group of at least 1 point, not {groups} of {group_size}")
        if in_chans < 3:
            raise InputError(f"points have at least 3 channels, their coordinates, not {in_chans}")
        self.in_chans, self.groups, self.group_size = in_chans, groups, group_size
        self.num_features = self.embed_dim = embed_dim
        self.sampling = known("sampling", sampling, ("pointnet2", "plain"))
        self.patch_embed = PointPatchEmbed(embed_dim, in_chans, patch_widths)
        self.pos_mlp = CentreMLP(embed_dim, act_layer)

    # -- patches ----------------------------------------------------------------------------------------------------

    def group(self, points: Tensor | Patches, lengths: Lengths = None) -> Patches:
        """The patches of clouds; further channels stand beside the relative coordinates. Patches are returned as given.

        Raises:
            InputError: not clouds of `in_chans` channels, or one with fewer than `group_size` points.
        """
        if isinstance(points, Patches):
            return points
        check_clouds(points, self.in_chans, type(self).__name__)
        try:
            found = patches(points[..., :3], self.groups, self.group_size, lengths, self.sampling)
        except ValueError as error:
            raise InputError(f"{type(self).__name__}: {error}") from None
        if self.in_chans > 3:
            found = found._replace(points=torch.cat([found.points, gather(points[..., 3:], found.index)], -1))
        return found

    def embed(self, points: Tensor | Patches, lengths: Lengths = None) -> tuple[Tensor, tuple[int, ...], tuple]:
        """Clouds -> the stream before the first block, the shape of its tokens, and what blocks read beside it."""
        raise NotImplementedError

    # -- features ---------------------------------------------------------------------------------------------------

    def as_stream(self, x: Tensor) -> Tensor:
        """Tokens in the dtype of the stream: that of the weights, also where layers compute in half precision."""
        return x.to(torch.promote_types(x.dtype, self.pos_mlp[0].weight.dtype))

    def forward(self, points: Tensor | Patches, lengths: Lengths = None) -> Tensor:
        """Clouds -> logits (B, num_classes), or pooled features without a classifier."""
        return self.forward_head(self.forward_features(points, lengths))

    def forward_features(self, points: Tensor | Patches, lengths: Lengths = None) -> Tensor:
        """Clouds -> all tokens (B, L, dim) after the final norm, class token included."""
        x, _, context = self.embed(points, lengths)
        for unit in self.units:
            x = self.run_unit(unit, x, context)
        return self.finish(x)

    def forward_intermediates(
        self,
        points: Tensor | Patches,
        indices: int | Sequence[int] | None = None,
        lengths: Lengths = None,
        norm: bool = False,
        stop_early: bool = False,
        intermediates_only: bool = False,
    ):
        """The tokens after each chosen block, without the class token: (B, L, dim), in stored order.

        Args:
            points, lengths: clouds.
            indices: of blocks, see `take_indices`.
            norm: apply the final norm.
            stop_early: skip the blocks after the last wanted one.
            intermediates_only: return only the list.

        Returns:
            The list, or (what `forward_features` returns, list).

        Raises:
            InputError: wrong indices or clouds.
        """
        take = take_indices(len(self.units), indices)
        x, _, context = self.embed(points, lengths)
        kept = []
        for i, unit in enumerate(self.units[: take[-1] + 1] if stop_early else self.units):
            x = self.run_unit(unit, x, context)
            if i in take:
                kept.append(self.patch_tokens(self.norm(x) if norm else x))
        return kept if intermediates_only else (self.finish(x), kept)

    # -- classifier -------------------------------------------------------------------------------------------------

    def init_head(self, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Sets pooling and classifier; `drop_rate` is that of its hidden layers."""
        modules = [f"blocks.{i}" for i in range(len(self.blocks))]
        self.feature_info = [{"num_chs": self.embed_dim, "module": module} for module in modules]
        self.drop_rate = drop_rate
        self.set_pool(global_pool)
        self.set_classifier(num_classes)

    def set_pool(self, global_pool: str) -> None:
        """Sets the pooling: words joined by "+" are pooled side by side; "" for the tokens as they are.

        Raises:
            InputError: not one of `pools`, or of the class token where there is none.
        """
        there = [pool for pool in self.pools if "token" not in pool or self.has_class_token]
        self.global_pool = known("global_pool", global_pool, there)
        self.head_hidden_size = self.num_features * len(global_pool.split("+"))
        self.fc_norm = nn.Identity()

    def set_classifier(self, num_classes: int, **factory) -> None:
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            self.head = mlp_head(self.head_hidden_size, num_classes, drop_rate=self.drop_rate, **factory)

    def pool(self, x: Tensor) -> Tensor:
        if not self.global_pool:
            return x
        return torch.cat([self.pool_one(x, kind) for kind in self.global_pool.split("+")], -1)

    def pool_one(self, x: Tensor, kind: str) -> Tensor:
        """All tokens (B, L, dim) -> one of the poolings that `global_pool` joins, (B, dim)."""
        if kind == "token":
            return self.class_tokens(x)[:, 0]
        return x.mean(1) if kind == "avg" else x.amax(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pool(x)
        return x if pre_logits else self.head(x)

    # -- training ---------------------------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """What the modules themselves name, and class tokens."""
        return {name for name in super().no_weight_decay() if name != "cls_pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning-rate decay."""
        return super().group_matcher(coarse) | {"stem": r"^cls_|^pos_mlp|^patch_embed|^order_"}

    def set_together(self, together: bool) -> None:
        """Whether a cloud's answer may depend on its batch mates, as in the published models; of those where it can."""
        for module in self.modules():
            if hasattr(module, "together"):
                module.together = together

    # -- weights ----------------------------------------------------------------------------------------------------

    def init_class_token(self, place: str | None) -> None:
        """Makes a class token and its position, at the "head" or the "tail" of the stream; None for none."""
        self.class_token = known("class_token", place, ("head", "tail", None))
        if place:
            self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, 1, self.embed_dim), std=0.02))
            self.cls_pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, 1, self.embed_dim), std=0.02))


# -- files of the authors ----------------------------------------------------------------------------------------------


def encoder_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a file of masked pre-training the encoder; other files as they are."""
    prefixes = ("MAE_encoder.", "base_model.")
    prefix = next((p for p in prefixes if any(key.startswith(p) for key in state)), "")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def as_linear(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convolutions of one tap over points, (out, in, 1), as the linear layers that they are."""
    return {key: x.squeeze(-1) if x.ndim == 3 and x.shape[-1] == 1 else x for key, x in state.items()}
