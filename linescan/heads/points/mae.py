"""Masked autoencoder of PointMamba: hidden patches of a cloud are restored from the visible ones.

Paper: "PointMamba: A Simple State Space Model for Point Cloud Analysis", Liang et al., NeurIPS 2024, arXiv 2402.10739,
after Point-MAE (arXiv 2203.06604). Official code: github.com/LMD0311/PointMamba (Apache-2.0).

Every step follows one of the backbone's curves. The encoder reads the visible patches along it, the decoder all: a scan
goes one way only, so a hidden patch is restored from what comes before it.
"""

from functools import partial
from typing import Mapping

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from ... import zoo
from ...backbones.points.contract import as_linear, register
from ...backbones.points.pointmamba import PointMamba, translate_blocks
from ...checkpoint import rename
from ...errors import InputError, known
from ...layers.blocks import Block, run
from ...layers.linear import trunc_normal_
from ...layers.mamba import MambaMixer
from ...layers.norm import LayerNorm
from ...layers.points import CentreMLP, Lengths, Patches, gather
from ...scans.routes import table

__all__ = ["PointMAE", "draw_patches"]


def draw_patches(noise: Tensor, ratio: float, centres: Tensor | None = None) -> Tensor:
    """Which patches are hidden: bool (B, G), equally many in every cloud, `ratio` of them rounded down.

    Args:
        noise: random numbers (B, G): the mask is a function of them.
        ratio: the share that is hidden.
        centres: (B, G, 3); the patches nearest to a random one are hidden. Without, any are.
    """
    if centres is not None:
        chosen = centres.gather(1, noise.argmax(1)[:, None, None].expand(-1, 1, 3))
        noise = -(centres - chosen).square().sum(-1)
    hidden = noise.argsort(1, descending=True)[:, : int(ratio * noise.shape[1])]
    return torch.zeros_like(noise, dtype=torch.bool).scatter(1, hidden, True)


class PointMAE(nn.Module):
    """Clouds -> the hidden patches, restored, and as they are.

    Args:
        backbone: the name of a PointMamba, which is trained.
        backbone_args: its arguments.
        decoder_depth: blocks of the decoder.
        mask_ratio: the share of patches that is hidden.
        mask: which are hidden: "random", or "block", those nearest to a random one.
        drop_path_rate: stochastic depth, from 0 at the first block of encoder and decoder to this at the last.

    Raises:
        InputError: another backbone, one with a class token, or no patch is hidden or visible.

    Attributes:
        built_from: the backbone's name and arguments.
    """

    def __init__(
        self,
        backbone: str = "pointmamba_modelnet40",
        backbone_args: Mapping | None = None,
        decoder_depth: int = 4,
        mask_ratio: float = 0.6,
        mask: str = "random",
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        args = {"drop_path_rate": drop_path_rate, **(backbone_args or {}), "num_classes": 0}
        fits = issubclass(zoo.find(backbone).cls, PointMamba)
        encoder = zoo.create_model(backbone, **args) if fits else None
        if encoder is None or encoder.has_class_token:
            raise InputError(f"masked pre-training is for a PointMamba without class token, which {backbone} is not")
        if not 0 < (hidden := int(mask_ratio * encoder.groups)) < encoder.groups:
            raise InputError(f"a mask ratio of {mask_ratio} hides {hidden} of {encoder.groups} patches")
        dim = encoder.embed_dim
        self.built_from = backbone, {**(backbone_args or {}), "num_classes": 0}
        self.encoder, self.mask_ratio, self.mask = encoder, mask_ratio, known("mask", mask, ("random", "block"))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_mlp = CentreMLP(dim)
        rates = calculate_drop_path_rates(drop_path_rate, decoder_depth)
        self.blocks = nn.ModuleList(Block(dim, MambaMixer(dim, 1), drop_path=rate) for rate in rates)
        self.norm = LayerNorm(dim)
        self.predict = nn.Linear(dim, 3 * encoder.group_size)
        self.grad_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As published: trunc-normal (0.02) in the encoder, Xavier in the decoder's blocks, biases (steps' too) 0."""
        trunc_normal_(self.mask_token, std=0.02)
        normal = partial(trunc_normal_, std=0.02)
        for part, fill in ((self.encoder, normal), (self.blocks, nn.init.xavier_uniform_)):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    fill(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
                if isinstance(module, MambaMixer):
                    for weight in (module.x_proj, module.dt_proj):
                        for rows in weight:
                            fill(rows)
                    nn.init.zeros_(module.dt_bias)

    def forward(
        self, points: Tensor | Patches, noise: Tensor, curve: int = 0, lengths: Lengths = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden patches, restored and as they are, (B, hidden, K, 3) both, relative to their centres.

        Args:
            points, lengths: clouds.
            noise: random numbers (B, G), of the patches along the curve: what is hidden is a function of them.
            curve: number of the backbone's curve.
        """
        found = self.encoder.group(points, lengths)
        batch, groups = noise.shape
        order = self.encoder.routes(found.centres)[:, curve].long()
        mask = draw_patches(noise, self.mask_ratio, gather(found.centres, order) if self.mask == "block" else None)
        seen = groups - int(self.mask_ratio * groups)
        visible, hidden = order.gather(1, mask.byte().argsort(dim=1, stable=True)).split([seen, groups - seen], 1)

        tokens = self.encoder.mark(self.encoder.patch_embed(found.points), curve)
        x = gather(tokens + self.encoder.pos_mlp(found.centres), visible)  # along the curve
        for unit in self.encoder.units:
            x = self.encoder.run_unit(unit, x, (table("row", x.shape[1:2] + (1,), x.device),))
        x = self.encoder.norm(x)

        everywhere = self.mask_token.to(x.dtype).expand(batch, groups, -1)
        x = everywhere.scatter(1, visible[..., None].expand_as(x), x) + self.pos_mlp(found.centres)
        for block in self.blocks:
            x = run(block, x, checkpointing=self.grad_checkpointing, route=order[:, None])
        restored = self.predict(self.norm(gather(x, hidden))).unflatten(-1, (-1, 3))
        return restored, gather(found.points[..., :3].flatten(2), hidden).unflatten(-1, (-1, 3))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.grad_checkpointing = self.encoder.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The mask token, and what the modules name."""
        names = {f"encoder.{name}" for name in self.encoder.no_weight_decay()} | {"mask_token"}
        for prefix, module in self.blocks.named_modules():
            if hasattr(module, "no_weight_decay"):
                names |= {f"blocks.{prefix}.{name}" for name in module.no_weight_decay()}
        return names

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys to ours."""
        if not any(key.startswith("MAE_encoder.") for key in state):
            return state
        encoder = self.encoder.checkpoint_filter({k: v for k, v in state.items() if k.startswith("MAE_encoder.")})
        own = as_linear({k: v for k, v in state.items() if not k.startswith("MAE_encoder.")})
        blocks = translate_blocks(own, self.blocks, "MAE_decoder.blocks.")
        return {f"encoder.{key}": x for key, x in encoder.items()} | blocks | rename(own, OFFICIAL_NAMES)


OFFICIAL_NAMES = (
    (r"^MAE_decoder\.blocks\.norm_f\.", "norm."),
    (r"^decoder_pos_embed\.", "pos_mlp."),
    (r"^increase_dim\.0\.", "predict."),
)


# -- models -----------------------------------------------------------------------------------------------------------

register(
    PointMAE,
    task="point-pretraining",
    family="pointmamba",
    paper="NeurIPS 2024, arXiv 2402.10739",
    code="https://github.com/LMD0311/PointMamba",
    licence="Apache-2.0",
    data="ShapeNet55",
    classifier=(),
    inputs=((1024, 3), (64,)),
    models={
        "pointmamba_mae": {
            "params": 16.069,
            "preprocess": {"up": "y"},
            "weights": {
                "shapenet55": {"url": "https://github.com/LMD0311/PointMamba/releases/download/ckpts-2/pretrain.pth"}
            },
        },
    },
)
